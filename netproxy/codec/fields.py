# cython: annotation_typing=False
"""The fields that a relay has to do something about, as bits: they are looked for once, where a head is read."""

from __future__ import annotations

from .events import Headers

XFCC = b"x-forwarded-client-cert"
REASON_HEADER = b"x-netproxy-reason"
HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"http2-settings", b"te", b"upgrade"))
"""For one hop (RFC 9110 section 7.6.1)."""

CONNECTION, HOP, UPGRADE, XFCC_LIKE, EXPECT, HOST, REQUEST_ID, DATE, REASON, TRACE = (1 << n for n in range(10))
NAMING = 1 << 10
"""A Connection field names more than ``close`` and ``keep-alive``."""
# Any of HOP_BY_HOP is one of the first two.
BITS: dict[bytes, int] = {
    **dict.fromkeys(HOP_BY_HOP, HOP),
    b"connection": CONNECTION,
    b"upgrade": HOP | UPGRADE,
    XFCC: XFCC_LIKE,
    b"expect": EXPECT,
    b"host": HOST,
    b"x-request-id": REQUEST_ID,
    b"date": DATE,
    REASON_HEADER: REASON,
    **dict.fromkeys((b"traceparent", b"tracestate", b"b3"), TRACE),
    **dict.fromkeys((b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"), TRACE),
}
"""By name."""
JOINED_ANYHOW = bytes(octet if chr(octet).isascii() and chr(octet).isalnum() else 0x2D for octet in range(256))
"""For `bytes.translate`: what gateways like CGI and WSGI make of a name, since to them ``x-a`` and ``x_a`` are one."""

_NAMES_NOTHING = frozenset((b"keep-alive", b"close", b"Keep-Alive", b"Close"))
"""What a Connection field mostly is."""
_XFCC_SIZE = len(XFCC)
_BITS = BITS
_CONNECTION, _NAMING, _XFCC_LIKE = CONNECTION, NAMING, XFCC_LIKE


def seen_in(headers: Headers) -> int:
    """The bits of all of them."""
    seen = 0
    for field in headers:
        name = field[0]
        found = _BITS.get(name)
        if found is None:
            if len(name) == _XFCC_SIZE and is_like_xfcc(name):
                seen |= _XFCC_LIKE
        else:
            bits = found
            seen |= bits
            if bits == _CONNECTION and field[1] not in _NAMES_NOTHING:
                seen |= _NAMING
    return seen


def is_like_xfcc(name: bytes) -> bool:
    """Would a gateway take it for ``x-forwarded-client-cert``?"""
    return len(name) == _XFCC_SIZE and name.translate(JOINED_ANYHOW) == XFCC
