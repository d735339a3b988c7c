# cython: annotation_typing=False
"""One HTTP/2 connection to an endpoint, shared by requests, each of which is an `Http2Request` on it.

What belongs to one request (a reset, a shut window, a client that gave up or reads slowly) ends or holds back that one
alone. Content of a response is credited when its client has room, so the window of a stream is what may be held for it;
the connection's is as large as those of all its streams together, so a slow client holds up none but itself.

Octets go out at most once per turn of the loop, whatever was said in it: see `_flush`.

Its ends::

    SETTINGS did not come, or were not acknowledged   closed, all requests are told
    GOAWAY, or `MAX_RESETS` of ours                   no new requests; closed when the last one is over
    idle for `poolIdleTimeout`, the worker drains     closed
    silent                                            a PING, and closed when it is not answered: see `check`
    not closed for `idleTimeout` after that           aborted: the peer reads nothing

A request that the endpoint has not begun with (RFC 9113 section 8.7) is told so: it may be sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from ..codec import h2
from ..codec.events import (
    ConnectionClosed,
    Data,
    End,
    Event,
    GoAway,
    Informational,
    PeerSettings,
    PingAck,
    RequestHead,
    Reset,
    ResponseHead,
    Trailers,
    Writable,
)
from ..codec.h2_strict import MAX_WINDOW
from ..config.shard import MeshShard
from ..errors import LocalProtocolError, Reason, Refused, RemoteProtocolError, UpstreamError
from ..stream import Stream
from ..upstream.pool import PoolKey
from .exchange import request_for_http2, upgrade_protocols
from .upstream import Requester, Upstream

if TYPE_CHECKING:
    from .shared import SharedConnections

MAX_RESETS = 100
"""Requests that clients give up cost the endpoint's patience: servers end connections that reset many streams (rapid
reset, CVE-2023-44487; ours after 200 at once), with all that is on them. So it is left before that."""
PING_AFTER_S = 10.0
PING_TIMEOUT_S = 10.0
PING_AGAIN_S = 300.0
"""gRPC servers end connections with more pings than one in 5 minutes (too_many_pings). Agents don't mind."""
_PING = b"netproxy"
PSEUDO_FIELDS = 4
"""Of a request, beside :authority, which is its Host; an answer has one."""


def list_bytes(mesh: MeshShard) -> int:
    """`maxHeadBytes`, where HTTP/2 counts 32 octets more for each field: what passed in HTTP/1.1 passes here."""
    return min(mesh.max_head_bytes + 32 * (mesh.max_headers + PSEUDO_FIELDS), 1024 * 1024)


def client_limits(mesh: MeshShard) -> h2.H2Limits:
    stream_window = max(65535, mesh.buffer_bytes)
    streams = mesh.http2_max_upstream_streams
    return h2.H2Limits(
        max_header_list_bytes=list_bytes(mesh),
        max_headers=max(8, mesh.max_headers + PSEUDO_FIELDS),
        max_streams=streams,
        stream_window=stream_window,
        connection_window=min(MAX_WINDOW, streams * stream_window),
        # What a client sent at once, and what it may send until it hears that it has to stop.
        max_queued_bytes=2 * stream_window + 1024 * 1024,
    )


