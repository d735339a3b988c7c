"""What HTTP/2 may look like: bounds, rules, and heads as fields <-> heads as events. Both engines read it here.

`Rule` is the table of everything that is refused: with which code, by which clause, in which words, and whether it
ends the connection or only the stream. A broken rule of one request leaves the others alone; what breaks the
connection's own state (framing, HPACK, windows, the order of frames) ends it. Stricter than the RFC asks, on purpose:
names are tokens and values have no control characters (as in HTTP/1, where a message may go on to), Content-Length at
most once, Host only as a copy of :authority, no path but origin-form and ``*``, trailers without fields that frame,
route or authenticate.

Budgets. Floods cost the peer little per frame and us more, so each frame that brings nothing is charged to a budget:

    glitches   PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA, frames of unknown types and of closed streams,
               1xx answers, empty CONTINUATION, an RST_STREAM of ours to a server
    resets     (servers) streams that end before their response does, by whoever's RST_STREAM: rapid reset
               (CVE-2023-44487), rules broken in order to make us reset (CVE-2025-8671), and refused requests

Both fill up with time (`now`, which the driver passes) and with work that was done: an exchange that came to its end,
a frame with content. Empty, the connection ends with ENHANCE_YOUR_CALM. The octets and frames of one header block
have bounds of their own (CVE-2024-27316), and so has what it grows to: above `max_header_list_bytes` the request is
refused with 431, above HEADER_BOMB times that the connection ends.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import NamedTuple

from netproxy.codec.events import Headers, RequestHead
from netproxy.codec.strict import FORBIDDEN_TRAILERS, KIB, check_authority, check_content_length, check_field
from netproxy.errors import LocalProtocolError

MIB = 1024 * KIB
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1
# The size that every peer takes (RFC 9113 section 4.2). Larger frames only make streams wait for one another.
DATA_FRAME = 16 * KIB
HEADER_BOMB = 16
MAX_SETTINGS_ENTRIES = 32
ASSUMED_MAX_STREAMS = 100
"""Until the peer's SETTINGS come (RFC 9113 section 6.5.2 recommends no less)."""
MAX_PINGS = 8
"""Of ours that wait for their answers."""
MAX_REMEMBERED_RESETS = 256
"""Streams that we reset and whose late frames are ignored. Those of streams before them are answered by RST_STREAM."""
DRAIN_PING = b"\x00netprx\x00"
EXCHANGE_EARNS = 10
CONTENT_EARNS = 2
OCTETS_PER_GLITCH = 512
"""What fills the budget for glitches: an exchange, a DATA frame either way, and so many octets in it. A receiver that
sends two WINDOW_UPDATEs per KiB stays within that."""


class Frame(enum.IntEnum):
    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(enum.IntEnum):
    END_STREAM = 1
    ACK = 1
    END_HEADERS = 4
    PADDED = 8
    PRIORITY = 32


class Setting(enum.IntEnum):
    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    ENABLE_CONNECT_PROTOCOL = 8


