"""The one rule model: what netfilter shall do in a workload's namespace, as data. PURE.

`nft.py` and `iptables.py` render it. Matches are positive, since iptables can't negate a list; a list of networks is of
one IP family.

    raw (output)          names: the proxy's own queries get a conntrack zone for their original direction
    output (nat)          the other IP family, the proxy's own sockets, own addresses and IPv6 link-local pass;
                          names: UDP and TCP to port 53 goes to loopback:dns;
                          a TCP connection being opened goes to loopback:outbound
    prerouting (mangle)   the other IP family, what came in by lo and what is not for us pass;
                          TCP goes to the transparent listener on loopback:inbound;
                          under failure policy ``closed``, a connection which nobody took is reset

A `Scope` narrows this: what it excludes passes, and only what it includes is taken. Names are taken whatever it
includes, since they lead to VIPs; VIPs are taken whatever it says, since nobody else answers there.

Why only SYN in output: conntrack picks up connections in their middle, and NAT would then redirect the first packet
it sees of a connection older than the rules. Why all TCP in prerouting: tproxy prefers an established socket and
leaves the packet alone unless that socket is transparent, so older connections keep their app and later ones their
proxy. Why IPv6 link-local is left alone in output: SO_ORIGINAL_DST does not say the interface, so the proxy could not
dial it. Why not in prerouting: any neighbour could dial it, past all that the proxy demands. There it comes to the
proxy, which cannot dial it onwards either, and so refuses it: over link-local an app is not reachable.

Why a zone: NAT decides once for each 5-tuple, and conntrack remembers a query for 30 s (TCP for 120 s). The proxy asks
the same nameserver from the same address as the app, so without it an app's query from a port that the proxy used
before would pass unsteered, and the proxy's own would come back to itself. Only the original direction is in the zone:
the answer is found in the default zone as always, and rules of others about established connections hold for it.

Why the other family passes first, instead of a family in each rule: nft leaves the family out when it lists a reset. It
is one which the namespace does not have at all (`redirect.observed.reachable`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from redirect.wanted import DNS, Family, Ports, Wanted

Protocol = Literal["tcp", "udp"]
ZONE = 0x539


@dataclass(frozen=True, slots=True)
class MarkIs:
    mark: int
    mask: int


@dataclass(frozen=True, slots=True)
class ToLocal:
    """The destination is (or is not) an address of this namespace, loopback included."""

    wanted: bool


@dataclass(frozen=True, slots=True)
class ToNetworks:
    """The destination is in one of these, which are of one family, sorted and apart; not empty."""

    cidrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FromNetworks:
    """Likewise the source."""

    cidrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OfUsers:
    """The sending socket is of one of these users; sorted, without duplicates, not empty."""

    uids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ToPorts:
    """The destination port is one of these; sorted, without duplicates, not empty."""

    ports: tuple[int, ...]
    protocol: Protocol = "tcp"


@dataclass(frozen=True, slots=True)
class FromInterface:
    name: str


@dataclass(frozen=True, slots=True)
class OfFamily:
    family: Family


@dataclass(frozen=True, slots=True)
class IsTcp:
    pass


@dataclass(frozen=True, slots=True)
class OpensTcp:
    """SYN without ACK, FIN and RST; ECN bits do not matter."""


@dataclass(frozen=True, slots=True)
class Established:
    """Of a connection which conntrack knows in both directions."""


Match = (
    Established | MarkIs | ToLocal | ToNetworks | FromNetworks | OfUsers | ToPorts | FromInterface | OfFamily | IsTcp
    | OpensTcp
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pass:
    """Leave the packet alone: no further rule of this chain."""


@dataclass(frozen=True, slots=True)
class Redirect:
    port: int


@dataclass(frozen=True, slots=True)
class ToListener:
    """TPROXY to loopback:port, then no further rule. Without such a listener the next rule goes on."""

    family: Family
    port: int


@dataclass(frozen=True, slots=True)
class Reset:
    pass


@dataclass(frozen=True, slots=True)
class InZone:
    """What the packet opens is remembered in this conntrack zone, by its original direction; then the next rule."""

    zone: int


Action = Pass | Redirect | ToListener | Reset | InZone


@dataclass(frozen=True, slots=True)
class Rule:
    matches: tuple[Match, ...]
    action: Action


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    kind: Literal["nat", "filter"]
    hook: Literal["output", "prerouting"]
    priority: int
    rules: tuple[Rule, ...]


Ruleset = tuple[Chain, ...]


def ruleset(wanted: Wanted) -> Ruleset:
    """The chains of one workload."""
    return (
        # Stays while disabled: queries of the proxy that are under way shall not collide with new ones.
        *([] if wanted.ports.dns is None else [Chain("raw", "filter", "output", -300, tuple(_queries(wanted)))]),
        Chain("output", "nat", "output", -100, tuple(_outbound(wanted))),
        Chain("prerouting", "filter", "prerouting", -150, tuple(_inbound(wanted))),
    )


def _queries(wanted: Wanted) -> Iterable[Rule]:
    protocols: tuple[Protocol, ...] = ("udp", "tcp")
    for protocol in protocols:
        yield Rule((MarkIs(wanted.mark, wanted.mask), ToPorts((DNS,), protocol)), InZone(ZONE))


def _outbound(wanted: Wanted) -> Iterable[Rule]:
    families, scope = wanted.families, wanted.scope
    yield from _other_family(families)
    if not (wanted.enabled and wanted.outbound):
        # NAT needs its hook and conntrack's. The chain is the first; the second exists only while some rule asks for
        # it, as redirect does. This one does too, and decides nothing.
        yield Rule((Established(),), Pass())
        return
    yield Rule((MarkIs(wanted.mark, wanted.mask),), Pass())
    yield Rule((ToLocal(True),), Pass())
    if 6 in families:
        yield Rule((ToNetworks(("fe80::/10",)),), Pass())
    opens = Rule((OpensTcp(),), Redirect(wanted.ports.outbound))
    names = list(_names(wanted.ports))
    if scope.narrows_outbound:
        for match in _to(wanted.vips, families):
            for rule in (*names, opens):
                yield Rule((match, *rule.matches), rule.action)
    if scope.out_exclude_uids:
        yield Rule((OfUsers(scope.out_exclude_uids),), Pass())
    for match in _to(scope.out_exclude_cidrs, families):
        yield Rule((match,), Pass())
    if scope.out_exclude_ports:
        yield Rule((ToPorts(scope.out_exclude_ports),), Pass())
    if names and DNS in scope.out_exclude_ports:
        yield Rule((ToPorts((DNS,), "udp"),), Pass())
    yield from names
    included: list[Match] = [ToPorts(scope.out_include_ports)] if scope.out_include_ports else []
    places = [[match] for match in _to(scope.out_include_cidrs, families)] if scope.out_include_cidrs else [[]]
    for place in places:
        yield Rule((*place, *included, *opens.matches), opens.action)


def _names(ports: Ports) -> Iterator[Rule]:
    if ports.dns is not None:
        yield Rule((ToPorts((DNS,), "udp"),), Redirect(ports.dns))
        yield Rule((ToPorts((DNS,)), OpensTcp()), Redirect(ports.dns))


def _inbound(wanted: Wanted) -> Iterable[Rule]:
    families, scope = wanted.families, wanted.scope
    if not wanted.enabled:
        return
    yield from _other_family(families)
    yield Rule((FromInterface("lo"),), Pass())
    yield Rule((ToLocal(False),), Pass())
    for match in _from(scope.in_exclude_cidrs, families):
        yield Rule((match,), Pass())
    if scope.in_exclude_ports:
        yield Rule((ToPorts(scope.in_exclude_ports),), Pass())
    included: list[Match] = [ToPorts(scope.in_include_ports)] if scope.in_include_ports else []
    for family in sorted(families):
        yield Rule((OfFamily(family), *(included or [IsTcp()])), ToListener(family, wanted.ports.inbound))
    if wanted.failure_policy == "closed":
        yield Rule((*included, OpensTcp()), Reset())


def _other_family(families: frozenset[Family]) -> Iterable[Rule]:
    if 4 not in families:
        yield Rule((OfFamily(4),), Pass())
    if 6 not in families:
        yield Rule((OfFamily(6),), Pass())


def _to(cidrs: tuple[str, ...], families: frozenset[Family]) -> Iterator[Match]:
    for family, found in _by_family(cidrs, families):
        yield ToNetworks(found) if found else OfFamily(family)


def _from(cidrs: tuple[str, ...], families: frozenset[Family]) -> Iterator[Match]:
    for family, found in _by_family(cidrs, families):
        yield FromNetworks(found) if found else OfFamily(family)


def _by_family(cidrs: tuple[str, ...], families: frozenset[Family]) -> Iterator[tuple[Family, tuple[str, ...]]]:
    """Without overlaps, which nft refuses; () stands for the whole family, for which nft has no prefix."""
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    v4 = ipaddress.collapse_addresses(net for net in networks if isinstance(net, ipaddress.IPv4Network))
    v6 = ipaddress.collapse_addresses(net for net in networks if isinstance(net, ipaddress.IPv6Network))
    found: dict[Family, list[ipaddress.IPv4Network | ipaddress.IPv6Network]] = {4: [*v4], 6: [*v6]}
    for family in sorted(families):
        if found[family]:
            yield family, tuple(str(net) for net in found[family] if net.prefixlen)
