"""Transcripts of HTTP exchanges over streams in memory."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys

import pytest

from netproxy.addr import EndpointAddr, OriginalDst, ServiceKey, SpiffeId, WorkloadKey
from netproxy.config.shard import Endpoint, MeshShard, ServicePort, ServiceShard
from netproxy.errors import Reason
from netproxy.upstream.pool import PoolKey

from .streams import HIGH_WATER, VIP, FakeStream, World, play, turns, web_shard

GET = b"GET /web HTTP/1.1\r\nHost: web\r\n\r\n"
GET_SENT = b"GET /web HTTP/1.1\r\nhost: web\r\n\r\n"
MISSING = b"GET /missing HTTP/1.1\r\nHost: web\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
POST_HEAD = b"POST /web HTTP/1.1\r\nHost: web\r\nContent-Length: 10\r\n\r\n"
OVER = b"GET /web HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"


async def exchanged(world: World, client: FakeStream) -> FakeStream:
    """One exchange is done; its upstream waits in the pool."""
    client.peer_sends(GET)
    upstream = await world.accept()
    upstream.peer_sends(OK)
    assert upstream.take_sent() == GET_SENT
    assert client.take_sent() == OK
    assert world.pool.idle_count == 1
    return upstream


def problem_of(client: FakeStream) -> dict[str, object]:
    head, _, body = client.take_sent().partition(b"\r\n\r\n")
    fields = json.loads(body)
    assert isinstance(fields, dict)
    assert head.startswith(b"HTTP/1.1 %d " % fields["status"])
    return fields


# --- exchanges that go well


def test_one_exchange() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        assert world.outstanding == 1
        upstream = await world.accept()
        assert world.dialer.dials[0].endpoint == EndpointAddr("10.0.0.1", 8080)
        assert upstream.take_sent() == GET_SENT
        world.time += 0.25
        upstream.peer_sends(OK[:-2])
        upstream.peer_sends(OK[-2:])
        assert client.take_sent() == OK
        assert not client.closing
        (entry,) = world.recorder.entries
        assert (entry.reason, entry.status, entry.numbers) == (Reason.OK, 200, (0.25, 0, 2))
        assert entry.parties == ("source", "shop/client", world.shard.identity, "shop/web-1", "shop/web")
        assert entry.security == "none"
        world.assert_idle()

    play(main)


def test_one_octet_at_a_time() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        for octet in POST_HEAD + b"0123456789":
            client.peer_sends(bytes((octet,)))
        upstream = await world.accept()
        assert upstream.take_sent().endswith(b"\r\n\r\n0123456789")
        for octet in OK:
            upstream.peer_sends(bytes((octet,)))
        assert client.take_sent() == OK
        assert world.ends == [(Reason.OK, 200)]
        assert world.recorder.entries[0].numbers[1:] == (10, 2)
        world.assert_idle()

    play(main)


def test_the_upstream_is_used_again() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        upstream = await exchanged(world, client)
        other, _ = world.connect()
        other.peer_sends(GET)
        assert upstream.take_sent() == GET_SENT
        assert world.pool.idle_count == 0
        upstream.peer_sends(OK)
        assert other.take_sent() == OK
        assert len(world.dialer.dials) == 1
        world.assert_idle()

    play(main)


def test_trailers_and_chunks_pass_both_ways() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(
            b"POST /web HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: 1\r\n\r\n"
        )
        upstream = await world.accept()
        assert upstream.take_sent().endswith(b"3\r\nabc\r\n0\r\nx: 1\r\n\r\n")
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nY: 2\r\n\r\n")
        assert client.take_sent().endswith(b"2\r\nok\r\n0\r\ny: 2\r\n\r\n")
        world.assert_idle()

    play(main)


def test_trailers_and_1xx_answers_say_nothing_that_only_agents_may_say() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(
            b"POST /web HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
            b"X-Forwarded-Client-Cert: a\r\nX: 1\r\nx_forwarded_client_cert: b\r\nx-netproxy-reason: c\r\n\r\n"
        )
        upstream = await world.accept()
        assert upstream.take_sent().endswith(b"3\r\nabc\r\n0\r\nx: 1\r\n\r\n")
        upstream.peer_sends(b"HTTP/1.1 103 Early Hints\r\nx-netproxy-reason: a\r\ny: 1\r\n\r\n")
        assert client.take_sent() == b"HTTP/1.1 103 Early Hints\r\ny: 1\r\n\r\n"
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx-netproxy-reason: UF\r\n\r\n")
        assert client.take_sent().endswith(b"\r\n\r\n0\r\n\r\n")
        world.assert_idle()

    play(main)


def test_an_endpoint_that_answers_early_is_not_waited_for() -> None:
    """It may never read what is queued for it."""

    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD)
        upstream = await world.accept()
        upstream.peer_stalls()
        client.peer_sends(b"01234")
        upstream.peer_sends(b"HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n")
        assert upstream.was_reset
        await turns()
        assert world.pool.open_count == 0
        answer = client.take_sent()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in answer
        assert world.ends == [(Reason.OK, 413)]
        client.peer_ends()
        await turns()
        world.assert_gone()

    play(main)


def test_continue_is_passed_on() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD[:-2] + b"Expect: 100-continue\r\n\r\n")
        upstream = await world.accept()
        upstream.peer_sends(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert client.take_sent() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.peer_sends(b"0123456789")
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        assert world.ends == [(Reason.OK, 200)]
        world.assert_idle()

    play(main)


def test_a_body_that_ends_with_the_connection() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\n\r\nall ")
        upstream.peer_sends(b"of it")
        world.time += 2.5
        upstream.peer_ends()
        assert client.take_sent().endswith(b"4\r\nall \r\n5\r\nof it\r\n0\r\n\r\n")
        assert world.recorder.entries[0].numbers == (2.5, 0, 9)
        await turns()
        assert upstream.closing
        assert world.pool.open_count == 0
        assert world.ends == [(Reason.OK, 200)]
        assert not client.closing

    play(main)


def test_an_endpoint_that_closes_is_not_pooled() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await turns()
        assert upstream.closing
        assert client.take_sent() == b"HTTP/1.1 204 No Content\r\n\r\n"
        assert world.pool.open_count == 0
        world.assert_idle()

    play(main)


def test_a_client_that_ends_its_stream_gets_its_answer() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        client.peer_ends()
        upstream = await world.accept()
        upstream.peer_sends(OK)
        await turns()
        assert client.take_sent().endswith(b"\r\n\r\nok")
        assert client.sent_eof
        assert not client.was_reset
        assert world.ends == [(Reason.OK, 200)]
        world.assert_idle()
        assert not world.services.live

    play(main)


def test_connection_close_ends_with_the_last_octet_and_not_before() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(OVER)
        upstream = await world.accept()
        client.peer_stalls()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + bytes(900))
        assert world.ends == [(Reason.OK, 200)]
        # A slow reader is no reason to take back what it has not read yet.
        for _ in range(10):
            world.check(1.0)
            await turns()
        assert not client.was_reset
        client.peer_reads()
        await turns()
        assert client.take_sent().endswith(bytes(900))
        assert client.sent_eof
        client.peer_ends()
        await turns()
        world.assert_idle()
        assert not world.services.live

    play(main)


def test_a_client_that_never_reads_its_last_answer_is_reset_in_the_end() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(OVER)
        upstream = await world.accept()
        client.peer_stalls()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + bytes(900))
        world.check(world.mesh.idle_timeout_s)
        await turns()
        assert client.was_reset
        assert not world.services.live

    play(main)


# --- pipelining


def test_pipelined_requests_are_answered_in_order() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET + GET.replace(b"/web", b"/web/2") + MISSING)
        upstream = await world.accept()
        assert upstream.take_sent() == GET_SENT
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        assert upstream.take_sent() == GET_SENT.replace(b"/web", b"/web/2")
        upstream.peer_sends(OK)
        answers = client.take_sent()
        assert answers.startswith(OK)
        assert b" 404 " in answers[len(OK) :]
        assert world.ends == [(Reason.OK, 200), (Reason.OK, 200), (Reason.NO_ROUTE, 404)]
        world.assert_idle()

    play(main)


def test_the_time_of_a_request_begins_when_the_answers_before_it_are_read() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET * 2)
        upstream = await world.accept()
        client.peer_stalls()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\ncontent-length: 4000\r\n\r\n" + bytes(4000))
        await turns()
        wait_s = 0.6 * world.mesh.idle_timeout_s
        world.check(wait_s)
        client.peer_reads()
        await turns()
        client.take_sent()
        world.check(wait_s)
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        assert [entry.numbers[0] for entry in world.recorder.entries] == [0.0, pytest.approx(wait_s)]

    play(main)


@pytest.mark.parametrize("body", [b"", b"0123456789"], ids=["GET", "POST"])
def test_a_request_behind_one_that_is_refused_at_once(body: bytes) -> None:
    """Both in one read: what is left of the first must not be taken for the second's."""

    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(MISSING + (POST_HEAD if body else GET) + body[:4])
        if body:
            client.peer_sends(body[4:])
        upstream = await world.accept()
        assert upstream.take_sent().endswith(b"\r\n\r\n" + body)
        upstream.peer_sends(OK)
        assert client.take_sent().endswith(OK)
        assert world.ends == [(Reason.NO_ROUTE, 404), (Reason.OK, 200)]
        world.assert_idle()

    play(main)


