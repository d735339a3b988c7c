"""Transcripts of what HTTP/1.1 has besides a request and its response: 1xx, Expect, tunnels, replays of bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import pytest

from netproxy.addr import EndpointAddr
from netproxy.config.shard import MeshShard
from netproxy.errors import Reason

from .streams import HIGH_WATER, FakeStream, Fixed, World, play, turns
from .test_connection import GET, GET_SENT, OK, POST_HEAD, PUT_64K, PUT_HEAD, exchanged, problem_of, second_on_reused

EXPECTS = POST_HEAD[:-2] + b"Expect: 100-continue\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
UPGRADE = b"GET /web HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: x/1\r\n\r\n"
UPGRADE_SENT = b"GET /web HTTP/1.1\r\nhost: web\r\nupgrade: x/1\r\nconnection: upgrade\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Whatever\r\nUpgrade: x/1\r\nConnection: Upgrade\r\nX: y\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nx: y\r\nupgrade: x/1\r\nconnection: upgrade\r\n\r\n"
CONNECT = b"CONNECT far:443 HTTP/1.1\r\nHost: far:443\r\n\r\n"
CONNECT_SENT = b"CONNECT far:443 HTTP/1.1\r\nhost: far:443\r\n\r\n"


def impatient() -> World:
    return World(MeshShard(expect_continue_timeout_s=0.0))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await turns(1)


async def asked(world: World, request: bytes = GET) -> tuple[FakeStream, FakeStream]:
    client, _ = world.connect()
    client.peer_sends(request)
    return client, await world.accept()


async def tunnel(world: World, request: bytes = UPGRADE, answer: bytes = SWITCH) -> tuple[FakeStream, FakeStream]:
    client, upstream = await asked(world, request)
    upstream.take_sent()
    upstream.peer_sends(answer)
    assert client.take_sent().startswith(b"HTTP/1.1 ")
    return client, upstream


def transcript(main: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """The test is the coroutine."""

    def run() -> None:
        play(main)  # type: ignore[arg-type]

    run.__name__ = main.__name__
    return run


# --- 1xx and Expect


@transcript
async def test_the_upstream_says_100() -> None:
    world = World()
    client, upstream = await asked(world, EXPECTS)
    assert b"\r\nexpect: 100-continue\r\n" in upstream.take_sent()
    assert not client.sent
    upstream.peer_sends(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + CONTINUE)
    assert client.take_sent() == b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + CONTINUE
    client.peer_sends(b"0123456789")
    assert upstream.take_sent() == b"0123456789"
    upstream.peer_sends(OK)
    assert client.take_sent() == OK
    assert not client.closing
    world.assert_idle()


@transcript
async def test_a_silent_upstream_has_100_said_for_it_once() -> None:
    world = impatient()
    client, upstream = await asked(world, EXPECTS)
    await until(lambda: client.sent)
    assert client.take_sent() == CONTINUE
    upstream.peer_sends(CONTINUE + b"HTTP/1.1 102 Processing\r\n\r\n" + CONTINUE)
    assert client.take_sent() == b"HTTP/1.1 102 Processing\r\n\r\n"
    client.peer_sends(b"0123456789")
    upstream.peer_sends(OK)
    assert client.take_sent() == OK
    world.assert_idle()


@transcript
async def test_content_that_comes_anyway_ends_the_waiting() -> None:
    world = impatient()
    client, _ = world.connect()
    client.peer_sends(EXPECTS + b"01234")
    upstream = await world.accept()
    await turns(20)
    assert not client.sent
    client.peer_sends(b"56789")
    upstream.peer_sends(OK)
    assert client.take_sent() == OK
    world.assert_idle()


@pytest.mark.parametrize("status", [b"417", b"401", b"413", b"200"])
def test_the_final_answer_instead_of_100(status: bytes) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await asked(world, EXPECTS)
        upstream.peer_sends(b"HTTP/1.1 %b x\r\nContent-Length: 2\r\n\r\nno" % status)
        await turns(20)
        answer = client.take_sent()
        assert answer.startswith(b"HTTP/1.1 %b " % status)
        assert b"\r\nconnection: close\r\n" in answer
        assert b"100 Continue" not in answer
        assert client.sent_eof
        assert upstream.was_reset
        assert world.ends == [(Reason.OK, int(status))]
        client.peer_ends()
        await turns()
        world.assert_gone()

    play(main)


@transcript
async def test_a_1_0_client_has_no_expectations_and_gets_no_1xx() -> None:
    world = impatient()
    client, upstream = await asked(world, EXPECTS.replace(b"1.1", b"1.0").replace(b"100-continue", b"anything"))
    assert b"expect" not in upstream.take_sent()
    upstream.peer_sends(CONTINUE + b"HTTP/1.1 103 x\r\n\r\n")
    await turns(20)
    assert not client.sent
    client.peer_sends(b"0123456789")
    upstream.peer_sends(OK)
    assert client.take_sent() == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


@transcript
async def test_a_refusal_of_our_own_closes_before_the_content() -> None:
    """The client may send it or not: nobody knows what comes next."""
    world = World()
    client, _ = world.connect()
    client.peer_sends(EXPECTS.replace(b"/web", b"/missing"))
    assert b"\r\nconnection: close\r\n" in client.sent
    assert problem_of(client)["status"] == 404
    assert client.sent_eof


@transcript
async def test_the_time_of_the_upstream_begins_again_on_a_fresh_connection() -> None:
    world = impatient()
    client, upstream = await second_on_reused(world, EXPECTS.replace(b"POST", b"PUT"))
    upstream.peer_ends()
    fresh = await world.accept()
    assert b"expect: 100-continue" in fresh.take_sent()
    await until(lambda: client.sent)
    assert client.take_sent() == CONTINUE
    client.peer_sends(b"0123456789")
    fresh.peer_sends(OK)
    assert client.take_sent() == OK
    world.assert_idle()


# --- tunnels


@pytest.mark.parametrize(
    ("request_", "sent", "answer", "got"),
    [
        (UPGRADE, UPGRADE_SENT, SWITCH, SWITCHED),
        (
            CONNECT,
            CONNECT_SENT,
            b"HTTP/1.0 200 Connection established\r\nA: b\r\n\r\n",
            b"HTTP/1.1 200 OK\r\na: b\r\n\r\n",
        ),
    ],
    ids=["upgrade", "connect"],
)
def test_a_tunnel(request_: bytes, sent: bytes, answer: bytes, got: bytes) -> None:
    """What comes together with a head is not lost, each way ends by itself, and it is one request."""

    async def main() -> None:
        world = World()
        facts = world.facts(inbound=True)  # so that the path of CONNECT needs no rule
        client, _ = world.connect(facts)
        client.peer_sends(request_ + b"early ")
        client.peer_sends(b"bird")
        upstream = await world.accept()
        assert upstream.take_sent().replace(b"x-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: http\r\n", b"") == sent
        world.time += 1.0
        upstream.peer_sends(answer + b"\x00\xff")
        await turns()
        assert client.take_sent() == got + b"\x00\xff"
        assert upstream.take_sent() == b"early bird"
        client.peer_sends(b"GET / HTTP/1.1\r\n\r\n")
        client.peer_ends()
        assert upstream.take_sent() == b"GET / HTTP/1.1\r\n\r\n"
        assert upstream.sent_eof
        assert not upstream.closing
        upstream.peer_sends(b"late")
        world.time += 1.0
        assert world.outstanding == 0  # of services
        upstream.peer_ends()
        await turns()
        assert client.take_sent() == b"late"
        assert client.sent_eof
        assert not client.was_reset
        assert not upstream.was_reset
        (entry,) = world.recorder.entries
        assert (entry.reason, entry.status, entry.numbers) == (
            Reason.OK,
            101 if request_ is UPGRADE else 200,
            (2.0, 28, 6),
        )
        assert not world.services.live
        assert world.pool.open_count == 0

    play(main)


@transcript
async def test_a_tunnel_counts_at_its_endpoint_until_its_end() -> None:
    world = World()
    client, upstream = await tunnel(world)
    assert world.outstanding == 1
    upstream.peer_ends()
    assert client.sent_eof
    assert world.outstanding == 1
    client.peer_sends(b"still")
    assert upstream.take_sent() == b"still"
    client.peer_ends()
    await turns()
    world.assert_gone()


@transcript
async def test_a_client_that_had_ended_before_the_tunnel_began() -> None:
    world = World()
    client, _ = world.connect()
    client.peer_sends(UPGRADE)
    client.peer_ends()
    upstream = await world.accept()
    upstream.peer_sends(SWITCH + b"all")
    assert upstream.sent_eof
    upstream.peer_ends()
    await turns()
    assert client.take_sent() == SWITCHED + b"all"
    assert world.ends == [(Reason.OK, 101)]
    world.assert_gone()


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_a_reset_of_one_side_is_a_reset_of_the_other(side: str) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await tunnel(world)
        (client if side == "client" else upstream).peer_resets()
        await turns()
        assert (upstream if side == "client" else client).was_reset
        reason = Reason.DOWNSTREAM_CLOSED if side == "client" else Reason.UPSTREAM_CLOSED
        assert world.ends == [(reason, 101)]
        world.assert_gone()

    play(main)


@transcript
async def test_backpressure_both_ways() -> None:
    world = World()
    client, upstream = await tunnel(world)
    for reader, writer in ((client, upstream), (upstream, client)):
        reader.peer_stalls()
        sent = 0
        while not writer.paused:
            writer.peer_sends(bytes(500))
            sent += 500
        assert reader.buffered() <= HIGH_WATER + 500
        reader.peer_reads()
        await turns()
        assert not writer.paused
        assert len(reader.take_sent()) == sent


@transcript
async def test_early_octets_wait_for_the_tunnel_and_are_bounded() -> None:
    world = World()
    client, upstream = await asked(world, UPGRADE + bytes(65536))
    assert client.paused
    client.peer_sends(b"x")
    upstream.take_sent()
    client.peer_stalls()
    upstream.peer_sends(SWITCH + bytes(2 * HIGH_WATER))
    await turns()
    assert len(upstream.take_sent()) == 65537  # though the client reads nothing itself


@transcript
async def test_a_silent_tunnel_ends_at_its_own_timeout() -> None:
    world = World()
    client, upstream = await tunnel(world)
    world.check(world.mesh.idle_timeout_s)
    upstream.peer_sends(b"x")
    world.check(world.mesh.tcp_idle_timeout_s - 1)
    await turns()
    assert not client.was_reset
    world.check(1)
    await turns()
    assert client.was_reset and upstream.was_reset
    assert world.ends == [(Reason.IDLE_TIMEOUT, 101)]
    world.assert_gone()


@transcript
async def test_the_timeout_of_the_rule_is_that_of_the_answer() -> None:
    world = World()
    client, _ = world.connect()
    client.peer_sends(UPGRADE.replace(b"/web", b"/slow"))
    upstream = await world.accept()
    upstream.peer_sends(SWITCH)
    (timer,) = [handle for handle in world.services.loop._scheduled if not handle.cancelled()] or [None]
    assert timer is None
    assert not client.closing


@transcript
async def test_a_policy_that_changes_ends_the_tunnels_that_it_denies() -> None:
    world = World()
    client, _ = world.connect(world.facts(inbound=True))
    client.peer_sends(UPGRADE)
    upstream = await world.accept()
    upstream.peer_sends(SWITCH)
    world.check(1.0)
    assert not client.was_reset
    world.tables.put(dataclasses.replace(world.shard, mtls="STRICT"))
    world.check(1.0)
    await turns()
    assert client.was_reset and upstream.was_reset
    assert world.ends == [(Reason.MTLS_REQUIRED, 101)]


@transcript
async def test_a_tunnel_is_not_drained_but_aborted() -> None:
    world = World()
    client, upstream = await tunnel(world)
    world.services.draining = True
    for live in list(world.services.live):
        live.drain()
    await turns()
    client.peer_sends(b"on")
    assert upstream.take_sent() == b"on"
    for live in list(world.services.live):
        live.abort()
    await turns()
    assert client.was_reset and upstream.was_reset
    assert world.ends == [(Reason.DRAINING, 101)]
    world.assert_gone()


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_what_nobody_reads_after_the_end_does_not_stay_for_ever(side: str) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await tunnel(world)
        deaf, other = (client, upstream) if side == "client" else (upstream, client)
        deaf.peer_stalls()
        other.peer_sends(b"x")
        client.peer_ends()
        upstream.peer_ends()
        await turns()
        assert world.ends == [(Reason.OK, 101)]
        assert world.services.live
        world.check(world.mesh.idle_timeout_s - 1)
        assert not deaf.was_reset
        world.check(1)
        await turns()
        assert deaf.was_reset
        assert not world.services.live

    play(main)


@transcript
async def test_an_upgrade_that_is_not_granted_is_an_ordinary_exchange() -> None:
    world = World()
    client, upstream = await asked(world, UPGRADE)
    upstream.peer_sends(OK)
    assert client.take_sent() == OK
    assert world.pool.idle_count == 1
    client.peer_sends(GET)
    assert upstream.take_sent() == UPGRADE_SENT + GET_SENT
    upstream.peer_sends(b"HTTP/1.1 426 x\r\nUpgrade: y\r\nConnection: upgrade\r\nContent-Length: 0\r\n\r\n")
    assert b"\r\nupgrade: y\r\nconnection: upgrade\r\n" in client.take_sent()
    world.assert_idle()


@transcript
async def test_a_connect_that_is_not_granted_closes() -> None:
    world = World()
    client, _ = world.connect(world.facts(inbound=True))
    client.peer_sends(CONNECT + b"tunnelled")
    upstream = await world.accept()
    upstream.peer_sends(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
    assert b"tunnelled" not in upstream.sent
    assert client.take_sent() == b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    assert client.sent_eof


@transcript
async def test_an_upgrade_with_content() -> None:
    world = World()
    client, upstream = await asked(world, UPGRADE[:-2] + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    upstream.peer_sends(CONTINUE)
    client.peer_sends(b"hi")
    client.peer_sends(b"tunnel")
    assert upstream.take_sent().endswith(b"\r\n\r\nhi")
    upstream.peer_sends(SWITCH)
    assert upstream.take_sent() == b"tunnel"
    assert client.take_sent() == CONTINUE + SWITCHED


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (GET, SWITCH),
        (UPGRADE.replace(b"1.1", b"1.0"), SWITCH),
        (UPGRADE.replace(b"x/1", b"h2c"), SWITCH.replace(b"x/1", b"h2c")),
        (UPGRADE, SWITCH.replace(b"x/1", b"x/2")),
        (UPGRADE, SWITCH.replace(b"x/1", b"")),
        (UPGRADE[:-2] + b"Content-Length: 2\r\n\r\n", SWITCH),
    ],
    ids=["unasked", "1.0", "h2c", "another", "none", "too early"],
)
def test_a_101_that_nobody_asked_for_is_a_502(request_: bytes, answer: bytes) -> None:
    async def main() -> None:
        world = World()
        client, upstream = await asked(world, request_)
        upstream.peer_sends(answer)
        await turns()
        assert problem_of(client)["status"] == 502
        assert upstream.was_reset
        assert world.ends == [(Reason.UPSTREAM_PROTOCOL, 502)]

    play(main)


@transcript
async def test_connect_is_routed_by_where_it_was_sent() -> None:
    """Its path is "", which no rule here has."""
    world = World()
    client, _ = world.connect()
    client.peer_sends(CONNECT)
    assert problem_of(client)["reason"] == "NO_ROUTE"
    facts = world.facts()
    facts.port = world.tables.service_at("240.240.0.2", 80)
    other, _ = world.connect(facts)
    other.peer_sends(CONNECT)
    await world.accept()
    assert world.dialer.dials[0].endpoint == EndpointAddr("10.0.0.2", 8080)


# --- replays


@pytest.mark.parametrize(
    ("request_", "rest"),
    [
        (PUT_HEAD + b"0123456789", b""),
        (PUT_HEAD + b"01234", b"56789"),
        (PUT_HEAD, b"0123456789"),
        (PUT_64K + bytes(65536), b""),
        (PUT_HEAD.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked") + b"2\r\nhi\r\n0\r\nt: 1\r\n\r\n", b""),
    ],
    ids=["whole", "half", "head", "64 KiB", "chunked"],
)
@pytest.mark.parametrize("how", ["peer_ends", "peer_resets"])
def test_an_idempotent_request_is_sent_again_with_its_content(request_: bytes, rest: bytes, how: str) -> None:
    async def main() -> None:
        world = World()
        client, _ = world.connect()
        upstream = await exchanged(world, client)
        client.peer_sends(request_)
        await turns()
        sent = upstream.take_sent()
        getattr(upstream, how)()
        fresh = await world.accept()
        assert fresh.take_sent() == sent
        if rest:
            client.peer_sends(rest)
            assert fresh.take_sent() == rest
        fresh.peer_sends(OK)
        assert client.take_sent() == OK
        assert world.ends == [(Reason.OK, 200)] * 2
        world.assert_idle()

    play(main)


@transcript
async def test_a_full_upstream_that_dies_does_not_keep_the_client_from_the_next() -> None:
    world = World()
    client, _ = world.connect()
    upstream = await exchanged(world, client)
    upstream.peer_stalls()
    client.peer_sends(PUT_64K + bytes(2 * HIGH_WATER))
    assert client.paused
    upstream.peer_resets()
    fresh = await world.accept()
    await turns()
    assert not client.paused
    client.peer_sends(bytes(65536 - 2 * HIGH_WATER))
    fresh.peer_sends(OK)
    assert client.take_sent() == OK
    world.assert_idle()


@transcript
async def test_idempotent_requests_in_one_pipeline_are_each_sent_again_once() -> None:
    world = World()
    client, _ = world.connect()
    upstream = await exchanged(world, client)
    client.peer_sends(GET * 2)
    upstream.peer_ends()
    fresh = await world.accept()
    fresh.peer_sends(OK)
    assert fresh.take_sent() == GET_SENT * 2
    fresh.peer_ends()
    last = await world.accept()
    last.peer_sends(OK)
    assert client.take_sent() == OK * 2
    assert len(world.dialer.dials) == 3
    world.assert_idle()


# --- ids, dates and whoever is named by a leg


@transcript
async def test_what_each_leg_adds() -> None:
    world = World(MeshShard(via="mesh", header_case="preserve"))
    world.services.stamps = Fixed(b"id-1", date=b"now")
    fields = b"HOST: web\r\nX-b: 1\r\nx-A: 2\r\n"
    client, upstream = await asked(world, b"GET /web HTTP/1.0\r\n" + fields + b"X-A: 3\r\n\r\n")
    added = b"x-A: 3\r\nx-request-id: id-1\r\nvia: 1.0 mesh\r\n\r\n"
    assert upstream.take_sent() == b"GET /web HTTP/1.1\r\n" + fields + added
    upstream.peer_sends(b"HTTP/1.1 200 Fine\r\nVia: 1.1 a\r\nContent-LENGTH: 2\r\n\r\nok")
    assert (
        client.take_sent() == b"HTTP/1.1 200 OK\r\nVia: 1.1 a, 1.1 mesh\r\nContent-LENGTH: 2\r\n"
        b"date: now\r\nconnection: close\r\n\r\nok"
    )


@transcript
async def test_a_replay_has_the_same_id() -> None:
    world = World()
    world.services.stamps = Fixed(b"a", b"b", b"c")
    client, upstream = await asked(world)
    upstream.peer_sends(OK)
    client.peer_sends(GET)
    upstream.peer_ends()
    fresh = await world.accept()
    assert fresh.take_sent() == GET_SENT[:-2] + b"x-request-id: b\r\n\r\n"


@transcript
async def test_our_own_answers_have_a_date() -> None:
    world = World()
    world.services.stamps = Fixed(date=b"now")
    client, _ = world.connect()
    client.peer_sends(GET.replace(b"/web", b"/missing"))
    assert b"\r\ndate: now\r\n" in client.sent
