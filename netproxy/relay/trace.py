# cython: annotation_typing=False
"""The trace that a request belongs to: continued if it names one, else begun. PURE: octets at random are an argument.

Each agent is a span: its id replaces the caller's in what goes on, and the caller's becomes its parent. Rules, the
first that fits:

1. One valid ``traceparent`` (W3C Trace Context): continued as version 00, with ``tracestate`` as it is, unless that
   has more than 32 members or 1 KiB; then it goes. Fields of B3 pass as they are: who reads both takes ``traceparent``.
2. Valid B3, ``b3`` or else ``x-b3-traceid`` and ``x-b3-spanid``: continued in the form that it came in, with the
   caller's span as parent. Debug (``d``, ``x-b3-flags: 1``) is sampled, and stays debug.
3. Otherwise a new ``traceparent``. What B3 says of sampling without ids (``b3: 0``, ``x-b3-sampled``) is respected.

With 2 and 3 other fields of these two kinds go, since they contradict what is added. What the caller decided on
sampling stays. If nobody did, the last 56 bits of the trace id decide, so all agents with one percentage agree.

Threat: the caller chooses ids and sampling. Ids are checked for form, and nothing but a record may depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ..codec.events import Headers
from .ids import Ids

_STATE_MEMBERS, _STATE_OCTETS = 32, 1024
"""W3C Trace Context sections 3.3.1.1 and 3.3.1.5: no more than 32, at least 512 octets."""
_B3_FIELDS = frozenset((b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"))
_B3 = _B3_FIELDS | {b"b3"}
_W3C = frozenset((b"traceparent", b"tracestate"))
_ALL = _B3 | _W3C

# More behind the flags only in versions to come (section 3.2.4); ff is none.
_is_traceparent = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})((?:-.*)?)", re.DOTALL
).fullmatch
_is_b3 = re.compile(
    rb"(?!0+-)([0-9a-f]{32}|[0-9a-f]{16})-(?!0{16})([0-9a-f]{16})(?:-([01d])(?:-[0-9a-f]{16})?)?"
).fullmatch
_is_b3_trace = re.compile(rb"(?!0+\Z)(?:[0-9a-f]{32}|[0-9a-f]{16})").fullmatch
_is_b3_span = re.compile(rb"(?!0+\Z)[0-9a-f]{16}").fullmatch
_SAYS = {b"1": b"1", b"0": b"0", b"d": b"d", b"true": b"1", b"false": b"0"}


class Trace:
    """Ids in hexadecimal digits. `parent_id`: of the caller's span, b"" if we begin."""

    def __init__(self, trace_id: bytes, span_id: bytes, parent_id: bytes, sampled: bool) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.sampled = sampled


class TraceIds:
    """New ones, out of `entropy`, as of `Ids`."""

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self.parents = Ids(b"00-" + b"x" * 32 + b"-" + b"x" * 16 + b"-00", entropy)
        """Whole values of ``traceparent``, not sampled."""
        self.spans = Ids(b"x" * 16, entropy)


def traced(headers: Headers, ids: TraceIds, percent: float) -> tuple[Headers, Trace]:
    """The fields as they go on, and what a record of the request says. Of new traces `percent` are sampled."""
    found = [field for field in headers if field[0] in _ALL]
    parents = [value for name, value in found if name == b"traceparent"]
    if len(parents) == 1 and (match := _is_traceparent(parents[0])) and not (parents[0][:2] == b"00" and match[4]):
        # Sampled, and random (level 2): flags that we don't know are 0 (section 3.2.2.5).
        flags = int(match[3], 16) & 3
        trace = Trace(match[1], ids.spans.take(), match[2], flags & 1 == 1)
        drops = {b"traceparent"} if _is_short(found) else _W3C
        return [*_without(headers, drops), (b"traceparent", _traceparent(trace, flags & 2))], trace
    rest = _without(headers, _ALL)
    said = b""
    singles = [value for name, value in found if name == b"b3"]
    if len(singles) == 1:
        if match := _is_b3(singles[0]):
            trace, said = _continue_b3(match[1], match[2], match[3] or b"", (ids, percent))
            value = b"-".join((trace.trace_id, trace.span_id, said, trace.parent_id))
            return [*rest, (b"b3", value)], trace
        said = _SAYS.get(singles[0], b"")
    fields = {name: value for name, value in found if name in _B3_FIELDS}
    if not said:
        said = b"d" if fields.get(b"x-b3-flags") == b"1" else _SAYS.get(fields.get(b"x-b3-sampled", b""), b"")
    trace_id, span_id = fields.get(b"x-b3-traceid", b""), fields.get(b"x-b3-spanid", b"")
    if not _is_b3_trace(trace_id) or not _is_b3_span(span_id):
        trace = _begin(ids, percent, said)
        return [*rest, (b"traceparent", _traceparent(trace, 0))], trace
    trace, said = _continue_b3(trace_id, span_id, said, (ids, percent))
    decision = (b"x-b3-flags", b"1") if said == b"d" else (b"x-b3-sampled", said)
    return [
        *rest,
        (b"x-b3-traceid", trace.trace_id),
        (b"x-b3-spanid", trace.span_id),
        (b"x-b3-parentspanid", trace.parent_id),
        decision,
    ], trace


def begin(headers: Headers, ids: TraceIds, percent: float) -> Trace | None:
    """As `traced`, for fields that name no trace: one is added. None: it is not sampled, so there is no record."""
    parent = ids.parents.take()
    if percent > 0.0 and _is_drawn(parent[3:35], percent):
        trace = Trace(parent[3:35], parent[36:52], b"", True)
        headers.append((b"traceparent", _traceparent(trace, 0)))
        return trace
    headers.append((b"traceparent", parent))
    return None


def _without(headers: Headers, drops: frozenset[bytes] | set[bytes]) -> Headers:
    return [field for field in headers if field[0] not in drops]


def _is_short(found: Headers) -> bool:
    states = [value for name, value in found if name == b"tracestate"]
    members = sum(value.count(b",") + 1 for value in states)
    return members <= _STATE_MEMBERS and sum(map(len, states)) <= _STATE_OCTETS


def _traceparent(trace: Trace, flags: int) -> bytes:
    return b"-".join((b"00", trace.trace_id, trace.span_id, _FLAGS[flags | trace.sampled]))


_FLAGS = (b"00", b"01", b"02", b"03")


def _is_drawn(trace_id: bytes, percent: float) -> bool:
    return percent > 0 and int(trace_id[-14:], 16) < percent / 100 * (1 << 56)


def _begin(ids: TraceIds, percent: float, said: bytes) -> Trace:
    parent = ids.parents.take()
    trace_id = parent[3:35]
    return Trace(trace_id, parent[36:52], b"", said != b"0" if said else _is_drawn(trace_id, percent))


def _continue_b3(trace_id: bytes, span_id: bytes, said: bytes, how: tuple[TraceIds, float]) -> tuple[Trace, bytes]:
    """And what to say of sampling."""
    ids, percent = how
    if not said:
        said = b"1" if _is_drawn(trace_id, percent) else b"0"
    return Trace(trace_id, ids.spans.take(), span_id, said != b"0"), said
