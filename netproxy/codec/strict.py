"""Checks HTTP/1 bytes before an engine sees them, and knows by itself where each message ends.

Engines are lenient in different ways, and two parsers that disagree about one message are what request
smuggling is made of. So every octet passes here first: what comes out of `Strict.next` can be read in one
way only. It is a push filter (`push` bytes, `next` vetted pieces), linear in its input however it is cut up, and what
it refuses depends on the octets alone, never on how they were cut. It keeps at most one head, one
chunk line or one trailer line, plus what the caller pushes while a message waits (`buffered`).

    state        reads                                        goes to
    WAIT         nothing: between messages, bytes are kept    HEAD       by `next_message` or `expect`
    HEAD         start line and fields up to an empty line    WAIT | LENGTH | CHUNK_LINE | UNTIL_CLOSE; HEAD after 1xx;
                                                              TUNNEL after a 101 that was asked for, 2xx to CONNECT
    LENGTH       Content-Length octets                        WAIT
    UNTIL_CLOSE  all octets                                   WAIT       by `eof`
    CHUNK_LINE   chunk-size and extensions                    CHUNK_DATA | TRAILER after size 0
    CHUNK_DATA   chunk-size octets                            CHUNK_END
    CHUNK_END    CRLF                                         CHUNK_LINE
    TRAILER      fields up to an empty line                   WAIT
    TUNNEL       nothing: what follows is no HTTP             -
    DISCARD      all octets, thrown away                      -

`Rule` is the table of everything that is refused, with the clause. Stricter than the RFC asks, on purpose:
no obs-fold, no bare LF, no BWS in chunk lines, no repeated Content-Length even if identical, no HTTP/1.x
other than 1.0 and 1.1, no control characters in values, no "#" in targets.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import NamedTuple

from netproxy.codec.events import Headers, Spelling
from netproxy.errors import RemoteProtocolError

KIB = 1024


@dataclass(frozen=True)
class H1Limits:
    """Bounds of one HTTP/1 connection, in octets unless the name says otherwise."""

    max_head_bytes: int = 64 * KIB
    max_headers: int = 256
    max_trailer_bytes: int = 16 * KIB
    # What a client may send ahead of its answers before reading from it should pause. One head of usual size
    # and then some: pipelining is rare, and the kernel's buffer keeps the rest.
    max_pipelined_bytes: int = 64 * KIB


class Rule(enum.Enum):
    """What is refused: status for a request, clause, sentence. A bad response is always a 502."""

    START = (400, "RFC 9112 2.1", "the first octet starts no HTTP/1 message")
    REQUEST_LINE = (400, "RFC 9112 3", "malformed request line")
    STATUS_LINE = (400, "RFC 9112 4", "malformed status line")
    VERSION = (505, "RFC 9110 15.6.6", "HTTP version other than 1.0 and 1.1")
    LEADING_LINES = (400, "RFC 9112 2.2", "too many empty lines before the request line")
    BARE_LF = (400, "RFC 9112 2.2", "line not ended by CRLF")
    HEAD_SIZE = (431, "RFC 6585 5", "head larger than the limit")
    FIELD_COUNT = (431, "RFC 6585 5", "more fields than the limit")
    OBS_FOLD = (400, "RFC 9112 5.2", "folded field line, or white space before the first field")
    SPACE_BEFORE_COLON = (400, "RFC 9112 5.1", "white space between field name and colon")
    FIELD_NAME = (400, "RFC 9110 5.1", "field name is not a token")
    FIELD_VALUE = (400, "RFC 9110 5.5", "control character in a field value")
    TARGET = (400, "RFC 9112 3.2", "request target in none of the four forms")
    CONNECT_TARGET = (400, "RFC 9110 9.3.6", "CONNECT needs host and port and takes no content")
    HOST_MISSING = (400, "RFC 9112 3.2", "HTTP/1.1 request without Host")
    HOST_TWICE = (400, "RFC 9112 3.2", "more than one Host")
    HOST = (400, "RFC 9112 3.2", "invalid Host")
    CONTENT_LENGTH = (400, "RFC 9112 6.3", "invalid Content-Length")
    CONTENT_LENGTH_TWICE = (400, "RFC 9112 6.3", "more than one Content-Length")
    TE_AND_LENGTH = (400, "RFC 9112 6.1", "Transfer-Encoding together with Content-Length")
    TE_IN_1_0 = (400, "RFC 9112 6.1", "Transfer-Encoding in HTTP/1.0")
    TE_TWICE = (400, "RFC 9112 6.1", "more than one Transfer-Encoding")
    TE_CODING = (501, "RFC 9112 6.1", "transfer coding other than chunked")
    TE_STATUS = (400, "RFC 9112 6.1", "Transfer-Encoding in a 1xx or 204 answer")
    CONNECTION = (400, "RFC 9110 7.6.1", "Connection is not a list of tokens, or names Host or Content-Length")
    SWITCH = (400, "RFC 9110 15.2.2", "101 that was not asked for, or names no protocol")
    UNSOLICITED = (400, "RFC 9112 9.2", "octets that answer no request")
    CHUNK_LINE = (400, "RFC 9112 7.1", "malformed chunk size or extension")
    CHUNK_LINE_SIZE = (400, "RFC 9112 7.1.1", "chunk line larger than the limit")
    CHUNK_OVERHEAD = (400, "RFC 9112 7.1.1", "chunk framing out of proportion to the data")
    CHUNK_END = (400, "RFC 9112 7.1", "chunk data not followed by CRLF")
    TRAILER_SIZE = (431, "RFC 6585 5", "trailer section larger than the limit")
    TRAILER_FIELD = (400, "RFC 9110 6.5.1", "field not allowed in a trailer section")
    EOF = (400, "RFC 9112 8", "the peer closed in the middle of a message")

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def detail(self) -> str:
        return f"{self.value[2]} ({self.value[1]})"


class State(enum.Enum):
    WAIT = enum.auto()
    HEAD = enum.auto()
    LENGTH = enum.auto()
    UNTIL_CLOSE = enum.auto()
    CHUNK_LINE = enum.auto()
    CHUNK_DATA = enum.auto()
    CHUNK_END = enum.auto()
    TRAILER = enum.auto()
    TUNNEL = enum.auto()
    DISCARD = enum.auto()


# `Head.length` of bodies without a length of their own.
CHUNKED = -1
UNTIL_CLOSE = -2


class Head(NamedTuple):
    """A checked head. `length`: octets of body, CHUNKED or UNTIL_CLOSE. `close`: the sender ends with this message.

    `tunnel`: of a request, that its answer may begin a tunnel; of a response, that it does.
    """

    version: bytes
    headers: Headers
    length: int
    close: bool
    method: bytes = b""
    target: bytes = b""
    status: int = 0
    tunnel: bool = False
    spelling: Spelling | None = None


class Piece(NamedTuple):
    """Vetted octets, for an engine to read. `head` if they are one head, `end` if the message ends with them."""

    raw: bytes
    head: Head | None
    end: bool


# 2^63 - 1: what fits every peer's signed 64 bits. 19 digits also keeps a run of leading zeros out.
MAX_LENGTH = 2**63 - 1
# RFC 9112 2.2 asks for one empty line before a request line; old clients send one after a POST.
MAX_LEADING_LINES = 2
# 16 hex digits, 4 KiB of extensions, CRLF.
MAX_CHUNK_LINE = 16 + 4 * KIB + 2
# A body of one-octet chunks with long extensions makes us read thousands of octets per octet of data. Each
# chunk earns its usual line and twice its data; what is above that adds up to at most this much.
MAX_CHUNK_OVERHEAD = 16 * KIB

_TCHAR = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"
_VALUE_OCTET = rb"[^\x00-\x08\x0a-\x1f\x7f]"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'

is_token = re.compile(rb"[%b]+" % _TCHAR).fullmatch
_is_value = re.compile(rb"%b*" % _VALUE_OCTET).fullmatch
_field = re.compile(rb"([%b]+):(%b*)" % (_TCHAR, _VALUE_OCTET)).fullmatch
_request_line = re.compile(rb"([%b]+) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])" % _TCHAR).fullmatch
# The reason phrase and the space before it are left out by too many servers to insist on them.
_status_line = re.compile(rb"HTTP/([0-9]\.[0-9]) ([1-9][0-9][0-9])(?: %b*)?" % _VALUE_OCTET).fullmatch
_chunk_line = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[%b]+(?:=(?:[%b]+|%b))?)*" % (_TCHAR, _TCHAR, _QUOTED)).fullmatch
_digits = re.compile(rb"[0-9]{1,19}").fullmatch
# RFC 3986 3.2.2 without userinfo (RFC 9110 4.2.4), zone ids and IPvFuture; a host is not empty (RFC 9110 4.2.1).
_authority = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2}){1,255})(?::([0-9]{0,5}))?"
).fullmatch
_absolute_form = re.compile(rb"[Hh][Tt][Tt][Pp]://([^/?#]*)(?:[/?][^#]*)?").fullmatch
_REQUEST_STARTS = frozenset(re.findall(rb"[%b\r\n]" % _TCHAR, bytes(range(256))))

# RFC 9110 6.5.1: fields that frame, route, authenticate, modify the request or say how to process the content.
FORBIDDEN_TRAILERS = frozenset(
    b"""
    transfer-encoding content-length host connection keep-alive proxy-connection te trailer upgrade
    cache-control expect max-forwards pragma range if-match if-none-match if-modified-since if-unmodified-since if-range
    authorization proxy-authorization authentication-info proxy-authenticate proxy-authentication-info www-authenticate
    cookie set-cookie age expires date location retry-after vary
    content-encoding content-type content-range forwarded x-forwarded-for x-forwarded-host x-forwarded-proto
    """.split()
)


def check_target(method: bytes, target: bytes) -> Rule | None:
    """The four forms of RFC 9112 3.2, each only where it may stand."""
    if not is_token(method):
        return Rule.REQUEST_LINE
    if method == b"CONNECT":
        match = _authority(target)
        port = match[1] if match else None
        return None if port and 0 < int(port) <= 65535 else Rule.CONNECT_TARGET
    if target.startswith(b"/"):
        return Rule.TARGET if b"#" in target else None
    if target == b"*":
        return None if method == b"OPTIONS" else Rule.TARGET
    match = _absolute_form(target)
    return None if match and check_authority(match[1]) else Rule.TARGET


def check_authority(value: bytes) -> bool:
    match = _authority(value)
    return match is not None and (not match[1] or int(match[1]) <= 65535)


def check_field(name: bytes, value: bytes) -> Rule | None:
    """One field that we are about to send: what `Strict` would accept, already without surrounding white space."""
    if not is_token(name):
        return Rule.FIELD_NAME
    if not _is_value(value) or value.strip(b" \t") != value:
        return Rule.FIELD_VALUE
    return None


def field_rule(line: bytes) -> Rule:
    """What is wrong with a field line that can't be read."""
    name, colon, _ = line.partition(b":")
    if line[:1] in (b" ", b"\t"):
        return Rule.OBS_FOLD
    if colon and name[-1:] in (b" ", b"\t") and is_token(name.rstrip(b" \t")):
        return Rule.SPACE_BEFORE_COLON
    return Rule.FIELD_VALUE if colon and is_token(name) else Rule.FIELD_NAME


