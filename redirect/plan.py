"""From what the kernel has to what it shall have: steps, each with its undo. PURE.

    LinkUp lo -> AddRoute / DeleteRoute (VIPs) -> CreateTable -> drop the older plain tables

Rules:
- nothing to do gives an empty plan;
- a new table is made before an older one goes, so no connection slips through between them;
- every step can be undone, and undoing in reverse leaves the kernel as it was. Dropping is the last act and the only
  one without undo. What goes all at once goes first; chains of iptables go one family after the other, and what of
  them can't be dropped is told and dropped at the next occasion;
- a table is of one mechanism. Another one is like another generation: new rules are made, then the older ones go;
- where the new one translates no addresses, hooks of the older one stay for as long as connections go by them;
- an older table which is owned goes when its owner's fd is closed, which is the caller's part: `lingering` names it.

VIP routes are `dev lo`: without a route connect() fails with ENETUNREACH before any rule sees the packet, and on lo the
kernel still picks an address of the pod as source. They stay while disabled, since established connections use them.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, assert_never

from redirect import entries
from redirect.errors import RedirectError
from redirect.netfilter import iptables, nft
from redirect.wanted import (
    MECHANISMS,
    FailurePolicy,
    Family,
    Listing,
    Mechanism,
    Ports,
    Scope,
    Table,
    Wanted,
    check_cidr,
)

_NODE = re.compile(r"[a-z0-9-]{1,40}")


class Dialect(Protocol):
    """How a mechanism words what is wanted, and what it makes of the failure policy."""

    DROPS_AT_ONCE: bool
    """Several tables are dropped all or none. Else some may stay, which is told and tried again."""
    NEEDS_ADDRESSES: bool
    """It has to be told the namespace's own addresses, which are the last line of a listing then."""
    TRANSLATES: bool
    """Established connections that it redirected need its hooks."""

    def table_name(self, node: str, generation: int) -> str: ...

    def listing(self, wanted: Wanted) -> Listing:
        """What the kernel shows when it has that."""

    def in_force(self, policy: FailurePolicy, /) -> FailurePolicy:
        """The policy that holds when this one is asked for."""

    def is_owned(self, policy: FailurePolicy, /) -> bool:
        """What this mechanism makes for a policy in force goes with the last holder of an fd that the caller keeps."""


DIALECTS: dict[Mechanism, Dialect] = {
    "nftables": nft,
    "iptables-nft": iptables,
    "iptables-legacy": iptables,
    "ebpf": entries,
}


def check_node(node: str) -> None:
    """RedirectError unless it can be part of a table's name."""
    if not _NODE.fullmatch(node):
        raise RedirectError(f"node name {node!r} is not of the form [a-z0-9-]{{1,40}}")


