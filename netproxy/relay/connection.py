# cython: annotation_typing=False
"""HTTP connections of clients: requests one after the other, each of them an `Exchange`.

Backpressure: a client is not read while the upstream of its request is not connected or not writable, that upstream is
not read while the client is not writable, and no request is begun while the answers before it wait to be read. So at
most one received chunk and the write buffers are held.

A head has `header_timeout_s` from its first octet to its last, however slowly they come.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..codec.events import ConnectionClosed, Data, End, Event, RequestHead, Reset, Trailers
from ..codec.h1 import H1Limits, H1Server, server_engine
from ..errors import Reason, RemoteProtocolError
from ..observe.access import Outcome
from ..stream import Stream
from .downstream import Downstream, answer
from .facts import parties, security
from .logged import Ended, log_request
from .request import Exchange, begin_exchange
from .services import Facts, Services

_LINGER_S = 2.0
_LINGER_BYTES = 1024 * 1024

# Why the client is not read, besides what `Exchange` says.
_PIPELINED, _UNREAD = 4, 8


class HttpConnection(Downstream):
    """One connection of a client; the sink of its stream."""

    def __init__(self, stream: Stream, facts: Facts, services: Services) -> None:
        self.begin(facts, services, "http/1.1", services.now())
        mesh = services.tables.mesh
        self.stream = stream
        self.workload = facts.workload
        self._engine: H1Server = server_engine(H1Limits(mesh.max_head_bytes, mesh.max_headers))
        self._exchange: Exchange | None = None
        self._holds = 0
        self._writable = True
        self._close_after = self._peer_ended = False
        self._want_resume = self._pumping = False
        self._head_since = 0.0
        """When the first octet of an incomplete head arrived; 0.0 while there is none."""
        self._linger_until = 0.0
        self._linger_left = 0
        self._is_fresh = True
        """Until the first octet, or until `drain` has seen it."""
        services.live.add(self)
        services.recorder.opened()
        stream.sink = self
        stream.resume_reading()

    def __repr__(self) -> str:
        way = "inbound" if self.facts.inbound else "outbound"
        return f"<HttpConnection {way} {self.facts.client} -> {self.facts.dst} {self._exchange or 'idle'}>"

    # -- the stream's events ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._linger_until:
            self._linger_left -= len(data)
            if self._linger_left < 0:
                # What it still sends waits in the kernel until `_linger_until`: a reset would overtake our answer.
                self.stream.pause_reading()
            return
        self.activity = self.services.now()
        self._is_fresh = False
        # Each time, since connections of the pool of another agent stay for long.
        self._engine.keep_spelling(self.services.tables.keeps_spelling)
        try:
            events = self._engine.receive(data)
        except RemoteProtocolError as exc:
            self._bad_request(exc)
            return
        self._pump(events)

    def eof_received(self) -> None:
        if self._linger_until:
            self.stream.close()
            return
        try:
            events = self._engine.receive(b"")
        except RemoteProtocolError:
            # Mid-message: the client gave up.
            self.stream.abort()
            return
        self._pump(events)

    def writable(self, ok: bool) -> None:
        self._writable = ok
        if self._exchange is not None:
            self._exchange.downstream_writable(ok)
        elif ok:
            self.touch()  # the time of a request that waited for this begins
            self.hold(_UNREAD, False)
            if not self._pumping:
                self._pump(())

    def closed(self, exc: Exception | None) -> None:
        self.services.live.discard(self)
        self.services.recorder.gone()
        exchange, self._exchange = self._exchange, None  # else the two hold each other
        if exchange is not None:
            exchange.downstream_gone()

    # -- the worker's door --------------------------------------------------------------------------

    def check(self, now: float) -> None:
        mesh = self.services.tables.mesh
        if self._linger_until:
            if now - self.activity >= mesh.idle_timeout_s:
                self.stream.abort()
            elif now >= self._linger_until:
                # No reset: it would take back what a slow client has not read yet.
                self.stream.close()
        elif self._exchange is not None:
            self._exchange.check(now - self.activity)
        elif self._head_since:
            if now - self._head_since >= mesh.header_timeout_s:
                self.refuse(Reason.HEAD_TIMEOUT, "the request head is not complete")
        elif now - self.activity >= mesh.idle_timeout_s:
            if self.stream.buffered():
                # It does not read either, so a close would wait for ever.
                self.stream.abort()
            else:
                self.stream.close()

    def drain(self) -> None:
        self._engine.goaway()
        self._close_after = True
        if self._exchange is None and not self._engine.buffered:
            if self._is_fresh:
                # Its first request may be there, not read yet: to close now would reset it. We are called again.
                self._is_fresh = False
            else:
                self._close()

    def abort(self) -> None:
        if self._exchange is not None:
            self._exchange.abort()
        self.stream.abort()

    # -- requests -----------------------------------------------------------------------------------

    def _pump(self, events: Sequence[Event]) -> None:
        """Handle events, and those of pipelined requests as far as they can begin. Never recursive."""
        self._pumping = True  # also for what ends within the first events: those behind it are of the same request
        try:
            self._dispatch(events)
            while self._want_resume and self._writable and not self.stream.is_closing() and not self._linger_until:
                self._want_resume = False
                try:
                    more = self._engine.resume()
                except RemoteProtocolError as exc:
                    self._bad_request(exc)
                    return
                self._dispatch(more)
        finally:
            self._pumping = False
        self.hold(_PIPELINED, self._engine.is_stuffed() and not self._linger_until)

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            exchange = self._exchange
            if type(event) is RequestHead:
                self._head_since = 0.0
                begin_exchange(self, event)
            elif type(event) is End:
                if exchange is not None:
                    exchange.request_end(event)
            elif type(event) is Data:
                if exchange is not None:
                    exchange.request_data(event)
            elif type(event) is Trailers:
                if exchange is not None:
                    exchange.request_trailers(event)
            elif type(event) is ConnectionClosed:
                self._close_after = self._peer_ended = True
                if exchange is None:
                    self.stream.close()
            else:
                assert type(event) is Reset, event
                self.stream.abort()
        if self._exchange is None and not self._head_since and self._writable and self._engine.held():
            self._head_since = self.services.now()

    def _bad_request(self, exc: RemoteProtocolError) -> None:
        reason = {431: Reason.HEAD_TOO_LARGE, 501: Reason.NOT_IMPLEMENTED}.get(exc.status, Reason.DOWNSTREAM_PROTOCOL)
        if self._exchange is not None:
            self._exchange.bad_request(reason, exc)
        else:
            self.refuse(reason, exc.detail, status=exc.status)

    def refuse(self, reason: Reason, detail: str, status: int = 0) -> None:
        """Answer a request that never became an exchange, and close."""
        started = self._head_since or self.services.now()
        status = status or reason.info.status
        answer(self, reason, detail, "", (), status=status)
        numbers = (self.services.now() - started, 0, 0)
        who = (parties(self.facts, self.services, None), security(self.facts, None))
        self.services.recorder.request(*who, status, reason, numbers)
        if self.services.access.on:
            ended = Ended(reason, detail, numbers[0], (0, 0), Outcome(status))
            log_request(self.services, self.facts, None, who=who, head=None, request_id=b"", ended=ended)
        self.linger()

    # -- for the exchange: `downstream.Downstream` -----------------------------------------------

    def attach(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def exchange_done(self, must_close: bool) -> None:
        """The response is complete. What is left of the request, if anything, is read and dropped."""
        self._exchange = None
        self._holds = 0
        if must_close or self._close_after or self._engine.is_last():
            self.linger()
            return
        self._head_since = 0.0
        self.hold(_UNREAD, not self._writable)
        if not self._holds:
            self.stream.resume_reading()
        self._want_resume = True
        if not self._pumping:
            self._pump(())

    def touch(self) -> None:
        self.activity = self.services.now()

    def hold(self, why: int, on: bool) -> None:
        holds = self._holds | why if on else self._holds & ~why
        if holds != self._holds:
            if not holds:
                self.stream.resume_reading()
            elif not self._holds:
                self.stream.pause_reading()
            self._holds = holds

    def takes_more(self) -> bool:
        return self._writable

    def send(self, event: Event) -> None:
        octets = self._engine.encode(event)
        if octets:
            self.stream.write(octets)

    def begin_tunnel(self) -> None:
        """The head that grants it was sent. What the client has sent behind its request already is for the tunnel."""
        self._dispatch(self._engine.resume())
        self.hold(_PIPELINED, False)

    def end_sending(self) -> None:
        """The tunnel's way to the client is over."""
        self.send(End(1))
        self.stream.write_eof()

    def tunnel_done(self) -> None:
        """Both ways are over. What is still queued goes out first."""
        self._exchange = None
        self._holds = 0
        self.activity = self.services.now()
        self.stream.close()

    def announce_close(self) -> None:
        """The next response head says ``connection: close``."""
        self._engine.goaway()

    def reset(self) -> None:
        """A clean close could pass for a complete body."""
        self.stream.abort()

    def linger(self) -> None:
        """Close so that the client can read what we said even while it is still sending (RFC 9112 section 9.6)."""
        if self.stream.closing or self._linger_until:
            return
        if self._peer_ended:
            self.stream.close()
            return
        self._linger_until = self.services.now() + _LINGER_S
        self._linger_left = _LINGER_BYTES
        self._holds = 0
        self.stream.write_eof()
        self.stream.resume_reading()

    def _close(self) -> None:
        self.stream.close()
