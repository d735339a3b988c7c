"""Which service ports need no proxy, so that their connections may be balanced where they are made. PURE."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..addr import ServiceKey
from .shard import ServicePort, ServiceShard


@dataclass(frozen=True, slots=True)
class BalancedPort:
    """`endpoints` are the ready ones, of the IP family of `address`. `affinity`: a client keeps its endpoint as long as
    the endpoints stay the same."""

    service: ServiceKey
    address: str
    port: int
    endpoints: tuple[tuple[str, int], ...]
    affinity: bool = False


def why_proxied(port: ServicePort) -> str:
    """What of it only a proxy can do; "": nothing."""
    if port.protocol != "tcp":
        return "it is not declared to be opaque TCP"
    if port.tcp_rule is not None:
        return f"{port.tcp_rule.name} says where its connections go"
    meshed = next((endpoint for endpoint in port.endpoints if endpoint.meshed), None)
    return f"{meshed.host} of {meshed.workload} takes mesh TLS" if meshed is not None else ""


def balanced_ports(services: Iterable[ServiceShard], affine: Collection[ServiceKey] = ()) -> tuple[BalancedPort, ...]:
    """Of all virtual addresses. An address whose family none of its endpoints has is the proxy's, which may reach the
    others. `affine`: services with affinity."""
    found = []
    for service in services:
        key = ServiceKey(f"{service.namespace}/{service.name}")
        for port in service.ports:
            if why_proxied(port):
                continue
            for address in service.vips:
                own = [endpoint for endpoint in port.endpoints if (":" in endpoint.host) == (":" in address)]
                if own or not port.endpoints:
                    ready = tuple((endpoint.host, endpoint.port) for endpoint in own if endpoint.ready)
                    found.append(BalancedPort(key, address, port.port, ready, key in affine))
    return tuple(found)
