"""What workloads may call outside of the mesh: ExternalServices by VIP, network or name. PURE.

A permission says which ExternalService allows a connection and what will be dialled for it: the address that the
client dialled only where that address itself is allowed (a network); otherwise what a name stands for, whatever
address the client gave with it. So a forged SNI or Host leads to where that name is, and nowhere else.

Where several ExternalServices fit: a VIP belongs to one host; the longest prefix before the shorter ones; an exact
name before wildcards, the longest wildcard first; then the first by namespace and name.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import insort
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

from ..addr import ServiceKey
from ..config.shard import ExternalPort, ExternalShard

How = Literal["vip", "network", "name", "unknown"]
_host_name = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
).fullmatch
_MAX_NAME = 253


def host_name(text: str) -> str | None:
    """A name as the tables have it: lower case, without a dot at its end. "" stays "", what is no name gives None.

    An internationalized name is as it travels (``xn--``). An address is no name.
    """
    name = text.lower().removesuffix(".")
    if not name:
        return None if text else ""
    # Of some letters that are no ASCII the lower case is.
    if not text.isascii() or len(name) > _MAX_NAME or not _host_name(name) or name.rpartition(".")[2].isdigit():
        return None
    return name


def host_of(authority: str) -> str | None:
    """Name in a Host field, whose port is ignored; as `host_name`."""
    host, colon, port = authority.rpartition(":")
    return host_name(host if colon and (port.isdecimal() or not port) else authority)


class External(NamedTuple):
    """One port of an ExternalService."""

    service: ServiceKey
    """``external/<namespace>/<name>``"""
    shard: ExternalShard
    spec: ExternalPort

    @property
    def title(self) -> str:
        return f"ExternalService {self.shard.namespace}/{self.shard.name}"

    def has(self, name: str) -> bool:
        """Is the name one of its hosts?"""
        return any(
            name.endswith(host.name[1:]) and len(name) >= len(host.name) if host.name[:1] == "*" else name == host.name
            for host in self.shard.hosts
        )

    def fits(self, name: str | None) -> bool:
        """Of an address in its networks: hosts, where there are any, have to be named."""
        return not self.shard.hosts or bool(name and self.has(name))


class Permission(NamedTuple):
    """`external` is None for a destination that nobody declared: the policy lets it through, opaque."""

    how: How
    external: External | None = None
    name: str = ""
    """The host that is dialled; "": the address that the client dialled."""
    claimed: str = ""
    """The name in SNI or Host, where it decided."""


UNKNOWN = Permission("unknown")

K = TypeVar("K")


class _Several(dict[K, list[ServiceKey]]):
    """ExternalServices by key, in the order in which they win."""

    def add(self, key: K, service: ServiceKey) -> None:
        insort(self.setdefault(key, []), service)

    def remove(self, key: K, service: ServiceKey) -> None:
        self[key].remove(service)
        if not self[key]:
            del self[key]


class Egress:
    """All ExternalServices."""

    def __init__(self) -> None:
        self.shards: dict[ServiceKey, ExternalShard] = {}
        self._ports: dict[tuple[ServiceKey, int], External] = {}
        self._vips: dict[str, tuple[ServiceKey, str]] = {}
        self._named: _Several[str] = _Several()
        self._known: dict[tuple[int, str], int] = {}
        """How many can be called by a name, by port and protocol."""
        self._networks: _Several[tuple[int, int, int]] = _Several()
        """By IP version, length of the prefix, prefix."""
        self._lengths: dict[tuple[int, int], int] = {}
        """How many networks there are, by IP version and length of the prefix."""
        self._order: list[tuple[int, int]] = []
        """The same, longest first."""

    # -- changes ------------------------------------------------------------------------------------

    def put(self, shard: ExternalShard) -> None:
        key = ServiceKey(shard.key())
        self._drop(key)
        self.shards[key] = shard
        for host in shard.hosts:
            for vip in host.vips:
                self._vips[vip] = (key, host.name)
        for spec in shard.ports:
            self._ports[key, spec.port] = External(key, shard, spec)
        for where in _networks(shard):
            self._networks.add(where, key)
            self._lengths[where[:2]] = self._lengths.get(where[:2], 0) + 1
        for name in _names(shard):
            self._named.add(name, key)
        for known in _known(shard):
            self._known[known] = self._known.get(known, 0) + 1
        self._sort()

    def drop(self, key: ServiceKey) -> None:
        self._drop(key)
        self._sort()

    def _sort(self) -> None:
        self._order = sorted(self._lengths, key=lambda key: (-key[1], key[0]))

    def _drop(self, key: ServiceKey) -> None:
        old = self.shards.pop(key, None)
        if old is None:
            return
        for host in old.hosts:
            for vip in host.vips:
                # It may be another one's already: the shards of one change come in any order.
                if self._vips.get(vip, ("", ""))[0] == key:
                    del self._vips[vip]
        for spec in old.ports:
            self._ports.pop((key, spec.port), None)
        for where in _networks(old):
            self._networks.remove(where, key)
            _less(self._lengths, where[:2])
        for name in _names(old):
            self._named.remove(name, key)
        for known in _known(old):
            _less(self._known, known)

    # -- questions ----------------------------------------------------------------------------------

    def is_vip(self, host: str) -> bool:
        return host in self._vips

    def at_vip(self, host: str, port: int) -> Permission | None:
        """By the VIP of a host: who dials it has asked for the name."""
        key, name = self._vips.get(host, (ServiceKey(""), ""))
        external = self._ports.get((key, port))
        return Permission("vip", external, name) if external is not None else None

    def at_address(self, host: str, port: int) -> Iterator[External]:
        """Those with a network that has this address; the address itself is dialled."""
        if not self._order:
            return
        address = ipaddress.ip_address(host)
        value, seen = int(address), set()
        for version, length in self._order:
            if version != address.version:
                continue
            for service in self._networks.get((version, length, value >> (address.max_prefixlen - length)), ()):
                external = self._ports.get((service, port))
                if external is not None and service not in seen:
                    seen.add(service)
                    yield external

    def knows(self, port: int, protocol: str) -> bool:
        """Can something be called by its name on this port?"""
        return (port, protocol) in self._known

    def asks(self, dst: tuple[str, int]) -> bool:
        """May the first octets of a connection to an address that is no VIP decide where it goes?"""
        port = dst[1]
        return self.knows(port, "tls") or self.knows(port, "http") or any(self.at_address(*dst))

    def expects_http(self, dst: tuple[str, int]) -> bool:
        """Is HTTP what this destination was declared for?"""
        by_vip = self.at_vip(*dst)
        found = by_vip.external if by_vip is not None else next(self.at_address(*dst), None)
        return found is not None and found.spec.protocol == "http"

    def by_name(self, name: str | None, port: int, protocol: str) -> Permission | None:
        """By a name that SNI or Host claims, at whatever address; what the name stands for is dialled."""
        if not name or not self.knows(port, protocol):
            return None
        candidate = name
        while candidate:
            for service in self._named.get(candidate, ()):
                external = self._ports.get((service, port))
                if external is not None and external.spec.protocol == protocol:
                    return Permission("name", external, name, name)
            _, dot, parent = candidate.removeprefix("*.").partition(".")
            candidate = f"*.{parent}" if dot else ""
        return None

    def tls(self, dst: tuple[str, int], name: str | None) -> Permission | None:
        """Of a TLS connection. `name`: of its SNI; "" without one, None for what is no name."""
        return self._claiming(dst, name, "tls")

    def http(self, dst: tuple[str, int], name: str | None) -> Permission | None:
        """Of one HTTP request. `name`: of its Host, as that of `tls`."""
        return self._claiming(dst, name, "http")

    def _claiming(self, dst: tuple[str, int], name: str | None, protocol: str) -> Permission | None:
        by_vip = self.at_vip(*dst)
        if by_vip is not None and by_vip.external is not None:
            # Who dials a VIP has asked for its name already, so none is as good as that.
            if by_vip.external.spec.protocol == protocol and name in ("", by_vip.name):
                return by_vip
        else:
            for external in self.at_address(*dst):
                if external.spec.protocol == protocol and external.fits(name):
                    return Permission("network", external, "", name or "")
        return self.by_name(name, dst[1], protocol)

    def opaque(self, dst: tuple[str, int]) -> Permission | None:
        """Of a connection whose octets nobody looks at."""
        by_vip = self.at_vip(*dst)
        if by_vip is not None and by_vip.external is not None:
            return by_vip if by_vip.external.spec.protocol == "tcp" else None
        return next((Permission("network", e) for e in self.at_address(*dst) if e.spec.protocol == "tcp"), None)

    def still(self, permission: Permission, dst: tuple[str, int]) -> bool:
        """Would it be given today? Not asked about what nobody declared."""
        external = permission.external
        assert external is not None
        now = self._ports.get((external.service, dst[1]))
        if now is None or now.spec.protocol != external.spec.protocol:
            return False
        if permission.how == "vip":
            at_vip = self.at_vip(*dst)
            return at_vip is not None and at_vip.external is now and at_vip.name == permission.name
        if permission.how == "network":
            opaque = now.spec.protocol == "tcp"
            return any(e is now and (opaque or e.fits(permission.claimed)) for e in self.at_address(*dst))
        return now.has(permission.name)


def _names(shard: ExternalShard) -> set[str]:
    return {host.name for host in shard.hosts}


def _known(shard: ExternalShard) -> set[tuple[int, str]]:
    """Ports where a name can be claimed, and how."""
    return {(spec.port, spec.protocol) for spec in shard.ports if shard.hosts and spec.protocol != "tcp"}


def _networks(shard: ExternalShard) -> set[tuple[int, int, int]]:
    found: set[tuple[int, int, int]] = set()
    for cidr in shard.networks:
        network = ipaddress.ip_network(cidr, strict=False)
        prefix = int(network.network_address) >> (network.max_prefixlen - network.prefixlen)
        found.add((network.version, network.prefixlen, prefix))
    return found


def _less(counts: dict[K, int], key: K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
