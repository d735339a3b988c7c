"""A small mesh for the tests of names."""

from __future__ import annotations

from netproxy.addr import SpiffeId, WorkloadKey
from netproxy.config.shard import (
    Endpoint,
    ExternalHost,
    ExternalPort,
    ExternalShard,
    ServicePort,
    ServiceShard,
    WorkloadShard,
)
from netproxy.dns.names import Names

CLIENT = WorkloadKey("shop/client")
DUAL = frozenset((4, 6))


def service(name: str, namespace: str, number: int, **more: object) -> ServiceShard:
    ports = (ServicePort(80, "http", "http", ()), ServicePort(9090, "", "tcp", ()))
    vips = (f"240.240.0.{number}", f"fd00:240::{number}")
    return ServiceShard(namespace, name, vips, ports, **more)  # type: ignore[arg-type]


def headless(*endpoints: Endpoint) -> ServiceShard:
    return ServiceShard("shop", "each", (), (ServicePort(80, "http", "http", endpoints),), headless=True)


def external(name: str = "db", *hosts: ExternalHost) -> ExternalShard:
    made = hosts or (
        ExternalHost("db.example.com", ("240.240.1.1", "fd00:240::101")),
        ExternalHost("*.example.org"),
        ExternalHost("full.example.com"),
    )
    return ExternalShard("shop", name, made, ports=(ExternalPort(5432, "postgres"),))


def workload(namespace: str = "shop", name: str = "client", nameservers: tuple[str, ...] = ()) -> WorkloadShard:
    return WorkloadShard(
        namespace, name, ("10.0.0.1",), SpiffeId("spiffe://x"), name, local=True, nameservers=nameservers
    )


def small_mesh() -> Names:
    names = Names()
    names.put(service("web", "shop", 1))
    names.put(service("web", "other", 2))
    names.put(service("v4", "shop", 4, **{}))
    names.put(headless(Endpoint("10.0.0.7", 8080), Endpoint("10.0.0.8", 8081), Endpoint("10.0.0.9", 1, ready=False)))
    names.put(external())
    names.put(workload())
    return names