def test_the_body_of_a_refused_request_is_dropped() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD.replace(b"/web", b"/missing") + b"01234")
        assert b" 404 " in client.take_sent()
        client.peer_sends(b"56789" + GET)
        upstream = await world.accept()
        assert upstream.take_sent() == GET_SENT
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        world.assert_idle()

    play(main)


def test_1000_pipelined_404s_do_not_recurse() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        limit = sys.getrecursionlimit()
        depth = len(_frames())
        sys.setrecursionlimit(depth + 80)
        try:
            client.peer_sends(MISSING * 1000)
        finally:
            sys.setrecursionlimit(limit)
        assert client.take_sent().count(b"HTTP/1.1 404 ") == 1000
        assert world.ends == [(Reason.NO_ROUTE, 404)] * 1000
        world.assert_idle()

    play(main)


def test_a_client_that_breaks_off_leaves_no_ring() -> None:
    """Else connection and request, with what they hold, would wait for a full collection."""

    async def broken_off(world: World) -> None:
        client, _ = world.connect()
        client.peer_sends(GET)
        await world.accept()
        client.peer_resets()
        await turns()

    async def main() -> None:
        world = World()
        await broken_off(world)
        gc.collect()
        gc.disable()
        try:
            await broken_off(world)
            assert gc.collect() == 0
        finally:
            gc.enable()

    play(main)