@dataclass(frozen=True, slots=True)
class Steering:
    """The desired condition of one namespace.

    `families`: the IP families in which traffic can reach the workload (`reachable()` finds them), whatever addresses
    it has: another family passes untouched. VIP networks of a family it cannot dial are left out by the caller.
    `enabled=False` keeps hooks and routes and
    steers nothing, so that established connections live on during a drain; `outbound=False` does so with those that the
    workload opens. `failure_policy`: under ``open``, what
    no listener takes goes its way as if it were not steered; under ``closed`` it is refused, outbound and inbound. How
    a mechanism keeps that when the agent is gone is its own matter, and not all can: see `policy_in_force`.
    """

    node: str
    families: frozenset[Family]
    failure_policy: FailurePolicy = "open"
    ports: Ports = field(default_factory=Ports)
    mark: int = 0x539
    mask: int = 0xFFF
    vip_cidrs: tuple[str, ...] = ("240.240.0.0/16", "fd00:240::/32")
    enabled: bool = True
    outbound: bool = True
    scope: Scope = field(default_factory=Scope)
    mechanism: Mechanism = "nftables"
    workers: int = 1
    """Who share the inbound connections, for a mechanism that hands them out itself."""

    def __post_init__(self) -> None:
        check_node(self.node)
        if not self.families or not self.families <= {4, 6}:
            raise RedirectError(f"families {sorted(self.families)}: one or both of 4 and 6 are needed")
        if self.failure_policy not in ("open", "closed"):
            raise RedirectError(f"failure policy {self.failure_policy!r} is neither open nor closed")
        if self.mechanism not in MECHANISMS:
            raise RedirectError(f"steering mechanism {self.mechanism!r} is none of {', '.join(MECHANISMS)}")
        listeners = [self.ports.outbound, self.ports.inbound]
        if self.ports.dns is not None:
            listeners.append(self.ports.dns)
        for port in listeners:
            if not 0 < port < 1 << 16:
                raise RedirectError(f"port {port} is not in 1..65535")
        if len(set(listeners)) != len(listeners):
            raise RedirectError(f"listeners cannot share a port: {listeners}")
        if not 0 < self.mask < 1 << 32 or not self.mark or self.mark & ~self.mask:
            raise RedirectError(f"mark {self.mark:#x} is zero or not within the mask {self.mask:#x}")
        for cidr in self.vip_cidrs:
            check_cidr(cidr, "VIP network")

    @property
    def policy_in_force(self) -> FailurePolicy:
        return DIALECTS[self.mechanism].in_force(self.failure_policy)

    @property
    def owned(self) -> bool:
        """What steers belongs to an fd that the caller keeps."""
        return DIALECTS[self.mechanism].is_owned(self.policy_in_force)

    def wanted(self) -> Wanted:
        return Wanted(
            self.ports,
            self.families,
            self.scope,
            self.vip_cidrs,
            mark=self.mark,
            mask=self.mask,
            failure_policy=self.policy_in_force,
            enabled=self.enabled,
            outbound=self.outbound,
            workers=self.workers,
        )

    def listing(self) -> Listing:
        """What the kernel shows when it is as desired."""
        return DIALECTS[self.mechanism].listing(self.wanted())

    def routes(self) -> frozenset[str]:
        return frozenset(cidr for cidr in self.vip_cidrs if ipaddress.ip_network(cidr).version in self.families)


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel has of one node in one namespace; tables in order of generation.

    `addresses` of the namespace but for loopback, sorted. `translated`: there are established connections that need
    the hooks of netfilter.
    """

    node: str
    lo_up: bool
    routes: frozenset[str]
    tables: tuple[Table, ...]
    addresses: tuple[str, ...] = ()
    translated: bool = False

    @property
    def generation(self) -> int:
        """The newest one; 0: not steered."""
        return max((table.generation for table in self.tables), default=0)


@dataclass(frozen=True, slots=True)
class LinkUp:
    name: str


@dataclass(frozen=True, slots=True)
class LinkDown:
    name: str


@dataclass(frozen=True, slots=True)
class AddRoute:
    cidr: str


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    cidr: str


@dataclass(frozen=True, slots=True)
class CreateTable:
    name: str
    wanted: Wanted
    mechanism: Mechanism = "nftables"


@dataclass(frozen=True, slots=True)
class DeleteTable:
    """Undo of CreateTable. An owned one is deleted by closing its owner."""

    name: str
    wanted: Wanted
    mechanism: Mechanism = "nftables"


Step = LinkUp | LinkDown | AddRoute | DeleteRoute | CreateTable | DeleteTable


def undo(step: Step) -> Step:
    match step:
        case LinkUp(name):
            return LinkDown(name)
        case LinkDown(name):
            return LinkUp(name)
        case AddRoute(cidr):
            return DeleteRoute(cidr)
        case DeleteRoute(cidr):
            return AddRoute(cidr)
        case CreateTable(name, wanted, mechanism):
            return DeleteTable(name, wanted, mechanism)
        case DeleteTable(name, wanted, mechanism):
            return CreateTable(name, wanted, mechanism)
    assert_never(step)


class Dropped(NamedTuple):
    mechanism: Mechanism
    name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`steps` in order, then `drop`. `generation` is the one that steers afterwards.

    `kept`: older tables that only keep established connections going. `settles`: nothing was amiss, what is to be done
    follows from addresses that came or went, or from connections that ended.
    """

    steps: tuple[Step, ...]
    drop: tuple[Dropped, ...]
    generation: int
    lingering: tuple[str, ...]
    kept: tuple[str, ...] = ()
    settles: bool = False

    @property
    def empty(self) -> bool:
        return not self.steps and not self.drop


