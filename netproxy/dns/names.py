"""Which names the mesh has, and what they mean to the workload that asks. PURE.

Fed with the same shards as `decide.route.Tables`. A service has four names, of which the first means the service in the
asker's own namespace; the domain is `MeshShard.cluster_domain`::

    <svc>    <svc>.<ns>    <svc>.<ns>.svc    <svc>.<ns>.svc.<domain>

and a host of an ExternalService the one that it is declared with, in every namespace (unless it is a wildcard or has
no address: then its name is not ours to answer). A service wins over a host of the same name. ``_<port name>._tcp.``
before any of them asks for the port (SRV, RFC 2782); a VIP has its canonical name (PTR).

Whoever asks for a name that is not here has to be sent on: there is no name that does not exist, except below ours.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from ..addr import WorkloadKey
from ..config.shard import ExternalShard, MeshShard, ServiceShard, Shard, WorkloadShard

MAX_ADDRESSES = 64
"""Of a headless service in one answer. Which ones changes from answer to answer."""

RecordType = Literal["A", "AAAA", "SRV", "PTR", "ANY", "OTHER"]


class Service(NamedTuple):
    """A record of type SRV. Priority and weight are 0: there is one target, or they are equal."""

    port: int
    target: str


class Answer(NamedTuple):
    """For a name that is ours. Empty `addresses`, `services` and `pointers`: it has no record of that type.

    `name` is the canonical one, without the dot at its end. `exists` is false for a name below one of ours that means
    nothing (NXDOMAIN). `additional` are the addresses of a service record's target.
    """

    name: str
    exists: bool = True
    addresses: tuple[str, ...] = ()
    services: tuple[Service, ...] = ()
    pointers: tuple[str, ...] = ()
    additional: tuple[str, ...] = ()


class _Entry:
    """A name with what it means: a service's or an external host's."""

    __slots__ = ("addresses", "canonical", "ports", "rotates", "turn")

    def __init__(
        self, canonical: str, addresses: Iterable[str], ports: Mapping[str, Sequence[int]], *, rotates: bool
    ) -> None:
        self.canonical = canonical
        found = list(dict.fromkeys(addresses))
        self.addresses = {
            4: tuple(address for address in found if ":" not in address),
            6: tuple(address for address in found if ":" in address),
        }
        self.ports = ports
        self.rotates = rotates
        self.turn = 0

    def of_family(self, family: int) -> tuple[str, ...]:
        found = self.addresses[family]
        if not self.rotates or len(found) < 2:
            return found
        self.turn += 1
        first = self.turn % len(found)
        return (found[first:] + found[:first])[:MAX_ADDRESSES]


class Names:
    """Everything a worker answers with."""

    def __init__(self) -> None:
        self._domain = tuple(MeshShard().cluster_domain.split("."))
        self._services: dict[tuple[str, str], ServiceShard] = {}
        self._externals: dict[str, ExternalShard] = {}
        self._entries: dict[tuple[str, str], _Entry] = {}
        """By (service, namespace)."""
        self._hosts: dict[str, tuple[str, _Entry]] = {}
        """By name; the shard's key with it."""
        self._pointers: dict[str, tuple[str, str]] = {}
        """By address: the shard's key, and the name."""
        self._workloads: dict[WorkloadKey, WorkloadShard] = {}
        self.outbound_policy = MeshShard().outbound_policy

    @property
    def domain(self) -> str:
        return ".".join(self._domain)

    # -- changes ------------------------------------------------------------------------------------

    def put(self, shard: Shard) -> None:
        match shard:
            case ServiceShard():
                self.drop(shard.key())
                self._put_service(shard)
            case ExternalShard():
                self.drop(shard.key())
                self._put_external(shard)
            case WorkloadShard():
                if shard.local:
                    self._workloads[WorkloadKey(f"{shard.namespace}/{shard.name}")] = shard
                else:
                    self.drop(shard.key())
            case MeshShard():
                self.outbound_policy = shard.outbound_policy
                domain = tuple(shard.cluster_domain.lower().strip(".").split("."))
                if domain != self._domain:
                    self._domain = domain
                    for service in list(self._services.values()):
                        self.put(service)

    def drop(self, key: str) -> None:
        kind, _, name = key.partition("/")
        namespace, _, name = name.partition("/")
        if kind == "workload":
            self._workloads.pop(WorkloadKey(f"{namespace}/{name}"), None)
        elif kind == "service":
            if (old := self._services.pop((name, namespace), None)) is not None:
                del self._entries[name, namespace]
                self._drop_pointers(key, old.vips)
        elif kind == "external":
            external = self._externals.pop(key, None)
            for host in external.hosts if external is not None else ():
                # It may be another's already: the shards of one change come in any order.
                if self._hosts.get(host.name, ("",))[0] == key:
                    del self._hosts[host.name]
                self._drop_pointers(key, host.vips)

    def _drop_pointers(self, key: str, vips: Iterable[str]) -> None:
        for vip in vips:
            if self._pointers.get(vip, ("",))[0] == key:
                del self._pointers[vip]

    def _put_service(self, shard: ServiceShard) -> None:
        canonical = ".".join((shard.name, shard.namespace, "svc", *self._domain))
        addresses: Iterable[str] = shard.vips
        ports: dict[str, tuple[int, ...]] = {port.name.lower(): (port.port,) for port in shard.ports if port.name}
        if shard.headless:
            ready = [endpoint for port in shard.ports for endpoint in port.endpoints if endpoint.ready]
            addresses = (endpoint.host for endpoint in ready)
            # Nothing stands between: who connects has to know where the endpoints listen.
            ports = {
                port.name.lower(): tuple(sorted({endpoint.port for endpoint in port.endpoints if endpoint.ready}))
                for port in shard.ports
                if port.name
            }
        self._services[shard.name, shard.namespace] = shard
        self._entries[shard.name, shard.namespace] = _Entry(canonical, addresses, ports, rotates=shard.headless)
        for vip in shard.vips:
            self._pointers[vip] = (shard.key(), canonical)

    def _put_external(self, shard: ExternalShard) -> None:
        key = shard.key()
        self._externals[key] = shard
        ports = {port.name.lower(): (port.port,) for port in shard.ports if port.name}
        for host in shard.hosts:
            if host.vips:
                self._hosts[host.name] = (key, _Entry(host.name, host.vips, ports, rotates=False))
                for vip in host.vips:
                    self._pointers[vip] = (key, host.name)

    # -- questions ----------------------------------------------------------------------------------

    def workload(self, key: WorkloadKey) -> WorkloadShard | None:
        """A local one."""
        return self._workloads.get(key)

    def lookup(self, labels: list[str], kind: RecordType, namespace: str, families: frozenset[int]) -> Answer | None:
        """What `labels` (in lower case, without the root's) mean to a workload of `namespace` which dials `families`.

        None: no name of the mesh.
        """
        if labels[-1:] == ["arpa"]:
            return self._pointer(labels, kind)
        port = ""
        if len(labels) > 2 and labels[0].startswith("_") and labels[1] == "_tcp":
            port, labels = labels[0][1:], labels[2:]
        entry = self._find(labels, namespace)
        if entry is None:
            return None
        if port:
            return self._service(entry, port, kind, families)
        wanted = {"A": (4,), "AAAA": (6,), "ANY": (4, 6)}.get(kind, ())
        found: tuple[str, ...] = ()
        for family in wanted:
            # ANY gets one set of records, not all (RFC 8482 section 4.1).
            found = found or (entry.of_family(family) if family in families else ())
        return Answer(entry.canonical, addresses=found)

    def _find(self, labels: list[str], namespace: str) -> _Entry | None:
        found: _Entry | None = None
        if len(labels) == 1:
            found = self._entries.get((labels[0], namespace))
        elif len(labels) == 2 or (len(labels) > 2 and labels[2] == "svc" and tuple(labels[3:]) in ((), self._domain)):
            found = self._entries.get((labels[0], labels[1]))
        if found is None and labels:
            found = self._hosts.get(".".join(labels), ("", None))[1]
        return found

    @staticmethod
    def _service(entry: _Entry, port: str, kind: RecordType, families: frozenset[int]) -> Answer:
        numbers = entry.ports.get(port)
        if numbers is None:
            return Answer(entry.canonical, exists=False)
        if kind not in ("SRV", "ANY"):
            return Answer(entry.canonical)
        additional = tuple(address for family in sorted(families) for address in entry.of_family(family))
        services = tuple(Service(number, entry.canonical) for number in numbers)
        return Answer(entry.canonical, services=services, additional=additional if services else ())

    def _pointer(self, labels: list[str], kind: RecordType) -> Answer | None:
        found = self._pointers.get(_reversed_address(labels))
        if found is None:
            return None
        return Answer(found[1], pointers=(found[1],) if kind in ("PTR", "ANY") else ())


def _reversed_address(labels: list[str]) -> str:
    """Of a name below in-addr.arpa or ip6.arpa (RFC 1035 section 3.5, RFC 3596 section 2.5); "" of any other."""
    numbers = list(reversed(labels[:-2]))
    try:
        if labels[-2:] == ["in-addr", "arpa"] and len(numbers) == 4:
            return str(ipaddress.IPv4Address(".".join(numbers)))
        if labels[-2:] == ["ip6", "arpa"] and len(numbers) == 32 and all(map(_is_nibble, numbers)):
            return str(ipaddress.IPv6Address(int("".join(numbers), 16)))
    except ValueError:
        pass
    return ""


def _is_nibble(label: str) -> bool:
    return len(label) == 1 and label in "0123456789abcdef"
