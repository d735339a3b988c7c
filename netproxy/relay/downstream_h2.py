# cython: annotation_typing=False
"""One HTTP/2 connection of a client: requests side by side, each on an `Http2Stream` with an exchange of its own.

Octets go out at most once per turn (what came from the client and all that it led to, or what was said since the loop
waited last), or when `bufferBytes` of content have been said in one. Nothing here calls itself: what may go on, goes on
in the next turn.

Backpressure: a stream's window is opened when its exchange has taken the content, and while the transport is full none
is. An upstream is not read while its stream's window is shut or the transport full. The client is always read, since it
may be waiting for us to read before it reads; what that can make us hold is bounded: by the windows, by the number of
streams (no request is begun while the client does not read) and by the engine's budgets.

Its ends::

    a broken rule, a flood                            GOAWAY says which, all requests are over; counted by kind as
                                                      ``http2_connection_errors``
    SETTINGS are not acknowledged, or a frame or      the same (``settings_timeout``, ``head_timeout``)
    head is not complete, in `headerTimeout`
    a PING without answer in `http2KeepaliveTimeout`  aborted (``ping_timeout``)
    no request for `idleTimeout`, or the worker       GOAWAY in two steps, so that no request on its way is lost;
    drains                                            closed when the last one is over
    the client takes nothing for `idleTimeout`        aborted

What belongs to one request ends that one alone: a reset by the client cancels it upstream, a response that breaks off
is a RST_STREAM with INTERNAL_ERROR.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ..codec import h2
from ..codec.events import (
    ConnectionClosed,
    Data,
    End,
    Event,
    RequestHead,
    RequestRefused,
    Reset,
    Trailers,
    Writable,
)
from ..codec.h2_strict import MAX_WINDOW, Rule
from ..config.shard import MeshShard
from ..errors import LocalProtocolError, Reason, RemoteProtocolError
from ..stream import Stream
from .downstream_h2_stream import Http2Stream, StreamOwner, stream_of, unread
from .services import Facts, Services
from .upstream_h2 import PSEUDO_FIELDS, list_bytes

_LINGER_S = 2.0
_LINGER_BYTES = 1024 * 1024
DRAIN_STEP_S = 1.0
"""So long a client may take to see that we go away; then its requests that are still on their way are not taken."""
_PING = b"netproxy"
_KINDS = {rule.detail: rule.name.lower() for rule in Rule}
_OF_THEIRS = {Rule.TOO_MANY.detail: Reason.OVERLOADED}


def server_limits(mesh: MeshShard, *, shared: bool) -> h2.H2Limits:
    """`shared`: another agent's, with the requests of many clients, of which none may hold up the others."""
    streams, stream_window = mesh.http2_max_streams, 65535
    return h2.H2Limits(
        max_header_list_bytes=list_bytes(mesh) if shared else mesh.max_head_bytes,
        max_headers=max(8, mesh.max_headers + PSEUDO_FIELDS),
        max_streams=streams,
        stream_window=stream_window,
        connection_window=min(MAX_WINDOW, stream_window * streams) if shared else max(stream_window, 1024 * 1024),
        # One read of an upstream that was not told to stop in time, whatever it is.
        max_queued_bytes=mesh.buffer_bytes + 1024 * 1024,
    )


