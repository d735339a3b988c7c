# cython: annotation_typing=False
"""One request on a client's HTTP/2 connection: the `Downstream` of its exchange.

Content that comes while the exchange holds waits here, in one piece, and is credited when the exchange has taken it:
so the window of the stream is what may be held for it. An end behind content waits with it; one alone does not.

A request that arrives while the client does not read what it was told before is not begun (`_UNREAD`): its answer
would be one more that waits. The engine counts it as open, so there are never more than it allows.

When the response has been said, what the client's windows don't allow yet is still to be sent: the stream stays,
without an exchange, until that is out or nothing of it has moved for `idleTimeout`.
"""

from __future__ import annotations

from ..codec import h2
from ..codec.events import Data, End, Event, Informational, RequestHead, RequestRefused, ResponseHead, Trailers
from ..errors import Reason
from ..observe.access import Outcome
from .downstream import Downstream, answer
from .exchange import fields_for_http2, response_for_http2
from .facts import parties, security
from .logged import Ended, log_request
from .request import Exchange, begin_exchange
from .services import Facts, Services

_END = End(1)
_UNREAD = 8
"""Why an exchange is not begun, beside what `request` has."""


class StreamOwner:
    """What a stream knows of its connection, which is `downstream_h2.Http2Downstream`."""

    def __init__(self, engine: h2.H2Server, facts: Facts, services: Services) -> None:
        self.engine = engine
        self.facts = facts
        self.services = services
        self.heard_at = services.now()
        """When something came."""
        self.is_writable = True

    def began(self, stream: Http2Stream) -> None:
        """It will be told of, exactly once."""
        raise NotImplementedError

    def ready(self, stream: Http2Stream) -> None:
        """It has something to do in the next turn."""
        raise NotImplementedError

    def sent(self, content: int) -> None:
        """Something was said, with so many octets of content."""
        raise NotImplementedError

    def resume(self) -> None:
        """A tunnel was granted."""
        raise NotImplementedError

    def forget(self, stream_id: int) -> None:
        """It is over."""
        raise NotImplementedError


def stream_of(connection: StreamOwner, stream_id: int, first: RequestHead | RequestRefused) -> Http2Stream:
    stream = Http2Stream.__new__(Http2Stream)  # a constructor with arguments costs three times as much
    stream._open(connection, stream_id, first)
    return stream


