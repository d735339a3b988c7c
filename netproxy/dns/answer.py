"""From the octets of a query to those of its answer, or to the word that others have to be asked.

Threats: queries come from the app, and whoever can send datagrams to it. Nothing here raises for any octets; a response
is never answered, whatever it claims (two servers that answer each other's errors never stop); an error never carries
more than it was asked with. What is wrong with a query, and what is said about it::

    shorter than a header, or a response      nothing
    opcode other than QUERY                   NOTIMP (RFC 1035 section 4.1.1)
    larger than `MAX_QUERY`, malformed,
    no or several questions (RFC 9619)        FORMERR
    EDNS of a version other than 0            BADVERS (RFC 6891 section 6.1.3)
    AXFR, IXFR                                NOTIMP: a zone is many messages

Answers for our own names are authoritative, live `TTL_S` and never exceed `MAX_PAYLOAD` in a datagram (below the MTU of
any path, as resolvers agreed in 2020). Those of others are passed on octet by octet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.PTR
import dns.rdtypes.ANY.SOA
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.rdtypes.IN.SRV
import dns.rrset

from ..config.shard import WorkloadShard
from .names import Answer, Names, RecordType

TTL_S = 5
MAX_QUERY = 4096
"""A name has 255 octets at most, an option for padding 468 (RFC 8467)."""
MAX_PAYLOAD = 1232
PLAIN_PAYLOAD = 512
"""Of who speaks no EDNS (RFC 1035 section 4.2.1)."""
MAX_MESSAGE = 65535
HEADER = 12
_MAX_WHY = 200

_IN = dns.rdataclass.IN
_QR = 0x80
_TC = 0x02
_TYPES: dict[int, RecordType] = {
    dns.rdatatype.A: "A",
    dns.rdatatype.AAAA: "AAAA",
    dns.rdatatype.SRV: "SRV",
    dns.rdatatype.PTR: "PTR",
    dns.rdatatype.ANY: "ANY",
}
_TRANSFERS = frozenset({dns.rdatatype.AXFR, dns.rdatatype.IXFR})


def preload() -> None:
    """Import what dnspython would import at the first record of a type, while files can still be read."""
    dns.rdata.load_all_types()
    query = dns.message.make_query("preload.", "A", use_edns=0)
    Question(query.to_wire(), query, stream=False).failed(dns.rcode.SERVFAIL, "preload")


def rcode_of(wire: bytes) -> str:
    """Of a response, without what EDNS may add to it: ``NOERROR``."""
    return dns.rcode.to_text(dns.rcode.Rcode(wire[3] & 0xF))


@dataclass(frozen=True, slots=True)
class Question:
    """A query with one question."""

    wire: bytes
    message: dns.message.Message
    stream: bool
    """It came by TCP."""

    @property
    def payload(self) -> int:
        """Octets that who asks can take in one answer."""
        if self.stream:
            return MAX_MESSAGE
        if self.message.edns < 0:
            return PLAIN_PAYLOAD
        return max(PLAIN_PAYLOAD, int(self.message.payload))

    def failed(self, rcode: dns.rcode.Rcode, why: str = "", code: int = dns.edns.EDECode.OTHER) -> bytes:
        """An answer without records. Who speaks EDNS is told `why` (RFC 8914)."""
        response = _response(self.message)
        response.set_rcode(rcode)
        if why and response.edns >= 0:
            said = dns.edns.EDEOption(dns.edns.EDECode(code), why[:_MAX_WHY])
            response.use_edns(0, 0, MAX_PAYLOAD, options=[said])
        return response.to_wire(max_size=min(self.payload, MAX_PAYLOAD), prefer_truncation=True)

    def relayed(self, answer: bytes) -> bytes:
        """What a resolver said, as an answer to this query."""
        answer = self.wire[:2] + answer[2:]
        if len(answer) <= self.payload:
            return answer
        # Said by TCP or by a resolver that does not care what was asked for: the rest is to be had by TCP.
        end = question_end(answer)
        flags = struct.pack("!BBHHHH", answer[2] | _TC, answer[3], 1, 0, 0, 0)
        return answer[:2] + flags + answer[HEADER:end]


class Outcome(NamedTuple):
    """Exactly one: `reply` is to be sent, `forward` to be asked elsewhere, the query was `dropped` because."""

    reply: bytes = b""
    forward: Question | None = None
    dropped: str = ""


class Responder:
    """Answers from `names`."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def receive(self, wire: bytes, workload: WorkloadShard, families: frozenset[int], *, stream: bool) -> Outcome:
        """`families` are those that the workload can dial; it asked by TCP when `stream` is true."""
        if len(wire) < HEADER:
            return Outcome(dropped="short")
        if wire[2] & _QR:
            return Outcome(dropped="response")
        if (wire[2] >> 3) & 0xF != dns.opcode.QUERY:
            return Outcome(header_only(wire, dns.rcode.NOTIMP))
        if len(wire) > MAX_QUERY or wire[4:6] != b"\0\1":
            return Outcome(header_only(wire, dns.rcode.FORMERR))
        try:
            # A signature (TSIG) is the resolver's to check; what is ours we answer without one.
            message = dns.message.from_wire(wire, keyring=False)
            question_end(wire)
        except (dns.exception.DNSException, ValueError):
            return Outcome(header_only(wire, dns.rcode.FORMERR))
        question = Question(wire, message, stream)
        if message.edns > 0:
            return Outcome(question.failed(dns.rcode.BADVERS))
        asked = message.question[0]
        if asked.rdtype in _TRANSFERS:
            return Outcome(question.failed(dns.rcode.NOTIMP))
        labels = _labels(asked.name) if asked.rdclass == _IN else None
        kind = _TYPES.get(asked.rdtype, "OTHER")
        answer = self._names.lookup(labels, kind, workload.namespace, families) if labels else None
        if answer is None:
            return Outcome(forward=question)
        return Outcome(self._built(message, answer, min(question.payload, MAX_MESSAGE if stream else MAX_PAYLOAD)))

    def _built(self, query: dns.message.Message, answer: Answer, limit: int) -> bytes:
        response = _response(query)
        response.flags |= dns.flags.AA
        name = query.question[0].name  # as it was spelled: some compare the case (draft-vixie-dnsext-dns0x20)
        found: list[dns.rdata.Rdata] = [*_addresses(answer.addresses)]
        found += [
            dns.rdtypes.IN.SRV.SRV(_IN, dns.rdatatype.SRV, 0, 0, service.port, _name(service.target))
            for service in answer.services
        ]
        found += [dns.rdtypes.ANY.PTR.PTR(_IN, dns.rdatatype.PTR, _name(target)) for target in answer.pointers]
        if found:
            response.answer.append(dns.rrset.from_rdata_list(name, TTL_S, found))
            for family in (dns.rdatatype.A, dns.rdatatype.AAAA):
                of_family = [rdata for rdata in _addresses(answer.additional) if rdata.rdtype == family]
                if of_family:
                    response.additional.append(dns.rrset.from_rdata_list(_name(answer.name), TTL_S, of_family))
        else:
            if not answer.exists:
                response.set_rcode(dns.rcode.NXDOMAIN)
            # How long a cache may remember that there is nothing (RFC 2308 section 3).
            domain = self._names.domain
            soa = dns.rdtypes.ANY.SOA.SOA(
                _IN,
                dns.rdatatype.SOA,
                _name(f"ns.{domain}"),
                _name(f"hostmaster.{domain}"),
                1,
                TTL_S,
                TTL_S,
                TTL_S,
                TTL_S,
            )
            response.authority.append(dns.rrset.from_rdata_list(name, TTL_S, [soa]))
        return response.to_wire(max_size=limit, prefer_truncation=True)


