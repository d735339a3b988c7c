"""The HTTP/1 engines that others are measured against: h11 behind `strict`. Slow, and right.

`strict` says what may be read and where messages end, h11 reads it again by itself; both must agree on every head and
on every end of message, or it is an AssertionError (our bug; the connection fails closed).

Rules of both engines:

- One exchange at a time, always stream 1. The next cycle starts by itself when both messages are over.
- Events of one `receive` call that raises are lost: the message is broken, whatever came before. What is pipelined
  behind a whole message is not read before that message is answered, so its errors do not reach back.
- Nothing is ever sent that was not asked for: no 100, no error page, no close.
- Heads are written anew, fields in order of `headers`. h11 would put Host first and move what it sets to the end, so it
  only checks: both must agree on the fields, or it is an AssertionError.
- An engine told to by `keep_spelling` tells how names of fields were written, in heads only. It writes as it is told.
- A tunnel begins when the ResponseHead that grants it was sent or received; h11 is out of it from then on. What came
  before that is handed out by the same `receive`, in a server by `resume`. What is behind a request that may be granted
  one is kept meanwhile; after a CONNECT that is refused it is no request.
- `must_close`: close the connection when the present exchange is over. It never goes back to False.
"""

from __future__ import annotations

import http
from typing import NoReturn, TypeAlias

import h11

from netproxy.codec.engine import H1Engine
from netproxy.codec.events import (
    ConnectionClosed,
    Data,
    End,
    Event,
    Headers,
    Informational,
    RequestHead,
    ResponseHead,
    Spelling,
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
    asks_to_upgrade,
    check_authority,
    check_content_length,
    check_field,
    check_target,
    connection_options,
)
from netproxy.errors import LocalProtocolError, RemoteProtocolError

_H11Head: TypeAlias = h11.Request | h11.Response | h11.InformationalResponse
REASON_PHRASES = {int(status): status.phrase.encode("ascii") for status in http.HTTPStatus}


class H1ReferenceServer(H1Engine):
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

    def keep_spelling(self, on: bool) -> None:
        self._wire.strict.keep_spelling = on

    @property
    def reusable(self) -> bool:
        return self._wire.is_idle and not self._draining and not self.buffered

    def receive(self, data: bytes) -> list[Event]:
        return self._wire.receive(data)

    def resume(self) -> list[Event]:
        """What was pipelined behind a request whose response is now finished, or has come for the tunnel that it began.

        [] if there is nothing.
        """
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
                return self._wire.send_content(self._body, event)
            raise LocalProtocolError(f"a server does not send {type(event).__name__}")
        except (LocalProtocolError, h11.LocalProtocolError) as exc:
            self._wire.die_of(exc)

    def _send_head(self, event: ResponseHead) -> list[bytes]:
        wire = self._wire
        status = event.status
        method = wire.request.method if wire.request else b""
        headers, framing = _checked(event.headers)
        if status == 101 or (method == b"CONNECT" and 200 <= status < 300):
            return self._send_tunnel_head(event, headers)
        # Without a request it is a broken or late head that is answered: what the client understands was said before,
        # if ever.
        version = wire.request.version if wire.request else wire.h11.their_http_version
        not_1_1 = version != b"1.1"
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
        return wire.write_head(response, headers, event.spelling)

    def _send_tunnel_head(self, event: ResponseHead, headers: Headers) -> list[bytes]:
        wire = self._wire
        request = wire.request
        if request is None or not request.tunnel or wire.strict.state is not State.WAIT:
            raise LocalProtocolError("a tunnel that nobody asked for, or whose request is not complete")
        if event.status == 101 and (request.version == b"1.0" or not asks_to_upgrade(headers)):
            raise LocalProtocolError(Rule.SWITCH.detail)
        # RFC 9110 8.6, 9.3.6, RFC 9112 6.1: neither field in a 1xx or in a 2xx to CONNECT.
        headers = _without(headers, b"content-length", b"transfer-encoding")
        kind = h11.InformationalResponse if event.status == 101 else h11.Response
        head = kind(status_code=event.status, headers=headers, reason=REASON_PHRASES.get(event.status, b""))
        out = wire.write_head(head, headers, event.spelling)
        wire.strict.tunnel()
        wire.begin_tunnel()
        return out

    def _send_informational(self, event: Informational) -> list[bytes]:
        if event.status == 101:
            raise LocalProtocolError("101 is a ResponseHead")
        headers, framing = _checked(event.headers)
        if framing:
            headers = _without(headers, b"content-length", b"transfer-encoding")
        if self._wire.tunnel:
            raise LocalProtocolError("Informational in a tunnel")
        message = h11.InformationalResponse(
            status_code=event.status, headers=headers, reason=REASON_PHRASES.get(event.status, b"")
        )
        if self._wire.request is not None and self._wire.request.version == b"1.0":
            return []  # RFC 9110 15.2: never to an HTTP/1.0 client
        return self._wire.write_head(message, headers, None)

    def credit(self, stream_id: int, n: int) -> list[bytes]:
        return []

    def reset(self, stream_id: int, reason: str) -> list[bytes]:
        self._wire.reset()
        return []

    def goaway(self) -> list[bytes]:
        """The next response head says `connection: close`; `must_close` is True from then on."""
        self._draining = True
        return []