class Http2Stream(Downstream):
    def _open(self, connection: StreamOwner, stream_id: int, first: RequestHead | RequestRefused) -> None:
        self.begin(connection.facts, connection.services, "http/2", connection.heard_at)
        self._connection = connection
        self._engine = connection.engine
        self._id = stream_id
        self._first: RequestHead | RequestRefused | None = first
        """What it begins with, until it has."""
        self._exchange: Exchange | None = None
        self._holds = _UNREAD
        self._input: bytearray | None = None
        self._trailers: Trailers | None = None
        self._ended = False
        """The end of the request waits behind `_input`, or for the beginning."""
        self._owed = 0
        """Octets of content that are not credited yet, those of `_input` among them."""
        self._blocked = False
        """The client's windows are shut, with octets behind them."""
        self._queued = 0
        """How many there were when `check` looked."""
        self._over = False
        """There is no exchange any more."""
        self._is_ready = False

    def __repr__(self) -> str:
        state = "over" if self._over else "waits" if self._first is not None else repr(self._exchange)
        return f"<Http2Stream {self._id} {state} holds={self._holds} owed={self._owed} blocked={self._blocked}>"

    @property
    def held(self) -> int:
        """Octets of content that wait for the exchange."""
        return len(self._input) if self._input else 0

    # -- what the client says -----------------------------------------------------------------------

    def proceed(self) -> None:
        """In a turn of the connection: begin, and go on with what waited."""
        self._is_ready = False
        if self._first is not None:
            if not self._connection.is_writable:
                return
            first, self._first = self._first, None
            self._holds &= ~_UNREAD
            self._connection.began(self)
            if isinstance(first, RequestRefused):
                self._refuse(first)
            else:
                begin_exchange(self, first)
        if self._input and not self._holds and self._exchange is not None:
            content = Data(1, bytes(self._input))
            self._input = None
            self._exchange.request_data(content)
        if not self._input:
            self._finish_request()
            self._settle()

    def data(self, event: Data) -> None:
        self.activity = self._connection.heard_at
        if self._over:
            # The rest of a request that was answered without it.
            self._engine.credit(self._id, len(event.data))
            return
        self._owed += len(event.data)
        if self._holds or self._input or self._exchange is None:
            if self._input is None:
                self._input = bytearray()
            self._input += event.data
        else:
            self._exchange.request_data(event)
            self._settle()

    def trailers(self, event: Trailers) -> None:
        if not self._over:
            self._trailers = event
            if not self._input and self._exchange is not None:
                self._finish_request()

    def end(self) -> None:
        self.activity = self._connection.heard_at
        if not self._over:
            self._ended = True
            if not self._input and self._exchange is not None:
                self._finish_request()

    def _finish_request(self) -> None:
        """It brings no content, so nobody has to wait with it."""
        trailers, self._trailers = self._trailers, None
        if trailers is not None and self._exchange is not None:
            self._exchange.request_trailers(trailers)
        ended, self._ended = self._ended, False
        if ended and self._exchange is not None:
            self._exchange.request_end(_END)

    def _settle(self) -> None:
        """Credit what the exchange has taken."""
        if self._owed and not self._holds and not self._input and self._connection.is_writable:
            owed, self._owed = self._owed, 0
            self._engine.credit(self._id, owed)

    def writable(self) -> None:
        """What was queued has gone out."""
        self._blocked = False
        self.activity = self.services.now()
        if self._over:
            self._connection.forget(self._id)
        elif self._exchange is not None and self._connection.is_writable:
            self._exchange.downstream_writable(True)

    def transport_writable(self, ok: bool) -> None:
        if self._over:
            return
        if self._exchange is not None and not self._blocked:
            self._exchange.downstream_writable(ok)
        if ok and self._first is not None:
            self.touch()  # its time begins
            self._wake()
        elif ok and self._owed and not self._holds:
            self._wake()

    def gone(self, reason: Reason, detail: str) -> None:
        """The engine knows it no more."""
        exchange = self._leave()
        if exchange is not None:
            exchange.downstream_gone(reason, detail)

    # -- the connection's sweep -----------------------------------------------------------------------

    def check(self, now: float) -> None:
        if self._blocked:
            queued = self._engine.queued(self._id)
            if queued != self._queued:
                # A slow reader, but one that reads.
                self._queued = queued
                self.activity = now
        if self._exchange is not None:
            self._exchange.check(now - self.activity)
        elif self._over and now - self.activity >= self.services.tables.mesh.idle_timeout_s:
            self._engine.reset(self._id, "the client does not read the rest", h2.Code.CANCEL)
            self._connection.forget(self._id)

    def abort(self) -> None:
        if self._exchange is not None:
            self._exchange.abort()

    # -- for the exchange: `downstream.Downstream` ------------------------------------------------------

    def takes_more(self) -> bool:
        return not self._blocked and self._connection.is_writable

    def attach(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def hold(self, why: int, on: bool) -> None:
        self._holds = self._holds | why if on else self._holds & ~why
        if not self._holds and (self._input or self._owed):
            # Not now: the exchange is in the middle of something.
            self._wake()

    def touch(self) -> None:
        self.activity = self.services.now()

    def send(self, event: Event) -> None:
        if type(event) is Data:
            self._engine.send(self._id, event)
            self._connection.sent(len(event.data))
            if not self._blocked and self._engine.is_blocked(self._id):
                self._blocked = True
                self._queued = self._engine.queued(self._id)
                if self._exchange is not None:
                    self._exchange.downstream_writable(False)
            return
        if type(event) is ResponseHead:
            event = response_for_http2(event)
        elif type(event) is Informational or type(event) is Trailers:
            event = event.replace(headers=fields_for_http2(event.headers))
        self._engine.send(self._id, event)
        self._connection.sent(0)

    def announce_close(self) -> None:
        """Behind its response the engine resets a stream whose request is not over (RFC 9113 section 8.1)."""

    def begin_tunnel(self) -> None:
        self._connection.resume()

    def end_sending(self) -> None:
        self._engine.send(self._id, End(1))
        self._connection.sent(0)

    def tunnel_done(self) -> None:
        self.exchange_done(must_close=False)

    def exchange_done(self, must_close: bool) -> None:
        if self._over:
            return
        self._leave()
        if not self._blocked:
            self._connection.forget(self._id)

    def reset(self) -> None:
        if self._over:
            return
        self._leave()
        self._engine.reset(self._id, "the response can't be completed", h2.Code.INTERNAL_ERROR)
        self._connection.forget(self._id)
        self._connection.sent(0)

    # -- ends -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._is_ready:
            self._is_ready = True
            self._connection.ready(self)

    def _leave(self) -> Exchange | None:
        """The exchange, which is told nothing more."""
        exchange, self._exchange = self._exchange, None
        self._over = True
        self._first = None
        self._input = None
        self._trailers = None
        self._ended = False
        owed, self._owed = self._owed, 0
        if owed:
            self._engine.credit(self._id, owed)
        return exchange

    def _refuse(self, refused: RequestRefused) -> None:
        """A request that never became an exchange."""
        reason = Reason.HEAD_TOO_LARGE if refused.status == 431 else Reason.DOWNSTREAM_PROTOCOL
        status = answer(self, reason, refused.detail, "", (), refused.status)
        unread(self.facts, self.services, reason, refused.detail, status)
        self.exchange_done(must_close=False)


def unread(facts: Facts, services: Services, reason: Reason, detail: str, status: int = 0) -> None:
    """A request of which nothing is known is over."""
    who = (parties(facts, services, None), security(facts, None))
    services.recorder.request(*who, status, reason, (0.0, 0, 0), protocol="http/2")
    if services.access.on:
        ended = Ended(reason, detail, 0.0, (0, 0), Outcome(status))
        log_request(services, facts, None, who=who, head=None, request_id=b"", ended=ended, version=b"2")