class Code(enum.IntEnum):
    """RFC 9113 section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


@dataclass(frozen=True)
class H2Limits:
    """Bounds of one HTTP/2 connection, in octets unless the name says otherwise."""

    max_header_list_bytes: int = 64 * KIB
    """Each field counts its name, its value and 32 (RFC 9113 section 6.5.2)."""
    max_headers: int = 256
    max_streams: int = 100
    """Open at once: the client's as a server allows them, ours as a client whatever the server allows."""
    stream_window: int = 64 * KIB
    connection_window: int = MIB
    """Shared by all streams. Below `max_streams` times `stream_window`, readers that are slow hold up the others: worth
    it towards clients, each of which then harms itself; where many clients share a connection, it should not be."""
    max_frame_bytes: int = 16 * KIB
    max_queued_bytes: int = MIB
    """Of one stream, given to `send` while the peer's window is closed."""
    connect_protocol: bool = True
    """A server says that it knows extended CONNECT (RFC 8441)."""
    resets: int = 200
    resets_per_s: int = 50
    glitches: int = 2000
    glitches_per_s: int = 200

    def __post_init__(self) -> None:
        ranges = {
            "max_header_list_bytes": (KIB, MIB),
            "max_headers": (8, 100_000),
            "max_streams": (1, 2**20),
            # Less than the initial 65535 could not be enforced before the peer has seen our SETTINGS.
            "stream_window": (65535, MAX_WINDOW),
            "connection_window": (65535, MAX_WINDOW),
            "max_frame_bytes": (16 * KIB, MIB),
            "max_queued_bytes": (KIB, MAX_WINDOW),
            "resets": (1, 10**6),
            "resets_per_s": (0, 10**6),
            "glitches": (16, 10**6),
            "glitches_per_s": (0, 10**6),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: {getattr(self, name)} is not in {least}..{most}")

    @property
    def max_block_bytes(self) -> int:
        """Of one header block as it comes, compressed. HPACK does not make a list larger, unless it wants to."""
        return 2 * self.max_header_list_bytes

    @property
    def max_block_frames(self) -> int:
        return 8 + self.max_header_list_bytes // (4 * KIB)


class Rule(enum.Enum):
    """What is refused: code, clause, sentence."""

    # Of the connection.
    PREFACE = (Code.PROTOCOL_ERROR, "RFC 9113 3.4", "not the HTTP/2 connection preface")
    NO_SETTINGS = (Code.PROTOCOL_ERROR, "RFC 9113 3.4", "the first frame is not SETTINGS")
    FRAME_SIZE = (Code.FRAME_SIZE_ERROR, "RFC 9113 4.2", "frame larger than allowed, or of the wrong size")
    PADDING = (Code.PROTOCOL_ERROR, "RFC 9113 6.1", "padding as long as the frame")
    STREAM_ZERO = (
        Code.PROTOCOL_ERROR,
        "RFC 9113 6",
        "frame on stream 0 that belongs to a stream, or the other way round",
    )
    STREAM_ID = (Code.PROTOCOL_ERROR, "RFC 9113 5.1.1", "stream number that the peer may not use")
    IDLE = (Code.PROTOCOL_ERROR, "RFC 9113 5.1", "frame on an idle stream")
    INTERLEAVED = (Code.PROTOCOL_ERROR, "RFC 9113 6.10", "header block interrupted, or CONTINUATION without one")
    BLOCK_SIZE = (Code.ENHANCE_YOUR_CALM, "RFC 9113 10.5.1", "header block larger than the limit")
    BLOCK_FRAMES = (Code.ENHANCE_YOUR_CALM, "RFC 9113 10.5", "header block in more frames than the limit")
    BOMB = (Code.ENHANCE_YOUR_CALM, "RFC 9113 10.5.1", "header list many times larger than the limit")
    HPACK = (Code.COMPRESSION_ERROR, "RFC 9113 4.3", "header block that can't be decoded")
    DEPENDS_ON_ITSELF = (Code.PROTOCOL_ERROR, "RFC 7540 5.3.1", "stream that depends on itself")
    PUSH = (Code.PROTOCOL_ERROR, "RFC 9113 8.4", "PUSH_PROMISE without permission")
    SETTING = (Code.PROTOCOL_ERROR, "RFC 9113 6.5.2", "setting with a value that it can't have")
    SETTING_WINDOW = (Code.FLOW_CONTROL_ERROR, "RFC 9113 6.9.2", "initial window above 2^31-1")
    SETTING_COUNT = (Code.ENHANCE_YOUR_CALM, "RFC 9113 10.5", "more settings than the limit")
    WINDOW_ZERO = (Code.PROTOCOL_ERROR, "RFC 9113 6.9", "WINDOW_UPDATE of nothing")
    WINDOW_OVERFLOW = (Code.FLOW_CONTROL_ERROR, "RFC 9113 6.9.1", "window above 2^31-1")
    WINDOW_EXCEEDED = (Code.FLOW_CONTROL_ERROR, "RFC 9113 6.9.1", "content beyond the window")
    GLITCHES = (Code.ENHANCE_YOUR_CALM, "RFC 9113 10.5", "flood of frames that bring nothing")
    RESETS = (Code.ENHANCE_YOUR_CALM, "RFC 9113 10.5", "flood of requests that are given up")
    # Of a stream. WINDOW_ZERO and WINDOW_OVERFLOW may be, too.
    STREAM_CLOSED = (Code.STREAM_CLOSED, "RFC 9113 5.1", "frame behind the end of the message")
    TOO_MANY = (Code.REFUSED_STREAM, "RFC 9113 5.1.2", "more streams than allowed")
    LIST_SIZE = (Code.ENHANCE_YOUR_CALM, "RFC 6585 5", "header list larger than the limit")
    NO_HEAD = (Code.PROTOCOL_ERROR, "RFC 9113 8.1", "content before the head")
    TRAILERS_NOT_LAST = (Code.PROTOCOL_ERROR, "RFC 9113 8.1", "second head, or trailers that do not end the message")
    TUNNEL_FRAME = (Code.PROTOCOL_ERROR, "RFC 9113 8.5", "trailers in a tunnel")
    PSEUDO = (Code.PROTOCOL_ERROR, "RFC 9113 8.3", "pseudo-header field that is unknown, repeated or out of place")
    PSEUDO_MISSING = (Code.PROTOCOL_ERROR, "RFC 9113 8.3.1", "pseudo-header field that is missing, or may not be there")
    FIELD_NAME = (Code.PROTOCOL_ERROR, "RFC 9113 8.2.1", "field name is not a token in lower case")
    FIELD_VALUE = (
        Code.PROTOCOL_ERROR,
        "RFC 9113 8.2.1",
        "control character or surrounding white space in a field value",
    )
    CONNECTION_FIELD = (Code.PROTOCOL_ERROR, "RFC 9113 8.2.2", "field that is specific to a connection")
    TE = (Code.PROTOCOL_ERROR, "RFC 9113 8.2.2", "TE other than trailers")
    METHOD = (Code.PROTOCOL_ERROR, "RFC 9110 9.1", "method is not a token")
    SCHEME = (Code.PROTOCOL_ERROR, "RFC 9113 8.3.1", "invalid :scheme")
    PATH = (Code.PROTOCOL_ERROR, "RFC 9113 8.3.1", "invalid :path")
    AUTHORITY = (Code.PROTOCOL_ERROR, "RFC 9113 8.3.1", "invalid or missing :authority, or Host that differs from it")
    CONNECT = (Code.PROTOCOL_ERROR, "RFC 9113 8.5", "CONNECT needs host and port and takes no content")
    PROTOCOL = (Code.PROTOCOL_ERROR, "RFC 8441 4", ":protocol that is invalid or not allowed")
    STATUS = (Code.PROTOCOL_ERROR, "RFC 9113 8.3.2", "invalid :status")
    INFORMATIONAL = (Code.PROTOCOL_ERROR, "RFC 9113 8.1", "1xx answer that ends the message, or 101")
    CONTENT_LENGTH = (Code.PROTOCOL_ERROR, "RFC 9113 8.1.1", "invalid Content-Length, or more than one")
    CONTENT = (Code.PROTOCOL_ERROR, "RFC 9113 8.1.1", "content of another length than Content-Length says")
    NO_CONTENT = (Code.PROTOCOL_ERROR, "RFC 9110 6.4.1", "content in an answer that has none")
    TRAILER_FIELD = (Code.PROTOCOL_ERROR, "RFC 9110 6.5.1", "field not allowed in a trailer section")

    @property
    def code(self) -> Code:
        return self.value[0]

    @property
    def detail(self) -> str:
        return f"{self.value[2]} ({self.value[1]})"


def code_name(code: int) -> str:
    return Code(code).name if code in Code.__members__.values() else f"code {code:#x}"


class MalformedError(Exception):
    """A message that breaks a rule of its stream. Never leaves the engines."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule.detail)
        self.rule = rule


class Budget:
    """Tokens: `burst` of them, filled up with time and earned by work."""

    __slots__ = ("_burst", "_left", "_now", "_per_s")

    def __init__(self, burst: int, per_s: int) -> None:
        self._burst = self._left = float(burst)
        self._per_s = per_s
        self._now = 0.0

    @property
    def left(self) -> float:
        return self._left

    def charge(self, now: float) -> bool:
        """True while there is one left to take."""
        if now > self._now:
            if self._now:
                self.earn((now - self._now) * self._per_s)
            self._now = now
        self._left -= 1
        return self._left >= 0

    def earn(self, tokens: float) -> None:
        self._left = min(self._burst, self._left + tokens)


# --- heads that were received

_PSEUDO = (b":method", b":scheme", b":authority", b":path", b":protocol")
CONNECTION_FIELDS = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
_is_lower_token = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_is_token = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_is_value = re.compile(rb"(?:[^\x00-\x20\x7f](?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)?").fullmatch
_is_scheme = re.compile(rb"[A-Za-z][A-Za-z0-9+\-.]*").fullmatch
_is_path = re.compile(rb"/[\x21\x22\x24-\x7e]*").fullmatch
_is_status = re.compile(rb"[1-9][0-9][0-9]").fullmatch
_is_host_and_port = re.compile(rb".*:[0-9]{1,5}", re.DOTALL).fullmatch


class ReadRequest(NamedTuple):
    head: RequestHead
    length: int
    """As Content-Length says, -1 without one."""


class ReadResponse(NamedTuple):
    status: int
    headers: Headers
    length: int


def read_request(stream_id: int, fields: Headers, *, connect_protocol: bool) -> ReadRequest:
    """The request that these fields are. Host comes first, as :authority says it; crumbs of cookies are joined."""
    pseudo, rest = _split(fields, _PSEUDO)
    headers, length, hosts = _regular(rest)
    method = pseudo.get(b":method")
    if method is None:
        raise MalformedError(Rule.PSEUDO_MISSING)
    if not _is_token(method):
        raise MalformedError(Rule.METHOD)
    authority = pseudo.get(b":authority")
    if len(hosts) > 1 or (hosts and authority is not None and hosts[0] != authority):
        raise MalformedError(Rule.AUTHORITY)
    if authority is None and hosts:
        authority = hosts[0]
    if authority is None or not check_authority(authority):
        raise MalformedError(Rule.AUTHORITY)
    scheme, path, protocol = (pseudo.get(name) for name in (b":scheme", b":path", b":protocol"))
    if protocol is not None and (method != b"CONNECT" or not connect_protocol or not _is_token(protocol)):
        raise MalformedError(Rule.PROTOCOL)
    if method == b"CONNECT":
        if length > 0:
            raise MalformedError(Rule.CONNECT)
        length = -1  # what comes is the tunnel's
    if method == b"CONNECT" and protocol is None:
        if scheme is not None or path is not None:
            raise MalformedError(Rule.PSEUDO_MISSING)
        if not is_connect_target(authority):
            raise MalformedError(Rule.CONNECT)
        target, scheme = authority, b""
    else:
        if scheme is None or path is None:
            raise MalformedError(Rule.PSEUDO_MISSING)
        if not _is_scheme(scheme):
            raise MalformedError(Rule.SCHEME)
        if not _is_path(path) and (path != b"*" or method != b"OPTIONS"):
            raise MalformedError(Rule.PATH)
        target = path
    headers.insert(0, (b"host", authority))
    head = RequestHead(stream_id, method, target, headers, b"2", None, scheme, protocol or b"")
    return ReadRequest(head, length)


def read_response(fields: Headers) -> ReadResponse:
    """The answer that these fields are, 1xx or final."""
    pseudo, rest = _split(fields, (b":status",))
    headers, length, hosts = _regular(rest)
    headers[:0] = [(b"host", host) for host in hosts]  # means nothing in an answer; passed on, as in HTTP/1
    status = pseudo.get(b":status")
    if status is None:
        raise MalformedError(Rule.PSEUDO_MISSING)
    if not _is_status(status):
        raise MalformedError(Rule.STATUS)
    return ReadResponse(int(status), headers, length)


def read_trailers(fields: Headers) -> Headers:
    _, rest = _split(fields, ())
    for name, value in rest:
        _check_received(name, value)
        if name in FORBIDDEN_TRAILERS:
            raise MalformedError(Rule.TRAILER_FIELD)
    return rest


def list_size(fields: Headers) -> int:
    return sum(len(name) + len(value) + 32 for name, value in fields)


def is_connect_target(authority: bytes) -> bool:
    return _is_host_and_port(authority) is not None and 0 < int(authority.rpartition(b":")[2]) <= 65535


def _split(fields: Headers, known: tuple[bytes, ...]) -> tuple[dict[bytes, bytes], Headers]:
    pseudo: dict[bytes, bytes] = {}
    for at, (name, value) in enumerate(fields):
        if name[:1] != b":":
            rest = fields[at:]
            if any(later[:1] == b":" for later, _ in rest):
                raise MalformedError(Rule.PSEUDO)
            return pseudo, rest
        if name not in known or name in pseudo:
            raise MalformedError(Rule.PSEUDO)
        if not _is_value(value):
            raise MalformedError(Rule.FIELD_VALUE)
        pseudo[name] = value
    return pseudo, []


def _regular(fields: Headers) -> tuple[Headers, int, list[bytes]]:
    """Fields of a head without Host, what Content-Length says, the values of Host."""
    headers: Headers = []
    hosts: list[bytes] = []
    length = -1
    cookie = -1
    for name, value in fields:
        _check_received(name, value)
        if name == b"host":
            hosts.append(value)
            continue
        if name == b"content-length":
            if length >= 0 or not check_content_length(value):
                raise MalformedError(Rule.CONTENT_LENGTH)
            length = int(value)
        elif name == b"cookie":
            if cookie >= 0:
                before = headers[cookie][1]
                if value:  # else a blank would stand at the end, where HTTP/1.1 has none
                    headers[cookie] = (name, before + b"; " + value if before else value)
                continue
            cookie = len(headers)
        headers.append((name, value))
    return headers, length, hosts


def _check_received(name: bytes, value: bytes) -> None:
    if not _is_lower_token(name):
        raise MalformedError(Rule.FIELD_NAME)
    if not _is_value(value):
        raise MalformedError(Rule.FIELD_VALUE)
    if name in CONNECTION_FIELDS:
        raise MalformedError(Rule.CONNECTION_FIELD)
    if name == b"te" and value.lower() != b"trailers":
        raise MalformedError(Rule.TE)


# --- heads that are sent


def request_fields(head: RequestHead) -> tuple[Headers, int]:
    """The fields that this request is, and what its Content-Length says (-1 without one). LocalProtocolError."""
    hosts = [value for name, value in head.headers if name.lower() == b"host"]
    if len(hosts) != 1 or not check_authority(hosts[0]):
        raise LocalProtocolError(Rule.AUTHORITY.detail)
    if not _is_token(head.method):
        raise LocalProtocolError(Rule.METHOD.detail)
    fields = [(b":method", head.method)]
    if head.method == b"CONNECT" and not head.protocol:
        if head.target != hosts[0] or not is_connect_target(head.target):
            raise LocalProtocolError(Rule.CONNECT.detail)
        fields.append((b":authority", hosts[0]))
    else:
        scheme = head.scheme or b"http"
        if not _is_scheme(scheme):
            raise LocalProtocolError(Rule.SCHEME.detail)
        if not _is_path(head.target) and (head.target != b"*" or head.method != b"OPTIONS"):
            raise LocalProtocolError(Rule.PATH.detail)
        if head.protocol and (head.method != b"CONNECT" or not _is_token(head.protocol)):
            raise LocalProtocolError(Rule.PROTOCOL.detail)
        fields += [(b":scheme", scheme), (b":authority", hosts[0]), (b":path", head.target)]
        if head.protocol:
            fields.append((b":protocol", head.protocol))
    rest, length = _sendable(head.headers, skip=b"host")
    if head.method == b"CONNECT":
        if length > 0:
            raise LocalProtocolError(Rule.CONNECT.detail)
        length = -1
    return fields + rest, length


def response_fields(status: int, headers: Headers) -> tuple[Headers, int]:
    if not 100 <= status <= 999 or status == 101:
        raise LocalProtocolError(Rule.STATUS.detail)
    rest, length = _sendable(headers, skip=b"")
    return [(b":status", b"%d" % status), *rest], length


def trailer_fields(headers: Headers) -> Headers:
    rest, _ = _sendable(headers, skip=b"")
    if any(name in FORBIDDEN_TRAILERS for name, _ in rest):
        raise LocalProtocolError(Rule.TRAILER_FIELD.detail)
    return rest


def _sendable(headers: Headers, *, skip: bytes) -> tuple[Headers, int]:
    fields: Headers = []
    length = -1
    for name, value in headers:
        if check_field(name, value) is not None:
            raise LocalProtocolError(Rule.FIELD_NAME.detail if not _is_token(name) else Rule.FIELD_VALUE.detail)
        name = name.lower()
        if name == skip:
            continue
        if name in CONNECTION_FIELDS:
            raise LocalProtocolError(Rule.CONNECTION_FIELD.detail)
        if name == b"te" and value.lower() != b"trailers":
            raise LocalProtocolError(Rule.TE.detail)
        if name == b"content-length":
            if length >= 0 or not check_content_length(value):
                raise LocalProtocolError(Rule.CONTENT_LENGTH.detail)
            length = int(value)
        fields.append((name, value))
    return fields, length
