"""What a message looks like behind an agent: the edits of the docstring of netproxy/relay/exchange, written down again.

On purpose it shares nothing with the code: fields are pairs as they stand on the wire, and one function is one list of
rules. Tests compare octet by octet what arrives with what this says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from http import HTTPStatus

Fields = list[tuple[bytes, bytes]]

HOP = {b"connection", b"keep-alive", b"proxy-connection", b"http2-settings", b"te", b"upgrade"}
KEPT_IN_ANY_CASE = {b"host", b"content-length", b"transfer-encoding", b"trailer"}
BETWEEN_TWO_HOPS = re.compile(rb"(h2c|h2|tls|http)(/.*)?", re.I)
PHRASES = {int(status): status.phrase.encode() for status in HTTPStatus}


@dataclass(frozen=True)
class Leg:
    """One agent. `xfcc`, `client`: of inbound ones. `request_id`, `date`, `via`: "" when it adds none."""

    header_case: str = "lower"
    forwarded: str = "append"
    inbound: bool = False
    client: bytes = b""
    xfcc: bytes = b""
    dialled: bytes = b""
    request_id: bytes = b""
    date: bytes = b""
    via: bytes = b""
    trace: tuple[bytes, bytes, bytes] | None = None
    """Trace id, span id and flags that the agent would begin with. It continues a ``traceparent`` if that is right."""


@dataclass(frozen=True)
class Message:
    """`body` is what follows the head as content: "" for none. `trailers` only of a chunked one."""

    fields: Fields
    method: bytes = b"GET"
    target: bytes = b"/"
    status: int = 200
    version: bytes = b"1.1"
    body: bytes = b""
    trailers: Fields = field(default_factory=list)

    def get(self, wanted: bytes) -> list[bytes]:
        return [value.strip(b" \t") for name, value in self.fields if name.lower() == wanted]

    def items(self, wanted: bytes) -> list[bytes]:
        return [item.strip(b" \t") for item in b",".join(self.get(wanted)).split(b",") if item.strip(b" \t")]


def lines(fields: Fields) -> bytes:
    return b"".join(name + b": " + value + b"\r\n" for name, value in fields) + b"\r\n"


def content(message: Message) -> bytes:
    """As it stands behind a head that we write, if it came in one piece."""
    if not message.get(b"transfer-encoding"):
        return message.body
    chunk = b"%x\r\n%b\r\n" % (len(message.body), message.body) if message.body else b""
    return chunk + b"0\r\n" + lines(message.trailers)


def request_octets(message: Message) -> bytes:
    return b"%b %b HTTP/1.1\r\n" % (message.method, message.target) + lines(message.fields) + content(message)


def response_octets(message: Message, *, to_head: bool = False) -> bytes:
    head = b"HTTP/1.1 %d %b\r\n" % (message.status, PHRASES.get(message.status, b"")) + lines(message.fields)
    return head if to_head or message.status in (204, 304) else head + content(message)


class _Editing:
    """The fields of a message on their way: names in lower case, written out as `header_case` wants."""

    def __init__(self, message: Message, leg: Leg) -> None:
        drops = HOP | ({item.lower() for item in message.items(b"connection")} - KEPT_IN_ANY_CASE)
        self.spelling: dict[bytes, bytes] = {}
        for name, _ in message.fields:
            self.spelling.setdefault(name.lower(), name)
        self.keep = leg.header_case == "preserve"
        self.fields = [(name.lower(), value.strip(b" \t")) for name, value in message.fields]
        self.fields = [(name, value) for name, value in self.fields if name not in drops]

    def drop(self, pattern: bytes) -> None:
        self.fields = [(name, value) for name, value in self.fields if not re.fullmatch(pattern, name)]

    def has(self, name: bytes) -> bool:
        return any(name == other for other, _ in self.fields)

    def behind(self, name: bytes, value: bytes) -> None:
        """As the last element of a list."""
        places = [i for i, (other, _) in enumerate(self.fields) if other == name]
        if places:
            before = self.fields[places[-1]][1]
            self.fields[places[-1]] = (name, before + b", " + value if before else value)
        else:
            self.fields.append((name, value))

    def done(self) -> Fields:
        return [(self.spelling.get(name, name) if self.keep else name, value) for name, value in self.fields]


def edited_request(message: Message, leg: Leg) -> Message:
    edit = _Editing(message, leg)
    edit.drop(rb"x[^a-z0-9]forwarded[^a-z0-9]client[^a-z0-9]cert")
    if message.version == b"1.0":
        edit.drop(b"expect")
    target = message.target
    authority = b""
    if message.method == b"CONNECT":
        authority = target
    elif match := re.fullmatch(rb"http://([^/?]*)(.*)", target, re.I):
        authority, target = match.groups()
        if not target.startswith(b"/"):
            target = b"*" if not target and message.method == b"OPTIONS" else b"/" + target
    if authority and edit.has(b"host"):
        edit.fields = [(name, authority if name == b"host" else value) for name, value in edit.fields]
    elif not edit.has(b"host"):
        edit.fields.insert(0, (b"host", authority or leg.dialled))
    edit.fields = [(n, v.lower() if n == b"transfer-encoding" else v) for n, v in edit.fields]
    options = []
    if any(item.partition(b";")[0].strip().lower() == b"trailers" for item in message.items(b"te")):
        options.append(b"te")
        edit.fields.append((b"te", b"trailers"))
    protocols = [token for token in message.items(b"upgrade") if not BETWEEN_TWO_HOPS.fullmatch(token)]
    asks = b"upgrade" in {item.lower() for item in message.items(b"connection")}
    if protocols and asks and message.version == b"1.1" and message.method != b"CONNECT":
        options.append(b"upgrade")
        edit.fields.append((b"upgrade", b", ".join(protocols)))
    if options:
        edit.fields.append((b"connection", b", ".join(options)))
    if leg.inbound:
        if leg.xfcc:
            edit.fields.append((b"x-forwarded-client-cert", leg.xfcc))
        if leg.forwarded == "set":
            edit.drop(rb"x[^a-z0-9]forwarded[^a-z0-9](for|proto)")
        if leg.forwarded == "append":
            edit.drop(rb"x(?!-forwarded-(for|proto)$)[^a-z0-9]forwarded[^a-z0-9](for|proto)")
        if leg.forwarded != "preserve":
            edit.behind(b"x-forwarded-for", leg.client)
            if not edit.has(b"x-forwarded-proto"):
                edit.fields.append((b"x-forwarded-proto", b"http"))
    if leg.request_id and not edit.has(b"x-request-id"):
        edit.fields.append((b"x-request-id", leg.request_id))
    if leg.via:
        edit.behind(b"via", message.version + b" " + leg.via)
    if leg.trace:
        trace_id, span_id, flags = leg.trace
        given = [value for name, value in edit.fields if name == b"traceparent"]
        edit.drop(b"traceparent")
        if given:
            trace_id, flags = given[0].split(b"-")[1], b"0%d" % (int(given[0].split(b"-")[3], 16) & 3)
        edit.fields.append((b"traceparent", b"-".join((b"00", trace_id, span_id, flags))))
    trailers = [(n.lower(), v) for n, v in message.trailers if n.lower() not in (b"x-netproxy-reason",)]
    return replace(message, fields=edit.done(), target=target, version=b"1.1", trailers=trailers)


def edited_response(message: Message, request: Message, leg: Leg, *, closes: bool = False) -> Message:
    """`request`: as the agent got it. `closes`: the agent closes after this for other reasons than the request's."""
    edit = _Editing(message, leg)
    if leg.inbound:
        edit.drop(b"x-netproxy-reason")
    edit.fields = [(n, v.lower() if n == b"transfer-encoding" else v) for n, v in edit.fields]
    protocols = [token for token in message.items(b"upgrade") if not BETWEEN_TWO_HOPS.fullmatch(token)]
    asks = b"upgrade" in {item.lower() for item in message.items(b"connection")}
    if message.status in (101, 426) and protocols and asks:
        edit.fields += [(b"upgrade", b", ".join(protocols)), (b"connection", b"upgrade")]
    if leg.date and message.status != 101 and not edit.has(b"date"):
        edit.fields.append((b"date", leg.date))
    if leg.via:
        edit.behind(b"via", message.version + b" " + leg.via)
    trailers = [(n.lower(), v) for n, v in message.trailers if n.lower() not in (b"x-netproxy-reason",)]
    if message.status == 101 or (request.method == b"CONNECT" and 200 <= message.status < 300):
        edit.drop(b"content-length|transfer-encoding")
        return replace(message, fields=edit.done(), version=b"1.1", trailers=[])
    framed = edit.has(b"content-length") or edit.has(b"transfer-encoding")
    if message.status == 204:
        edit.drop(b"content-length|transfer-encoding")
    elif request.version == b"1.0":
        edit.drop(b"transfer-encoding")
        trailers = []
    elif not framed and message.status != 304:
        edit.fields.append((b"transfer-encoding", b"chunked"))
    said_close = b"close" in {item.lower() for item in request.items(b"connection")}
    if closes or said_close or request.version == b"1.0":
        before = [value for name, value in edit.fields if name == b"connection"]
        edit.fields = [item for item in edit.fields if item[0] != b"connection"]
        edit.fields.append((b"connection", b", ".join([*before, b"close"])))
    return replace(message, fields=edit.done(), version=b"1.1", trailers=trailers)


