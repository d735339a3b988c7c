"""The access log of a worker: what is logged, and the line it becomes.

One JSON object per line, for each request and each opaque connection at its end, refused ones included. Names are
Envoy's where Envoy has one (`render` has the list); a field that does not apply is left out. Whether a line is wanted
is decided before anything is formatted, and without a log a request costs a few attribute tests (`on`).

What clients send goes into the line, so it may hold anything and be of any length: every octet outside of printable
ASCII is escaped, fields have limits, and a line is at most `MAX_LINE` octets with its end, which is what a pipe takes
in one piece (PIPE_BUF): workers that share one never mix their lines.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import NamedTuple, Protocol

from ..config.shard import AccessLog
from ..errors import Reason
from .record import Parties

MAX_LINE = 4096
MAX_TARGET = 1024
MAX_VALUE = 256
"""Octets of any other field that a client or server wrote."""
MAX_DETAIL = 512
_MAX_SHORT = 120
"""Octets of each quoted field, where a line would be longer than `MAX_LINE`: all fields together then fit."""
_MARK = "..."
_ALL = 1 << 32


class Outcome(NamedTuple):
    """How a request was answered. Times are from the end of its head, -1.0 for what never came."""

    status: int = 0
    responded: bool = False
    """The status is the upstream's."""
    attempts: int = 0
    reused: bool = False
    """The last attempt's connection had served others before."""
    connect_s: float = -1.0
    head_s: float = -1.0
    grpc_status: int = -1
    """-1: it is not gRPC, or ended without one."""


@dataclass(slots=True)
class Request:
    """What only HTTP has."""

    method: bytes
    target: bytes
    authority: bytes = b""
    request_id: bytes = b""
    user_agent: bytes = b""
    forwarded_for: bytes = b""
    version: bytes = b"1.1"
    """As the client spoke it; of those below 2 no difference is made."""
    outcome: Outcome = Outcome()


@dataclass(slots=True)
class Entry:
    """One request or connection that ended. Addresses are ``host:port``, "" where there is none."""

    parties: Parties
    security: str
    workload: str
    """Whose traffic this is, of the two the one on this node that was steered."""
    reason: Reason
    detail: str
    duration_s: float
    moved: tuple[int, int]
    """Octets of content from the client, to the client."""
    client: str
    original: str
    endpoint: str = ""
    principal: str = ""
    """Identity of the destination."""
    rule: str = ""
    decided_by: str = ""
    """Of a refusal: what was against it."""
    request: Request | None = None

    def who(self, node: str) -> Who:
        return Who(
            node, self.parties, self.security, self.workload, self.endpoint, self.principal, self.rule, self.original
        )


class Who(NamedTuple):
    """Of an entry, what is the same for many: see there."""

    node: str
    parties: Parties
    security: str
    workload: str
    endpoint: str
    principal: str
    rule: str
    original: str


class Lines(Protocol):
    """Where lines go; never blocks, drops and counts what it can't take."""

    def put(self, line: bytes) -> None: ...


class AccessLogger:
    """`random` gives floats in [0, 1), `clock` Unix time."""

    def __init__(self, node: str, random: Callable[[], float], clock: Callable[[], float] = time.time) -> None:
        self.on = False
        self._node = node
        self._random = random
        self._clock = clock
        self._lines: Lines | None = None
        self._selection = AccessLog()
        self._flags: frozenset[str] = frozenset()
        self._threshold = 0
        """Of 2**32: below it an id belongs to the share that is logged."""

    def select(self, selection: AccessLog) -> None:
        self._selection = selection
        self._flags = frozenset(selection.flags)
        self._threshold = round(selection.percent / 100 * _ALL)
        self._switch()

    def write_to(self, lines: Lines | None) -> None:
        self._lines = lines
        self._switch()

    def _switch(self) -> None:
        self.on = self._lines is not None and not self._selection.off

    def wants(self, reason: Reason, status: int, duration_s: float, request_id: bytes = b"") -> bool:
        """Both agents of a request decide the same of its id; what has none is sampled at random.

        A client that chooses its id chooses with it: a share gives a view of the traffic, and is no audit.
        """
        selection = self._selection
        if self._threshold:
            if self._threshold >= _ALL:
                return True
            at = zlib.crc32(request_id) if request_id else int(self._random() * _ALL)
            if at < self._threshold:
                return True
        return (
            bool(selection.min_status and status >= selection.min_status)
            or bool(selection.min_duration_s and duration_s >= selection.min_duration_s)
            or reason.info.flag in self._flags
        )

    def log(self, entry: Entry) -> None:
        if self._lines is not None:
            self._lines.put(render(entry, self._node, self._clock() - entry.duration_s))


def render(entry: Entry, node: str, began: float) -> bytes:
    """The line, with its end. `began`: Unix time."""
    line = _line(entry, began, _who_and_where(entry.who(node)), _MAX_FULL)
    if len(line) > MAX_LINE:
        line = _line(entry, began, _fixed(entry.who(node), _MAX_SHORT), _MAX_SHORT)
    return line


_MAX_FULL = 6 * MAX_TARGET


