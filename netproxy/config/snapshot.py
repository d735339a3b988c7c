"""Valid objects to one consistent snapshot of shards.

What can't be used is rejected or marked here, so that no consumer meets a dangling reference: a route's backend that
does not exist carries its reason in the shard, an endpoint names a workload only if that workload is in the snapshot.
Objects are taken in the order given: when two claim the same thing, the second is rejected and told who was first.
PURE.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, TypeVar, cast

from ..addr import ServiceKey, SpiffeId, WorkloadKey, spiffe_id
from ..errors import ConfigError
from .balanced import BalancedPort, balanced_ports
from .external import Mesh, accept_external, external_shard, is_within, named_hosts
from .fields import FailurePolicy, SteeringPreference
from .kubernetes import EndpointSlice, HTTPRoute, Service, TCPRoute
from .mesh import Attach, ExternalService, MeshConfig, MeshConfigSpec, PeerAuthentication, Workload, WorkloadTraffic
from .model import Object, Resource
from .routes import PortParts, ServiceParts, attach_routes
from .shard import (
    AccessLog,
    AppProtocol,
    Endpoint,
    HttpVersion,
    MeshShard,
    MtlsMode,
    ServicePort,
    ServiceShard,
    Shard,
    WorkloadShard,
)
from .status import Condition, ObjectStatus, Statuses, first
from .vip import assign_vips

ROOT_NAMESPACE = "netproxy-system"
"""A PeerAuthentication without selector in this namespace holds for the whole mesh."""

_TCP_NAMES = frozenset({"tcp", "tls", "https", "mongo", "mongodb", "redis", "mysql", "postgres", "postgresql"})
_HTTP_NAMES = frozenset({"http", "http/1.1", "kubernetes.io/ws", "grpc-web"})
_HTTP2_NAMES = frozenset({"grpc", "http2", "h2c", "kubernetes.io/h2c"})


@dataclass(frozen=True, slots=True)
class Context:
    """What a node knows besides the objects. `vips` are the assignments of the snapshot before.

    `local` overrides which workloads are of this node; None: those whose `node` is unset or this one.
    """

    node: str
    vips: Mapping[str, Sequence[str]] = field(default_factory=dict)
    local: frozenset[WorkloadKey] | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """What of a workload's traffic is steered; () for an `include` means all. An exclusion wins over an inclusion.

    VIPs are steered whatever these say. `in_exclude_cidrs` are networks of clients. Ports and uids are sorted.
    """

    out_include_cidrs: tuple[str, ...] = ()
    out_exclude_cidrs: tuple[str, ...] = ()
    out_include_ports: tuple[int, ...] = ()
    out_exclude_ports: tuple[int, ...] = ()
    out_exclude_uids: tuple[int, ...] = ()
    in_include_ports: tuple[int, ...] = ()
    in_exclude_ports: tuple[int, ...] = ()
    in_exclude_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalWorkload:
    """A workload of this node that is to be steered."""

    key: WorkloadKey
    namespace: str
    name: str
    identity: SpiffeId
    service_account: str
    addresses: tuple[str, ...]
    netns: str
    """"" for a service of the host, which is a `cgroup` (path below the mount of cgroup2) or a systemd `unit`. Of its
    `traffic` only the ports of `in_include_ports` come in, if any."""
    failure_policy: FailurePolicy
    traffic: Traffic = Traffic()
    steering: SteeringPreference = "auto"
    dns_capture: bool = True
    nameservers: tuple[str, ...] = ()
    """As declared in `Workload.dns`; () leaves it to the resolv.conf of the workload."""
    cgroup: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`shards` by key, without SVIDs; `statuses` by ``Kind ns/name``.

    `vips` is for the next `Context`, by the key of a Service or the name of an external host.
    """

    shards: Mapping[str, Shard]
    local_workloads: tuple[LocalWorkload, ...]
    vips: Mapping[str, tuple[str, ...]]
    vip_networks: tuple[str, ...]
    statuses: Mapping[str, ObjectStatus]
    rejected: tuple[ConfigError, ...]
    steering: SteeringPreference = "auto"
    balanced: tuple[BalancedPort, ...] = ()
    """Where connections are steered by eBPF, these don't come to the proxy."""
    kept: tuple[str, ...] = ()
    """Objects whose last good version is in force, since the present one can't be used."""

    @property
    def mesh(self) -> MeshShard:
        return cast("MeshShard", self.shards["mesh"])


