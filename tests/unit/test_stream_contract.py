"""The contract of `Stream`, over TCP and over TLS, on uvloop and on asyncio."""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest

from netproxy.errors import LocalProtocolError
from netproxy.identity.tls import TlsStream
from netproxy.stream import Stream
from netproxy.tcp import HIGH_WATER, accepted, connected

from .identity.ends import LOOPS, Ends, Mesh, Recorder, mesh_contexts, run, socket_pair, tcp_ends, tcp_pair, tls_ends

Open = Callable[[Recorder, Recorder], Awaitable[Ends]]
CHUNK = 64 * 1024

loops = pytest.mark.parametrize("loop", list(LOOPS))
sides = pytest.mark.parametrize("flip", [False, True], ids=["client-first", "server-first"])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    return Mesh(tmp_path_factory.mktemp("ca"))


@pytest.fixture(params=["tcp", "tls"])
def opener(request: pytest.FixtureRequest, mesh: Mesh) -> Open:
    if request.param == "tcp":
        return tcp_ends
    client_tls, server_tls = mesh_contexts(mesh)
    return lambda client, server: tls_ends(client, server, client_tls, server_tls)


class Two:
    """Both ends by role: `a` acts first."""

    def __init__(self, ends: Ends, sinks: tuple[Recorder, Recorder], flip: bool) -> None:
        a, b = (1, 0) if flip else (0, 1)
        streams = (ends.client, ends.server)
        self.a, self.b = streams[a], streams[b]
        self.a_sink, self.b_sink = sinks[a], sinks[b]
        self.a_fd = (ends.client_fd, ends.server_fd)[a]

    async def close(self) -> None:
        self.a.close()
        self.b.close()
        await self.a_sink.until_closed()
        await self.b_sink.until_closed()


async def two(opener: Open, flip: bool = False) -> Two:
    sinks = Recorder(), Recorder()
    pair = Two(await opener(*sinks), sinks, flip)
    return pair


def pump(stream: Stream, sink: Recorder, data: bytes) -> Callable[[], int]:
    """Writes as long as it may, then the end. Returns what tells how much was written."""
    sent = 0

    def go() -> None:
        nonlocal sent
        while sent < len(data) and not sink.blocked:
            sent += CHUNK
            stream.write(data[sent - CHUNK : sent])
            if sent >= len(data):
                stream.write_eof()

    sink.on_writable = go
    go()
    return lambda: sent


