"""What shall be steered, and what a mechanism says it has: terms that all mechanisms share. PURE."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

from redirect.errors import RedirectError

Family = Literal[4, 6]
FailurePolicy = Literal["open", "closed"]
Mechanism = Literal["nftables", "iptables-nft", "iptables-legacy", "ebpf"]
"""What steers. Two are the variants of iptables, whose rules don't see each other."""

MECHANISMS: tuple[Mechanism, ...] = ("nftables", "iptables-nft", "iptables-legacy", "ebpf")
"""Whose leavings are looked for. Which of them are chosen, and in what order, `probe` says."""
DNS = 53
MAX_LIST = 256
"""Entries of each list of a `Scope`; iptables needs a rule for each network and each 15 ports."""


Listing = tuple[str, ...]
"""The canonical form, of each mechanism its own, in which what we want and what the kernel has are compared."""


@dataclass(frozen=True, slots=True)
class Table:
    """What a mechanism has in one namespace for one generation: a table of nftables, or chains of that name in those of
    iptables. `owner` is the port id of the owning netlink socket, None for what anybody may remove."""

    name: str
    generation: int
    owner: int | None
    listing: Listing
    mechanism: Mechanism = "nftables"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the proxy listens, on loopback in the workload's namespace.

    `dns`: for queries, UDP and TCP; None leaves names to whomever the app asks.
    """

    outbound: int = 15001
    inbound: int = 15006
    dns: int | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """What is steered; () of an `include` means all, and an exclusion wins. Ports and uids are sorted and distinct.

    `in_exclude_cidrs` are networks of clients, the other networks those of servers. RedirectError otherwise.
    """

    out_include_cidrs: tuple[str, ...] = ()
    out_exclude_cidrs: tuple[str, ...] = ()
    out_include_ports: tuple[int, ...] = ()
    out_exclude_ports: tuple[int, ...] = ()
    out_exclude_uids: tuple[int, ...] = ()
    in_include_ports: tuple[int, ...] = ()
    in_exclude_ports: tuple[int, ...] = ()
    in_exclude_cidrs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("out_include_ports", "out_exclude_ports", "in_include_ports", "in_exclude_ports"):
            ports: tuple[int, ...] = getattr(self, name)
            for port in ports:
                if not 0 < port < 1 << 16:
                    raise RedirectError(f"{name}: port {port} is not in 1..65535")
            _check_sorted(name, ports)
        for uid in self.out_exclude_uids:
            if not 0 <= uid < (1 << 32) - 1:
                raise RedirectError(f"out_exclude_uids: {uid} is not a user")
        _check_sorted("out_exclude_uids", self.out_exclude_uids)
        for name in ("out_include_cidrs", "out_exclude_cidrs", "in_exclude_cidrs"):
            cidrs: tuple[str, ...] = getattr(self, name)
            if len(cidrs) > MAX_LIST:
                raise RedirectError(f"{name} has {len(cidrs)} entries, {MAX_LIST} are possible")
            for cidr in cidrs:
                check_cidr(cidr, name)

    @property
    def narrows_outbound(self) -> bool:
        return bool(
            self.out_include_cidrs
            or self.out_exclude_cidrs
            or self.out_include_ports
            or self.out_exclude_ports
            or self.out_exclude_uids
        )


def check_cidr(cidr: str, what: str) -> None:
    """RedirectError unless it is a network as the kernel writes it."""
    try:
        network = ipaddress.ip_network(cidr)
    except ValueError as exc:
        raise RedirectError(f"{what}: {exc}") from exc
    if str(network) != cidr:
        raise RedirectError(f"{what}: {cidr} is to be written {network}")


def _check_sorted(name: str, values: tuple[int, ...]) -> None:
    if len(values) > MAX_LIST:
        raise RedirectError(f"{name} has {len(values)} entries, {MAX_LIST} are possible")
    if list(values) != sorted(set(values)):
        raise RedirectError(f"{name} {values} are not sorted and distinct")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall be steered in one workload's namespace, from which each mechanism makes what it puts there.

    `vips` are networks that are taken whatever the scope. `failure_policy` is the one in force: with ``closed``, what
    no listener takes is refused. Not enabled: nothing is steered, but established connections go on.
    """

    ports: Ports
    families: frozenset[Family]
    scope: Scope
    vips: tuple[str, ...]
    mark: int
    mask: int
    failure_policy: FailurePolicy
    enabled: bool
    outbound: bool = True
    """False: what the workload opens is not steered any more, what comes to it is."""
    workers: int = 1
    """Inbound listeners in each family."""
    own_addresses: tuple[str, ...] = ()
    """Of the namespace, where the mechanism has to be told (`plan.Dialect.NEEDS_ADDRESSES`)."""
