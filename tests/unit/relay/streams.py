"""Streams in memory, and the small world that an HTTP connection or a relay needs around it.

`FakeStream` obeys the contract of `netproxy.stream`; its reading half is the one that all real streams share.
What is called `peer_...` is what the far end does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from netproxy.addr import ClientAddr, EndpointAddr, OriginalDst, ServiceKey, SpiffeId, WorkloadKey, spiffe_id
from netproxy.arena import ArenaWriter
from netproxy.config.shard import (
    AccessLog,
    Backend,
    Endpoint,
    HttpVersion,
    Match,
    MeshShard,
    Rule,
    ServicePort,
    ServiceShard,
    WorkloadShard,
)
from netproxy.decide.route import EndpointState, PortTable, Tables
from netproxy.delivery import Delivery
from netproxy.errors import LocalProtocolError, Reason, UpstreamError
from netproxy.observe.access import AccessLogger
from netproxy.observe.record import Parties, Recorder, Who
from netproxy.relay.connection import HttpConnection
from netproxy.relay.downstream_h2 import Http2Downstream
from netproxy.relay.downstream_h2_stream import Http2Stream
from netproxy.relay.request import Exchange
from netproxy.relay.services import Facts, Services, Stamps
from netproxy.relay.shared import SharedConnections
from netproxy.settings import arena_size
from netproxy.stream import Sink, Stream
from netproxy.upstream.connect import Dialer
from netproxy.upstream.pool import Pool

HIGH_WATER = 1000
"""A full stream is cheap to make."""

CLIENT = WorkloadKey("shop/client")
WEB = ServiceKey("shop/web")
VIP = "240.240.0.1"
WEB_ENDPOINT = Endpoint("10.0.0.1", 8080, workload=WorkloadKey("shop/web-1"))
OTHER_ENDPOINT = Endpoint("10.0.0.2", 8080, workload=WorkloadKey("shop/other-1"))


class FakeStream(Stream):
    def __init__(self, sink: Sink | None = None) -> None:
        self._delivery = Delivery(sink, lambda: None)
        self._queue = bytearray()
        self._stalled = False
        self._full = False
        self._wrote_eof = False
        self._closing = False
        self._lost = False
        self._peer_ended = False
        self.sent = bytearray()
        """What the peer has received."""
        self.sent_eof = False
        self.was_reset = False
        self.most_held = 0
        self.alpn: str | None = None

    def __repr__(self) -> str:
        return f"<FakeStream closing={self.closing} buffered={self.buffered()} sent={bytes(self.sent[:60])!r}>"

    @property
    def sink(self) -> Sink:
        return self._delivery.sink

    @sink.setter
    def sink(self, sink: Sink) -> None:
        self._delivery.replace(sink)

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def paused(self) -> bool:
        return not self._delivery.ready

    def write(self, data: bytes) -> None:
        if self._closing:
            return
        if self._wrote_eof:
            raise LocalProtocolError("write after write_eof")
        self._queue += data
        self._flush()
        if len(self._queue) > HIGH_WATER and not self._full:
            self._full = True
            self._delivery.writable(False)

    def write_eof(self) -> None:
        if not self._closing:
            self._wrote_eof = True
            self._flush()

    def pause_reading(self) -> None:
        self._delivery.pause()

    def resume_reading(self) -> None:
        self._delivery.resume()

    def close(self) -> None:
        if not self._closing:
            self._closing = self._wrote_eof = True
            self._delivery.stop()
            self._flush()

    def abort(self) -> None:
        if not self.was_reset and not self._lost:
            self.was_reset = self._closing = True
            self._queue.clear()
            self._delivery.stop()
            self._lose(None)

    def buffered(self) -> int:
        return len(self._queue)

    def _flush(self) -> None:
        if self._stalled:
            return
        self.sent += self._queue
        self._queue.clear()
        self.sent_eof |= self._wrote_eof
        if self._full:
            self._full = False
            self._delivery.writable(True)
        if self._closing:
            self._lose(None)

    def _lose(self, exc: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            asyncio.get_running_loop().call_soon(self._delivery.lost, exc)

    def take_sent(self) -> bytes:
        out = bytes(self.sent)
        self.sent.clear()
        return out

    def peer_sends(self, data: bytes) -> None:
        if self._closing or self._peer_ended:
            return
        if self._delivery.ready:
            self._delivery.target.data_received(data)  # type: ignore[union-attr]
        else:
            self._delivery.hold(data)
            self.most_held = max(self.most_held, self._delivery.held())

    def peer_ends(self) -> None:
        if not self._closing and not self._peer_ended:
            self._peer_ended = True
            self._delivery.eof()

    def peer_resets(self) -> None:
        if not self._closing:
            self._closing = True
            self._queue.clear()
            self._delivery.stop()
            self._lose(ConnectionResetError("reset by the peer"))

    def peer_stalls(self) -> None:
        self._stalled = True

    def peer_reads(self) -> None:
        self._stalled = False
        if not self.was_reset:
            self._flush()


@dataclass
class Dial:
    endpoint: EndpointAddr
    tls: tuple[SpiffeId, SpiffeId, tuple[str, ...]] | None
    answer: asyncio.Future[Stream]

    def accept(self) -> FakeStream:
        """The endpoint's agent, if it is one, takes the first ALPN protocol."""
        stream = FakeStream()
        stream.alpn = self.tls[2][0] if self.tls is not None else None
        stream.pause_reading()
        self.answer.set_result(stream)
        return stream

    def fail(self, reason: Reason = Reason.CONNECT_FAILED) -> None:
        self.answer.set_exception(UpstreamError(reason, "no"))


