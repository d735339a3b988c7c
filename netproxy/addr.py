"""Typed addresses. They are not interchangeable, and none is a bare string.

IPv6 addresses are kept in their compressed form without brackets or zone.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple, NewType

SpiffeId = NewType("SpiffeId", str)
"""``spiffe://<trust domain>/ns/<namespace>/sa/<service account>``"""

WorkloadKey = NewType("WorkloadKey", str)
"""``<namespace>/<name>`` of a Workload."""

ServiceKey = NewType("ServiceKey", str)
"""``<namespace>/<name>`` of a Service."""


class ClientAddr(NamedTuple):
    """Who connected, as the accepting socket sees it."""

    host: str
    port: int

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


class OriginalDst(NamedTuple):
    """Where the client meant to go before it was steered."""

    host: str
    port: int

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


class EndpointAddr(NamedTuple):
    """An address that a backend listens on."""

    host: str
    port: int

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


def join_host_port(host: str, port: int) -> str:
    """``10.0.0.1:80`` or ``[fd00::1]:80`` (RFC 3986 section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def canonical_ip(text: str) -> str:
    """The one spelling used as a table key. v4-mapped IPv6 becomes IPv4.

    Raises ValueError when `text` is no address.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address)


def is_loopback(host: str) -> bool:
    """Of a canonical address."""
    return host.startswith("127.") or host == "::1"


def spiffe_id(trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
    return SpiffeId(f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
