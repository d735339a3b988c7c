# cython: annotation_typing=False
"""What is changed in a message on its way, and what is said when there is no answer. PURE.

This is the whole list: what is not here passes octet by octet. Each agent that a message passes makes these edits, so
between two meshed workloads they are made twice (outbound by the caller's agent, inbound by the other's).

Both ways, by the codec:

* A head is written anew: version 1.1, one blank in the status line and after each colon, no white space at the ends of
  values, names of fields in lower case. With ``headerCase: preserve`` names stay as their sender wrote them (of a name
  that is written in two ways, the first); a name that is added and was not in the message is in lower case, and so are
  the names in trailers and in 1xx answers. Fields keep their order. The reason phrase is the usual one of the status,
  or empty. Empty lines before a request line are dropped.
* A chunked body keeps its octets, not its chunks: sizes change, chunk extensions go. ``transfer-encoding`` is written
  ``chunked``, in lower case.
* Fields that are for one hop go: ``connection`` and what it names, ``keep-alive``, ``proxy-connection``,
  ``http2-settings``, ``te``, ``upgrade`` (RFC 9110 section 7.6.1). ``host``, ``content-length``, ``transfer-encoding``
  and ``trailer`` can't be named away. What replaces them, and all that is added, comes behind the other fields, in the
  order of this text.

Requests:

* ``te`` is ``trailers`` if the client wants trailers.
* ``upgrade`` with ``connection: upgrade`` goes on, without the protocols ``h2c`` (RFC 9113 section 3.1), ``h2``,
  ``TLS/...`` and ``HTTP/...``: what they ask for would be between the client and us. Not in HTTP/1.0 (RFC 9110
  section 7.8), and not with CONNECT.
* ``connection`` names ``te`` and ``upgrade``, when they are there.
* ``expect`` of an HTTP/1.0 request goes (RFC 9110 section 10.1.1). Otherwise it passes, see `expect`.
* An absolute-form target becomes origin-form, its authority replaces ``host`` (RFC 9112 section 3.2.2); that of an
  OPTIONS request becomes ``*`` when it has neither path nor query (RFC 9112 section 3.2.4). The target of CONNECT
  replaces ``host``, too: nobody behind us shall see another authority than we did.
* A request without ``host`` (HTTP/1.0) gets the address that was dialled, as its first field: what goes on is HTTP/1.1.
* ``x-forwarded-client-cert`` goes, however its words are joined, since gateways like CGI and WSGI make one name of
  ``x-a`` and ``x_a``; inbound with mesh TLS it is set from the verified certificate.
* Inbound, ``x-forwarded-for`` and ``x-forwarded-proto``. ``forwarded: append``: the client's address is put behind the
  last value of ``x-forwarded-for``, and ``x-forwarded-proto: http`` added if there is none; both go where their words
  are joined otherwise than by ``-``. ``set``: both go, however their words are joined, and become the client's address
  and ``http``. ``preserve``: both stay. The client is the other end of the connection, the pod that called; ``http`` is
  what its application spoke, and what its links must begin with, whatever is between the agents. ``x-forwarded-host``
  and ``forwarded`` are not touched.
* ``x-request-id``: a random UUID, if there is none and `requestId` is on. So the first agent gives it.
* ``via``: ``1.1 NAME`` (``1.0`` of an HTTP/1.0 request) is put behind its last value, if `via` gives us a name.
* With `tracing`, the trace: a valid ``traceparent`` is continued as version 00 with a span id of ours, and
  ``tracestate`` stays unless it is longer than 1 KiB or 32 members; without one, valid B3 (``b3``, else
  ``x-b3-traceid`` and ``x-b3-spanid``) is continued in its own form; else a ``traceparent`` is made, and what there
  was of these fields goes. See `trace`.

Responses (1xx answers and trailers excepted):

* ``x-netproxy-reason`` goes unless another agent said it (it arrived by mesh TLS; that agent has removed the
  application's).
* ``upgrade`` and ``connection: upgrade`` stay in 101, and in 426 under the same exceptions as in requests.
* ``date`` is added if there is none, except to 101 (RFC 9110 section 6.6.1: who has a clock must, on forwarding).
* ``via`` as above, with the version of the response.
* Content of unknown length is chunked for an HTTP/1.1 client (whose HEAD is then told so), and ends with the connection
  for an HTTP/1.0 one, which gets no trailers. No ``content-length`` and ``transfer-encoding`` in 101, 204 and in 2xx to
  CONNECT.
* ``connection: close`` is added when we shall close: the client is HTTP/1.0 or said so, its request is not over yet, we
  are about to stop.

To and from HTTP/2 (RFC 9113 section 8; a request that breaks its rules is refused):

* ``:authority`` is ``host``, as the first field, and ``:path`` the target. Fields ``cookie`` become one, joined by
  ``; ``, in the place of the first; empty ones go. ``:scheme`` is not told to HTTP/1.1, from which it is ``http``.
* What HTTP/2 says otherwise goes: ``connection``, ``transfer-encoding``, ``upgrade``; in 1xx answers and trailers
  all fields that are for one hop. No ``content-length`` in 204 and 1xx. Names are in lower case, reason phrases go.
* A request of unknown length is chunked for HTTP/1.1, unless it ends with its head; with a method that seldom has
  content, if some follows or 100 is expected.
* Between agents an HTTP/1.1 request may travel in HTTP/2 (`meshHttp`). The ALPN protocol of their connection says so,
  no field, and the application gets HTTP/1.1. What is left of the way: ``host`` first, one ``cookie``,
  ``transfer-encoding`` behind all other fields and not for chunks without content, no ``upgrade`` in 426, ``via`` of
  the second agent (in responses: of the first).
* An extended CONNECT (RFC 8441) is an Upgrade in HTTP/1.1: GET with ``connection``, ``upgrade`` and for a WebSocket
  a ``sec-websocket-key`` of ours. 101 is its 200, without ``sec-websocket-accept``; any other 2xx is answered 502.
* ``via`` says ``2``.

gRPC (POST with content-type ``application/grpc``):

* ``grpc-timeout`` is what is left of it for the endpoint, or of the route's request timeout where that ends earlier.
* A response of HTTP/2 that breaks off is ended by trailers with ``grpc-status`` and ``grpc-message``, if its head has
  no ``content-length``.

1xx answers and trailers pass without ``x-forwarded-client-cert`` and ``x-netproxy-reason``: no agent sends them there.
Trailers that have no chunked body to follow are dropped. `request` says which 1xx answers pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from ..codec import fields
from ..codec.events import Headers, RequestHead, ResponseHead, request_head, response_head
from ..codec.fields import HOP_BY_HOP, JOINED_ANYHOW, REASON_HEADER, XFCC, is_like_xfcc, seen_in
from ..codec.strict import asks_to_upgrade
from ..decide.match import Request, received
from ..errors import Grpc, Reason
from .grpc import error_fields, sentence

_FORWARDED_FOR, _FORWARDED_PROTO = b"x-forwarded-for", b"x-forwarded-proto"
_FORWARDED = frozenset((_FORWARDED_FOR, _FORWARDED_PROTO))
_RESPONSE_DROPS = HOP_BY_HOP | {REASON_HEADER}
# Fields that Connection must not remove, since what follows depends on them (RFC 9110 section 7.6.1).
_NEVER_NAMED = frozenset((b"host", b"content-length", b"transfer-encoding", b"trailer"))
_NOT_IN_HTTP2 = frozenset((b"connection", b"transfer-encoding", b"upgrade"))
# A 204 has no content of any length (RFC 9110 section 8.6).
_NOT_IN_HTTP2_204 = _NOT_IN_HTTP2 | {b"content-length"}
_NOT_BESIDE_HEADS = HOP_BY_HOP | _NOT_IN_HTTP2_204
_is_path = re.compile(rb"/[\x21\x22\x24-\x7e]*").fullmatch
_NOT_OURS_TO_PASS = frozenset((b"h2c", b"h2", b"tls", b"http"))

# Bits of `fields`, as C knows them. `expect` only goes from HTTP/1.0, so it is looked at then.
_HOST, _REQUEST_ID, _DATE = fields.HOST, fields.REQUEST_ID, fields.DATE
_CONNECTION, _DROPS = (
    fields.CONNECTION,
    fields.CONNECTION | fields.NAMING | fields.HOP | fields.XFCC_LIKE | fields.EXPECT,
)
_RESPONSE_BITS = fields.CONNECTION | fields.NAMING | fields.HOP | fields.REASON


class RequestEdits:
    """What one agent puts into a request. Empty values put nothing.

    `dialled`: Host if there is none. `client`: its address, of inbound requests. `request_id`: for a request without.
    """

    def __init__(
        self,
        xfcc: bytes = b"",
        dialled: bytes = b"",
        client: bytes = b"",
        forwarded: Literal["append", "set", "preserve"] = "preserve",
        request_id: bytes = b"",
        via: bytes = b"",
    ) -> None:
        self.xfcc = xfcc
        self.dialled = dialled
        self.client = client
        self.forwarded = forwarded
        self.request_id = request_id
        self.via = via

    def dialled_as(self, authority: bytes) -> RequestEdits:
        """The same for a host that is known by name."""
        return RequestEdits(self.xfcc, authority, self.client, self.forwarded, self.request_id, self.via)


class ResponseEdits(NamedTuple):
    """What one agent puts into a response. `from_agent`: what sent it is netproxy, not an application."""

    from_agent: bool = False
    date: bytes = b""
    """The present, if the response doesn't say when it was made."""
    via: bytes = b""


