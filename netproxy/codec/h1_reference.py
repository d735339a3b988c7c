"""The HTTP/1 engines that others are measured against: h11 behind `strict`. Slow, and right.

`strict` says what may be read and where messages end, h11 reads it again by itself; both must agree on every head and
on every end of message, or it is an AssertionError (our bug; the connection fails closed).

Rules of both engines:

- One exchange at a time, always stream 1. The next cycle starts by itself when both messages are over.
- Events of one `receive` call that raises are lost: the message is broken, whatever came before. What is pipelined
  behind a whole message is not read before that message is answered, so its errors do not reach back.
- Nothing is ever sent that was not asked for: no 100, no error page, no close.
- Heads are written anew, fields in order of `headers` except that h11 puts Host first.
- Never a tunnel: 101 and CONNECT are refused where they would start one.
- `must_close`: close the connection when the present exchange is over. It never goes back to False.
"""

from __future__ import annotations

import http
from typing import NoReturn

import h11

from netproxy.codec.events import (
    ConnectionClosed,
    Data,
    End,
    Event,
    Headers,
    Informational,
    RequestHead,
    ResponseHead,
    Trailers,
)
from netproxy.codec.strict import (
    FORBIDDEN_TRAILERS,
    KIB,
    H1Limits,
    Head,
    Piece,
    Rule,
    State,
    Strict,
    check_authority,
    check_content_length,
    check_field,
    check_target,
    connection_options,
)
from netproxy.errors import LocalProtocolError, RemoteProtocolError

REASON_PHRASES = {int(status): status.phrase.encode("ascii") for status in http.HTTPStatus}


class H1ReferenceServer:
    """Our side of a downstream connection: requests in, responses out."""

    def __init__(self, limits: H1Limits | None = None) -> None:
        self._limits = limits or H1Limits()
        self._wire = _Wire(h11.SERVER, self._limits)
        self._draining = False
        self._body = _Outgoing()

    def __repr__(self) -> str:
        return f"<H1ReferenceServer {self._wire!r} draining={self._draining}>"

    @property
    def buffered(self) -> int:
        """Octets held back: a partial head or line, or requests pipelined behind the present one."""
        return self._wire.strict.buffered

    @property
    def is_full(self) -> bool:
        """Pause reading: so much is pipelined that more is not wanted before `resume` (one read may overshoot)."""
        return self._wire.strict.state is State.WAIT and self.buffered >= self._limits.max_pipelined_bytes

    @property
    def must_close(self) -> bool:
        return self._wire.must_close

    @property
    def reusable(self) -> bool:
        return self._wire.is_idle and not self._draining and not self.buffered

    def receive(self, data: bytes) -> list[Event]:
        return self._wire.receive(data)

    def resume(self) -> list[Event]:
        """What was pipelined behind a request whose response is now finished; [] if there is nothing."""
        return self._wire.read()

    def send(self, stream_id: int, event: Event) -> list[bytes]:
        """Also after `receive` raised, so that the error can be answered as long as no response has begun.

        Data of a response without content (HEAD, 204, 304), an Informational to an HTTP/1.0 client and Trailers that
        have no chunked body to follow are dropped: the buffers are then empty.
        """
        self._wire.check_alive(stream_id)
        try:
            if isinstance(event, ResponseHead):
                return self._send_head(event)
            if isinstance(event, Informational):
                return self._send_informational(event)
            if isinstance(event, Data | Trailers | End):
                out = self._body.send(self._wire, event)
                if isinstance(event, End):
                    self._wire.next_cycle()
                return out
            raise LocalProtocolError(f"a server does not send {type(event).__name__}")
        except (LocalProtocolError, h11.LocalProtocolError) as exc:
            self._wire.die_of(exc)

    def _send_head(self, event: ResponseHead) -> list[bytes]:
        wire = self._wire
        status = event.status
        method = wire.request.method if wire.request else b""
        # Without a request it is a broken or late head that is answered: nobody knows what the client understands.
        not_1_1 = wire.request is None or wire.request.version == b"1.0"
        if method == b"CONNECT" and 200 <= status < 300:
            raise LocalProtocolError("2xx to CONNECT would start a tunnel")
        headers, framing = _checked(event.headers)
        if self._draining or wire.request is None:
            wire.must_close = True
        if wire.request is None:
            wire.strict.discard()
        if status == 204:
            # RFC 9110 8.6, RFC 9112 6.1: neither field in a 204.
            headers = _without(headers, b"content-length", b"transfer-encoding")
        elif not_1_1:
            headers = _without(headers, b"transfer-encoding")
            framing = b"" if framing == b"transfer-encoding" else framing
        elif not framing and status != 304:
            headers.append((b"transfer-encoding", b"chunked"))
            framing = b"transfer-encoding"
        headers = wire.settle_connection(headers)
        bodiless = method == b"HEAD" or status in (204, 304)
        chunked = framing == b"transfer-encoding" and not bodiless
        self._body = _Outgoing(bodiless=bodiless, chunked=chunked)
        response = h11.Response(status_code=status, headers=headers, reason=REASON_PHRASES.get(status, b""))
        return wire.write(response)

    def _send_informational(self, event: Informational) -> list[bytes]:
        if event.status == 101:
            raise LocalProtocolError("101 would switch protocols")
        headers, framing = _checked(event.headers)
        if framing:
            headers = _without(headers, b"content-length", b"transfer-encoding")
        message = h11.InformationalResponse(
            status_code=event.status, headers=headers, reason=REASON_PHRASES.get(event.status, b"")
        )
        if self._wire.request is not None and self._wire.request.version == b"1.0":
            return []  # RFC 9110 15.2: never to an HTTP/1.0 client
        return self._wire.write(message)

    def credit(self, stream_id: int, n: int) -> list[bytes]:
        return []

    def reset(self, stream_id: int, reason: str) -> list[bytes]:
        self._wire.reset()
        return []

    def goaway(self) -> list[bytes]:
        """The next response head says `connection: close`; `must_close` is True from then on."""
        self._draining = True
        return []