class FakeDialer(Dialer):
    def __init__(self) -> None:
        self.dials: list[Dial] = []

    @property
    def open(self) -> list[Dial]:
        return [dial for dial in self.dials if not dial.answer.done()]

    async def dial(
        self,
        workload: WorkloadKey,
        endpoint: EndpointAddr,
        timeout_s: float,
        *,
        tls: tuple[SpiffeId, SpiffeId, tuple[str, ...]] | None = None,
        high_water: int = 0,
    ) -> Stream:
        dial = Dial(endpoint, tls, asyncio.get_running_loop().create_future())
        self.dials.append(dial)
        return await dial.answer


@dataclass
class Entry:
    parties: Parties
    security: str
    status: int
    reason: Reason
    numbers: tuple[float, int, int]
    protocol: str = "http/1.1"
    grpc_status: int = -1


class ListRecorder(Recorder):
    """The real one, which also keeps what it was told."""

    def __init__(self, arena: ArenaWriter) -> None:
        super().__init__(arena)
        self.entries: list[Entry] = []
        self.connections: list[tuple[Reason, tuple[int, int]]] = []
        self.open = 0

    def count(
        self,
        who: Who,
        status: int,
        reason: Reason,
        protocol: str,
        grpc_status: int,
        duration_s: float,
        moved_in: int,
        moved_out: int,
    ) -> None:
        super().count(who, status, reason, protocol, grpc_status, duration_s, moved_in, moved_out)
        numbers = (duration_s, moved_in, moved_out)
        self.entries.append(Entry(who.parties, who.security, status, reason, numbers, protocol, grpc_status))

    def connection_closed(self, parties: Parties, security: str, reason: Reason, moved: tuple[int, int]) -> None:
        super().connection_closed(parties, security, reason, moved)
        self.connections.append((reason, moved))

    def opened(self) -> None:
        super().opened()
        self.open += 1

    def gone(self) -> None:
        super().gone()
        self.open -= 1


class CountedConnection(HttpConnection):
    """Counts what must end as exactly one entry each."""

    expected = 0

    def attach(self, exchange: Exchange) -> None:
        type(self).expected += 1
        super().attach(exchange)

    def refuse(self, reason: Reason, detail: str, status: int = 0) -> None:
        type(self).expected += 1
        super().refuse(reason, detail, status)


class CountedHttp2(Http2Downstream):
    """The same: `expected` is the world's."""

    world: World

    def began(self, stream: Http2Stream) -> None:
        self.world.connection_type.expected += 1
        super().began(stream)

    def unread(self) -> None:
        self.world.connection_type.expected += 1
        super().unread()


def web_shard(
    endpoints: tuple[Endpoint, ...] = (WEB_ENDPOINT,), timeout_s: float = 0.0, http_version: HttpVersion = ""
) -> ServiceShard:
    """/missing is not routed, /other goes to another endpoint's service, /slow has a timeout."""
    rules = tuple(
        Rule(f"HTTPRoute shop/web rule {number}", (Match("prefix", path),), (backend,), timeout)
        for number, (path, backend, timeout) in enumerate(
            (
                ("/web", Backend(WEB, 80), timeout_s),
                ("/slow", Backend(WEB, 80), 5.0),
                ("/other", Backend(ServiceKey("shop/other"), 80), 0.0),
                ("/invalid", Backend(WEB, 81, invalid="no such port"), 0.0),
            )
        )
    )
    port = ServicePort(80, "http", "http", endpoints, rules, http_version=http_version)
    return ServiceShard("shop", "web", (VIP,), (port,))


def facts_with(facts: Facts, **changes: Any) -> Facts:
    """The same but for `changes`."""
    names = ("workload", "shard", "families", "inbound", "client", "dst", "port", "egress", "peer", "peer_sha256")
    return Facts(**({name: getattr(facts, name) for name in names} | changes))


class Fixed(Stamps):
    """`ids` are used up one by one, the last one stays."""

    def __init__(self, *ids: bytes, date: bytes = b"") -> None:
        super().__init__()
        self.ids = list(ids) or [b""]
        self.present = date

    def request_id(self) -> bytes:
        return self.ids.pop(0) if len(self.ids) > 1 else self.ids[0]

    def date(self, now: float) -> bytes:
        return self.present