class Http2Downstream(StreamOwner):
    """The sink of its stream."""

    def __init__(self, stream: Stream, facts: Facts, services: Services) -> None:
        engine = h2.server_engine(server_limits(services.tables.mesh, shared=bool(facts.peer)))
        StreamOwner.__init__(self, engine, facts, services)
        self.stream = stream
        self.workload = facts.workload
        self.requests = 0
        """That were begun."""
        self._streams: dict[int, Http2Stream] = {}
        self._ready: list[Http2Stream] = []
        """Those that may go on."""
        self._more: list[Event] = []
        """What came for tunnels before they were granted."""
        self._seen = 0
        """The highest number of a stream of which something was told."""
        self._in_turn = self._scheduled = False
        self._closed = False
        self._said = 0
        """Octets of content since the last write."""
        self._started_at = self._activity = self._taken_at = self.heard_at
        self._written = 0
        self._taken = 0
        """Octets that left us, the most that `check` saw."""
        self._partial_since = 0.0
        """Since when a frame or head is not complete; 0.0: none is begun."""
        self._ping_at = 0.0
        """When the PING that waits for its answer was sent; 0.0: none does."""
        self._drained_at = 0.0
        self._linger_until = 0.0
        self._linger_left = 0
        services.live.add(self)
        services.recorder.opened()
        stream.sink = self
        stream.resume_reading()
        self._wake()

    def __repr__(self) -> str:
        way = "inbound" if self.facts.inbound else "outbound"
        state = "closing" if self._linger_until else "draining" if self._drained_at else "open"
        return (
            f"<Http2Downstream {way} {self.facts.client} -> {self.facts.dst} {state} "
            f"streams={len(self._streams)} requests={self.requests}>"
        )

    # -- the stream's events ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._linger_until:
            self._linger_left -= len(data)
            if self._linger_left < 0:
                # What it still sends waits in the kernel until `_linger_until`: a reset would overtake our GOAWAY.
                self.stream.pause_reading()
            return
        self._receive(data)

    def eof_received(self) -> None:
        if self._linger_until:
            self.stream.close()
        else:
            self._receive(b"")

    def writable(self, ok: bool) -> None:
        self.is_writable = ok
        self._taken_at = self.services.now()
        for stream in list(self._streams.values()):
            stream.transport_writable(ok)

    def closed(self, exc: Exception | None) -> None:
        self._closed = True
        self.services.live.discard(self)
        self.services.recorder.gone()
        self._end_all(Reason.DOWNSTREAM_CLOSED, "")

    def _receive(self, data: bytes) -> None:
        engine, now = self.engine, self.services.now()
        before = engine.held()
        try:
            events = engine.receive(data, now)
        except RemoteProtocolError as exc:
            self._give_up(_KINDS.get(exc.detail, "other"), Reason.DOWNSTREAM_PROTOCOL, exc.detail)
            return
        left = engine.held()
        if not left:
            self._partial_since = 0.0
        elif not self._partial_since or left < before + len(data):
            self._partial_since = now
        self._ping_at = 0.0  # whatever comes, it is alive
        self.heard_at = now
        self._turn(events)

    # -- turns --------------------------------------------------------------------------------------

    def _turn(self, events: Sequence[Event] = ()) -> None:
        self._in_turn = True
        try:
            if self._more:
                more, self._more = self._more, []
                self._handle(more)
            self._handle(events)
            ready, self._ready = self._ready, []
            for stream in ready:
                stream.proceed()
        except BaseException:
            # Our bug, for the loop to report. Those who were to go on behind it would wait for ever.
            self.stream.abort()
            raise
        finally:
            self._in_turn = False
        self._write()
        if self._ready or self._more:
            self._wake()
        elif self.engine.is_last() and not self._linger_until:
            self._end_all(Reason.DOWNSTREAM_CLOSED, "")
            self._linger()

    def _wake(self) -> None:
        """There is something to do, or to write: before the loop waits for more."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self.services.loop.call_soon(self._later)

    def _later(self) -> None:
        self._scheduled = False
        if not self._closed and not self._linger_until:
            self._turn()

    def _write(self) -> None:
        self._said = 0
        out = self.engine.take_output()
        if out and not self.stream.is_closing():
            data = out[0] if len(out) == 1 else b"".join(out)
            self._written += len(data)
            self.stream.write(data)

    def _handle(self, events: Sequence[Event]) -> None:
        for event in events:
            if type(event) is RequestHead:
                self._begin(event, event.stream_id)
            elif type(event) is End:
                self._ends(event.stream_id)
            elif type(event) is RequestRefused:
                self._begin(event, event.stream_id)
            elif type(event) is ConnectionClosed:
                self.stream.close()
            elif type(event) is Data:
                self._brings(event, event.stream_id)
            elif type(event) in (Trailers, Writable, Reset):
                self._of_stream(event)

    def _begin(self, event: RequestHead | RequestRefused, stream_id: int) -> None:
        self._seen = max(self._seen, stream_id)
        self._activity = self.heard_at
        stream = self._streams[stream_id] = stream_of(self, stream_id, event)
        stream.proceed()

    def _ends(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.end()

    def _brings(self, event: Data, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.data(event)
        else:
            # Of a request that was answered without it.
            self.engine.credit(stream_id, len(event.data))

    def _of_stream(self, event: Event) -> None:
        stream_id: int = event.stream_id  # type: ignore[union-attr]
        stream = self._streams.get(stream_id)
        if isinstance(event, Reset):
            self._was_reset(event, stream)
        elif stream is not None:
            if isinstance(event, Trailers):
                stream.trailers(event)
            else:
                stream.writable()

    def _was_reset(self, event: Reset, stream: Http2Stream | None) -> None:
        reason, detail = Reason.DOWNSTREAM_CLOSED, event.detail
        if event.ours:
            reason = _OF_THEIRS.get(detail, Reason.DOWNSTREAM_PROTOCOL)
            self.services.recorder.arena.count("http2_stream_errors", detail=_KINDS.get(detail, "other"))
        if stream is not None:
            self.forget(event.stream_id)
            stream.gone(reason, detail)
        elif event.ours and event.stream_id > self._seen:
            # A head that can't be read, so that no stream began with it.
            unread(self.facts, self.services, reason, detail)
            self.unread()
        self._seen = max(self._seen, event.stream_id)

    # -- for the streams ----------------------------------------------------------------------------

    def began(self, stream: Http2Stream) -> None:
        self.requests += 1

    def unread(self) -> None:
        """A request was told of that never had a stream."""
        self.requests += 1

    def ready(self, stream: Http2Stream) -> None:
        self._ready.append(stream)
        if not self._in_turn:
            self._wake()

    def sent(self, content: int) -> None:
        self._said += content
        if self._said >= self.services.tables.buffer_bytes:
            # Not more in memory than if each was written by itself.
            self._write()
        if not self._in_turn:
            self._wake()

    def resume(self) -> None:
        self._more += self.engine.resume()
        if self._more and not self._in_turn:
            self._wake()

    def forget(self, stream_id: int) -> None:
        if stream_id in self._streams:
            del self._streams[stream_id]
        if not self._streams:
            self._activity = self.services.now()
        if not self._in_turn:
            self._wake()

    # -- the worker's door --------------------------------------------------------------------------

    def check(self, now: float) -> None:
        mesh = self.services.tables.mesh
        if self._linger_until:
            if now - self._activity >= mesh.idle_timeout_s:
                self.stream.abort()
            elif now >= self._linger_until:
                # No reset: it would take back what a slow client has not read yet.
                self.stream.close()
        elif self._is_stuck(now):
            self.stream.abort()
        elif not self.engine.settings_acked and now - self._started_at >= mesh.header_timeout_s:
            self._give_up("settings_timeout", Reason.HEAD_TIMEOUT, "SETTINGS were not acknowledged in time")
        elif self._partial_since and now - self._partial_since >= self._patience_s():
            self._give_up("head_timeout", Reason.HEAD_TIMEOUT, "a frame or head was not complete in time")
        elif self._ping_at and now - self._ping_at >= mesh.http2_keepalive_timeout_s:
            self._give_up("ping_timeout", Reason.DOWNSTREAM_CLOSED, "a PING was not answered")
            self.stream.abort()
        else:
            for stream in list(self._streams.values()):
                stream.check(now)
            self._keep(now)

    def _patience_s(self) -> float:
        """With how long a frame may take to come: one of a body as long as a body may stop."""
        mesh = self.services.tables.mesh
        return max(mesh.header_timeout_s, mesh.idle_timeout_s) if self._streams else mesh.header_timeout_s

    def _is_stuck(self, now: float) -> bool:
        """Has the client taken nothing for `idleTimeout` of what waits for it?"""
        if self.is_writable:
            return False
        taken = self._written - self.stream.buffered()
        if taken > self._taken:
            self._taken = taken
            self._taken_at = now
        return now - self._taken_at >= self.services.tables.mesh.idle_timeout_s

    def _keep(self, now: float) -> None:
        """What a connection needs besides its requests."""
        mesh = self.services.tables.mesh
        if self._drained_at:
            if now - self._drained_at >= DRAIN_STEP_S:
                self.engine.goaway()
                self._wake()
        elif not self._streams and now - self._activity >= mesh.idle_timeout_s:
            self.drain()
        elif mesh.http2_keepalive_s and not self._ping_at and now - self.heard_at >= mesh.http2_keepalive_s:
            with contextlib.suppress(LocalProtocolError):  # it waits for too many answers already
                self.engine.ping(_PING)
                self._ping_at = now
                self._wake()

    def drain(self) -> None:
        if not self._drained_at and not self._linger_until:
            self._drained_at = self.services.now() or 1.0
            self.engine.goaway()
            self._wake()

    def abort(self) -> None:
        for stream in list(self._streams.values()):
            stream.abort()
        self.stream.abort()

    # -- ends ---------------------------------------------------------------------------------------

    def _give_up(self, kind: str, reason: Reason, detail: str) -> None:
        """Whatever is under way on it ends."""
        self.services.recorder.arena.count("http2_connection_errors", detail=kind)
        self.engine.goaway()
        self.engine.goaway()  # with the number of the last stream; nothing, where the engine has said it
        self._write()
        self._end_all(reason, detail)
        self._linger()

    def _end_all(self, reason: Reason, detail: str) -> None:
        streams, self._streams = self._streams, {}
        self._ready.clear()
        self._more.clear()
        for stream in streams.values():
            stream.gone(reason, detail)

    def _linger(self) -> None:
        """Close so that the client can read what we said even while it is still sending."""
        if self.stream.closing or self._linger_until:
            return
        self._activity = self.services.now()
        self._linger_until = self._activity + _LINGER_S
        self._linger_left = _LINGER_BYTES
        self.stream.write_eof()
        self.stream.resume_reading()
