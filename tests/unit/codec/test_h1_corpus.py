"""Every file of the corpus: whole, cut at every octet, octet by octet, and with the next message behind it.

accept/NAME.http     req-... or resp-METHOD-... (UPGRADE: a GET with Upgrade: x)
accept/NAME.events   what must come out of it, one event a line
reject/NAME.http     req-STATUS-RULE-... or resp-METHOD-STATUS-RULE-...
"""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.codec.events import ConnectionClosed, End, RequestHead
from netproxy.codec.strict import Rule

from .playing import (
    CORPUS,
    NEXT_REQUEST,
    NEXT_RESPONSE,
    Outcome,
    agree,
    cuts_in_two,
    octets,
    play_client,
    play_server,
)

ACCEPT = sorted((CORPUS / "accept").glob("*.http"))
REJECT = sorted((CORPUS / "reject").glob("*.http"))
# They need sizes, an idle client connection: see test_strict.py and test_h1_reference.py.
ELSEWHERE = {
    Rule.HEAD_SIZE,
    Rule.FIELD_COUNT,
    Rule.TRAILER_SIZE,
    Rule.CHUNK_LINE_SIZE,
    Rule.CHUNK_OVERHEAD,
    Rule.UNSOLICITED,
}


def stem(path: Path) -> str:
    return path.stem


def play(path: Path, parts: list[bytes], *, eof: bool = True) -> Outcome:
    kind, method, *_ = path.stem.split("-")
    if kind == "req":
        return play_server(parts, eof=eof)
    return play_client(method.encode(), parts, eof=eof)


def expected_rejection(path: Path) -> tuple[int, Rule]:
    fields = path.stem.split("-")
    if fields[0] == "resp":
        del fields[1]
    return int(fields[1]), Rule[fields[2]]


@pytest.mark.parametrize("path", ACCEPT, ids=stem)
def test_accepted(path: Path) -> None:
    data = path.read_bytes()
    eof = path.name.startswith("resp-")
    whole = play(path, [data], eof=eof)
    golden = path.with_suffix(".events").read_text(encoding="ascii").splitlines()
    assert [*map(repr, whole.events), f"must_close={whole.must_close}"] == golden
    assert whole.status == 0
    for parts in [*cuts_in_two(data), octets(data)]:
        assert play(path, parts, eof=eof) == whole
    if not eof:
        assert play(path, [data]).events == [*whole.events, ConnectionClosed()]


@pytest.mark.parametrize("path", [p for p in ACCEPT if p.name.startswith("req-")], ids=stem)
def test_accepted_with_next_request(path: Path) -> None:
    data = path.read_bytes()
    alone = play(path, [data], eof=False)
    both = play(path, [data + NEXT_REQUEST], eof=False)
    follows = [] if alone.must_close else [RequestHead(1, b"GET", b"/next", [(b"host", b"n")]), End(1)]
    assert both.events == alone.events + follows
    for parts in [*cuts_in_two(data + NEXT_REQUEST), octets(data + NEXT_REQUEST)]:
        assert play(path, parts, eof=False) == both


@pytest.mark.parametrize("path", [p for p in ACCEPT if p.name.startswith("resp-")], ids=stem)
def test_accepted_with_next_response(path: Path) -> None:
    """Nobody asked for the next response: it changes nothing but that the connection is not used again."""
    if "until_close" in path.name or "tunnel" in path.name:
        return  # it is content
    data = path.read_bytes()
    alone = play(path, [data])
    assert play(path, [data + NEXT_RESPONSE]) == alone._replace(must_close=True)
    late = play(path, [data, NEXT_RESPONSE])
    assert late.events == alone.events
    assert (late.status, late.detail) == (502, Rule.UNSOLICITED.detail)


@pytest.mark.parametrize("path", REJECT, ids=stem)
def test_rejected(path: Path) -> None:
    data = path.read_bytes()
    status, rule = expected_rejection(path)
    finest = play(path, octets(data))
    assert (finest.status, finest.detail) == (status, rule.detail)
    assert finest.must_close
    for parts in [[data], *cuts_in_two(data)]:
        assert agree(finest, play(path, parts))
    if rule is not Rule.EOF:
        follow = NEXT_REQUEST if path.name.startswith("req-") else NEXT_RESPONSE
        behind = play(path, [data + follow])
        assert not any(isinstance(event, RequestHead) and event.target == b"/next" for event in behind.events)
        assert behind.status == status


def test_every_rule_has_a_file() -> None:
    assert {expected_rejection(path)[1] for path in REJECT} == set(Rule) - ELSEWHERE


def test_every_golden_has_a_message() -> None:
    assert sorted(p.stem for p in (CORPUS / "accept").glob("*.events")) == [p.stem for p in ACCEPT]
    assert not any(ConnectionClosed() == event for path in REJECT for event in play(path, [path.read_bytes()]).events)
