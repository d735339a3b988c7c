"""Requests of HTTP/1.1 clients to endpoints that speak HTTP/2, over streams in memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest

from netproxy.addr import SpiffeId
from netproxy.codec import h2
from netproxy.codec.events import Data, End, Informational, RequestHead, Reset, ResponseHead, Trailers
from netproxy.codec.h2 import Code, H2Limits
from netproxy.config.shard import Endpoint, MeshShard
from netproxy.errors import Reason
from netproxy.upstream.pool import PoolKey

from .h2_endpoint import H2Endpoint
from .streams import FakeStream, World, play, turns, web_shard

GET = b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n"
POST = b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 10\r\n\r\n"
UPGRADE = (
    b"GET /web HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a2V5\r\n\r\n"
)
OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
MESHED = Endpoint("10.0.0.1", 8080, identity=SpiffeId("spiffe://cluster.local/ns/shop/sa/web"), meshed=True)


@pytest.fixture(autouse=True, params=h2.ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    before = h2.engine()
    h2.use(request.param)
    yield
    h2.use(before)


def h2_world(**mesh: object) -> World:
    world = World(MeshShard(**mesh))  # type: ignore[arg-type]
    world.tables.put(web_shard(http_version="2"))
    return world


def asks(world: World, data: bytes = GET) -> FakeStream:
    client, _ = world.connect()
    client.peer_sends(data)
    return client


def problem_of(client: FakeStream) -> dict[str, object]:
    fields = json.loads(client.take_sent().partition(b"\r\n\r\n")[2])
    assert isinstance(fields, dict)
    return fields


async def ends(world: World) -> None:
    """Every client goes, what is dialled fails, the pools are emptied."""
    for live in list(world.services.live):
        live.abort()
    for dial in world.dialer.open:
        dial.fail()
    await turns()
    world.assert_idle()
    world.services.shared.expire(float("inf"))
    for kept in world.pool.expire(float("inf")):
        kept.close()
    await turns()
    world.assert_gone()


# --- exchanges that go well


def test_requests_share_one_connection() -> None:
    async def main() -> None:
        world = h2_world()
        clients = [asks(world) for _ in range(3)]
        endpoint = await H2Endpoint.accept(world)
        first, second, third = await endpoint.requests()
        assert [head.stream_id for head in (first, second, third)] == [1, 3, 5]
        assert (first.method, first.target, first.headers) == (b"GET", b"/web", [(b"host", b"web")])
        await endpoint.answer(3)
        assert [client.take_sent() for client in clients] == [b"", OK, b""]
        await endpoint.answer(5)
        await endpoint.answer(1)
        assert [client.take_sent() for client in clients] == [OK, b"", OK]
        assert len(world.dialer.dials) == 1
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        assert [reason for reason, _ in world.ends] == [Reason.OK] * 3
        world.assert_idle()
        clients[0].peer_sends(GET)
        assert (await endpoint.request()).stream_id == 7
        await endpoint.answer(7)
        assert clients[0].take_sent() == OK
        await ends(world)

    play(main)


def test_content_trailers_and_1xx_answers_pass_both_ways() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(
            world,
            b"POST /web HTTP/1.1\r\nHost: web\r\nTE: trailers\r\nConnection: te\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n0\r\nx: 1\r\n\r\n",
        )
        endpoint = await H2Endpoint.accept(world)
        events = await endpoint.take()
        head = next(event for event in events if isinstance(event, RequestHead))
        assert head.headers == [(b"host", b"web"), (b"te", b"trailers")]
        assert events[-3:] == [Data(1, b"abc"), Trailers(1, [(b"x", b"1")]), End(1)]
        await endpoint.say(1, Informational(1, 103, [(b"link", b"a")]))
        assert client.take_sent() == b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n"
        await endpoint.answer(1, headers=[(b"a", b"b")], trailers=[(b"y", b"2")])
        assert client.take_sent() == (
            b"HTTP/1.1 200 OK\r\na: b\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\ny: 2\r\n\r\n"
        )
        await ends(world)

    play(main)


def test_what_is_said_in_one_turn_goes_out_in_one_piece() -> None:
    async def main() -> None:
        world = h2_world()
        clients = [asks(world) for _ in range(4)]
        endpoint = await H2Endpoint.accept(world)
        for head in await endpoint.requests():
            await endpoint.answer(head.stream_id)
        writes = []
        write = endpoint.stream.write
        endpoint.stream.write = lambda data: (writes.append(data), write(data))[1]  # type: ignore[method-assign]
        for client in clients:
            client.peer_sends(GET)
        await turns()
        assert len(writes) == 1
        assert len(await endpoint.requests()) == 4
        await ends(world)

    play(main)


# --- how many


def test_a_full_connection_is_joined_by_another() -> None:
    async def main() -> None:
        world = h2_world()
        limits = H2Limits(max_streams=2)
        clients = [asks(world) for _ in range(3)]
        one = await H2Endpoint.accept(world, limits)
        assert len(await one.requests()) == 2
        # The third one is dialled for, now that it is known how many it takes.
        two = await H2Endpoint.accept(world, limits)
        assert len(await two.requests()) == 1
        assert world.services.shared.statistics() == (2, 0, 0, 0)
        await one.answer(1)
        assert clients[0].take_sent() == OK
        clients[0].peer_sends(GET)
        assert (await one.request()).stream_id == 5
        clients.append(asks(world))
        assert len(await two.requests()) == 1
        assert len(world.dialer.dials) == 2
        await ends(world)

    play(main)


def test_who_waits_gets_a_stream_that_is_free_before_the_dial_is_done() -> None:
    async def main() -> None:
        world = h2_world()
        asks(world)
        endpoint = await H2Endpoint.accept(world, H2Limits(max_streams=1))
        await endpoint.request()
        second = asks(world)
        await turns()
        assert world.services.shared.statistics() == (2, 0, 1, 1)
        await endpoint.answer(1)
        assert (await endpoint.request()).stream_id == 3
        await endpoint.answer(3)
        assert second.take_sent() == OK
        # The other one is not needed any more, and is kept for a while.
        other = await H2Endpoint.accept(world)
        assert not await other.requests()
        assert world.services.shared.statistics() == (2, 2, 0, 0)
        await ends(world)

    play(main)


def test_our_own_limit_holds_too() -> None:
    async def main() -> None:
        world = h2_world(http2_max_upstream_streams=1)
        asks(world), asks(world)
        one = await H2Endpoint.accept(world)
        assert len(await one.requests()) == 1
        two = await H2Endpoint.accept(world)
        assert len(await two.requests()) == 1
        await ends(world)

    play(main)


def test_past_the_limit_of_connections_requests_are_refused() -> None:
    async def main() -> None:
        world = h2_world(http2_max_upstream_streams=1)
        world.services.shared._pool.max_open = 1
        asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.request()
        client = asks(world)
        assert problem_of(client)["reason"] == "OVERLOADED"
        await endpoint.answer(1)
        client = asks(world)
        await endpoint.request()
        await endpoint.answer(3)
        assert client.take_sent() == OK
        await ends(world)

    play(main)


# --- dials


def test_a_dial_that_fails_fails_all_that_waited() -> None:
    async def main() -> None:
        world = h2_world()
        clients = [asks(world) for _ in range(3)]
        await turns()
        (dial,) = world.dialer.open
        dial.fail(Reason.CONNECT_TIMEOUT)
        await turns()
        assert [problem_of(client)["reason"] for client in clients] == ["CONNECT_TIMEOUT"] * 3
        world.assert_idle()
        await ends(world)

    play(main)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["HTTP/1.1", "nothing"])
def test_an_endpoint_that_does_not_speak_http2(answer: bytes) -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        stream = await world.accept()
        stream.peer_sends(answer) if answer else stream.peer_ends()
        await turns()
        fields = problem_of(client)
        assert fields["reason"] in ("UPSTREAM_PROTOCOL", "UPSTREAM_CLOSED")
        assert "SETTINGS" in str(fields["detail"])
        assert stream.closing
        await turns()
        await ends(world)

    play(main)


def test_an_endpoint_that_allows_no_streams() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        stream = await world.accept()
        stream.peer_sends(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00")
        await turns()
        assert problem_of(client)["reason"] == "OVERLOADED"
        assert stream.closing
        await ends(world)

    play(main)


def test_who_gives_up_waiting_is_forgotten() -> None:
    async def main() -> None:
        world = h2_world()
        client, other = asks(world), asks(world)
        await turns()
        client.peer_resets()
        await turns()
        assert world.services.shared.statistics() == (1, 0, 1, 1)
        endpoint = await H2Endpoint.accept(world)
        assert len(await endpoint.requests()) == 1
        await endpoint.answer(1)
        assert other.take_sent() == OK
        assert (Reason.DOWNSTREAM_CLOSED, 0) in world.ends
        await ends(world)

    play(main)


def test_a_timeout_while_waiting() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        world.check(400.0)
        assert problem_of(client)["reason"] == "UPSTREAM_TIMEOUT"
        endpoint = await H2Endpoint.accept(world)
        assert not await endpoint.requests()
        await ends(world)

    play(main)


def test_a_workload_that_is_gone_leaves_nothing() -> None:
    async def main() -> None:
        world = h2_world()
        asks(world)
        endpoint = await H2Endpoint.accept(world, H2Limits(max_streams=1))
        asks(world)
        await turns()
        for live in list(world.services.live):
            live.abort()
        world.services.shared.drop(world.shard.key().partition("/")[2])  # type: ignore[arg-type]
        await turns()
        assert endpoint.stream.closing
        world.assert_gone()

    play(main)


# --- what ends one request


def test_a_client_that_gives_up_resets_its_stream_alone() -> None:
    async def main() -> None:
        world = h2_world()
        client, other = asks(world), asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        client.peer_resets()
        (reset,) = await endpoint.take(Reset)
        assert isinstance(reset, Reset) and (reset.stream_id, reset.code) == (1, Code.CANCEL)
        await endpoint.answer(3)
        assert other.take_sent() == OK
        await ends(world)

    play(main)


def test_a_request_timeout_resets_the_stream() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        world.check(400.0)
        assert problem_of(client)["reason"] == "UPSTREAM_TIMEOUT"
        assert len(await endpoint.take(Reset)) == 1
        await ends(world)

    play(main)


def test_clients_that_give_up_often_do_not_use_up_the_patience_of_the_endpoint() -> None:
    async def main() -> None:
        world = h2_world()
        asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        for _ in range(100):
            asks(world).peer_resets()
            await turns()
            await endpoint.take()
        # The first request still goes on here, the next one elsewhere.
        client = asks(world)
        other = await H2Endpoint.accept(world)
        assert len(await other.requests()) == 1
        await other.answer(1)
        assert client.take_sent() == OK
        await endpoint.answer(1)
        await turns()
        assert endpoint.stream.closing
        await ends(world)

    play(main)


def test_a_reset_before_the_answer_is_502_and_after_it_ends_the_client() -> None:
    async def main() -> None:
        world = h2_world()
        client, other = asks(world), asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        await endpoint.reset(1, Code.INTERNAL_ERROR)
        assert problem_of(client)["reason"] == "UPSTREAM_CLOSED"
        await endpoint.say(3, ResponseHead(3, 200, []), Data(3, b"part"))
        await endpoint.reset(3, Code.INTERNAL_ERROR)
        assert other.was_reset
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


def test_an_early_answer_ends_the_request() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, POST)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        await endpoint.answer(1, status=413)
        assert client.take_sent().startswith(b"HTTP/1.1 413 ")
        await endpoint.turn()
        assert endpoint.engine.open_streams == 0
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


# --- what was not begun with


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_refused_stream_is_sent_again_once(method: bytes) -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, method + b" /web HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc")
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        await endpoint.reset(1)
        events = await endpoint.take()
        assert [type(event) for event in events] == [RequestHead, Data, End]
        await endpoint.reset(3)
        assert problem_of(client)["reason"] == "UPSTREAM_CLOSED"
        assert not await endpoint.requests()
        await ends(world)

    play(main)


def test_goaway_moves_what_was_not_begun_with() -> None:
    async def main() -> None:
        world = h2_world()
        client, moved = asks(world), asks(world, b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n")
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        goaway = b"\x00\x00\x08\x07\x00" + bytes(4) + (1).to_bytes(4, "big") + bytes(4)
        endpoint.stream.peer_sends(goaway)
        other = await H2Endpoint.accept(world)
        assert len(await other.requests()) == 1
        await other.answer(1)
        assert moved.take_sent() == OK
        await endpoint.answer(1)
        assert client.take_sent() == OK
        await turns()
        assert endpoint.stream.closing
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


def test_what_is_too_large_to_be_held_is_not_sent_again() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 70000\r\n\r\n" + bytes(70000))
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        await endpoint.reset(1)
        assert problem_of(client)["reason"] == "UPSTREAM_CLOSED"
        await ends(world)

    play(main)


def test_a_connection_that_breaks_fails_all_and_repeats_what_may_be() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        await endpoint.answer(1)
        assert client.take_sent() == OK
        client.peer_sends(GET)
        other = asks(world, POST + b"0123456789")
        await endpoint.requests()
        endpoint.stream.peer_resets()
        await turns()
        assert problem_of(other)["reason"] == "UPSTREAM_CLOSED"
        again = await H2Endpoint.accept(world)
        assert (await again.request()).method == b"GET"
        await again.answer(1)
        assert client.take_sent() == OK
        await ends(world)

    play(main)


def test_a_protocol_error_of_the_endpoint_fails_all() -> None:
    async def main() -> None:
        world = h2_world()
        clients = asks(world), asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        endpoint.stream.peer_sends(b"\x00\x00\x00\x04\x01\x00\x00\x00\x05")
        assert [problem_of(client)["reason"] for client in clients] == ["UPSTREAM_PROTOCOL"] * 2
        assert endpoint.stream.closing
        await turns()
        await ends(world)

    play(main)


# --- backpressure


def test_a_slow_client_is_not_credited_and_harms_nobody() -> None:
    async def main() -> None:
        world = h2_world(buffer_bytes=65535)
        slow, other = asks(world), asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        slow.peer_stalls()
        await endpoint.say(1, ResponseHead(1, 200, []))
        for _ in range(20):
            await endpoint.say(1, Data(1, bytes(10_000)))
            if endpoint.engine.is_blocked(1):
                break
        assert endpoint.engine.is_blocked(1)
        assert slow.buffered() <= 65535 + 1000
        await endpoint.answer(3)
        assert other.take_sent() == OK
        slow.peer_reads()
        await endpoint.turn()
        assert not endpoint.engine.is_blocked(1)
        await endpoint.say(1, End(1))
        assert slow.take_sent().endswith(b"0\r\n\r\n")
        assert endpoint.engine.statistics()["queued"] == 0
        await ends(world)

    play(main)


def test_a_shut_window_holds_the_client_back() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 200000\r\n\r\n")
        endpoint = await H2Endpoint.accept(world, H2Limits(stream_window=65535))
        assert not client.paused
        for _ in range(10):
            client.peer_sends(bytes(20_000))
            await endpoint.turn()
        assert client.paused
        assert client.most_held <= 160_000
        await endpoint.take()
        while client.paused:
            await endpoint.take()
        await endpoint.take()
        await endpoint.answer(1)
        assert client.take_sent() == OK
        await ends(world)

    play(main)


def test_a_full_transport_holds_all_clients_back() -> None:
    async def main() -> None:
        world = h2_world()
        first = asks(world, POST)
        second = asks(world, b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 5000\r\n\r\n")
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        endpoint.stream.peer_stalls()
        second.peer_sends(bytes(5000))
        await turns()
        assert first.paused and second.paused
        third = asks(world, POST)
        assert third.paused
        endpoint.stream.peer_reads()
        await endpoint.turn()
        assert not (first.paused or second.paused or third.paused)
        await ends(world)

    play(main)


def test_what_an_endpoint_does_not_read_of_an_answered_request_is_given_up() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
        endpoint = await H2Endpoint.accept(world, H2Limits(stream_window=65535))
        await endpoint.turn()
        await endpoint.answer(1)
        assert client.take_sent() == OK
        await endpoint.turn()
        assert endpoint.engine.open_streams == 0
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


# --- time


def test_silence_is_asked_about_once() -> None:
    async def main() -> None:
        world = h2_world()
        asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        world.check(11.0)
        await endpoint.turn()  # it answers
        world.check(11.0)
        await turns()
        assert endpoint.stream.take_sent() == b""  # gRPC servers allow no more
        await ends(world)

    play(main)


def test_an_endpoint_that_does_not_answer_a_ping_is_left() -> None:
    async def main() -> None:
        world = h2_world()
        clients = asks(world), asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        world.check(11.0)
        await turns()
        world.check(11.0)
        assert [problem_of(client)["reason"] for client in clients] == ["UPSTREAM_CLOSED"] * 2
        assert endpoint.stream.closing
        await turns()
        await ends(world)

    play(main)


def test_settings_that_are_not_acknowledged_end_the_connection() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        stream = await world.accept()
        stream.peer_sends(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        await turns()
        world.check(11.0)
        assert problem_of(client)["reason"] == "UPSTREAM_PROTOCOL"
        assert stream.closing
        await turns()
        await ends(world)

    play(main)


def test_a_connection_that_is_idle_is_closed() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        world.services.shared.expire(world.time + 1)
        assert not endpoint.stream.closing
        await endpoint.answer(1)
        assert client.take_sent() == OK
        world.services.shared.expire(world.time)
        assert not endpoint.stream.closing
        world.services.shared.expire(world.time + 1)
        assert endpoint.stream.closing
        assert endpoint.stream.take_sent()[3] == 7  # GOAWAY
        await turns()
        await ends(world)

    play(main)


def test_a_draining_worker_closes_what_is_over() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        world.services.draining = True
        world.services.shared.expire(float("inf"))
        assert not endpoint.stream.closing
        await endpoint.answer(1)
        assert client.take_sent() == OK
        await turns()
        assert endpoint.stream.closing
        await ends(world)

    play(main)


# --- tunnels


def test_an_upgrade_becomes_an_extended_connect() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, UPGRADE)
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        assert (head.method, head.target, head.protocol) == (b"CONNECT", b"/web", b"websocket")
        assert head.headers == [(b"host", b"web")]
        await endpoint.say(1, ResponseHead(1, 200, [(b"a", b"b")]))
        sent = client.take_sent()
        assert sent.startswith(b"HTTP/1.1 101 Switching Protocols\r\na: b\r\n")
        accept = h2.websocket_accept(b"a2V5")
        assert b"\r\nsec-websocket-accept: " + accept + b"\r\n" in sent
        assert b"\r\nconnection: upgrade\r\n" in sent.lower()
        client.peer_sends(b"up")
        assert await endpoint.take(Data) == [Data(1, b"up")]
        await endpoint.say(1, Data(1, b"down"))
        assert client.take_sent() == b"down"
        client.peer_ends()
        assert await endpoint.take(End) == [End(1)]
        await endpoint.say(1, End(1))
        await turns()
        assert client.closing and not client.was_reset
        assert world.ends == [(Reason.OK, 101)]
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


def test_the_rest_of_a_tunnel_that_is_over_still_goes_out() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, UPGRADE)
        endpoint = await H2Endpoint.accept(world, H2Limits(stream_window=65535))
        await endpoint.request()
        await endpoint.say(1, ResponseHead(1, 200, []))
        client.take_sent()
        client.peer_sends(bytes(100_000))
        client.peer_ends()
        await endpoint.say(1, End(1))
        moved = 0
        while events := await endpoint.take(Data):
            moved += sum(len(event.data) for event in events if isinstance(event, Data))
        assert moved == 100_000
        assert world.ends == [(Reason.OK, 101)]
        world.check(1.0)
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


def test_the_rest_of_a_tunnel_that_nobody_reads_is_given_up() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, UPGRADE)
        endpoint = await H2Endpoint.accept(world, H2Limits(stream_window=65535))
        await endpoint.request()
        await endpoint.say(1, ResponseHead(1, 200, []))
        client.peer_sends(bytes(100_000))
        client.peer_ends()
        await endpoint.say(1, End(1))
        assert world.services.shared.statistics() == (1, 0, 0, 0)
        world.check(1.0)
        world.check(3700.0)
        await endpoint.turn()
        assert endpoint.engine.open_streams == 0
        world.check(1.0)
        assert world.services.shared.statistics() == (1, 1, 0, 0)
        await ends(world)

    play(main)


def test_an_extended_connect_that_is_refused() -> None:
    async def main() -> None:
        world = h2_world()
        client = asks(world, UPGRADE)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.request()
        await endpoint.answer(1, b"", status=403)
        assert client.take_sent().startswith(b"HTTP/1.1 403 ")
        await ends(world)

    play(main)


@pytest.mark.parametrize("known", [False, True])
def test_without_extended_connect_an_upgrade_is_http1(known: bool) -> None:
    async def main() -> None:
        world = h2_world()
        if known:
            asks(world)
        client = asks(world, UPGRADE)
        await H2Endpoint.accept(world, H2Limits(connect_protocol=False))
        upstream = await world.accept()
        sent = upstream.take_sent()
        assert sent.startswith(b"GET /web HTTP/1.1\r\n") and b"upgrade: websocket\r\n" in sent
        upstream.peer_sends(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert client.take_sent().startswith(b"HTTP/1.1 101 ")
        await ends(world)

    play(main)


def test_connect_through_http2() -> None:
    async def main() -> None:
        world = World()
        world.tables.put(web_shard_for_all())
        client = asks(world, b"CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n")
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        assert (head.method, head.target, head.protocol) == (b"CONNECT", b"web:80", b"")
        await endpoint.say(1, ResponseHead(1, 200, []))
        assert client.take_sent().startswith(b"HTTP/1.1 200 ")
        client.peer_sends(b"up")
        assert await endpoint.take(Data) == [Data(1, b"up")]
        client.peer_resets()
        assert len(await endpoint.take(Reset)) == 1
        await ends(world)

    play(main)


def web_shard_for_all() -> object:
    shard = web_shard(http_version="2")
    (port,) = shard.ports
    return dataclasses.replace(shard, ports=(dataclasses.replace(port, rules=None),))


# --- between agents


def mesh_world(http_version: str = "", **mesh: object) -> World:
    world = World(MeshShard(**mesh))  # type: ignore[arg-type]
    world.tables.put(web_shard((MESHED,), http_version=http_version))  # type: ignore[arg-type]
    return world


def test_what_is_offered_to_agents() -> None:
    async def main() -> None:
        for version, mesh_http, offered in (
            ("", "auto", ("netproxy/h2/http/1.1", "netproxy/http/1.1")),
            ("1.1", "http1", ("netproxy/http/1.1",)),
            ("1.1", "http2", ("netproxy/h2/http/1.1", "netproxy/http/1.1")),
            ("", "http2", ("netproxy/h2/http/1.1", "netproxy/http/1.1")),
            ("2", "http1", ("netproxy/h2", "netproxy/http/1.1")),
        ):
            world = mesh_world(version, mesh_http=mesh_http)
            await offers(world, offered)
        # Their names would be in lower case.
        await offers(mesh_world("", header_case="preserve"), ("netproxy/http/1.1",))

    async def offers(world: World, offered: tuple[str, ...]) -> None:
        client = asks(world)
        await turns()
        (dial,) = world.dialer.open
        assert dial.tls == (world.shard.identity, MESHED.identity, offered)
        dial.fail()
        await turns()
        assert problem_of(client)["reason"] == "CONNECT_FAILED"
        await ends(world)

    play(main)


def test_an_agent_that_chooses_http1_gets_http1() -> None:
    async def main() -> None:
        world = mesh_world("2")
        clients = [asks(world) for _ in range(2)]
        await turns()
        (dial,) = world.dialer.open
        stream = FakeStream()
        stream.alpn = "netproxy/http/1.1"
        stream.pause_reading()
        dial.answer.set_result(stream)
        await turns()
        assert stream.take_sent().startswith(b"GET /web HTTP/1.1\r\n")
        (second,) = world.dialer.open
        assert second.tls is not None and second.tls[2] == ("netproxy/http/1.1",)
        other = second.accept()
        await turns()
        assert other.take_sent().startswith(b"GET /web HTTP/1.1\r\n")
        for upstream, client in zip((stream, other), clients, strict=True):
            upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            assert client.take_sent().endswith(b"\r\n\r\nok")
        # For a while nobody asks again.
        clients[0].peer_sends(GET)
        assert other.take_sent().startswith(b"GET ")
        other.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        world.time += 31.0
        clients[0].peer_sends(GET)
        await turns()
        assert len(world.dialer.open) == 1
        world.dialer.open[0].fail()
        await turns()
        await ends(world)

    play(main)


def test_upgrades_between_agents_are_http1() -> None:
    async def main() -> None:
        world = mesh_world(mesh_http="http2")
        asks(world, UPGRADE)
        await turns()
        (dial,) = world.dialer.open
        assert dial.tls is not None and dial.tls[2] == ("netproxy/http/1.1",)
        dial.fail()
        await turns()
        await ends(world)

    play(main)


def test_silent_agents_are_asked_again_and_again() -> None:
    async def main() -> None:
        world = mesh_world("2")
        asks(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.requests()
        for _ in range(3):
            world.check(11.0)
            await turns()
            assert endpoint.stream.sent
            await endpoint.turn()
        key = PoolKey(world.facts().workload, world.dialer.dials[0].endpoint, f"netproxy/h2 {MESHED.identity}")
        assert not world.services.shared.speaks_http1(key)
        await ends(world)

    play(main)