class H1ReferenceClient(H1Engine):
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

    def keep_spelling(self, on: bool) -> None:
        self._wire.strict.keep_spelling = on

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
                return self._wire.send_content(self._body, event)
            raise LocalProtocolError(f"a client does not send {type(event).__name__}")
        except (LocalProtocolError, h11.LocalProtocolError) as exc:
            self._wire.die_of(exc)

    def _send_head(self, event: RequestHead) -> list[bytes]:
        wire = self._wire
        if not wire.is_idle:
            raise LocalProtocolError("the connection is not ready for another request")
        if (rule := check_target(event.method, event.target)) is not None:
            raise LocalProtocolError(rule.detail)
        headers, framing = _checked(event.headers)
        hosts = [value for name, value in headers if name.lower() == b"host"]
        if len(hosts) != 1 or not check_authority(hosts[0]):
            raise LocalProtocolError(Rule.HOST.detail)
        if event.method == b"CONNECT" and framing:
            raise LocalProtocolError(Rule.CONNECT_TARGET.detail)
        if self._draining:
            wire.must_close = True
        headers = wire.settle_connection(headers)
        self._body = _Outgoing(chunked=framing == b"transfer-encoding")
        request = h11.Request(method=event.method, target=event.target, headers=headers)
        out = wire.write_head(request, headers, event.spelling)
        wire.strict.expect(event.method, upgrade=asks_to_upgrade([(name.lower(), value) for name, value in headers]))
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
        self.tunnel = False
        self._tunnel_ended = [False, False]  # theirs, ours
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
        elif self.tunnel:
            return [Data(1, data)]
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
        if self.tunnel:
            return self._read_tunnel()
        try:
            while (piece := self.strict.next()) is not None:
                self.h11.receive_data(piece.raw)
                self._read_piece(piece, events)
            if self.tunnel:
                return events + self._read_tunnel()
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
        # Not what is raised: its traceback leads to whoever holds the engine, a ring that only a full collection ends.
        self._error = RemoteProtocolError(error.detail, error.status)
        self.must_close = True
        self.strict.discard()
        try:
            raise error
        finally:
            del error

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
                elif piece.head is not None and piece.head.tunnel:
                    if self.h11.our_state is not h11.SWITCHED_PROTOCOL:
                        # In the middle of our request: what we still have to send is no tunnel's.
                        raise RemoteProtocolError(Rule.SWITCH.detail, 502)
                    self.begin_tunnel()
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
        elif self.must_close and not (self.request and self.request.tunnel):
            # RFC 9112 9.6: nothing is a request after a message that said it is the last one.
            self.strict.discard()
        self.next_cycle()

    # Tunnels.

    def begin_tunnel(self) -> None:
        self.tunnel = self.must_close = True

    def _read_tunnel(self) -> list[Event]:
        events: list[Event] = []
        if data := self.strict.take_tunnelled():
            events.append(Data(1, data))
        if self._eof and not self._tunnel_ended[0]:
            self._closed = self._tunnel_ended[0] = True
            events.append(End(1))
        return events

    def _send_tunnelled(self, event: Data | Trailers | End) -> list[bytes]:
        if isinstance(event, Trailers) or self._tunnel_ended[1]:
            raise LocalProtocolError(f"{type(event).__name__} in a tunnel, or after its end")
        if isinstance(event, End):
            self._tunnel_ended[1] = True
            return []
        return [event.data] if event.data else []

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

    def send_content(self, body: _Outgoing, event: Data | Trailers | End) -> list[bytes]:
        if self.tunnel:
            return self._send_tunnelled(event)
        out = body.send(self, event)
        if isinstance(event, End):
            self.next_cycle()
        return out

    def write_head(self, head: _H11Head, headers: Headers, spelling: Spelling | None) -> list[bytes]:
        theirs = b"".join(self.h11.send_with_data_passthrough(head) or ())
        if isinstance(head, h11.Request):
            start = b"%b %b HTTP/1.1" % (head.method, head.target)
        else:
            start = b"HTTP/1.1 %d %b" % (head.status_code, head.reason)
        lines = [b"%b: %b" % field for field in headers]
        if _but_connection(theirs) != _but_connection(b"\r\n".join([start, *lines, b"", b""])):
            raise AssertionError(f"h11 and we disagree about a head to send: {theirs!r}, {start!r} {headers!r}")
        if spelling:
            lines = [b"%b: %b" % (spelling.get(name, name), value) for name, value in headers]
        return [b"\r\n".join([start, *lines, b"", b""])]

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
        return RequestHead(1, head.method, head.target, headers, head.version, head.spelling)
    if isinstance(event, h11.Response) or head.tunnel:
        return ResponseHead(1, head.status, headers, head.version, head.spelling)
    return Informational(1, head.status, headers)


def _checked(headers: Headers) -> tuple[Headers, bytes]:
    """A copy of fields that may be sent, and the name of the field that frames the content (b"" if none does)."""
    framing = b""
    checked: Headers = []
    for name, value in headers:
        if (rule := check_field(name, value)) is not None:
            raise LocalProtocolError(rule.detail)
        lower = name.lower()
        if lower in (b"content-length", b"transfer-encoding"):
            if framing:
                raise LocalProtocolError("more than one field that frames the content")
            if lower == b"content-length" and not check_content_length(value):
                raise LocalProtocolError(Rule.CONTENT_LENGTH.detail)
            if lower == b"transfer-encoding":
                value = value.lower()  # RFC 9112 7: names of codings are case-insensitive, ours is written one way
                if value != b"chunked":
                    raise LocalProtocolError(Rule.TE_CODING.detail)
            framing = lower
        checked.append((name, value))
    return checked, framing


def _but_connection(head: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Start line, and fields in an order of their own. h11 writes one Connection field for each option: left out."""
    start, *lines = head.split(b"\r\n")
    fields = [(name.lower(), value) for name, _, value in (line.partition(b":") for line in lines)]
    return start, sorted(field for field in fields if field[0] != b"connection")


def _without(headers: Headers, *names: bytes) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]
