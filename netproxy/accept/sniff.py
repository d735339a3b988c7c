"""What the first bytes of a connection are. PURE: bytes in, verdict out; the caller peeks.

=============  ==================================================================================
verdict        first bytes
=============  ==================================================================================
MESH_TLS       TLS ClientHello whose ALPN offers one of ours (``netproxy/...``)
TLS            any other TLS handshake record: the app's own
HTTP2          the HTTP/2 connection preface (RFC 9113 section 3.4)
HTTP1          a registered HTTP method and white space; any token, white space and ``/``, ``* `` or ``http://``; or a
               first line of a token, white space and ``HTTP/`` somewhere behind it
OPAQUE         anything else
None           not decidable yet: more bytes, please (at most `PEEK` are ever looked at)
STALLED_HTTP   (of `detect` only) undecided when the time was up, and may still become HTTP/1
STALLED        (of `detect` only) undecided when the time was up: the beginning of a TLS record
=============  ==================================================================================

Threat: who gets an HTTP/1 request relayed as OPAQUE has its fields, ``x-forwarded-client-cert`` among them, delivered
as it wrote them. So HTTP1 is what the most lenient server would take for a request, not what the codec will: blanks
and line ends before it, any blanks between its words, a method of any length. It is decided at the first line end at
the latest, before the first field; what is still open after `MAX_BLANKS` or `PEEK` octets is HTTP1 too.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

PEEK = 16 * 1024 + 5
"""One TLS record (RFC 8446 section 5.1) with its header: a ClientHello that is larger is not ours."""

TLS_HANDSHAKE = b"\x16"
"""ContentType of the record that a TLS connection begins with (RFC 8446 section 5.1)."""

MESH_ALPN_PREFIX = b"netproxy/"
_H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_BLANKS = 64
"""Servers skip blanks before a request, no other protocol begins with so many. The codec refuses far fewer."""

# All that Latin-1 text is split at by the servers that split: str.split() of Python's, among others.
_BLANK = rb"[\t\x0b\x0c\r\x1c-\x20\x85\xa0]"
# Without CONNECT, which NATS has as well: "CONNECT {...}".
_KNOWN = rb"(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|TRACE|PATCH)"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_blanks = re.compile(rb"(?:\n|%b)*+" % _BLANK).match
_http1 = re.compile(
    rb"%(known)b%(blank)b|%(token)b++%(blank)b++(?:/|\*%(blank)b|[Hh][Tt][Tt][Pp][Ss]?://)"
    % {b"known": _KNOWN, b"token": _TOKEN, b"blank": _BLANK}
).match
_undecided = re.compile(rb"(?:%b++(?:%b[^\n]*+)?)?\Z" % (_TOKEN, _BLANK)).match
_line = re.compile(rb"%b++%b[^\n]*+\n" % (_TOKEN, _BLANK)).match


class Protocol(enum.Enum):
    MESH_TLS = "mesh-tls"
    TLS = "tls"
    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"
    STALLED_HTTP = "stalled-http"
    STALLED = "stalled"


NO_NAME = "?"
"""An SNI that can't be read: never a host, and not the same as none."""


class ClientHello(NamedTuple):
    sni: str
    """As the client wrote it, "" without one, NO_NAME. With ECH (RFC 9849) it is the outer one."""
    alpn: tuple[bytes, ...]


def sniff(data: bytes) -> Protocol | None:
    """Verdict on the bytes received so far; None while more could change it."""
    if not data:
        return None
    if data[:1] == TLS_HANDSHAKE:
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
    return _sniff_http1(data[:PEEK])


def _sniff_http1(data: bytes) -> Protocol | None:
    found = _blanks(data)
    at = found.end() if found else 0
    if at > MAX_BLANKS or _http1(data, at):
        return Protocol.HTTP1
    if _undecided(data, at):
        return None if len(data) < PEEK else Protocol.HTTP1
    line = _line(data, at)
    return Protocol.HTTP1 if line and b"HTTP/" in line[0].upper() else Protocol.OPAQUE


def missing(data: bytes) -> int:
    """So many octets have to follow `data`, about which `sniff` is undecided, to complete a ClientHello. At least 1.

    Who looks again with every octet can be kept busy: to look through 16 KiB in records of one octet takes 4 ms.
    """
    return _message(data)[1] if data[:1] == TLS_HANDSHAKE and len(data) > 2 else 1


def client_hello(data: bytes) -> ClientHello | None:
    """SNI and ALPN of a ClientHello (RFC 8446 section 4.1.2) in the first record(s) of `data`.

    None while it is incomplete. A record that is no well-formed ClientHello gives one without ALPN and with NO_NAME.
    """
    message, left = _message(data)
    if left:
        return None
    try:
        return _parse_hello(memoryview(message))
    except IndexError:
        return ClientHello(NO_NAME, ())


def _message(data: bytes) -> tuple[bytes, int]:
    """Of a ClientHello what follows its type and length, b"" of anything else; how many octets are missing at least."""
    body = bytearray()
    at = 0
    while True:
        want = 4 + int.from_bytes(body[1:4], "big") if len(body) >= 4 else 4
        if len(data) < at + 5:
            return b"", at + 5 - len(data) + want - len(body)
        if data[at] != 0x16:
            return b"", 0
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        body += data[at + 5 : at + 5 + length]
        complete = len(data) >= at + 5 + length
        if len(body) >= 4:
            if body[0] != 1:
                return b"", 0
            want = 4 + int.from_bytes(body[1:4], "big")
            if len(body) >= want:
                return bytes(body[4:want]), 0
        if not complete:
            return b"", want - len(body)
        at += 5 + length


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
        if kind == 0:
            # One list of one host name, once (RFC 6066 section 3): servers differ in what they make of more.
            size = int.from_bytes(value[3:5], "big")
            whole = size and value[:3] == (size + 3).to_bytes(2, "big") + b"\0" and len(value) == size + 5
            sni = value[5:].decode("ascii") if whole and not sni and value.isascii() else NO_NAME
        elif kind == 16:
            inner = 2
            while inner < len(value):
                alpn.append(value[inner + 1 : inner + 1 + value[inner]])
                inner += 1 + value[inner]
    return ClientHello(sni, tuple(alpn))
