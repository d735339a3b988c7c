"""What is wanted of the hooks, as data, and which entries of maps that makes."""

from __future__ import annotations

import ctypes
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from redirect.bpf import layout
from redirect.bpf.layout import Flag, Network, NetworkKey, Value, ValueKey
from redirect.errors import RedirectError
from redirect.wanted import FailurePolicy, Family, Ports, Scope, check_cidr

_IPV4 = (96, bytes(10) + b"\xff\xff" + bytes(4))
"""The network of all addresses of IPv4 in mapped form: length and octets."""
LOOPBACK: dict[Family, str] = {4: "127.0.0.1", 6: "::1"}


class Key(NamedTuple):
    """A workload: a network namespace by its cookie, or a service of the host by its cgroup's id.

    Neither number is used twice while the machine runs.
    """

    kind: Literal["pod", "cgroup"]
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass(frozen=True, slots=True)
class Workload:
    """The desired steering of one workload. RedirectError when it makes no sense.

    `ports` are where the proxy listens, on loopback in the workload's network namespace. `outbound` and `inbound` False
    steer nothing in that direction, and leave what is established alone. `policy`: what becomes of connections while no
    listener is there: they go direct, or are refused. `workers`: how many inbound listeners there may be per family.
    `own_addresses`: of the namespace, apart from loopback; connections to them pass. `balance`: whether services that
    are balanced when they are connected to are so for this workload.
    """

    families: frozenset[Family]
    ports: Ports = field(default_factory=Ports)
    scope: Scope = field(default_factory=Scope)
    vip_cidrs: tuple[str, ...] = ("240.240.0.0/16", "fd00:240::/32")
    own_addresses: tuple[str, ...] = ()
    policy: FailurePolicy = "open"
    outbound: bool = True
    inbound: bool = True
    workers: int = 1
    balance: bool = True

    def __post_init__(self) -> None:
        if not self.families or not self.families <= {4, 6}:
            raise RedirectError(f"families {sorted(self.families)}: one or both of 4 and 6 are needed")
        if self.policy not in ("open", "closed"):
            raise RedirectError(f"failure policy {self.policy!r} is neither open nor closed")
        if not 1 <= self.workers <= layout.MAX_WORKERS:
            raise RedirectError(f"{self.workers} workers are not in 1..{layout.MAX_WORKERS}")
        for cidr in self.vip_cidrs:
            check_cidr(cidr, "VIP network")
        for address in self.own_addresses:
            try:
                ipaddress.ip_address(address)
            except ValueError as exc:
                raise RedirectError(f"own address: {exc}") from exc

    def flags(self) -> Flag:
        scope = self.scope
        wanted = {
            Flag.OUTBOUND: self.outbound,
            Flag.INBOUND: self.inbound,
            Flag.CLOSED: self.policy == "closed",
            Flag.IPV4: 4 in self.families,
            Flag.IPV6: 6 in self.families,
            Flag.BALANCE: self.balance,
            Flag.OUT_INCLUDE_NETWORKS: bool(scope.out_include_cidrs),
            Flag.OUT_INCLUDE_PORTS: bool(scope.out_include_ports),
            Flag.OUT_EXCLUDE_PORTS: bool(scope.out_exclude_ports),
            Flag.OUT_EXCLUDE_UIDS: bool(scope.out_exclude_uids),
            Flag.IN_INCLUDE_PORTS: bool(scope.in_include_ports),
            Flag.IN_EXCLUDE_PORTS: bool(scope.in_exclude_ports),
        }
        found = Flag(0)
        for flag, is_set in wanted.items():
            if is_set:
                found |= flag
        return found

    def networks(self) -> dict[tuple[int, bytes], int]:
        """By prefix length and address (of 128 bits): `Network`, with that of every wider prefix, since a trie answers
        with the longest only."""
        own: dict[tuple[int, bytes], int] = {}
        lists: Iterable[tuple[Network, tuple[str, ...]]] = (
            (Network.OWN, self.own_addresses),
            (Network.VIP, self.vip_cidrs),
            (Network.OUT_INCLUDE, self.scope.out_include_cidrs),
            (Network.OUT_EXCLUDE, self.scope.out_exclude_cidrs),
            (Network.IN_EXCLUDE, self.scope.in_exclude_cidrs),
        )
        for bit, texts in lists:
            for text in texts:
                network = _as_ipv6(text)
                key = (network.prefixlen, network.network_address.packed)
                own[key] = own.get(key, 0) | bit
        # ::/0 and such cover the mapped form, and don't mean IPv4.
        own.setdefault(_IPV4, 0)
        found: dict[tuple[int, bytes], int] = {}
        for (length, octets), bits in sorted(own.items()):
            number = int.from_bytes(octets)
            is_ipv4 = length >= _IPV4[0] and octets[:12] == _IPV4[1][:12]
            for shorter in range(_IPV4[0] if is_ipv4 else 0, length):
                prefix = number >> (128 - shorter) << (128 - shorter)
                bits |= own.get((shorter, prefix.to_bytes(16)), 0)
            found[length, octets] = bits
        return found

    def values(self) -> set[tuple[Value, int]]:
        scope = self.scope
        lists: Iterable[tuple[Value, tuple[int, ...]]] = (
            (Value.OUT_INCLUDE_PORT, scope.out_include_ports),
            (Value.OUT_EXCLUDE_PORT, scope.out_exclude_ports),
            (Value.OUT_EXCLUDE_UID, scope.out_exclude_uids),
            (Value.IN_INCLUDE_PORT, scope.in_include_ports),
            (Value.IN_EXCLUDE_PORT, scope.in_exclude_ports),
        )
        return {(kind, value) for kind, values in lists for value in values}

    def row(self, netns: int, number: int, scope: int) -> layout.Workload:
        """The entry of `pods` or `cgroups`."""
        return layout.Workload(
            netns=netns,
            id=number,
            scope=scope,
            flags=int(self.flags()),
            listen4=layout.address(LOOPBACK[4])[3],
            listen6=layout.address(LOOPBACK[6]),
            outbound_port=self.ports.outbound,
            dns_port=self.ports.dns or 0,
            workers=self.workers,
        )


def network_rows(networks: dict[tuple[int, bytes], int], scope: int) -> list[tuple[bytes, bytes]]:
    """Entries of the map `networks`; the length counts the scope, too."""
    return [
        (bytes(NetworkKey(32 + length, scope, layout.Address.from_buffer_copy(octets))), bytes(ctypes.c_uint32(bits)))
        for (length, octets), bits in sorted(networks.items())
    ]


def value_rows(values: set[tuple[Value, int]], scope: int) -> list[tuple[bytes, bytes]]:
    """Entries of the map `values`."""
    return [(bytes(ValueKey(scope, kind, value)), b"\x01") for kind, value in sorted(values)]


def _as_ipv6(text: str) -> ipaddress.IPv6Network:
    """A network or an address; of IPv4 in mapped form."""
    network = ipaddress.ip_network(text)
    if isinstance(network, ipaddress.IPv6Network):
        return network
    return ipaddress.IPv6Network((b"\0" * 10 + b"\xff\xff" + network.network_address.packed, 96 + network.prefixlen))
