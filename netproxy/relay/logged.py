"""What ended, told to the access log: called only while it is on."""

from __future__ import annotations

from typing import NamedTuple

from ..codec.events import RequestHead
from ..decide.route import Choice
from ..errors import Reason
from ..observe.access import Entry, Outcome, Request
from ..observe.record import Parties
from .exchange import origin_form
from .services import Facts, Services


class Ended(NamedTuple):
    """How a request ended."""

    reason: Reason
    detail: str
    duration_s: float
    moved: tuple[int, int]
    outcome: Outcome
    decided_by: str = ""


def log_request(
    services: Services,
    facts: Facts,
    choice: Choice | None,
    *,
    who: tuple[Parties, str],
    head: RequestHead | None,
    request_id: bytes,
    ended: Ended,
    version: bytes = b"1.1",
) -> None:
    """`head`: as it came, None when it never was complete: then `version` is the connection's. `request_id`: as it
    went on."""
    if not services.access.wants(ended.reason, ended.outcome.status, ended.duration_s, request_id):
        return
    if head is not None:
        target, authority = origin_form(head.target)
        request = Request(head.method, target, authority, request_id)
        version = head.http_version
        for name, value in head.headers:
            if name == b"host":
                request.authority = request.authority or value
            elif name == b"user-agent":
                request.user_agent = value
            elif name == b"x-forwarded-for":
                # Several fields are one list (RFC 9110 section 5.3).
                request.forwarded_for += b"," + value if request.forwarded_for else value
    else:
        request = Request(b"", b"")
    request.version = version
    request.outcome = ended.outcome
    entry = _entry(facts, choice, who, ended.reason, ended.detail)
    entry.duration_s, entry.moved, entry.decided_by = ended.duration_s, ended.moved, ended.decided_by
    entry.request = request
    services.access.log(entry)


def log_connection(
    services: Services,
    facts: Facts,
    choice: Choice | None,
    *,
    who: tuple[Parties, str],
    reason: Reason,
    detail: str = "",
    moved: tuple[int, int] = (0, 0),
) -> None:
    """An opaque connection at its end, or one that was refused."""
    duration_s = services.now() - facts.began if facts.began else 0.0
    if services.access.wants(reason, 0, duration_s):
        entry = _entry(facts, choice, who, reason, detail)
        entry.duration_s, entry.moved = duration_s, moved
        services.access.log(entry)


def _entry(facts: Facts, choice: Choice | None, who: tuple[Parties, str], reason: Reason, detail: str) -> Entry:
    endpoint = choice.endpoint if choice is not None else None
    principal = facts.shard.identity if facts.inbound else endpoint.endpoint.identity if endpoint is not None else ""
    return Entry(
        parties=who[0],
        security=who[1],
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