def _frames() -> list[object]:
    frame, out = sys._getframe(), []
    while frame is not None:
        out.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return out


# --- failures of the upstream


def test_close_in_the_middle_of_a_body_resets_the_client() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        upstream.peer_ends()
        await turns()
        assert client.was_reset
        assert upstream.closing
        assert world.ends == [(Reason.UPSTREAM_CLOSED, 200)]
        world.assert_gone()

    play(main)


@pytest.mark.parametrize("how", ["eof", "reset"])
def test_close_without_an_answer_is_a_502(how: str) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        if how == "eof":
            upstream.peer_ends()
        else:
            upstream.peer_resets()
        await turns()
        fields = problem_of(client)
        assert fields["status"] == 502
        assert fields["endpoints_tried"] == ["10.0.0.1:8080"]
        assert not client.closing
        assert world.ends == [(Reason.UPSTREAM_CLOSED, 502)]
        world.assert_idle()
        assert world.pool.open_count == 0

    play(main)


@pytest.mark.parametrize(
    "answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"]
)
def test_a_malformed_answer_is_a_502(answer: bytes) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(answer)
        await turns()
        assert problem_of(client)["status"] == 502
        assert upstream.was_reset
        assert world.ends == [(Reason.UPSTREAM_PROTOCOL, 502)]
        world.assert_idle()

    play(main)


@pytest.mark.parametrize(
    ("reason", "status"),
    [(Reason.CONNECT_FAILED, 503), (Reason.CONNECT_TIMEOUT, 503), (Reason.IDENTITY_MISMATCH, 503)],
)
def test_a_dial_that_fails(reason: Reason, status: int) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        await turns()
        world.dialer.open[0].fail(reason)
        await turns()
        assert problem_of(client)["reason"] == reason.name
        assert world.ends == [(reason, status)]
        assert not client.closing
        # The next one on the same connection has its own chance.
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        world.assert_idle()

    play(main)


