"""A resolver on loopback whose behaviour a test chooses, and sockets that need no namespace."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Literal

import dns.message
import dns.rcode
import dns.rrset

from netproxy.addr import WorkloadKey
from netproxy.config.shard import MeshShard
from netproxy.dns.forward import Forwarder

Reply = Callable[[bytes], list[bytes]]
"""From a query to what is sent back: nothing, or several messages."""


class LoopbackSockets:
    """Passes the contract of `upstream.connect.SocketStock.take` (see test_forward)."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    async def take(
        self, workload: WorkloadKey, family: int, kind: Literal["stream", "dgram"] = "stream"
    ) -> socket.socket:
        self.taken[kind] += 1
        sort = socket.SOCK_DGRAM if kind == "dgram" else socket.SOCK_STREAM
        sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, sort)
        sock.setblocking(False)
        return sock


class Counts(Counter[str]):
    def __call__(self, name: str, n: int = 1, detail: str = "") -> None:
        self[f"{name} {detail}".strip()] += n


def answers(*addresses: str, ttl: int = 30, rcode: dns.rcode.Rcode = dns.rcode.NOERROR) -> Reply:
    """Every question with these."""

    def reply(wire: bytes) -> list[bytes]:
        response = dns.message.make_response(dns.message.from_wire(wire))
        response.set_rcode(rcode)
        if addresses:
            kind = "AAAA" if ":" in addresses[0] else "A"
            response.answer.append(dns.rrset.from_text(response.question[0].name, ttl, "IN", kind, *addresses))
        return [response.to_wire()]

    return reply


class Resolver(asyncio.DatagramProtocol):
    """On one port of 127.0.0.1 (UDP and TCP). `reply` is for datagrams, `by_tcp` for connections."""

    def __init__(self) -> None:
        self.reply: Reply = answers("192.0.2.1")
        self.by_tcp: Reply = answers("192.0.2.2")
        self.asked: list[dns.message.Message] = []
        self.port = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked.append(dns.message.from_wire(data))
        for wire in self.reply(data):
            self.transport.sendto(wire, addr)  # type: ignore[attr-defined]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            data = await reader.readexactly(struct.unpack("!H", await reader.readexactly(2))[0])
            self.asked.append(dns.message.from_wire(data))
            for wire in self.by_tcp(data):
                writer.write(struct.pack("!H", len(wire)) + wire)
        writer.close()


@contextlib.asynccontextmanager
async def resolver() -> AsyncIterator[Resolver]:
    made = Resolver()
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    transport, _ = await loop.create_datagram_endpoint(lambda: made, ("127.0.0.1", made.port))
    try:
        yield made
    finally:
        transport.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)


def forwarder(port: int, counts: Counts, **mesh: object) -> Forwarder:
    numbers = iter(range(1000, 60000))
    made = Forwarder(LoopbackSockets(), lambda: MeshShard(**mesh), lambda: next(numbers), counts)  # type: ignore[arg-type]
    made.port = port
    return made
