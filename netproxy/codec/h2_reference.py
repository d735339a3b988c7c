"""The HTTP/2 engines that others are measured against: h2 behind rules of our own. Slow, and right.

What comes in is read by `h2_framing` and here, by the rules of `h2_strict`; what keeps them is given to h2 (see
`h2_library`), which reads it again by itself and keeps states and windows of its own. Both must agree on every frame,
or it is an AssertionError (our bug; the connection fails closed). What goes out is written by h2.

A stream, by what was received (IN) and sent (OUT) of its two messages:

    IN   server: HEAD was what opened it     client: nothing -> 1xx* -> head      then content -> END_STREAM: ended
    OUT  client: HEAD was what opened it     server: nothing -> 1xx* -> head      then content -> END_STREAM: ended

It is over when both have ended, with RST_STREAM from either side, and with a server's END_STREAM (which
RST_STREAM(NO_ERROR) follows when the request has not ended, RFC 9113 section 8.1). Octets that were handed out and not
yet credited still count against the connection's window until they are, or until `reset`.

END_STREAM goes into the last frame of the stream, unless that was taken meanwhile, another was written, or one
received.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from netproxy.codec.engine import H2Engine
from netproxy.codec.events import (
    ConnectionClosed,
    Data,
    End,
    Event,
    GoAway,
    Headers,
    Informational,
    PeerSettings,
    PingAck,
    RequestHead,
    RequestRefused,
    Reset,
    ResponseHead,
    Trailers,
    Writable,
)
from netproxy.codec.h2_framing import Framing, Piece, frame
from netproxy.codec.h2_library import INFORMATIONAL, REQUEST, RESPONSE, TRAILERS, Library
from netproxy.codec.h2_strict import (
    ASSUMED_MAX_STREAMS,
    CONTENT_EARNS,
    DATA_FRAME,
    DRAIN_PING,
    EXCHANGE_EARNS,
    MAX_PINGS,
    MAX_REMEMBERED_RESETS,
    MAX_SETTINGS_ENTRIES,
    MAX_STREAM_ID,
    MAX_WINDOW,
    OCTETS_PER_GLITCH,
    Budget,
    Code,
    Flag,
    Frame,
    H2Limits,
    MalformedError,
    Rule,
    Setting,
    code_name,
    list_size,
    read_request,
    read_response,
    read_trailers,
    request_fields,
    response_fields,
    trailer_fields,
)
from netproxy.errors import LocalProtocolError, RemoteProtocolError

_SETTING = struct.Struct(">HL")
# What h2 is told of a request that was refused: it must know the stream, so that it can be answered.
_SUBSTITUTE = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"refused"), (b":path", b"/")]


class _Stream:
    def __init__(self, stream_id: int, in_window: int, out_window: int) -> None:
        self.id = stream_id
        self.in_window = in_window
        self.out_window = out_window
        self.in_head = self.in_ended = False
        self.out_head = self.out_ended = False
        self.end_sent = False  # the driver's End came (of a CONNECT: that of the tunnel)
        self.connect = self.tunnel = self.request_ended = False
        self.swallowed = False  # what comes is not handed out
        self.head_method = self.no_content_out = False
        self.length_in = self.length_out = -1
        self.unacked = 0  # handed out, not credited
        self.pending = 0  # credited, not yet told to the peer
        self.queue: deque[bytes] = deque()
        self.queued = 0
        self.trailers: Headers | None = None
        self.held: list[Event] = []  # of a tunnel that is not granted yet

    def __repr__(self) -> str:
        ended = f"in_ended={self.in_ended} out_ended={self.out_ended}"
        return f"<stream {self.id} {ended} windows={self.in_window}/{self.out_window} queued={self.queued}>"


class _Connection(H2Engine):
    """What both sides share."""

    _client: bool

    def __init__(self, limits: H2Limits | None = None) -> None:
        self._limits = limits = limits or H2Limits()
        self._framing = Framing(limits, client=self._client)
        self._library = Library(limits, client=self._client)
        self._settings_seen = False
        self._settings_unacked = 1
        self._dead = self._closed = False
        self._now = 0.0
        self._streams: dict[int, _Stream] = {}
        self._owed: dict[int, int] = {}
        self._highest = 0  # of their streams
        self._next_id = 1  # of ours
        self._reset_by_us: dict[int, None] = {}
        self._blocked: dict[int, _Stream] = {}
        self._resumable: list[_Stream] = []
        self._may_pump = False
        self._in_window = limits.connection_window
        self._pending = 0
        self._out_window = 65535
        self._peer_window = 65535
        self._peer_max_streams = ASSUMED_MAX_STREAMS
        self._peer_connect = False
        self._pings: deque[bytes] = deque()
        self._draining = False  # goaway() was called
        self._last_accepted = MAX_STREAM_ID  # as our last GOAWAY says
        self._peer_goaway = MAX_STREAM_ID + 1
        self._glitches = Budget(limits.glitches, limits.glitches_per_s)
        self._resets = Budget(limits.resets, limits.resets_per_s)
        self._events: list[Event] = []

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {list(self._streams.values())} windows={self._in_window}/{self._out_window} "
            f"draining={self._draining} dead={self._dead}>"
        )

    # --- what the driver asks

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def buffered(self) -> int:
        return self._framing.buffered

    @property
    def is_draining(self) -> bool:
        """No new streams: we said so, or the peer did."""
        return self._draining or self._peer_goaway <= MAX_STREAM_ID

    @property
    def must_close(self) -> bool:
        if self._dead or self._closed:
            return True
        drained = self._peer_goaway <= MAX_STREAM_ID or (self._draining and self._last_accepted < MAX_STREAM_ID)
        return drained and not self._streams

    @property
    def settings_acked(self) -> bool:
        return not self._settings_unacked

    @property
    def stalled_streams(self) -> list[int]:
        """Streams that wait for the peer's windows."""
        return list(self._blocked)

    def is_blocked(self, stream_id: int) -> bool:
        return stream_id in self._blocked

    def queued(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        return stream.queued if stream else 0

    def statistics(self) -> dict[str, int]:
        return {
            "streams": len(self._streams),
            "blocked": len(self._blocked),
            "queued": sum(stream.queued for stream in self._streams.values()),
            "owed": sum(self._owed.values()) + sum(stream.unacked for stream in self._streams.values()),
            "in_window": self._in_window,
            "out_window": self._out_window,
            "glitches_left": max(0, int(self._glitches.left)),
            "resets_left": max(0, int(self._resets.left)),
            "buffered": self._framing.buffered,
        }

    # --- out

    def take_output(self) -> list[bytes]:
        out = self._library.take()
        return [out] if out else []

    def _finish(self, stream: _Stream) -> None:
        """Writes END_STREAM."""
        self._library.end(stream.id)
        self._finished(stream)

    def _finished(self, stream: _Stream) -> None:
        """END_STREAM is written."""
        stream.out_ended = True
        if stream.in_ended:
            self._close(stream)
        elif not self._client and not stream.tunnel:
            # The response is complete, the request is not: its rest is not wanted (RFC 9113 section 8.1).
            self._library.reset(stream.id, Code.NO_ERROR)
            self._remember(stream.id)
            self._close(stream)

    def send(self, stream_id: int, event: Event) -> Sequence[bytes]:
        """LocalProtocolError changes nothing: the stream can be reset. On streams that are over, nothing happens."""
        if self._dead:
            raise LocalProtocolError("send on a broken connection")
        stream = self._streams.get(stream_id)
        if isinstance(event, RequestHead):
            self._send_request(stream_id, event)
        elif stream is None:
            if not self._was_stream(stream_id):
                raise LocalProtocolError(f"there is no stream {stream_id}")
        elif stream.end_sent:
            raise LocalProtocolError("send behind the end of the message")
        elif isinstance(event, ResponseHead):
            self._send_response(stream, event)
        elif isinstance(event, Informational):
            self._send_informational(stream, event)
        elif isinstance(event, Data):
            self._send_data(stream, event.data)
        elif isinstance(event, Trailers):
            self._send_trailers(stream, event.headers)
        elif isinstance(event, End):
            self._send_end(stream)
        else:
            raise LocalProtocolError(f"nobody sends {type(event).__name__}")
        return ()

    def _was_stream(self, stream_id: int) -> bool:
        return stream_id % 2 == 1 and 0 < stream_id < (self._next_id if self._client else self._highest + 1)

    def _send_request(self, stream_id: int, event: RequestHead) -> None:
        if not self._client:
            raise LocalProtocolError("a server does not send RequestHead")
        if stream_id != self._next_id:
            raise LocalProtocolError(f"the next stream is {self._next_id}")
        if not self._may_open():
            raise LocalProtocolError("the connection takes no more streams")
        if event.protocol and not self._peer_connect:
            raise LocalProtocolError("the server does not know extended CONNECT")
        fields, length = request_fields(event)
        stream = _Stream(stream_id, self._limits.stream_window, self._peer_window)
        self._next_id += 2
        self._streams[stream_id] = stream
        stream.out_head = True
        stream.length_out = length
        stream.connect = event.method == b"CONNECT"
        stream.head_method = event.method == b"HEAD"
        self._library.head(stream.id, fields)

    def _may_open(self) -> bool:
        most = min(self._peer_max_streams, self._limits.max_streams)
        return (
            not self.is_draining
            and not self._dead
            and not self._closed
            and len(self._streams) < most
            and self._next_id <= MAX_STREAM_ID
        )

    def _send_response(self, stream: _Stream, event: ResponseHead) -> None:
        if self._client or stream.out_head or event.status < 200:
            raise LocalProtocolError("no ResponseHead is due")
        fields, length = response_fields(event.status, event.headers)
        stream.out_head = True
        stream.no_content_out = stream.head_method or event.status in (204, 304)
        stream.length_out = -1 if stream.no_content_out else length
        granted = stream.connect and event.status < 300
        if granted:
            stream.tunnel = True
            stream.length_out = -1
            fields = [field for field in fields if field[0] != b"content-length"]
            if stream.held:
                self._resumable.append(stream)
        elif stream.connect:
            self._drop_held(stream)
        self._library.head(stream.id, fields)

    def _drop_held(self, stream: _Stream) -> None:
        """The tunnel was not granted: what came for it is nobody's."""
        stream.swallowed = True
        stream.held.clear()
        self._credit_connection(stream.unacked)
        stream.unacked = 0

    def _send_informational(self, stream: _Stream, event: Informational) -> None:
        if self._client or stream.out_head or not 100 <= event.status < 200:
            raise LocalProtocolError("no Informational is due")
        fields, _ = response_fields(event.status, event.headers)
        self._library.informational(stream.id, fields)

    def _check_content(self, stream: _Stream) -> None:
        if not stream.out_head:
            raise LocalProtocolError("content before the head")
        if self._client and stream.connect and not stream.tunnel:
            raise LocalProtocolError("content before the tunnel")
        if stream.trailers is not None:
            raise LocalProtocolError("content behind trailers")

    def _send_data(self, stream: _Stream, data: bytes) -> None:
        self._check_content(stream)
        if stream.no_content_out or not data:
            return
        if stream.length_out >= 0 and len(data) > stream.length_out:
            raise LocalProtocolError(Rule.CONTENT.detail)
        if stream.queued + len(data) > self._limits.max_queued_bytes and stream.id in self._blocked:
            raise LocalProtocolError("content beyond what may be queued for a blocked stream")
        if stream.length_out >= 0:
            stream.length_out -= len(data)
        stream.queue.append(data)
        stream.queued += len(data)
        if stream.id not in self._blocked:
            while stream.queued and self._write_frame(stream):
                pass
            if stream.queued:
                self._blocked[stream.id] = stream

    def _write_frame(self, stream: _Stream) -> bool:
        """The next frame of what is queued, of one piece; False if the windows are closed."""
        data = stream.queue[0]
        size = min(len(data), DATA_FRAME, stream.out_window, self._out_window)
        if size <= 0:
            return False
        if size == len(data):
            stream.queue.popleft()
        else:
            stream.queue[0] = data[size:]
        stream.queued -= size
        stream.out_window -= size
        self._out_window -= size
        self._library.data(stream.id, data[:size])
        self._glitches.earn(CONTENT_EARNS + size // OCTETS_PER_GLITCH)
        return True

    def _send_trailers(self, stream: _Stream, headers: Headers) -> None:
        self._check_content(stream)
        if stream.tunnel:
            raise LocalProtocolError(Rule.TUNNEL_FRAME.detail)
        if stream.length_out > 0:
            raise LocalProtocolError(Rule.CONTENT.detail)
        fields = trailer_fields(headers)
        if not stream.no_content_out and fields:
            stream.trailers = fields

    def _send_end(self, stream: _Stream) -> None:
        if self._client and stream.connect and not stream.tunnel:
            if stream.request_ended:
                raise LocalProtocolError("send behind the end of the message")
            stream.request_ended = True
            if not stream.in_head:
                return  # the request's; the stream stays open for the tunnel
        elif not stream.out_head:
            raise LocalProtocolError("the end before the head")
        if stream.length_out > 0:
            raise LocalProtocolError(Rule.CONTENT.detail)
        stream.end_sent = True
        if not stream.queued:
            self._write_end(stream)

    def _write_end(self, stream: _Stream) -> None:
        if stream.trailers is not None:
            self._library.trailers(stream.id, stream.trailers)
            self._finished(stream)
        else:
            self._finish(stream)

    def _pump(self) -> None:
        """What waits for windows, a frame of each stream in turn."""
        self._may_pump = False
        moved = True
        while moved and self._out_window > 0:
            moved = False
            for stream in list(self._blocked.values()):
                if not self._write_frame(stream):
                    continue
                moved = True
                if not stream.queued:
                    del self._blocked[stream.id]
                    self._events.append(Writable(stream.id))
                    if stream.end_sent:
                        self._write_end(stream)

    def credit(self, stream_id: int, n: int) -> Sequence[bytes]:
        """Octets of Data that were handed out have gone on. Too many are counted as those that there are."""
        if self._dead or n <= 0:
            return ()
        stream = self._streams.get(stream_id)
        if stream is not None:
            n = min(n, stream.unacked)
            stream.unacked -= n
            self._credit_stream(stream, n)
            self._credit_connection(n)
        elif stream_id in self._owed:
            n = min(n, self._owed[stream_id])
            self._owed[stream_id] -= n
            if not self._owed[stream_id]:
                del self._owed[stream_id]
            self._credit_connection(n)
        return ()

    def _credit_stream(self, stream: _Stream, n: int) -> None:
        stream.pending += n
        if stream.pending * 2 >= self._limits.stream_window and not stream.in_ended:
            stream.in_window += stream.pending
            self._library.window(stream.pending, stream.id)
            stream.pending = 0

    def _credit_connection(self, n: int) -> None:
        self._pending += n
        if self._pending * 2 >= self._limits.connection_window and not self._dead:
            self._in_window += self._pending
            self._library.window(self._pending)
            self._pending = 0

    def reset(self, stream_id: int, reason: str, code: int = Code.CANCEL) -> Sequence[bytes]:
        if self._dead:
            return ()
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._reset_stream(stream, code)
        else:
            self._credit_connection(self._owed.pop(stream_id, 0))
        return ()

    def _reset_stream(self, stream: _Stream, code: int) -> None:
        self._library.reset(stream.id, code)
        self._remember(stream.id)
        self._give_up(stream)

    def _remember(self, stream_id: int) -> None:
        self._reset_by_us[stream_id] = None
        if len(self._reset_by_us) > MAX_REMEMBERED_RESETS:
            del self._reset_by_us[next(iter(self._reset_by_us))]

    def _close(self, stream: _Stream) -> None:
        """The exchange is complete."""
        del self._streams[stream.id]
        self._blocked.pop(stream.id, None)
        if stream.unacked:
            self._owed[stream.id] = stream.unacked
        self._glitches.earn(EXCHANGE_EARNS)
        self._resets.earn(1)

    def _give_up(self, stream: _Stream) -> None:
        del self._streams[stream.id]
        self._blocked.pop(stream.id, None)
        stream.swallowed = True
        stream.held.clear()
        self._credit_connection(stream.unacked)

    def goaway(self) -> Sequence[bytes]:
        """No new streams. A server does it in two steps, so that no request on its way is lost (RFC 9113 section 6.8):
        it takes new ones until the client has seen the first. A second call takes the second step at once."""
        if self._dead:
            return ()
        if self._client:
            if not self._draining:
                self._write_goaway(0, Code.NO_ERROR)
        elif not self._draining:
            self._write_goaway(MAX_STREAM_ID, Code.NO_ERROR)
            self._library.ping(DRAIN_PING)
        elif self._last_accepted == MAX_STREAM_ID:
            self._write_goaway(self._highest, Code.NO_ERROR)
        self._draining = True
        return ()

    def _write_goaway(self, last: int, code: int, detail: bytes = b"") -> None:
        self._last_accepted = last
        self._library.goaway(last, code, detail)

    def ping(self, data: bytes) -> Sequence[bytes]:
        """Asks the peer for a sign of life: PingAck with the same eight octets."""
        if self._dead:
            raise LocalProtocolError("ping on a broken connection")
        if len(data) != 8 or data == DRAIN_PING or len(self._pings) >= MAX_PINGS:
            raise LocalProtocolError("a ping has eight octets, and only some may be without answer")
        self._pings.append(data)
        self._library.ping(data)
        return ()

    # --- in

    def receive(self, data: bytes, now: float = 0.0) -> list[Event]:
        if self._dead or self._closed:
            return []
        self._now = now
        self._library.flush()
        if not data:
            return self._receive_eof()
        self._framing.push(data)
        self._events = []
        self._read()
        if self._may_pump:
            self._pump()
        events, self._events = self._events, []
        return events

    def _receive_eof(self) -> list[Event]:
        self._closed = True
        events: list[Event] = []
        for stream in list(self._streams.values()):
            events.append(Reset(stream.id, "the peer closed the connection", Code.CANCEL))
            self._streams.pop(stream.id)
        self._blocked.clear()
        events.append(ConnectionClosed())
        return events

    def _fail(self, rule: Rule) -> NoReturn:
        self._write_goaway(0 if self._client else self._highest, rule.code, rule.detail.encode())
        self._dead = True
        self._streams.clear()
        self._blocked.clear()
        self._framing = Framing(self._limits, client=self._client)
        raise RemoteProtocolError(rule.detail)

    def _glitch(self) -> None:
        if not self._glitches.charge(self._now):
            self._fail(Rule.GLITCHES)

    def _charge_reset(self) -> None:
        if self._client:
            self._glitch()
        elif not self._resets.charge(self._now):
            self._fail(Rule.RESETS)

    def _stream_error(self, stream: _Stream, rule: Rule) -> None:
        self._reset_stream(stream, rule.code)
        self._events.append(Reset(stream.id, rule.detail, rule.code, ours=True))
        self._charge_reset()

    def _read(self) -> None:
        while True:
            try:
                piece = self._framing.next()
            except MalformedError as exc:
                self._fail(exc.rule)
            if piece is None:
                return
            self._read_piece(piece)

    def _read_piece(self, piece: Piece) -> None:
        match piece.kind:
            case Frame.DATA:
                self._read_data(piece)
            case Frame.HEADERS | Frame.CONTINUATION:
                if piece.kind == Frame.CONTINUATION and not piece.content:
                    self._glitch()
                if piece.block is not None:
                    self._read_block(piece.stream_id, piece.block, ends=bool(piece.flags & Flag.END_STREAM))
            case Frame.RST_STREAM:
                self._read_rst(piece.stream_id, piece.raw)
            case Frame.SETTINGS:
                self._read_settings(piece.flags, piece.content)
            case Frame.PING:
                self._read_ping(piece.flags, piece.raw)
            case Frame.GOAWAY:
                self._read_goaway(piece.content)
            case Frame.WINDOW_UPDATE:
                self._read_window_update(piece.stream_id, piece.raw)
            case _:
                self._glitch()

    def _is_closed(self, stream_id: int) -> bool:
        """Of a stream that is not there: it was once. Fails when it is one that the peer can't speak of."""
        if self._was_stream(stream_id):
            return True
        if not self._client and stream_id % 2 and stream_id > self._last_accepted:
            return True  # behind our GOAWAY
        self._fail(Rule.IDLE)

    def _answer_closed(self, stream_id: int) -> None:
        """A frame of a stream that is over. It may have been on its way when we reset it (RFC 9113 section 5.1)."""
        self._glitch()
        if stream_id not in self._reset_by_us and stream_id <= self._last_accepted:
            self._library.reset(stream_id, Code.STREAM_CLOSED, known=False)

    # DATA

    def _read_data(self, piece: Piece) -> None:
        stream_id, data = piece.stream_id, piece.content
        size = len(piece.raw) - 9
        stream = self._streams.get(stream_id)
        if stream is None:
            self._is_closed(stream_id)
        if size > self._in_window:
            self._fail(Rule.WINDOW_EXCEEDED)
        if stream is not None and not stream.in_ended and size > stream.in_window:
            self._fail(Rule.WINDOW_EXCEEDED)
        self._in_window -= size
        ends = bool(piece.flags & Flag.END_STREAM)
        if stream is None:
            self._ignored(size)
            self._answer_closed(stream_id)
            return
        rule = self._check_data(stream, len(data), ends=ends)
        if rule is not None:
            self._ignored(size)
            self._stream_error(stream, rule)
            return
        stream.in_window -= size
        self._library.feed_data(piece.raw, data)
        if stream.length_in >= 0:
            stream.length_in -= len(data)
        if data:
            self._glitches.earn(CONTENT_EARNS + len(data) // OCTETS_PER_GLITCH)
        elif not ends:
            self._glitch()
        padding = size - len(data)
        if stream.swallowed:
            self._credit_connection(size)
        else:
            if padding:
                self._credit_connection(padding)
                if not ends:
                    self._credit_stream(stream, padding)
            if data:
                stream.unacked += len(data)
                self._hand_out(stream, Data(stream_id, data))
        if ends:
            self._end_in(stream)

    def _ignored(self, size: int) -> None:
        """DATA that h2 does not see has used the connection's window all the same."""
        self._library.ignored(size)
        self._credit_connection(size)

    def _check_data(self, stream: _Stream, size: int, *, ends: bool) -> Rule | None:
        if stream.in_ended:
            return Rule.STREAM_CLOSED
        if not stream.in_head:
            return Rule.NO_HEAD
        if stream.length_in >= 0 and (size > stream.length_in or (ends and size != stream.length_in)):
            return Rule.NO_CONTENT if self._client and stream.head_method else Rule.CONTENT
        return None

    def _hand_out(self, stream: _Stream, event: Event) -> None:
        if stream.connect and not self._client and not stream.tunnel:
            stream.held.append(event)
        else:
            self._events.append(event)

    def _end_in(self, stream: _Stream) -> None:
        stream.in_ended = True
        if not stream.swallowed:
            self._hand_out(stream, End(stream.id))
        if stream.out_ended:
            self._close(stream)

    # HEADERS and CONTINUATION

    def _too_large(self, fields: Headers) -> bool:
        return len(fields) > self._limits.max_headers or list_size(fields) > self._limits.max_header_list_bytes

    def _read_block(self, stream_id: int, block: bytes, *, ends: bool) -> None:
        if self._client and stream_id >= self._next_id:
            self._fail(Rule.IDLE)
        try:
            fields = self._framing.decode(block)
        except MalformedError as exc:
            self._fail(exc.rule)
        stream = self._streams.get(stream_id)
        if stream is not None:
            if stream.in_ended:
                self._stream_error(stream, Rule.STREAM_CLOSED)
                return
            try:
                if self._client and not stream.in_head:
                    self._read_response(stream, fields, ends=ends)
                else:
                    self._read_trailers(stream, fields, ends=ends)
            except MalformedError as exc:
                self._stream_error(stream, exc.rule)
        elif self._client or stream_id <= self._highest or stream_id > self._last_accepted:
            self._answer_closed(stream_id)
        else:
            self._highest = stream_id
            try:
                self._read_request(stream_id, fields, ends=ends)
            except MalformedError as exc:
                self._refuse(stream_id, exc.rule)

    def _refuse(self, stream_id: int, rule: Rule) -> None:
        self._library.reset(stream_id, rule.code, known=False)
        self._remember(stream_id)
        self._events.append(Reset(stream_id, rule.detail, rule.code, ours=True))
        self._charge_reset()

    def _read_request(self, stream_id: int, fields: Headers, *, ends: bool) -> None:
        if len(self._streams) >= self._limits.max_streams:
            raise MalformedError(Rule.TOO_MANY)
        stream = _Stream(stream_id, self._limits.stream_window, self._peer_window)
        stream.in_head = True
        if self._too_large(fields):
            stream.swallowed = True
            self._streams[stream_id] = stream
            self._library.feed_head(stream_id, _SUBSTITUTE, REQUEST, end_stream=ends, length=-1)
            self._events.append(RequestRefused(stream_id, 431, Rule.LIST_SIZE.detail))
            stream.in_ended = ends
            self._charge_reset()
            return
        head, length = read_request(stream_id, fields, connect_protocol=self._limits.connect_protocol)
        if ends and length > 0:
            raise MalformedError(Rule.CONTENT)
        self._streams[stream_id] = stream
        stream.length_in = length
        stream.head_method = head.method == b"HEAD"
        stream.connect = head.method == b"CONNECT"
        self._library.feed_head(stream_id, fields, REQUEST, end_stream=ends, length=length)
        self._events.append(head)
        if stream.connect:
            self._events.append(End(stream_id))
        if ends:
            self._end_in(stream)

    def _read_response(self, stream: _Stream, fields: Headers, *, ends: bool) -> None:
        if self._too_large(fields):
            raise MalformedError(Rule.LIST_SIZE)
        status, headers, length = read_response(fields)
        if status < 200:
            if ends or status == 101:
                raise MalformedError(Rule.INFORMATIONAL)
            self._glitch()
            self._library.feed_head(stream.id, fields, INFORMATIONAL, end_stream=False, length=length)
            self._events.append(Informational(stream.id, status, headers))
            return
        granted = stream.connect and status < 300
        if granted:
            length = -1
        elif stream.head_method or status in (204, 304):
            length = 0
        if ends and length > 0:
            raise MalformedError(Rule.CONTENT)
        fed = -1 if status in (204, 304) else length
        self._library.feed_head(stream.id, fields, RESPONSE, end_stream=ends, length=fed)
        stream.in_head = True
        stream.length_in = length
        stream.tunnel = granted
        self._events.append(ResponseHead(stream.id, status, headers, b"2"))
        if stream.connect and not granted and stream.request_ended:
            # The request is over after all, since there is no tunnel.
            stream.end_sent = True
            self._finish(stream)
        if ends:
            self._end_in(stream)

    def _read_trailers(self, stream: _Stream, fields: Headers, *, ends: bool) -> None:
        if not ends:
            raise MalformedError(Rule.TRAILERS_NOT_LAST)
        if stream.tunnel or (stream.connect and not self._client):
            raise MalformedError(Rule.TUNNEL_FRAME)
        if self._too_large(fields):
            raise MalformedError(Rule.LIST_SIZE)
        trailers = read_trailers(fields)
        if stream.length_in > 0:
            raise MalformedError(Rule.CONTENT)
        self._library.feed_head(stream.id, fields, TRAILERS, end_stream=True, length=0)
        if trailers and not stream.swallowed:
            self._events.append(Trailers(stream.id, trailers))
        self._end_in(stream)

    # The other frames

    def _read_rst(self, stream_id: int, raw: bytes) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            self._is_closed(stream_id)
            self._glitch()
            return
        code = int.from_bytes(raw[9:13], "big")
        self._library.feed(raw)
        self._give_up(stream)
        untouched = self._client and code == Code.REFUSED_STREAM and not stream.in_head
        self._events.append(Reset(stream_id, f"the peer reset the stream: {code_name(code)}", code, untouched))
        if not self._client:
            self._charge_reset()

    def _read_settings(self, flags: int, payload: bytes) -> None:
        if flags & Flag.ACK:
            if not self._settings_unacked:
                self._glitch()
                return
            self._settings_unacked -= 1
            self._library.feed(frame(Frame.SETTINGS, Flag.ACK, 0, b""))
            return
        if self._settings_seen:
            self._glitch()
        self._settings_seen = True
        if len(payload) > MAX_SETTINGS_ENTRIES * _SETTING.size:
            self._fail(Rule.SETTING_COUNT)
        known: dict[int, int] = {}
        for setting, value in _SETTING.iter_unpack(payload):
            self._check_setting(setting, value)
            if setting in Setting.__members__.values():
                known[setting] = value
        window = known.get(Setting.INITIAL_WINDOW_SIZE, self._peer_window)
        change = window - self._peer_window
        if change > 0 and any(stream.out_window + change > MAX_WINDOW for stream in self._streams.values()):
            self._fail(Rule.SETTING_WINDOW)
        # What our encoder keeps is bounded by us, too.
        if Setting.HEADER_TABLE_SIZE in known:
            known[Setting.HEADER_TABLE_SIZE] = min(known[Setting.HEADER_TABLE_SIZE], 4096)
        self._library.feed_settings(
            frame(Frame.SETTINGS, 0, 0, b"".join(_SETTING.pack(*entry) for entry in known.items()))
        )
        self._peer_window = window
        for stream in self._streams.values():
            stream.out_window += change
        self._peer_max_streams = known.get(Setting.MAX_CONCURRENT_STREAMS, self._peer_max_streams)
        self._peer_connect = bool(known.get(Setting.ENABLE_CONNECT_PROTOCOL, self._peer_connect))
        self._events.append(PeerSettings(self._peer_max_streams, self._peer_connect))
        self._may_pump = True

    def _check_setting(self, setting: int, value: int) -> None:
        if setting == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            self._fail(Rule.SETTING_WINDOW)
        if setting == Setting.MAX_FRAME_SIZE and not DATA_FRAME <= value < 2**24:
            self._fail(Rule.SETTING)
        if setting == Setting.ENABLE_PUSH and value > (0 if self._client else 1):
            self._fail(Rule.SETTING)
        if setting == Setting.ENABLE_CONNECT_PROTOCOL and (value > 1 or (value == 0 and self._peer_connect)):
            self._fail(Rule.SETTING)

    def _read_ping(self, flags: int, raw: bytes) -> None:
        if not flags & Flag.ACK:
            self._glitch()
            self._library.feed(raw)
            return
        data = raw[9:]
        if self._pings and self._pings[0] == data:
            self._pings.popleft()
            self._events.append(PingAck(data))
        elif data == DRAIN_PING and self._draining and not self._client and self._last_accepted == MAX_STREAM_ID:
            self._write_goaway(self._highest, Code.NO_ERROR)
        else:
            self._glitch()

    def _read_goaway(self, payload: bytes) -> None:
        last, code = struct.unpack_from(">LL", payload)
        last &= MAX_STREAM_ID
        self._glitch()
        self._peer_goaway = min(self._peer_goaway, last)
        self._events.append(GoAway(last, code, f"{code_name(code)} {payload[8:200]!r}"))
        if self._client:
            for stream in [stream for stream in self._streams.values() if stream.id > last]:
                self._library.reset(stream.id, Code.CANCEL)
                self._remember(stream.id)
                self._give_up(stream)
                self._events.append(Reset(stream.id, "the peer goes away", Code.REFUSED_STREAM, untouched=True))

    def _read_window_update(self, stream_id: int, raw: bytes) -> None:
        self._glitch()
        increment = int.from_bytes(raw[9:13], "big") & MAX_WINDOW
        if stream_id == 0:
            if increment == 0:
                self._fail(Rule.WINDOW_ZERO)
            if self._out_window + increment > MAX_WINDOW:
                self._fail(Rule.WINDOW_OVERFLOW)
            self._out_window += increment
        else:
            stream = self._streams.get(stream_id)
            if stream is None:
                self._is_closed(stream_id)
                return
            if increment == 0:
                self._stream_error(stream, Rule.WINDOW_ZERO)
                return
            if stream.out_window + increment > MAX_WINDOW:
                self._stream_error(stream, Rule.WINDOW_OVERFLOW)
                return
            stream.out_window += increment
        # Without the reserved bit, which h2 takes for part of the number (RFC 9113 section 6.9: it is ignored).
        self._library.feed(raw[:9] + increment.to_bytes(4, "big"))
        self._may_pump = True


class H2ReferenceServer(_Connection):
    """Our side of a downstream connection: requests in, responses out."""

    _client = False

    @property
    def reusable(self) -> bool:
        return not self._dead and not self._closed and not self.is_draining

    def resume(self) -> list[Event]:
        """What came for tunnels before they were granted. To be called after the head that grants one."""
        streams, self._resumable = self._resumable, []
        events: list[Event] = []
        for stream in streams:
            events += stream.held
            stream.held = []
        return events


class H2ReferenceClient(_Connection):
    """Our side of an upstream connection: requests out, responses in."""

    _client = True

    @property
    def reusable(self) -> bool:
        """Another stream may be opened now."""
        return self._may_open()

    @property
    def next_stream_id(self) -> int:
        return self._next_id

    @property
    def free_streams(self) -> int:
        """How many more may be opened now."""
        most = min(self._peer_max_streams, self._limits.max_streams)
        return max(0, most - len(self._streams)) if self._may_open() else 0

    @property
    def connect_protocol(self) -> bool:
        """The server knows extended CONNECT."""
        return self._peer_connect
