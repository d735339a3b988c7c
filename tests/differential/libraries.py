"""h11 and h2 as they come, without a rule of ours before them: what they make of octets, to hold the engines against.

The reference engines give these libraries only what our rules let pass; here they see everything. A message that an
engine of ours takes and the library refuses, or reads otherwise, is a fault (`Undocumented`), and so is one that the
library takes and ours refuses; but for what stands in the tables of `docs.differences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11

from docs.differences import LOOSER_H1, LOOSER_H2, STRICTER_H1, STRICTER_H2
from netproxy.codec import h2_strict, strict
from netproxy.codec.events import (
    Data,
    End,
    Event,
    Headers,
    Informational,
    RequestHead,
    RequestRefused,
    Reset,
    ResponseHead,
    Trailers,
)
from netproxy.errors import RemoteProtocolError

from ..unit.codec import h2_frames as h2f

H1_RULES = {rule.detail: rule for rule in strict.Rule}
H2_RULES = {rule.detail: rule for rule in h2_strict.Rule}
ENOUGH = 2**31


class Undocumented(AssertionError):
    """A difference that stands in neither table. `rule`: by which ours refuses what the library takes."""

    def __init__(self, text: str, rule: strict.Rule | h2_strict.Rule | None = None) -> None:
        super().__init__(text)
        self.rule = rule


# --- HTTP/1


class Message(NamedTuple):
    """One that is whole. `start`: method and target, or status."""

    start: tuple[Any, ...]
    headers: Headers
    content: bytes
    trailers: Headers


class Read(NamedTuple):
    messages: list[Message]
    refusal: str
    """Why the message behind them was refused, "" if it was not."""


def headers_of(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """In one order: h11 puts nothing in another place when it reads, but joins what means the same."""
    return [(bytes(name).lower(), bytes(value)) for name, value in raw]


def h11_server(data: bytes) -> Read:
    """Each request gets an empty 404 when it is whole."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=ENOUGH)

    def answer() -> bool:
        conn.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
        conn.send(h11.EndOfMessage())
        if conn.our_state is not h11.DONE or conn.their_state is not h11.DONE:
            return False
        conn.start_next_cycle()
        return True

    return _h11_reads(conn, data, answer)


def h11_client(method: bytes, data: bytes) -> Read:
    """The answer to one request. Method UP: a GET that would have a protocol x."""
    conn = h11.Connection(h11.CLIENT, max_incomplete_event_size=ENOUGH)
    headers = [(b"host", b"a")] + ([(b"connection", b"upgrade"), (b"upgrade", b"x")] if method == b"UP" else [])
    conn.send(h11.Request(method=method, target=b"a:1" if method == b"CONNECT" else b"/", headers=headers))
    conn.send(h11.EndOfMessage())
    return _h11_reads(conn, data, lambda: False)


def _h11_reads(conn: h11.Connection, data: bytes, whole: Callable[[], bool]) -> Read:
    messages: list[Message] = []
    start: tuple[Any, ...] = ()
    headers: Headers = []
    content = b""
    try:
        for part in (data, b""):
            conn.receive_data(part)
            while True:
                event = conn.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    break
                if isinstance(event, h11.Request):
                    start, headers, content = (event.method, event.target), headers_of(event.headers), b""
                elif isinstance(event, h11.InformationalResponse | h11.Response):
                    start, headers, content = (event.status_code,), headers_of(event.headers), b""
                    if isinstance(event, h11.InformationalResponse) or conn.their_state is h11.SWITCHED_PROTOCOL:
                        messages.append(Message(start, headers, b"", []))
                elif isinstance(event, h11.Data):
                    content += bytes(event.data)
                else:
                    assert isinstance(event, h11.EndOfMessage)
                    messages.append(Message(start, headers, content, headers_of(event.headers)))
                    if not whole():
                        return Read(messages, "")
    except h11.RemoteProtocolError as exc:
        return Read(messages, str(exc))
    return Read(messages, "")


