"""Valid objects to one consistent snapshot of shards.

What can't be used is rejected or marked here, so that no consumer meets a dangling reference: a route's backend that
does not exist carries its reason in the shard, an endpoint names a workload only if that workload is in the snapshot.
Objects are taken in the order given: when two claim the same thing, the second is rejected and told who was first.
PURE.

Semantics are those of the Gateway API for meshes (GAMMA): a route replaces the default routing of the Service ports
it attaches to; a rule's choice comes before the validity of its backends; routes of a backend Service are not applied
again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeVar, cast

from ..addr import ServiceKey, SpiffeId, WorkloadKey, spiffe_id
from ..errors import ConfigError
from . import model
from .model import NOT_YET, FailurePolicy, Object, Resource
from .shard import (
    AccessLog,
    AppProtocol,
    Backend,
    Endpoint,
    HeaderMatch,
    Match,
    MeshShard,
    MtlsMode,
    Rule,
    ServicePort,
    ServiceShard,
    Shard,
    WorkloadShard,
)
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
    vips: Mapping[ServiceKey, Sequence[str]] = field(default_factory=dict)
    local: frozenset[WorkloadKey] | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """As in Kubernetes. Type ``Warning`` (status True) is ours: accepted, but not all of it has an effect."""

    type: Literal["Accepted", "ResolvedRefs", "Warning"]
    status: Literal["True", "False"]
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """`parent` is ``Service shop/reviews``, with `` port 80`` or `` section http`` where the reference has them."""

    parent: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """`parents` is for routes; their `conditions` sum them up: accepted if any parent accepts."""

    obj: str
    file: str
    line: int
    conditions: tuple[Condition, ...]
    parents: tuple[ParentStatus, ...] = ()
    generation: int = 0

    def get(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)


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
    failure_policy: FailurePolicy
    traffic: Traffic = Traffic()
    dns_capture: bool = True
    nameservers: tuple[str, ...] = ()
    """As declared in `Workload.dns`; () leaves it to the resolv.conf of the workload."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`shards` by key, without SVIDs; `statuses` by ``Kind ns/name``; `vips` is for the next `Context`."""

    shards: Mapping[str, Shard]
    local_workloads: tuple[LocalWorkload, ...]
    vips: Mapping[ServiceKey, tuple[str, ...]]
    vip_networks: tuple[str, ...]
    statuses: Mapping[str, ObjectStatus]
    rejected: tuple[ConfigError, ...]
    steering: Literal["auto", "nftables", "iptables"] = "auto"
    kept: tuple[str, ...] = ()
    """Objects whose last good version is in force, since the present one can't be used."""

    @property
    def mesh(self) -> MeshShard:
        return cast("MeshShard", self.shards["mesh"])


def build_snapshot(
    objects: Iterable[Object[Resource]], context: Context, rejected: Iterable[ConfigError] = ()
) -> Snapshot:
    """`rejected` are the errors of reading and validation: they get a status, and lead `Snapshot.rejected`."""
    return _Build(tuple(objects), context, list(rejected)).run()


def declared_protocol(app_protocol: str, port_name: str) -> tuple[AppProtocol | None, str]:
    """What `appProtocol`, else the part of the port's name before "-", says; None: nothing. With a warning or "".

    HTTP/2 is not supported yet: a port that declares it is sniffed, and its warning says so.
    """
    said = app_protocol.lower()
    if not said:
        name = port_name.lower()
        said = name if name == "grpc-web" or name.startswith("grpc-web-") else name.partition("-")[0]
        said = "grpc-web" if said.startswith("grpc-web") else said
    if said in _HTTP_NAMES:
        return "http", ""
    if said in _TCP_NAMES or said == "kubernetes.io/wss":
        return "tcp", ""
    if said in _HTTP2_NAMES:
        return "auto", f"HTTP/2 ({said}) is {NOT_YET}: the port is sniffed, HTTP/2 passes as opaque bytes"
    if app_protocol:
        return None, f'appProtocol "{app_protocol}" is not known: the port is sniffed'
    return None, ""


@dataclass(slots=True)
class _Work:
    """A workload while the snapshot is built."""

    obj: Object[model.Workload]
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
        return self.obj.resource.spec.attach is not None and self.port_mtls.get(port, self.mtls) != "DISABLE"