def test_a_dial_that_raises_what_nobody_expected_is_a_500() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        await turns()
        world.dialer.open[0].answer.set_exception(RuntimeError("a bug"))
        await turns()
        assert problem_of(client)["status"] == 500
        assert world.ends == [(Reason.INTERNAL, 500)]
        assert world.pool.open_count == 0
        world.assert_idle()

    play(main, reports=RuntimeError)


def test_a_full_pool_is_a_503() -> None:
    async def main() -> None:
        world = World()
        world.pool.max_open = 1
        client, _ = world.connect()
        client.peer_sends(GET)
        other, _ = world.connect()
        other.peer_sends(GET)
        # Its request was not over yet when it was answered.
        assert b"\r\nconnection: close\r\n" in other.sent
        assert problem_of(other)["reason"] == "OVERLOADED"
        assert other.sent_eof
        upstream = await world.accept()
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        assert world.ends == [(Reason.OVERLOADED, 503), (Reason.OK, 200)]

    play(main)


def test_octets_that_nobody_asked_for_end_an_idle_upstream() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        upstream = await exchanged(world, client)
        upstream.peer_sends(OK)
        client.peer_sends(GET)
        await turns()
        assert upstream.was_reset
        assert not upstream.take_sent()
        fresh = await world.accept()
        fresh.peer_sends(OK)
        assert client.take_sent() == OK
        world.assert_idle()

    play(main)


def test_an_answer_with_something_behind_it_is_not_pooled() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(OK + OK)
        await turns()
        assert client.take_sent() == OK
        assert upstream.closing
        assert world.pool.open_count == 0

    play(main)


# --- replays


async def second_on_reused(world: World, request: bytes) -> tuple[FakeStream, FakeStream]:
    client, _ = world.connect()
    upstream = await exchanged(world, client)
    client.peer_sends(request)
    assert upstream.take_sent()
    return client, upstream


@pytest.mark.parametrize("how", ["eof", "reset"])
def test_a_reused_upstream_that_dies_silently_is_replaced_once(how: str) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await second_on_reused(world, GET)
        if how == "eof":
            upstream.peer_ends()
        else:
            upstream.peer_resets()
        fresh = await world.accept()
        assert fresh.take_sent() == GET_SENT
        assert not client.take_sent()
        fresh.peer_ends()
        await turns()
        # A fresh one that does so has failed.
        assert problem_of(client)["status"] == 502
        assert len(world.dialer.dials) == 2
        assert world.ends == [(Reason.OK, 200), (Reason.UPSTREAM_CLOSED, 502)]
        world.assert_idle()
        assert world.pool.open_count == 0

    play(main)


PUT_HEAD = POST_HEAD.replace(b"POST", b"PUT")
PUT_64K = PUT_HEAD.replace(b": 10", b": 65536")


@pytest.mark.parametrize(
    "request_", [POST_HEAD, POST_HEAD + b"0123456789", PUT_64K.replace(b"36", b"37") + bytes(65537)]
)
def test_what_may_have_been_done_is_not_done_again(request_: bytes) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await second_on_reused(world, request_)
        upstream.peer_ends()
        await turns()
        assert problem_of(client)["status"] == 502
        assert len(world.dialer.dials) == 1
        world.assert_idle()

    play(main)


@pytest.mark.parametrize(
    "octets", [b"H", b"HTTP/1.1 200 OK\r\ncontent-", b"HTTP/1.1 102 Processing\r\n\r\n", b"nonsense\n"]
)
def test_an_upstream_that_had_begun_to_answer_is_not_asked_again(octets: bytes) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await second_on_reused(world, GET)
        upstream.peer_sends(octets)
        upstream.peer_ends()
        await turns()
        assert b"HTTP/1.1 502 " in client.take_sent()
        assert len(world.dialer.dials) == 1
        world.assert_idle()

    play(main)


# --- the client's side


@pytest.mark.parametrize(
    ("octets", "status", "reason"),
    [
        (b"nonsense\r\n\r\n", 400, Reason.DOWNSTREAM_PROTOCOL),
        (b"GET / HTTP/1.1\r\n\r\n", 400, Reason.DOWNSTREAM_PROTOCOL),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, Reason.DOWNSTREAM_PROTOCOL),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000, 431, Reason.HEAD_TOO_LARGE),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501, Reason.NOT_IMPLEMENTED),
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 2\r\n\r\n", 417, Reason.NOT_IMPLEMENTED),
    ],
)
def test_refused_requests_close_with_a_reason(octets: bytes, status: int, reason: Reason) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(octets)
        assert problem_of(client)["status"] == status
        assert client.sent_eof
        assert not client.closing
        # What it still sends is read and dropped, so that no reset overtakes the answer.
        client.peer_sends(GET)
        assert world.ends == [(reason, status)]
        client.peer_ends()
        await turns()
        world.assert_gone()

    play(main)


