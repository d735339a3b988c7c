"""The rule model as input of iptables-restore, and what iptables-save says of it. PURE.

The rules of one generation are chains named ``np-<node>-<generation><role>``, the role being a letter, in the tables of
both IP families, with a jump to each at the top of the built-in chain. A node name that does not fit into the 28
characters of a chain's name is replaced by a hash. Rules change by being replaced: two generations side by side do no
harm, as with nftables.

Rules are written as iptables-save prints them, in both variants (1.8.9: one, of legacy and nf_tables), so that a
`Listing` compares text.

What differs from nftables:
- TPROXY drops a packet for which nobody listens (in nftables it goes on), so a refused client waits in vain instead of
  being reset, and there is no rule for that. For the same reason packets of established connections are left to the
  kernel's own lookup, which finds them an older app's or the proxy's socket: their destination is an address of ours.
- Nothing is owned by a socket: rules stay until somebody removes them, so the failure policy is always ``closed``.
- The built-in tables come with the first rule and stay, empty.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import assert_never

from redirect.netfilter.rules import (
    Action,
    Chain,
    Established,
    FromInterface,
    FromNetworks,
    InZone,
    IsTcp,
    MarkIs,
    Match,
    OfFamily,
    OfUsers,
    OpensTcp,
    Pass,
    Redirect,
    Reset,
    Rule,
    Ruleset,
    ToListener,
    ToLocal,
    ToNetworks,
    ToPorts,
    ruleset,
)
from redirect.wanted import FailurePolicy, Family, Listing, Wanted

DROPS_AT_ONCE = False
"""Each IP family is a transaction of its own."""
NEEDS_ADDRESSES = False
TRANSLATES = True
FAMILIES: tuple[Family, ...] = (4, 6)
LOOPBACK = {4: "127.0.0.1", 6: "::1"}

_PLACES = {
    ("nat", "output"): ("nat", "OUTPUT", "o"),
    ("filter", "output"): ("raw", "OUTPUT", "r"),
    ("filter", "prerouting"): ("mangle", "PREROUTING", "p"),
}
"""Kind and hook of a chain: table, built-in chain, role."""
_NAME_LENGTH = 28
_NODE_LENGTH = _NAME_LENGTH - len("np--") - len("4294967295r")
_OURS = re.compile(r"np-([a-z0-9-]+|H[0-9a-f]+)-([1-9][0-9]{0,9})([a-z])")
_TO_CHAIN = re.compile(r" -[jg] (np-\S+)")
_MULTIPORT = 15
_OPENS = "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN"


def table_name(node: str, generation: int) -> str:
    """What the names of a generation's chains begin with."""
    return f"np-{_tag(node)}-{generation}"


def in_force(_policy: FailurePolicy) -> FailurePolicy:
    """What becomes of the failure policy that is asked for: rules stay until somebody removes them."""
    return "closed"


def is_owned(_policy: FailurePolicy) -> bool:
    return False


def _tag(node: str) -> str:
    """A node's name has no capital, so a hash is never taken for a name."""
    if len(node) <= _NODE_LENGTH:
        return node
    return "H" + hashlib.sha256(node.encode()).hexdigest()[: _NODE_LENGTH - 1]


# --- rendering


@dataclass(frozen=True, slots=True)
class _Part:
    """A chain of one family. The rules are without ``-A chain``."""

    table: str
    builtin: str
    role: str
    rules: tuple[str, ...]


def create(name: str, wanted: Wanted, family: Family) -> str:
    """Input for one family; "" when it is not to be steered. It fails, changing nothing of that table, if there is a
    chain of that name."""
    lines = []
    for part in _parts(ruleset(wanted), family):
        chain = f"{name}{part.role}"
        lines += [f"*{part.table}", f"-N {chain}"]
        lines += [f"-A {chain} {rule}" for rule in part.rules]
        lines += [f"-I {part.builtin} 1 -j {chain}", "COMMIT"]
    return "\n".join([*lines, ""]) if lines else ""


def delete(saved: str, names: tuple[str, ...]) -> str:
    """Input that removes these generations from what iptables-save printed, jumps first; "" when none is there."""
    lines: list[str] = []
    for table, chains, rules in _tables(saved):
        mine = [chain for chain in chains if _generation(chain) in names]
        if mine:
            lines.append(f"*{table}")
            for chain, rest in rules:
                found = _TO_CHAIN.search(rest)
                if found and found[1] in mine and chain not in mine:
                    lines.append(f"-D {chain}{rest}")
            lines += [f"-F {chain}" for chain in mine] + [f"-X {chain}" for chain in mine] + ["COMMIT"]
    return "\n".join([*lines, ""]) if lines else ""


def _parts(rules: Ruleset, family: Family) -> Iterator[_Part]:
    """Empty for a family whose traffic all passes."""
    parts = []
    for chain in rules:
        found = list(_chain(chain, family))
        if found[:1] == ["-j RETURN"]:
            return  # the other family, as the rule model says it
        if found:
            parts.append(_Part(*_PLACES[chain.kind, chain.hook], tuple(found)))
    yield from parts


def _chain(chain: Chain, family: Family) -> Iterator[str]:
    for rule in chain.rules:
        if not isinstance(rule.action, Reset):  # TPROXY drops before it
            yield from _rule(rule, family)


def _rule(rule: Rule, family: Family) -> Iterator[str]:
    """One rule becomes several, since iptables has no sets: one for each network, user and 15 ports."""
    if any(not _is_of(match, family) for match in rule.matches):
        return
    for matches in itertools.product(*(list(_match(match)) for match in rule.matches)):
        words = [match for match in matches if match]
        protocols = {word.protocol for word in words if word.protocol}
        addresses = [word.text for word in sorted(words, key=lambda word: word.rank) if word.rank < 4]
        protocol = [f"-p {found}" for found in sorted(protocols)]
        rest = [word.text for word in words if word.rank == 4 and word.text]
        for action in _action(rule.action):
            yield " ".join([*addresses, *protocol, *rest, action])


