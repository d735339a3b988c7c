"""ExternalServices: which of them hold, and their shards. PURE.

Who comes first keeps what it claims: a host name belongs to one ExternalService, and so does a network with a port,
unless their hosts tell them apart. Within a network there may be smaller ones: the longest prefix wins. What is the
mesh's (names of Services, virtual addresses, addresses of Services and Workloads) is nobody else's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..addr import ServiceKey
from ..errors import ConfigError
from .kubernetes import Service
from .mesh import ExternalService
from .model import Object, Resource
from .shard import ExternalHost, ExternalPort, ExternalShard
from .status import Statuses, first

_PROTOCOLS: dict[str, Literal["tls", "http", "tcp"]] = {"TLS": "tls", "HTTP": "http", "TCP": "tcp"}


def is_within(inner: str, outers: Iterable[str]) -> str:
    """The first of the networks that has all of `inner`, a network or an address; "" if none has."""
    network = ipaddress.ip_network(inner)
    for text in outers:
        outer = ipaddress.ip_network(text)
        if network.version == outer.version and network.subnet_of(outer):  # type: ignore[arg-type]
            return text
    return ""


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
        networks=tuple(sorted(spec.addresses, key=_in_order)),
        ports=tuple(
            ExternalPort(p.port, p.name, _PROTOCOLS[p.protocol], p.target_port or 0)
            for p in sorted(spec.ports, key=lambda p: p.port)
        ),
        endpoints=spec.endpoints,
    )


def _in_order(cidr: str) -> tuple[int, int, int]:
    network = ipaddress.ip_network(cidr)
    return network.version, int(network.network_address), network.prefixlen


class _Claims:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.names: dict[str, Object[Resource]] = {}
        for key, obj in mesh.services.items():
            namespace, _, name = key.partition("/")
            self.names.setdefault(name, obj)
            self.names[f"{name}.{namespace}"] = obj
        self.hosts: dict[str, Object[ExternalService]] = {}
        self.networks: dict[tuple[str, int], list[tuple[Object[ExternalService], str]]] = {}
        """Owners of a network with a port, and the protocol of each."""

    def add(self, obj: Object[ExternalService]) -> None:
        spec = obj.resource.spec
        self.hosts.update(dict.fromkeys(spec.hosts, obj))
        for network in spec.addresses:
            for port in spec.ports:
                self.networks.setdefault((network, port.port), []).append((obj, port.protocol))

    def errors(self, obj: Object[ExternalService]) -> list[ConfigError]:
        spec = obj.resource.spec
        found = [(("hosts", i), self.host_problem(host)) for i, host in enumerate(spec.hosts)]
        found += [(("addresses", i), self.network_problem(obj, text)) for i, text in enumerate(spec.addresses)]
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

    def network_problem(self, obj: Object[ExternalService], text: str) -> str:
        network, spec = ipaddress.ip_network(text), obj.resource.spec
        # What contains a network of virtual addresses is fine: those come first, one by one.
        if vips := is_within(text, self.mesh.vip_networks):
            return f"is within the virtual addresses {vips} (MeshConfig vipCidrs)"
        if network.num_addresses == 1 and (owner := self.mesh.owners.get(str(network.network_address))):
            return f"is an address of {first(owner)}"
        for port in spec.ports:
            for other, protocol in self.networks.get((text, port.port), ()):
                by_name = protocol == port.protocol != "TCP" and spec.hosts and other.resource.spec.hosts
                if not by_name:
                    return f"{text} with port {port.port} belongs to {first(other)}"
        return ""

    def endpoint_problem(self, text: str) -> str:
        if is_within(text, self.mesh.vip_networks):
            return "is a virtual address (MeshConfig vipCidrs)"
        owner = self.mesh.owners.get(text)
        # A Workload may well be the way out of the mesh.
        return f"is an address of {first(owner)}" if owner and isinstance(owner.resource, Service) else ""