_NO_REQUEST_EDITS, _NO_RESPONSE_EDITS = RequestEdits(), ResponseEdits()


def request_for_upstream(head: RequestHead, edits: RequestEdits = _NO_REQUEST_EDITS) -> RequestHead:
    """The request as it goes on."""
    return edit_request(head, edits, edits.request_id)


def edit_request(head: RequestHead, edits: RequestEdits, request_id: bytes) -> RequestHead:
    """`request_id` wins over that of `edits`, which are the same for many requests."""
    method, target, version = head.method, head.target, head.http_version
    seen = head.seen if head.seen >= 0 else seen_in(head.headers)
    drops_some = False
    if not seen & _DROPS:
        headers = list(head.headers)
    elif seen & _DROPS == _CONNECTION:
        headers = _without_connection(head.headers)
    else:
        drops_some = True
        drops = HOP_BY_HOP | _named_by_connection(head.headers)
        if version == b"1.0":
            drops |= {b"expect"}
        headers = [field for field in head.headers if field[0] not in drops and not is_like_xfcc(field[0])]
        if seen & _CONNECTION:
            seen = seen_in(headers)
    authority = b""
    if not target.startswith(b"/"):
        target, authority = origin_form(target)
        if method == b"CONNECT" and not head.protocol:
            authority = head.target
    if authority:
        _put_host(headers, authority)
        if method == b"OPTIONS" and head.target.endswith(b"://" + authority):
            target = b"*"
    elif not seen & _HOST and edits.dialled:
        _put_host(headers, edits.dialled)
    if drops_some:
        _keep_hop_fields(head, headers)
    if edits.xfcc:
        headers.append((XFCC, edits.xfcc))
    if edits.client:
        headers = _forwarded(headers, edits)
    if request_id and not seen & _REQUEST_ID:
        headers.append((b"x-request-id", request_id))
    if edits.via:
        _add_to_list(headers, b"via", version + b" " + edits.via)
    return request_head(1, method, target, headers, b"1.1", head.spelling, head.scheme, head.protocol)