def header_only(wire: bytes, rcode: int) -> bytes:
    """An error for a query of which only the header can be trusted."""
    flags = 0x80 | (wire[2] & 0x79)  # QR; opcode and RD are the query's
    return wire[:2] + struct.pack("!BBHHHH", flags, rcode, 0, 0, 0, 0)


def question_end(wire: bytes) -> int:
    """Where the first question ends. ValueError when there is none, or its name is compressed."""
    at = HEADER
    while at < len(wire) and wire[at]:
        if wire[at] > 63:
            raise ValueError("the name in the question is compressed")
        at += wire[at] + 1
    if at + 5 > len(wire):
        raise ValueError("the question is cut short")
    return at + 5


def _response(query: dns.message.Message) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True, our_payload=MAX_PAYLOAD)
    response.flags |= query.flags & dns.flags.CD
    return response


def _labels(name: dns.name.Name) -> list[str] | None:
    """In lower case, without the root's. None when it is no name of a host: then it is none of ours."""
    try:
        labels = [label.decode("ascii").lower() for label in name.labels[:-1]]
    except UnicodeDecodeError:
        return None
    return None if any("." in label for label in labels) else labels


def _name(text: str) -> dns.name.Name:
    return dns.name.Name([*(label.encode() for label in text.split(".")), b""])


def _addresses(found: Iterable[str]) -> Iterable[dns.rdata.Rdata]:
    for address in found:
        if ":" in address:
            yield dns.rdtypes.IN.AAAA.AAAA(_IN, dns.rdatatype.AAAA, address)
        else:
            yield dns.rdtypes.IN.A.A(_IN, dns.rdatatype.A, address)
