"""What is changed in a message on its way, and what is said when there is no answer. PURE.

Edits of a request (documented in docs, tested octet by octet):

* hop-by-hop fields go: ``connection`` and what it names, ``keep-alive``, ``proxy-connection``, ``te`` except
  ``trailers``, ``upgrade`` (RFC 9110 section 7.6.1). ``transfer-encoding`` stays as framing.
* an absolute-form target becomes origin-form, its authority replaces ``host`` (RFC 9112 section 3.2.2); that of an
  OPTIONS request becomes ``*`` when it has neither path nor query (RFC 9112 section 3.2.4).
* ``x-forwarded-client-cert`` goes, however its words are joined, since gateways like CGI and WSGI make one name of
  ``x-a`` and ``x_a``; inbound with mesh TLS it is set from the verified certificate.
* an HTTP/1.0 request without ``host`` gets the address that was dialled: what goes on is HTTP/1.1.

Edits of a response: hop-by-hop fields go, ``x-netproxy-reason`` goes unless another agent said it (it arrived by mesh
TLS; that agent has removed the application's).

Trailers, and the fields of a 1xx answer, pass without either of the two: no agent sends them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..codec.events import Headers, RequestHead, ResponseHead
from ..decide.match import Request
from ..errors import Reason

XFCC = b"x-forwarded-client-cert"
REASON_HEADER = b"x-netproxy-reason"
_JOINED_ANYHOW = bytes(octet if chr(octet).isascii() and chr(octet).isalnum() else 0x2D for octet in range(256))
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade"))
_REQUEST_DROPS = _HOP_BY_HOP | {XFCC}
_RESPONSE_DROPS = _HOP_BY_HOP | {REASON_HEADER}
# Fields that Connection must not remove, since what follows depends on them (RFC 9110 section 7.6.1).
_NEVER_NAMED = frozenset((b"host", b"content-length", b"transfer-encoding", b"trailer"))


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    named = [value for name, value in headers if name == b"connection"]
    if not named:
        return frozenset()
    tokens = {token.strip().lower() for value in named for token in value.split(b",")}
    return frozenset(tokens - _NEVER_NAMED)


def request_for_upstream(head: RequestHead, xfcc: bytes = b"", dialled: bytes = b"") -> RequestHead:
    """The request as it goes on. `xfcc`: value of x-forwarded-client-cert, or b"". `dialled`: Host if there is none."""
    drops = _REQUEST_DROPS | _named_by_connection(head.headers)
    target, authority = origin_form(head.target)
    headers = [field for field in head.headers if field[0] not in drops and not _is_xfcc(field[0])]
    if authority:
        headers = [(b"host", authority), *(h for h in headers if h[0] != b"host")]
        if head.method == b"OPTIONS" and head.target.endswith(b"://" + authority):
            target = b"*"
    elif dialled and not any(name == b"host" for name, _ in headers):
        headers.insert(0, (b"host", dialled))
    if any(name == b"te" and _wants_trailers(value) for name, value in head.headers):
        headers.append((b"te", b"trailers"))
    if xfcc:
        headers.append((XFCC, xfcc))
    return RequestHead(1, head.method, target, headers)


def _is_xfcc(name: bytes) -> bool:
    return len(name) == len(XFCC) and name.translate(_JOINED_ANYHOW) == XFCC


def without_ours(headers: Headers) -> Headers:
    """Trailers, or the fields of a 1xx answer, without what only agents may say."""
    return [field for field in headers if field[0] != REASON_HEADER and not _is_xfcc(field[0])]


def _wants_trailers(te: bytes) -> bool:
    return any(part.partition(b";")[0].strip().lower() == b"trailers" for part in te.split(b","))


def response_for_downstream(head: ResponseHead, *, from_agent: bool = False) -> ResponseHead:
    """The response as it goes on. `from_agent`: what sent it is netproxy, not an application."""
    drops = (_HOP_BY_HOP if from_agent else _RESPONSE_DROPS) | _named_by_connection(head.headers)
    return ResponseHead(1, head.status, [(name, value) for name, value in head.headers if name not in drops])


def origin_form(target: bytes) -> tuple[bytes, bytes]:
    """(target in origin-form, authority when it was in absolute-form)."""
    if target[:1] in (b"/", b"*"):
        return target, b""
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() not in (b"http", b"https"):
        return target, b""
    for at, octet in enumerate(rest):
        if octet in b"/?":
            path = rest[at:]
            return (path if octet == 0x2F else b"/" + path), rest[:at]
    return b"/", rest


def authority_of(host: str, port: int) -> bytes:
    """As in Host: IPv6 in brackets, without the default port."""
    name = f"[{host}]" if ":" in host else host
    return (name if port == 80 else f"{name}:{port}").encode()


def request_for_match(head: RequestHead) -> Request:
    """What routing rules look at. CONNECT has neither path nor query: its target is an authority."""
    method, headers = head.method.decode("latin-1"), headers_for_match(head.headers)
    if head.method == b"CONNECT":
        return Request("", headers, "", method)
    path, _, query = origin_form(head.target)[0].decode("latin-1").partition("?")
    return Request(path, headers, query, method)


def headers_for_match(headers: Headers) -> dict[str, str]:
    """Lower-case names; the values of a repeated field joined by ``,`` (RFC 9110 section 5.3)."""
    out: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        out[key] = f"{out[key]},{text}" if key in out else text
    return out


def problem(
    reason: Reason, detail: str, decided_by: str, tried: Sequence[str], status: int = 0
) -> tuple[ResponseHead, bytes]:
    """Head and body of our own answer (RFC 9457). `status` overrides the reason's."""
    info = reason.info
    status = status or info.status
    body: dict[str, object] = {"type": "about:blank", "title": info.title, "status": status, "reason": reason.name}
    if detail:
        body["detail"] = detail[:1000]
    if decided_by:
        body["decided_by"] = decided_by
    if tried:
        body["endpoints_tried"] = list(tried)[:8]
    raw = json.dumps(body).encode() + b"\n"
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(raw)).encode()),
        (REASON_HEADER, info.flag.encode()),
    ]
    return ResponseHead(1, status, headers), raw


def xfcc_value(own: str, peer: str, peer_sha256: str) -> bytes:
    """Envoy's form: whose proxy says so, hash of the client's certificate, its URI SAN."""
    return f"By={own};Hash={peer_sha256};URI={peer}".encode()