def _is_of(match: Match, family: Family) -> bool:
    match match:
        case OfFamily(other):
            return other == family
        case ToNetworks(cidrs) | FromNetworks(cidrs):
            return (":" in cidrs[0]) is (family == 6)
    return True


@dataclass(frozen=True, slots=True)
class _Word:
    """A match as text. iptables-save prints source, destination and interface first, then the protocol."""

    text: str
    rank: int = 4
    protocol: str = ""


def _match(match: Match) -> Iterator[_Word]:
    match match:
        case Established():
            yield _Word("-m conntrack --ctstate ESTABLISHED")
        case MarkIs(mark, mask):
            yield _Word(f"-m mark --mark {mark:#x}/{mask:#x}")
        case ToLocal(wanted):
            yield _Word(f"-m addrtype {'' if wanted else '! '}--dst-type LOCAL")
        case FromNetworks(cidrs):
            yield from (_Word(f"-s {cidr}", 0) for cidr in cidrs)
        case ToNetworks(cidrs):
            yield from (_Word(f"-d {cidr}", 1) for cidr in cidrs)
        case FromInterface(name):
            yield _Word(f"-i {name}", 2)
        case OfUsers(uids):
            yield from (_Word(f"-m owner --uid-owner {uid}") for uid in uids)
        case ToPorts(ports, protocol):
            for chunk in _chunks(ports):
                yield _Word(f"-m multiport --dports {','.join(map(str, chunk))}", protocol=protocol)
        case OfFamily():
            yield _Word("")
        case IsTcp():
            yield _Word("", protocol="tcp")
        case OpensTcp():
            yield _Word(_OPENS, protocol="tcp")
        case _:
            assert_never(match)


def _chunks(ports: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    return (ports[start : start + _MULTIPORT] for start in range(0, len(ports), _MULTIPORT))


def _action(action: Action) -> Iterator[str]:
    match action:
        case Pass():
            yield "-j RETURN"
        case Redirect(port):
            yield f"-j REDIRECT --to-ports {port}"
        case ToListener(family, port):
            yield "-m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m socket -j RETURN"
            yield f"-j TPROXY --on-port {port} --on-ip {LOOPBACK[family]} --tproxy-mark 0x0/0x0"
        case InZone(zone):
            yield f"-j CT --zone-orig {zone}"
        case Reset():
            pass  # see `_chain`
        case _:
            assert_never(action)


# --- listing


def listing(wanted: Wanted) -> Listing:
    """What iptables-save and ip6tables-save will show once these rules are loaded."""
    found: list[str] = []
    rules = ruleset(wanted)
    for family in FAMILIES:
        for part in _parts(rules, family):
            place = f"{family} {part.table}"
            found.append(f"{place} {part.builtin} -j {part.role}")
            found += [f"{place} {part.role} {rule}" for rule in part.rules]
    return tuple(_by_table(found))


def read_listings(node: str, saved: dict[Family, str]) -> dict[str, Listing]:
    """By name, the generations in what both commands printed.

    A jump behind a rule of somebody else, or with conditions, makes a listing differ from every `listing`.
    """
    tag, found = _tag(node), dict[str, list[str]]()
    for family, text in saved.items():
        for table, chains, rules in _tables(text):
            place = f"{family} {table}"
            empty = set()
            for chain in chains:
                if (name := _generation(chain, tag)) is not None:
                    found.setdefault(name, [])
                    empty.add(chain)
            preceded: set[str] = set()
            for chain, rest in rules:
                target = _TO_CHAIN.search(rest)
                if (name := _generation(chain, tag)) is not None and name in found:
                    empty.discard(chain)
                    found[name].append(f"{place} {chain[len(name) :]}{rest}")
                elif target is None:
                    preceded.add(chain)
                elif (name := _generation(target[1], tag)) is not None and name in found:
                    late = " behind others" if chain in preceded else ""
                    found[name].append(f"{place} {chain}{rest.replace(target[1], target[1][len(name) :])}{late}")
            for chain in empty:
                name = _generation(chain, tag) or ""
                found[name].append(f"{place} {chain[len(name) :]} is empty")
    return {name: tuple(_by_table(lines)) for name, lines in found.items()}


def generation_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def _generation(chain: str, tag: str | None = None) -> str | None:
    """The name of the generation that a chain belongs to; None: not ours, or not of `tag`."""
    match = _OURS.fullmatch(chain)
    return chain[:-1] if match and tag in (None, match[1]) else None


def _tables(saved: str) -> Iterator[tuple[str, list[str], list[tuple[str, str]]]]:
    """Name, chains, and rules as (chain, the rest with a space before it) of each table."""
    table, chains, rules = "", list[str](), list[tuple[str, str]]()
    for line in saved.splitlines():
        if line.startswith("*"):
            table, chains, rules = line[1:], [], []
        elif line.startswith(":"):
            chains.append(line[1:].split(" ", 1)[0])
        elif line.startswith("-A "):
            chain, space, rest = line[3:].partition(" ")
            rules.append((chain, space + rest))
        elif line == "COMMIT":
            yield table, chains, rules


def _by_table(lines: list[str]) -> list[str]:
    """Tables and chains in order of name, the rules of each in their own order (the sort is stable)."""
    return sorted(lines, key=lambda line: line.split(" ", 3)[:3])
