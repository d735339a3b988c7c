"""Traces are continued by the rules of W3C Trace Context and B3, and begun where there is none."""

from __future__ import annotations

import random
import re

import pytest

from netproxy.relay.ids import UUID, Ids
from netproxy.relay.trace import TraceIds, traced

T, S = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
HOST = (b"host", b"a.test")


def ids(seed: int = 1) -> TraceIds:
    return TraceIds(random.Random(seed).randbytes)


def is_new(headers: list[tuple[bytes, bytes]], flags: bytes) -> bool:
    (name, value) = headers[-1]
    return (
        headers[:-1] == [HOST]
        and name == b"traceparent"
        and bool(re.fullmatch(rb"00-(?!%b)[0-9a-f]{32}-[0-9a-f]{16}-%b" % (T, flags), value))
    )


@pytest.mark.parametrize(("percent", "flags"), [(0, b"00"), (100, b"01")])
def test_a_request_without_a_trace_begins_one(percent: float, flags: bytes) -> None:
    headers, trace = traced([HOST], ids(), percent)
    assert is_new(headers, flags)
    assert trace.parent_id == b"" and trace.sampled == (flags == b"01")
    assert headers[-1][1] == b"00-%b-%b-%b" % (trace.trace_id, trace.span_id, flags)


@pytest.mark.parametrize(
    ("parent", "flags"),
    [
        (b"00-%b-%b-01" % (T, S), b"01"),
        (b"00-%b-%b-00" % (T, S), b"00"),
        (b"00-%b-%b-ff" % (T, S), b"03"),
        (b"00-%b-%b-02" % (T, S), b"02"),
        (b"cc-%b-%b-01" % (T, S), b"01"),
        (b"cc-%b-%b-01-what else" % (T, S), b"01"),
    ],
)
def test_traceparent_is_continued(parent: bytes, flags: bytes) -> None:
    state = (b"tracestate", b"a=1,b=2")
    headers, trace = traced([(b"traceparent", parent), HOST, state], ids(), 50)
    assert headers == [HOST, state, (b"traceparent", b"00-%b-%b-%b" % (T, trace.span_id, flags))]
    assert (trace.trace_id, trace.parent_id, trace.sampled) == (T, S, flags in (b"01", b"03"))
    assert trace.span_id != S


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        b"00-%b-%b-01-" % (T, S),
        b"00-%b-%b-01-x" % (T, S),
        b"cc-%b-%b-01x" % (T, S),
        b"ff-%b-%b-01" % (T, S),
        b"00-%b-%b-01" % (T.upper(), S),
        b"00-%b-%b-01" % (b"0" * 32, S),
        b"00-%b-%b-01" % (T, b"0" * 16),
        b"00-%b-%b-1" % (T, S),
        b"00-%b-%b" % (T, S),
        b"00-%b-%b-01" % (T[1:], S),
        b"00-%b-%b-01\n" % (T, S),
    ],
)
def test_what_is_no_traceparent_goes_with_its_state(parent: bytes) -> None:
    headers, _ = traced([HOST, (b"traceparent", parent), (b"tracestate", b"a=1")], ids(), 0)
    assert is_new(headers, b"00")


def test_two_traceparents_are_none() -> None:
    parent = (b"traceparent", b"00-%b-%b-01" % (T, S))
    assert is_new(traced([HOST, parent, parent], ids(), 0)[0], b"00")


@pytest.mark.parametrize(
    ("states", "stays"),
    [
        ([b",".join([b"a=1"] * 32)], True),
        ([b",".join([b"a=1"] * 33)], False),
        ([b"a=1"] * 32, True),
        ([b"a=1"] * 33, False),
        ([b"a" * 1024], True),
        ([b"a" * 1024, b"b"], False),
    ],
)
def test_tracestate_has_a_bound(states: list[bytes], stays: bool) -> None:
    fields = [(b"tracestate", state) for state in states]
    headers, _ = traced([*fields, (b"traceparent", b"00-%b-%b-01" % (T, S))], ids(), 0)
    assert headers[:-1] == (fields if stays else [])


