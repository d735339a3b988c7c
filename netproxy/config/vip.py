"""Virtual addresses: a stable place in a network, found by hashing the name of who gets it.

That is a Service (``ns/name``), or a host of an ExternalService (its name, which has no "/").

Without collisions a name always has the same address, on every node and after every restart. Assignments
that exist are kept as long as they are usable, so that a new Service never moves an old one. PURE.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence


def assign_vips(
    services: Iterable[str],
    existing: Mapping[str, Sequence[str]],
    networks: Sequence[str],
    reserved: Collection[str] = (),
) -> dict[str, tuple[str, ...]]:
    """One address per Service and network, none of them in `reserved`.

    Services that are gone are forgotten. When a network is full, the Services it has no room for have one
    address less.
    """
    keys = sorted(set(services))
    found: dict[str, tuple[str, ...]] = {key: () for key in keys}
    for text in networks:
        network = ipaddress.ip_network(text)
        for key, vip in _assign_one(keys, existing, network, reserved).items():
            found[key] += (vip,)
    return found


def _assign_one(
    keys: Sequence[str],
    existing: Mapping[str, Sequence[str]],
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
    reserved: Collection[str],
) -> dict[str, str]:
    first = int(network.network_address) + 1  # the network's own address, or the subnet-router anycast (RFC 4291 2.6.1)
    usable = network.num_addresses - 2  # without the broadcast address
    kind = type(network.network_address)
    taken = {int(ip) for ip in map(ipaddress.ip_address, reserved) if ip in network}
    kept: dict[str, str] = {}
    for key in keys:
        for text in existing.get(key, ()):
            try:
                ip = ipaddress.ip_address(text)
            except ValueError:
                continue
            if ip in network and first <= int(ip) < first + usable and int(ip) not in taken:
                taken.add(int(ip))
                kept[key] = str(ip)
                break
    for key in keys:
        if key in kept:
            continue
        if len(taken) >= usable:
            break
        offset = int.from_bytes(hashlib.sha256(key.encode()).digest()) % usable
        while first + offset in taken:
            offset = (offset + 1) % usable
        taken.add(first + offset)
        kept[key] = str(kind(first + offset))
    return kept