async def turns(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


@loops
@sides
def test_echo_and_close(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        pair.b_sink.on_data = lambda data: pair.b.write(data.upper())
        pair.a.write(b"hello ")
        pair.a.write(b"")
        pair.a.write(b"world")
        await pair.a_sink.until(lambda r: r.data == b"HELLO WORLD")
        assert not pair.a.closing
        pair.a.close()
        assert pair.a.closing
        assert await pair.a_sink.until_closed() is None
        await pair.b_sink.until(lambda r: r.eof)
        await pair.close()
        assert pair.b_sink.closes == [None]
        assert pair.b.closing
        assert not pair.a_sink.eof

    run(loop, main)


@loops
def test_8_mib_both_ways_at_once(loop: str, opener: Open) -> None:
    async def main() -> None:
        pair = await two(opener)
        there, back = os.urandom(8 << 20), os.urandom(8 << 20)
        pump(pair.a, pair.a_sink, there)
        pump(pair.b, pair.b_sink, back)
        await pair.a_sink.until(lambda r: r.eof)
        await pair.b_sink.until(lambda r: r.eof)
        assert hashlib.sha256(pair.b_sink.data).digest() == hashlib.sha256(there).digest()
        assert hashlib.sha256(pair.a_sink.data).digest() == hashlib.sha256(back).digest()
        assert pair.a_sink.was_blocked
        await pair.close()
        assert pair.a_sink.closes == pair.b_sink.closes == [None]

    run(loop, main)


@loops
@sides
def test_one_write_larger_than_every_buffer(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        data = os.urandom((4 << 20) + 12345)
        pair.a.write(data)
        pair.a.close()
        await pair.b_sink.until(lambda r: r.eof)
        assert pair.b_sink.data == data
        await pair.close()

    run(loop, main)


@loops
@sides
def test_half_close_then_data_the_other_way(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        pair.a.write(b"request")
        pair.a.write_eof()
        pair.a.write_eof()
        await pair.b_sink.until(lambda r: r.eof)
        assert pair.b_sink.data == b"request"
        assert not pair.a.closing
        assert not pair.b.closing
        for part in range(3):
            pair.b.write(b"%d" % part * 100_000)
            await pair.a_sink.until_size((part + 1) * 100_000)
        with pytest.raises(LocalProtocolError):
            pair.a.write(b"more")
        pair.b.write_eof()
        await pair.a_sink.until(lambda r: r.eof)
        # Both ends are told: the stream stays until its owner closes it.
        await turns()
        assert not pair.a_sink.closes
        assert not pair.b_sink.closes
        await pair.close()
        assert pair.a_sink.closes == pair.b_sink.closes == [None]

    run(loop, main)


@loops
@sides
def test_both_ends_cross(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        for stream in (pair.a, pair.b):
            stream.write(b"x" * 50_000)
            stream.write_eof()
        for sink in (pair.a_sink, pair.b_sink):
            await sink.until(lambda r: r.eof)
            assert len(sink.data) == 50_000
        await pair.close()

    run(loop, main)


@loops
@sides
def test_write_eof_within_data_received(loop: str, opener: Open, flip: bool) -> None:
    """More of the peer's data waits to be decrypted or read at that moment."""

    async def main() -> None:
        pair = await two(opener, flip)
        pair.b_sink.on_data = lambda data: pair.b.write_eof()
        pump(pair.a, pair.a_sink, bytes(1 << 20))
        await pair.b_sink.until(lambda r: r.eof)
        assert len(pair.b_sink.data) == 1 << 20
        await pair.a_sink.until(lambda r: r.eof)
        await pair.close()

    run(loop, main)


@loops
@sides
def test_backpressure(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        data = os.urandom(32 << 20)
        pair.b.pause_reading()
        sent = pump(pair.a, pair.a_sink, data)
        async with asyncio.timeout(20):
            # Nobody reads: once the kernel takes no more, it never will.
            while not (pair.a_sink.blocked and not select.select([], [pair.a_fd], [], 0)[1]):
                await turns(1)
        stalled = sent()
        await turns(20)
        assert sent() == stalled < 8 << 20
        assert 0 < pair.a.buffered() <= HIGH_WATER + 2 * CHUNK
        assert not pair.b_sink.data
        pair.b.resume_reading()
        await pair.b_sink.until(lambda r: r.eof)
        assert hashlib.sha256(pair.b_sink.data).digest() == hashlib.sha256(data).digest()
        await pair.a_sink.until(lambda r: not r.blocked)
        assert pair.a.buffered() == 0
        await pair.close()

    run(loop, main)


@loops
@sides
def test_write_eof_within_writable_when_the_peer_has_ended(loop: str, opener: Open, flip: bool) -> None:
    """asyncio would shut the socket down twice, and the second time it is not connected any more."""

    async def main() -> None:
        pair = await two(opener, flip)
        pair.b.write_eof()
        await pair.a_sink.until(lambda r: r.eof)
        pair.a_sink.on_writable = pair.a.write_eof
        pair.a.write(bytes(4 << 20))
        assert pair.a_sink.blocked
        await pair.b_sink.until(lambda r: r.eof)
        assert len(pair.b_sink.data) == 4 << 20
        await pair.close()

    run(loop, main)


@loops
@sides
def test_pausing_within_data_received_keeps_every_byte_in_order(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        event_loop = asyncio.get_running_loop()

        def pause(data: bytes) -> None:
            pair.b.pause_reading()
            event_loop.call_soon(pair.b.resume_reading)

        pair.b_sink.on_data = pause
        data = os.urandom(2 << 20)
        pump(pair.a, pair.a_sink, data)
        await pair.b_sink.until(lambda r: r.eof)
        assert pair.b_sink.data == data
        await pair.close()

    run(loop, main)


@loops
def test_pause_and_resume_in_any_state(loop: str, opener: Open) -> None:
    async def main() -> None:
        pair = await two(opener)
        pair.b.resume_reading()
        pair.b.pause_reading()
        pair.b.pause_reading()
        pair.a.write(b"data")
        pair.a.write_eof()
        await turns(20)
        assert not pair.b_sink.data
        assert not pair.b_sink.eof
        pair.b.resume_reading()
        pair.b.pause_reading()
        pair.b.resume_reading()
        pair.b.resume_reading()
        await pair.b_sink.until(lambda r: r.eof)
        assert pair.b_sink.data == b"data"
        # The loops report the end again when reading is resumed after it: the sink asserts that it hears it once.
        pair.b.pause_reading()
        pair.b.resume_reading()
        await turns(20)
        await pair.close()
        pair.b.pause_reading()
        pair.b.resume_reading()
        pair.b.write(b"late")
        pair.b.write_eof()
        pair.b.close()
        pair.b.abort()
        pair.b.abort()
        assert pair.b.buffered() == 0
        repr(pair.b)
        await turns()

    run(loop, main)


@loops
@sides
def test_abort_is_seen_as_a_reset(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        pair.a.write(b"half of a bo")
        await pair.b_sink.until(lambda r: r.data)
        pair.a.abort()
        pair.a.abort()
        assert pair.a.closing
        pair.a.write(b"dropped")
        assert await pair.a_sink.until_closed() is None
        assert isinstance(await pair.b_sink.until_closed(), ConnectionResetError)
        assert not pair.b_sink.eof
        assert pair.b.closing
        pair.b.write(b"dropped")
        pair.b.close()
        await turns()

    run(loop, main)


@loops
@sides
def test_abort_after_close_drops_what_the_peer_does_not_read(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        pair.b.pause_reading()
        pair.a.write(bytes(4 << 20))
        pair.a.close()
        await turns(20)
        assert not pair.a_sink.closes
        pair.a.abort()
        assert await pair.a_sink.until_closed() is None
        pair.b.resume_reading()
        assert isinstance(await pair.b_sink.until_closed(), ConnectionResetError)
        assert not pair.b_sink.eof

    run(loop, main)


@loops
@pytest.mark.parametrize("how", ["abort", "close"])
def test_nothing_but_closed_after_the_owner_closed(loop: str, opener: Open, how: str) -> None:
    async def main() -> None:
        pair = await two(opener)
        pair.b_sink.on_data = lambda _: getattr(pair.b, how)()
        pair.a.write(b"x" * 300_000)
        await pair.b_sink.until(lambda r: r.data)
        seen = len(pair.b_sink.data)
        assert await pair.b_sink.until_closed() is None
        assert len(pair.b_sink.data) == seen
        assert not pair.b_sink.eof
        pair.a.abort()
        await pair.a_sink.until_closed()

    run(loop, main)


@loops
@sides
def test_sink_replaced_in_flight(loop: str, opener: Open, flip: bool) -> None:
    async def main() -> None:
        pair = await two(opener, flip)
        second = Recorder()

        def replace(data: bytes) -> None:
            pair.b.sink = second

        pair.b_sink.on_data = replace
        data = os.urandom(1 << 20)
        pump(pair.a, pair.a_sink, data)
        await second.until(lambda r: r.eof)
        assert pair.b.sink is second
        assert pair.b_sink.data + second.data == data
        assert second.data
        pair.a.close()
        pair.b.close()
        await second.until_closed()
        assert not pair.b_sink.closes

    run(loop, main)


@loops
def test_replaced_while_paused_gets_what_was_held(loop: str, opener: Open) -> None:
    async def main() -> None:
        pair = await two(opener)
        pair.b_sink.on_data = lambda _: pair.b.pause_reading()
        pair.a.write(b"1")
        await pair.b_sink.until(lambda r: r.data)
        pair.a.write(b"2")
        pair.a.write_eof()
        await turns(20)
        second = Recorder()
        pair.b.sink = second
        await turns(20)
        assert not second.data
        pair.b.resume_reading()
        await second.until(lambda r: r.eof)
        assert second.data == b"2"
        pair.a.close()
        pair.b.close()
        await second.until_closed()

    run(loop, main)


@loops
def test_new_sink_hears_that_writing_is_stopped(loop: str, opener: Open) -> None:
    async def main() -> None:
        pair = await two(opener)
        pair.b.pause_reading()
        pair.a.write(bytes(4 << 20))
        assert pair.a_sink.blocked
        second = Recorder()
        pair.a.sink = second
        await second.until(lambda r: r.blocked)
        pair.b.resume_reading()
        await second.until(lambda r: not r.blocked)
        pair.a.close()
        pair.b.close()
        await second.until_closed()

    run(loop, main)


@loops
def test_peer_reset_while_paused_is_told_on_resume(loop: str, opener: Open) -> None:
    async def main() -> None:
        pair = await two(opener)
        pair.b.pause_reading()
        pair.a.abort()
        await pair.a_sink.until_closed()
        pair.b.resume_reading()
        assert await pair.b_sink.until_closed() is not None

    run(loop, main)


# Without a sink: TCP on both loops, TLS over it.


async def _sinkless(mesh: Mesh, kind: str) -> tuple[Stream, Stream, Recorder]:
    """(client, server without a sink, the client's sink)"""
    client, server = await tcp_pair()
    sink = Recorder()
    if kind == "tcp":
        client.sink = sink
        return client, server, sink
    client_tls, server_tls = mesh_contexts(mesh)
    ends = TlsStream(client, client_tls, server_side=False), TlsStream(server, server_tls, server_side=True)
    for end in ends:
        await end.wait_handshake(10)
    ends[0].sink = sink
    return *ends, sink


@loops
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_without_a_sink_reading_waits_and_nothing_is_lost(loop: str, mesh: Mesh, kind: str) -> None:
    async def main() -> None:
        client, server, client_sink = await _sinkless(mesh, kind)
        with pytest.raises(AttributeError):
            _ = server.sink
        sent = pump(client, client_sink, bytes(8 << 20))
        await client_sink.until(lambda r: r.blocked)
        await turns(50)
        assert sent() < 4 << 20
        sink = Recorder()
        server.sink = sink
        await sink.until(lambda r: r.eof)
        assert len(sink.data) == 8 << 20
        client.close()
        server.close()
        await sink.until_closed()

    run(loop, main)


@loops
def test_closed_before_there_is_a_sink(loop: str) -> None:
    async def main() -> None:
        client, server = await tcp_pair()
        client.sink = client_sink = Recorder()
        client.abort()
        await client_sink.until_closed()
        while not server.closing:
            await turns(1)
        await turns()
        server.sink = sink = Recorder()
        assert isinstance(await sink.until_closed(), ConnectionResetError)

    run(loop, main)


@loops
def test_tcp_options_and_water_mark(loop: str) -> None:
    async def main() -> None:
        client, server = socket_pair()
        duplicates = client.dup(), server.dup()
        event_loop = asyncio.get_running_loop()
        a = await connected(event_loop, client, Recorder(), high_water=1000)
        b = await accepted(event_loop, server, sink := Recorder(), high_water=1000)
        for sock in duplicates:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sock.close()
        a.pause_reading()
        b.write(bytes(4 << 20))
        assert sink.blocked
        assert "buffered=" in repr(b)
        for end in (a, b):
            end.abort()
        await sink.until_closed()

    run(loop, main)


@loops
@pytest.mark.parametrize("sizes", [[10], [5000], [10, 5000]], ids=["small", "large", "both"])
@pytest.mark.parametrize("ended", [False, True], ids=["reset", "end and reset"])
def test_what_came_before_a_write_that_fails_is_told(loop: str, sizes: list[int], ended: bool) -> None:
    """At once when it is large, else at the end of the turn."""

    async def main() -> None:
        sock, peer = socket_pair()
        stream = await connected(asyncio.get_running_loop(), sock, sink := Recorder(), high_water=1000)
        with peer:
            peer.send(b"answer")
            if ended:
                peer.shutdown(socket.SHUT_WR)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for size in sizes:
            stream.write(bytes(size))
        assert isinstance(await sink.until_closed(), OSError)
        assert (sink.data, sink.eof) == (b"answer", ended)

    run(loop, main)


def test_an_owner_that_fails_in_what_came_before_loses_its_stream() -> None:
    def fails(_: bytes) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        errors: list[object] = []
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        sock, peer = socket_pair()
        stream = await connected(loop, sock, sink := Recorder(fails), high_water=1000)
        with peer:
            peer.send(b"answer")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.write(bytes(5000))
        await sink.until_closed()
        assert [type(error) for error in errors] == [ZeroDivisionError]
        loop.set_exception_handler(None)

    run("native", main)


@loops
def test_a_socket_that_is_not_connected_is_closed(loop: str) -> None:
    async def main() -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with pytest.raises((OSError, ValueError)):
            await connected(asyncio.get_running_loop(), sock)
        assert sock.fileno() == -1

    run(loop, main)
