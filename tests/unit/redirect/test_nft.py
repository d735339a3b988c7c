"""Rules as nft text, and as nft lists them. That the two agree is proved by the kernel tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from redirect import Scope, Steering
from redirect.netfilter import nft
from redirect.netfilter.rules import FromNetworks, Match, OfUsers, ToNetworks, ToPorts
from redirect.wanted import Ports

NODE = "node-a"

DUAL_OPEN = """\
table inet netproxy-node-a-g3 {
	flags owner
	chain output {
		type nat hook output priority -100; policy accept;
		meta mark & 0x00000fff == 0x00000539 return
		fib daddr type == local return
		ip6 daddr fe80::/10 return
		tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
	}
	chain prerouting {
		type filter hook prerouting priority -150; policy accept;
		iifname "lo" return
		fib daddr type != local return
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15006 accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15006 accept
	}
}
"""

V4_CLOSED = """\
create table inet netproxy-node-a-g3
table inet netproxy-node-a-g3 {
	chain output {
		type nat hook output priority -100; policy accept;
		meta nfproto ipv6 return
		meta mark & 0x00000fff == 0x00000539 return
		fib daddr type == local return
		tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
	}
	chain prerouting {
		type filter hook prerouting priority -150; policy accept;
		meta nfproto ipv6 return
		iifname "lo" return
		fib daddr type != local return
		tcp dport { 22, 9000 } return
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15006 accept
		tcp flags & (fin|syn|rst|ack) == syn reject with tcp reset
	}
}
"""

DUAL_NAMES = """\
table inet netproxy-node-a-g3 {
	flags owner
	chain raw {
		type filter hook output priority -300; policy accept;
		meta mark & 0x00000fff == 0x00000539 udp dport 53 ct original zone set 1337
		meta mark & 0x00000fff == 0x00000539 tcp dport 53 ct original zone set 1337
	}
	chain output {
		type nat hook output priority -100; policy accept;
		meta mark & 0x00000fff == 0x00000539 return
		fib daddr type == local return
		ip6 daddr fe80::/10 return
		udp dport 53 redirect to :15053
		tcp dport 53 tcp flags & (fin|syn|rst|ack) == syn redirect to :15053
		tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
	}
	chain prerouting {
		type filter hook prerouting priority -150; policy accept;
		iifname "lo" return
		fib daddr type != local return
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15006 accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15006 accept
	}
}
"""

DISABLED = """\
table inet netproxy-node-a-g3 {
	flags owner
	chain output {
		type nat hook output priority -100; policy accept;
		meta nfproto ipv4 return
		ct state established return
	}
	chain prerouting {
		type filter hook prerouting priority -150; policy accept;
	}
}
"""


@pytest.mark.parametrize(
    ("desired", "text"),
    [
        (Steering(NODE, frozenset({4, 6})), DUAL_OPEN),
        (Steering(NODE, frozenset({4}), "closed", scope=Scope(in_exclude_ports=(22, 9000))), V4_CLOSED),
        (Steering(NODE, frozenset({4, 6}), ports=Ports(dns=15053)), DUAL_NAMES),
        (Steering(NODE, frozenset({6}), enabled=False), DISABLED),
    ],
    ids=["dual-open", "v4-closed", "dual-names", "disabled"],
)
def test_text(desired: Steering, text: str) -> None:
    assert nft.create("netproxy-node-a-g3", desired.wanted()) == text


def test_delete_is_one_transaction() -> None:
    assert nft.delete(("a", "b")) == "".join(f"add table inet {name}\ndelete table inet {name}\n" for name in "ab")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("netproxy-node-a-g3", (NODE, 3)),
        ("netproxy-a-g1-g22", ("a-g1", 22)),
        ("netproxy-a", None),
        ("netproxy-a-g0", None),
        ("netproxy-a-g01", None),
        ("netproxy-A-g1", None),
        ("netproxy--g1", None),
        ("netproxy-a-g1\n", None),
        ("x-netproxy-a-g1", None),
    ],
)
def test_table_names(name: str, parsed: tuple[str, int] | None) -> None:
    assert nft.parse_table_name(name) == parsed
    if parsed:
        assert nft.table_name(*parsed) == name


def answer(*entries: dict[str, Any]) -> str:
    return json.dumps({"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"name": "t"}}, *entries]})


PLACE = {"family": "inet", "table": "t"}
OUTPUT = {
    "chain": {**PLACE, "name": "output", "handle": 1, "type": "nat", "hook": "output", "prio": -100, "policy": "accept"}
}
PREROUTING = {
    "chain": {
        **PLACE,
        "name": "prerouting",
        "handle": 2,
        "type": "filter",
        "hook": "prerouting",
        "prio": -150,
        "policy": "accept",
    }
}
OTHER_FAMILY_RULE = {
    "rule": {
        **PLACE,
        "chain": "output",
        "handle": 6,
        "expr": [
            {"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}},
            {"return": None},
        ],
    }
}
DISABLED_RULE = {
    "rule": {
        **PLACE,
        "chain": "output",
        "handle": 7,
        "expr": [
            {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "established"}},
            {"return": None},
        ],
    }
}
DISABLED_LISTING = nft.listing(Steering(NODE, frozenset({4}), enabled=False).wanted())


def test_listing_of_what_was_loaded() -> None:
    rules = (OTHER_FAMILY_RULE, DISABLED_RULE)
    assert nft.read_listing(answer(OUTPUT, PREROUTING, *rules)) == DISABLED_LISTING
    assert nft.read_listing(answer(PREROUTING), answer(OUTPUT, *rules)) == DISABLED_LISTING
    assert nft.read_listing(answer(PREROUTING, *rules, OUTPUT)) != DISABLED_LISTING[:-1]


def test_chains_of_a_table() -> None:
    foreign = {"chain": {**OUTPUT["chain"], "table": "other"}}
    name = PLACE["table"]
    assert nft.chains_of(name, answer(PREROUTING, foreign, OUTPUT)) == ["prerouting", "output"]
    assert nft.chains_of(name, answer()) == []


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [OUTPUT, PREROUTING],
        [OUTPUT, DISABLED_RULE],
        [OUTPUT, PREROUTING, DISABLED_RULE, DISABLED_RULE],
        [OUTPUT, PREROUTING, DISABLED_RULE, {"set": {**PLACE, "name": "s"}}],
        [OUTPUT, PREROUTING, DISABLED_RULE, {"chain": {**PLACE, "name": "more", "handle": 9}}],
        [OUTPUT, PREROUTING, {"rule": {**DISABLED_RULE["rule"], "expr": [{"accept": None}]}}],
        [OUTPUT, PREROUTING, {"rule": {**DISABLED_RULE["rule"], "comment": "mine"}}],
        [{"chain": {**OUTPUT["chain"], "policy": "drop"}}, PREROUTING, DISABLED_RULE],
        [{"chain": {**OUTPUT["chain"], "prio": 0}}, PREROUTING, DISABLED_RULE],
    ],
)
def test_anything_else_in_the_table_differs(entries: list[dict[str, Any]]) -> None:
    entries = [
        found for entry in entries for found in ([OTHER_FAMILY_RULE, entry] if entry is DISABLED_RULE else [entry])
    ]
    assert nft.read_listing(answer(*entries)) != DISABLED_LISTING


def test_the_order_of_rules_matters() -> None:
    other = {"rule": {**DISABLED_RULE["rule"], "expr": [{"accept": None}]}}
    one = nft.read_listing(answer(OUTPUT, PREROUTING, DISABLED_RULE, other))
    assert one != nft.read_listing(answer(OUTPUT, PREROUTING, other, DISABLED_RULE))


def syn(flags: Any) -> str:
    payload = {"payload": {"protocol": "tcp", "field": "flags"}}
    match = {"match": {"op": "==", "left": {"&": [payload, flags]}, "right": "syn"}}
    return answer({"rule": {**PLACE, "chain": "output", "handle": 1, "expr": [match]}})


def test_wordings_of_the_same_flags_are_equal() -> None:
    one = nft.read_listing(syn(["fin", "syn", "rst", "ack"]))
    assert one == nft.read_listing(syn({"|": ["ack", "rst", "syn", "fin"]}))
    assert one != nft.read_listing(syn(["syn", "rst", "ack"]))


def test_a_set_of_one_is_its_element() -> None:
    assert nft._canonical(nft._match_json(ToPorts((22,)))) == nft._canonical(
        {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}
    )


@pytest.mark.parametrize(
    ("match", "text"),
    [
        (ToNetworks(("10.0.0.0/8",)), "ip daddr 10.0.0.0/8"),
        (ToNetworks(("10.0.0.0/8", "192.168.0.0/16")), "ip daddr { 10.0.0.0/8, 192.168.0.0/16 }"),
        (FromNetworks(("fd00::/8", "fe80::/10")), "ip6 saddr { fd00::/8, fe80::/10 }"),
        (OfUsers((0, 1000)), "meta skuid { 0, 1000 }"),
        (ToPorts((53,), "udp"), "udp dport 53"),
    ],
)
def test_matches(match: Match, text: str) -> None:
    assert nft._match(match) == text


def to(*shown: Any) -> Any:
    value = {"set": list(shown)} if len(shown) > 1 else shown[0]
    return nft._canonical(nft._compare({"payload": {"protocol": "ip", "field": "daddr"}}, value))


def test_wordings_of_the_same_networks_are_equal() -> None:
    wanted = nft._canonical(nft._match_json(ToNetworks(("10.1.0.0/16", "10.2.0.0/16", "10.9.9.9/32"))))
    prefixes = [{"prefix": {"addr": "10.1.0.0", "len": 16}}, {"prefix": {"addr": "10.2.0.0", "len": 16}}]
    assert wanted == to(*prefixes, "10.9.9.9") == to({"range": ["10.1.0.0", "10.2.255.255"]}, "10.9.9.9")
    assert wanted != to(*prefixes)
    assert nft._canonical(nft._match_json(ToNetworks(("10.9.9.9/32",)))) == to("10.9.9.9")
    assert nft._canonical(nft._match_json(ToPorts((80, 81)))) != nft._canonical(nft._match_json(ToPorts((80, 82))))


SCOPE = Scope(
    out_include_cidrs=("10.0.0.0/8", "10.1.0.0/16", "fd00::/8"),
    out_exclude_cidrs=("10.9.0.0/16", "0.0.0.0/0"),
    out_include_ports=(80, 443),
    out_exclude_ports=(25, 53),
    out_exclude_uids=(0, 1000),
    in_include_ports=(8080, 9090),
    in_exclude_ports=(22,),
    in_exclude_cidrs=("10.7.0.0/24", "fd07::/64"),
)

NARROW = """\
	chain output {
		type nat hook output priority -100; policy accept;
		meta mark & 0x00000fff == 0x00000539 return
		fib daddr type == local return
		ip6 daddr fe80::/10 return
		ip daddr 240.240.0.0/16 udp dport 53 redirect to :15053
		ip daddr 240.240.0.0/16 tcp dport 53 tcp flags & (fin|syn|rst|ack) == syn redirect to :15053
		ip daddr 240.240.0.0/16 tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
		ip6 daddr fd00:240::/32 udp dport 53 redirect to :15053
		ip6 daddr fd00:240::/32 tcp dport 53 tcp flags & (fin|syn|rst|ack) == syn redirect to :15053
		ip6 daddr fd00:240::/32 tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
		meta skuid { 0, 1000 } return
		meta nfproto ipv4 return
		tcp dport { 25, 53 } return
		udp dport 53 return
		udp dport 53 redirect to :15053
		tcp dport 53 tcp flags & (fin|syn|rst|ack) == syn redirect to :15053
		ip daddr 10.0.0.0/8 tcp dport { 80, 443 } tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
		ip6 daddr fd00::/8 tcp dport { 80, 443 } tcp flags & (fin|syn|rst|ack) == syn redirect to :15001
	}
	chain prerouting {
		type filter hook prerouting priority -150; policy accept;
		iifname "lo" return
		fib daddr type != local return
		ip saddr 10.7.0.0/24 return
		ip6 saddr fd07::/64 return
		tcp dport 22 return
		meta nfproto ipv4 tcp dport { 8080, 9090 } tproxy ip to 127.0.0.1:15006 accept
		meta nfproto ipv6 tcp dport { 8080, 9090 } tproxy ip6 to [::1]:15006 accept
		tcp dport { 8080, 9090 } tcp flags & (fin|syn|rst|ack) == syn reject with tcp reset
	}
"""


def test_a_scope_narrows_both_directions() -> None:
    desired = Steering(NODE, frozenset({4, 6}), "closed", Ports(dns=15053), scope=SCOPE)
    assert NARROW in nft.create("netproxy-node-a-g3", desired.wanted())