def plan(desired: Steering, observed: Observed) -> Plan:
    """What to do so that the namespace is as desired. RedirectError if the two are about different nodes."""
    if desired.node != observed.node:
        raise RedirectError(f"steering of node {desired.node} planned on what node {observed.node} has")
    dialect = DIALECTS[desired.mechanism]
    wanted = desired.wanted()
    if dialect.NEEDS_ADDRESSES:
        wanted = replace(wanted, own_addresses=observed.addresses)
    listing = dialect.listing(wanted)
    steps: list[Step] = [] if observed.lo_up else [LinkUp("lo")]
    steps += [AddRoute(cidr) for cidr in sorted(desired.routes() - observed.routes)]
    steps += [DeleteRoute(cidr) for cidr in sorted(observed.routes - desired.routes())]
    amiss = bool(steps)

    newest = max(observed.tables, key=lambda table: table.generation, default=None)
    generation = observed.generation
    keepers = _keepers(desired, observed)
    kept = [table.name for table in keepers] if observed.translated else []
    if newest is None or not _is_as_desired(newest, desired, listing):
        if not dialect.TRANSLATES and observed.translated and not keepers and newest is not None:
            generation += 1
            keeper = _keeper(desired, newest.mechanism, generation)
            steps.append(keeper)
            kept.append(keeper.name)
        amiss = amiss or newest is None or not (dialect.NEEDS_ADDRESSES and newest.listing[:-1] == listing[:-1])
        newest = None
        generation += 1
        name = dialect.table_name(desired.node, generation)
        steps.append(CreateTable(name, wanted, desired.mechanism))
    older = [table for table in observed.tables if table is not newest]
    drop = [table for table in older if table.owner is None and table.name not in kept]
    in_place = [] if dialect.TRANSLATES else [table for table in drop if table.mechanism == desired.mechanism]
    return Plan(
        steps=tuple(steps),
        drop=tuple(Dropped(table.mechanism, table.name) for table in drop),
        generation=generation,
        lingering=tuple(table.name for table in older if table.owner is not None),
        kept=tuple(kept),
        settles=bool(steps or drop) and not amiss and all(table in keepers or table in in_place for table in drop),
    )


def _is_as_desired(table: Table, desired: Steering, listing: Listing) -> bool:
    return (
        table.mechanism == desired.mechanism and (table.owner is not None) is desired.owned and table.listing == listing
    )


def _inert(desired: Steering, mechanism: Mechanism) -> Steering:
    """Steers nothing, is owned by nobody, and keeps the kernel translating."""
    return replace(desired, mechanism=mechanism, failure_policy="closed", enabled=False)


def _keeper(desired: Steering, mechanism: Mechanism, generation: int) -> CreateTable:
    name = DIALECTS[mechanism].table_name(desired.node, generation)
    return CreateTable(name, _inert(desired, mechanism).wanted(), mechanism)


def _keepers(desired: Steering, observed: Observed) -> list[Table]:
    """Tables that are there for connections of before alone."""
    if DIALECTS[desired.mechanism].TRANSLATES:
        return []
    return [
        table
        for table in observed.tables
        if table.owner is None
        and DIALECTS[table.mechanism].TRANSLATES
        and table.listing == _inert(desired, table.mechanism).listing()
    ]
