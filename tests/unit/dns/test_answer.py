from __future__ import annotations

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import dns.tsigkeyring
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.config.shard import Endpoint
from netproxy.dns.answer import MAX_QUERY, TTL_S, Outcome, Responder, question_end, rcode_of
from tests.unit.dns.shards import DUAL, headless, small_mesh, workload

NAMES = small_mesh()
RESPONDER = Responder(NAMES)


def receive(wire: bytes, *, stream: bool = False, families: frozenset[int] = DUAL) -> Outcome:
    return RESPONDER.receive(wire, workload(), families, stream=stream)


def query(name: str, kind: str = "A", **more: object) -> dns.message.QueryMessage:
    return dns.message.make_query(name, kind, id=7, **{"use_edns": 0, "payload": 1232, **more})  # type: ignore[arg-type]


def answer(asked: dns.message.Message, *, stream: bool = False) -> dns.message.Message:
    """What is answered, which is a response to `asked`."""
    outcome = receive(asked.to_wire(), stream=stream)
    assert outcome.reply
    found = dns.message.from_wire(outcome.reply)
    assert asked.is_response(found)
    return found


def texts(found: dns.message.Message) -> list[str]:
    return [rdata.to_text() for rrset in found.answer for rdata in rrset]


# -- what is ours --------------------------------------------------------------------------------------------


def test_an_answer() -> None:
    asked = query("WeB.shop")
    found = answer(asked)
    assert found.flags == dns.flags.QR | dns.flags.AA | dns.flags.RD | dns.flags.RA
    assert found.answer[0].to_text() == f"WeB.shop. {TTL_S} IN A 240.240.0.1"
    assert found.question[0].name.labels == asked.question[0].name.labels, "as it was spelled"
    assert (found.edns, found.payload) == (0, 1232)
    assert not found.authority + found.additional
    assert texts(answer(query("web", "AAAA"))) == ["fd00:240::1"]
    assert rcode_of(found.to_wire()) == "NOERROR"


def test_a_type_that_it_does_not_have() -> None:
    for kind in ("TXT", "MX", "HTTPS", "SRV", "NS", "SOA"):
        found = answer(query("web", kind))
        assert (found.rcode(), found.answer) == (dns.rcode.NOERROR, [])
        soa = found.authority[0]
        assert (soa.rdtype, soa.ttl, soa[0].minimum) == (dns.rdatatype.SOA, TTL_S, TTL_S)


def test_services_and_pointers() -> None:
    found = answer(query("_http._tcp.web", "SRV"))
    assert texts(found) == ["0 0 80 web.shop.svc.cluster.local."]
    assert sorted(rrset.to_text() for rrset in found.additional) == [
        f"web.shop.svc.cluster.local. {TTL_S} IN A 240.240.0.1",
        f"web.shop.svc.cluster.local. {TTL_S} IN AAAA fd00:240::1",
    ]
    assert answer(query("_x._tcp.web", "SRV")).rcode() == dns.rcode.NXDOMAIN
    assert texts(answer(query("1.0.240.240.in-addr.arpa", "PTR"))) == ["web.shop.svc.cluster.local."]
    assert texts(answer(query("web", "ANY"))) == ["240.240.0.1"]


@pytest.mark.parametrize("name", ["nothing.example", ".", "web\\.shop", "w\\255b", "x" * 63, "4.3.2.1.in-addr.arpa"])
def test_what_is_not_ours_is_to_be_forwarded(name: str) -> None:
    asked = query(name)
    outcome = receive(asked.to_wire())
    assert outcome.forward is not None
    assert (outcome.reply, outcome.dropped) == (b"", "")
    assert outcome.forward.wire == asked.to_wire()


def test_other_classes_are_not_ours() -> None:
    assert receive(query("web", "TXT", rdclass="CH").to_wire()).forward is not None


def test_a_signed_query_is_forwarded_as_it_is_and_answered_without_a_signature() -> None:
    for name, ours in (("web", True), ("nothing.example", False)):
        asked = query(name)
        asked.use_tsig(dns.tsigkeyring.from_text({"key.": "c2VjcmV0c2VjcmV0"}))
        wire = asked.to_wire()
        outcome = receive(wire)
        if ours:
            assert not dns.message.from_wire(outcome.reply).had_tsig
        else:
            assert outcome.forward is not None
            assert outcome.forward.wire == wire


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edns", "limit", "whole"),
    [(False, 512, False), (512, 512, False), (100, 512, False), (1232, 1232, True), (4096, 1232, True)],
)
def test_an_answer_that_does_not_fit_is_marked(edns: int | bool, limit: int, whole: bool) -> None:
    names = small_mesh()
    names.put(headless(*(Endpoint(f"10.0.1.{n}", 80) for n in range(60))))
    asked = query("each", use_edns=False) if edns is False else query("each", payload=edns)
    found = Responder(names).receive(asked.to_wire(), workload(), DUAL, stream=False).reply
    assert len(found) <= limit
    parsed = dns.message.from_wire(found)
    assert (bool(parsed.flags & dns.flags.TC), len(texts(parsed))) == (not whole, 60 if whole else 0)
    assert (parsed.edns >= 0) == (edns is not False)
    by_tcp = Responder(names).receive(asked.to_wire(), workload(), DUAL, stream=True).reply
    assert len(texts(dns.message.from_wire(by_tcp))) == 60