@dataclass
class World:
    """One worker's services with a clock that only the test moves."""

    mesh: MeshShard = field(default_factory=MeshShard)
    time: float = 1000.0

    def __post_init__(self) -> None:
        self.states: set[EndpointState] = set()
        self.tables = Tables(lambda: 0.0)
        self.tables.put(self.mesh)
        self.tables.put(web_shard())
        other = ServicePort(80, "http", "http", (OTHER_ENDPOINT,))
        self.tables.put(ServiceShard("shop", "other", ("240.240.0.2",), (other,)))
        identity = spiffe_id("cluster.local", "shop", "client")
        self.shard = WorkloadShard("shop", "client", ("10.0.0.9",), identity, "client", local=True)
        self.tables.put(self.shard)
        self.dialer = FakeDialer()
        self.pool: Pool = Pool()
        fd = os.memfd_create("arena")
        try:
            os.ftruncate(fd, arena_size(1))
            self.recorder = ListRecorder(ArenaWriter(fd, 0, 1))
        finally:
            os.close(fd)
        self.services = Services(
            asyncio.get_running_loop(), lambda: self.time, self.tables, self.pool, self.dialer, self.recorder
        )
        self.services.shared = SharedConnections(self.services)
        self.lines: list[dict[str, Any]] = []
        """Of the access log, which has everything."""
        self.services.access = AccessLogger("node-a", lambda: 0.0, clock=lambda: self.time)
        self.services.access.select(AccessLog(percent=100))
        self.services.access.write_to(self)
        # Neither id nor date: so the transcripts show what is passed on. Tests of the edits set them.
        self.services.stamps = Fixed()
        self.connection_type = type("Counted", (CountedConnection,), {"expected": 0, "__slots__": ()})

    def put(self, line: bytes) -> None:
        self.lines.append(json.loads(line))

    @property
    def port(self) -> PortTable:
        return self.tables.ports[WEB, 80]

    @property
    def outstanding(self) -> int:
        """Also of endpoints that are no longer named."""
        self.states |= {state for table in self.tables.ports.values() for state in table.endpoints}
        return sum(state.outstanding for state in self.states)

    def facts(self, inbound: bool = False) -> Facts:
        return Facts(
            CLIENT,
            self.shard,
            frozenset((4,)),
            inbound,
            ClientAddr("10.0.0.9", 40000),
            OriginalDst(VIP, 80),
            None if inbound else self.port,
        )

    def connect(self, facts: Facts | None = None) -> tuple[FakeStream, CountedConnection]:
        stream = FakeStream()
        connection: CountedConnection = self.connection_type(stream, facts or self.facts(), self.services)
        return stream, connection

    def connect_http2(self, facts: Facts | None = None) -> tuple[FakeStream, CountedHttp2]:
        stream = FakeStream()
        kind = type("CountedHttp2", (CountedHttp2,), {"world": self, "__slots__": ()})
        connection: CountedHttp2 = kind(stream, facts or self.facts(), self.services)
        return stream, connection

    async def accept(self) -> FakeStream:
        """The one open dial succeeds."""
        await turns()
        (dial,) = self.dialer.open
        stream = dial.accept()
        await turns()
        return stream

    def check(self, after_s: float) -> None:
        self.time += after_s
        for live in list(self.services.live):
            live.check(self.time)
        self.services.shared.check(self.time)

    @property
    def ends(self) -> list[tuple[Reason, int]]:
        return [(entry.reason, entry.status) for entry in self.recorder.entries]

    def assert_idle(self) -> None:
        """Nothing is under way, nothing was lost."""
        assert self.outstanding == 0
        assert self.pool.open_count == self.pool.idle_count
        shared = self.services.shared.statistics()
        assert (shared.open - shared.idle, shared.dialling, shared.waiting) == (0, 0, 0)
        assert len(self.recorder.entries) == self.connection_type.expected
        told = [(line["reason"], line.get("response_code", 0)) for line in self.lines if line["protocol"] != "TCP"]
        assert told == [(reason.name, status) for reason, status in self.ends]
        assert self.recorder.open == len(self.services.live)

    def assert_gone(self) -> None:
        self.assert_idle()
        assert not self.services.live
        assert self.pool.open_count == 0
        assert not self.services.shared.busy
        assert self.services.shared.statistics() == (0, 0, 0, 0)


async def turns(n: int = 6) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


def play(main: Callable[[], Coroutine[Any, Any, None]], reports: type[Exception] | None = None) -> None:
    """Run on a loop of its own. Fails on what callbacks and tasks raise (but `reports`): the loop only logs it."""
    errors: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        await main()
        await turns()

    with asyncio.Runner() as runner:
        runner.run(guarded())
        gc.collect(0)  # a task's exception is reported when it goes
    assert [type(error.get("exception")) for error in errors] == ([reports] if reports else [])