def test_lingering_is_bounded_in_time_and_octets() -> None:
    """Past its octets the client waits: a reset might overtake the answer."""

    async def main() -> None:
        world = World()
        first, _ = world.connect()
        second, _ = world.connect()
        for client in (first, second):
            client.peer_sends(b"nonsense\r\n\r\n")
        world.check(1.9)
        assert not first.closing
        for _ in range(17):
            assert not second.paused
            second.peer_sends(bytes(64 * 1024))
        assert second.paused
        assert not second.closing
        world.check(0.2)
        await turns()
        assert first.closing
        assert second.closing
        assert not second.was_reset
        world.assert_gone()

    play(main)


def test_a_malformed_body_before_and_after_the_answer_began() -> None:
    async def main() -> None:
        world = World()
        chunked = b"POST /web HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n"
        client, _ = world.connect()
        client.peer_sends(chunked)
        upstream = await world.accept()
        client.peer_sends(b"nonsense\r\n")
        await turns()
        assert problem_of(client)["status"] == 400
        assert upstream.was_reset
        client.peer_ends()
        late, _ = world.connect()
        late.peer_sends(chunked)
        upstream = await world.accept()
        upstream.peer_sends(OK[:-1])
        late.peer_sends(b"nonsense\r\n")
        await turns()
        assert late.was_reset
        assert upstream.was_reset
        assert world.ends == [(Reason.DOWNSTREAM_PROTOCOL, 400), (Reason.DOWNSTREAM_PROTOCOL, 200)]
        world.assert_gone()

    play(main)


def test_a_dial_that_is_given_up_before_its_first_step_gives_its_reservation_back() -> None:
    async def main() -> None:
        world = World()
        client, upstream = await second_on_reused(world, GET)
        client.peer_resets()  # is told in the next turn ...
        upstream.peer_ends()  # ... before the task that this one begins
        await turns()
        assert len(world.dialer.dials) == 1
        assert world.ends[-1] == (Reason.DOWNSTREAM_CLOSED, 0)
        world.assert_gone()

    play(main)


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("at once", "reset"),
        ("dialling", "reset"),
        ("waiting", "reset"),
        ("waiting", "eof"),
        ("answering", "reset"),
        ("answering", "eof"),
    ],
)
def test_a_client_that_disappears(when: str, how: str) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD + b"0123")
        upstream = None
        if when != "at once":
            await turns()
        if when in ("waiting", "answering"):
            upstream = await world.accept()
        if when == "answering" and upstream is not None:
            upstream.peer_sends(OK[:-1])
        if how == "reset":
            client.peer_resets()
        else:
            client.peer_ends()
        await turns()
        assert client.closing
        assert upstream is None or upstream.was_reset
        assert all(dial.answer.done() for dial in world.dialer.dials)
        ((reason, _),) = world.ends
        assert reason is Reason.DOWNSTREAM_CLOSED
        world.assert_gone()

    play(main)


def test_an_answer_before_the_end_of_the_request() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD + b"0123")
        upstream = await world.accept()
        upstream.peer_sends(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
        await turns()
        assert client.take_sent().startswith(b"HTTP/1.1 413 ")
        assert client.sent_eof
        assert upstream.closing
        assert world.pool.open_count == 0
        client.peer_sends(b"456789")
        client.peer_ends()
        await turns()
        assert world.ends == [(Reason.OK, 413)]
        world.assert_gone()

    play(main)


# --- decisions


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        (b"/missing", 404, Reason.NO_ROUTE),
        (b"/webby", 404, Reason.NO_ROUTE),
        (b"/invalid", 500, Reason.BACKEND_INVALID),
    ],
)
def test_refusals_keep_the_connection(path: bytes, status: int, reason: Reason) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET.replace(b"/web", path))
        assert problem_of(client)["reason"] == reason.name
        assert not client.sent_eof
        assert world.ends == [(reason, status)]
        assert not world.dialer.dials
        world.assert_idle()

    play(main)


