"""A worker process: data path only, on a loop of its own, without any privilege.

Everything it may not do itself (enter a namespace, mark a socket, bind a port) comes as descriptors from
the supervisor. Everything it must know comes as shards. See `channel` for the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import encodings.ascii
import encodings.idna
import encodings.latin_1
import gc
import os
import random
import secrets
import socket
import sys
import time

import uvloop

from .accept.listener import Accepted, Listener
from .addr import SpiffeId, WorkloadKey
from .arena import GAUGE_POOLED, GAUGE_UPSTREAM, ArenaWriter
from .channel import ChannelBroken, Message
from .child import Joined, drop_privileges, join
from .codec import h1, h2
from .config.shard import MeshShard, SvidShard, decode_shard, preload
from .decide.route import Tables
from .dns import answer as dns_answer
from .dns.forward import Forwarder
from .dns.names import Names
from .dns.resolve import HostResolver
from .dns.server import Datagrams, DnsServer
from .identity.tls import ContextCache
from .log import ERROR, WARNING, debug, debugging, log, log_exception, set_level
from .observe.access import AccessLogger
from .observe.lines import Output
from .observe.record import LINES_LOST, LINES_WRITTEN, Recorder
from .relay.serve import Server, reset
from .relay.services import Services
from .relay.shared import SharedConnections
from .settings import REGIONS_PER_WORKER
from .upstream.connect import Dialer, SocketStock, StockKey
from .upstream.pool import Pool

_SWEEP_S = 0.5
_TURN_S = 0.002
"""How long one turn of the loop may work on configuration."""
_LOG_S = 1.0
"""How long the access log may take for its last lines at our end."""
_QUEUE_S = 0.2
"""How long a draining worker still accepts: handshakes that began before the rules went."""


class Worker:
    def __init__(self, joined: Joined, loop: asyncio.AbstractEventLoop) -> None:
        self._channel = joined.channel
        self._settings = joined.settings
        self._loop = loop
        self._arena = ArenaWriter(joined.arena_fd, joined.region, REGIONS_PER_WORKER * joined.settings.workers)
        rng = random.Random()
        tables = Tables(rng.random)
        self._contexts = ContextCache(count=self._arena.count)
        self._stock = SocketStock(self._ask_sockets)
        pool: Pool = Pool()
        dialer = Dialer(self._stock, self._contexts, tables.svids.get)
        self._services = Services(loop, time.monotonic, tables, pool, dialer, Recorder(self._arena))
        self._services.shared = SharedConnections(self._services)
        self._output = Output(self._count_lines, lambda text: log(f"access log: {text}", WARNING))
        self._services.access = AccessLogger(joined.settings.node, rng.random)
        self._server = Server(self._services, self._contexts)
        count = self._arena.count
        self._names = Names()
        forwarder = Forwarder(self._stock, lambda: tables.mesh, lambda: secrets.randbelow(1 << 16), count)
        self._resolver = self._services.resolver = HostResolver(forwarder, self._names, time.monotonic, count)
        self._dns = DnsServer(self._names, forwarder, lambda key: self._families.get(key, frozenset()), count)
        self._listeners: dict[WorkloadKey, list[Listener | Datagrams]] = {}
        self._families: dict[WorkloadKey, frozenset[int]] = {}
        self._tasks: dict[asyncio.Task[None], WorkloadKey] = {}
        self.ended: asyncio.Future[None] = loop.create_future()

    def start(self) -> None:
        self._loop.add_reader(self._channel.fileno(), self._on_channel)
        self._loop.call_later(_SWEEP_S, self._sweep)

    # -- the supervisor -----------------------------------------------------------------------------

    def _on_channel(self) -> None:
        """At most `_TURN_S` of work; what is left makes the loop call again."""
        until = time.monotonic() + _TURN_S
        try:
            while time.monotonic() < until:
                message = self._channel.receive()
                if message is None:
                    break
                self._on_message(message)
        except ChannelBroken:
            os._exit(1)  # without a supervisor there is nothing to serve for

    def _send(self, op: str, **fields: object) -> None:
        try:
            self._channel.send(op, **fields)  # type: ignore[arg-type]
        except ChannelBroken:
            os._exit(1)
        if self._channel.wants_write:
            self._loop.add_writer(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        try:
            self._channel.flush()
        except ChannelBroken:
            os._exit(1)
        if not self._channel.wants_write:
            self._loop.remove_writer(self._channel.fileno())

    def _on_message(self, message: Message) -> None:
        fields = message.fields
        match message.op:
            case "shard":
                shard = decode_shard(fields["key"], message.body)
                tables = self._services.tables
                broken = tables.broken_patterns
                tables.put(shard)
                self._names.put(shard)
                if tables.broken_patterns > broken:
                    self._arena.count("broken_patterns", tables.broken_patterns - broken, detail=fields["key"])
                if isinstance(shard, SvidShard):
                    self._contexts.drop(shard.identity)
                elif isinstance(shard, MeshShard):
                    self._services.access.select(shard.access_log)
                    self._contexts.allow_resumption(shard.tls_resumption)
                if debugging():
                    debug(f"{fields['key']}: version {fields['version']} is in force")
            case "unshard":
                self._services.tables.drop(fields["key"])
                self._names.drop(fields["key"])
                kind, _, identity = fields["key"].partition("/")
                if kind == "svid":
                    self._contexts.drop(SpiffeId(identity))
                if debugging():
                    debug(f"{fields['key']}: gone")
            case "access_log":
                self._output.replace(message.fds[0])
                self._services.access.write_to(self._output)
            case "log_level":
                set_level(fields["level"])
            case "listen":
                self._families[WorkloadKey(fields["workload"])] = frozenset(fields["dial"])
                self._listen(WorkloadKey(fields["workload"]), fields["sockets"], message.fds)
                self._send("listening", workload=fields["workload"])
            case "unlisten":
                self._unlisten(WorkloadKey(fields["workload"]))
            case "sockets":
                key = StockKey(WorkloadKey(fields["workload"]), fields["family"], fields.get("kind", "stream"))
                self._stock.deliver(key, message.fds, fields["error"])
            case "synced":
                gc.collect()
                gc.freeze()
                self._send("ready")
            case "drain":
                task = self._loop.create_task(self._drain(fields["deadline_s"]))
                task.add_done_callback(lambda _: None if self.ended.done() else self.ended.set_result(None))
            case other:
                log(f"unknown message {other!r}", WARNING)

    def _ask_sockets(self, key: StockKey, n: int) -> None:
        self._send("sockets", id=0, workload=key.workload, family=key.family, kind=key.kind, n=n)

    # -- listeners ----------------------------------------------------------------------------------

    def _listen(self, key: WorkloadKey, sockets: list[tuple[str, int]], fds: list[int]) -> None:
        for listener in self._listeners.pop(key, []):
            listener.close()
        self._listeners[key] = [
            self._listener(key, kind, socket.socket(fileno=fd)) for (kind, _), fd in zip(sockets, fds, strict=True)
        ]

    def _listener(self, key: WorkloadKey, kind: str, sock: socket.socket) -> Listener | Datagrams:
        if kind == "dns":
            return self._dns.datagrams(sock, key)
        on_accept = self._on_dns_accept if kind == "dns-tcp" else self._on_accept
        return Listener(sock, key, inbound=kind == "inbound", on_accept=on_accept)

    def _unlisten(self, key: WorkloadKey) -> None:
        """The workload is gone: close all of ours in its namespace, now."""
        for listener in self._listeners.pop(key, []):
            listener.close()
        self._dns.drop(key)
        self._resolver.drop(key)
        self._families.pop(key, None)
        for task in [task for task, owner in self._tasks.items() if owner == key]:
            task.cancel()
        for live in [live for live in self._services.live if live.workload == key]:
            live.abort()
        for upstream in self._services.pool.drop(key):
            upstream.abort()
        self._services.shared.drop(key)
        self._stock.drop(key)

    def _on_accept(self, accepted: Accepted) -> None:
        if len(self._tasks) >= self._services.tables.mesh.max_connections:
            self._arena.count("refused_connections", detail="UO")
            reset(accepted.sock)
            return
        families = self._families.get(accepted.workload, frozenset())
        task = self._loop.create_task(self._serve(accepted, families))
        self._tasks[task] = accepted.workload
        task.add_done_callback(self._served)

    def _on_dns_accept(self, accepted: Accepted) -> None:
        self._dns.accept(accepted.sock, accepted.workload)

    async def _serve(self, accepted: Accepted, families: frozenset[int]) -> None:
        try:
            await self._server.serve(accepted, families)
        except Exception as exc:  # noqa: BLE001 - the top of a connection: count it, close, go on
            self._arena.count("internal_errors")
            reset(accepted.sock)
            log_exception("a connection failed", exc)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    def _count_lines(self, lost: str, n: int) -> None:
        """Of the access log; `lost`: why, "" for those written."""
        if lost:
            self._arena.count(LINES_LOST, n, lost)
        else:
            self._arena.count(LINES_WRITTEN, n)

    def close(self) -> bool:
        """False: a thread is stuck, and the process does not end by itself."""
        return self._output.close(_LOG_S)

    # -- time ---------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        self._loop.call_later(_SWEEP_S, self._sweep)
        now = time.monotonic()
        services = self._services
        for live in list(services.live):
            live.check(now)
        for upstream in services.pool.expire(now - services.tables.mesh.pool_idle_s):
            upstream.close()
        services.shared.check(now)
        services.shared.expire(now - services.tables.mesh.pool_idle_s)
        shared = services.shared.statistics()
        self._output.publish()
        self._arena.gauges[GAUGE_POOLED] = services.pool.idle_count + shared.idle
        self._arena.gauges[GAUGE_UPSTREAM] = services.pool.open_count + shared.open

    async def _drain(self, deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        accept_until = time.monotonic() + _QUEUE_S
        while time.monotonic() < accept_until:
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.accept_queued()
            await asyncio.sleep(0.02)
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.close()
        self._listeners.clear()
        services = self._services
        services.draining = True
        self._dns.drain()
        for upstream in services.pool.expire(float("inf")):
            upstream.close()
        services.shared.expire(float("inf"))
        while (services.live or self._tasks or self._dns.busy) and time.monotonic() < until:
            # Also those that came out of their set-up only now.
            for live in list(services.live):
                live.drain()
            await asyncio.sleep(0.05)
        for live in list(services.live):
            live.abort()
        services.shared.abort()
        await asyncio.sleep(0.05)  # let the last octets and resets leave


async def _run(joined: Joined) -> bool:
    """False: see `Worker.close`."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_on_exception)
    worker = Worker(joined, loop)
    worker.start()
    await worker.ended
    return worker.close()


def _on_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    exc = context.get("exception")
    text = str(context.get("message"))
    if isinstance(exc, Exception):
        log_exception(text, exc)
    else:
        log(f"{text}: {exc!r}", ERROR)


def main() -> int:
    joined = join("worker")
    # What is imported on first use must be there now: later the interpreter's files may not be readable.
    preload()
    dns_answer.preload()
    assert all((encodings.idna, encodings.latin_1, encodings.ascii))
    h1.use(joined.settings.http1_engine)
    h2.use(joined.settings.http2_engine)
    drop_privileges(joined.settings.worker_uid, joined.settings.worker_gid, int(sys.argv[3]))
    with contextlib.suppress(KeyboardInterrupt):
        if not uvloop.run(_run(joined)):
            log("the access log can't take its last lines, they are lost", WARNING)
            os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