class H1ReferenceClient:
    """Our side of an upstream connection: requests out, responses in.

    A request has content if its head says so by content-length or `transfer-encoding: chunked`. Unlike a response
    it is never given framing by the engine: most requests without either have no content.
    """

    def __init__(self, limits: H1Limits | None = None) -> None:
        self._wire = _Wire(h11.CLIENT, limits or H1Limits())
        self._draining = False
        self._body = _Outgoing()

    def __repr__(self) -> str:
        return f"<H1ReferenceClient {self._wire!r} draining={self._draining}>"

    @property
    def must_close(self) -> bool:
        return self._wire.must_close or self._draining

    @property
    def reusable(self) -> bool:
        return self._wire.is_idle and not self._draining

    def receive(self, data: bytes) -> list[Event]:
        """Octets behind a whole response in the same call make the connection not reusable; later they raise."""
        return self._wire.receive(data)

    def send(self, stream_id: int, event: Event) -> list[bytes]:
        """Trailers of a request without chunked body are dropped."""
        self._wire.check_alive(stream_id)
        try:
            if isinstance(event, RequestHead):
                return self._send_head(event)
            if not self._wire.may_send:
                raise LocalProtocolError("the connection is broken")
            if isinstance(event, Data | Trailers | End):
                out = self._body.send(self._wire, event)
                if isinstance(event, End):
                    self._wire.next_cycle()
                return out
            raise LocalProtocolError(f"a client does not send {type(event).__name__}")
        except (LocalProtocolError, h11.LocalProtocolError) as exc:
            self._wire.die_of(exc)

    def _send_head(self, event: RequestHead) -> list[bytes]:
        wire = self._wire
        if not wire.is_idle:
            raise LocalProtocolError("the connection is not ready for another request")
        if event.method == b"CONNECT":
            raise LocalProtocolError("CONNECT would start a tunnel")
        if (rule := check_target(event.method, event.target)) is not None:
            raise LocalProtocolError(rule.detail)
        headers, framing = _checked(event.headers)
        hosts = [value for name, value in headers if name.lower() == b"host"]
        if len(hosts) != 1 or not check_authority(hosts[0]):
            raise LocalProtocolError(Rule.HOST.detail)
        if self._draining:
            wire.must_close = True
        headers = wire.settle_connection(headers)
        self._body = _Outgoing(chunked=framing == b"transfer-encoding")
        out = wire.write(h11.Request(method=event.method, target=event.target, headers=headers))
        wire.strict.expect(event.method)
        return out

    def credit(self, stream_id: int, n: int) -> list[bytes]:
        return []

    def reset(self, stream_id: int, reason: str) -> list[bytes]:
        self._wire.reset()
        return []

    def goaway(self) -> list[bytes]:
        """Not reusable any more: close it when the present exchange is over."""
        self._draining = True
        return []


