"""gRPC: its fields, and its requests over streams in memory, on both engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from netproxy.codec import h2
from netproxy.codec.events import Data, End, Headers, RequestHead, Reset, ResponseHead
from netproxy.codec.h2 import Code
from netproxy.config.shard import MeshShard
from netproxy.errors import Grpc, Reason
from netproxy.relay.grpc import (
    NO_STATUS,
    error_fields,
    is_grpc,
    may_end_early,
    message_of,
    status_of,
    status_of_reset,
    timeout_s,
    timeout_value,
)

from .h2_client import H2TestClient
from .h2_endpoint import H2Endpoint
from .streams import World, play, turns, web_shard

TYPE = (b"content-type", b"application/grpc")
MESSAGE = b"\0\0\0\0\x02hi"


@pytest.mark.parametrize(
    ("method", "value", "expected"),
    [
        (b"POST", b"application/grpc", True),
        (b"POST", b"application/grpc+proto", True),
        (b"POST", b"Application/gRPC;charset=utf-8", True),
        (b"POST", b"application/grpc ; a=b", True),
        (b"POST", b"application/grpc-web", False),
        (b"POST", b"application/grpc-web+proto", False),
        (b"POST", b"application/grpcs", False),
        (b"POST", b"application/json", False),
        (b"POST", b"", False),
        (b"GET", b"application/grpc", False),
    ],
)
def test_what_is_grpc(method: bytes, value: bytes, expected: bool) -> None:
    headers: Headers = [(b"host", b"a"), (b"content-type", value), (b"content-type", b"application/grpc")]
    assert is_grpc(RequestHead(1, method, b"/", headers)) is expected


def test_without_a_type_it_is_not() -> None:
    assert not is_grpc(RequestHead(1, b"POST", b"/", [(b"host", b"a")]))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"4m", 0.004),
        (b"5u", 5e-6),
        (b"6n", 6e-9),
        (b"0S", 0.0),
        (b"00000001S", 1.0),
        (b"99999999H", 99999999 * 3600.0),
    ],
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert timeout_s([(b"a", b"b"), (b"grpc-timeout", value)]) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "value",
    [b"", b"S", b"1", b"1s", b"1 S", b"+1S", b"-1S", b"1.5S", b"123456789S", b"1SS", b"\xb2S", b"1h", b"1\xc2\xb5"],
)
def test_malformed_timeouts(value: bytes) -> None:
    with pytest.raises(ValueError, match="malformed"):
        timeout_s([(b"grpc-timeout", value)])


def test_two_timeouts_are_malformed_and_none_is_none() -> None:
    with pytest.raises(ValueError, match="more than one"):
        timeout_s([(b"grpc-timeout", b"1S"), (b"grpc-timeout", b"1S")])
    assert timeout_s([]) == -1.0


@pytest.mark.parametrize(
    ("seconds", "value"),
    [
        (-1.0, b"1n"),
        (0.0, b"1n"),
        (1e-6, b"1000n"),
        (0.0999999, b"99999900n"),
        (0.1, b"100000u"),
        (2.5, b"2500000u"),
        (99.5, b"99500000u"),
        (100.0, b"100000m"),
        (99_999_999.0, b"99999999S"),
        (100_000_000.0, b"1666666M"),
        (1e18, b"99999999H"),
    ],
)
def test_what_is_left_is_said_in_eight_digits(seconds: float, value: bytes) -> None:
    assert timeout_value(seconds) == value
    assert len(value) <= 9
    if seconds > 0:
        assert timeout_s([(b"grpc-timeout", value)]) <= seconds


@pytest.mark.parametrize(
    ("value", "status"),
    [(b"0", 0), (b"5", 5), (b"16", 16), (b"17", 2), (b"99", 2), (b"100", 2), (b"-1", 2), (b"", 2), (b"OK", 2)],
)
def test_statuses(value: bytes, status: int) -> None:
    assert status_of([(b"x", b"1"), (b"grpc-status", value)]) == status


def test_no_status() -> None:
    assert status_of([(b"grpc-message", b"1")]) == NO_STATUS


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.NO_ERROR, Grpc.INTERNAL),
        (Code.PROTOCOL_ERROR, Grpc.INTERNAL),
        (Code.REFUSED_STREAM, Grpc.UNAVAILABLE),
        (Code.CANCEL, Grpc.CANCELLED),
        (Code.ENHANCE_YOUR_CALM, Grpc.RESOURCE_EXHAUSTED),
        (Code.INADEQUATE_SECURITY, Grpc.PERMISSION_DENIED),
        (4711, Grpc.INTERNAL),
    ],
)
def test_statuses_of_resets(code: int, status: Grpc) -> None:
    assert status_of_reset(code) is status


def test_messages_are_percent_encoded() -> None:
    assert message_of("a b~!") == b"a b~!"
    assert message_of("100%\r\nx: \x7fé") == b"100%25%0D%0Ax: %7F%C3%A9"
    assert len(message_of("\n" * 10_000)) == 3000
    assert error_fields(Grpc.UNAVAILABLE, "no") == [(b"grpc-status", b"14"), (b"grpc-message", b"no")]


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (200, [TYPE], True),
        (200, [(b"content-type", b"application/grpc+proto")], True),
        (200, [TYPE, (b"content-length", b"7")], False),
        (200, [(b"content-type", b"text/html")], False),
        (200, [], False),
        (503, [TYPE], False),
    ],
)
def test_what_trailers_of_ours_may_end(status: int, headers: Headers, expected: bool) -> None:
    assert may_end_early(ResponseHead(1, status, headers)) is expected


# --- requests


@pytest.fixture(params=h2.ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    before = h2.engine()
    h2.use(request.param)
    yield
    h2.use(before)


both_engines = pytest.mark.usefixtures("engine")


def grpc_world(timeout: float = 0.0) -> World:
    world = World(MeshShard())
    world.tables.put(web_shard(http_version="2", timeout_s=timeout))
    return world


async def call(
    world: World, *headers: tuple[bytes, bytes], target: bytes = b"/web", body: bytes | None = MESSAGE
) -> tuple[H2TestClient, int]:
    client = await H2TestClient.connect(world)
    fields = [TYPE, (b"te", b"trailers"), *headers]
    return client, client.ask(target, b"POST", fields, body)


async def over(world: World, client: H2TestClient) -> None:
    client.stream.peer_resets()
    await turns()
    world.services.shared.expire(float("inf"))
    await turns()
    world.assert_gone()


async def ended(client: H2TestClient, stream_id: int) -> None:
    """For what ends by a timer."""
    async with asyncio.timeout(10):
        while not (client.answers[stream_id].ended or client.answers[stream_id].reset):
            await asyncio.sleep(0.001)
            await client.turn()


@both_engines
def test_status_and_metadata_pass_and_are_logged() -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world)
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        assert (b"te", b"trailers") in head.headers
        trailers = [(b"grpc-status", b"5"), (b"grpc-message", b"no such"), (b"more-bin", b"AAE")]
        await endpoint.answer(head.stream_id, MESSAGE, headers=[TYPE], trailers=trailers)
        answer = await client.answer(stream_id)
        assert (answer.status, bytes(answer.body), answer.trailers, answer.ended) == (200, MESSAGE, trailers, True)
        assert (world.recorder.entries[0].reason, world.recorder.entries[0].grpc_status) == (Reason.OK, 5)
        assert world.lines[0]["grpc_status"] == 5
        await over(world, client)

    play(main)


@both_engines
def test_trailers_only_passes_as_one_head() -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world)
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        endpoint.engine.send(head.stream_id, ResponseHead(head.stream_id, 200, [TYPE, (b"grpc-status", b"12")]))
        await endpoint.say(head.stream_id, End(head.stream_id))
        answer = await client.answer(stream_id)
        assert (b"grpc-status", b"12") in answer.headers
        assert (answer.ended, answer.body) == (True, b"")
        assert world.recorder.entries[0].grpc_status == 12
        await over(world, client)

    play(main)


@both_engines
@pytest.mark.parametrize(
    ("target", "reason", "status"),
    [(b"/missing", Reason.NO_ROUTE, b"12"), (b"/invalid", Reason.BACKEND_INVALID, b"14")],
)
def test_a_refusal_is_trailers_only(target: bytes, reason: Reason, status: bytes) -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world, target=target)
        await turns()
        octets = client.stream.take_sent()
        # One HEADERS with END_STREAM: some libraries take no status from a head that something follows.
        kinds = [(kind, flags) for kind, flags, number in frames(octets) if number == stream_id]
        assert kinds[0] == (1, 5)
        client._take(client.engine.receive(octets))
        answer = await client.answer(stream_id)
        fields = dict(answer.headers)
        assert (answer.status, fields[b"content-type"], fields[b"grpc-status"]) == (200, b"application/grpc", status)
        assert fields[b"x-netproxy-reason"] == reason.info.flag.encode()
        assert fields[b"grpc-message"].startswith(reason.info.title.encode())
        entry = world.recorder.entries[0]
        assert (entry.reason, entry.status, entry.grpc_status) == (reason, 200, int(status))
        await over(world, client)

    play(main)


def frames(octets: bytes) -> Iterator[tuple[int, int, int]]:
    while octets:
        size = int.from_bytes(octets[:3], "big")
        yield octets[3], octets[4], int.from_bytes(octets[5:9], "big")
        octets = octets[9 + size :]


def test_an_http1_client_is_answered_as_grpc_does() -> None:
    async def main() -> None:
        world = grpc_world()
        client, _ = world.connect()
        client.peer_sends(
            b"POST /missing HTTP/1.1\r\nHost: web\r\nContent-Type: application/grpc\r\nContent-Length: 0\r\n\r\n"
        )
        await turns()
        head, _, body = client.take_sent().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ncontent-length: 0\r\n")
        assert b"\r\ngrpc-status: 12\r\n" in head
        assert not body
        client.peer_resets()
        await turns()

    play(main)


@both_engines
@pytest.mark.parametrize(("value", "status"), [(b"1s", b"13"), (b"0n", b"4")])
def test_a_timeout_that_cant_be_kept_is_refused(value: bytes, status: bytes) -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world, (b"grpc-timeout", value))
        answer = await client.answer(stream_id)
        assert dict(answer.headers)[b"grpc-status"] == status
        assert not world.dialer.dials
        await over(world, client)

    play(main)


@both_engines
@pytest.mark.parametrize(
    ("route_s", "asked", "told"),
    [(0.0, b"10S", b"9750000u"), (4.0, b"10S", b"3750000u"), (30.0, b"10S", b"9750000u"), (4.0, b"", b"")],
)
def test_the_endpoint_is_told_what_is_left(route_s: float, asked: bytes, told: bytes) -> None:
    async def main() -> None:
        world = grpc_world(route_s)
        client, stream_id = await call(world, *([(b"grpc-timeout", asked)] if asked else []))
        await client.turn()
        world.time += 0.25
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        assert dict(head.headers).get(b"grpc-timeout", b"") == told
        await endpoint.answer(head.stream_id, headers=[TYPE], trailers=[(b"grpc-status", b"0")])
        assert (await client.answer(stream_id)).ended
        await over(world, client)

    play(main)


@both_engines
@pytest.mark.parametrize("begun", [False, True])
def test_a_deadline_that_passes_cancels_upstream(begun: bool) -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world, (b"grpc-timeout", b"50m"))
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        if begun:
            await endpoint.say(head.stream_id, ResponseHead(head.stream_id, 200, [TYPE]))
        await ended(client, stream_id)
        answer = client.answers[stream_id]
        fields = dict(answer.trailers if begun else answer.headers)
        assert (answer.ended, fields[b"grpc-status"], answer.reset) == (True, b"4", None)
        (reset,) = await endpoint.take(Reset)
        assert isinstance(reset, Reset)
        assert reset.code == Code.CANCEL
        assert (world.recorder.entries[0].reason, world.recorder.entries[0].grpc_status) == (Reason.UPSTREAM_TIMEOUT, 4)
        await over(world, client)

    play(main)


@both_engines
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [(Code.INTERNAL_ERROR, 13), (Code.ENHANCE_YOUR_CALM, 8), (Code.CANCEL, 1), ("ends", 14), ("resets", 14)],
)
def test_an_endpoint_that_breaks_off(begun: bool, code: Code | str, status: int) -> None:
    """By a reset, or with its connection."""

    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world)
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        if begun:
            await endpoint.say(head.stream_id, ResponseHead(head.stream_id, 200, [TYPE]), Data(head.stream_id, MESSAGE))
        if isinstance(code, Code):
            await endpoint.reset(head.stream_id, code)
        elif code == "ends":
            endpoint.stream.peer_ends()
        else:
            endpoint.stream.peer_resets()
        answer = await client.answer(stream_id)
        fields = dict(answer.trailers if begun else answer.headers)
        assert (answer.ended, answer.reset, int(fields[b"grpc-status"])) == (True, None, status)
        assert bytes(answer.body) == (MESSAGE if begun else b"")
        assert (world.recorder.entries[0].reason, world.recorder.entries[0].grpc_status) == (
            Reason.UPSTREAM_CLOSED,
            status,
        )
        await over(world, client)

    play(main)


@both_engines
@pytest.mark.parametrize("headers", [[TYPE, (b"content-length", b"100")], [(b"content-type", b"text/html")]])
def test_what_trailers_cant_end_is_reset(headers: Headers) -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world)
        endpoint = await H2Endpoint.accept(world)
        head = await endpoint.request()
        await endpoint.say(head.stream_id, ResponseHead(head.stream_id, 200, headers), Data(head.stream_id, MESSAGE))
        endpoint.stream.peer_resets()
        answer = await client.answer(stream_id)
        assert (answer.ended, answer.reset is not None and answer.reset.code) == (False, Code.INTERNAL_ERROR)
        await over(world, client)

    play(main)


@both_engines
def test_a_break_behind_the_trailers_says_nothing_twice() -> None:
    async def main() -> None:
        world = World(MeshShard())
        world.tables.put(web_shard(http_version="1.1"))
        client, stream_id = await call(world)
        await client.turn()
        upstream = await world.accept()
        upstream.peer_sends(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"
            b"7\r\n" + MESSAGE + b"\r\n0\r\ngrpc-status: 3\r\n\r\n"
        )
        answer = await client.answer(stream_id)
        assert (answer.ended, answer.trailers) == (True, [(b"grpc-status", b"3")])
        assert world.recorder.entries[0].grpc_status == 3
        await turns()
        client.stream.peer_resets()
        await turns()

    play(main)


@both_engines
def test_a_client_that_cancels_is_counted_as_cancelled() -> None:
    async def main() -> None:
        world = grpc_world()
        client, stream_id = await call(world)
        endpoint = await H2Endpoint.accept(world)
        await endpoint.request()
        client.reset(stream_id)
        await client.turn()
        assert [event.code for event in await endpoint.take(Reset) if isinstance(event, Reset)] == [Code.CANCEL]
        entry = world.recorder.entries[0]
        assert (entry.reason, entry.grpc_status) == (Reason.DOWNSTREAM_CLOSED, 1)
        await over(world, client)

    play(main)


@both_engines
def test_others_are_answered_as_ever() -> None:
    async def main() -> None:
        world = grpc_world()
        client = await H2TestClient.connect(world)
        stream_id = client.ask(b"/missing", b"POST", [(b"content-type", b"application/grpc-web")])
        answer = await client.answer(stream_id)
        assert answer.problem["reason"] == "NO_ROUTE"
        assert world.recorder.entries[0].grpc_status == NO_STATUS
        assert "grpc_status" not in world.lines[0]
        await over(world, client)

    play(main)