def check_chunk_line(line: bytes) -> bool:
    """Size and extensions, without CRLF."""
    return _chunk_line(line) is not None


def check_content_length(value: bytes) -> bool:
    return _digits(value) is not None and int(value) <= MAX_LENGTH


def connection_options(headers: Headers) -> list[bytes]:
    """The options of all Connection fields, in lower case; empty list elements are left out (RFC 9110 5.6.1)."""
    options: list[bytes] = []
    for name, value in headers:
        if name == b"connection":
            options += [option for part in value.split(b",") if (option := part.strip(b" \t").lower())]
    return options


def asks_to_upgrade(headers: Headers) -> bool:
    """An Upgrade field counts only when Connection names it (RFC 9110 7.8)."""
    return any(name == b"upgrade" for name, _ in headers) and b"upgrade" in connection_options(headers)


class Strict:
    """One direction of one connection: requests, or the responses to the methods given to `expect`."""

    def __init__(self, limits: H1Limits, *, responses: bool = False) -> None:
        self._limits = limits
        self._responses = responses
        self.keep_spelling = False
        """Of the fields that are read from now on."""
        self._buf = bytearray()
        self._state = State.WAIT
        self._method = b""
        self._upgrade = False
        self._left = 0
        self._overhead = 0
        self._cr_seen = False
        self._section = 0
        self._trailers = 0
        self._start_head()
        if not responses:
            self._state = State.HEAD

    def __repr__(self) -> str:
        return f"<Strict {self._state.name} buffered={len(self._buf)} left={self._left}>"

    @property
    def state(self) -> State:
        return self._state

    @property
    def buffered(self) -> int:
        """Octets pushed and not yet given out by `next`."""
        return len(self._buf)

    def push(self, data: bytes) -> None:
        if self._state is not State.DISCARD:
            self._buf += data

    def next(self) -> Piece | None:
        """The next vetted piece, None when more octets are needed or the message waits. Raises RemoteProtocolError."""
        if self._state is State.HEAD:
            return self._read_head()
        if self._state in (State.WAIT, State.TUNNEL, State.DISCARD):
            return None
        return self._read_body()

    def next_message(self) -> None:
        """The exchange is over: read the next request."""
        assert self._state is State.WAIT, self
        self._start_head()
        self._state = State.HEAD

    def expect(self, method: bytes, *, upgrade: bool = False) -> None:
        """A request with this method goes out: read its response. `upgrade`: it may be 101."""
        self._method = method
        self._upgrade = upgrade
        self.next_message()

    def tunnel(self) -> None:
        """The request that waits was granted its tunnel: what comes behind it is no HTTP."""
        assert self._state is State.WAIT, self
        self._state = State.TUNNEL

    def take_tunnelled(self) -> bytes:
        """Octets of the tunnel that came together with the head before it."""
        assert self._state is State.TUNNEL, self
        data = bytes(self._buf)
        self._buf.clear()
        return data

    def discard(self) -> None:
        """Nothing more is to be read from this peer (RFC 9112 9.6)."""
        self._state = State.DISCARD
        self._buf.clear()

    def eof(self) -> bool:
        """The peer's end of stream. True if it ends an until-close body; raises in the middle of a message."""
        if self._state is State.UNTIL_CLOSE:
            self._state = State.WAIT
            return True
        begun = bool(self._buf) or self._responses
        if self._state not in (State.WAIT, State.DISCARD) and (self._state is not State.HEAD or begun):
            raise self._refusal(Rule.EOF)
        return False

    def _refusal(self, rule: Rule) -> RemoteProtocolError:
        return RemoteProtocolError(rule.detail, 502 if self._responses else rule.status)

    # Heads. The head stays in the buffer until its empty line; each line is checked once, when it is complete.

    def _start_head(self) -> None:
        self._scan = 0  # up to here there is no LF
        self._line_start = 0
        self._leading_lines = 0
        self._start_line: tuple[bytes, bytes, bytes] | None = None
        self._fields: Headers = []
        self._spelling: dict[bytes, bytes] = {}

    def _read_head(self) -> Piece | None:
        buf = self._buf
        limit = self._limits.max_head_bytes
        while True:
            # Before the search for a line end: a TLS record or other noise may never have one.
            if self._start_line is None and buf and not self._may_start(bytes(buf[:1])):
                raise self._refusal(Rule.START)
            line_end = buf.find(b"\n", self._scan)
            if line_end < 0:
                self._scan = len(buf)
                if len(buf) > limit:
                    raise self._refusal(Rule.HEAD_SIZE)
                return None
            if line_end >= limit:
                raise self._refusal(Rule.HEAD_SIZE)
            line = self._take_line(self._line_start, line_end)
            self._line_start = self._scan = line_end + 1
            if self._start_line is None:
                if line:
                    self._start_line = self._read_start_line(line)
                    continue
                self._leading_lines += 1
                if self._responses or self._leading_lines > MAX_LEADING_LINES:
                    raise self._refusal(Rule.LEADING_LINES)
                del buf[: line_end + 1]
                self._line_start = self._scan = 0
            elif line:
                self._fields.append(self._read_field(line))
                if len(self._fields) > self._limits.max_headers:
                    raise self._refusal(Rule.FIELD_COUNT)
            else:
                return self._finish_head(self._start_line)

    def _may_start(self, octet: bytes) -> bool:
        return octet == b"H" if self._responses else octet in _REQUEST_STARTS

    def _take_line(self, start: int, line_end: int) -> bytes:
        """The line that ends with the LF at `line_end`, without its CRLF."""
        if line_end == start or self._buf[line_end - 1] != 0x0D:
            raise self._refusal(Rule.BARE_LF)
        return bytes(self._buf[start : line_end - 1])

    def _read_start_line(self, line: bytes) -> tuple[bytes, bytes, bytes]:
        """(version, method, target) or (version, status, b"")."""
        if self._responses:
            match = _status_line(line)
            if match is None:
                raise self._refusal(Rule.STATUS_LINE)
            parts = (match[1], match[2], b"")
        else:
            match = _request_line(line)
            if match is None:
                raise self._refusal(Rule.REQUEST_LINE)
            parts = (match[3], match[1], match[2])
        if parts[0] not in (b"1.1", b"1.0"):
            raise self._refusal(Rule.VERSION)
        if not self._responses and (rule := check_target(parts[1], parts[2])) is not None:
            raise self._refusal(rule)
        return parts

    def _read_field(self, line: bytes) -> tuple[bytes, bytes]:
        match = _field(line)
        if match is not None:
            name = match[1].lower()
            if self.keep_spelling:
                self._spelling.setdefault(name, match[1])
            return name, match[2].strip(b" \t")
        raise self._refusal(field_rule(line))

    def _finish_head(self, start_line: tuple[bytes, bytes, bytes]) -> Piece:
        version, second, target = start_line
        headers = self._fields
        length = self._content_length(headers)
        chunked = self._chunked(headers, version)
        options = connection_options(headers)
        if not all(is_token(option) for option in options) or b"host" in options or b"content-length" in options:
            # Naming Host or Content-Length would make a relay that obeys drop them, and so change the message.
            raise self._refusal(Rule.CONNECTION)
        close = version == b"1.0" or b"close" in options
        if self._responses:
            head = self._finish_response(Head(version, headers, 0, close, status=int(second)), length, chunked)
        else:
            self._check_host(headers, version)
            tunnel = version == b"1.1" and asks_to_upgrade(headers)
            if second == b"CONNECT":
                if chunked or length:
                    raise self._refusal(Rule.CONNECT_TARGET)
                # Octets after a refused CONNECT may be meant for the tunnel: they are no requests.
                close = tunnel = True
            head = Head(version, headers, CHUNKED if chunked else length or 0, close, second, target, tunnel=tunnel)
        if self.keep_spelling:
            head = head._replace(spelling=self._spelling)
        raw = bytes(self._buf[: self._line_start])
        del self._buf[: self._line_start]
        self._start_head()
        self._start_body(head)
        return Piece(raw, head, self._state is State.WAIT)

    def _start_body(self, head: Head) -> None:
        if self._responses and head.tunnel:
            self._state = State.TUNNEL
        elif self._responses and head.status < 200:
            self._state = State.HEAD
        elif head.length == CHUNKED:
            self._state = State.CHUNK_LINE
            self._overhead = 0
        elif head.length == UNTIL_CLOSE:
            self._state = State.UNTIL_CLOSE
        elif head.length:
            self._state = State.LENGTH
            self._left = head.length
        else:
            self._state = State.WAIT

    def _finish_response(self, head: Head, length: int | None, chunked: bool) -> Head:
        status = head.status
        if status == 101 and not (self._upgrade and head.version == b"1.1" and asks_to_upgrade(head.headers)):
            raise self._refusal(Rule.SWITCH)
        if chunked and (status < 200 or status == 204):
            raise self._refusal(Rule.TE_STATUS)
        # RFC 9112 6.3, in its order.
        tunnel = status == 101 or (self._method == b"CONNECT" and 200 <= status < 300)
        if self._method == b"HEAD" or status < 200 or status in (204, 304) or tunnel:
            octets = 0
        elif chunked:
            octets = CHUNKED
        else:
            octets = UNTIL_CLOSE if length is None else length
        return head._replace(length=octets, close=head.close or octets == UNTIL_CLOSE, tunnel=tunnel)

    def _content_length(self, headers: Headers) -> int | None:
        values = [value for name, value in headers if name == b"content-length"]
        if not values:
            return None
        if len(values) > 1:
            raise self._refusal(Rule.CONTENT_LENGTH_TWICE)
        if not check_content_length(values[0]):
            raise self._refusal(Rule.CONTENT_LENGTH)
        return int(values[0])

    def _chunked(self, headers: Headers, version: bytes) -> bool:
        places = [i for i, (name, _) in enumerate(headers) if name == b"transfer-encoding"]
        if not places:
            return False
        if version == b"1.0":
            raise self._refusal(Rule.TE_IN_1_0)
        if len(places) > 1:
            raise self._refusal(Rule.TE_TWICE)
        if any(name == b"content-length" for name, _ in headers):
            # RFC 9112 6.3 lets a recipient choose; nothing good sends both: an attack, or a peer that cannot frame.
            raise self._refusal(Rule.TE_AND_LENGTH)
        coding = headers[places[0]][1].lower()  # RFC 9112 7: names of codings are case-insensitive
        if coding != b"chunked":
            raise self._refusal(Rule.TE_CODING)
        headers[places[0]] = (b"transfer-encoding", coding)
        return True

    def _check_host(self, headers: Headers, version: bytes) -> None:
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) > 1:
            raise self._refusal(Rule.HOST_TWICE)
        if hosts and not check_authority(hosts[0]):
            raise self._refusal(Rule.HOST)
        if not hosts and version == b"1.1":
            raise self._refusal(Rule.HOST_MISSING)

    # Bodies. All that is there and allowed goes out as one piece.

    def _read_body(self) -> Piece | None:
        buf = self._buf
        size = len(buf)
        at = 0
        while at < size:
            state = self._state
            if state is State.LENGTH or state is State.CHUNK_DATA:
                take = min(self._left, size - at)
                at += take
                self._left -= take
                if self._left == 0:
                    self._state = State.CHUNK_END if state is State.CHUNK_DATA else State.WAIT
            elif state is State.UNTIL_CLOSE:
                at = size
            elif state is State.CHUNK_END:
                if buf[at] != (0x0A if self._cr_seen else 0x0D):
                    raise self._refusal(Rule.CHUNK_END)
                at += 1
                if self._cr_seen:
                    self._state = State.CHUNK_LINE
                self._cr_seen = not self._cr_seen
            elif state is State.WAIT:
                break
            else:
                after = self._read_body_line(at)
                if after == at:
                    break
                at = after
        if at == 0:
            return None
        raw = bytes(buf) if at == size else bytes(buf[:at])
        del buf[:at]
        self._scan = max(0, self._scan - at)
        return Piece(raw, None, self._state is State.WAIT)

    def _read_body_line(self, at: int) -> int:
        """Checks a chunk line or trailer line that starts at `at`: where it ends, `at` itself if it has no end yet."""
        trailer = self._state is State.TRAILER
        limit = self._limits.max_trailer_bytes - self._section if trailer else MAX_CHUNK_LINE
        too_large = Rule.TRAILER_SIZE if trailer else Rule.CHUNK_LINE_SIZE
        line_end = self._buf.find(b"\n", max(at, self._scan))
        if line_end < 0:
            self._scan = len(self._buf)
            if len(self._buf) - at > limit:
                raise self._refusal(too_large)
            return at
        if line_end + 1 - at > limit:
            raise self._refusal(too_large)
        line = self._take_line(at, line_end)
        if trailer:
            self._section += line_end + 1 - at
            self._read_trailer(line)
        else:
            self._read_chunk_line(line)
        return line_end + 1

    def _read_chunk_line(self, line: bytes) -> None:
        match = _chunk_line(line)
        if match is None:
            raise self._refusal(Rule.CHUNK_LINE)
        self._left = int(match[1], 16)
        if self._left > MAX_LENGTH:
            raise self._refusal(Rule.CHUNK_LINE)
        self._overhead = max(0, self._overhead + len(line) + 2 - 16 - 2 * self._left)
        if self._overhead > MAX_CHUNK_OVERHEAD:
            raise self._refusal(Rule.CHUNK_OVERHEAD)
        if self._left:
            self._state = State.CHUNK_DATA
        else:
            self._state = State.TRAILER
            self._section = 0
            self._trailers = 0

    def _read_trailer(self, line: bytes) -> None:
        if not line:
            self._state = State.WAIT
            return
        name, _ = self._read_field(line)
        if name in FORBIDDEN_TRAILERS:
            raise self._refusal(Rule.TRAILER_FIELD)
        self._trailers += 1
        if self._trailers > self._limits.max_headers:
            raise self._refusal(Rule.FIELD_COUNT)
