"""Asking a workload's own resolvers, from inside its network namespace.

A query goes out with an ID of its own, from a socket of its own whose port the kernel chooses, connected to the
resolver: who wants to slip in an answer has to guess both (RFC 5452 section 9). The reply has to repeat ID and
question. Resolvers are asked in order, each for its share of `dns_timeout_s`; one that can't be reached, or fails,
gives way to the next. The sockets are marked, so no query of ours is steered back to us.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import dns.rcode

from ..addr import WorkloadKey
from ..config.shard import MeshShard
from ..errors import Reason, UpstreamError
from .answer import HEADER, MAX_MESSAGE, question_end

PORT = 53
_STRANGE = 64
"""Datagrams that are no answer to the query, until the resolver is given up: somebody floods us."""
_FAILED = frozenset({dns.rcode.SERVFAIL, dns.rcode.NOTIMP, dns.rcode.REFUSED})
"""The next resolver may know better, glibc thinks so too."""


class Sockets(Protocol):
    """Unconnected sockets of a workload's namespace, not blocking. Raises UpstreamError."""

    async def take(
        self, workload: WorkloadKey, family: int, kind: Literal["stream", "dgram"] = "stream"
    ) -> socket.socket: ...


class Count(Protocol):
    def __call__(self, name: str, n: int = 1, detail: str = "") -> None: ...


class Forwarder:
    """`mesh` is what is configured now; `random_id` gives numbers in [0, 65536) that nobody can guess."""

    def __init__(
        self, sockets: Sockets, mesh: Callable[[], MeshShard], random_id: Callable[[], int], count: Count
    ) -> None:
        self._sockets = sockets
        self._mesh = mesh
        self._random_id = random_id
        self._count = count
        self.outstanding = 0
        self._of: dict[WorkloadKey, int] = {}
        self.port = PORT

    def is_full(self, workload: WorkloadKey) -> bool:
        """One workload never has more than are free: half of all when it is alone, and whoever floods a silent resolver
        leaves room for the others."""
        return self._of.get(workload, 0) >= self._mesh().dns_max_outstanding - self.outstanding

    async def ask(self, workload: WorkloadKey, resolvers: Sequence[str], query: bytes, *, stream: bool) -> bytes:
        """The answer of the first of `resolvers` that has one, by TCP when `stream` is true. Its ID is the query's.

        Raises UpstreamError with DNS_FAILED, or OVERLOADED when too many wait already.
        """
        if not resolvers:
            raise UpstreamError(Reason.DNS_FAILED, "the workload has no resolver")
        if self.is_full(workload):
            self._count("dns_limit")
            raise UpstreamError(Reason.OVERLOADED, "too many queries wait for an answer")
        self.outstanding += 1
        self._of[workload] = self._of.get(workload, 0) + 1
        try:
            return await self._ask(workload, resolvers, query, stream=stream)
        finally:
            self.outstanding -= 1
            self._of[workload] -= 1
            if not self._of[workload]:
                del self._of[workload]

    async def _ask(self, workload: WorkloadKey, resolvers: Sequence[str], query: bytes, *, stream: bool) -> bytes:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._mesh().dns_timeout_s
        # A datagram may be lost: the only resolver is asked twice.
        tries = list(resolvers) if stream or len(resolvers) > 1 else [*resolvers, *resolvers]
        answer, failed = b"", ""
        for number, resolver in enumerate(tries):
            try:
                async with asyncio.timeout_at(loop.time() + (until - loop.time()) / (len(tries) - number)):
                    answer = await self._exchange(workload, resolver, query, stream=stream)
            except TimeoutError:
                self._count("dns_timeouts")
                failed = f"{resolver} did not answer in time"
            except UpstreamError as exc:
                failed = exc.detail
            except OSError as exc:
                failed = f"{resolver}: {os.strerror(exc.errno) if exc.errno else exc}"
            except (ValueError, EOFError) as exc:
                failed = f"{resolver}: {exc}"
            else:
                if answer[3] & 0xF not in _FAILED or number + 1 == len(tries) or tries[number + 1] == resolver:
                    return answer
        if answer:
            return answer
        raise UpstreamError(Reason.DNS_FAILED, failed)

    async def _exchange(self, workload: WorkloadKey, resolver: str, query: bytes, *, stream: bool) -> bytes:
        sock = await self._sockets.take(workload, 6 if ":" in resolver else 4, "stream" if stream else "dgram")
        try:
            asked = self._random_id().to_bytes(2, "big") + query[2:]
            if not stream:
                sock.connect((resolver, self.port))
                sock.send(asked)
            for _ in range(1 if stream else _STRANGE):
                if stream:
                    answer = await _by_stream(sock, (resolver, self.port), asked)
                else:
                    answer = await asyncio.get_running_loop().sock_recv(sock, MAX_MESSAGE)
                if is_answer(answer, asked):
                    return query[:2] + answer[2:]
                self._count("dns_mismatched")
            raise ValueError("what came is no answer to the query")
        finally:
            sock.close()


def is_answer(answer: bytes, query: bytes) -> bool:
    """A response with the query's ID, opcode and one question, whose name may be spelled in other case."""
    if len(answer) < HEADER or answer[:2] != query[:2] or answer[4:6] != b"\0\1":
        return False
    if (answer[2] ^ query[2]) & 0xF8 != 0x80:
        return False
    try:
        end = question_end(query)
        return question_end(answer) == end and _question(answer, end) == _question(query, end)
    except ValueError:
        return False


def _question(wire: bytes, end: int) -> tuple[bytes, bytes]:
    return wire[HEADER : end - 4].lower(), wire[end - 4 : end]


async def _by_stream(sock: socket.socket, resolver: tuple[str, int], query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, resolver)
    await loop.sock_sendall(sock, struct.pack("!H", len(query)) + query)
    (length,) = struct.unpack("!H", await _exactly(sock, 2))
    return await _exactly(sock, length)


async def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise EOFError("the connection ended within an answer")
        data += piece
    return data
