"""The door to HTTP/2: which engine speaks it, and what every engine offers beyond `engine.Engine`.

Two engines, with the same behaviour: native (compiled, `h2_native`) and reference (h2 behind our rules,
`h2_reference`). `use` says which one, for the process; native where it was compiled, unless told otherwise. Whoever
drives an engine does it the same way:

Octets out. Every call may have something to write, `receive` too (acknowledgements, windows), and a new engine has
(the preface, SETTINGS). It is collected, so `send`, `credit`, `reset` and `goaway` return nothing: after each turn (a
`receive` and what it led to, or some `send`s) write what `take_output` returns, once. After an error as well: the
GOAWAY that says why is in it; then close. While the transport is full, credit nothing that would go to it. Do go on
reading from it, or two full sides wait for each other: what reading alone makes an engine write is bounded by its
budgets.

Streams. A client takes `next_stream_id` for its next RequestHead, while `reusable`; `free_streams` of them at once.
PeerSettings and the end of a stream may free more. Events of streams that the driver gave up may still be in the list
that it goes through: ignore streams that you do not know. `send` on a stream that is over does nothing.
LocalProtocolError of `send` leaves the connection as it was: reset that stream. RemoteProtocolError of `receive` ends
the connection, and all its streams with it.

Content in. What Data brought has to be credited when the other side has taken it, and not before: that is the
backpressure, since the peer may send no more than the window (`stream_window`, `connection_window`). Credit all of
it, also after End; or reset the stream, which credits the rest (also when it is over). After Reset nothing needs
crediting.

Content out. `send(Data)` always takes it; what the peer's windows do not allow is queued. Then `is_blocked` is true:
read no more of that stream's source (do not credit it) until Writable comes (also behind the End, and then credit it;
Reset instead of it means that it is gone). Data beyond `max_queued_bytes` is a LocalProtocolError. Streams that wait
share the connection's window frame by frame in turn. A peer that keeps windows shut holds memory: while there are
`stalled_streams`, run an idle timer and reset those that do not move.

Ends. `goaway`: a server announces it, takes streams that were on their way and says the last one when the client has
seen it (or when `goaway` is called again, for a driver whose patience is over). Close when `must_close`. A client
that gets GoAway opens nothing more here; streams the peer has not begun with are Reset with `untouched` and may go
elsewhere. `settings_acked` stays false with a peer that does not answer: close after some seconds. `ping` and PingAck
are for keepalive: no answer in time, close.

Clocks. `receive(data, now)`: seconds of a monotonic clock, which fill up the budgets for what brings nothing; without
it they are filled by work alone.

CONNECT. Requests are complete with their head: RequestHead, End; the tunnel begins with 2xx (see `events`). A
server's driver calls `resume` when it has sent that head. Extended CONNECT (RFC 8441) has `protocol` in its head.
`websocket_from_connect` and its counterparts turn one into an Upgrade of HTTP/1.1 and back.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TypeAlias

from netproxy.codec.choice import EngineChoice, Kind
from netproxy.codec.engine import H2Engine
from netproxy.codec.events import Headers, RequestHead, ResponseHead
from netproxy.codec.h2_reference import H2ReferenceClient, H2ReferenceServer
from netproxy.codec.h2_strict import PREFACE, Code, H2Limits

try:
    from netproxy.codec import h2_native
except ImportError:
    h2_native = None  # type: ignore[assignment]  # it was not compiled: no compiler at the installation

__all__ = [
    "ENGINES",
    "PREFACE",
    "Code",
    "H2Client",
    "H2Limits",
    "H2Server",
    "chosen",
    "client_engine",
    "connect_from_websocket",
    "engine",
    "server_engine",
    "switches_to_websocket",
    "use",
    "websocket_answer_from_connect",
    "websocket_from_connect",
]


H2Server: TypeAlias = H2Engine
H2Client: TypeAlias = H2Engine
"""What both sides are; `resume` is a server's, what has to do with new streams a client's."""

_choice: EngineChoice[H2Server, H2Client, H2Limits] = EngineChoice(
    "HTTP/2",
    native=None if h2_native is None else Kind(h2_native.H2NativeServer, h2_native.H2NativeClient),
    reference=Kind(H2ReferenceServer, H2ReferenceClient),
)
ENGINES = _choice.names
engine, chosen, use = _choice.engine, _choice.chosen, _choice.use
server_engine, client_engine = _choice.server, _choice.client


# --- tunnels across the versions

_OF_UPGRADES = frozenset((b"connection", b"upgrade", b"sec-websocket-key", b"sec-websocket-accept"))


def websocket_from_connect(head: RequestHead, nonce: bytes) -> RequestHead:
    """The HTTP/1.1 request for what an extended CONNECT asks (RFC 8441 section 5). `nonce`: 16 random octets, which a
    WebSocket needs and HTTP/2 does not send."""
    headers = [field for field in head.headers if field[0] not in _OF_UPGRADES]
    headers += [(b"connection", b"upgrade"), (b"upgrade", head.protocol)]
    if head.protocol.lower() == b"websocket":
        headers.append((b"sec-websocket-key", base64.b64encode(nonce)))
    return head.replace(method=b"GET", headers=headers, http_version=b"1.1", protocol=b"")


def switches_to_websocket(head: ResponseHead, asked: RequestHead) -> bool:
    """Does this 101 switch to what `websocket_from_connect` asked for, with the answer to its key?"""
    said = dict(head.headers)
    wanted = dict(asked.headers)
    key = wanted.get(b"sec-websocket-key")
    named = said.get(b"upgrade", b"").strip().lower() == wanted[b"upgrade"].lower()
    return named and (key is None or said.get(b"sec-websocket-accept") == websocket_accept(key))


def connect_from_websocket(head: RequestHead, protocol: bytes) -> RequestHead:
    """The extended CONNECT for an HTTP/1.1 request that asks to go on with `protocol`."""
    return head.replace(method=b"CONNECT", headers=_plain(head.headers), http_version=b"2", protocol=protocol)


def connect_answer_from_websocket(head: ResponseHead) -> ResponseHead:
    """What a client of an extended CONNECT is told when the server of HTTP/1.1 said 101."""
    return head.replace(status=200, headers=_plain(head.headers), http_version=b"2")


def websocket_answer_from_connect(head: ResponseHead, asked: RequestHead, protocol: bytes) -> ResponseHead:
    """The 101 for an HTTP/1.1 client when the server of HTTP/2 granted the extended CONNECT."""
    headers = [*_plain(head.headers), (b"connection", b"upgrade"), (b"upgrade", protocol)]
    key = next((value for name, value in asked.headers if name == b"sec-websocket-key"), None)
    if key is not None:
        headers.append((b"sec-websocket-accept", websocket_accept(key)))
    return head.replace(status=101, headers=headers, http_version=b"1.1")


def websocket_accept(key: bytes) -> bytes:
    """What a server of HTTP/1.1 must answer to this key (RFC 6455 section 4.2.2)."""
    digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest()
    return base64.b64encode(digest)


def _plain(headers: Headers) -> Headers:
    return [field for field in headers if field[0] not in _OF_UPGRADES]
