"""Mutations that know what they change: lines, fields and numbers of HTTP/1, frames and header blocks of HTTP/2.

An input is CONTROL octets, which choose side, limits and what the driver does (see `targets`), and the octets of the
peer behind them. Everything is decided by the `random.Random` that is given, so an input can be made again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from netproxy.codec.h2_strict import MAX_STREAM_ID, Flag, Frame

from ..differential.libraries import frames_of
from ..differential.test_h2 import BAD_FRAMES, NAMES, ODD_FRAMES, REQUESTS, RESPONSES, SETTING_VALUES, TRAILERS, VALUES
from ..unit.codec import h2_frames as h2f
from ..unit.codec.test_h1_properties import FRAGMENTS

CONTROL = 8
MAX_WIRE = 8192
STEPS = (0, 1, 1, 1, 2, 2, 3, 5)

Seeds = Sequence[bytes]


def mutated_h1(data: bytes, seeds: Seeds, rng: random.Random) -> bytes:
    return _mutated(data, seeds, rng, _H1)


def mutated_h2(data: bytes, seeds: Seeds, rng: random.Random) -> bytes:
    return _mutated(data, seeds, rng, _H2)


def _mutated(
    data: bytes, seeds: Seeds, rng: random.Random, ways: Sequence[Callable[[bytes, Seeds, random.Random], bytes]]
) -> bytes:
    control, wire = bytearray(data[:CONTROL].ljust(CONTROL, b"\0")), data[CONTROL:]
    if rng.random() < 0.4:
        control[rng.randrange(CONTROL)] = rng.randrange(256)
    for _ in range(rng.choice(STEPS)):
        wire = rng.choice(ways)(wire, seeds, rng)[:MAX_WIRE]
    return bytes(control) + wire


# --- octets, of both


def _octet(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    at = rng.randint(0, len(wire))
    return wire[:at] + rng.randbytes(rng.randint(0, 2)) + wire[at + rng.randint(0, 2) :]


def _range(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    """Twice, or not at all."""
    begin = rng.randint(0, len(wire))
    end = min(len(wire), begin + rng.randint(1, 60))
    return wire[:end] + wire[begin:] if rng.random() < 0.5 else wire[:begin] + wire[end:]


def _behind(wire: bytes, seeds: Seeds, rng: random.Random) -> bytes:
    """Another message behind it, or it behind another."""
    other = rng.choice(seeds)[CONTROL:]
    return wire + other if rng.random() < 0.7 else other + wire


# --- HTTP/1

_FIELD_NAMES = (
    *(b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade", b"Expect", b"TE", b"Trailer", b"X"),
    *(b"content-length", b"TRANSFER-ENCODING", b"Keep-Alive", b"Proxy-Connection", b"X Y", b"", b"X\xff", b"X:"),
)
_FIELD_VALUES = (
    *(b"a", b"a:80", b"[::1]", b"", b"0", b"2", b"5", b"02", b"5, 5", b"-1", b"+5", b"9" * 19, b"9" * 30, b"0x5"),
    *(b"chunked", b"Chunked", b"gzip, chunked", b"chunked, chunked", b"identity", b"close", b"keep-alive", b"upgrade"),
    *(b"close, host", b"upgrade, close", b"x", b"websocket", b"100-continue", b"trailers", b"a\tb", b"a\x00", b"a\x7f"),
    *(b"\xc3\xa4", b"u@a", b"a b", b"\x0b"),
)
_NUMBERS = (b"0", b"1", b"2", b"5", b"00", b"05", b"F", b"ffffffffffffffff", b"7fffffffffffffff", b"99999", b"-1", b"")
_STARTS = (
    *(b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0", b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1"),
    *(b"GET http://a/ HTTP/1.1", b"GET * HTTP/1.1", b"GET a HTTP/1.1", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET /"),
    *(b"HTTP/1.1 200 OK", b"HTTP/1.1 204", b"HTTP/1.1 304 x", b"HTTP/1.1 100 x", b"HTTP/1.1 101 x", b"HTTP/1.0 200 x"),
    *(b"HTTP/1.1 099 x", b"HTTP/1.1 1000 x", b"GET  / HTTP/1.1", b"GET /#a HTTP/1.1", b"GET /\x80 HTTP/1.1"),
)


def _fragment(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    at = rng.randint(0, len(wire))
    return wire[:at] + rng.choice(FRAGMENTS) + wire[at + rng.choice((0, 0, 1, 3)) :]


def _line(wire: bytes, seeds: Seeds, rng: random.Random) -> bytes:
    lines = wire.split(b"\r\n")
    at = rng.randrange(len(lines))
    match rng.choice(("twice", "gone", "swap", "lf", "cr", "fold", "other", "blank")):
        case "twice":
            lines.insert(rng.randrange(len(lines)), lines[at])
        case "gone":
            del lines[at]
        case "swap":
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case "lf":
            lines[at : at + 2] = [b"\n".join(lines[at : at + 2])]
        case "cr":
            lines[at : at + 2] = [b"\r".join(lines[at : at + 2])]
        case "fold":
            lines[at] = rng.choice((b" ", b"\t")) + lines[at]
        case "other":
            lines[at] = rng.choice(rng.choice(seeds)[CONTROL:].split(b"\r\n"))
        case "blank":
            lines[at] += rng.choice((b" ", b"\t", b"\x0b"))
    return b"\r\n".join(lines)


def _field(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    lines = wire.split(b"\r\n")
    line = rng.choice(_FIELD_NAMES) + rng.choice((b": ", b":", b": ", b" :", b":\t")) + rng.choice(_FIELD_VALUES)
    at = rng.randint(1, min(len(lines), 6))
    lines[at:at] = [line] * rng.choice((1, 1, 1, 2, 5))
    return b"\r\n".join(lines)


def _number(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"[0-9]+", wire))
    if not found:
        return wire
    chosen = rng.choice(found)
    return wire[: chosen.start()] + rng.choice(_NUMBERS) + wire[chosen.end() :]


def _start(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    return rng.choice(_STARTS) + b"\r\n" + wire.partition(b"\r\n")[2]


def _chunked(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    """What is behind the head goes into chunks."""
    head, gap, content = wire.partition(b"\r\n\r\n")
    if not gap:
        return wire
    size = rng.randint(1, 6)
    chunks = [content[at : at + size] for at in range(0, min(len(content), 200), size)]
    extension = rng.choice((b"", b"", b";a", b";a=b", b';a="b"', b" ;a", b";", b";a=\n"))
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    trailer = rng.choice((b"", b"", b"X: y\r\n", b"Content-Length: 1\r\n", b"X:\x00\r\n"))
    return head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n" + trailer + b"\r\n"


_H1 = (_octet, _range, _behind, _fragment, _fragment, _line, _line, _field, _field, _number, _start, _chunked)


# --- HTTP/2


def _streams(frames: list[bytes]) -> list[int]:
    """Those that occur, and the next one behind them last."""
    known = [found for raw in frames if (found := int.from_bytes(raw[5:9], "big") & MAX_STREAM_ID)] or [1]
    return [*known, min(max(known) + 2, MAX_STREAM_ID)]


def _block(rng: random.Random) -> bytes:
    fields = list(rng.choice((REQUESTS, REQUESTS, RESPONSES, RESPONSES, TRAILERS))[rng.randrange(5)])
    for _ in range(rng.choice((0, 0, 1, 2))):
        fields.insert(rng.randint(0, len(fields)), (rng.choice(NAMES), rng.choice(VALUES)))
    if rng.random() < 0.1 and fields:
        del fields[rng.randrange(len(fields))]
    return h2f.block(fields, huffman=rng.random() < 0.3)


def _new_frame(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    frames = frames_of(wire)
    known = _streams(frames)
    stream_id = rng.choice((rng.choice(known), known[-1], 0, 2))
    match rng.choice(("head", "head", "data", "rst", "window", "settings", "ping", "goaway", "odd", "bad")):
        case "head":
            made = h2f.headers(stream_id, _block(rng), end=rng.random() < 0.5)
        case "data":
            padding = rng.choice((None, None, 0, 3, 255))
            size = rng.choice((0, 1, 2, 1000, 1002))
            made = h2f.data(stream_id, b"x" * size, end=rng.random() < 0.4, padding=padding)
        case "rst":
            made = h2f.rst(stream_id, rng.choice((0, 7, 8, 99)))
        case "window":
            made = h2f.window(stream_id, rng.choice((0, 1, 1000, 2**31 - 1, 2**31)))
        case "settings":
            entries = [(rng.randint(0, 9), rng.choice(SETTING_VALUES)) for _ in range(rng.randint(0, 3))]
            made = h2f.settings(*entries)
        case "ping":
            made = h2f.ping(ack=rng.random() < 0.3)
        case "goaway":
            made = h2f.goaway(rng.choice((0, stream_id, 2**31 - 1)), rng.choice((0, 2)))
        case "odd":
            made = rng.choice(ODD_FRAMES)
        case _:
            made = rng.choice(BAD_FRAMES)
    frames.insert(rng.randint(0, len(frames)), made)
    return b"".join(frames)


def _order(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    frames = frames_of(wire)
    if not frames:
        return wire
    at, other = rng.randrange(len(frames)), rng.randrange(len(frames))
    match rng.choice(("twice", "gone", "swap")):
        case "twice":
            frames.insert(other, frames[at])
        case "gone":
            del frames[at]
        case "swap":
            frames[at], frames[other] = frames[other], frames[at]
    return b"".join(frames)


def _header(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    """Type, flags or stream of a frame."""
    frames = frames_of(wire)
    if not frames:
        return wire
    at = rng.randrange(len(frames))
    raw = bytearray(frames[at])
    match rng.choice(("type", "flags", "stream", "size")):
        case "type":
            raw[3] = rng.choice((*Frame, 77))
        case "flags":
            raw[4] ^= rng.choice((*Flag, 2, 64, 128))
        case "stream":
            known = _streams(frames)
            raw[5:9] = rng.choice((*known, 0, 2, MAX_STREAM_ID, 2**31 + 1)).to_bytes(4, "big")
        case "size":
            raw[:3] = max(0, len(raw) - 9 + rng.choice((-1, 1, 5))).to_bytes(3, "big")
    frames[at] = bytes(raw)
    return b"".join(frames)


def _payload(wire: bytes, seeds: Seeds, rng: random.Random) -> bytes:
    """With the length put right."""
    frames = frames_of(wire)
    if not frames:
        return wire
    at = rng.randrange(len(frames))
    raw = frames[at]
    payload = _octet(raw[9:], seeds, rng) if rng.random() < 0.8 else _range(raw[9:], seeds, rng)
    frames[at] = len(payload).to_bytes(3, "big") + raw[3:9] + payload
    return b"".join(frames)


def _continued(wire: bytes, _seeds: Seeds, rng: random.Random) -> bytes:
    """A header block in several frames."""
    frames = frames_of(wire)
    heads = [at for at, raw in enumerate(frames) if raw[3] == Frame.HEADERS and raw[4] & Flag.END_HEADERS]
    if not heads:
        return wire
    at = rng.choice(heads)
    raw = frames[at]
    stream_id, cut = int.from_bytes(raw[5:9], "big"), 9 + rng.randint(0, len(raw) - 9)
    first = (cut - 9).to_bytes(3, "big") + raw[3:4] + bytes((raw[4] & ~Flag.END_HEADERS,)) + raw[5:cut]
    frames[at : at + 1] = [first, *[h2f.continuation(stream_id, b"", whole=False)] * rng.choice((0, 0, 1, 4)),
                           h2f.continuation(stream_id, raw[cut:])]  # fmt: skip
    return b"".join(frames)


_H2 = (_octet, _behind, _new_frame, _new_frame, _new_frame, _new_frame, _order, _order, _header, _header, _payload,
       _payload, _continued)  # fmt: skip