def test_what_others_say_is_cut_to_what_the_client_takes() -> None:
    asked = query("nothing.example", "TXT", payload=1000)
    question = receive(asked.to_wire()).forward
    assert question is not None
    response = dns.message.make_response(asked)
    response.id = 99
    small = response.to_wire()
    assert question.relayed(small) == b"\0\7" + small[2:]
    response.answer.append(dns.rrset.from_text("nothing.example.", 5, "IN", "TXT", *(f'"{n:0200}"' for n in range(5))))
    large = response.to_wire(max_size=4096)
    assert len(large) > 1000
    cut = dns.message.from_wire(question.relayed(large))
    assert cut.flags & dns.flags.TC
    assert asked.is_response(cut)
    assert not cut.answer
    by_tcp = receive(asked.to_wire(), stream=True).forward
    assert by_tcp is not None
    assert by_tcp.relayed(large) == b"\0\7" + large[2:]


def test_a_failure_says_why_to_who_understands() -> None:
    question = receive(query("nothing.example").to_wire()).forward
    assert question is not None
    found = dns.message.from_wire(question.failed(dns.rcode.SERVFAIL, "it " * 1000, dns.edns.EDECode.NETWORK_ERROR))
    assert found.rcode() == dns.rcode.SERVFAIL
    (said,) = found.extended_errors()
    assert said.code == dns.edns.EDECode.NETWORK_ERROR
    assert said.text is not None
    assert said.text.startswith("it it")
    plain = receive(query("nothing.example", use_edns=False).to_wire()).forward
    assert plain is not None
    found = dns.message.from_wire(plain.failed(dns.rcode.SERVFAIL, "why"))
    assert (found.edns, found.rcode()) == (-1, dns.rcode.SERVFAIL)


# -- what is wrong -------------------------------------------------------------------------------------------


def header(outcome: Outcome) -> tuple[int, int, bool, int]:
    """rcode, opcode, is it a response, octets"""
    found = dns.message.from_wire(outcome.reply, ignore_trailing=True)
    return found.rcode(), found.opcode(), bool(found.flags & dns.flags.QR), len(outcome.reply)


def test_responses_are_never_answered() -> None:
    response = dns.message.make_response(query("web"))
    assert receive(response.to_wire()) == Outcome(dropped="response")
    for rcode in (dns.rcode.SERVFAIL, dns.rcode.FORMERR, dns.rcode.NOTIMP):
        response.set_rcode(rcode)
        assert receive(response.to_wire(), stream=True) == Outcome(dropped="response")
    wire = bytearray(response.to_wire())
    wire[2] |= 5 << 3
    assert receive(bytes(wire)) == Outcome(dropped="response")


def test_the_table_of_what_is_wrong() -> None:
    good = query("web").to_wire()
    for length in range(12):
        assert receive(good[:length]) == Outcome(dropped="short")
    for opcode in range(1, 16):
        asked = bytearray(good)
        asked[2] |= opcode << 3
        assert header(receive(bytes(asked))) == (dns.rcode.NOTIMP, opcode, True, 12)
    for count in (0, 2, 256):
        asked = bytearray(good)
        asked[4:6] = count.to_bytes(2, "big")
        assert header(receive(bytes(asked))) == (dns.rcode.FORMERR, 0, True, 12)
    for length in range(12, len(good)):
        assert header(receive(good[:length])) == (dns.rcode.FORMERR, 0, True, 12)
    assert header(receive(good + b"x"))[0] == dns.rcode.FORMERR
    assert header(receive(good + b"x" * MAX_QUERY)) == (dns.rcode.FORMERR, 0, True, 12)
    for name in (b"\xc0\x0c", b"\xc0\x00"):  # itself; the root, which the first octet of the ID looks like
        assert header(receive(good[:4] + b"\0\1" + b"\0" * 6 + name + b"\0\1\0\1"))[0] == dns.rcode.FORMERR
    assert dns.message.from_wire(receive(query("web", use_edns=1).to_wire()).reply).rcode() == dns.rcode.BADVERS
    for kind in ("AXFR", "IXFR"):
        assert answer(query("web.example", kind), stream=True).rcode() == dns.rcode.NOTIMP


GOOD = [
    query("web").to_wire(),
    query("nothing.example", "AAAA", use_edns=False).to_wire(),
    query("_http._tcp.web.shop", "SRV", options=[dns.edns.EDEOption(0, "x")]).to_wire(),
    query("1.0.240.240.in-addr.arpa", "PTR").to_wire(),
]


@given(st.binary(max_size=600), st.booleans())
def test_any_octets(wire: bytes, stream: bool) -> None:
    check_sane(wire, receive(wire, stream=stream), stream=stream)


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6), st.booleans())
def test_any_change_of_a_good_query(good: bytes, changes: list[tuple[int, int]], stream: bool) -> None:
    wire = bytearray(good)
    for place, value in changes:
        wire[place % len(wire)] = value
    check_sane(bytes(wire), receive(bytes(wire), stream=stream), stream=stream)


def check_sane(wire: bytes, outcome: Outcome, *, stream: bool) -> None:
    assert [bool(outcome.reply), outcome.forward is not None, bool(outcome.dropped)].count(True) == 1
    replies = [outcome.reply] if outcome.reply else []
    if outcome.forward is not None:
        replies.append(outcome.forward.failed(dns.rcode.SERVFAIL, "why"))
        assert question_end(wire) <= len(wire)
    for reply in replies:
        assert len(wire) >= 12
        assert not wire[2] & 0x80, "a response is never answered"
        assert reply[2] & 0x80
        assert reply[:2] == wire[:2]
        assert len(reply) <= (65535 if stream else 1232)
        dns.message.from_wire(reply)