def through_http2(message: Message) -> Message:
    """A message as it comes out of HTTP/2 between two agents: ``host`` first, ``cookie`` in one, for no hop."""
    fields = [field for field in message.fields if field[0].lower() == b"host"]
    cookies = [value for name, value in message.fields if name.lower() == b"cookie"]
    for name, value in message.fields:
        if name.lower() == b"cookie":
            if cookies:
                fields.append((name, b"; ".join(cookies)))
            cookies = []
        elif name.lower() not in (b"host", b"transfer-encoding", b"connection", b"upgrade"):
            fields.append((name, value))
    return replace(message, fields=fields, version=b"2")


def out_of_http2(request: Message, was: Message) -> Message:
    """Chunked again, if it `was` and anything was in it."""
    if was.get(b"transfer-encoding") and (was.body or was.trailers):
        return replace(request, fields=[*request.fields, (b"transfer-encoding", b"chunked")], trailers=was.trailers)
    return request


# --- HTTP/2: names are in lower case, and no message has fields of a connection


def edited_request_of_http2(message: Message, leg: Leg, authority: bytes) -> Message:
    """As it goes on in HTTP/1.1, when all of it is there."""
    crumbs = b"; ".join(filter(None, message.get(b"cookie")))
    fields = [(b"host", authority)]
    for name, value in message.fields:
        if name != b"cookie":
            fields.append((name, value))
        elif crumbs is not None:
            fields.append((name, crumbs))
            crumbs = None
    edited = edited_request(replace(message, fields=fields, version=b"2"), replace(leg, header_case="lower"))
    if (message.body or message.trailers) and not message.get(b"content-length"):
        return replace(edited, fields=[*edited.fields, (b"transfer-encoding", b"chunked")])
    return edited


def edited_response_to_http2(message: Message, request: Message, leg: Leg) -> Message:
    """Of an endpoint that speaks HTTP/1.1."""
    edited = edited_response(message, request, replace(leg, header_case="lower"))
    drops = {b"connection", b"transfer-encoding", b"upgrade"} | (
        {b"content-length"} if message.status == 204 else set()
    )
    return replace(edited, fields=[(name, value) for name, value in edited.fields if name not in drops])


def may_be_http2(request: Message) -> bool:
    """As an agent passes it to the next one."""
    return request.method != b"CONNECT" and request.target.startswith(b"/") and not request.get(b"upgrade")