def test_the_tables_of_the_moment_decide() -> None:
    """A connection lives through changes of the configuration; a request keeps the endpoint it was given."""

    async def main() -> None:
        world = World()
        client, _ = world.connect()
        upstream = await exchanged(world, client)
        client.peer_sends(GET)
        world.tables.put(web_shard(endpoints=(Endpoint("10.0.0.7", 8080),)))
        assert world.outstanding == 0
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        client.peer_sends(GET)
        await turns()
        assert world.dialer.open[0].endpoint.host == "10.0.0.7"
        fresh = await world.accept()
        fresh.peer_sends(OK)
        assert client.take_sent() == OK
        world.tables.put(web_shard(endpoints=()))
        client.peer_sends(GET)
        assert problem_of(client)["reason"] == "NO_HEALTHY_ENDPOINT"
        world.tables.drop("service/shop/web")
        client.peer_sends(GET)
        assert problem_of(client)["reason"] == "NO_ROUTE"
        world.assert_idle()

    play(main)


def test_a_meshed_endpoint_is_dialled_with_its_identity() -> None:
    async def main() -> None:
        world = World(MeshShard(mesh_http="http1"))
        theirs = SpiffeId("spiffe://cluster.local/ns/shop/sa/web")
        world.tables.put(web_shard(endpoints=(Endpoint("10.0.0.7", 8080, identity=theirs, meshed=True),)))
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        assert world.dialer.dials[0].tls == (world.shard.identity, theirs, ("netproxy/http/1.1",))
        upstream.peer_sends(OK)
        key = PoolKey(WorkloadKey("shop/client"), EndpointAddr("10.0.0.7", 8080), f"netproxy/http/1.1 {theirs}")
        assert world.pool.take(key) is not None
        assert world.recorder.entries[0].security == "mutual_tls"

    play(main)


def test_inbound_goes_to_the_original_destination_and_says_who_asks() -> None:
    async def main() -> None:
        world = World()
        facts = world.facts(inbound=True)
        facts.dst = OriginalDst("10.0.0.9", 8080)
        facts.peer = SpiffeId("spiffe://cluster.local/ns/shop/sa/peer")
        facts.peer_sha256 = "ab" * 32
        client, _ = world.connect(facts)
        client.peer_sends(b"GET /x HTTP/1.1\r\nHost: web\r\nX-Forwarded-Client-Cert: forged\r\n\r\n")
        upstream = await world.accept()
        assert world.dialer.dials[0].endpoint == EndpointAddr("10.0.0.9", 8080)
        assert world.dialer.dials[0].tls is None
        xfcc = f"By={world.shard.identity};Hash={'ab' * 32};URI={facts.peer}"
        assert (
            upstream.take_sent() == b"GET /x HTTP/1.1\r\nhost: web\r\nx-forwarded-client-cert: %s\r\n"
            b"x-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: http\r\n\r\n" % xfcc.encode()
        )
        upstream.peer_sends(OK)
        entry = world.recorder.entries[0]
        assert entry.parties == ("destination", "shop/client", facts.peer, "shop/client", "")
        assert entry.security == "mutual_tls"
        assert world.tables.direct("10.0.0.9", 8080).outstanding == 0

    play(main)


def test_strict_refuses_each_request_without_mesh_tls() -> None:
    async def main() -> None:
        world = World()
        world.tables.put(dataclasses.replace(world.shard, mtls="STRICT"))
        client, _ = world.connect(world.facts(inbound=True))
        client.peer_sends(GET)
        assert problem_of(client)["reason"] == "MTLS_REQUIRED"
        assert world.ends == [(Reason.MTLS_REQUIRED, 403)]
        assert not world.dialer.dials
        world.assert_idle()

    play(main)


# --- time


def test_a_head_that_does_not_arrive() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(b"GET / HT")
        for _ in range(14):
            # More octets do not buy more time.
            client.peer_sends(b"T")
            world.check(1.0)
            assert not client.take_sent()
        world.check(1.0)
        assert problem_of(client)["status"] == 408
        assert world.ends == [(Reason.HEAD_TIMEOUT, 408)]
        assert client.sent_eof

    play(main)


