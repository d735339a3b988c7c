"""HTTP/2 frames made by hand, and what was written taken apart again."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import hpack

from netproxy.codec.events import Data, Event
from netproxy.codec.h2 import PREFACE, H2Client, H2Server
from netproxy.codec.h2_strict import Flag, Frame, Setting
from netproxy.errors import RemoteProtocolError

REQUEST = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.example"), (b":path", b"/")]
POST = [(b":method", b"POST"), *REQUEST[1:]]
RESPONSE = [(b":status", b"200")]


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def block(fields: Iterable[tuple[bytes, bytes]], *, huffman: bool = False) -> bytes:
    """Encoded without any use of the dynamic table."""
    out = b""
    for name, value in fields:
        encoder = hpack.Encoder()
        encoder.header_table_size = 0
        out += encoder.encode([hpack.NeverIndexedHeaderTuple(name, value)], huffman=huffman).lstrip(b"\x20")
    return out


def headers(
    stream_id: int,
    fields: Iterable[tuple[bytes, bytes]] | bytes = REQUEST,
    *,
    end: bool = False,
    whole: bool = True,
    flags: int = 0,
) -> bytes:
    flags |= (Flag.END_STREAM if end else 0) | (Flag.END_HEADERS if whole else 0)
    return frame(Frame.HEADERS, flags, stream_id, fields if isinstance(fields, bytes) else block(fields))


def continuation(stream_id: int, fragment: bytes, *, whole: bool = True) -> bytes:
    return frame(Frame.CONTINUATION, Flag.END_HEADERS if whole else 0, stream_id, fragment)


def data(stream_id: int, octets: bytes = b"", *, end: bool = False, padding: int | None = None) -> bytes:
    flags = Flag.END_STREAM if end else 0
    if padding is not None:
        flags |= Flag.PADDED
        octets = bytes((padding,)) + octets + bytes(padding)
    return frame(Frame.DATA, flags, stream_id, octets)


def rst(stream_id: int, code: int = 8) -> bytes:
    return frame(Frame.RST_STREAM, 0, stream_id, struct.pack(">L", code))


def settings(*entries: tuple[int, int]) -> bytes:
    return frame(Frame.SETTINGS, 0, 0, b"".join(struct.pack(">HL", *entry) for entry in entries))


def window(stream_id: int, increment: int) -> bytes:
    return frame(Frame.WINDOW_UPDATE, 0, stream_id, struct.pack(">L", increment))


def ping(octets: bytes = b"12345678", *, ack: bool = False) -> bytes:
    return frame(Frame.PING, Flag.ACK if ack else 0, 0, octets)


def goaway(last: int, code: int = 0, detail: bytes = b"") -> bytes:
    return frame(Frame.GOAWAY, 0, 0, struct.pack(">LL", last, code) + detail)


SETTINGS_ACK = frame(Frame.SETTINGS, Flag.ACK)
CLIENT_START = PREFACE + settings() + SETTINGS_ACK
SERVER_START = settings((Setting.ENABLE_CONNECT_PROTOCOL, 1)) + SETTINGS_ACK


class Written(NamedTuple):
    """A frame that an engine wrote. `content`: octets; of HEADERS fields (with CONTINUATION), of SETTINGS pairs."""

    kind: Frame
    flags: int
    stream_id: int
    content: Any


class Reader:
    """Takes apart what an engine writes. Its frames are whole in each piece of output."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=2**31)

    def frames(self, octets: bytes) -> list[Written]:
        out: list[Written] = []
        octets = octets.removeprefix(PREFACE)
        open_block: tuple[int, int, bytes] | None = None
        while octets:
            size, kind, flags = int.from_bytes(octets[:3], "big"), Frame(octets[3]), octets[4]
            stream_id = int.from_bytes(octets[5:9], "big")
            payload, octets = octets[9 : 9 + size], octets[9 + size :]
            assert len(payload) == size
            if kind in (Frame.HEADERS, Frame.CONTINUATION):
                assert (kind is Frame.CONTINUATION) == (open_block is not None)
                first = open_block or (stream_id, flags, b"")
                open_block = (first[0], first[1], first[2] + payload)
                assert stream_id == first[0]
                if flags & Flag.END_HEADERS:
                    fields = [(bytes(n), bytes(v)) for n, v in self._decoder.decode(open_block[2], raw=True)]
                    out.append(Written(Frame.HEADERS, first[1] & Flag.END_STREAM, stream_id, fields))
                    open_block = None
            elif kind is Frame.SETTINGS:
                out.append(Written(kind, flags, stream_id, sorted(struct.iter_unpack(">HL", payload))))
            else:
                out.append(Written(kind, flags, stream_id, payload))
        assert open_block is None
        return out


def written(engine: H2Server | H2Client, reader: Reader | None = None) -> list[Written]:
    return (reader or Reader()).frames(b"".join(engine.take_output()))


def number(octets: bytes) -> int:
    return int.from_bytes(octets[:4], "big")


def codes(frames: Sequence[Written], kind: Frame) -> list[int]:
    """Codes of the RST_STREAM or GOAWAY frames."""
    return [number(f.content[-4:] if kind is Frame.RST_STREAM else f.content[4:8]) for f in frames if f.kind is kind]


class Outcome(NamedTuple):
    """Events with neighbouring Data of a stream merged, and the error they ended with."""

    events: list[Event]
    detail: str = ""


def merged(events: Iterable[Event]) -> list[Event]:
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Data) and isinstance(last, Data) and last.stream_id == event.stream_id:
            out[-1] = Data(last.stream_id, last.data + event.data)
        else:
            out.append(event)
    return out


def play(engine: H2Server | H2Client, parts: Iterable[bytes]) -> Outcome:
    seen: list[Event] = []
    try:
        for part in parts:
            seen += engine.receive(part)
    except RemoteProtocolError as exc:
        return Outcome(merged(seen), exc.detail)
    return Outcome(merged(seen))