def response_for_downstream(head: ResponseHead, edits: ResponseEdits = _NO_RESPONSE_EDITS) -> ResponseHead:
    """The response as it goes on."""
    return edit_response(head, edits.from_agent, edits.date, edits.via)


def edit_response(head: ResponseHead, from_agent: bool, date: bytes, via: bytes) -> ResponseHead:
    """As of `ResponseEdits`."""
    status = head.status
    seen = head.seen if head.seen >= 0 else seen_in(head.headers)
    if not seen & _RESPONSE_BITS:
        headers = list(head.headers)
    elif seen & _RESPONSE_BITS == _CONNECTION:
        headers = _without_connection(head.headers)
    else:
        drops = HOP_BY_HOP if from_agent else _RESPONSE_DROPS
        drops |= _named_by_connection(head.headers)
        headers = [field for field in head.headers if field[0] not in drops]
        seen = seen_in(headers)
    if status in (101, 426) and (protocols := upgrade_protocols(head.headers)):
        headers += [(b"upgrade", b", ".join(protocols)), (b"connection", b"upgrade")]
    if date and status != 101 and not seen & _DATE:
        headers.append((b"date", date))
    if via:
        _add_to_list(headers, b"via", head.http_version + b" " + via)
    return response_head(1, status, headers, b"1.1", head.spelling)


