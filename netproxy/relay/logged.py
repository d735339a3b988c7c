"""What ended, told to the access log: called only while it is on."""

from __future__ import annotations

from typing import NamedTuple

from ..codec.events import Headers, RequestHead
from ..decide.route import Choice
from ..errors import Reason
from ..observe.access import Entry, Request
from ..observe.record import Parties
from .exchange import origin_form
from .facts import parties, security
from .services import Facts, Services


class Ended(NamedTuple):
    """How a request ended. Times in seconds since its head was there, -1.0 for what never came."""

    reason: Reason
    detail: str
    duration_s: float
    moved: tuple[int, int]
    status: int = 0
    responded: bool = False
    attempts: int = 0
    reused: bool = False
    connect_s: float = -1.0
    head_s: float = -1.0
    decided_by: str = ""


def log_request(
    services: Services,
    facts: Facts,
    head: RequestHead | None,
    choice: Choice | None,
    *,
    request_id: bytes,
    ended: Ended,
) -> None:
    """`head`: as it came, None when it never was complete. `request_id`: as it went on."""
    if not services.access.wants(ended.reason, ended.status, ended.duration_s, request_id):
        return
    entry = _entry(services, facts, choice, ended.reason, ended.detail)
    entry.duration_s, entry.moved, entry.decided_by = ended.duration_s, ended.moved, ended.decided_by
    request = Request(b"", b"")
    if head is not None:
        target, authority = origin_form(head.target)
        request = Request(
            head.method,
            target,
            authority or _value(head.headers, b"host"),
            request_id,
            _value(head.headers, b"user-agent"),
            _value(head.headers, b"x-forwarded-for"),
        )
    request.status, request.responded = ended.status, ended.responded
    request.attempts, request.reused = ended.attempts, ended.reused
    request.connect_s, request.head_s = ended.connect_s, ended.head_s
    entry.request = request
    services.access.log(entry)


def log_connection(
    services: Services,
    facts: Facts,
    choice: Choice | None,
    reason: Reason,
    detail: str = "",
    *,
    moved: tuple[int, int] = (0, 0),
) -> None:
    """An opaque connection at its end, or one that was refused."""
    duration_s = services.now() - facts.began if facts.began else 0.0
    if services.access.wants(reason, 0, duration_s):
        entry = _entry(services, facts, choice, reason, detail)
        entry.duration_s, entry.moved = duration_s, moved
        services.access.log(entry)


def _entry(services: Services, facts: Facts, choice: Choice | None, reason: Reason, detail: str) -> Entry:
    who: Parties = parties(facts, services, choice)
    endpoint = choice.endpoint if choice is not None else None
    principal = facts.shard.identity if facts.inbound else endpoint.endpoint.identity if endpoint is not None else ""
    return Entry(
        parties=who,
        security=security(facts, choice),
        workload=facts.workload,
        reason=reason,
        detail=detail,
        duration_s=0.0,
        moved=(0, 0),
        client=str(facts.client),
        original=str(facts.dst) if facts.dst.host else "",
        endpoint=str(endpoint.addr) if endpoint is not None else "",
        principal=principal,
        rule=choice.rule if choice is not None else "",
    )


def _value(headers: Headers, name: bytes) -> bytes:
    """Of a field that came several times all values, as one list (RFC 9110 section 5.3)."""
    return b",".join(value for key, value in headers if key == name)
