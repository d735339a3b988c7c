"""ExternalServices: which of them hold, and their shards. PURE.

Who comes first keeps what it claims: a host name belongs to one ExternalService, and so does an address with a port.
What is the mesh's (names of Services, virtual addresses, addresses of Services and Workloads) is nobody else's.
"""

from __future__ import annotations

import bisect
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..addr import ServiceKey
from ..errors import ConfigError
from .mesh import ExternalService
from .model import Object, Resource
from .shard import ExternalHost, ExternalPort, ExternalShard
from .status import Statuses, first

_PROTOCOLS: dict[str, Literal["tls", "http", "tcp"]] = {"TLS": "tls", "HTTP": "http", "TCP": "tcp"}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Mesh:
    """What an ExternalService may not claim. `owners`: the addresses of Services and Workloads."""

    cluster_domain: str
    vip_networks: tuple[str, ...]
    services: Mapping[ServiceKey, Object[Resource]]
    owners: Mapping[str, Object[Resource]]


def accept_external(
    objects: Iterable[Object[ExternalService]], mesh: Mesh, say: Statuses
) -> list[Object[ExternalService]]:
    """Those that hold. The others are rejected."""
    claims = _Claims(mesh)
    accepted = []
    for obj in objects:
        errors = claims.errors(obj)
        if errors:
            say.reject(obj, *errors)
        else:
            claims.add(obj)
            accepted.append(obj)
            say.accept(obj)
    return accepted


def named_hosts(obj: Object[ExternalService]) -> list[str]:
    """The hosts that get virtual addresses: all but wildcards."""
    return [host for host in obj.resource.spec.hosts if not host.startswith("*.")]


def external_shard(obj: Object[ExternalService], vips: Mapping[str, tuple[str, ...]]) -> ExternalShard:
    spec, meta = obj.resource.spec, obj.resource.metadata
    return ExternalShard(
        namespace=meta.namespace,
        name=meta.name,
        hosts=tuple(ExternalHost(host, vips.get(host, ())) for host in spec.hosts),
        networks=merged(spec.addresses),
        ports=tuple(
            ExternalPort(p.port, p.name, _PROTOCOLS[p.protocol], p.target_port or 0)
            for p in sorted(spec.ports, key=lambda p: p.port)
        ),
        endpoints=spec.endpoints,
    )


def merged(cidrs: Iterable[str]) -> tuple[str, ...]:
    """IPv4 first, sorted; what overlaps or adjoins is one network, since sets of intervals refuse overlaps."""
    networks = [ipaddress.ip_network(text) for text in cidrs]
    v4 = (network for network in networks if isinstance(network, ipaddress.IPv4Network))
    v6 = (network for network in networks if isinstance(network, ipaddress.IPv6Network))
    return tuple(str(n) for n in (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6)))


@dataclass(slots=True)
class _Ranges:
    """Networks of one family that don't overlap, in order, each with its owner."""

    starts: list[int] = field(default_factory=list)
    networks: list[tuple[Network, Object[ExternalService]]] = field(default_factory=list)

    def overlap(self, network: Network) -> tuple[Network, Object[ExternalService]] | None:
        """Networks contain one another or have nothing in common: only the neighbours can overlap."""
        place = bisect.bisect_right(self.starts, int(network.network_address))
        for found, owner in self.networks[max(0, place - 1) : place + 1]:
            if found.overlaps(network):
                return found, owner
        return None

    def add(self, network: Network, owner: Object[ExternalService]) -> None:
        place = bisect.bisect_right(self.starts, int(network.network_address))
        self.starts.insert(place, int(network.network_address))
        self.networks.insert(place, (network, owner))


class _Claims:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.vip_networks = [ipaddress.ip_network(text) for text in mesh.vip_networks]
        self.names: dict[str, Object[Resource]] = {}
        for key, obj in mesh.services.items():
            namespace, _, name = key.partition("/")
            self.names.setdefault(name, obj)
            self.names[f"{name}.{namespace}"] = obj
        self.hosts: dict[str, Object[ExternalService]] = {}
        self.ranges: dict[tuple[int, int], _Ranges] = {}
        """By port and IP version."""

    def add(self, obj: Object[ExternalService]) -> None:
        spec = obj.resource.spec
        self.hosts.update(dict.fromkeys(spec.hosts, obj))
        for network in map(ipaddress.ip_network, merged(spec.addresses)):
            for port in spec.ports:
                self.ranges.setdefault((port.port, network.version), _Ranges()).add(network, obj)

    def errors(self, obj: Object[ExternalService]) -> list[ConfigError]:
        spec = obj.resource.spec
        found = [(("hosts", i), self.host_problem(host)) for i, host in enumerate(spec.hosts)]
        ports = [port.port for port in spec.ports]
        found += [(("addresses", i), self.network_problem(text, ports)) for i, text in enumerate(spec.addresses)]
        found += [(("endpoints", i), self.endpoint_problem(text)) for i, text in enumerate(spec.endpoints)]
        return [obj.error(text, "spec", *path) for path, text in found if text]

    def host_problem(self, host: str) -> str:
        if owner := self.hosts.get(host):
            return f"belongs to {first(owner)}"
        name, domain = host.removeprefix("*."), self.mesh.cluster_domain
        wildcard = name != host
        if name == domain or name.endswith(f".{domain}") or (wildcard and domain.endswith(f".{name}")):
            return f"is within the names of the mesh (MeshConfig clusterDomain {domain})"
        if name.endswith(".svc") or (wildcard and name == "svc"):
            return 'is within the names of the mesh: what ends with ".svc" is a Service'
        if not wildcard and (service := self.names.get(name)):
            return f"is a name of {first(service)}"
        return ""

    def network_problem(self, text: str, ports: Iterable[int]) -> str:
        network = ipaddress.ip_network(text)
        for vips in self.vip_networks:
            # What contains a network of virtual addresses is fine: those come first, one by one.
            if network.version == vips.version and network.subnet_of(vips):  # type: ignore[arg-type]
                return f"is within the virtual addresses {vips} (MeshConfig vipCidrs)"
        if network.num_addresses == 1 and (owner := self.mesh.owners.get(str(network.network_address))):
            return f"is an address of {first(owner)}"
        for port in ports:
            ranges = self.ranges.get((port, network.version))
            overlap = ranges.overlap(network) if ranges else None
            if overlap:
                return f"overlaps {overlap[0]} of {first(overlap[1])} on port {port}"
        return ""

    def endpoint_problem(self, text: str) -> str:
        address = ipaddress.ip_address(text)
        if any(address in network for network in self.vip_networks):
            return "is a virtual address (MeshConfig vipCidrs)"
        if owner := self.mesh.owners.get(text):
            return f"is an address of {first(owner)}"
        return ""
