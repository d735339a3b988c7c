"""Requests of clients that speak HTTP/2, over streams in memory: mostly to endpoints that speak HTTP/1.1."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from netproxy.addr import OriginalDst, ServiceKey, SpiffeId
from netproxy.codec import h2
from netproxy.codec.events import Data, End, GoAway, Trailers
from netproxy.codec.h2 import PREFACE, Code, H2Limits
from netproxy.codec.h2_strict import Frame
from netproxy.config.shard import MeshShard, ServicePort, ServiceShard
from netproxy.errors import Reason
from netproxy.relay.downstream_h2 import DRAIN_STEP_S, server_limits
from netproxy.relay.services import Stamps

from .h2_client import H2TestClient
from .h2_endpoint import H2Endpoint
from .streams import HIGH_WATER, OTHER_ENDPOINT, FakeStream, World, play, turns, web_shard

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
SENT = b"GET /web HTTP/1.1\r\nhost: web\r\n\r\n"
WIDE = H2Limits(stream_window=1 << 20, connection_window=1 << 24)


@pytest.fixture(autouse=True, params=h2.ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    before = h2.engine()
    h2.use(request.param)
    yield
    h2.use(before)


def h1_world(mesh: MeshShard | None = None) -> World:
    world = World(mesh or MeshShard())
    world.tables.put(web_shard(http_version="1.1"))
    return world


async def accept(world: World, client: H2TestClient) -> FakeStream:
    await client.turn()
    return await world.accept()


def raw(kind: Frame, stream_id: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


async def over(world: World, client: H2TestClient) -> None:
    client.stream.peer_reads()
    client.stream.peer_resets()
    await turns()
    for upstream in world.pool.expire(float("inf")):
        upstream.close()
    world.services.shared.expire(float("inf"))
    await turns()
    world.assert_gone()


# --- exchanges that go well


def test_one_exchange() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask()
        upstream = await accept(world, client)
        assert upstream.take_sent() == SENT
        world.time += 0.25
        upstream.peer_sends(OK)
        answer = await client.answer(stream_id)
        assert (answer.status, answer.headers, answer.body, answer.ended) == (
            200,
            [(b"content-length", b"2")],
            b"ok",
            True,
        )
        (entry,) = world.recorder.entries
        assert (entry.reason, entry.status, entry.numbers, entry.protocol) == (Reason.OK, 200, (0.25, 0, 2), "http/2")
        assert world.lines[0]["protocol"] == "HTTP/2"
        assert world.lines[0]["authority"] == "web"
        assert repr(client.connection).endswith("open streams=0 requests=1>")
        world.assert_idle()
        await over(world, client)

    play(main)


def test_what_is_said_in_one_turn_goes_out_in_one_piece() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        for _ in range(3):
            client.ask()
        await turns()
        upstreams = [dial.accept() for dial in world.dialer.open]
        await turns()
        writes: list[bytes] = []
        client.stream.write = writes.append  # type: ignore[method-assign]
        for upstream in upstreams:
            upstream.peer_sends(OK)
        assert writes == []
        await turns()
        assert len(writes) == 1

    play(main)


def test_many_at_once_are_answered_in_any_order() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        asked = [client.ask(b"/web/%d" % n) for n in range(100)]
        await client.turn()
        upstreams: dict[bytes, FakeStream] = {}
        for dial in world.dialer.open:
            upstream = dial.accept()
            await turns(2)
            upstreams[upstream.take_sent().split()[1]] = upstream
        for n in reversed(range(100)):
            upstreams[b"/web/%d" % n].peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n%03d" % n)
        await client.turn()
        assert [client.answers[stream_id].body for stream_id in asked] == [b"%03d" % n for n in range(100)]
        assert world.ends == [(Reason.OK, 200)] * 100
        world.assert_idle()
        await over(world, client)

    play(main)


def test_one_more_than_allowed_is_refused_and_told() -> None:
    async def main() -> None:
        world = h1_world(MeshShard(http2_max_streams=2))
        client = H2TestClient(*world.connect_http2())
        # Before it has seen how many are allowed.
        asked = [client.ask() for _ in range(3)]
        answer = await client.answer(asked[2])
        assert answer.reset is not None and answer.reset.untouched
        assert world.ends == [(Reason.OVERLOADED, 0)]
        assert client.engine.free_streams == 0
        await over(world, client)
        assert len(world.ends) == 3

    play(main)


def test_content_and_trailers_pass_both_ways() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", headers=[(b"te", b"trailers"), (b"trailer", b"x")], body=None)
        client.say(stream_id, Data(stream_id, b"ab"))
        upstream = await accept(world, client)
        client.say(stream_id, Data(stream_id, b"c"), Trailers(stream_id, [(b"x", b"1"), (b"x-netproxy-reason", b"UF")]))
        client.say(stream_id, End(stream_id))
        await client.turn()
        head, _, body = upstream.take_sent().partition(b"\r\n\r\n")
        assert set(head.split(b"\r\n")) == {
            b"POST /web HTTP/1.1", b"host: web", b"trailer: x", b"te: trailers", b"connection: te",
            b"transfer-encoding: chunked",
        }  # fmt: skip
        assert body == b"2\r\nab\r\n1\r\nc\r\n0\r\nx: 1\r\n\r\n"
        upstream.peer_sends(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: y\r\n\r\n2\r\nok\r\n0\r\ny: 2\r\n"
            b"x-forwarded-client-cert: evil\r\n\r\n"
        )
        answer = await client.answer(stream_id)
        assert (answer.headers, answer.body, answer.trailers) == ([(b"trailer", b"y")], b"ok", [(b"y", b"2")])
        assert world.recorder.entries[0].numbers[1:] == (3, 2)
        world.assert_idle()
        await over(world, client)

    play(main)


def test_cookies_are_joined_and_the_authority_is_the_host() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.ask(headers=[(b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")])
        upstream = await accept(world, client)
        assert upstream.take_sent() == b"GET /web HTTP/1.1\r\nhost: web\r\ncookie: a=1; b=2\r\nx: y\r\n\r\n"
        await over(world, client)

    play(main)


def test_nothing_of_one_connection_is_told_in_the_other_version() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask()
        upstream = await accept(world, client)
        upstream.peer_sends(
            b"HTTP/1.1 103 Early Hints\r\nlink: a\r\nconnection: close\r\nkeep-alive: 3\r\n\r\n"
            b"HTTP/1.1 426 No\r\nupgrade: x\r\nconnection: upgrade, x-hop\r\nx-hop: 1\r\nkeep-alive: 3\r\n"
            b"proxy-connection: a\r\ntransfer-encoding: chunked\r\nte: a\r\n\r\n2\r\nno\r\n0\r\n\r\n"
        )
        answer = await client.answer(stream_id)
        assert answer.informational == [(103, [(b"link", b"a")])]
        assert (answer.status, answer.headers, answer.body) == (426, [], b"no")
        await over(world, client)

    play(main)


@pytest.mark.parametrize(
    ("method", "said", "headers"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n", [(b"content-length", b"7")]),
        (b"HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", []),
        (b"GET", b"HTTP/1.1 204 No\r\nx: 1\r\n\r\n", [(b"x", b"1")]),
        (
            b"GET",
            b"HTTP/1.1 304 No\r\ncontent-length: 7\r\netag: x\r\n\r\n",
            [(b"content-length", b"7"), (b"etag", b"x")],
        ),
    ],
)
def test_answers_without_content(method: bytes, said: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=method)
        upstream = await accept(world, client)
        upstream.peer_sends(said)
        answer = await client.answer(stream_id)
        assert (answer.headers, answer.body, answer.ended) == (headers, b"", True)
        assert world.pool.idle_count == 1
        await over(world, client)

    play(main)


def test_a_body_that_ends_with_the_connection() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask()
        upstream = await accept(world, client)
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\n\r\nall ")
        upstream.peer_sends(b"of it")
        assert not (await client.answer(stream_id)).ended
        upstream.peer_ends()
        answer = await client.answer(stream_id)
        assert (answer.body, answer.ended) == (b"all of it", True)
        await over(world, client)

    play(main)


def test_continue_is_passed_on_and_said_by_us_when_nobody_does() -> None:
    async def main() -> None:
        world = h1_world(MeshShard(expect_continue_timeout_s=0.0))
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"PUT", headers=[(b"expect", b"100-continue")], body=None)
        upstream = await accept(world, client)
        answer = await client.answer(stream_id)
        assert answer.informational == [(100, [])]
        client.say(stream_id, Data(stream_id, b"x"), End(stream_id))
        upstream.peer_sends(OK)
        await client.turn()
        assert answer.status == 200
        await over(world, client)

    play(main)


def test_to_an_endpoint_that_speaks_http2_too() -> None:
    async def main() -> None:
        world = World()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", headers=[(b"te", b"trailers")], body=b"abc")
        await client.turn()
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        assert (head.method, head.target, head.scheme) == (b"POST", b"/web", b"http")
        assert head.headers == [(b"host", b"web"), (b"te", b"trailers")]
        await endpoint.answer(head.stream_id, b"ok", headers=[(b"x", b"1")], trailers=[(b"grpc-status", b"0")])
        answer = await client.answer(stream_id)
        assert (answer.headers, answer.body, answer.trailers) == ([(b"x", b"1")], b"ok", [(b"grpc-status", b"0")])
        assert world.ends == [(Reason.OK, 200)]
        await over(world, client)

    play(main)


# --- answers of our own


def test_what_is_refused_is_answered_and_the_others_go_on() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        fine = client.ask()
        missing = client.ask(b"/missing", b"POST", body=None)
        upstream = await accept(world, client)
        answer = await client.answer(missing)
        assert answer.status == 404
        assert answer.problem["reason"] == "NO_ROUTE"
        # The rest of the request is not wanted, and that is no error (RFC 9113 section 8.1).
        assert answer.reset is not None and answer.reset.code == Code.NO_ERROR
        upstream.peer_sends(OK)
        assert (await client.answer(fine)).body == b"ok"
        assert world.ends == [(Reason.NO_ROUTE, 404), (Reason.OK, 200)]
        await over(world, client)

    play(main)


def test_the_content_of_refused_requests_costs_no_window() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        for _ in range(60):
            stream_id = client.ask(b"/missing", b"POST", body=bytes(60_000))
            await client.turn()
            assert client.answers[stream_id].status == 404
        assert client.connection.engine.statistics()["owed"] == 0
        await over(world, client)

    play(main)


def test_a_head_that_is_too_large_is_told_of() -> None:
    async def main() -> None:
        world = h1_world(MeshShard(max_head_bytes=2048))
        client = await H2TestClient.connect(world)
        answer = await client.answer(client.ask(headers=[(b"x", bytes(b"y" * 4000))]))
        assert answer.status == 431
        assert answer.problem["reason"] == "HEAD_TOO_LARGE"
        assert world.ends == [(Reason.HEAD_TOO_LARGE, 431)]
        assert world.lines[0]["protocol"] == "HTTP/2"
        assert world.lines[0]["response_code_details"] == "http2.headers_too_large"
        assert (await client.answer(client.ask(b"/missing"))).status == 404
        await over(world, client)

    play(main)


def test_a_head_that_breaks_a_rule_is_told_of() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.stream.peer_sends(raw(Frame.HEADERS, 1, b"\x82\x86", 5))  # neither :path nor :authority
        await turns()
        assert world.ends == [(Reason.DOWNSTREAM_PROTOCOL, 0)]
        assert not client.stream.closing
        await over(world, client)

    play(main)


def test_strict_refuses_each_request() -> None:
    async def main() -> None:
        world = h1_world()
        world.shard.port_mtls[80] = "STRICT"
        facts = world.facts(inbound=True)
        client = await H2TestClient.connect(world, facts)
        for _ in range(2):
            answer = await client.answer(client.ask())
            assert (answer.status, answer.problem["reason"]) == (403, "MTLS_REQUIRED")
        await over(world, client)

    play(main)


def test_what_an_agent_restores_as_http1() -> None:
    async def main() -> None:
        world = World()
        facts = world.facts(inbound=True)
        facts.dst, facts.peer, facts.peer_sha256 = OriginalDst("10.0.0.9", 8080), SpiffeId("spiffe://a/b"), "ab"
        facts.as_http1 = True
        client = await H2TestClient.connect(world, facts)
        client.ask(headers=[(b"x-forwarded-client-cert", b"evil")])
        upstream = await accept(world, client)
        sent = upstream.take_sent()
        assert sent.startswith(b"GET /web HTTP/1.1\r\nhost: web\r\nx-forwarded-client-cert: By=")
        assert b"evil" not in sent
        assert sent.endswith(b"x-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: http\r\n\r\n")
        await over(world, client)

    play(main)


# --- resets


def test_a_client_that_gives_up_cancels_its_request_only() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        first, second = client.ask(), client.ask()
        await turns()
        upstreams = [dial.accept() for dial in world.dialer.open]
        await turns()
        client.reset(first)
        await turns()
        assert upstreams[0].was_reset and not upstreams[1].was_reset
        assert world.ends == [(Reason.DOWNSTREAM_CLOSED, 0)]
        upstreams[1].peer_sends(OK)
        assert (await client.answer(second)).body == b"ok"
        await over(world, client)

    play(main)


def test_a_reset_while_the_endpoint_is_dialled() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", body=None)
        client.say(stream_id, Data(stream_id, bytes(30_000)))
        await turns()
        client.reset(stream_id)
        await turns()
        assert world.ends == [(Reason.DOWNSTREAM_CLOSED, 0)]
        assert client.connection.engine.statistics()["owed"] == 0
        await over(world, client)

    play(main)


def test_content_that_waited_for_an_endpoint_that_can_not_be_had() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        for _ in range(20):
            stream_id = client.ask(method=b"POST", body=None)
            client.say(stream_id, Data(stream_id, bytes(60_000)))
            await client.turn()
            world.dialer.open[0].fail()
            answer = await client.answer(stream_id)
            assert answer.problem["reason"] == "CONNECT_FAILED"
        assert client.connection.engine.statistics()["owed"] == 0
        await over(world, client)

    play(main)


def test_a_response_that_breaks_off_is_a_reset_of_its_stream() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask()
        upstream = await accept(world, client)
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        await client.turn()
        upstream.peer_ends()
        answer = await client.answer(stream_id)
        assert answer.reset is not None and answer.reset.code == Code.INTERNAL_ERROR
        assert answer.body == b"half" and not answer.ended
        assert world.ends == [(Reason.UPSTREAM_CLOSED, 200)]
        assert not client.stream.closing
        await over(world, client)

    play(main)


def test_an_endpoint_that_answers_early_is_not_waited_for() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", body=None)
        client.say(stream_id, Data(stream_id, b"part"))
        upstream = await accept(world, client)
        upstream.peer_sends(b"HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n")
        answer = await client.answer(stream_id)
        assert answer.status == 413 and answer.ended
        assert answer.reset is not None and answer.reset.code == Code.NO_ERROR
        assert upstream.was_reset
        assert world.ends == [(Reason.OK, 413)]
        await over(world, client)

    play(main)


def test_content_that_is_not_as_long_as_it_said() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.ask(method=b"POST", headers=[(b"content-length", b"5")], body=None)
        upstream = await accept(world, client)
        client.stream.peer_sends(raw(Frame.DATA, 1, b"123456"))
        await turns()
        assert upstream.was_reset
        assert world.ends == [(Reason.DOWNSTREAM_PROTOCOL, 0)]
        assert not client.stream.closing
        await over(world, client)

    play(main)


# --- backpressure


def test_content_waits_for_the_endpoint_and_is_bounded() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", body=None)
        for _ in range(10):
            client.say(stream_id, Data(stream_id, bytes(20_000)))
        client.say(stream_id, End(stream_id))
        await client.turn()
        assert client.connection.engine.statistics()["owed"] == 65535
        (stream,) = client.connection._streams.values()
        assert stream.held == 65535
        upstream = await world.accept()
        upstream.peer_stalls()
        await client.turn()
        assert upstream.buffered() < 2 * 65535 + HIGH_WATER
        got = 0
        while not world.pool.idle_count:
            upstream.peer_reads()
            got += len(upstream.take_sent())
            upstream.peer_stalls()
            await client.turn()
            assert upstream.buffered() + stream.held <= 2 * 65535 + HIGH_WATER
            if got > 200_000:
                upstream.peer_reads()
                upstream.peer_sends(OK)
                await client.turn()
        assert client.answers[stream_id].body == b"ok"
        assert client.connection.engine.statistics()["owed"] == 0
        assert world.recorder.entries[0].numbers[1] == 200_000
        await over(world, client)

    play(main)


def test_single_octets_are_not_held_as_objects() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", body=None)
        await turns()
        client.stream.peer_sends(raw(Frame.DATA, stream_id, b"x") * 20_000)
        gc.collect()
        (stream,) = client.connection._streams.values()
        assert stream.held == 20_000
        assert sum(map(sys.getsizeof, gc.get_referents(stream))) < 100_000
        await over(world, client)

    play(main)


def test_an_upstream_is_not_read_while_the_clients_window_is_shut() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.credits = False
        slow, quick = client.ask(), client.ask()
        await turns()
        upstreams = [dial.accept() for dial in world.dialer.open]
        await turns()
        upstreams[0].peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n")
        for _ in range(4):
            upstreams[0].peer_sends(bytes(100_000))
            await client.turn()
        assert upstreams[0].paused
        assert len(client.answers[slow].body) == 64 * 1024
        assert client.connection.engine.queued(slow) < 100_000
        # The other one is not held up.
        upstreams[1].peer_sends(OK)
        assert (await client.answer(quick)).body == b"ok"
        while not client.answers[slow].ended:
            client.engine.credit(slow, client.owed.pop(slow))
            await client.turn()
        assert len(client.answers[slow].body) == 400_000
        assert world.ends == [(Reason.OK, 200)] * 2
        await over(world, client)

    play(main)


def test_the_end_of_a_response_waits_for_the_window_without_its_exchange() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.credits = False
        stream_id = client.ask()
        upstream = await accept(world, client)
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + bytes(200_000))
        answer = await client.answer(stream_id)
        assert world.ends == [(Reason.OK, 200)]
        assert repr(client.connection._streams[stream_id]).startswith(f"<Http2Stream {stream_id} over ")
        for _ in range(3):
            # Slow, but it moves.
            assert not answer.ended
            world.check(world.mesh.idle_timeout_s - 1)
            client.engine.credit(stream_id, 50_000)
            await client.turn()
            world.check(0.0)
        assert answer.ended
        assert not client.connection._streams
        await over(world, client)

    play(main)


def test_the_rest_of_a_request_costs_no_window_while_its_answer_waits_for_one() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.credits = False
        stream_id = client.ask(method=b"POST", body=None)
        upstream = await accept(world, client)
        upstream.peer_sends(b"HTTP/1.1 413 No\r\ncontent-length: 80000\r\n\r\n" + bytes(80_000))
        await client.turn()
        assert world.ends == [(Reason.OK, 413)]
        for _ in range(10):
            client.say(stream_id, Data(stream_id, bytes(60_000)))
            await client.turn()
        assert client.connection.engine.statistics()["owed"] == 0
        client.engine.credit(stream_id, 64_000)
        answer = await client.answer(stream_id)
        assert answer.ended and answer.reset is not None and answer.reset.code == Code.NO_ERROR
        await over(world, client)

    play(main)


def test_what_many_upstreams_say_in_one_turn_is_bounded() -> None:
    async def main() -> None:
        world = h1_world(MeshShard(buffer_bytes=4096))
        client = await H2TestClient.connect(world, limits=WIDE)
        for _ in range(50):
            client.ask()
        await client.turn()
        upstreams = [dial.accept() for dial in world.dialer.open]
        await turns()
        client.stream.peer_stalls()
        for upstream in upstreams:
            upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 3000\r\n\r\n" + bytes(3000))
        assert client.stream.buffered() < 3 * 3200
        await turns()
        assert client.stream.buffered() < 3 * 3200
        client.stream.peer_reads()
        await client.turn()
        assert all(answer.ended for answer in client.answers.values())
        await over(world, client)

    play(main)


def test_a_client_that_never_reads_the_rest_is_not_waited_for_for_ever() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.credits = False
        stream_id = client.ask()
        upstream = await accept(world, client)
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 80000\r\n\r\n" + bytes(80_000))
        await client.turn()
        world.check(1.0)
        world.check(world.mesh.idle_timeout_s + 1)
        answer = await client.answer(stream_id)
        assert answer.reset is not None and answer.reset.code == Code.CANCEL
        assert not client.connection._streams
        await over(world, client)

    play(main)


async def stalled(world: World, length: int) -> tuple[H2TestClient, FakeStream, int]:
    """A client that reads nothing, and the endpoint that has sent the first 3,000 octets of its answer."""
    client = await H2TestClient.connect(world, limits=WIDE)
    first = client.ask()
    upstream = await accept(world, client)
    client.stream.peer_stalls()
    upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length + bytes(3000))
    await turns()
    return client, upstream, first


def test_while_the_transport_is_full_no_upstream_is_read_and_no_request_begun() -> None:
    async def main() -> None:
        world = h1_world()
        client, upstream, first = await stalled(world, 5000)
        assert upstream.paused
        missing = [client.ask(b"/missing") for _ in range(98)]
        late = client.ask(b"/missing", b"POST", body=bytes(100))
        await turns()
        assert client.connection.requests == 1
        assert client.stream.buffered() < 3000 + HIGH_WATER
        client.stream.peer_reads()
        await client.turn()
        assert [client.answers[stream_id].status for stream_id in [*missing, late]] == [404] * 99
        assert not upstream.paused
        upstream.peer_sends(bytes(2000))
        assert (await client.answer(first)).ended
        assert client.connection.engine.statistics()["owed"] == 0
        await over(world, client)

    play(main)


def test_the_time_of_a_request_begins_when_the_client_reads_again() -> None:
    async def main() -> None:
        world = h1_world()
        client, upstream, first = await stalled(world, 3000)
        second = client.ask()
        await turns()
        wait_s = 0.6 * world.mesh.idle_timeout_s
        world.check(wait_s)
        client.stream.peer_reads()
        await client.turn()
        world.check(wait_s)
        upstream.peer_sends(OK)
        await client.turn()
        assert [client.answers[stream_id].status for stream_id in (first, second)] == [200, 200]
        assert [entry.numbers[0] for entry in world.recorder.entries] == [0.0, pytest.approx(wait_s)]
        await over(world, client)

    play(main)


def test_a_client_that_takes_nothing_is_reset_though_it_talks() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world, limits=WIDE)
        client.ask()
        upstream = await accept(world, client)
        client.stream.peer_stalls()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + bytes(3000))
        await turns()
        for _ in range(4):
            world.check(world.mesh.idle_timeout_s / 3)
            client.stream.peer_sends(raw(Frame.PING, 0, b"12345678"))
            await turns()
        assert client.stream.was_reset
        await over(world, client)

    play(main)


# --- tunnels


def test_a_websocket_to_an_endpoint_of_http1() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(
            method=b"CONNECT", headers=[(b"sec-websocket-version", b"13")], body=None, protocol=b"websocket"
        )
        client.say(stream_id, End(stream_id))  # of the request: see `events`
        upstream = await accept(world, client)
        fields = dict(line.split(b": ", 1) for line in upstream.take_sent().split(b"\r\n")[1:-2])
        assert fields[b"upgrade"] == b"websocket" and fields[b"connection"] == b"upgrade"
        accepted = h2.websocket_accept(fields[b"sec-websocket-key"])
        upstream.peer_sends(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-accept: " + accepted + b"\r\n\r\nhello"
        )
        answer = await client.answer(stream_id)
        assert (answer.status, answer.headers, answer.body) == (200, [], b"hello")
        client.say(stream_id, Data(stream_id, b"abc"))
        await client.turn()
        assert upstream.take_sent() == b"abc"
        client.say(stream_id, End(stream_id))
        await client.turn()
        assert upstream.sent_eof
        upstream.peer_sends(b"bye")
        upstream.peer_ends()
        await client.turn()
        assert answer.body == b"hellobye" and answer.ended
        assert world.ends == [(Reason.OK, 200)]
        assert not client.connection._streams
        await over(world, client)

    play(main)


def test_a_tunnel_that_is_not_granted() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"CONNECT", body=None, protocol=b"websocket")
        client.say(stream_id, End(stream_id))
        upstream = await accept(world, client)
        upstream.peer_sends(OK)  # 200 would grant it
        answer = await client.answer(stream_id)
        assert answer.status == 502
        assert world.ends == [(Reason.UPSTREAM_PROTOCOL, 502)]
        await over(world, client)

    play(main)


def test_what_came_before_a_tunnel_was_granted_is_for_the_tunnel() -> None:
    async def main() -> None:
        world = h1_world()
        port = ServicePort(80, "http", "http", (OTHER_ENDPOINT,), http_version="1.1")
        world.tables.put(ServiceShard("shop", "other", ("240.240.0.2",), (port,)))
        facts = world.facts()
        facts.port = world.tables.ports[ServiceKey("shop/other"), 80]
        client = await H2TestClient.connect(world, facts)
        stream_id = client.ask(b"web:80", b"CONNECT", body=None)
        client.say(stream_id, End(stream_id))
        # What no client engine sends: it does not wait.
        client.stream.peer_sends(raw(Frame.DATA, stream_id, b"early"))
        client.stream.peer_sends(raw(Frame.DATA, stream_id, b"bird"))
        upstream = await accept(world, client)
        assert upstream.take_sent() == b"CONNECT web:80 HTTP/1.1\r\nhost: web:80\r\n\r\n"
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\n\r\nserver")
        client.stream.peer_sends(raw(Frame.DATA, stream_id, b"late"))
        await client.turn()
        assert upstream.take_sent() == b"earlybirdlate"
        assert client.answers[stream_id].body == b"server"
        await over(world, client)

    play(main)


def test_an_idle_tunnel_ends_and_one_that_is_aborted() -> None:
    async def main() -> None:
        for how in ("idle", "abort"):
            world = h1_world()
            client = await H2TestClient.connect(world)
            stream_id = client.ask(method=b"CONNECT", body=None, protocol=b"x")
            client.say(stream_id, End(stream_id))
            upstream = await accept(world, client)
            upstream.peer_sends(b"HTTP/1.1 101 S\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")
            assert (await client.answer(stream_id)).status == 200
            if how == "idle":
                world.check(world.mesh.idle_timeout_s + 1)
                assert world.ends == []
                world.check(world.mesh.tcp_idle_timeout_s)
                assert world.ends == [(Reason.IDLE_TIMEOUT, 200)]
                answer = await client.answer(stream_id)
                assert answer.reset is not None
            else:
                client.connection.abort()
                assert world.ends == [(Reason.DRAINING, 200)]
            await over(world, client)

    play(main)


# --- clocks and ends


def test_an_idle_connection_is_closed_so_that_nothing_is_lost() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        world.check(world.mesh.idle_timeout_s)
        await turns()
        # This one was on its way.
        client.ask(b"/missing")
        await client.turn()
        assert client.answers[1].status == 404
        assert [event.last_stream_id for event in client.events if isinstance(event, GoAway)] == [2**31 - 1, 1]
        assert client.stream.sent_eof
        client.stream.peer_ends()
        await turns()
        await over(world, client)

    play(main)


def test_draining_lets_requests_end() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask()
        upstream = await accept(world, client)
        for _ in range(3):
            client.connection.drain()
            await client.turn()
        assert not client.stream.sent_eof
        upstream.peer_sends(OK)
        assert (await client.answer(stream_id)).body == b"ok"
        assert client.stream.sent_eof
        world.check(5.0)
        await turns()
        world.assert_idle()
        assert not world.services.live

    play(main)


def test_a_client_that_does_not_see_that_we_go_is_not_waited_for() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.connection.drain()
        await turns()
        assert not client.stream.sent_eof
        world.check(DRAIN_STEP_S)
        await turns()
        assert client.stream.sent_eof
        world.check(5.0)
        await turns()
        assert not world.services.live

    play(main)


def test_settings_that_are_not_acknowledged() -> None:
    async def main() -> None:
        world = h1_world()
        client = H2TestClient(*world.connect_http2())
        client.stream.peer_sends(PREFACE + raw(Frame.SETTINGS, 0))
        await turns()
        world.check(world.mesh.header_timeout_s)
        await turns()
        assert client.stream.sent_eof
        world.check(5.0)
        await turns()
        assert not world.services.live

    play(main)


def test_a_head_that_does_not_come_to_its_end() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.stream.peer_sends(raw(Frame.HEADERS, 1, b"\x82\x86", 1))
        for _ in range(3):
            world.check(world.mesh.header_timeout_s / 3)
            client.stream.peer_sends(b"")
        await turns()
        assert client.stream.sent_eof
        await over(world, client)

    play(main)


def test_a_slow_body_is_no_slow_head() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", body=None)
        upstream = await accept(world, client)
        client.stream.peer_sends(raw(Frame.DATA, stream_id, bytes(100))[:-50])
        world.check(world.mesh.header_timeout_s + 1)
        client.stream.peer_sends(bytes(50))
        await turns()
        assert not client.stream.sent_eof
        assert upstream.take_sent().endswith(b"64\r\n" + bytes(100) + b"\r\n")
        await over(world, client)

    play(main)


def test_a_body_that_stops() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(method=b"POST", body=None)
        await accept(world, client)
        world.check(world.mesh.idle_timeout_s)
        answer = await client.answer(stream_id)
        assert (answer.status, answer.problem["reason"]) == (408, "HEAD_TIMEOUT")
        await over(world, client)

    play(main)


def test_keepalive() -> None:
    async def main() -> None:
        world = h1_world(MeshShard(http2_keepalive_s=30.0, http2_keepalive_timeout_s=5.0))
        client = await H2TestClient.connect(world)
        stream_id = client.ask()
        await accept(world, client)
        world.check(30.0)
        await client.turn()  # answers
        world.check(29.0)
        world.check(1.0)
        await turns()
        world.check(5.0)
        await turns()
        assert client.stream.was_reset
        assert client.answers[stream_id].head is None
        assert world.ends == [(Reason.DOWNSTREAM_CLOSED, 0)]
        await over(world, client)

    play(main)


@pytest.mark.parametrize(
    ("flood", "kind"),
    [
        (raw(Frame.PING, 0, bytes(8)) * 3000, "glitches"),
        (raw(Frame.SETTINGS, 0) * 3000, "glitches"),
        (raw(Frame.DATA, 1) * 3000, "glitches"),
        (raw(Frame.HEADERS, 3, b"\x82", 0) + raw(Frame.CONTINUATION, 3, b"\x82") * 3000, "block_frames"),
        (raw(Frame.WINDOW_UPDATE, 0, bytes(4)), "window_zero"),
        (raw(Frame.HEADERS, 3, b"\xff\xff\xff\xff\xff\xff\xff", 5), "hpack"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame_size"),
    ],
)
def test_a_flood_or_a_broken_rule_ends_its_connection_only(flood: bytes, kind: str) -> None:
    async def main() -> None:
        world = h1_world()
        client, other = await H2TestClient.connect(world), await H2TestClient.connect(world)
        client.ask(method=b"POST", body=None)
        upstream = await accept(world, client)
        asked = other.ask()
        other_upstream = await accept(world, other)
        client.stream.peer_sends(flood)
        await turns()
        assert upstream.was_reset
        assert world.ends == [(Reason.DOWNSTREAM_PROTOCOL, 0)]
        said = client.stream.take_sent()
        assert said[said.rindex(b" (RFC") :].endswith(b")")  # GOAWAY is the last, and says why
        assert client.stream.sent_eof
        counted = {labels: cells[0] for _, labels, cells in rows(world) if labels[0] == "http2_connection_errors"}
        assert counted == {("http2_connection_errors", kind): 1}
        other_upstream.peer_sends(OK)
        assert (await other.answer(asked)).body == b"ok"
        client.stream.peer_sends(bytes(3_000_000))
        assert client.stream.paused
        world.check(3.0)
        await over(world, other)

    play(main)


def rows(world: World) -> list[tuple[int, tuple[str, ...], tuple[int, ...]]]:
    arena = world.recorder.arena
    return [(kind, tuple(text.split("\x1f")), (arena.cells[arena.row(kind, tuple(text.split("\x1f")))],))
            for kind, text in list(arena._rows)]  # fmt: skip


def test_rapid_resets_end_the_connection() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        for _ in range(400):
            if client.engine.reusable:
                client.reset(client.ask())
                await turns(1)
        await client.turn()
        assert client.stream.sent_eof
        reasons = [reason for reason, _ in world.ends]
        assert reasons[:-1] == [Reason.DOWNSTREAM_CLOSED] * 200
        assert reasons[-1] is Reason.DOWNSTREAM_PROTOCOL
        await over(world, client)

    play(main)


def test_a_client_that_closes_ends_all_its_requests() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        for _ in range(5):
            client.ask()
        await turns()
        upstreams = [dial.accept() for dial in world.dialer.open]
        await turns()
        client.stream.peer_ends()
        await turns()
        assert all(upstream.was_reset for upstream in upstreams)
        assert world.ends == [(Reason.DOWNSTREAM_CLOSED, 0)] * 5
        assert client.stream.closing
        await turns()
        world.assert_gone()

    play(main)


def test_a_bug_of_ours_leaves_nobody_waiting() -> None:
    async def main() -> None:
        world = h1_world()
        client = await H2TestClient.connect(world)
        client.ask()
        await turns()

        class Broken(Stamps):
            def request_id(self) -> bytes:
                raise RuntimeError("a bug")

        world.services.stamps = Broken()
        with pytest.raises(RuntimeError):
            client.ask()
        assert client.stream.was_reset
        await turns()
        assert [reason for reason, _ in world.ends] == [Reason.DOWNSTREAM_CLOSED] * 2
        await over(world, client)

    play(main)


def test_limits_follow_the_configuration() -> None:
    limits = server_limits(MeshShard(http2_max_streams=10_000, max_headers=1, max_head_bytes=1024), shared=True)
    assert limits.connection_window == 10_000 * 65535
    # Another agent's requests may have passed in HTTP/1.1, where a field does not count 32 octets more.
    assert (limits.max_headers, limits.max_header_list_bytes) == (8, 1024 + 32 * 5)
    assert server_limits(MeshShard(max_head_bytes=1024), shared=False).max_header_list_bytes == 1024
    assert server_limits(MeshShard(), shared=False).connection_window == 1 << 20
