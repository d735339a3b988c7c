"""Rules as iptables-restore takes and iptables-save lists them. That the two agree is proved by the kernel tests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirect import Scope, Steering
from redirect.netfilter import iptables
from redirect.wanted import Family, Ports

NODE = "node-a"
NAME = "np-node-a-3"

V4_NAMES = """\
*raw
-N np-node-a-3r
-A np-node-a-3r -p udp -m mark --mark 0x539/0xfff -m multiport --dports 53 -j CT --zone-orig 1337
-A np-node-a-3r -p tcp -m mark --mark 0x539/0xfff -m multiport --dports 53 -j CT --zone-orig 1337
-I OUTPUT 1 -j np-node-a-3r
COMMIT
*nat
-N np-node-a-3o
-A np-node-a-3o -m mark --mark 0x539/0xfff -j RETURN
-A np-node-a-3o -m addrtype --dst-type LOCAL -j RETURN
-A np-node-a-3o -p udp -m multiport --dports 53 -j REDIRECT --to-ports 15053
-A np-node-a-3o -p tcp -m multiport --dports 53 -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j REDIRECT --to-ports 15053
-A np-node-a-3o -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j REDIRECT --to-ports 15001
-I OUTPUT 1 -j np-node-a-3o
COMMIT
*mangle
-N np-node-a-3p
-A np-node-a-3p -i lo -j RETURN
-A np-node-a-3p -m addrtype ! --dst-type LOCAL -j RETURN
-A np-node-a-3p -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m socket -j RETURN
-A np-node-a-3p -p tcp -j TPROXY --on-port 15006 --on-ip 127.0.0.1 --tproxy-mark 0x0/0x0
-I PREROUTING 1 -j np-node-a-3p
COMMIT
"""

V6_DISABLED = """\
*nat
-N np-node-a-3o
-A np-node-a-3o -m conntrack --ctstate ESTABLISHED -j RETURN
-I OUTPUT 1 -j np-node-a-3o
COMMIT
"""


@pytest.mark.parametrize(
    ("desired", "family", "text"),
    [
        (Steering(NODE, frozenset({4, 6}), ports=Ports(dns=15053)), 4, V4_NAMES),
        (Steering(NODE, frozenset({6}), enabled=False), 6, V6_DISABLED),
        (Steering(NODE, frozenset({6})), 4, ""),
        (Steering(NODE, frozenset({4}), ports=Ports(dns=15053), enabled=False), 6, ""),
    ],
    ids=["names", "disabled", "other-family", "other-family-disabled"],
)
def test_text(desired: Steering, family: Family, text: str) -> None:
    assert iptables.create(NAME, desired.wanted(), family) == text


def test_lists_become_rules() -> None:
    scope = Scope(
        out_include_cidrs=("10.0.0.0/8", "192.168.0.0/16", "fd00::/8"),
        out_include_ports=tuple(range(1, 18)),
        out_exclude_uids=(0, 1000),
        out_exclude_cidrs=("10.9.0.0/16", "::/0"),
        in_exclude_cidrs=("10.7.0.0/24",),
    )
    rules = Steering(NODE, frozenset({4, 6}), scope=scope, vip_cidrs=()).wanted()
    v4 = iptables.create(NAME, rules, 4).splitlines()
    opens = "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j REDIRECT --to-ports 15001"
    many = "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
    assert v4[v4.index("-N np-node-a-3o") + 3 :][:8] == [
        "-A np-node-a-3o -m owner --uid-owner 0 -j RETURN",
        "-A np-node-a-3o -m owner --uid-owner 1000 -j RETURN",
        "-A np-node-a-3o -d 10.9.0.0/16 -j RETURN",
        f"-A np-node-a-3o -d 10.0.0.0/8 -p tcp -m multiport --dports {many} {opens}",
        f"-A np-node-a-3o -d 10.0.0.0/8 -p tcp -m multiport --dports 16,17 {opens}",
        f"-A np-node-a-3o -d 192.168.0.0/16 -p tcp -m multiport --dports {many} {opens}",
        f"-A np-node-a-3o -d 192.168.0.0/16 -p tcp -m multiport --dports 16,17 {opens}",
        "-I OUTPUT 1 -j np-node-a-3o",
    ]
    assert "-A np-node-a-3p -s 10.7.0.0/24 -j RETURN" in v4
    v6 = iptables.create(NAME, rules, 6).splitlines()
    assert "-A np-node-a-3o -j RETURN" in v6  # ::/0
    assert not any("10." in line for line in v6)


def saved(text: str) -> str:
    """What iptables-save prints after this was restored into an empty namespace."""
    out = []
    for line in text.splitlines():
        words = line.split()
        if words[0] == "-N":
            out.append(f":{words[1]} - [0:0]")
        elif words[0] == "-I":
            out.append(f"-A {words[1]} {' '.join(words[3:])}")
        else:
            out.append(line)
    return "\n".join(["# a comment", *out, ""])


DESIRED = Steering(NODE, frozenset({4, 6}), ports=Ports(dns=15053), mechanism="iptables-nft")
TEXTS: dict[Family, str] = {family: saved(iptables.create(NAME, DESIRED.wanted(), family)) for family in (4, 6)}


def test_listing_of_what_was_loaded() -> None:
    assert iptables.read_listings(NODE, TEXTS) == {NAME: DESIRED.listing()}
    assert iptables.read_listings("node-b", TEXTS) == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-A np-node-a-3o -m addrtype --dst-type LOCAL -j RETURN\n", ""),
        ("-A OUTPUT -j np-node-a-3o\n", ""),
        ("-A OUTPUT -j np-node-a-3o\n", "-A OUTPUT -j np-node-a-3o\n-A OUTPUT -j np-node-a-3o\n"),
        ("-A OUTPUT -j np-node-a-3o\n", "-A OUTPUT -p tcp -j np-node-a-3o\n"),
        ("-A OUTPUT -j np-node-a-3o\n", "-A OUTPUT -p tcp --dport 80 -j ACCEPT\n-A OUTPUT -j np-node-a-3o\n"),
        (":np-node-a-3o - [0:0]\n", ":np-node-a-3o - [0:0]\n:np-node-a-3x - [0:0]\n"),
        ("--to-ports 15001", "--to-ports 15002"),
    ],
)
def test_anything_else_differs(before: str, after: str) -> None:
    assert before in TEXTS[4]
    assert iptables.read_listings(NODE, {**TEXTS, 4: TEXTS[4].replace(before, after)}) != {NAME: DESIRED.listing()}


def test_rules_of_others_behind_ours_do_not_matter() -> None:
    text = TEXTS[4].replace("-A OUTPUT -j np-node-a-3o\n", "-A OUTPUT -j np-node-b-1o\n-A OUTPUT -j np-node-a-3o\n"
                            "-A OUTPUT -j DOCKER\n")  # fmt: skip
    assert iptables.read_listings(NODE, {**TEXTS, 4: text}) == {NAME: DESIRED.listing()}


def test_deleting_takes_jumps_first_and_leaves_others() -> None:
    text = TEXTS[4].replace("-A OUTPUT -j np-node-a-3o\n", "-A OUTPUT -p tcp -j np-node-a-3o\n-A OUTPUT -j np-b-3o\n")
    lines = iptables.delete(text.replace(":np-node-a-3o", ":np-b-3o - [0:0]\n:np-node-a-3o"), (NAME,)).splitlines()
    nat = lines[lines.index("*nat") :]
    assert nat[: nat.index("COMMIT") + 1] == [
        "*nat", "-D OUTPUT -p tcp -j np-node-a-3o", "-F np-node-a-3o", "-X np-node-a-3o", "COMMIT"
    ]  # fmt: skip
    assert iptables.delete(text, ("np-node-a-4",)) == ""


@given(st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True), st.integers(1, (1 << 32) - 1))
def test_names_fit_and_are_found_again(node: str, generation: int) -> None:
    name = iptables.table_name(node, generation)
    assert len(name + "o") <= 28
    assert iptables.generation_of(name) == generation
    listings = iptables.read_listings(node, {4: f"*nat\n:{name}o - [0:0]\nCOMMIT\n"})
    assert listings == {name: ("4 nat o is empty",)}
