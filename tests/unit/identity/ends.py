"""Two connected ends of a stream over real loopback sockets, and a sink that records and waits for conditions."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvloop

from netproxy import tcp
from netproxy.addr import SpiffeId, spiffe_id
from netproxy.config.shard import SvidShard
from netproxy.identity.ca import CertificateAuthority
from netproxy.identity.svid import issue_svid
from netproxy.identity.tls import TlsStream, client_context, server_context
from netproxy.stream import Stream
from netproxy.tcp import accepted, connected

LOOPS: dict[str, tuple[Callable[[], asyncio.AbstractEventLoop], str]] = {
    "uvloop": (uvloop.new_event_loop, "loop"),
    "asyncio": (asyncio.new_event_loop, "loop"),
    "native": (uvloop.new_event_loop, "native"),
    "native on asyncio": (asyncio.new_event_loop, "native"),
}
"""With the streams that are used on each."""
DAY_S = 86400.0
WEB = spiffe_id("cluster.local", "shop", "web")
REVIEWS = spiffe_id("cluster.local", "shop", "reviews")


def run(loop: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Fails on whatever a callback raises: the loop would only log it."""
    errors: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with asyncio.timeout(60):
            await main()

    factory, streams = LOOPS[loop]
    if streams not in tcp.STREAMS:
        pytest.skip("native streams were not compiled")
    tcp.use(streams)
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(guarded())
    finally:
        tcp.use(tcp.STREAMS[0])
    assert not errors, errors


class Recorder:
    """Records, and enforces the order that the contract promises. `on_data` runs within data_received."""

    def __init__(self, on_data: Callable[[bytes], None] | None = None) -> None:
        self.data = bytearray()
        self.eof = False
        self.blocked = False
        self.was_blocked = False
        self.on_writable: Callable[[], None] | None = None
        self.on_data = on_data
        self.closes: list[Exception | None] = []
        self._changed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        assert data
        assert not self.eof
        assert not self.closes
        self.data += data
        self._changed.set()
        if self.on_data is not None:
            self.on_data(data)

    def eof_received(self) -> None:
        assert not self.eof
        assert not self.closes
        self.eof = True
        self._changed.set()

    def writable(self, ok: bool) -> None:
        assert not self.closes
        assert self.blocked is ok
        self.blocked = not ok
        self.was_blocked |= self.blocked
        self._changed.set()
        if ok and self.on_writable is not None:
            self.on_writable()

    def closed(self, exc: Exception | None) -> None:
        self.closes.append(exc)
        assert len(self.closes) == 1
        self._changed.set()

    async def until(self, condition: Callable[[Recorder], object]) -> None:
        async with asyncio.timeout(20):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def until_size(self, octets: int) -> None:
        await self.until(lambda r: len(r.data) == octets)

    async def until_closed(self) -> Exception | None:
        await self.until(lambda r: r.closes)
        return self.closes[0]


class Ends(NamedTuple):
    client: Stream
    server: Stream
    client_fd: int
    """Still the stream's own."""
    server_fd: int


class Mesh:
    """A CA in a folder and the SVIDs that it issued."""

    def __init__(self, folder: Path, trust_domain: str = "cluster.local", now: float | None = None) -> None:
        self.now = time.time() if now is None else now
        self.ca = CertificateAuthority.open(folder, trust_domain, now=self.now)

    def svid(self, identity: SpiffeId = WEB, *, now: float | None = None, ttl_s: float = DAY_S) -> SvidShard:
        return issue_svid(self.ca, identity, now=self.now if now is None else now, ttl_s=ttl_s)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """(client, server), TCP, non-blocking, with small kernel buffers so that a stall comes early."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * 1024)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * 1024)
    client.setblocking(False)
    server.setblocking(False)
    return client, server


async def tcp_pair() -> tuple[Stream, Stream]:
    """Without sinks."""
    client, server = socket_pair()
    loop = asyncio.get_running_loop()
    return await connected(loop, client), await accepted(loop, server)


async def tcp_ends(client_sink: Recorder, server_sink: Recorder) -> Ends:
    client, server = socket_pair()
    fds = client.fileno(), server.fileno()
    loop = asyncio.get_running_loop()
    return Ends(await connected(loop, client, client_sink), await accepted(loop, server, server_sink), *fds)


async def tls_ends(
    client_sink: Recorder, server_sink: Recorder, client_tls: ssl.SSLContext, server_tls: ssl.SSLContext
) -> Ends:
    client, server = socket_pair()
    fds = client.fileno(), server.fileno()
    loop = asyncio.get_running_loop()
    ends = (
        TlsStream(await connected(loop, client), client_tls, server_side=False, sink=client_sink),
        TlsStream(await accepted(loop, server), server_tls, server_side=True, sink=server_sink),
    )
    for end in ends:
        await end.wait_handshake(10)
    return Ends(*ends, *fds)


def mesh_contexts(mesh: Mesh) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(client as web, server as reviews)"""
    return client_context(mesh.svid(WEB)), server_context(mesh.svid(REVIEWS))