class Http2Connection:
    """The sink of its stream. `shared` looks after it."""

    def __init__(self, key: PoolKey, stream: Stream, shared: SharedConnections) -> None:
        """It was reserved in the pool; `shared.closed` is called when it is gone."""
        now = shared.services.now()
        self.key = key
        self.stream = stream
        self.idle_since = now
        self.is_up = False
        """It is in the pool, or was."""
        self.peer_ended = False
        """Streams that are reset since then are so by that alone."""
        self._shared = shared
        self.engine: h2.H2Client = h2.client_engine(client_limits(shared.services.tables.mesh))
        self._requests: dict[int, Http2Request] = {}
        self._left: dict[int, tuple[int, float]] = {}
        """Tunnels that are over but for octets that the endpoint's windows don't allow: how many, and since when."""
        self._ready: asyncio.Future[None] | None = shared.services.loop.create_future()
        self._in_turn = self._scheduled = self._freed = False
        self.is_writable = True
        self._closed = False
        self._answered = False
        self._resets = 0
        self._started_at = self._heard_at = now
        self.was_told = False
        """Since it was heard last, by a request."""
        self._partial_since = 0.0
        self._ping_at = 0.0
        """When the PING that waits for its answer was sent; 0.0: none does."""
        self._pinged_at = -PING_AGAIN_S
        self._closing_at = 0.0
        stream.sink = self
        stream.resume_reading()
        self._flush()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "closing" if self._closing_at else f"free={self.free_streams}"
        return f"<Http2Connection {self.key.endpoint} requests={len(self._requests)} {state}>"

    # -- for the pool and its driver ------------------------------------------------------------------

    @property
    def free_streams(self) -> int:
        return 0 if self._closing_at or self._closed or self.stream.closing else self.engine.free_streams

    @property
    def connect_protocol(self) -> bool:
        return self.engine.connect_protocol

    @property
    def answered(self) -> bool:
        """Some request was answered on it: it may be that the endpoint closes it just now."""
        return self._answered

    async def wait_ready(self, timeout_s: float) -> None:
        """Until the endpoint has said what it takes. Raises UpstreamError."""
        assert self._ready is not None
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready
        except TimeoutError:
            raise UpstreamError(
                Reason.CONNECT_TIMEOUT, f"{self.key.endpoint}: no HTTP/2 SETTINGS within {timeout_s:g} s"
            ) from None

    def check(self, now: float) -> None:
        """Called about twice a second."""
        mesh, engine = self._shared.services.tables.mesh, self.engine
        if self._closed:
            return
        if self._closing_at:
            if now - self._closing_at >= mesh.idle_timeout_s:
                self.stream.abort()
        elif not engine.settings_acked and now - self._started_at >= mesh.handshake_timeout_s:
            self._give_up(Reason.UPSTREAM_PROTOCOL, "SETTINGS were not acknowledged in time")
        elif self._partial_since and now - self._partial_since >= self._patience_s():
            self._give_up(Reason.UPSTREAM_PROTOCOL, "a frame or head was not complete in time")
        elif self._ping_at:
            if now - self._ping_at >= PING_TIMEOUT_S:
                self._give_up(Reason.UPSTREAM_CLOSED, "a PING was not answered")
        elif self._requests and now - self._heard_at >= PING_AFTER_S:
            self._ask(now)
        if self._left:
            self._look_at_left(now)

    def _look_at_left(self, now: float) -> None:
        for stream_id, (queued, since) in list(self._left.items()):
            left = self.engine.queued(stream_id)
            if not left:
                del self._left[stream_id]
            elif left != queued:
                self._left[stream_id] = left, now
            elif now - since >= self._shared.services.tables.mesh.idle_timeout_s:
                del self._left[stream_id]
                self.engine.reset(stream_id, "the endpoint does not read the rest")
                self.changed()
        if not self._left and not self._requests:
            self.idle_since = now

    def _patience_s(self) -> float:
        """With how long a frame may take to come: one of a body as long as a body may stop."""
        mesh = self._shared.services.tables.mesh
        return max(mesh.header_timeout_s, mesh.idle_timeout_s) if self._requests else mesh.header_timeout_s

    def _ask(self, now: float) -> None:
        """A PING, if a request said something since the endpoint was heard; agents are asked in any case."""
        if self.key.tls or (self.was_told and now - self._pinged_at >= PING_AGAIN_S):
            with contextlib.suppress(LocalProtocolError):  # it answers none of them, but it is alive
                self.engine.ping(_PING)
                self._ping_at = self._pinged_at = now
                self.changed()

    def close(self) -> None:
        """Nothing is on it any more: say so and go. Requests that are, are told that it is over."""
        if not self._closing_at and not self._closed:
            self.engine.goaway()
            self._end(Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: the connection was closed")

    def abort(self) -> None:
        self.stream.abort()

    # -- the stream's events --------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._closing_at:
            return
        now = self._shared.services.now()
        self._heard_at = now
        self.was_told = False
        self._ping_at = 0.0  # whatever comes, it is alive
        self._receive(data, now)

    def eof_received(self) -> None:
        if not self._closing_at:
            self.peer_ended = True
            self._receive(b"", self._shared.services.now())

    def writable(self, ok: bool) -> None:
        self.is_writable = ok
        for request in list(self._requests.values()):
            request.transport_writable(ok)

    def closed(self, exc: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._end(
            Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: {exc or 'closed before the answer was complete'}", exc=exc
        )
        self._shared.closed(self)

    def _receive(self, data: bytes, now: float) -> None:
        engine = self.engine
        before = engine.held()
        try:
            events = engine.receive(data, now)
        except RemoteProtocolError as exc:
            self._end(Reason.UPSTREAM_PROTOCOL, f"{self.key.endpoint}: {exc.detail}")
            return
        left = engine.held()
        if not left:
            self._partial_since = 0.0
        elif not self._partial_since or left < before + len(data):
            self._partial_since = now
        self._in_turn = True
        try:
            for event in events:
                self._event(event)
        finally:
            self._in_turn = False
            self._flush()

    def _event(self, event: Event) -> None:
        if type(event) is ResponseHead:
            self._answered = True
            self._tell(event.stream_id, event)
        elif type(event) is Data or type(event) is End:
            self._tell(event.stream_id, event)
        elif type(event) is GoAway:
            self._shared.drained(self)
        elif type(event) is PeerSettings:
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
            self._freed = True
        elif type(event) is ConnectionClosed:
            self._end(Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: closed without an answer")
        elif type(event) is not PingAck:
            self._tell(event.stream_id, event)  # type: ignore[union-attr]

    def _tell(self, stream_id: int, event: Event) -> None:
        request = self._requests.get(stream_id)
        if request is not None:
            request.event(event)

    # -- for its requests -----------------------------------------------------------------------------

    def begin(self, request: Http2Request, head: RequestHead) -> int:
        """The number of its stream. Raises LocalProtocolError."""
        engine = self.engine
        stream_id = engine.next_stream_id
        engine.send(stream_id, head)
        self._requests[stream_id] = request
        self.idle_since = 0.0
        self.was_told = True
        self.changed()
        return stream_id

    def over(self, stream_id: int) -> None:
        """Nobody asks for this stream any more."""
        if stream_id in self._requests:  # at the end of the connection they all are out already
            del self._requests[stream_id]
        queued = self.engine.queued(stream_id)
        if queued:
            self._left[stream_id] = queued, self._shared.services.now()
        if not self._requests and not self._left:
            self.idle_since = self._shared.services.now()
        self._freed = True
        self.changed()

    def reset(self, stream_id: int) -> None:
        """The same, before it came to its end."""
        self.engine.reset(stream_id, "given up")
        self._resets += 1
        if self._resets == MAX_RESETS:
            self.engine.goaway()
            self._shared.drained(self)
        self.over(stream_id)

    def changed(self) -> None:
        """There is something to write, or a stream is free: at the end of this turn of the loop."""
        if not self._in_turn and not self._scheduled and not self._closed:
            self._scheduled = True
            self._shared.services.loop.call_soon(self._later)

    def _later(self) -> None:
        self._scheduled = False
        self._flush()

    def _flush(self) -> None:
        """All that was said goes out in one piece."""
        if self._closed or self._closing_at:
            return
        if self._freed:
            self._freed = False
            self._in_turn = True  # what begins now goes out with the rest
            try:
                self._shared.freed(self)
            finally:
                self._in_turn = False
        self._write()
        if not self._requests and self.engine.is_last():
            self._end(Reason.UPSTREAM_CLOSED, f"{self.key.endpoint}: the endpoint ended the connection")

    def _write(self) -> None:
        out = self.engine.take_output()
        if out and not self.stream.is_closing():
            self.stream.write(out[0] if len(out) == 1 else b"".join(out))

    # -- the end --------------------------------------------------------------------------------------

    def _give_up(self, reason: Reason, detail: str) -> None:
        """It does not answer, so what is queued for it would wait for ever."""
        self._end(reason, f"{self.key.endpoint}: {detail}")
        self.stream.abort()

    def _end(self, reason: Reason, detail: str, exc: Exception | None = None) -> None:
        """Tells all requests, once; what says why goes out, and the stream is closed."""
        if self._closing_at:
            return
        self._closing_at = self._shared.services.now() or 1.0
        self._write()
        self.stream.close()
        self._left.clear()
        if self._ready is not None and not self._ready.done():
            why = detail if exc is None else f"{self.key.endpoint}: {exc}"
            self._ready.set_exception(UpstreamError(reason, f"{why} (before its HTTP/2 SETTINGS)"))
            self._ready.exception()  # if nobody waits for it any more
        self._shared.drained(self)
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.gone(reason, detail)


class Http2Request(Upstream):
    """One request on a shared connection, from `begin` to its end: the `Upstream` of an exchange."""

    def __init__(self, connection: Http2Connection) -> None:
        Upstream.__init__(self, True)
        self._connection: Http2Connection | None = connection
        self._exchange: Requester | None = None
        self._stream_id = 0
        self._held = self._full = False
        self._owed = 0
        """Octets of content that wait with the exchange, not credited."""
        self._protocol = b""
        """What an Upgrade of HTTP/1.1 that became an extended CONNECT asks for."""
        self._sent: RequestHead | None = None
        self.reused = connection.answered

    def __repr__(self) -> str:
        return f"<Http2Request {self._stream_id} {self._connection or 'over'} full={self._full} owed={self._owed}>"

    # -- for the exchange -----------------------------------------------------------------------------

    @property
    def connect_protocol(self) -> bool:
        """Knows the endpoint extended CONNECT?"""
        return self._connection is not None and self._connection.connect_protocol

    def begin(self, exchange: Requester) -> None:
        self._exchange = exchange
        if self._connection is not None and not self._connection.is_writable:
            self._full = True
            exchange.upstream_writable(False)

    def send(self, event: Event) -> None:
        connection = self._connection
        if connection is None:
            return
        if type(event) is RequestHead:
            self._send_head(connection, event)
            return
        engine = connection.engine
        engine.send(self._stream_id, event)
        connection.was_told = True
        connection.changed()
        if not self._full and type(event) is Data and engine.is_blocked(self._stream_id):
            self._full = True
            if self._exchange is not None:
                self._exchange.upstream_writable(False)

    def _send_head(self, connection: Http2Connection, head: RequestHead) -> None:
        # What came in HTTP/2 asks by CONNECT.
        protocols = upgrade_protocols(head.headers) if not head.scheme else ()
        if protocols:
            self._protocol = protocols[0]
            self._sent = head
            head = h2.connect_from_websocket(head, self._protocol)
        try:
            self._stream_id = connection.begin(self, request_for_http2(head))
        except LocalProtocolError as exc:
            raise Refused(Reason.DOWNSTREAM_PROTOCOL, f"can't be said in HTTP/2: {exc}") from exc

    def hold(self, on: bool) -> None:
        self._held = on
        if not on and self._owed and self._connection is not None:
            owed, self._owed = self._owed, 0
            self._connection.engine.credit(self._stream_id, owed)
            self._connection.changed()

    def begin_tunnel(self) -> None:
        """The engine knows."""

    def end_sending(self) -> None:
        self.send(End(1))

    def tunnel_done(self) -> None:
        self._finish()

    def idle(self, now: float) -> None:
        connection = self._connection
        if connection is not None and self._stream_id and connection.engine.queued(self._stream_id):
            # Answered without reading all of it: nobody wants the rest.
            self.abort()
        else:
            self._finish()

    def abort(self) -> None:
        connection, self._connection = self._connection, None
        self._exchange = None
        if connection is not None and self._stream_id:
            connection.reset(self._stream_id)

    def _finish(self) -> None:
        connection, self._connection = self._connection, None
        self._exchange = None
        if connection is not None and self._stream_id:
            if self._owed:
                connection.engine.credit(self._stream_id, self._owed)
            connection.over(self._stream_id)

    # -- for the connection ---------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        exchange, connection = self._exchange, self._connection
        if exchange is None or connection is None:
            return
        if type(event) is End:
            exchange.response_begins()
            exchange.response(event)
        elif type(event) is Data:
            exchange.response_begins()
            exchange.response(event)
            # The exchange may have ended by it, then nothing is owed.
            if self._held:
                self._owed += len(event.data)
            elif self._connection is not None:
                connection.engine.credit(self._stream_id, len(event.data))
        elif type(event) is Writable:
            self._writable_again(connection, exchange)
        elif type(event) is Reset:
            self._was_reset(connection, event)
        elif type(event) is ResponseHead and self._protocol:
            exchange.response_begins()
            exchange.response(self._switched(event))
        elif type(event) in (ResponseHead, Informational, Trailers):
            exchange.response_begins()
            exchange.response(event)

    def _switched(self, head: ResponseHead) -> ResponseHead:
        if not 200 <= head.status < 300:
            return head
        assert self._sent is not None
        return h2.websocket_answer_from_connect(head, self._sent, self._protocol)

    def _was_reset(self, connection: Http2Connection, event: Reset) -> None:
        connection.over(self._stream_id)
        reason = Reason.UPSTREAM_PROTOCOL if event.ours else Reason.UPSTREAM_CLOSED
        code = -1 if event.ours or connection.peer_ended else event.code
        self.gone(reason, f"{connection.key.endpoint}: {event.detail}", untouched=event.untouched, code=code)

    def transport_writable(self, ok: bool) -> None:
        connection, exchange = self._connection, self._exchange
        if connection is None or exchange is None:
            return
        if ok:
            self._writable_again(connection, exchange)
        elif not self._full:
            self._full = True
            exchange.upstream_writable(False)

    def _writable_again(self, connection: Http2Connection, exchange: Requester) -> None:
        if self._full and connection.is_writable and not connection.engine.is_blocked(self._stream_id):
            self._full = False
            exchange.upstream_writable(True)

    def gone(self, reason: Reason, detail: str, *, untouched: bool = False, code: int = -1) -> None:
        exchange, self._exchange, self._connection = self._exchange, None, None
        if exchange is not None:
            exchange.upstream_gone(reason, detail, untouched=untouched, code=code)
