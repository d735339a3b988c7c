"""The tables of `docs.differences`: nothing differs that is not in them, and each row is shown by a message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from docs import differences
from netproxy.codec.h1_reference import H1ReferenceServer
from netproxy.codec.h2_reference import H2ReferenceServer
from netproxy.codec.h2_strict import KIB, Flag, Frame, H2Limits, Setting
from netproxy.codec.strict import MAX_CHUNK_LINE, H1Limits

from ..fuzz import targets
from ..fuzz.mutate import CONTROL
from ..fuzz.targets import CLIENT, SERVER, Input
from ..unit.codec import h2_frames as h2f
from . import libraries

Judge = Callable[[Input], None]

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
MORE_H1: dict[str, bytes] = {
    "HEAD_SIZE": GET + b"x: " + b"y" * 200 + b"\r\n\r\n",
    "FIELD_COUNT": GET + b"x: y\r\n" * 8 + b"\r\n",
    "CHUNK_LINE_SIZE": CHUNKED + b"1;" + b"a" * MAX_CHUNK_LINE + b"\r\nx\r\n0\r\n\r\n",
    "CHUNK_OVERHEAD": CHUNKED + (b"1;" + b"a" * 100 + b"\r\nx\r\n") * 300 + b"0\r\n\r\n",
    "TRAILER_SIZE": CHUNKED + b"0\r\nx: " + b"y" * 80 + b"\r\n\r\n",
}
"""Beside the corpus; with small limits."""
SMALL_H1 = H1Limits(max_head_bytes=150, max_headers=6, max_trailer_bytes=60)

BLOCK = h2f.block(h2f.REQUEST)
MORE_H2: dict[str, tuple[int, bytes]] = {
    "IDLE": (CLIENT, h2f.rst(2)),
    "STREAM_ID": (CLIENT, h2f.headers(2)),
    "SETTING_WINDOW": (SERVER, h2f.settings((Setting.INITIAL_WINDOW_SIZE, 2**31), (Setting.INITIAL_WINDOW_SIZE, 1))),
    "BLOCK_FRAMES": (SERVER, h2f.headers(1, BLOCK, whole=False, end=True)
                     + h2f.continuation(1, b"", whole=False) * 20 + h2f.continuation(1, b"")),
    "GLITCHES": (SERVER, h2f.ping() * 70),
    "RESETS": (SERVER, b"".join(h2f.headers(n) + h2f.rst(n) for n in range(1, 41, 2))),
    "FIELD_NAME": (SERVER, h2f.headers(1, [*h2f.REQUEST, (b"x;", b"y")], end=True)),
    "TUNNEL_FRAME": (
        SERVER,
        h2f.headers(1, [(b":method", b"CONNECT"), (b":authority", b"a:1")]) + h2f.headers(1, [(b"x", b"y")], end=True),
    ),
    "PROTOCOL": (SERVER, h2f.headers(1, [(b":method", b"CONNECT"), *h2f.REQUEST[1:], (b":protocol", b"\xff")])),
    "FIELD_VALUE": (SERVER, h2f.headers(1, [*h2f.REQUEST, (b"x", b"a\x01b")], end=True)),
}  # fmt: skip
SMALL_H2 = H2Limits(max_header_list_bytes=KIB, resets=5, glitches=60, resets_per_s=0, glitches_per_s=0)


def h1_inputs() -> Iterator[tuple[Input, H1Limits]]:
    for data in targets.h1_seeds():
        yield Input.read(data), H1Limits()
    for wire in MORE_H1.values():
        yield Input.read(bytes(CONTROL) + wire), SMALL_H1


def h2_inputs() -> Iterator[tuple[Input, H2Limits]]:
    for data in targets.h2_seeds():
        yield Input.read(data), H2Limits()
    for side, wire in MORE_H2.values():
        yield Input(bytes((side,)) + bytes(CONTROL - 1), wire), SMALL_H2


CASES: dict[str, tuple[Callable[[], Iterator[tuple[Input, Any]]], Callable[[Input, Any], None]]] = {
    "HTTP/1": (h1_inputs, targets.hold_against_h11),
    "HTTP/2": (h2_inputs, targets.hold_against_h2),
}
STRICTER = {"HTTP/1": "STRICTER_H1", "HTTP/2": "STRICTER_H2"}


@pytest.mark.parametrize("protocol", CASES)
def test_nothing_else_differs(protocol: str) -> None:
    inputs, hold = CASES[protocol]
    for case, limits in inputs():
        hold(case, limits)


@pytest.mark.parametrize("protocol", CASES)
def test_every_row_of_what_is_stricter_is_shown(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table: Mapping[Any, str] = getattr(differences, STRICTER[protocol])
    monkeypatch.setattr(libraries, STRICTER[protocol], {})
    inputs, hold = CASES[protocol]
    shown = set()
    for case, limits in inputs():
        try:
            hold(case, limits)
        except libraries.Undocumented as exc:
            assert exc.rule is not None, exc
            shown.add(exc.rule)
    assert shown == set(table)


LOOSER: dict[str, tuple[int, bytes]] = {
    "up to two empty lines before a request line": (SERVER, b"\r\n\r\n" + GET + b"\r\n"),
    "frames of open streams behind a GOAWAY": (CLIENT, h2f.goaway(1) + h2f.headers(1, h2f.RESPONSE, end=True)),
    "a header block's frame that is all padding": (
        SERVER, h2f.frame(Frame.HEADERS, Flag.PADDED, 1, b"\x05" + bytes(5))),
    "WINDOW_UPDATE of nothing on a stream that is over": (SERVER, h2f.headers(1) + h2f.rst(1) + h2f.window(1, 0)),
    "the reserved bit of WINDOW_UPDATE": (SERVER, h2f.frame(Frame.WINDOW_UPDATE, 0, 0, b"\x80\x00\x00\x01")),
    "frames of extensions, whatever is in them": (SERVER, h2f.frame(10, 0, 0, b"\x00\x09")),
}  # fmt: skip


@pytest.mark.parametrize("row", [*differences.LOOSER_H1, *differences.LOOSER_H2], ids=lambda row: row.what)
def test_every_row_of_what_is_looser_is_shown(row: differences.Looser, monkeypatch: pytest.MonkeyPatch) -> None:
    side, wire = LOOSER[row.what]
    protocol = "HTTP/1" if row in differences.LOOSER_H1 else "HTTP/2"
    case = Input(bytes((side,)) + bytes(CONTROL - 1), wire)
    limits: Any = H1Limits() if protocol == "HTTP/1" else H2Limits()
    CASES[protocol][1](case, limits)
    monkeypatch.setattr(libraries, "LOOSER_H1", ())
    monkeypatch.setattr(libraries, "LOOSER_H2", ())
    with pytest.raises(libraries.Undocumented, match=row.words) as fault:
        CASES[protocol][1](case, limits)
    assert fault.value.rule is None


# --- the judges themselves


class Lax1(H1ReferenceServer):
    """Takes white space before a colon."""

    def receive(self, data: bytes) -> Any:
        return [] if data == b" " and self.buffered > 25 else super().receive(data)


class Lax2(H2ReferenceServer):
    """Takes fields that belong to a connection."""

    def receive(self, data: bytes, now: float = 0.0) -> Any:
        return super().receive(data.replace(b"keep-alive", b"keep-alivf"), now)


def test_an_engine_that_takes_what_h11_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Input(bytes(CONTROL), GET + b"x : y\r\n\r\n")
    targets.hold_against_h11(case, H1Limits())
    monkeypatch.setattr(targets, "H1_KINDS", (Lax1, targets.H1_KINDS[1]))
    with pytest.raises(libraries.Undocumented, match="h11 does not"):
        targets.hold_against_h11(case, H1Limits())


def test_an_engine_that_takes_what_h2_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Input(bytes(CONTROL), h2f.headers(1, [*h2f.REQUEST, (b"keep-alive", b"x")], end=True))
    targets.hold_against_h2(case, H2Limits())
    monkeypatch.setattr(targets, "H2_KINDS", (Lax2, targets.H2_KINDS[1]))
    with pytest.raises(libraries.Undocumented, match="h2 does not"):
        targets.hold_against_h2(case, H2Limits())