class Declared(NamedTuple):
    """What a port says of itself. `protocol` None: nothing. `warning` is "" when there is nothing to warn of."""

    protocol: AppProtocol | None
    http_version: HttpVersion = ""
    warning: str = ""


def build_snapshot(
    objects: Iterable[Object[Resource]], context: Context, rejected: Iterable[ConfigError] = ()
) -> Snapshot:
    """`rejected` are the errors of reading and validation: they get a status, and lead `Snapshot.rejected`."""
    return _Build(tuple(objects), context, rejected).run()


def declared_protocol(app_protocol: str, port_name: str) -> Declared:
    """What `appProtocol`, else the part of the port's name before "-", says."""
    said = app_protocol.lower()
    if not said:
        name = port_name.lower()
        said = name if name == "grpc-web" or name.startswith("grpc-web-") else name.partition("-")[0]
        said = "grpc-web" if said.startswith("grpc-web") else said
    if said in _HTTP_NAMES:
        return Declared("http", "1.1")
    if said in _TCP_NAMES or said == "kubernetes.io/wss":
        return Declared("tcp")
    if said in _HTTP2_NAMES:
        return Declared("http", "2")
    if app_protocol:
        return Declared(None, warning=f'appProtocol "{app_protocol}" is not known: the port is sniffed')
    return Declared(None)


@dataclass(slots=True)
class _Work:
    """A workload while the snapshot is built."""

    obj: Object[Workload]
    key: WorkloadKey
    identity: SpiffeId
    local: bool
    ports_by_name: dict[str, int]
    protocols: dict[int, AppProtocol]
    inferred: dict[int, set[AppProtocol]] = field(default_factory=dict)
    own_mtls: MtlsMode | None = None
    mtls: MtlsMode = "PERMISSIVE"
    port_mtls: dict[int, MtlsMode] = field(default_factory=dict)
    policy: str = ""

    def meshed(self, port: int) -> bool:
        if self.host_ports is not None and port not in self.host_ports:
            return False
        return self.obj.resource.spec.attach is not None and self.port_mtls.get(port, self.mtls) != "DISABLE"

    @property
    def host_ports(self) -> tuple[int, ...] | None:
        """Of a service of the host those that come to its proxy: no other port of the host is ours to touch."""
        spec = self.obj.resource.spec
        if spec.attach is None or not spec.attach.is_host:
            return None
        into = spec.traffic.inbound
        own = {port.port for port in spec.ports if port.port in into.include_ports or not into.include_ports}
        return tuple(sorted(own - set(into.exclude_ports)))

    @property
    def known_protocols(self) -> dict[int, AppProtocol]:
        """By port: what the Workload says, else what the Services and routes of the port agree on."""
        agreed = {port: next(iter(found)) for port, found in self.inferred.items() if len(found) == 1}
        return agreed | self.protocols


R = TypeVar("R", bound=Resource)


