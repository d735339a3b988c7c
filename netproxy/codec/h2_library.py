"""The library h2 as the reference engine uses it: it writes what goes out, and reads again what was read.

h2 sees no header block as it came, but one that holds what was read from it, and nothing of streams that are over:
its own answers to those are not ours. What it refuses of all that is an AssertionError. GOAWAY is written past it,
since h2 takes the connection for closed then, and so is RST_STREAM of streams that it does not know.
"""

from __future__ import annotations

import struct
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
import hyperframe.frame

from netproxy.codec.events import Headers
from netproxy.codec.h2_framing import frame
from netproxy.codec.h2_strict import PREFACE, Frame, H2Limits

REQUEST = h2.events.RequestReceived
RESPONSE = h2.events.ResponseReceived
INFORMATIONAL = h2.events.InformationalResponseReceived
TRAILERS = h2.events.TrailersReceived


class Library:
    """One side of one connection."""

    def __init__(self, limits: H2Limits, *, client: bool) -> None:
        settings = {
            h2.settings.SettingCodes.ENABLE_PUSH: 0,
            h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window,
            h2.settings.SettingCodes.MAX_FRAME_SIZE: limits.max_frame_bytes,
            h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_list_bytes,
        }
        if not client:
            settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = limits.max_streams
            if limits.connect_protocol:
                settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
        config = h2.config.H2Configuration(client_side=client, header_encoding=None, normalize_inbound_headers=False)
        self._h2 = conn = h2.connection.H2Connection(config)
        conn.local_settings = h2.settings.Settings(client=client, initial_values=settings)
        conn.max_inbound_frame_size = 2**24 - 1  # of vetted frames
        conn.decoder.max_header_list_size = 2**31
        self._encoder = hpack.Encoder()  # between us and h2
        self._out = bytearray()
        self._tail: tuple[int, Headers | bytes] | None = None  # a stream's last frame, not yet written
        conn.initiate_connection()
        if not client:
            conn.receive_data(PREFACE)
        if limits.connection_window > 65535:
            conn.increment_flow_control_window(limits.connection_window - 65535)

    # Out.

    def take(self) -> bytes:
        self.flush()
        out = bytes(self._out) + self._h2.data_to_send()
        self._out.clear()
        return out

    def flush(self, *, end_stream: bool = False) -> None:
        """The last frame is written; nothing is put into it any more."""
        if self._tail is None:
            return
        stream_id, content = self._tail
        self._tail = None
        if isinstance(content, bytes):
            self._h2.send_data(stream_id, content, end_stream)
        else:
            self._h2.send_headers(stream_id, content, end_stream)

    def head(self, stream_id: int, fields: Headers) -> None:
        self.flush()
        self._tail = (stream_id, fields)

    def data(self, stream_id: int, octets: bytes) -> None:
        self.flush()
        self._tail = (stream_id, octets)

    def end(self, stream_id: int) -> None:
        if self._tail is not None and self._tail[0] == stream_id:
            self.flush(end_stream=True)
        else:
            self.flush()
            self._h2.end_stream(stream_id)

    def informational(self, stream_id: int, fields: Headers) -> None:
        self.flush()
        self._h2.send_headers(stream_id, fields)

    def trailers(self, stream_id: int, fields: Headers) -> None:
        self.flush()
        self._h2.send_headers(stream_id, fields, end_stream=True)

    def reset(self, stream_id: int, code: int, *, known: bool = True) -> None:
        self.flush()
        if known:
            self._h2.reset_stream(stream_id, code)
        else:
            self._write(frame(Frame.RST_STREAM, 0, stream_id, struct.pack(">L", code)))

    def window(self, increment: int, stream_id: int | None = None) -> None:
        self.flush()
        self._h2.increment_flow_control_window(increment, stream_id)

    def ping(self, octets: bytes) -> None:
        self.flush()
        self._h2.ping(octets)

    def goaway(self, last: int, code: int, detail: bytes) -> None:
        self.flush()
        self._write(frame(Frame.GOAWAY, 0, 0, struct.pack(">LL", last, code) + detail))

    def _write(self, octets: bytes) -> None:
        self._out += self._h2.data_to_send() + octets

    # In.

    def feed(self, raw: bytes) -> list[h2.events.Event]:
        """A frame that keeps the rules."""
        self.flush()
        try:
            return self._h2.receive_data(raw)
        except h2.exceptions.H2Error as exc:
            raise AssertionError(f"h2 refuses a vetted frame: {exc!r}") from exc

    def feed_settings(self, raw: bytes) -> None:
        # h2 changes the windows of closed streams too, and fails when one overflows, until it counts the open ones.
        _ = self._h2.open_inbound_streams, self._h2.open_outbound_streams
        self.feed(raw)

    def feed_data(self, raw: bytes, content: bytes) -> None:
        for event in self.feed(raw):
            assert not isinstance(event, h2.events.DataReceived) or event.data == content, event

    def feed_head(self, stream_id: int, fields: Headers, kind: type[Any], *, end_stream: bool, length: int) -> None:
        """`length`: h2 shall not look at Content-Length if it is -1."""
        if length < 0:
            fields = [field for field in fields if field[0] != b"content-length"]
        whole = hyperframe.frame.HeadersFrame(stream_id, flags=["END_HEADERS"])
        if end_stream:
            whole.flags.add("END_STREAM")
        whole.data = self._encoder.encode(fields, huffman=False)
        events = self.feed(whole.serialize())
        assert events and isinstance(events[0], kind), events
        assert [tuple(field) for field in events[0].headers] == fields, events

    def ignored(self, size: int) -> None:
        """DATA that h2 was not given has used the connection's window all the same."""
        self._h2._inbound_flow_control_window_manager.window_consumed(size)