def test_an_idle_client_is_closed_quietly() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        await exchanged(world, client)
        world.check(world.mesh.idle_timeout_s - 1)
        await turns()
        assert not client.closing
        world.check(1.0)
        await turns()
        assert client.sent_eof
        assert not client.was_reset
        assert not client.take_sent()
        assert not world.services.live
        world.assert_idle()

    play(main)


def test_an_idle_client_that_does_not_read_is_reset() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_stalls()
        client.peer_sends(MISSING)
        world.check(world.mesh.idle_timeout_s)
        await turns()
        assert client.was_reset
        assert not world.services.live

    play(main)


def test_an_upstream_that_says_nothing() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        world.check(world.mesh.idle_timeout_s)
        await turns()
        assert problem_of(client)["status"] == 504
        assert upstream.was_reset
        assert world.ends == [(Reason.UPSTREAM_TIMEOUT, 504)]
        world.assert_idle()
        assert world.pool.open_count == 0

    play(main)


def test_an_answer_that_stops_moving_is_reset() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        upstream.peer_sends(OK[:-1])
        world.check(world.mesh.idle_timeout_s - 1)
        assert not client.was_reset
        world.check(1)
        await turns()
        assert client.was_reset
        assert world.ends == [(Reason.UPSTREAM_TIMEOUT, 200)]
        world.assert_gone()

    play(main)


def test_a_client_that_stops_reading_ends_at_the_idle_timeout() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        client.peer_stalls()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 8000\r\n\r\n" + bytes(2 * HIGH_WATER))
        world.check(world.mesh.idle_timeout_s)
        await turns()
        assert client.was_reset
        assert world.ends == [(Reason.IDLE_TIMEOUT, 200)]
        world.assert_gone()

    play(main)


def test_a_request_body_that_stops_moving_is_a_408() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD)
        await world.accept()
        world.check(world.mesh.idle_timeout_s)
        await turns()
        assert problem_of(client)["status"] == 408
        client.peer_ends()
        await turns()
        world.assert_gone()

    play(main)


def test_the_timeout_of_a_rule() -> None:
    async def main() -> None:
        world = World()
        world.tables.put(web_shard(timeout_s=0.001))
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        while not world.ends:
            await turns(1)
        await turns()
        fields = problem_of(client)
        assert (fields["status"], fields["decided_by"]) == (504, "HTTPRoute shop/web rule 0")
        assert upstream.was_reset
        world.assert_idle()

    play(main)


# --- backpressure


def test_a_client_that_does_not_read_stops_the_upstream() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        client.peer_stalls()
        upstream.peer_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 8000\r\n\r\n")
        sent = 0
        while not upstream.paused:
            upstream.peer_sends(bytes(500))
            sent += 500
        assert client.buffered() <= HIGH_WATER + 500
        client.peer_reads()
        await turns()
        assert not upstream.paused
        upstream.peer_sends(bytes(8000 - sent))
        assert client.take_sent().endswith(bytes(8000))
        world.assert_idle()

    play(main)


def test_an_upstream_that_does_not_read_stops_the_client() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD.replace(b"10", b"8000"))
        assert client.paused  # nothing is taken before there is a place for it
        upstream = await world.accept()
        assert not client.paused
        upstream.peer_stalls()
        sent = 0
        while not client.paused:
            client.peer_sends(bytes(500))
            sent += 500
        assert upstream.buffered() <= HIGH_WATER + 500
        upstream.peer_reads()
        await turns()
        assert not client.paused
        client.peer_sends(bytes(8000 - sent))
        assert upstream.take_sent().endswith(bytes(8000))
        upstream.peer_sends(OK)
        assert client.take_sent() == OK
        world.assert_idle()

    play(main)


@pytest.mark.parametrize("path", [b"/missing", b"/web"])
def test_a_client_that_sends_and_never_reads(path: bytes) -> None:
    """Its answers must not pile up here, whoever gives them."""

    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_stalls()
        upstreams: list[FakeStream] = []
        for _ in range(100):
            if not client.paused:
                client.peer_sends(GET.replace(b"/web", path) * 3)
            await turns()
            upstreams += [dial.accept() for dial in world.dialer.open]
            await turns()
            for upstream in upstreams:
                if upstream.take_sent():
                    upstream.peer_sends(OK)
        assert client.buffered() <= 2 * HIGH_WATER
        assert client.paused
        done = len(world.ends)
        client.peer_reads()
        for _ in range(100):
            await turns()
            for upstream in upstreams:
                if upstream.take_sent():
                    upstream.peer_sends(OK)
        # And nothing that it had sent is forgotten.
        assert len(world.ends) > done
        assert not client.paused
        assert client.take_sent().count(b"HTTP/1.1 ") == len(world.ends)
        world.assert_idle()

    play(main)


