"""The doors for names: datagrams and connections on the port that a pod's queries are steered to.

A datagram is answered by the socket that it came by: connection tracking puts the address back that was asked. What
has to be asked elsewhere waits in a task of its own, so answers come in any order, by TCP as well (RFC 7766 section
6.2.1.1).

Bounds: of queries that wait for a resolver `MeshShard.dns_max_outstanding`; of connections `MAX_STREAMS` a workload,
each with `MAX_PIPELINED` queries under way, and closed when it asks nothing, or takes no answer, for `IDLE_S`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import dns.edns
import dns.rcode

from ..addr import WorkloadKey
from ..errors import Reason, UpstreamError
from ..log import log_exception
from ..observe.record import DNS_QUERIES
from .answer import MAX_QUERY, Outcome, Question, Responder, rcode_of
from .forward import Count, Forwarder
from .names import Names

MAX_STREAMS = 64
MAX_PIPELINED = 16
IDLE_S = 10.0
_HIGH_WATER = 16 * 1024
"""Octets of answers that a connection does not take, until it is not read either."""
_BATCH = 16
"""Datagrams read in one turn of the loop: an answer takes 0.2 ms."""


class Datagrams:
    """One socket. `on_query` is told octets and sender, `answer` sends; both never wait."""

    def __init__(
        self,
        sock: socket.socket,
        workload: WorkloadKey,
        on_query: Callable[[Datagrams, bytes, Any], None],
        count: Count,
    ) -> None:
        sock.setblocking(False)
        self.workload = workload
        self._sock = sock
        self._on_query = on_query
        self._count = count
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self.waiting = 0
        """Queries that are still to be answered: closed after them."""

    def _readable(self) -> None:
        for _ in range(_BATCH):
            try:
                wire, sender = self._sock.recvfrom(MAX_QUERY + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                return  # memory; the kernel tells again
            self._on_query(self, wire, sender)

    def accept_queued(self) -> None:
        """Take what waits in the queue right now."""
        if not self._closing:
            self._readable()

    def answer(self, wire: bytes, receiver: Any) -> None:
        try:
            self._sock.sendto(wire, receiver)
        except OSError:
            # The app's queue is full, or it is gone: as if the answer was lost on the way.
            self._count("dns_dropped", detail="send")

    def done(self) -> None:
        """One of `waiting` was answered, or never will be."""
        self.waiting -= 1
        if self._closing and not self.waiting:
            self._sock.close()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.remove_reader(self._sock.fileno())
            if not self.waiting:
                self._sock.close()


class DnsServer:
    """`families` tells which a workload can dial."""

    def __init__(
        self, names: Names, forwarder: Forwarder, families: Callable[[WorkloadKey], frozenset[int]], count: Count
    ) -> None:
        self._names = names
        self._forwarder = forwarder
        self._families = families
        self._count = count
        self._responder = Responder(names)
        self._tasks: dict[asyncio.Task[None], WorkloadKey] = {}
        self._streams: Counter[WorkloadKey] = Counter()
        self._draining = asyncio.Event()

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def datagrams(self, sock: socket.socket, workload: WorkloadKey) -> Datagrams:
        """Serve a bound socket, which is the result's from now on."""
        return Datagrams(sock, workload, self._on_datagram, self._count)

    def accept(self, sock: socket.socket, workload: WorkloadKey) -> None:
        """Serve a connection."""
        if self._streams[workload] >= MAX_STREAMS:
            self._count("dns_dropped", detail="connections")
            sock.close()
            return
        self._streams[workload] += 1
        self._spawn(workload, self._serve, sock, workload).add_done_callback(lambda _: self._left(sock, workload))

    def _left(self, sock: socket.socket, workload: WorkloadKey) -> None:
        sock.close()  # no more than a second time, unless nothing was ever begun with it
        self._streams[workload] -= 1
        if not self._streams[workload]:
            del self._streams[workload]

    def drop(self, workload: WorkloadKey) -> None:
        """The workload is gone: leave nothing open in its namespace."""
        for task in [task for task, owner in self._tasks.items() if owner == workload]:
            task.cancel()

    def drain(self) -> None:
        """Answer what was asked, take no more."""
        self._draining.set()

    def _spawn(
        self, workload: WorkloadKey, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any
    ) -> asyncio.Task[None]:
        """`work` is called by the task itself: one that is cancelled before its first turn leaves no coroutine."""
        task = asyncio.get_running_loop().create_task(self._guarded(work, *arguments))
        self._tasks[task] = workload
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    async def _guarded(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        try:
            await work(*arguments)
        except Exception as exc:  # noqa: BLE001 - the top of a query or connection: count it, close, go on
            self._count("internal_errors")
            log_exception("a query failed", exc)

    # -- queries ------------------------------------------------------------------------------------

    def _receive(self, wire: bytes, workload: WorkloadKey, *, stream: bool) -> Outcome:
        """What is to be done with a query. Counts it, unless it is to be forwarded."""
        shard = self._names.workload(workload)
        if shard is None:
            # Its shard comes before its listeners. It was just removed.
            outcome = Outcome(dropped="unknown workload")
        else:
            outcome = self._responder.receive(wire, shard, self._families(workload), stream=stream)
        if outcome.dropped:
            self._count("dns_dropped", detail=outcome.dropped)
        elif outcome.forward is None:
            self._answered("mesh", outcome.reply)
        return outcome

    def _answered(self, source: str, reply: bytes) -> None:
        self._count(DNS_QUERIES, detail=f"{source}/{rcode_of(reply)}")

    async def _forward(self, question: Question, workload: WorkloadKey) -> bytes:
        shard = self._names.workload(workload)
        resolvers = shard.nameservers if shard is not None else ()
        try:
            answer = await self._forwarder.ask(workload, resolvers, question.wire, stream=question.stream)
            reply = question.relayed(answer)
        except UpstreamError as exc:
            no_authority, other = dns.edns.EDECode.NO_REACHABLE_AUTHORITY, dns.edns.EDECode.OTHER
            code = other if exc.reason is Reason.OVERLOADED else no_authority
            reply = question.failed(dns.rcode.SERVFAIL, exc.detail, code)
        self._answered("forwarded", reply)
        return reply

    def _on_datagram(self, door: Datagrams, wire: bytes, sender: Any) -> None:
        outcome = self._receive(wire, door.workload, stream=False)
        if outcome.reply:
            door.answer(outcome.reply, sender)
        elif outcome.forward is not None:
            door.waiting += 1
            task = self._spawn(door.workload, self._forward_datagram, door, outcome.forward, sender)
            task.add_done_callback(lambda _: door.done())

    async def _forward_datagram(self, door: Datagrams, question: Question, sender: Any) -> None:
        door.answer(await self._forward(question, door.workload), sender)

    # -- connections --------------------------------------------------------------------------------

    async def _serve(self, sock: socket.socket, workload: WorkloadKey) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except OSError:
            sock.close()
            return
        writer.transport.set_write_buffer_limits(_HIGH_WATER)
        places = asyncio.Semaphore(MAX_PIPELINED)
        under_way: set[asyncio.Task[None]] = set()
        draining = asyncio.get_running_loop().create_task(self._draining.wait())
        try:
            while (wire := await self._next_query(reader, draining, idle=lambda: not under_way)) is not None:
                outcome = self._receive(wire, workload, stream=True)
                if outcome.dropped:
                    return  # no client of ours: it does not speak DNS
                await places.acquire()
                task = asyncio.get_running_loop().create_task(self._reply(outcome, workload, writer, places))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                if writer.is_closing():
                    break  # it takes no answers; what it sent is in our buffer still
            if under_way:
                await asyncio.wait(under_way)
            writer.close()
            async with asyncio.timeout(IDLE_S):
                await writer.wait_closed()
        except (OSError, EOFError):
            pass  # gone, perhaps in the middle of a query, or it takes no answers
        finally:
            draining.cancel()
            for task in under_way:
                task.cancel()
            writer.transport.abort()

    @staticmethod
    async def _next_query(
        reader: asyncio.StreamReader, draining: asyncio.Task[bool], *, idle: Callable[[], bool]
    ) -> bytes | None:
        """None: its end, nothing for too long, or we stop."""
        reading = asyncio.get_running_loop().create_task(_framed(reader))
        try:
            while not reading.done():
                await asyncio.wait((reading, draining), timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done() and (draining.done() or idle()):
                    return None
            return reading.result()
        finally:
            reading.cancel()

    async def _reply(
        self, outcome: Outcome, workload: WorkloadKey, writer: asyncio.StreamWriter, places: asyncio.Semaphore
    ) -> None:
        try:
            question = outcome.forward
            reply = outcome.reply if question is None else await self._forward(question, workload)
            writer.write(struct.pack("!H", len(reply)) + reply)
            async with asyncio.timeout(IDLE_S):
                await writer.drain()
        except OSError:  # TimeoutError is one
            writer.transport.abort()
        finally:
            places.release()


async def _framed(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None at the end of the stream. Raises EOFError when it ends within one."""
    try:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise
        return None
    return await reader.readexactly(length)