class _Wire:
    """h11 and `strict` in step, and what is left of the connection."""

    def __init__(self, role: type[h11.CLIENT] | type[h11.SERVER], limits: H1Limits) -> None:
        self._role = role
        self.strict = Strict(limits, responses=role is h11.CLIENT)
        # Strict decides: h11 only ever sees whole vetted pieces, so its own limit must never be reached first.
        whole = max(limits.max_head_bytes, limits.max_trailer_bytes)
        self.h11 = h11.Connection(role, max_incomplete_event_size=2 * whole + 64 * KIB)
        self.must_close = False
        self.request: Head | None = None  # the one being answered; servers only
        self._error: RemoteProtocolError | None = None
        self._eof = False
        self._closed = False  # ConnectionClosed is out, or the engine was reset
        self._dead = False

    def __repr__(self) -> str:
        states = {role.__name__: state.__name__ for role, state in self.h11.states.items()}
        return (
            f"{states} {self.strict!r} must_close={self.must_close} eof={self._eof} "
            f"error={self._error!r} dead={self._dead}"
        )

    @property
    def is_idle(self) -> bool:
        both_idle = self.h11.our_state is h11.IDLE and self.h11.their_state is h11.IDLE
        return both_idle and self.may_send and not self._eof and not self.must_close

    @property
    def may_send(self) -> bool:
        return not self._dead and self._error is None

    def check_alive(self, stream_id: int) -> None:
        if self._dead:
            raise LocalProtocolError("send after reset or after an error of ours")
        if stream_id != 1:
            self.reset()
            raise LocalProtocolError("HTTP/1 has one stream, number 1")

    def die_of(self, exc: Exception) -> NoReturn:
        self.reset()
        if isinstance(exc, LocalProtocolError):
            raise exc
        raise LocalProtocolError(f"h11: {exc}") from exc

    def reset(self) -> None:
        self._dead = self._closed = self.must_close = True
        self.strict.discard()

    # In.

    def receive(self, data: bytes) -> list[Event]:
        if self._dead:
            return []
        if not data:
            self._eof = True
        elif self._eof:
            self._fail(RemoteProtocolError("octets after the end of the stream"))
        elif self._role is h11.CLIENT and self.strict.state in (State.WAIT, State.DISCARD) and self._error is None:
            self._fail(RemoteProtocolError(Rule.UNSOLICITED.detail, 502))
        else:
            self.strict.push(data)
        return self.read()

    def read(self) -> list[Event]:
        events: list[Event] = []
        if self._dead:
            return events
        if self._error is not None:
            raise RemoteProtocolError(self._error.detail, self._error.status)
        try:
            while (piece := self.strict.next()) is not None:
                self.h11.receive_data(piece.raw)
                self._read_piece(piece, events)
            if self._eof and not self._closed and not (self.strict.state is State.WAIT and self.strict.buffered):
                self._closed = self.must_close = True
                if self.strict.eof():
                    self.h11.receive_data(b"")
                    self._read_piece(Piece(b"", None, True), events)
                else:
                    events.append(ConnectionClosed())
        except RemoteProtocolError as exc:
            self._fail(exc)
        except h11.RemoteProtocolError as exc:
            self._fail(RemoteProtocolError(f"h11: {exc}", exc.error_status_hint))
        return events

    def _fail(self, error: RemoteProtocolError) -> NoReturn:
        self._error = error
        self.must_close = True
        self.strict.discard()
        raise error

    def _read_piece(self, piece: Piece, events: list[Event]) -> None:
        """What h11 makes of a vetted piece, which must be what strict made of it."""
        chunks: list[bytes] = []
        ended = False
        while not ended:
            event = self.h11.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                break
            if isinstance(event, h11.Data):
                chunks.append(event.data)
            elif isinstance(event, h11.EndOfMessage):
                ended = True
                if chunks:
                    # One Data per read: many small chunks cost the peer little and must not cost us more.
                    events.append(Data(1, b"".join(chunks)))
                if event.headers:
                    events.append(Trailers(1, list(event.headers)))
                events.append(End(1))
            elif isinstance(event, h11.Request | h11.Response | h11.InformationalResponse):
                events.append(_head_event(event, piece.head))
                if isinstance(event, h11.Request):
                    self.request = piece.head
                if piece.head is not None and piece.head.close and not isinstance(event, h11.InformationalResponse):
                    self.must_close = True
            else:
                raise AssertionError(f"unexpected {event!r} in {self!r}")
        if chunks and not ended:
            events.append(Data(1, b"".join(chunks)))
        if ended is not piece.end:
            raise AssertionError(f"h11 and strict disagree about an end of message: {self!r}")
        if ended:
            self._end_of_theirs()

    def _end_of_theirs(self) -> None:
        if self._role is h11.CLIENT:
            if self.strict.buffered:
                self.must_close = True
            if self.must_close:
                self.strict.discard()
        elif self.must_close:
            # RFC 9112 9.6: nothing is a request after a message that said it is the last one.
            self.strict.discard()
        self.next_cycle()

    # Out.

    def settle_connection(self, headers: Headers) -> Headers:
        """Our Connection field and `must_close` say the same afterwards."""
        options = connection_options([(name.lower(), value) for name, value in headers])
        if b"close" in options:
            self.must_close = True
        if self.must_close and (b"close" not in options or b"keep-alive" in options):
            kept = [option for option in options if option not in (b"close", b"keep-alive")]
            headers = [*_without(headers, b"connection"), (b"connection", b", ".join([*kept, b"close"]))]
        return headers

    def write(self, event: h11.Event) -> list[bytes]:
        buffers = self.h11.send_with_data_passthrough(event)
        if buffers and not isinstance(event, h11.Data):
            return [b"".join(buffers)]
        return buffers or []

    def next_cycle(self) -> None:
        """Starts the next exchange if this one is over on both sides and another one may follow."""
        mine, theirs = self.h11.our_state, self.h11.their_state
        if mine is h11.DONE and theirs is h11.DONE and not self.must_close:
            self.h11.start_next_cycle()
            self.request = None
            if self._role is h11.SERVER:
                self.strict.next_message()
        elif mine in (h11.DONE, h11.MUST_CLOSE) and self.must_close and self._role is h11.SERVER:
            # Answered, for the last time: what is left of the request, and what follows it, is of no use.
            self.strict.discard()