def messages_of(events: Iterable[Event], method: bytes = b"") -> list[Message]:
    """What an engine of ours made of the octets: those that are whole. A tunnel counts as one, for its head.

    `method`: of the request, when they are answers.
    """
    messages: list[Message] = []
    start: tuple[Any, ...] = ()
    headers: Headers = []
    trailers: Headers = []
    content = b""
    for event in events:
        match event:
            case RequestHead():
                start, headers, content, trailers = (event.method, event.target), event.headers, b"", []
            case ResponseHead():
                start, headers, content, trailers = (event.status,), event.headers, b"", []
                if event.status == 101 or (method == b"CONNECT" and event.status < 300):
                    return [*messages, Message(start, headers, b"", [])]
            case Informational():
                messages.append(Message((event.status,), event.headers, b"", []))
            case Data():
                content += event.data
            case Trailers():
                trailers = event.headers
            case End():
                messages.append(Message(start, headers, content, trailers))
    return messages


def judge_h1(events: list[Event], detail: str, library: Read, method: bytes = b"") -> None:
    """`events` and the refusal's `detail` of an engine of ours, which was given the same octets."""
    ours = messages_of(events, method)
    for at, message in enumerate(ours):
        if at >= len(library.messages):
            if any(looser.words in library.refusal for looser in LOOSER_H1):
                return
            raise Undocumented(f"ours takes {message}, h11 does not: {library.refusal or 'it waits'}")
        if message != library.messages[at]:
            raise Undocumented(f"ours reads {message}, h11 {library.messages[at]}")
    if detail and len(library.messages) > len(ours):
        rule = H1_RULES[detail]
        if rule not in STRICTER_H1:
            raise Undocumented(f"h11 takes {library.messages[len(ours)]}, ours does not: {rule}", rule)


# --- HTTP/2


BLOCKS = (h2_strict.Frame.HEADERS, h2_strict.Frame.PUSH_PROMISE, h2_strict.Frame.CONTINUATION)


def frames_of(wire: bytes) -> list[bytes]:
    """Those that are whole."""
    frames = []
    while len(wire) >= (size := 9 + int.from_bytes(wire[:3], "big")):
        frames.append(wire[:size])
        wire = wire[size:]
    return frames


def h2_connection(limits: h2_strict.H2Limits, *, client: bool) -> h2.connection.H2Connection:
    """With our settings and all of its own checks."""
    config = h2.config.H2Configuration(client_side=client, header_encoding=None, normalize_inbound_headers=False)
    conn = h2.connection.H2Connection(config)
    codes = h2.settings.SettingCodes
    settings: dict[int, int] = {
        codes.ENABLE_PUSH: 0,
        codes.INITIAL_WINDOW_SIZE: limits.stream_window,
        codes.MAX_FRAME_SIZE: limits.max_frame_bytes,
    }
    if not client:
        settings |= {codes.MAX_CONCURRENT_STREAMS: limits.max_streams, codes.ENABLE_CONNECT_PROTOCOL: 1}
    conn.local_settings = h2.settings.Settings(client=client, initial_values=settings)
    conn.decoder.max_header_list_size = limits.max_header_list_bytes
    conn.initiate_connection()
    if limits.connection_window > 65535:
        conn.increment_flow_control_window(limits.connection_window - 65535)
    conn.clear_outbound_data_buffer()
    return conn


