"""Where what netproxy takes differs from what h11 and h2 take by themselves. A difference that is not here is a fault.

`STRICTER` has the rules by which a message is refused that the library reads without complaint: rule -> what the
library does. The clause is that of the rule. `LOOSER` has what is taken although the library refuses it. The tests
under ``tests/differential`` and ``tests/fuzz`` hold both against the engines, and each row against a message that shows
it; ``make docs`` writes them into ``conformance.md``.

Between the two engines of a protocol there is no difference at all.
"""

from __future__ import annotations

from typing import NamedTuple

from netproxy.codec import h2_strict, strict

_H1 = strict.Rule
_H2 = h2_strict.Rule

STRICTER_H1: dict[strict.Rule, str] = {
    _H1.VERSION: "takes any digit, point, digit",
    _H1.STATUS_LINE: "takes control characters in the reason phrase",
    _H1.BARE_LF: "takes LF alone as the end of a line, also in chunked content",
    _H1.HEAD_SIZE: "limits what is not whole yet, not the head",
    _H1.FIELD_COUNT: "counts no fields",
    _H1.OBS_FOLD: "joins folded lines, also of Transfer-Encoding",
    _H1.FIELD_VALUE: "takes control characters other than NUL, CR and LF",
    _H1.TARGET: "takes any visible characters",
    _H1.CONNECT_TARGET: "takes any target, and content",
    _H1.HOST: "takes any text, userinfo and paths too",
    _H1.CONTENT_LENGTH: "takes a list of the same number",
    _H1.CONTENT_LENGTH_TWICE: "takes the same number several times",
    _H1.TE_AND_LENGTH: "follows Transfer-Encoding and keeps both fields",
    _H1.TE_IN_1_0: "follows Transfer-Encoding in HTTP/1.0",
    _H1.TE_STATUS: "takes Transfer-Encoding in answers that have no content",
    _H1.CONNECTION: "reads only the options it knows, whatever else the field holds",
    _H1.SWITCH: "takes a 101 that names no protocol, and in HTTP/1.0",
    _H1.CHUNK_LINE: "takes anything behind the size, white space and control characters too",
    _H1.CHUNK_LINE_SIZE: "limits what is not whole yet, not the line",
    _H1.CHUNK_OVERHEAD: "has no limit for the framing of small chunks",
    _H1.TRAILER_SIZE: "limits what is not whole yet, not the trailers",
    _H1.TRAILER_FIELD: "takes any field, those that frame or authenticate too",
}

STRICTER_H2: dict[h2_strict.Rule, str] = {
    _H2.IDLE: "ignores RST_STREAM on streams that it never opened",
    _H2.STREAM_ID: "as a client takes requests on streams of its server",
    _H2.SETTING_WINDOW: "looks at the last value only when a frame has the setting twice",
    _H2.SETTING: "lets a server take extended CONNECT back",
    _H2.SETTING_COUNT: "has no limit",
    _H2.BLOCK_FRAMES: "allows 64 frames",
    _H2.LIST_SIZE: "counts no fields; a list of too many octets ends the connection",
    _H2.GLITCHES: "counts no frames that bring nothing",
    _H2.RESETS: "counts no requests that are given up",
    _H2.FIELD_NAME: "takes names that are no tokens, as long as nothing in them is in upper case, a blank or a control",
    _H2.FIELD_VALUE: "takes control characters other than NUL, CR and LF",
    _H2.METHOD: "takes any text",
    _H2.SCHEME: "takes any text",
    _H2.PATH: "takes any text that is not empty",
    _H2.AUTHORITY: "takes any text, userinfo too, and none",
    _H2.CONNECT: "takes any authority, and Content-Length",
    _H2.TUNNEL_FRAME: "takes trailers",
    _H2.PROTOCOL: "takes any text",
    _H2.STATUS: "takes any text",
    _H2.INFORMATIONAL: "takes a 101",
    _H2.CONTENT_LENGTH: "takes the same number several times",
    _H2.CONTENT: "does not count when trailers or no content follow, and takes content in a 204",
    _H2.TRAILER_FIELD: "takes any field, those that frame or authenticate too",
}


class Looser(NamedTuple):
    what: str
    clause: str
    words: str
    """In what the library says."""
    kinds: frozenset[int] = frozenset(range(256))
    """Types of frame (HTTP/2) that may be taken in spite of it."""


_KNOWN = frozenset(map(int, h2_strict.Frame))
_WINDOW = frozenset((int(h2_strict.Frame.WINDOW_UPDATE),))

LOOSER_H1 = (Looser("up to two empty lines before a request line", "RFC 9112 2.2", "no request line received"),)
LOOSER_H2 = (
    Looser("frames of open streams behind a GOAWAY", "RFC 9113 6.8", "in state ConnectionState.CLOSED"),
    Looser(
        "a header block's frame that is all padding",
        "RFC 9113 6.2",
        "frame with invalid padding",
        frozenset((int(h2_strict.Frame.HEADERS),)),
    ),
    Looser("WINDOW_UPDATE of nothing on a stream that is over", "RFC 9113 5.1", "non-compliant data", _WINDOW),
    Looser("the reserved bit of WINDOW_UPDATE", "RFC 9113 6.9", "non-compliant data", _WINDOW),
    Looser(
        "frames of extensions, whatever is in them",
        "RFC 9113 5.5",
        "Frame data missing or invalid",
        frozenset(range(256)) - _KNOWN,
    ),
)


def page() -> str:
    """Both tables."""
    parts = []
    for library, protocol, stricter, looser in (
        ("h11", "HTTP/1.1", STRICTER_H1, LOOSER_H1),
        ("h2", "HTTP/2", STRICTER_H2, LOOSER_H2),
    ):
        rows = []
        for rule, does in stricter.items():
            sentence, _, clause = rule.detail.rpartition(" (")
            rows.append(f"| {sentence} | {clause.rstrip(')')} | {does} |")
        taken = [f"| {row.what} | {row.clause} |" for row in looser]
        parts += [
            f"### {protocol}: refused, and read by {library}",
            "\n".join(["| refused | clause | " + library + " |", "|---|---|---|", *rows]),
            f"### {protocol}: taken, and refused by {library}",
            "\n".join(["| taken | clause |", "|---|---|", *taken]),
        ]
    return "\n\n".join(parts)