@pytest.mark.parametrize(
    ("value", "percent", "says"),
    [
        (b"%b-%b" % (T, S), 0, b"0"),
        (b"%b-%b" % (T, S), 100, b"1"),
        (b"%b-%b-0" % (T, S), 100, b"0"),
        (b"%b-%b-1" % (T, S), 0, b"1"),
        (b"%b-%b-d" % (T, S), 0, b"d"),
        (b"%b-%b-1-%b" % (T, S, S), 0, b"1"),
        (b"%b-%b-1" % (T[:16], S), 0, b"1"),
    ],
)
def test_b3_is_continued_in_one_field(value: bytes, percent: float, says: bytes) -> None:
    headers, trace = traced([(b"traceparent", b"bad"), (b"b3", value), HOST], ids(), percent)
    trace_id = value.partition(b"-")[0]
    assert headers == [HOST, (b"b3", b"%b-%b-%b-%b" % (trace_id, trace.span_id, says, S))]
    assert (trace.trace_id, trace.parent_id, trace.sampled) == (trace_id, S, says != b"0")


@pytest.mark.parametrize(
    ("said", "decision"),
    [
        ([(b"x-b3-sampled", b"1")], (b"x-b3-sampled", b"1")),
        ([(b"x-b3-sampled", b"false")], (b"x-b3-sampled", b"0")),
        ([(b"x-b3-flags", b"1")], (b"x-b3-flags", b"1")),
        ([], (b"x-b3-sampled", b"0")),
    ],
)
def test_b3_is_continued_in_several_fields(said: list[tuple[bytes, bytes]], decision: tuple[bytes, bytes]) -> None:
    before = [(b"x-b3-traceid", T), (b"x-b3-spanid", S), (b"x-b3-parentspanid", b"1" * 16), *said, HOST]
    headers, trace = traced(before, ids(), 0)
    assert headers == [
        HOST,
        (b"x-b3-traceid", T),
        (b"x-b3-spanid", trace.span_id),
        (b"x-b3-parentspanid", S),
        decision,
    ]
    assert trace.sampled == (decision[1] == b"1")


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ([(b"b3", b"0")], b"00"),
        ([(b"b3", b"1")], b"01"),
        ([(b"b3", b"d")], b"01"),
        ([(b"x-b3-sampled", b"1")], b"01"),
        ([(b"x-b3-flags", b"1")], b"01"),
        ([(b"b3", b"%b-%b" % (b"0" * 32, S))], b"00"),
        ([(b"b3", b"%b-%b-1" % (T, b"0" * 16))], b"00"),
        ([(b"b3", b"%b-%b-2" % (T, S))], b"00"),
        ([(b"x-b3-traceid", T)], b"00"),
        ([(b"x-b3-traceid", b"0" * 16), (b"x-b3-spanid", S)], b"00"),
        ([(b"x-b3-traceid", T + b"\n"), (b"x-b3-spanid", S)], b"00"),
    ],
)
def test_b3_without_ids_decides_only(fields: list[tuple[bytes, bytes]], flags: bytes) -> None:
    assert is_new(traced([HOST, *fields], ids(), 0)[0], flags)


def test_b3_beside_traceparent_passes() -> None:
    headers, trace = traced([(b"b3", b"0"), (b"traceparent", b"00-%b-%b-01" % (T, S))], ids(), 0)
    assert headers == [(b"b3", b"0"), (b"traceparent", b"00-%b-%b-01" % (T, trace.span_id))]


def test_about_percent_are_sampled() -> None:
    source = ids(7)
    assert 60 < sum(traced([], source, 10)[1].sampled for _ in range(1000)) < 140


def test_ids_are_never_zero_and_do_not_repeat() -> None:
    blocks = [bytes(16), b"\1" * 16]
    assert Ids(b"x" * 32, lambda _: blocks.pop(0), 1).take() == b"01" * 16
    source = ids()
    assert len({source.spans.take() for _ in range(1000)}) == 1000
    assert len({source.parents.take() for _ in range(1000)}) == 1000


def test_ids_have_their_form() -> None:
    source = Ids(UUID, random.Random(1).randbytes)
    found = [source.take() for _ in range(1000)]
    assert len(set(found)) == 1000
    for text in found:
        assert re.fullmatch(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text)
    for place, digits in enumerate(zip(*found, strict=True)):  # each digit is any
        assert len(set(digits)) == {ord("x"): 16, ord("y"): 4}.get(UUID[place], 1)