def test_a_pooled_upstream_that_is_still_full_stops_its_next_client() -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        client.peer_sends(POST_HEAD.replace(b"10", b"3000"))
        upstream = await world.accept()
        upstream.peer_stalls()
        client.peer_sends(bytes(3000))
        upstream.peer_sends(OK)  # it never looked at the body
        await turns()
        assert client.take_sent() == OK
        client.peer_sends(POST_HEAD.replace(b"10", b"3000"))
        await turns()
        if world.dialer.open:
            return  # it was not used again: fine as well
        assert client.paused
        upstream.peer_reads()
        await turns()
        assert not client.paused

    play(main)


# --- ends from within


def test_drain() -> None:
    async def main() -> None:
        world = World()
        idle, idle_connection = world.connect()
        busy, busy_connection = world.connect()
        busy.peer_sends(GET)
        upstream = await world.accept()
        world.services.draining = True
        for connection in (idle_connection, busy_connection):
            connection.drain()
        # Its first request may be on its way from the kernel.
        assert not idle.closing
        idle_connection.drain()
        await turns()
        assert idle.sent_eof
        assert not busy.closing
        upstream.peer_sends(OK)
        assert b"connection: close\r\n" in busy.take_sent()
        assert busy.sent_eof
        busy.peer_ends()
        await turns()
        assert upstream.closing
        assert world.ends == [(Reason.OK, 200)]
        world.assert_gone()

    play(main)


def test_the_first_request_that_is_not_read_yet_is_answered_before_the_drain_closes() -> None:
    async def main() -> None:
        world = World()
        client, connection = world.connect()
        connection.drain()
        client.peer_sends(GET)
        upstream = await world.accept()
        connection.drain()
        upstream.peer_sends(OK)
        assert b"connection: close\r\n" in client.take_sent()
        assert client.sent_eof

    play(main)


def test_drain_lets_a_head_that_has_begun_arrive() -> None:
    async def main() -> None:
        world = World()
        client, connection = world.connect()
        client.peer_sends(GET[:10])
        connection.drain()
        assert not client.closing
        client.peer_sends(GET[10:])
        upstream = await world.accept()
        upstream.peer_sends(OK)
        assert client.take_sent().endswith(b"ok")
        assert client.sent_eof

    play(main)


def test_abort() -> None:
    async def main() -> None:
        world = World()
        client, connection = world.connect()
        client.peer_sends(GET)
        upstream = await world.accept()
        connection.abort()
        await turns()
        assert client.was_reset
        assert upstream.was_reset
        assert world.ends == [(Reason.DOWNSTREAM_CLOSED, 0)]
        world.assert_gone()

    play(main)


def test_repr_states_the_condition() -> None:
    async def main() -> None:
        world = World()
        client, connection = world.connect()
        assert repr(connection) == f"<HttpConnection outbound 10.0.0.9:40000 -> {VIP}:80 idle>"
        upstream = await exchanged(world, client)
        assert repr(upstream.sink) == "<UpstreamHttp 10.0.0.1:8080 uses=1 idle>"
        client.peer_sends(GET)
        assert repr(connection).endswith("b'GET' b'/web' -> 10.0.0.1:8080>")

    play(main)


def test_limits_come_from_the_mesh() -> None:
    async def main() -> None:
        world = World(MeshShard(max_headers=2))
        client, _ = world.connect()
        client.peer_sends(b"GET /web HTTP/1.1\r\nHost: a\r\nA: b\r\nC: d\r\n\r\n")
        assert problem_of(client)["status"] == 431

    play(main)


def test_a_service_without_rules() -> None:
    async def main() -> None:
        world = World()
        world.tables.put(ServiceShard("shop", "web", (VIP,), (ServicePort(80, "http", "http", ()),)))
        client, _ = world.connect()
        client.peer_sends(GET)
        fields = problem_of(client)
        assert fields["status"] == 503
        assert fields["decided_by"] == ServiceKey("shop/web")
        assert WorkloadKey("shop/client") in world.tables.workloads

    play(main)