@dataclass(slots=True)
class _Port:
    spec: model.ServicePortSpec
    declared: AppProtocol | None
    opaque: bool
    endpoints: tuple[Endpoint, ...] = ()
    routed: bool = False
    entries: list[_Entry] = field(default_factory=list)

    @property
    def is_tcp(self) -> bool:
        return self.declared == "tcp" or (self.declared is None and self.opaque)


@dataclass(slots=True)
class _Service:
    obj: Object[model.Service]
    key: ServiceKey
    vips: tuple[str, ...]
    ports: dict[int, _Port]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One match of one rule. `order` sorts by the Gateway API's precedence."""

    order: tuple[object, ...]
    match: Match
    name: str
    backends: tuple[Backend, ...]
    timeout_s: float


R = TypeVar("R", bound=Resource)


class _Build:
    def __init__(self, objects: Sequence[Object[Resource]], context: Context, rejected: list[ConfigError]) -> None:
        self.objects = objects
        self.context = context
        self.rejected = rejected
        self.invalid = list(rejected)
        self.config = model.MeshConfigSpec()
        self.mesh = MeshShard()
        self.works: dict[WorkloadKey, _Work] = {}
        self.by_address: dict[str, _Work] = {}
        self.by_label: dict[tuple[str, str, str], list[_Work]] = {}
        self.services: dict[ServiceKey, _Service] = {}
        self.slices: dict[ServiceKey, list[model.EndpointSlice]] = {}
        self.vips: dict[ServiceKey, tuple[str, ...]] = {}
        self.statuses: dict[str, ObjectStatus] = {}
        self.warnings: dict[str, list[tuple[str, str]]] = {}

    def run(self) -> Snapshot:
        self.take_mesh_config()
        self.take_workloads()
        self.apply_peer_authentication()
        self.take_services()
        self.take_slices()
        self.resolve_endpoints()
        self.attach_routes()
        self.infer_from_routes()
        shards = self.shards()
        self.finish_statuses()
        return Snapshot(
            shards=MappingProxyType(shards),
            local_workloads=tuple(self.local_workloads()),
            vips=MappingProxyType(self.vips),
            vip_networks=(self.config.vip_cidrs.ipv4, self.config.vip_cidrs.ipv6),
            statuses=MappingProxyType(self.statuses),
            rejected=tuple(self.rejected),
            steering=self.config.steering,
        )

    def of(self, kind: type[R]) -> list[Object[R]]:
        return [cast("Object[R]", obj) for obj in self.objects if isinstance(obj.resource, kind)]

    # --- statuses

    def accept(self, obj: Object[Resource], *more: Condition) -> None:
        self.status(obj, (Condition("Accepted", "True", "Accepted"), *more))

    def refuse(self, obj: Object[Resource], reason: str, message: str) -> None:
        self.status(obj, (Condition("Accepted", "False", reason, message),))

    def reject(self, obj: Object[Resource], error: ConfigError, reason: str = "Conflicted") -> None:
        self.rejected.append(error)
        self.refuse(obj, reason, f"{error.field}: {error.message}")

    def status(
        self, obj: Object[Resource], conditions: tuple[Condition, ...], parents: tuple[ParentStatus, ...] = ()
    ) -> None:
        line, generation = obj.document.line_of(()), obj.resource.metadata.generation
        self.statuses[obj.title] = ObjectStatus(obj.title, obj.document.file, line, conditions, parents, generation)

    def warn(self, obj: Object[Resource], reason: str, message: str) -> None:
        self.warnings.setdefault(obj.title, []).append((reason, message))

    def finish_statuses(self) -> None:
        for title, found in self.warnings.items():
            status = self.statuses[title]
            shown = [message for _, message in found[:10]] + (
                [f"and {len(found) - 10} more"] if len(found) > 10 else []
            )
            warning = Condition("Warning", "True", found[0][0], "; ".join(shown))
            self.statuses[title] = ObjectStatus(
                title, status.file, status.line, (*status.conditions, warning), status.parents, status.generation
            )
        by_obj: dict[str, list[ConfigError]] = {}
        for error in self.invalid:
            if error.obj and error.obj not in self.statuses:
                by_obj.setdefault(error.obj, []).append(error)
        for title, errors in by_obj.items():
            text = "; ".join(": ".join(part for part in (error.field, error.message) if part) for error in errors)
            refused = Condition("Accepted", "False", "Invalid", text)
            self.statuses[title] = ObjectStatus(title, errors[0].file, errors[0].line, (refused,))

    # --- MeshConfig

    def take_mesh_config(self) -> None:
        first: Object[model.MeshConfig] | None = None
        for obj in self.of(model.MeshConfig):
            if first is None:
                first = obj
                self.accept(obj)
            else:
                text = f"a mesh has one MeshConfig, and {first.name} at {first.document.place} is it"
                self.reject(obj, obj.error(text, "metadata", "name"))
        if first is None:
            return
        spec = self.config = first.resource.spec
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
            via=spec.via,
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
        attached: dict[tuple[str, str], _Work] = {}
        for obj in self.of(model.Workload):
            spec, meta = obj.resource.spec, obj.resource.metadata
            node = spec.node or self.context.node
            place = (node, spec.attach.netns) if spec.attach and spec.attach.netns else None
            errors = [
                obj.error(f"{address} is the address of {self.first(owner.obj)}", "spec", "addresses", index)
                for index, address in enumerate(spec.addresses)
                if (owner := self.by_address.get(address))
            ]
            if place and (owner := attached.get(place)):
                errors.append(obj.error(f"is attached already by {self.first(owner.obj)}", "spec", "attach", "netns"))
            if errors:
                for error in errors:
                    self.reject(obj, error)
                continue
            work = self.work(obj)
            self.works[work.key] = work
            self.by_address.update(dict.fromkeys(spec.addresses, work))
            if place:
                attached[place] = work
            for name, value in meta.labels.items():
                self.by_label.setdefault((meta.namespace, name, value), []).append(work)

    def work(self, obj: Object[model.Workload]) -> _Work:
        spec = obj.resource.spec
        key = WorkloadKey(obj.name)
        self.accept(obj)
        protocols: dict[int, AppProtocol] = {}
        for port in spec.ports:
            declared, warning = declared_protocol(port.app_protocol, port.name)
            if declared:
                protocols[port.port] = declared
            if warning:
                self.warn(obj, "UnsupportedProtocol", f"port {port.port}: {warning}")
        local = self.context.local
        return _Work(
            obj=obj,
            key=key,
            identity=spiffe_id(self.mesh.trust_domain, obj.resource.metadata.namespace, spec.service_account),
            local=key in local if local is not None else spec.node in (None, self.context.node),
            ports_by_name={port.name: port.port for port in spec.ports if port.name},
            protocols=protocols,
        )

    @staticmethod
    def first(obj: Object[Resource]) -> str:
        return f"{obj.title} at {obj.document.place}"

    def select(self, namespace: str, labels: Mapping[str, str]) -> list[_Work]:
        """The workloads of a namespace that have all `labels` (at least one)."""
        lists = [self.by_label.get((namespace, name, value), []) for name, value in labels.items()]
        wanted = labels.items()
        return [work for work in min(lists, key=len) if wanted <= work.obj.resource.metadata.labels.items()]

    def apply_peer_authentication(self) -> None:
        """Selector before namespace before mesh (the root namespace); of equals the oldest, then the first by name."""
        wide: dict[str, Object[model.PeerAuthentication]] = {}
        for obj in sorted(self.of(model.PeerAuthentication), key=lambda obj: obj.age):
            spec, namespace = obj.resource.spec, obj.resource.metadata.namespace
            if not spec.selector.match_labels:
                if first := wide.get(namespace):
                    what = "the mesh" if namespace == ROOT_NAMESPACE else f"namespace {namespace}"
                    text = f"{self.first(first)} holds for {what} already and comes first"
                    self.reject(obj, obj.error(text, "metadata", "name"))
                else:
                    wide[namespace] = obj
                    self.accept(obj)
                continue
            self.accept(obj)
            for work in self.select(namespace, spec.selector.match_labels):
                if work.policy:
                    text = f"Workload {work.key}: {work.policy} selects it too and comes first"
                    self.warn(obj, "Conflicted", text)
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
        owners: dict[str, Object[model.Service]] = {}
        unassigned: list[ServiceKey] = []
        for obj in self.of(model.Service):
            spec, key = obj.resource.spec, ServiceKey(obj.name)
            vips = spec.cluster_addresses
            taken: list[Object[Resource]] = [owners[vip] for vip in vips if vip in owners]
            taken += [self.by_address[vip].obj for vip in vips if vip in self.by_address]
            if taken:
                self.reject(obj, obj.error(f"is an address of {self.first(taken[0])}", "spec", "clusterIP"))
                continue
            owners.update(dict.fromkeys(vips, obj))
            self.accept(obj)
            self.services[key] = _Service(obj, key, vips, self.ports(obj))
            if not vips and not spec.headless:
                unassigned.append(key)
        networks = (self.config.vip_cidrs.ipv4, self.config.vip_cidrs.ipv6)
        self.vips = assign_vips(unassigned, self.context.vips, networks, [*owners, *self.by_address])
        for key, assigned in self.vips.items():
            service = self.services[key]
            service.vips = assigned
            if len(assigned) < len(networks):
                self.warn(service.obj, "NoAddressLeft", "the networks of MeshConfig vipCidrs are full")

    def ports(self, obj: Object[model.Service]) -> dict[int, _Port]:
        spec = obj.resource.spec
        if spec.session_affinity != "None":
            self.warn(obj, "Ignored", f"sessionAffinity {spec.session_affinity} has no effect")
        if spec.internal_traffic_policy != "Cluster":
            self.warn(obj, "Ignored", f"internalTrafficPolicy {spec.internal_traffic_policy} has no effect")
        found: dict[int, _Port] = {}
        opaque = self.mesh.opaque_ports
        for port in spec.ports:
            if port.protocol != "TCP":
                self.warn(obj, "UnsupportedProtocol", f"port {port.port}/{port.protocol}: only TCP is routed")
                continue
            declared, warning = declared_protocol(port.app_protocol, port.name)
            if warning:
                self.warn(obj, "UnsupportedProtocol", f"port {port.port}: {warning}")
            found[port.port] = _Port(port, declared, port.port in opaque or port.target_port in opaque)
        return found

    def take_slices(self) -> None:
        for obj in self.of(model.EndpointSlice):
            name = obj.resource.service_name
            key = ServiceKey(f"{obj.resource.metadata.namespace}/{name}")
            if not name:
                self.refuse(obj, "NoService", "the label kubernetes.io/service-name is missing")
            elif key not in self.services:
                text = f"Service {key} does not exist"
                self.accept(obj, Condition("ResolvedRefs", "False", "BackendNotFound", text))
            else:
                self.accept(obj, Condition("ResolvedRefs", "True", "ResolvedRefs"))
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

    def selected(self, service: _Service, port: _Port, works: Iterable[_Work]) -> Iterable[tuple[str, int]]:
        target = port.spec.target_port or port.spec.port
        for work in works:
            number = work.ports_by_name.get(target) if isinstance(target, str) else target
            if number is None:
                text = f'port {port.spec.port}: Workload {work.key} has no port named "{target}"'
                self.warn(service.obj, "TargetPortNotFound", text)
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

    # --- routes

    def attach_routes(self) -> None:
        for obj in self.of(model.HTTPRoute):
            spec = obj.resource.spec
            if spec.hostnames:
                # GEP-1294: routes of a mesh match by the Service that is called, and hostnames are ignored.
                text = "spec.hostnames has no effect on a route whose parent is a Service: every host name matches"
                self.warn(obj, "HostnamesIgnored", text)
            backends, resolved = self.backends(obj)
            entries = self.entries(obj, backends)
            attached: set[int] = set()
            parents: list[ParentStatus] = []
            for ref in spec.parent_refs:
                verdict = self.attach(obj, ref, entries, attached)
                parents.append(ParentStatus(_parent_text(obj, ref), (verdict, resolved)))
            verdicts = [parent.conditions[0] for parent in parents]
            none = Condition("Accepted", "False", "NoMatchingParent", "the route has no parentRefs")
            best = next((c for c in verdicts if c.status == "True"), verdicts[0] if verdicts else none)
            self.status(obj, (best, resolved), tuple(parents))

    def infer_from_routes(self) -> None:
        """What a route attaches to or sends to is HTTP: inbound must not take it for anything else."""
        for service in self.services.values():
            for port in service.ports.values():
                if not port.routed:
                    continue
                valid = {backend for entry in port.entries for backend in entry.backends if not backend.invalid}
                sent_to = [self.services[backend.service].ports[backend.port] for backend in valid]
                for endpoint in (endpoint for reached in (port, *sent_to) for endpoint in reached.endpoints):
                    if endpoint.workload:
                        self.works[endpoint.workload].inferred.setdefault(endpoint.port, set()).add("http")

    def attach(
        self, obj: Object[model.HTTPRoute], ref: model.ParentRef, entries: Sequence[_Entry], attached: set[int]
    ) -> Condition:
        """Adds the route's entries to the ports that `ref` means; `attached` are those it has been added to."""

        def no(reason: str, message: str) -> Condition:
            return Condition("Accepted", "False", reason, message)

        namespace = obj.resource.metadata.namespace
        if ref.kind != "Service" or ref.group:
            hint = "" if ref.kind not in ("Gateway", "Service") else ' (write group: "" and kind: Service)'
            return no("NoMatchingParent", f"{ref.group or 'core'} {ref.kind} can't be a parent, only a Service{hint}")
        if ref.namespace not in (None, namespace):
            return no("UnsupportedValue", f"a parent in another namespace (consumer route) is {NOT_YET}")
        service = self.services.get(ServiceKey(f"{namespace}/{ref.name}"))
        if service is None:
            return no("NoMatchingParent", f"Service {namespace}/{ref.name} does not exist")
        if service.obj.resource.spec.headless:
            return no("NoMatchingParent", f"Service {service.key} is headless: there is no address to route")
        exact = ref.port is not None or ref.section_name is not None
        ports = [
            port
            for number, port in service.ports.items()
            if ref.port in (None, number) and ref.section_name in (None, port.spec.name)
        ]
        if not ports:
            have = ", ".join(f"{n} {p.spec.name}".strip() for n, p in service.ports.items()) or "no TCP port"
            return no("NoMatchingParent", f"Service {service.key} has no such port; it has: {have}")
        # A port that is opaque only by its number is routed when the route names it.
        usable = [port for port in ports if not (port.declared == "tcp" or (port.is_tcp and not exact))]
        if not usable:
            return no("UnsupportedProtocol", f"the port of Service {service.key} is not HTTP but opaque TCP")
        for port in usable:
            port.routed = True
            if id(port) not in attached:
                attached.add(id(port))
                port.entries += entries
        return Condition("Accepted", "True", "Accepted")

    def backends(self, obj: Object[model.HTTPRoute]) -> tuple[list[tuple[Backend, ...]], Condition]:
        """Per rule, and the ResolvedRefs condition: reason of the first that fails, message of all."""
        failed: list[tuple[str, str]] = []
        rules: list[tuple[Backend, ...]] = []
        for rule in obj.resource.spec.rules:
            found: list[Backend] = []
            for ref in rule.backend_refs:
                key = ServiceKey(f"{ref.namespace or obj.resource.metadata.namespace}/{ref.name}")
                reason, message = self.backend_problem(obj, ref, key)
                if reason and (reason, message) not in failed:
                    failed.append((reason, message))
                found.append(Backend(key, ref.port or 0, ref.weight, message))
            rules.append(tuple(found))
        if not failed:
            return rules, Condition("ResolvedRefs", "True", "ResolvedRefs")
        text = "; ".join(message for _, message in failed)
        return rules, Condition("ResolvedRefs", "False", failed[0][0], text)

    def backend_problem(self, obj: Object[model.HTTPRoute], ref: model.BackendRef, key: ServiceKey) -> tuple[str, str]:
        if ref.kind != "Service" or ref.group:
            return "InvalidKind", f"{ref.group or 'core'} {ref.kind} can't be a backend, only a Service"
        if ref.namespace not in (None, obj.resource.metadata.namespace):
            return "RefNotPermitted", f"Service {key} is in another namespace"
        service = self.services.get(key)
        if service is None:
            return "BackendNotFound", f"Service {key} does not exist"
        port = service.ports.get(ref.port or 0)
        if port is None:
            return "BackendNotFound", f"Service {key} has no TCP port {ref.port}"
        if port.declared == "tcp":
            return "UnsupportedProtocol", f"port {ref.port} of Service {key} is not HTTP but opaque TCP"
        return "", ""

    @staticmethod
    def entries(obj: Object[model.HTTPRoute], backends: Sequence[tuple[Backend, ...]]) -> list[_Entry]:
        found: list[_Entry] = []
        for number, rule in enumerate(obj.resource.spec.rules):
            for place, match in enumerate(_match(spec) for spec in rule.matches or (model.RouteMatch(),)):
                exact = match.path_kind == "exact"
                # Exact, longest path, most headers, oldest, by name, first.
                order = (not exact, -len(match.path), -len(match.headers), obj.age, number, place)
                name = f"{obj.title} rule {number}"
                found.append(_Entry(order, match, name, backends[number], rule.timeouts.request))
        return found

    # --- the outcome

    def shards(self) -> dict[str, Shard]:
        found: list[Shard] = [self.mesh]
        found += [self.service_shard(service) for service in self.services.values()]
        found += [self.workload_shard(work) for work in self.works.values()]
        return {shard.key(): shard for shard in sorted(found, key=lambda shard: shard.key())}

    @staticmethod
    def service_shard(service: _Service) -> ServiceShard:
        ports = []
        for number, port in sorted(service.ports.items()):
            protocol: AppProtocol = "tcp" if port.is_tcp else port.declared or "auto"
            if port.routed:
                protocol = "http"
            rules = _rules(port.entries) if port.routed else None
            ports.append(ServicePort(number, port.spec.name, protocol, port.endpoints, rules))
        meta = service.obj.resource.metadata
        return ServiceShard(meta.namespace, meta.name, service.vips, tuple(ports))

    @staticmethod
    def workload_shard(work: _Work) -> WorkloadShard:
        spec, meta = work.obj.resource.spec, work.obj.resource.metadata
        # Where the Services of a port agree on its protocol, it is the port's, unless the Workload says otherwise.
        inferred = {port: next(iter(found)) for port, found in work.inferred.items() if len(found) == 1}
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
            protocols=dict(sorted((inferred | work.protocols).items())),
            nameservers=spec.dns.nameservers if work.local else (),
        )

    def local_workloads(self) -> Iterable[LocalWorkload]:
        for key, work in sorted(self.works.items()):
            spec, meta = work.obj.resource.spec, work.obj.resource.metadata
            if work.local and spec.attach and spec.attach.netns:
                yield LocalWorkload(
                    key=key,
                    namespace=meta.namespace,
                    name=meta.name,
                    identity=work.identity,
                    service_account=spec.service_account,
                    addresses=spec.addresses,
                    netns=spec.attach.netns,
                    failure_policy=spec.failure_policy or self.config.failure_policy,
                    traffic=_traffic(spec.traffic),
                    dns_capture=spec.dns.capture,
                    nameservers=spec.dns.nameservers,
                )