def _without_connection(headers: Headers) -> Headers:
    """Where it names nothing that would have to go, too."""
    kept: Headers = []
    for field in headers:
        if field[0] != b"connection":
            kept.append(field)
    return kept


def request_for_http2(head: RequestHead) -> RequestHead:
    """What `request_for_upstream` made, without what HTTP/2 says otherwise (RFC 9113 section 8.2.2)."""
    headers = _without(head.headers, _NOT_IN_HTTP2)
    if headers is head.headers:
        return head
    return request_head(
        1, head.method, head.target, headers, head.http_version, head.spelling, head.scheme, head.protocol
    )


def response_for_http2(head: ResponseHead) -> ResponseHead:
    """What `response_for_downstream` made, without what HTTP/2 says otherwise."""
    drops = _NOT_IN_HTTP2_204 if head.status == 204 else _NOT_IN_HTTP2
    headers = _without(head.headers, drops)
    return head if headers is head.headers else response_head(1, head.status, headers, head.http_version, head.spelling)


def _without(headers: Headers, drops: frozenset[bytes]) -> Headers:
    """The very list, if there is nothing to leave out: mostly there is not."""
    for field in headers:
        if field[0] in drops:
            return [field for field in headers if field[0] not in drops]
    return headers


def fields_for_http2(headers: Headers) -> Headers:
    """Of a 1xx answer or trailers, whose fields pass as they are but for what HTTP/2 does not allow."""
    return [field for field in headers if field[0] not in _NOT_BESIDE_HEADS]


def chunked(head: RequestHead) -> RequestHead:
    """For content of a length that is not known (RFC 9112 section 6.3)."""
    return head.replace(headers=[*head.headers, (b"transfer-encoding", b"chunked")])


def fits_http2(head: RequestHead) -> bool:
    """May it travel in HTTP/2 and be restored as it is? Not what asks for a tunnel, or has a target beyond RFC 3986."""
    return asks_for_tunnel(head) is False and _is_path(head.target) is not None


def asks_for_tunnel(head: RequestHead) -> bool | None:
    """By an Upgrade or an extended CONNECT. None: by an Upgrade that can't become an extended CONNECT (RFC 8441)."""
    if head.protocol:
        return True
    protocols = upgrade_protocols(head.headers)
    if not protocols:
        return False
    return True if head.method == b"GET" and len(protocols) == 1 and not frames_content(head.headers) else None


def without_ours(headers: Headers) -> Headers:
    """Trailers, or the fields of a 1xx answer, without what only agents may say."""
    return [field for field in headers if field[0] != REASON_HEADER and not is_like_xfcc(field[0])]


def upgrade_protocols(headers: Headers) -> list[bytes]:
    """What a message asks to go on with, as far as that is not between its sender and us."""
    if not asks_to_upgrade(headers):
        return []
    return [
        token for token in _tokens(headers, b"upgrade") if token.partition(b"/")[0].lower() not in _NOT_OURS_TO_PASS
    ]


def switches_as_asked(head: ResponseHead, asked: Headers) -> bool:
    """Does this 101 name a protocol, and none that the request did not ask for?"""
    wanted = {token.lower() for token in _tokens(asked, b"upgrade")}
    named = {token.lower() for token in _tokens(head.headers, b"upgrade")}
    return bool(named) and named <= wanted


def expectations(head: RequestHead) -> list[bytes]:
    """What the client expects, in lower case. HTTP/1.0 has no expectations (RFC 9110 section 10.1.1)."""
    return [] if head.http_version == b"1.0" else [token.lower() for token in _tokens(head.headers, b"expect")]


def _keep_hop_fields(head: RequestHead, headers: Headers) -> None:
    options = []
    if any(name == b"te" and _wants_trailers(value) for name, value in head.headers):
        options.append(b"te")
        headers.append((b"te", b"trailers"))
    if head.http_version != b"1.0" and head.method != b"CONNECT" and (protocols := upgrade_protocols(head.headers)):
        options.append(b"upgrade")
        headers.append((b"upgrade", b", ".join(protocols)))
    if options:
        headers.append((b"connection", b", ".join(options)))