class _Build:
    def __init__(self, objects: Sequence[Object[Resource]], context: Context, rejected: Iterable[ConfigError]) -> None:
        self.objects = objects
        self.context = context
        self.say = Statuses(rejected)
        self.config = MeshConfigSpec()
        self.mesh = MeshShard()
        self.works: dict[WorkloadKey, _Work] = {}
        self.by_address: dict[str, _Work] = {}
        self.by_label: dict[tuple[str, str, str], list[_Work]] = {}
        self.services: dict[ServiceKey, ServiceParts] = {}
        self.owners: dict[str, Object[Service]] = {}
        """By declared virtual address."""
        self.slices: dict[ServiceKey, list[EndpointSlice]] = {}
        self.external: list[Object[ExternalService]] = []
        self.vips: dict[str, tuple[str, ...]] = {}

    def run(self) -> Snapshot:
        self.take_mesh_config()
        self.take_workloads()
        self.apply_peer_authentication()
        self.take_services()
        self.take_external()
        self.assign_vips()
        self.take_slices()
        self.resolve_endpoints()
        attach_routes(self.of(HTTPRoute), self.of(TCPRoute), self.services, self.say)
        self.infer_from_routes()
        shards = self.shards()
        return Snapshot(
            shards=MappingProxyType(shards),
            local_workloads=tuple(self.local_workloads()),
            vips=MappingProxyType(self.vips),
            vip_networks=self.vip_networks,
            statuses=MappingProxyType(self.say.finish()),
            rejected=tuple(self.say.rejected),
            steering=self.config.steering,
            balanced=balanced_ports(
                (shard for shard in shards.values() if isinstance(shard, ServiceShard)),
                {
                    key
                    for key, service in self.services.items()
                    if service.obj.resource.spec.session_affinity == "ClientIP"
                },
            ),
        )

    @property
    def vip_networks(self) -> tuple[str, str]:
        return self.config.vip_cidrs.ipv4, self.config.vip_cidrs.ipv6

    def of(self, kind: type[R]) -> list[Object[R]]:
        return [cast("Object[R]", obj) for obj in self.objects if isinstance(obj.resource, kind)]

    # --- MeshConfig

    def take_mesh_config(self) -> None:
        objects = self.of(MeshConfig)
        if not objects:
            return
        one, *others = objects
        self.say.accept(one)
        for obj in others:
            text = f"a mesh has one MeshConfig, and {one.name} at {one.document.place} is it"
            self.say.reject(obj, obj.error(text, "metadata", "name"))
        spec = self.config = one.resource.spec
        log = spec.access_log
        self.mesh = MeshShard(
            trust_domain=spec.trust_domain,
            outbound_policy=spec.outbound_policy,
            opaque_ports=tuple(sorted(set(spec.opaque_ports))),
            detect_timeout_s=spec.detect_timeout,
            header_timeout_s=spec.header_timeout,
            idle_timeout_s=spec.idle_timeout,
            connect_timeout_s=spec.connect_timeout,
            handshake_timeout_s=spec.handshake_timeout,
            tls_resumption=spec.tls_resumption,
            pool_idle_s=spec.pool_idle_timeout,
            tcp_idle_timeout_s=spec.tcp_idle_timeout,
            max_head_bytes=spec.max_head_bytes,
            max_headers=spec.max_headers,
            max_connections=spec.max_connections,
            buffer_bytes=spec.buffer_bytes,
            expect_continue_timeout_s=spec.expect_continue_timeout,
            header_case=spec.header_case,
            forwarded=spec.forwarded,
            request_id=spec.request_id,
            mesh_http=spec.mesh_http,
            http2_max_streams=spec.http2_max_streams,
            http2_keepalive_s=spec.http2_keepalive_interval or 0.0,
            http2_keepalive_timeout_s=spec.http2_keepalive_timeout,
            http2_max_upstream_streams=spec.http2_max_upstream_streams,
            via=spec.via,
            trace_percent=spec.tracing.percent if spec.tracing is not None else -1.0,
            access_log=AccessLog(
                percent=log.percent,
                min_status=log.min_status or 0,
                min_duration_s=log.min_duration or 0.0,
                flags=tuple(sorted(set(log.flags))),
            ),
            cluster_domain=spec.cluster_domain,
            dns_timeout_s=spec.dns_timeout,
            dns_max_outstanding=spec.dns_max_outstanding,
        )

    # --- workloads

    def take_workloads(self) -> None:
        attached: dict[tuple[str, ...], _Work] = {}
        for obj in self.of(Workload):
            spec, meta = obj.resource.spec, obj.resource.metadata
            node = spec.node or self.context.node
            place = (node, *_place(spec.attach)) if spec.attach else None
            errors = [
                obj.error(f"{address} is the address of {first(owner.obj)}", "spec", "addresses", index)
                for index, address in enumerate(spec.addresses)
                if (owner := self.by_address.get(address))
            ]
            errors += [
                obj.error(f"{text} is a virtual address (MeshConfig vipCidrs)", "spec", "dns", "nameservers", index)
                for index, text in enumerate(spec.dns.nameservers)
                if is_within(text, self.vip_networks)
            ]
            if place and (owner := attached.get(place)):
                errors.append(obj.error(f"is attached already by {first(owner.obj)}", "spec", "attach", place[1]))
            if errors:
                self.say.reject(obj, *errors)
                continue
            work = self.work(obj)
            self.works[work.key] = work
            self.by_address.update(dict.fromkeys(spec.addresses, work))
            if place:
                attached[place] = work
            for name, value in meta.labels.items():
                self.by_label.setdefault((meta.namespace, name, value), []).append(work)

    def work(self, obj: Object[Workload]) -> _Work:
        spec = obj.resource.spec
        key = WorkloadKey(obj.name)
        self.say.accept(obj)
        protocols: dict[int, AppProtocol] = {}
        for port in spec.ports:
            declared = declared_protocol(port.app_protocol, port.name)
            if declared.protocol:
                protocols[port.port] = declared.protocol
            if declared.warning:
                self.say.warn(obj, "UnsupportedProtocol", f"port {port.port}: {declared.warning}")
        local = self.context.local
        return _Work(
            obj=obj,
            key=key,
            identity=spiffe_id(self.mesh.trust_domain, obj.resource.metadata.namespace, spec.service_account),
            local=key in local if local is not None else spec.node in (None, self.context.node),
            ports_by_name={port.name: port.port for port in spec.ports if port.name},
            protocols=protocols,
        )

    def select(self, namespace: str, labels: Mapping[str, str]) -> list[_Work]:
        """The workloads of a namespace that have all `labels` (at least one)."""
        lists = [self.by_label.get((namespace, name, value), []) for name, value in labels.items()]
        wanted = labels.items()
        return [work for work in min(lists, key=len) if wanted <= work.obj.resource.metadata.labels.items()]

    def apply_peer_authentication(self) -> None:
        """Selector before namespace before mesh (the root namespace); of equals the oldest, then the first by name."""
        wide: dict[str, Object[PeerAuthentication]] = {}
        for obj in sorted(self.of(PeerAuthentication), key=lambda obj: obj.age):
            spec, namespace = obj.resource.spec, obj.resource.metadata.namespace
            if not spec.selector.match_labels:
                if other := wide.get(namespace):
                    what = "the mesh" if namespace == ROOT_NAMESPACE else f"namespace {namespace}"
                    text = f"{first(other)} holds for {what} already and comes first"
                    self.say.reject(obj, obj.error(text, "metadata", "name"))
                else:
                    wide[namespace] = obj
                    self.say.accept(obj)
                continue
            self.say.accept(obj)
            for work in self.select(namespace, spec.selector.match_labels):
                if work.policy:
                    text = f"Workload {work.key}: {work.policy} selects it too and comes first"
                    self.say.warn(obj, "Conflicted", text)
                    continue
                work.policy = obj.title
                work.own_mtls = spec.mtls.mode if spec.mtls else None
                work.port_mtls = {port: setting.mode for port, setting in sorted(spec.port_level_mtls.items())}
        modes = {namespace: obj.resource.spec.mtls for namespace, obj in wide.items()}
        root = modes.get(ROOT_NAMESPACE)
        for work in self.works.values():
            wider = modes.get(work.obj.resource.metadata.namespace) or root
            work.mtls = work.own_mtls or (wider.mode if wider else "PERMISSIVE")

    # --- services and their endpoints

    def take_services(self) -> None:
        for obj in self.of(Service):
            key = ServiceKey(obj.name)
            vips = obj.resource.spec.cluster_addresses
            taken: list[Object[Resource]] = [self.owners[vip] for vip in vips if vip in self.owners]
            taken += [self.by_address[vip].obj for vip in vips if vip in self.by_address]
            if taken:
                self.say.reject(obj, obj.error(f"is an address of {first(taken[0])}", "spec", "clusterIP"))
                continue
            self.owners.update(dict.fromkeys(vips, obj))
            self.say.accept(obj)
            service = self.services[key] = ServiceParts(obj, key, vips, self.ports(obj))
            if obj.resource.spec.headless and not service.ports:
                text = "a headless Service without a TCP port: its name stands for no address"
                self.say.warn(obj, "NoPorts", text)

    def take_external(self) -> None:
        mesh = Mesh(
            cluster_domain=self.mesh.cluster_domain,
            vip_networks=self.vip_networks,
            services={key: service.obj for key, service in self.services.items()},
            owners={**self.owners, **{address: work.obj for address, work in self.by_address.items()}},
        )
        self.external = accept_external(self.of(ExternalService), mesh, self.say)

    def assign_vips(self) -> None:
        wanted: dict[str, Object[Resource]] = {
            service.key: service.obj
            for service in self.services.values()
            if not service.vips and not service.obj.resource.spec.headless
        }
        for obj in self.external:
            wanted.update(dict.fromkeys(named_hosts(obj), obj))
        self.vips = assign_vips(wanted, self.context.vips, self.vip_networks, [*self.owners, *self.by_address])
        for owner, assigned in self.vips.items():
            if service := self.services.get(ServiceKey(owner)):
                service.vips = assigned
            if len(assigned) < len(self.vip_networks):
                self.say.warn(wanted[owner], "NoAddressLeft", "the networks of MeshConfig vipCidrs are full")

    def ports(self, obj: Object[Service]) -> dict[int, PortParts]:
        spec = obj.resource.spec
        if spec.session_affinity != "None":
            text = f"sessionAffinity {spec.session_affinity} has no effect but where eBPF balances opaque TCP"
            self.say.warn(obj, "Ignored", text)
        if spec.internal_traffic_policy != "Cluster":
            self.say.warn(obj, "Ignored", f"internalTrafficPolicy {spec.internal_traffic_policy} has no effect")
        found: dict[int, PortParts] = {}
        opaque = self.mesh.opaque_ports
        for port in spec.ports:
            if port.protocol != "TCP":
                self.say.warn(obj, "UnsupportedProtocol", f"port {port.port}/{port.protocol}: only TCP is routed")
                continue
            declared = declared_protocol(port.app_protocol, port.name)
            if declared.warning:
                self.say.warn(obj, "UnsupportedProtocol", f"port {port.port}: {declared.warning}")
            found[port.port] = PortParts(
                port,
                declared.protocol,
                port.port in opaque or port.target_port in opaque,
                http_version=declared.http_version,
            )
        return found

    def take_slices(self) -> None:
        for obj in self.of(EndpointSlice):
            name = obj.resource.service_name
            key = ServiceKey(f"{obj.resource.metadata.namespace}/{name}")
            if not name:
                self.say.refuse(obj, "NoService", "the label kubernetes.io/service-name is missing")
            elif key not in self.services:
                text = f"Service {key} does not exist"
                self.say.accept(obj, Condition("ResolvedRefs", "False", "BackendNotFound", text))
            else:
                self.say.accept(obj, Condition("ResolvedRefs", "True", "ResolvedRefs"))
                self.slices.setdefault(key, []).append(obj.resource)

    def resolve_endpoints(self) -> None:
        for service in self.services.values():
            spec, namespace = service.obj.resource.spec, service.obj.resource.metadata.namespace
            selected = self.select(namespace, spec.selector) if spec.selector else []
            for port in service.ports.values():
                # Ready or not, by address and port. A slice knows, a Workload has no readiness.
                found = {(host, target): True for host, target in self.selected(service, port, selected)}
                sliced: dict[tuple[str, int], bool] = {}
                for piece in self.slices.get(service.key, ()):
                    for target in (p.port for p in piece.ports if p.name == port.spec.name and p.protocol == "TCP"):
                        for endpoint in piece.endpoints:
                            for host in endpoint.addresses:
                                sliced[host, target] = sliced.get((host, target), False) or endpoint.ready
                found.update(sliced)
                port.endpoints = tuple(self.endpoint(*where, ready) for where, ready in sorted(found.items()))

    def selected(self, service: ServiceParts, port: PortParts, works: Iterable[_Work]) -> Iterable[tuple[str, int]]:
        target = port.spec.target_port or port.spec.port
        for work in works:
            number = work.ports_by_name.get(target) if isinstance(target, str) else target
            if number is None:
                text = f'port {port.spec.port}: Workload {work.key} has no port named "{target}"'
                self.say.warn(service.obj, "TargetPortNotFound", text)
                continue
            if port.declared:
                work.inferred.setdefault(number, set()).add(port.declared)
            for address in work.obj.resource.spec.addresses:
                yield address, number

    def endpoint(self, host: str, port: int, ready: bool) -> Endpoint:
        work = self.by_address.get(host)
        if work is None:
            return Endpoint(host, port, ready)
        meshed = work.meshed(port)
        return Endpoint(host, port, ready, work.key, work.identity if meshed else SpiffeId(""), meshed)

    def infer_from_routes(self) -> None:
        """What a route attaches to or sends to has its protocol: inbound must not take it for anything else."""
        for service in self.services.values():
            for port in service.ports.values():
                if (protocol := port.routed_as) is None:
                    continue
                sent_to = [self.services[backend.service].ports[backend.port] for backend in port.backends]
                for endpoint in (endpoint for reached in (port, *sent_to) for endpoint in reached.endpoints):
                    if endpoint.workload:
                        self.works[endpoint.workload].inferred.setdefault(endpoint.port, set()).add(protocol)
        self.warn_of_unread_http()

    def warn_of_unread_http(self) -> None:
        """Meshed workloads end HTTP/1.1 that comes to a port for HTTP as opaque octets: its fields could be forged."""
        told: set[tuple[str, WorkloadKey, int]] = set()
        for service in self.services.values():
            for port in service.ports.values():
                if port.tcp_route is None or port.routed_as != "tcp":
                    continue
                for backend in sorted(port.backends, key=lambda backend: (backend.service, backend.port)):
                    for endpoint in self.services[backend.service].ports[backend.port].endpoints:
                        key = (port.tcp_route.title, endpoint.workload, endpoint.port)
                        if not endpoint.meshed or key in told:
                            continue
                        told.add(key)
                        if self.works[endpoint.workload].known_protocols.get(endpoint.port) != "tcp":
                            text = (
                                f"port {endpoint.port} of Workload {endpoint.workload} is for HTTP too, so HTTP/1.1 "
                                "that is relayed to it unread is ended: say appProtocol "
                                '"tcp" there, or use an HTTPRoute'
                            )
                            self.say.warn(port.tcp_route, "UnsupportedProtocol", text)

    # --- the outcome

    def shards(self) -> dict[str, Shard]:
        found: list[Shard] = [self.mesh]
        found += [self.service_shard(service) for service in self.services.values()]
        found += [external_shard(obj, self.vips) for obj in self.external]
        found += [self.workload_shard(work) for work in self.works.values()]
        return {shard.key(): shard for shard in sorted(found, key=lambda shard: shard.key())}

    @staticmethod
    def service_shard(service: ServiceParts) -> ServiceShard:
        ports = []
        for number, port in sorted(service.ports.items()):
            protocol = port.routed_as or ("tcp" if port.is_tcp else port.declared or "auto")
            rule = port.tcp_rule if protocol == "tcp" else None
            ports.append(
                ServicePort(
                    number,
                    port.spec.name,
                    protocol,
                    port.endpoints,
                    port.rules,
                    rule,
                    http_version="" if protocol == "tcp" else port.http_version,
                )
            )
        meta, headless = service.obj.resource.metadata, service.obj.resource.spec.headless
        return ServiceShard(meta.namespace, meta.name, service.vips, tuple(ports), headless)

    @staticmethod
    def workload_shard(work: _Work) -> WorkloadShard:
        spec, meta = work.obj.resource.spec, work.obj.resource.metadata
        modes = {work.mtls, *work.port_mtls.values()}
        return WorkloadShard(
            namespace=meta.namespace,
            name=meta.name,
            addresses=spec.addresses,
            identity=work.identity,
            service_account=spec.service_account,
            labels=dict(sorted(meta.labels.items())),
            node=spec.node or "",
            local=work.local,
            meshed=spec.attach is not None and modes != {"DISABLE"},
            mtls=work.mtls,
            port_mtls=work.port_mtls,
            protocols=dict(sorted(work.known_protocols.items())),
            nameservers=spec.dns.nameservers if work.local else (),
            host_ports=work.host_ports,
        )

    def local_workloads(self) -> Iterable[LocalWorkload]:
        for key, work in sorted(self.works.items()):
            spec, meta = work.obj.resource.spec, work.obj.resource.metadata
            if work.local and spec.attach:
                traffic, ports = _traffic(spec.traffic), work.host_ports
                if ports is not None:
                    traffic = replace(traffic, in_include_ports=ports, in_exclude_ports=())
                yield LocalWorkload(
                    key=key,
                    namespace=meta.namespace,
                    name=meta.name,
                    identity=work.identity,
                    service_account=spec.service_account,
                    addresses=spec.addresses,
                    netns=spec.attach.netns or "",
                    cgroup=spec.attach.cgroup or "",
                    unit=spec.attach.systemd_unit or "",
                    failure_policy=spec.failure_policy or self.config.failure_policy,
                    traffic=traffic,
                    steering="ebpf" if ports is not None else spec.steering or self.config.steering,
                    dns_capture=spec.dns.capture,
                    nameservers=spec.dns.nameservers,
                )


