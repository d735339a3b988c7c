# cython: annotation_typing=False
"""From a destination to a service port, from a request to a rule, a backend and an endpoint. PURE.

`Tables` is the worker's view of the snapshot: flat dictionaries that are updated shard by shard. What has
state across snapshots (outstanding requests of an endpoint, the sequence of a rule's weights) is kept by key
and survives a change of its shard.

Who wins among rules is decided when the snapshot is built; here the first match wins (Gateway API).
"""

from __future__ import annotations

from collections.abc import Callable

from ..addr import EndpointAddr, ServiceKey, SpiffeId, WorkloadKey
from ..config.shard import (
    Endpoint,
    ExternalShard,
    HttpVersion,
    MeshShard,
    Rule,
    ServicePort,
    ServiceShard,
    Shard,
    SvidShard,
    WorkloadShard,
)
from ..errors import Reason, Refused
from .balance import WeightedCycle, pick
from .egress import Egress, External
from .match import Prepared, Request, Ruling


class EndpointState:
    """One endpoint with what this worker knows of it. Lives as long as some shard or request names it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.addr = EndpointAddr(endpoint.host, endpoint.port)
        self.outstanding = 0

    def __repr__(self) -> str:
        return f"<EndpointState {self.addr} outstanding={self.outstanding} meshed={self.endpoint.meshed}>"


class PortTable:
    """One service port, ready to be asked."""

    def __init__(
        self,
        service: ServiceKey,
        spec: ServicePort,
        states: dict[Endpoint, EndpointState],
        old: PortTable | None = None,
    ) -> None:
        self.service = service
        self.spec = spec
        self.port = spec.port
        self.http_version: HttpVersion = spec.http_version
        self.endpoints = [states[e] for e in spec.endpoints]
        ready = [state for state in self.endpoints if state.endpoint.ready]
        v4 = [state for state in ready if ":" not in state.endpoint.host]
        v6 = [state for state in ready if ":" in state.endpoint.host]
        # For a dual-stack client a dual-stack workload is one endpoint, not two; IPv4 goes first.
        named = {state.endpoint.workload for state in v4 if state.endpoint.workload}
        dual = v4 + [state for state in v6 if state.endpoint.workload not in named]
        self.ready = {
            frozenset((4,)): v4,
            frozenset((6,)): v6,
            frozenset((4, 6)): dual,
        }
        self.rules: Prepared | None = None
        if old is not None and old.spec.rules == spec.rules:
            # Endpoints change more often than rules, and to compile 64 expressions may take 0.3 s.
            self.rules = old.rules
        elif spec.rules is not None:
            self.rules = Prepared(spec.rules)
        self.tcp_rule = Ruling(spec.tcp_rule) if spec.tcp_rule is not None else None
        self.cycles: dict[str, WeightedCycle] = {}


class Way:
    """A rule with one backend, and that backend's port in one version of the tables."""

    def __init__(self, version: int, target: PortTable, rule: Rule) -> None:
        self.version = version
        self.target = target
        self.rule = rule.name
        self.request_timeout_s = rule.request_timeout_s


class Choice:
    """Where a request goes, and what decided so."""

    def __init__(
        self,
        service: ServiceKey,
        endpoint: EndpointState,
        rule: str,
        request_timeout_s: float,
        http_version: HttpVersion = "",
    ) -> None:
        """`service`: the backend's, "" for a destination that is no service. `http_version`: what the endpoint is
        spoken to in, "" as the request came.
        """
        self.service = service
        self.endpoint = endpoint
        self.rule = rule
        self.request_timeout_s = request_timeout_s
        self.http_version = http_version