def _traffic(spec: model.WorkloadTraffic) -> Traffic:
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


def _parent_text(obj: Object[model.HTTPRoute], ref: model.ParentRef) -> str:
    text = f"{ref.kind} {ref.namespace or obj.resource.metadata.namespace}/{ref.name}"
    text += f" port {ref.port}" if ref.port is not None else ""
    return text + (f" section {ref.section_name}" if ref.section_name is not None else "")


def _match(spec: model.RouteMatch) -> Match:
    """Header names that are the same but for their case: the first counts. A prefix loses its trailing "/"."""
    headers: dict[str, str] = {}
    for header in spec.headers:
        headers.setdefault(header.name.lower(), header.value)
    pairs = tuple(HeaderMatch(name, value) for name, value in headers.items())
    if spec.path.type == "Exact":
        return Match("exact", spec.path.value, pairs)
    return Match("prefix", spec.path.value.rstrip("/") or "/", pairs)


def _rules(entries: Iterable[_Entry]) -> tuple[Rule, ...]:
    """In order of precedence. Matches of one rule stay together where nothing of another comes between."""
    rules: list[Rule] = []
    for entry in sorted(entries, key=lambda entry: entry.order):
        matches: tuple[Match, ...] = (entry.match,)
        if rules and rules[-1].name == entry.name:
            matches = rules.pop().matches + matches
        rules.append(Rule(entry.name, matches, entry.backends, entry.timeout_s))
    return tuple(rules)