def _place(attach: Attach) -> tuple[str, str]:
    """The field that says it, as it is written, and what it says."""
    if attach.netns is not None:
        return "netns", attach.netns
    return ("cgroup", attach.cgroup) if attach.cgroup is not None else ("systemdUnit", attach.systemd_unit or "")


def _traffic(spec: WorkloadTraffic) -> Traffic:
    out, into = spec.outbound, spec.inbound
    return Traffic(
        out_include_cidrs=_merged(out.include_cidrs),
        out_exclude_cidrs=_merged(out.exclude_cidrs),
        out_include_ports=tuple(sorted(set(out.include_ports))),
        out_exclude_ports=tuple(sorted(set(out.exclude_ports))),
        out_exclude_uids=tuple(sorted(set(out.exclude_uids))),
        in_include_ports=tuple(sorted(set(into.include_ports))),
        in_exclude_ports=tuple(sorted(set(into.exclude_ports))),
        in_exclude_cidrs=_merged(into.exclude_cidrs),
    )


def _merged(cidrs: Iterable[str]) -> tuple[str, ...]:
    """IPv4 first, sorted; what overlaps or adjoins is one network, since sets of intervals refuse overlaps."""
    networks = [ipaddress.ip_network(text) for text in cidrs]
    v4 = (network for network in networks if isinstance(network, ipaddress.IPv4Network))
    v6 = (network for network in networks if isinstance(network, ipaddress.IPv6Network))
    return tuple(str(n) for n in (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6)))