class Fixed(NamedTuple):
    """Pieces of a line that are the same for many requests."""

    head: str
    source: str
    rest: str
    cut: tuple[str, ...]


def _fixed(who: Who, limit: int) -> Fixed:
    cut: list[str] = []

    def members(pairs: tuple[tuple[str, str], ...]) -> str:
        return ",".join(f'"{name}":{_text(name, value, limit, cut)}' for name, value in pairs if value)

    parties = who.parties
    head = members((("node", who.node), ("reporter", parties.reporter), ("workload", who.workload)))
    source = members((("workload", parties.source_workload), ("principal", parties.source_principal)))
    destination = members(
        (
            ("workload", parties.destination_workload),
            ("principal", who.principal),
            ("service", parties.destination_service),
            ("address", who.endpoint),
        )
    )
    where = members((("tls", who.security), ("original_destination", who.original), ("route_name", who.rule)))
    return Fixed(head, source, f'"destination":{{{destination}}},{where}', tuple(cut))


@functools.lru_cache(2048)
def _who_and_where(who: Who) -> Fixed:
    return _fixed(who, _MAX_FULL)


def _text(name: str, value: str, limit: int, cut: list[str]) -> str:
    """Quoted, at most `limit` octets."""
    out = quoted(value)
    if len(out) <= limit:
        return out
    cut.append(name)
    # A character is up to twelve octets when it is escaped.
    size = next(n for n in (limit, limit // 2, limit // 12) if len(quoted(value[: n - 5])) <= limit - 3)
    return quoted(value[: size - 5] + _MARK)


def _octets(name: str, value: bytes, most: int, limit: int, cut: list[str]) -> str:
    """Quoted, at most `most` octets of `value`, and so on."""
    if len(value) > most:
        cut.append(name)
        return _text(name, value[:most].decode("utf-8", "backslashreplace") + _MARK, limit, cut)
    return _text(name, value.decode("utf-8", "backslashreplace"), limit, cut)


def _line(entry: Entry, began: float, fixed: Fixed, limit: int) -> bytes:
    request, info = entry.request, entry.reason.info
    cut = list(fixed.cut)
    out = [f'{{"start_time":"{_rfc3339(began)}",{fixed.head}']
    details = info.details
    if request is None:
        out.append('"protocol":"TCP"')
        if entry.reason is Reason.OK:
            details = ""
    else:
        if request.version == b"2":
            out.append('"protocol":"HTTP/2"')
            details = details.replace("http1.", "http2.")
        else:
            out.append('"protocol":"HTTP/1.1"')
        for name, value, most in (
            ("method", request.method, MAX_VALUE),
            ("path", request.target, MAX_TARGET),
            ("authority", request.authority, MAX_VALUE),
            ("request_id", request.request_id, MAX_VALUE),
            ("user_agent", request.user_agent, MAX_VALUE),
            ("x_forwarded_for", request.forwarded_for, MAX_VALUE),
        ):
            if value:
                out.append(f'"{name}":{_octets(name, value, most, limit, cut)}')
        if request.outcome.status:
            out.append(f'"response_code":{request.outcome.status}')
        if request.outcome.responded:
            details = details.replace("_before_", "_after_")
        if request.outcome.grpc_status >= 0:
            out.append(f'"grpc_status":{request.outcome.grpc_status}')
    if details:
        out.append(f'"response_code_details":"{details}"')
    out.append(
        f'"response_flags":"{info.flag}","reason":"{entry.reason.name}","bytes_received":{entry.moved[0]},'
        f'"bytes_sent":{entry.moved[1]},"duration_ms":{entry.duration_s * 1e3:.3f}'
    )
    if request is not None:
        if request.outcome.connect_s >= 0:
            out.append(f'"upstream_connect_ms":{request.outcome.connect_s * 1e3:.3f}')
        if request.outcome.head_s >= 0:
            out.append(f'"response_head_ms":{request.outcome.head_s * 1e3:.3f}')
        if request.outcome.attempts:
            reused = "true" if request.outcome.reused else "false"
            out.append(
                f'"upstream_request_attempt_count":{request.outcome.attempts},"upstream_connection_reused":{reused}'
            )
    if entry.detail:
        detail = _octets("detail", entry.detail.encode("utf-8", "backslashreplace"), MAX_DETAIL, limit, cut)
        out.append(f'"detail":{detail}')
    if entry.decided_by:
        out.append(f'"decided_by":{_text("decided_by", entry.decided_by, limit, cut)}')
    # Addresses are the kernel's, and need no escape.
    out.append(f'"source":{{{fixed.source},"address":"{entry.client}"}},{fixed.rest}')
    if cut:
        out.append(f'"cut":[{",".join(map(quoted, dict.fromkeys(cut)))}]')
    return f"{','.join(out)}}}\n".encode("ascii")


def _rfc3339(at: float) -> str:
    """In UTC, with milliseconds."""
    whole, milliseconds = divmod(round(at * 1000), 1000)
    return f"{_second(whole)}.{milliseconds:03d}Z"


@functools.lru_cache(8)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