def h2_takes(conn: h2.connection.H2Connection, raw: bytes) -> tuple[list[Any], str]:
    """What it makes of one frame, and why it refuses it."""
    # A new initial window is for streams that are open (RFC 9113 section 6.9.2); h2 forgets the others when it counts.
    _ = conn.open_inbound_streams, conn.open_outbound_streams
    try:
        events = conn.receive_data(raw)
    except h2.exceptions.ProtocolError as exc:
        return [], f"{type(exc).__name__}: {exc}"
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as exc:
        return [], f"it fails: {exc!r}"
    out = conn.data_to_send()
    seen: list[Any] = []
    for event in events:
        match event:
            case h2.events.RequestReceived():
                fields = dict(event.headers)
                target = fields.get(b":path", fields.get(b":authority"))
                seen.append(("request", event.stream_id, fields[b":method"], target, *plain(event.headers)))
            case h2.events.ResponseReceived() | h2.events.InformationalResponseReceived():
                status = dict(event.headers)[b":status"]
                seen.append(("response", event.stream_id, status, *plain(event.headers)))
            case h2.events.TrailersReceived() if event.headers:
                seen.append(("trailers", event.stream_id, *plain(event.headers)))
            case h2.events.DataReceived() if event.data:
                seen.append(("data", event.stream_id, event.data))
            case h2.events.StreamEnded():
                seen.append(("end", event.stream_id))
            case h2.events.StreamReset():
                seen.append(("reset", event.stream_id, int(event.error_code)))
    reset = [made for made in h2f.Reader().frames(out) if made.kind is h2_strict.Frame.RST_STREAM] if out else []
    return seen, f"it resets the stream: {h2f.codes(reset, h2_strict.Frame.RST_STREAM)}" if reset else ""


def plain(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Without what each says in its own way."""
    return [(n, v) for n, v in headers_of(headers) if n[:1] != b":" and n not in (b"host", b"cookie")]


def engine_takes(engine: Any, raw: bytes) -> tuple[list[Any], str]:
    """The same of an engine of ours; it says the rule."""
    try:
        events = engine.receive(raw)
    except RemoteProtocolError as exc:
        return [], exc.detail
    seen: list[Any] = []
    for event in events:
        match event:
            case RequestHead():
                seen.append(("request", event.stream_id, event.method, event.target, *plain(event.headers)))
            case ResponseHead() | Informational():
                seen.append(("response", event.stream_id, b"%d" % event.status, *plain(event.headers)))
            case Trailers() if event.headers:
                seen.append(("trailers", event.stream_id, *plain(event.headers)))
            case Data():
                seen.append(("data", event.stream_id, event.data))
            case End():
                seen.append(("end", event.stream_id))
            case RequestRefused():
                return seen, event.detail
            case Reset() if event.ours:
                return seen, event.detail
            case Reset() if not event.untouched or "reset the stream" in event.detail:
                seen.append(("reset", event.stream_id, event.code))
    written = h2f.written(engine)
    # Streams that we end for reasons of our own are no refusal, frames of streams that are over are.
    codes = h2f.codes([made for made in written if made.kind is h2_strict.Frame.RST_STREAM], h2_strict.Frame.RST_STREAM)
    return seen, h2_strict.Rule.STREAM_CLOSED.detail if h2_strict.Code.STREAM_CLOSED in codes else ""


def judge_h2(engine: Any, library: h2.connection.H2Connection, wire: bytes) -> None:
    """Both are given `wire` frame by frame, up to the first that one of them refuses."""
    tunnels: set[int] = set()
    for raw in frames_of(wire):
        ours, refusal = engine_takes(engine, raw)
        theirs, error = h2_takes(library, raw)
        if refusal:
            rule = H2_RULES[refusal]
            if not error and raw[3] in BLOCKS and not raw[4] & h2_strict.Flag.END_HEADERS:
                # It waits for the rest of the block: is it refused then?
                last = h2f.continuation(int.from_bytes(raw[5:9], "big"), b"")
                theirs, error = h2_takes(library, last)
            if not error and rule not in STRICTER_H2:
                raise Undocumented(f"h2 takes {raw[:60]!r} as {theirs}, ours does not: {rule}", rule)
            return
        if error:
            if not any(row.words in error and raw[3] in row.kinds for row in LOOSER_H2):
                raise Undocumented(f"ours takes {raw[:60]!r} as {ours}, h2 does not: {error}")
            return
        # A CONNECT's request ends for us with its head, and what comes for it waits for the answer.
        tunnels |= {seen[1] for seen in ours if seen[0] == "request" and seen[2] == b"CONNECT"}
        mine, other = ([s for s in seen if s[1] not in tunnels or s[0] == "request"] for seen in (ours, theirs))
        if mine != other:
            raise Undocumented(f"ours reads {raw[:60]!r} as {mine}, h2 as {other}")
