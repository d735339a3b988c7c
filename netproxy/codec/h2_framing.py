"""HTTP/2 octets -> whole frames, each of a size and at a place where it may be; header blocks put together and decoded.

What the reference engine reads from. It keeps at most one frame and one header block. What it refuses depends on the
octets alone, never on how they were cut up, and always ends the connection: streams are not known here.

    reads               goes to
    PREFACE             the client's 24 octets (a server only)               SETTINGS
    SETTINGS            one frame, SETTINGS and no acknowledgement           FRAMES
    FRAMES              any frame but CONTINUATION and PUSH_PROMISE          BLOCK after HEADERS without END_HEADERS
    BLOCK               CONTINUATION of the same stream                      FRAMES after END_HEADERS
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import hpack
from hpack.exceptions import HPACKError, OversizedHeaderListError

from netproxy.codec.events import Headers
from netproxy.codec.h2_strict import HEADER_BOMB, MAX_STREAM_ID, PREFACE, Flag, Frame, H2Limits, MalformedError, Rule

_HEADER = struct.Struct(">HBBBL")
_FIXED_SIZES = {Frame.PRIORITY: 5, Frame.RST_STREAM: 4, Frame.PING: 8, Frame.WINDOW_UPDATE: 4}
_OF_STREAMS = (Frame.DATA, Frame.HEADERS, Frame.PRIORITY, Frame.RST_STREAM, Frame.CONTINUATION)
_OF_THE_CONNECTION = (Frame.SETTINGS, Frame.PING, Frame.GOAWAY)


class Piece(NamedTuple):
    """A frame. `content`: its payload without padding; of the last one of a header block `block` is the whole block."""

    kind: int
    flags: int
    stream_id: int
    raw: bytes
    content: bytes
    block: bytes | None = None


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEADER.pack(size >> 8, size & 255, kind, flags, stream_id) + payload


class Framing:
    """One direction of one connection."""

    def __init__(self, limits: H2Limits, *, client: bool) -> None:
        self._limits = limits
        self._buf = bytearray()
        self._preface_left = b"" if client else PREFACE
        self._settings_seen = False
        self._stream = 0  # whose header block is open
        self._flags = 0
        self._block = bytearray()
        self._frames = 0
        self._decoder = hpack.Decoder(max_header_list_size=HEADER_BOMB * limits.max_header_list_bytes)

    def __repr__(self) -> str:
        return f"<Framing buffered={self.buffered} block of {self._stream}>"

    @property
    def buffered(self) -> int:
        return len(self._buf) + len(self._block)

    def push(self, data: bytes) -> None:
        self._buf += data

    def next(self) -> Piece | None:
        """The next frame, None when more octets are needed. Raises MalformedError."""
        buf = self._buf
        if self._preface_left:
            expected = self._preface_left
            if buf[: len(expected)] != expected[: len(buf)]:
                raise MalformedError(Rule.PREFACE)
            taken = min(len(buf), len(expected))
            self._preface_left = expected[taken:]
            del buf[:taken]
        if len(buf) < 9:
            return None
        high, low, kind, flags, stream_id = _HEADER.unpack_from(buf)
        length = high << 8 | low
        stream_id &= MAX_STREAM_ID
        self._check_header(kind, flags, stream_id, length)
        if len(buf) < 9 + length:
            return None
        raw = bytes(buf[: 9 + length])
        del buf[: 9 + length]
        self._settings_seen = True
        return self._read(kind, flags, stream_id, raw)

    def decode(self, block: bytes) -> Headers:
        """The fields of a block. Raises MalformedError."""
        try:
            return [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError:
            raise MalformedError(Rule.BOMB) from None
        except (HPACKError, IndexError):
            raise MalformedError(Rule.HPACK) from None

    def _check_header(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if length > self._limits.max_frame_bytes:
            raise MalformedError(Rule.FRAME_SIZE)
        if not self._settings_seen and (kind != Frame.SETTINGS or flags & Flag.ACK):
            raise MalformedError(Rule.NO_SETTINGS)
        if self._stream:
            if kind != Frame.CONTINUATION or stream_id != self._stream:
                raise MalformedError(Rule.INTERLEAVED)
        elif kind == Frame.CONTINUATION:
            raise MalformedError(Rule.INTERLEAVED)
        if (stream_id == 0 and kind in _OF_STREAMS) or (stream_id and kind in _OF_THE_CONNECTION):
            raise MalformedError(Rule.STREAM_ZERO)
        if kind == Frame.PUSH_PROMISE:
            raise MalformedError(Rule.PUSH)
        if kind in _FIXED_SIZES and length != _FIXED_SIZES[Frame(kind)]:
            raise MalformedError(Rule.FRAME_SIZE)
        if kind == Frame.SETTINGS and (length % 6 or (flags & Flag.ACK and length)):
            raise MalformedError(Rule.FRAME_SIZE)
        if kind == Frame.GOAWAY and length < 8:
            raise MalformedError(Rule.FRAME_SIZE)

    def _read(self, kind: int, flags: int, stream_id: int, raw: bytes) -> Piece:
        start, end = 9, len(raw)
        if kind in (Frame.DATA, Frame.HEADERS) and flags & Flag.PADDED:
            if end == start or raw[start] >= end - start:
                raise MalformedError(Rule.PADDING)
            start, end = start + 1, end - raw[start]
        if kind == Frame.PRIORITY or (kind == Frame.HEADERS and flags & Flag.PRIORITY):
            if end - start < 5:
                raise MalformedError(Rule.FRAME_SIZE)
            if int.from_bytes(raw[start : start + 4], "big") & MAX_STREAM_ID == stream_id:
                raise MalformedError(Rule.DEPENDS_ON_ITSELF)
            start += 5
        content = raw[start:end]
        if kind == Frame.HEADERS:
            if stream_id % 2 == 0:
                raise MalformedError(Rule.STREAM_ID)
            self._stream = stream_id
            self._flags = flags
            self._frames = 0
        elif kind != Frame.CONTINUATION:
            return Piece(kind, flags, stream_id, raw, content)
        self._frames += 1
        if self._frames > self._limits.max_block_frames:
            raise MalformedError(Rule.BLOCK_FRAMES)
        if len(self._block) + len(content) > self._limits.max_block_bytes:
            raise MalformedError(Rule.BLOCK_SIZE)
        self._block += content
        if not flags & Flag.END_HEADERS:
            return Piece(kind, flags, stream_id, raw, content)
        block = bytes(self._block)
        self._block.clear()
        self._stream = 0
        return Piece(kind, self._flags, stream_id, raw, content, block)