class _Outgoing:
    """The body that we are sending."""

    def __init__(self, *, bodiless: bool = False, chunked: bool = False) -> None:
        self._bodiless = bodiless
        self._chunked = chunked
        self._trailers: Headers | None = None

    def send(self, wire: _Wire, event: Data | Trailers | End) -> list[bytes]:
        if wire.h11.our_state is not h11.SEND_BODY:
            raise LocalProtocolError(f"{type(event).__name__} without a head before it")
        if isinstance(event, End):
            trailers = self._trailers if self._chunked else None
            return wire.write(h11.EndOfMessage(headers=trailers or []))
        if self._trailers is not None:
            raise LocalProtocolError(f"{type(event).__name__} after trailers")
        if isinstance(event, Trailers):
            headers, _ = _checked(event.headers)
            if any(name.lower() in FORBIDDEN_TRAILERS for name, _ in headers):
                raise LocalProtocolError(Rule.TRAILER_FIELD.detail)
            self._trailers = headers
            return []
        if not event.data or self._bodiless:
            return []
        return wire.write(h11.Data(data=event.data))


def _head_event(event: h11.Request | h11.Response | h11.InformationalResponse, head: Head | None) -> Event:
    headers = list(event.headers)
    if isinstance(event, h11.Request):
        agree = head is not None and (event.method, event.target) == (head.method, head.target)
    else:
        agree = head is not None and event.status_code == head.status
    if head is None or not agree or headers != head.headers or event.http_version != head.version:
        raise AssertionError(f"h11 and strict disagree about a head: {event!r}, {head!r}")
    if isinstance(event, h11.Request):
        return RequestHead(1, head.method, head.target, headers, head.version)
    if isinstance(event, h11.Response):
        return ResponseHead(1, head.status, headers, head.version)
    return Informational(1, head.status, headers)


def _checked(headers: Headers) -> tuple[Headers, bytes]:
    """A copy of fields that may be sent, and the name of the field that frames the content (b"" if none does)."""
    framing = b""
    for name, value in headers:
        if (rule := check_field(name, value)) is not None:
            raise LocalProtocolError(rule.detail)
        lower = name.lower()
        if lower in (b"content-length", b"transfer-encoding"):
            if framing:
                raise LocalProtocolError("more than one field that frames the content")
            if lower == b"content-length" and not check_content_length(value):
                raise LocalProtocolError(Rule.CONTENT_LENGTH.detail)
            if lower == b"transfer-encoding" and value.lower() != b"chunked":
                raise LocalProtocolError(Rule.TE_CODING.detail)
            framing = lower
    return list(headers), framing


def _without(headers: Headers, *names: bytes) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]
