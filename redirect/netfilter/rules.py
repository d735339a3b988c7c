"""The one rule model: what netfilter shall do in a workload's namespace, as data. PURE.

`nft.py` renders it. It holds only matches and actions which nftables and iptables both have.

    raw (output)          names: the proxy's own queries get a conntrack zone for their original direction
    output (nat)          the other IP family, the proxy's own sockets, own addresses and IPv6 link-local pass;
                          names: UDP and TCP to port 53 goes to loopback:dns;
                          a TCP connection being opened goes to loopback:outbound
    prerouting (mangle)   the other IP family, what came in by lo, what is not for us, and excluded ports pass;
                          TCP goes to the transparent listener on loopback:inbound;
                          with `refuse_without_listener`, a connection which nobody took is reset

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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Family = Literal[4, 6]
Protocol = Literal["tcp", "udp"]

DNS = 53
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
class ToNetwork:
    cidr: str


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


Match = Established | MarkIs | ToLocal | ToNetwork | ToPorts | FromInterface | OfFamily | IsTcp | OpensTcp


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


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the proxy listens, on loopback in the workload's namespace, and inbound ports it leaves to the app.

    `dns`: for queries, UDP and TCP; None leaves names to whomever the app asks.
    """

    outbound: int = 15001
    inbound: int = 15006
    dns: int | None = None
    excluded_inbound: tuple[int, ...] = ()


def ruleset(
    ports: Ports, families: Iterable[Family], *, mark: int, mask: int, refuse_without_listener: bool, enabled: bool
) -> Ruleset:
    """The chains of one workload. Not enabled: hooks which steer nothing, but keep the kernel translating connections
    which were redirected before."""
    wanted = sorted(set(families)) if enabled else []
    return (
        # Stays while disabled: queries of the proxy that are under way shall not collide with new ones.
        *([] if ports.dns is None else [Chain("raw", "filter", "output", -300, tuple(_queries(mark, mask)))]),
        Chain("output", "nat", "output", -100, tuple(_outbound(ports, wanted, mark, mask))),
        Chain("prerouting", "filter", "prerouting", -150, tuple(_inbound(ports, wanted, refuse_without_listener))),
    )


def _outbound(ports: Ports, families: list[Family], mark: int, mask: int) -> Iterable[Rule]:
    if not families:
        # NAT needs its hook and conntrack's. The chain is the first; the second exists only while some rule asks for
        # it, as redirect does. This one does too, and decides nothing.
        yield Rule((Established(),), Pass())
        return
    yield from _other_family(families)
    yield Rule((MarkIs(mark, mask),), Pass())
    yield Rule((ToLocal(True),), Pass())
    if 6 in families:
        yield Rule((ToNetwork("fe80::/10"),), Pass())
    if ports.dns is not None:
        yield Rule((ToPorts((DNS,), "udp"),), Redirect(ports.dns))
        yield Rule((ToPorts((DNS,)), OpensTcp()), Redirect(ports.dns))
    yield Rule((OpensTcp(),), Redirect(ports.outbound))


def _queries(mark: int, mask: int) -> Iterable[Rule]:
    protocols: tuple[Protocol, ...] = ("udp", "tcp")
    for protocol in protocols:
        yield Rule((MarkIs(mark, mask), ToPorts((DNS,), protocol)), InZone(ZONE))


def _inbound(ports: Ports, families: list[Family], refuse_without_listener: bool) -> Iterable[Rule]:
    if not families:
        return
    yield from _other_family(families)
    yield Rule((FromInterface("lo"),), Pass())
    yield Rule((ToLocal(False),), Pass())
    if ports.excluded_inbound:
        yield Rule((ToPorts(ports.excluded_inbound),), Pass())
    for family in families:
        yield Rule((OfFamily(family), IsTcp()), ToListener(family, ports.inbound))
    if refuse_without_listener:
        yield Rule((OpensTcp(),), Reset())


def _other_family(families: list[Family]) -> Iterable[Rule]:
    if 4 not in families:
        yield Rule((OfFamily(4),), Pass())
    if 6 not in families:
        yield Rule((OfFamily(6),), Pass())
