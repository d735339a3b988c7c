"""What the first bytes of a connection are. PURE: bytes in, verdict out; the caller peeks.

=============  ==================================================================================
verdict        first bytes
=============  ==================================================================================
MESH_TLS       TLS ClientHello whose ALPN offers one of ours (``netproxy/...``)
TLS            any other TLS handshake record: the app's own
HTTP2          the HTTP/2 connection preface (RFC 9113 section 3.4)
HTTP1          a registered HTTP method and a space, or any token, a space and ``/``, ``* `` or ``http://``
OPAQUE         anything else
None           not decidable yet: more bytes, please (at most `PEEK` are ever looked at)
=============  ==================================================================================
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

PEEK = 16 * 1024 + 5
"""One TLS record (RFC 8446 section 5.1) with its header: a ClientHello that is larger is not ours."""

MESH_ALPN_PREFIX = b"netproxy/"
_H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_KNOWN = rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH) "
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_HTTP1 = re.compile(rb"(?:\r\n)?(?:" + _KNOWN + rb"|" + _TOKEN + rb"{1,24} (?:/|\* |https?://))")
_UNDECIDED = re.compile(rb"(?:\r\n?)?(?:" + _TOKEN + rb"{1,24}(?: (?:\*|h|ht|htt|http|https|https?:|https?:/)?)?)?\Z")


class Protocol(enum.Enum):
    MESH_TLS = "mesh-tls"
    TLS = "tls"
    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"


class ClientHello(NamedTuple):
    sni: str
    alpn: tuple[bytes, ...]


def sniff(data: bytes) -> Protocol | None:
    """Verdict on the bytes received so far; None while more could change it."""
    if not data:
        return None
    if data[0] == 0x16:
        if len(data) < 3:
            return None
        if data[1] != 3:
            return Protocol.OPAQUE
        hello = client_hello(data)
        if hello is None:
            return None if len(data) < PEEK else Protocol.TLS
        ours = any(name.startswith(MESH_ALPN_PREFIX) for name in hello.alpn)
        return Protocol.MESH_TLS if ours else Protocol.TLS
    if data.startswith(_H2_PREFACE[: len(data)]):
        # "PRI" alone could also be the start of an HTTP/1 method that nobody uses.
        return Protocol.HTTP2 if len(data) >= len(_H2_PREFACE) else None
    if data.startswith(_H2_PREFACE[:16]):
        return Protocol.HTTP2
    if _HTTP1.match(data):
        return Protocol.HTTP1
    if _UNDECIDED.match(data):
        return None
    return Protocol.OPAQUE


def client_hello(data: bytes) -> ClientHello | None:
    """SNI and ALPN of a ClientHello (RFC 8446 section 4.1.2) in the first record(s) of `data`.

    None while it is incomplete. A record that is no well-formed ClientHello gives an empty one.
    """
    empty = ClientHello("", ())
    body = bytearray()
    at = 0
    while True:
        if len(data) < at + 5:
            return None
        if data[at] != 0x16:
            return empty
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        body += data[at + 5 : at + 5 + length]
        complete = len(data) >= at + 5 + length
        if len(body) >= 4:
            if body[0] != 1:
                return empty
            want = 4 + int.from_bytes(body[1:4], "big")
            if len(body) >= want:
                break
        if not complete:
            return None
        at += 5 + length
    try:
        return _parse_hello(memoryview(bytes(body))[4:want])
    except (IndexError, UnicodeDecodeError):
        return empty


def _parse_hello(hello: memoryview) -> ClientHello:
    at = 34
    at += 1 + hello[at]
    at += 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 1 + hello[at]
    sni, alpn = "", []
    end = at + 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 2
    while at + 4 <= min(end, len(hello)):
        kind = int.from_bytes(hello[at : at + 2], "big")
        size = int.from_bytes(hello[at + 2 : at + 4], "big")
        value = bytes(hello[at + 4 : at + 4 + size])
        at += 4 + size
        if kind == 0 and len(value) > 5:
            sni = value[5 : 5 + int.from_bytes(value[3:5], "big")].decode("ascii")
        elif kind == 16:
            inner = 2
            while inner < len(value):
                alpn.append(value[inner + 1 : inner + 1 + value[inner]])
                inner += 1 + value[inner]
    return ClientHello(sni, tuple(alpn))