class Tables:
    """Everything a worker decides with. `random` gives floats in [0, 1)."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.version = 0
        """Grows with each change of anything."""
        self._put_mesh(MeshShard())
        self.workloads: dict[WorkloadKey, WorkloadShard] = {}
        self.svids: dict[SpiffeId, SvidShard] = {}
        self.services: dict[ServiceKey, ServiceShard] = {}
        self.ports: dict[tuple[ServiceKey, int], PortTable] = {}
        self.egress = Egress()
        self.egress_version = 0
        """Grows with each change of what may leave the mesh."""
        self._by_vip: dict[tuple[str, int], PortTable] = {}
        self._vips: dict[str, ServiceKey] = {}
        self._by_address: dict[str, WorkloadKey] = {}
        self._endpoints: dict[tuple[str, int], int] = {}
        """Of services, and how many service ports name each."""
        self._direct: dict[Endpoint, EndpointState] = {}
        self.broken_patterns = 0
        """How many matches came with a regular expression that can't be used. They never match."""

    # -- changes ------------------------------------------------------------------------------------

    def put(self, shard: Shard) -> None:
        self.version += 1
        match shard:
            case ServiceShard():
                self._put_service(shard)
            case ExternalShard():
                self.egress.put(shard)
                self.egress_version += 1
            case WorkloadShard():
                key = WorkloadKey(f"{shard.namespace}/{shard.name}")
                self._drop_workload(key)
                self.workloads[key] = shard
                for address in shard.addresses:
                    self._by_address[address] = key
            case SvidShard():
                self.svids[shard.identity] = shard
            case MeshShard():
                self._put_mesh(shard)
                self.egress_version += 1

    def _put_mesh(self, shard: MeshShard) -> None:
        self.mesh = shard
        # Of it, what is asked for every request. How names of fields were written is nothing that HTTP/2 could say.
        self.http1_in_http2 = shard.mesh_http != "http1" and shard.header_case == "lower"
        self.keeps_spelling = shard.header_case == "preserve"
        self.gives_ids = shard.request_id  # x-request-id
        self.trace_percent = shard.trace_percent
        self.via = shard.via.encode()
        self.buffer_bytes = shard.buffer_bytes

    def drop(self, key: str) -> None:
        self.version += 1
        kind, _, name = key.partition("/")
        if kind == "service":
            self._drop_service(ServiceKey(name), keep=frozenset())
        elif kind == "external":
            self.egress.drop(ServiceKey(key))
            self.egress_version += 1
        elif kind == "workload":
            self._drop_workload(WorkloadKey(name))
        elif kind == "svid":
            self.svids.pop(SpiffeId(name), None)

    def _put_service(self, shard: ServiceShard) -> None:
        key = ServiceKey(f"{shard.namespace}/{shard.name}")
        self._drop_service(key, keep=frozenset(spec.port for spec in shard.ports))
        self.services[key] = shard
        for spec in shard.ports:
            old = self.ports.get((key, spec.port))
            states = {state.endpoint: state for state in old.endpoints} if old else {}
            kept = {e: states.get(e) or self._direct.get(e) or EndpointState(e) for e in spec.endpoints}
            table = PortTable(key, spec, kept, old)
            if table.rules is not None and (old is None or table.rules is not old.rules):
                self.broken_patterns += len(table.rules.broken)
            if old is not None:
                names = {rule.name for rule in (*(spec.rules or ()), spec.tcp_rule) if rule is not None}
                table.cycles = {name: cycle for name, cycle in old.cycles.items() if name in names}
            self.ports[key, spec.port] = table
            for endpoint in spec.endpoints:
                at = endpoint.host, endpoint.port
                self._endpoints[at] = self._endpoints.get(at, 0) + 1
            for vip in shard.vips:
                self._by_vip[vip, spec.port] = table
        for vip in shard.vips:
            self._vips[vip] = key

    def _drop_service(self, key: ServiceKey, keep: frozenset[int]) -> None:
        old = self.services.pop(key, None)
        if old is None:
            return
        for spec in old.ports:
            for endpoint in spec.endpoints:
                at = endpoint.host, endpoint.port
                self._endpoints[at] -= 1
                if not self._endpoints[at]:
                    del self._endpoints[at]
            for vip in old.vips:
                # It may be another service's already: the shards of one change come in any order.
                table = self._by_vip.get((vip, spec.port))
                if table is not None and table.service == key:
                    del self._by_vip[vip, spec.port]
            if spec.port not in keep:
                self.ports.pop((key, spec.port), None)
        for vip in old.vips:
            if self._vips.get(vip) == key:
                del self._vips[vip]

    def _drop_workload(self, key: WorkloadKey) -> None:
        old = self.workloads.pop(key, None)
        if old is not None:
            for address in old.addresses:
                if self._by_address.get(address) == key:
                    del self._by_address[address]

    # -- questions ----------------------------------------------------------------------------------

    def service_at(self, host: str, port: int) -> PortTable | None:
        """The service port whose virtual IP this is."""
        return self._by_vip.get((host, port))

    def is_vip(self, host: str) -> bool:
        """Of a service, or of a host that is outside of the mesh."""
        return host in self._vips or self.egress.is_vip(host)

    def is_endpoint(self, host: str, port: int) -> bool:
        """Of some service: that is what the name of a headless one stands for, and it need not be a workload's."""
        return (host, port) in self._endpoints

    def workload_at(self, host: str) -> WorkloadShard | None:
        key = self._by_address.get(host)
        return self.workloads[key] if key is not None else None

    def direct(self, host: str, port: int) -> EndpointState:
        """A destination that is no service. Its identity is the workload's that has this address, if any."""
        workload = self.workload_at(host)
        endpoint = Endpoint(host, port)
        if workload is not None:
            meshed = workload.meshed and (workload.host_ports is None or port in workload.host_ports)
            meshed = meshed and workload.port_mtls.get(port, workload.mtls) != "DISABLE"
            endpoint = Endpoint(
                host,
                port,
                workload=WorkloadKey(f"{workload.namespace}/{workload.name}"),
                identity=workload.identity if meshed else SpiffeId(""),
                meshed=meshed,
            )
        state = self._direct.get(endpoint)
        if state is None:
            if len(self._direct) >= 4096:
                # Only counts of idle destinations are lost.
                self._direct = {e: s for e, s in self._direct.items() if s.outstanding}
            state = self._direct[endpoint] = EndpointState(endpoint)
        return state

    def route(self, port: PortTable, request: Request, families: frozenset[int]) -> Choice:
        """Endpoint for one HTTP request to a service port.

        Raises Refused with NO_ROUTE, BACKEND_INVALID, NO_HEALTHY_ENDPOINT or HEAD_TOO_LARGE.
        """
        if port.rules is None:
            return self._endpoint(port, "", 0.0, families)
        ruling = port.rules.first(request)
        if ruling is None:
            detail = f"no rule for {request.method} {request.path} of service {port.service}:{port.port}"
            raise Refused(Reason.NO_ROUTE, detail, port.service)
        return self._backend(port, ruling, families)

    def tcp(self, port: PortTable, families: frozenset[int]) -> Choice:
        """Endpoint for an opaque connection to a service port. Raises Refused as `route` does."""
        if port.tcp_rule is not None:
            return self._backend(port, port.tcp_rule, families)
        return self._endpoint(port, "", 0.0, families)

    def declared(self, external: External, families: frozenset[int]) -> list[EndpointState]:
        """Where an ExternalService says that its hosts are, best first. Without any: what their names resolve to.

        Raises Refused with NO_HEALTHY_ENDPOINT when none is in a family of the client.
        """
        shard, port = external.shard, external.spec.target_port or external.spec.port
        left = [self.direct(host, port) for host in shard.endpoints if (6 if ":" in host else 4) in families]
        if shard.endpoints and not left:
            detail = f"{external.title} has {len(shard.endpoints)} endpoint(s), none in a family of the client"
            raise Refused(Reason.NO_HEALTHY_ENDPOINT, detail, external.title)
        first = pick(left, self._random)
        return [first, *(state for state in left if state is not first)] if first is not None else []

    def _backend(self, port: PortTable, ruling: Ruling, families: frozenset[int]) -> Choice:
        way = ruling.way
        if way is not None:
            found: Way = way
            if found.version == self.version:
                return self._endpoint(found.target, found.rule, found.request_timeout_s, families)
        rule = ruling.rule
        backends = rule.backends
        index = 0
        if len(backends) != 1 or not backends[0].weight:
            # Pieces of one rule share its name and so its sequence; new weights begin a new one.
            weights = tuple(backend.weight for backend in backends)
            cycle = port.cycles.get(rule.name)
            if cycle is None or cycle.weights != weights:
                cycle = port.cycles[rule.name] = WeightedCycle(weights, self._random())
            index = cycle.next()
            if index < 0:
                raise Refused(Reason.BACKEND_INVALID, "the rule has no backend with a weight", rule.name)
        backend = backends[index]
        if backend.invalid:
            raise Refused(Reason.BACKEND_INVALID, backend.invalid, rule.name)
        target = self.ports.get((backend.service, backend.port))
        if target is None:
            # Its shard is still on the way to us, or was removed just now.
            raise Refused(Reason.BACKEND_INVALID, f"{backend.service}:{backend.port} does not exist", rule.name)
        if len(backends) == 1:
            ruling.way = Way(self.version, target, rule)
        return self._endpoint(target, rule.name, rule.request_timeout_s, families)

    def _endpoint(self, port: PortTable, rule: str, timeout_s: float, families: frozenset[int]) -> Choice:
        candidates = port.ready.get(families, ())
        state = pick(candidates, self._random)
        if state is None:
            total = len(port.endpoints)
            detail = f"{port.service}:{port.port} has {total} endpoint(s), none ready in a family of the client"
            raise Refused(Reason.NO_HEALTHY_ENDPOINT, detail, rule or port.service)
        choice = Choice.__new__(Choice)  # costs a third of a call
        choice.service = port.service
        choice.endpoint = state
        choice.rule = rule
        choice.request_timeout_s = timeout_s
        choice.http_version = port.http_version
        return choice