def _forwarded(headers: Headers, edits: RequestEdits) -> Headers:
    if edits.forwarded == "append":
        # What a gateway joins to ours, or takes instead, would stand where the reader looks for what we say.
        headers = [
            field for field in headers if field[0].translate(JOINED_ANYHOW) not in _FORWARDED or field[0] in _FORWARDED
        ]
        _add_to_list(headers, _FORWARDED_FOR, edits.client)
        if not has(headers, _FORWARDED_PROTO):
            headers.append((_FORWARDED_PROTO, b"http"))
    elif edits.forwarded == "set":
        headers = [field for field in headers if field[0].translate(JOINED_ANYHOW) not in _FORWARDED]
        headers += [(_FORWARDED_FOR, edits.client), (_FORWARDED_PROTO, b"http")]
    return headers


def _put_host(headers: Headers, authority: bytes) -> None:
    for at, (name, _) in enumerate(headers):
        if name == b"host":
            headers[at] = (b"host", authority)
            return
    headers.insert(0, (b"host", authority))


def _add_to_list(headers: Headers, name: bytes, value: bytes) -> None:
    """Behind the last value of a field that is a list."""
    for at in range(len(headers) - 1, -1, -1):
        if headers[at][0] == name:
            before = headers[at][1]
            headers[at] = (name, before + b", " + value if before else value)
            return
    headers.append((name, value))


def has(headers: Headers, wanted: bytes) -> bool:
    for field in headers:  # noqa: SIM110 -- a generator is an object more
        if field[0] == wanted:
            return True
    return False


def frames_content(headers: Headers) -> bool:
    """Do they say where the content ends?"""
    return has(headers, b"content-length") or has(headers, b"transfer-encoding")


def _tokens(headers: Headers, wanted: bytes) -> list[bytes]:
    """The elements of a list in one or several fields, without empty ones."""
    values = (value for name, value in headers if name == wanted)
    return [token for value in values for part in value.split(b",") if (token := part.strip(b" \t"))]


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    tokens: Iterable[bytes] = _tokens(headers, b"connection")
    return frozenset(token.lower() for token in tokens) - _NEVER_NAMED


def _wants_trailers(te: bytes) -> bool:
    return any(part.partition(b";")[0].strip().lower() == b"trailers" for part in te.split(b","))


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
    """What routing rules look at. CONNECT has neither path nor query: its target is an authority.

    ``host`` is what goes on: the authority of the target, where it has one, and not the field beside it.
    """
    target, authority = head.target, b""
    if not target.startswith(b"/"):
        if head.method == b"CONNECT" and not head.protocol:
            target, authority = b"", head.target
        else:
            target, authority = origin_form(head.target)
    path, query = target.decode("latin-1"), ""
    at = path.find("?")
    if at >= 0:
        path, query = path[:at], path[at + 1 :]
    return received(path, query, head.method.decode("latin-1"), head.headers, authority)


def problem(
    reason: Reason,
    detail: str,
    decided_by: str,
    tried: Sequence[str],
    *,
    status: int = 0,
    date: bytes = b"",
    as_grpc: Grpc | None = None,
) -> tuple[ResponseHead, bytes]:
    """Head and body of our own answer (RFC 9457). `status` overrides the reason's. `date`: the present, as in Date.
    `as_grpc`: the status for a gRPC client, whose answer has no body."""
    info = reason.info
    if as_grpc is not None:
        fields = [
            (b"content-type", b"application/grpc"),
            (b"content-length", b"0"),
            *error_fields(as_grpc, sentence(reason, detail, decided_by)),
            (REASON_HEADER, info.flag.encode()),
        ]
        if date:
            fields.append((b"date", date))
        return ResponseHead(1, 200, fields), b""
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
    if date:
        headers.append((b"date", date))
    return ResponseHead(1, status, headers), raw


def xfcc_value(own: str, peer: str, peer_sha256: str) -> bytes:
    """Envoy's form: whose proxy says so, hash of the client's certificate, its URI SAN."""
    return f"By={own};Hash={peer_sha256};URI={peer}".encode()
