# cython: annotation_typing=False
"""What every codec speaks: events in, events out, the same for HTTP/1 (stream 1) and HTTP/2.

An engine is one side of one connection and pure: bytes and events, no socket, no clock.

    receive(data)          bytes from the peer -> events; ``b""`` means the peer's end of stream
    send(stream_id, event) an event of ours    -> buffers to write, in order
    credit(stream_id, n)   the application consumed n octets of body (flow control; a no-op in HTTP/1)
    reset(stream_id, why)  give a stream up    -> buffers to write; in HTTP/1 the connection must close
    goaway()               no new streams after the current ones -> buffers to write

`receive` raises RemoteProtocolError, `send` LocalProtocolError; after either the engine is dead. HTTP/2 differs (see
`h2`): buffers are collected, and LocalProtocolError leaves the engine as it was, with a stream to reset.

Order within one stream: RequestHead or ResponseHead (after any number of Informational), Data*, at
most one Trailers, End. End is always sent, also after a head without body.

A tunnel begins with the response: a ResponseHead with status 101 (to a request whose head has `upgrade`), or 2xx to
CONNECT. From there on both directions are octets of no protocol: Data* and End, without framing; End is half a close,
and (HTTP/1) the connection is not reusable. The request before it is complete (its End comes before the ResponseHead),
and a second End of that direction ends the tunnel's. In HTTP/2 there is no 101; a protocol is asked for by a CONNECT
whose head has `protocol` (RFC 8441), and 2xx grants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TypeAlias

Headers: TypeAlias = list[tuple[bytes, bytes]]
"""Names in lower case, values without surrounding white space, in order of arrival."""

Spelling: TypeAlias = Mapping[bytes, bytes]
"""How the sender wrote names: by the name in lower case (of several spellings the first)."""


class Message:
    """A part of a message: what comes per request has typed fields where it is compiled. Equal by type and fields."""

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS[type(self)]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and type(self) is type(other) and self._values() == other._values()

    def replace(self, **changes: Any) -> Self:
        """A copy, changed."""
        return type(self)(**{**self._values(), **changes})


class RequestHead(Message):
    """`spelling`: only of engines that were asked to keep it. Written out, a name that it lacks is in lower case.
    `scheme`: as the client said it (HTTP/2 only). Written out, an empty one is ``http``.
    `protocol`: of an extended CONNECT (RFC 8441), whose `target` is a path.
    `seen`: of its fields, see `fields`; -1: nobody has looked. It is no part of what makes two heads equal.
    """

    def __init__(
        self,
        stream_id: int,
        method: bytes,
        target: bytes,
        headers: Headers,
        http_version: bytes = b"1.1",
        spelling: Spelling | None = None,
        scheme: bytes = b"",
        protocol: bytes = b"",
    ) -> None:
        self.stream_id = stream_id
        self.method = method
        self.target = target
        self.headers = headers
        self.http_version = http_version
        self.spelling = spelling
        self.scheme = scheme
        self.protocol = protocol
        self.seen = -1


class ResponseHead(Message):
    """`spelling`, `seen`: as of `RequestHead`."""

    def __init__(
        self,
        stream_id: int,
        status: int,
        headers: Headers,
        http_version: bytes = b"1.1",
        spelling: Spelling | None = None,
    ) -> None:
        self.stream_id = stream_id
        self.status = status
        self.headers = headers
        self.http_version = http_version
        self.spelling = spelling
        self.seen = -1


class Informational(Message):
    """A 1xx answer other than 101."""

    def __init__(self, stream_id: int, status: int, headers: Headers) -> None:
        self.stream_id = stream_id
        self.status = status
        self.headers = headers


class Data(Message):
    def __init__(self, stream_id: int, data: bytes) -> None:
        self.stream_id = stream_id
        self.data = data


class Trailers(Message):
    def __init__(self, stream_id: int, headers: Headers) -> None:
        self.stream_id = stream_id
        self.headers = headers


class End(Message):
    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


_FIELDS: dict[type, tuple[str, ...]] = {
    RequestHead: ("stream_id", "method", "target", "headers", "http_version", "spelling", "scheme", "protocol"),
    ResponseHead: ("stream_id", "status", "headers", "http_version", "spelling"),
    Informational: ("stream_id", "status", "headers"),
    Data: ("stream_id", "data"),
    Trailers: ("stream_id", "headers"),
    End: ("stream_id",),
}


def request_head(
    stream_id: int,
    method: bytes,
    target: bytes,
    headers: Headers,
    http_version: bytes,
    spelling: Spelling | None,
    scheme: bytes,
    protocol: bytes,
) -> RequestHead:
    """As the constructor, which costs several times as much where this is compiled."""
    head = RequestHead.__new__(RequestHead)
    head.stream_id = stream_id
    head.method = method
    head.target = target
    head.headers = headers
    head.http_version = http_version
    head.spelling = spelling
    head.scheme = scheme
    head.protocol = protocol
    head.seen = -1
    return head


def response_head(
    stream_id: int, status: int, headers: Headers, http_version: bytes, spelling: Spelling | None
) -> ResponseHead:
    """As the constructor, likewise."""
    head = ResponseHead.__new__(ResponseHead)
    head.stream_id = stream_id
    head.status = status
    head.headers = headers
    head.http_version = http_version
    head.spelling = spelling
    head.seen = -1
    return head


def content(stream_id: int, data: bytes) -> Data:
    """As the constructor of `Data`, likewise."""
    event = Data.__new__(Data)
    event.stream_id = stream_id
    event.data = data
    return event


def end(stream_id: int) -> End:
    """As the constructor of `End`, likewise."""
    event = End.__new__(End)
    event.stream_id = stream_id
    return event


class Reset(NamedTuple):
    """The stream is over before its time: the peer gave it up or, with `ours`, the engine did because the peer broke a
    rule in it. Nothing more comes of it, and nothing can be sent."""

    stream_id: int
    detail: str
    code: int = 8
    """RFC 9113 section 7. 0 after a complete response: only the rest of the request is not wanted."""
    untouched: bool = False
    """The peer has not begun with the request: it may be sent again, elsewhere too (RFC 9113 section 8.7)."""
    ours: bool = False


class RequestRefused(NamedTuple):
    """A request that can't be read, in the place of its RequestHead: to be answered like any other. Its content never
    comes. HTTP/2 only: in HTTP/1 `receive` raises, since there is no telling where the next request begins."""

    stream_id: int
    status: int
    detail: str


class Writable(NamedTuple):
    """What was queued for a stream has gone out: its source may be credited and read again. Comes also behind the End
    of ours. HTTP/2 only."""

    stream_id: int


class GoAway(NamedTuple):
    """The peer takes no new streams. Those above `last_stream_id` were Reset, `untouched`; the others go on."""

    last_stream_id: int
    code: int
    detail: str


class PeerSettings(NamedTuple):
    """The peer's settings came or changed: more or fewer streams may be open, blocked streams may go on."""

    max_streams: int
    connect_protocol: bool


class PingAck(NamedTuple):
    """The answer to a `ping` of ours."""

    data: bytes


class ConnectionClosed(NamedTuple):
    """The peer's end of stream at a place where the protocol allows it."""


Event: TypeAlias = (
    RequestHead
    | ResponseHead
    | Informational
    | Data
    | Trailers
    | End
    | Reset
    | ConnectionClosed
    | RequestRefused
    | Writable
    | GoAway
    | PeerSettings
    | PingAck
)
