"""What is logged, and the line it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.config.shard import AccessLog
from netproxy.errors import Reason
from netproxy.observe.access import (
    MAX_DETAIL,
    MAX_LINE,
    MAX_TARGET,
    MAX_VALUE,
    AccessLogger,
    Entry,
    Outcome,
    Request,
    render,
)
from netproxy.observe.record import Parties

SOURCE = Parties("source", "shop/client", "spiffe://cluster.local/ns/shop/sa/client", "shop/web-1", "shop/web")


def entry(request: Request | None = None, **more: Any) -> Entry:
    return Entry(
        **{
            "parties": SOURCE,
            "security": "mutual_tls",
            "workload": "shop/client",
            "reason": Reason.OK,
            "detail": "",
            "duration_s": 0.25,
            "moved": (10, 20),
            "client": "10.0.0.9:40000",
            "original": "240.240.0.1:80",
            "endpoint": "10.0.0.1:8080",
            "principal": "spiffe://cluster.local/ns/shop/sa/web",
            "rule": "HTTPRoute shop/web rule 0",
            "request": request,
            **more,
        }
    )


def get(**more: Any) -> Request:
    outcome = Outcome(200, more.pop("responded", True), 1, True, 0.001, 0.2)
    return Request(
        **{
            "method": b"GET",
            "target": b"/a?b=c",
            "authority": b"web",
            "request_id": b"11-22",
            "user_agent": b"curl/8",
            "forwarded_for": b"192.0.2.1",
            "outcome": outcome,
            **more,
        }
    )


def line(found: Entry, began: float = 1_000_000_000.5) -> dict[str, Any]:
    raw = render(found, "node-a", began)
    assert raw.endswith(b"\n") and raw.count(b"\n") == 1
    assert len(raw) <= MAX_LINE
    out: dict[str, Any] = json.loads(raw)
    return out


# --- which


def logger(**selection: Any) -> AccessLogger:
    made = AccessLogger("node-a", iter([0.1, 0.9] * 50).__next__)
    made.select(AccessLog(**selection))
    return made


class List:
    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def put(self, line: bytes) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("selection", "reason", "status", "duration_s", "wanted"),
    [
        ({}, Reason.OK, 200, 9.9, False),
        ({"percent": 100}, Reason.OK, 200, 0.0, True),
        ({"percent": 100}, Reason.LOOP, 0, 0.0, True),
        ({"min_status": 500}, Reason.OK, 499, 9.9, False),
        ({"min_status": 500}, Reason.OK, 500, 0.0, True),
        ({"min_status": 500}, Reason.NO_ROUTE, 0, 0.0, False),
        ({"min_duration_s": 1.0}, Reason.OK, 200, 0.99, False),
        ({"min_duration_s": 1.0}, Reason.OK, 0, 1.0, True),
        ({"flags": ("UF", "NR")}, Reason.CONNECT_TIMEOUT, 503, 0.0, True),
        ({"flags": ("UF", "NR")}, Reason.EGRESS_DENIED, 0, 0.0, True),
        ({"flags": ("UF", "NR")}, Reason.OK, 503, 0.0, False),
        ({"flags": ("UF",), "min_status": 500, "min_duration_s": 1.0}, Reason.OK, 500, 0.0, True),
        ({"flags": ("UF",), "min_status": 500, "min_duration_s": 1.0}, Reason.OK, 200, 2.0, True),
        ({"flags": ("UF",), "min_status": 500, "min_duration_s": 1.0}, Reason.OK, 200, 0.5, False),
    ],
)
def test_selection(selection: dict[str, Any], reason: Reason, status: int, duration_s: float, wanted: bool) -> None:
    assert logger(**selection).wants(reason, status, duration_s, b"id") is wanted


def test_every_field_of_a_selection_switches_it_on() -> None:
    made = logger()
    made.write_to(List())
    assert not made.on
    for name, value in (("percent", 0.1), ("min_status", 400), ("min_duration_s", 1.0), ("flags", ("UF",))):
        made.select(AccessLog(**{name: value}))
        assert made.on, name
    made.write_to(None)
    assert not made.on
    assert {field.name for field in fields(AccessLog)} == {"percent", "min_status", "min_duration_s", "flags"}


def test_a_share_is_the_same_for_both_agents() -> None:
    near, far = logger(percent=30), logger(percent=30)
    ids = [f"{number:032x}".encode() for number in range(5000)]
    wanted = [near.wants(Reason.OK, 200, 0.0, request_id) for request_id in ids]
    assert wanted == [far.wants(Reason.OK, 200, 0.0, request_id) for request_id in ids]
    assert 1300 < sum(wanted) < 1700
    # A larger share has all of a smaller one.
    more = logger(percent=60)
    assert all(more.wants(Reason.OK, 200, 0.0, i) for i, chosen in zip(ids, wanted, strict=True) if chosen)


def test_what_has_no_id_is_sampled_at_random() -> None:
    made = logger(percent=50)
    assert [made.wants(Reason.OK, 0, 0.0) for _ in range(4)] == [True, False, True, False]


def test_the_time_is_that_of_the_beginning() -> None:
    lines = List()
    made = AccessLogger("node-a", lambda: 0.0, clock=lambda: 1_000_000_000.75)
    made.log(entry())  # to nowhere
    made.write_to(lines)
    made.log(entry())
    (raw,) = lines.lines
    assert json.loads(raw)["start_time"] == "2001-09-09T01:46:40.500Z"


# --- the line


def test_every_field_of_a_request() -> None:
    found = entry(get(), detail="why", decided_by="shop/web")
    assert line(found) == {
        "start_time": "2001-09-09T01:46:40.500Z",
        "node": "node-a",
        "reporter": "source",
        "workload": "shop/client",
        "protocol": "HTTP/1.1",
        "method": "GET",
        "path": "/a?b=c",
        "authority": "web",
        "response_code": 200,
        "response_flags": "-",
        "response_code_details": "via_upstream",
        "reason": "OK",
        "detail": "why",
        "bytes_received": 10,
        "bytes_sent": 20,
        "duration_ms": 250.0,
        "upstream_connect_ms": 1.0,
        "response_head_ms": 200.0,
        "upstream_request_attempt_count": 1,
        "upstream_connection_reused": True,
        "tls": "mutual_tls",
        "source": {
            "workload": "shop/client",
            "principal": "spiffe://cluster.local/ns/shop/sa/client",
            "address": "10.0.0.9:40000",
        },
        "destination": {
            "workload": "shop/web-1",
            "principal": "spiffe://cluster.local/ns/shop/sa/web",
            "service": "shop/web",
            "address": "10.0.0.1:8080",
        },
        "original_destination": "240.240.0.1:80",
        "route_name": "HTTPRoute shop/web rule 0",
        "decided_by": "shop/web",
        "request_id": "11-22",
        "user_agent": "curl/8",
        "x_forwarded_for": "192.0.2.1",
    }


def test_what_does_not_apply_is_left_out() -> None:
    refused = entry(
        Request(b"", b"", outcome=Outcome(400)),
        reason=Reason.DOWNSTREAM_PROTOCOL,
        endpoint="",
        principal="",
        rule="",
        original="",
    )
    found = line(refused)
    assert not found.keys() & {
        *("method", "path", "authority", "request_id", "user_agent", "x_forwarded_for", "upstream_connect_ms"),
        *("response_head_ms", "upstream_request_attempt_count", "route_name", "original_destination", "detail", "cut"),
    }
    assert (found["response_code"], found["response_flags"]) == (400, "DPE")
    assert found["destination"] == {"workload": "shop/web-1", "service": "shop/web"}


def test_an_opaque_connection() -> None:
    found = line(entry())
    assert found["protocol"] == "TCP"
    assert not found.keys() & {"method", "response_code", "response_code_details"}
    assert line(entry(reason=Reason.LOOP))["response_code_details"] == "filter_chain_not_found"


@pytest.mark.parametrize("reason", Reason)
def test_details_of_an_answer_that_had_begun(reason: Reason) -> None:
    before = line(entry(get(responded=False), reason=reason))["response_code_details"]
    after = line(entry(get(responded=True), reason=reason))["response_code_details"]
    assert "_after_" not in before
    assert after == before.replace("_before_response_started", "_after_response_started")


@pytest.mark.parametrize(
    ("name", "make", "limit"),
    [
        ("path", lambda text: entry(get(target=text)), MAX_TARGET),
        ("authority", lambda text: entry(get(authority=text)), MAX_VALUE),
        ("method", lambda text: entry(get(method=text)), MAX_VALUE),
        ("request_id", lambda text: entry(get(request_id=text)), MAX_VALUE),
        ("user_agent", lambda text: entry(get(user_agent=text)), MAX_VALUE),
        ("x_forwarded_for", lambda text: entry(get(forwarded_for=text)), MAX_VALUE),
        ("detail", lambda text: entry(get(), detail=text.decode()), MAX_DETAIL),
    ],
)
def test_a_field_is_cut_and_marked(name: str, make: Callable[[bytes], Entry], limit: int) -> None:
    found = line(make(b"x" * limit))
    assert found[name] == "x" * limit
    assert "cut" not in found
    found = line(make(b"x" * (limit + 1)))
    assert found[name] == "x" * limit + "..."
    assert found["cut"] == [name]


def test_the_longest_line() -> None:
    """What a hostile client sends, and names as long as they may be, still make a line that a pipe takes whole."""
    for octet in (b"\x00", b"\xff", b'"', "\U0001f600".encode(), "ü".encode(), b"x"):
        long = octet * 3000
        name = "n" * 253
        found = line(
            entry(
                get(target=long, authority=long, request_id=long, user_agent=long, forwarded_for=long),
                parties=Parties("source", f"{name}/{name}", f"spiffe://{name}/ns/{name}/sa/{name}", name * 2, name * 2),
                detail=name * 5,
                rule=name * 3,
                decided_by=name * 3,
                principal=f"spiffe://{name}/ns/{name}/sa/{name}",
                workload=f"{name}/{name}",
            )
        )
        assert {"path", "user_agent"} <= set(found["cut"])
        assert found["path"].endswith("...")
        assert len(found["path"]) >= 8


octets = st.binary(max_size=2000)
texts = st.text(max_size=600)


@given(octets, octets, octets, octets, texts, texts)
def test_whatever_a_peer_sends_is_one_line_of_json(
    target: bytes, authority: bytes, request_id: bytes, agent: bytes, detail: str, rule: str
) -> None:
    request = get(method=target[:9], target=target, authority=authority, request_id=request_id, user_agent=agent)
    raw = render(entry(request, detail=detail, rule=rule), "node-a", 0.0)
    assert raw.isascii() and raw.endswith(b"}\n")
    assert not any(octet < 0x20 or octet == 0x7F for octet in raw[:-1])
    assert len(raw) <= MAX_LINE
    found = json.loads(raw)
    assert (found["reason"], found["response_code"], found["bytes_sent"]) == ("OK", 200, 20)
    if target and "path" not in found.get("cut", ()):
        assert found["path"] == target.decode("utf-8", "backslashreplace")
