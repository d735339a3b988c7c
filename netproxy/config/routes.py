"""Routes to the Service ports they decide about, by the rules of the Gateway API for meshes (GAMMA). PURE.

A route replaces the default routing of the ports it is attached to; a rule's choice comes before the validity of its
backends; routes of a backend Service are not applied again. On one port an HTTPRoute comes before a TCPRoute.

Precedence of all matches on a port, first to last: path type Exact, RegularExpression, PathPrefix (the API leaves the
place of the expressions open; this is Envoy Gateway's order); longest path or expression; with a method before
without; most headers; most query parameters; oldest route; by namespace and name; order in the route.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..addr import ServiceKey
from .fields import NOT_YET
from .kubernetes import (
    BackendRef,
    HeaderMatchSpec,
    HTTPRoute,
    ParentRef,
    QueryParamMatchSpec,
    Route,
    RouteMatch,
    Service,
    ServicePortSpec,
    TCPRoute,
)
from .model import Object
from .shard import AppProtocol, Backend, Endpoint, HeaderMatch, HttpVersion, Match, QueryMatch, Rule
from .status import Condition, ParentStatus, Statuses, first


@dataclass(frozen=True, slots=True)
class Entry:
    """One match of one rule. `order` sorts by precedence."""

    order: tuple[object, ...]
    match: Match
    name: str
    backends: tuple[Backend, ...]
    timeout_s: float


@dataclass(slots=True)
class PortParts:
    """A port of a Service while the snapshot is built."""

    spec: ServicePortSpec
    declared: AppProtocol | None
    opaque: bool
    """By its number."""
    http_version: HttpVersion = ""
    endpoints: tuple[Endpoint, ...] = ()
    http_route: Object[HTTPRoute] | None = None
    """The first that is attached."""
    entries: list[Entry] = field(default_factory=list)
    tcp_route: Object[TCPRoute] | None = None
    tcp_rule: Rule | None = None

    @property
    def is_tcp(self) -> bool:
        return self.declared == "tcp" or (self.declared is None and self.opaque)

    @property
    def routed_as(self) -> AppProtocol | None:
        """What its routes make of it."""
        return "http" if self.http_route else "tcp" if self.tcp_route else None

    @property
    def rules(self) -> tuple[Rule, ...] | None:
        return _rules(self.entries) if self.http_route else None

    @property
    def backends(self) -> set[Backend]:
        """All that can be used and get traffic by a route."""
        rules = ([self.tcp_rule] if self.tcp_rule else []) + [*self.entries]
        return {backend for rule in rules for backend in rule.backends if not backend.invalid}


@dataclass(slots=True)
class ServiceParts:
    """A Service while the snapshot is built."""

    obj: Object[Service]
    key: ServiceKey
    vips: tuple[str, ...]
    ports: dict[int, PortParts]


def attach_routes(
    http: Iterable[Object[HTTPRoute]],
    tcp: Iterable[Object[TCPRoute]],
    services: Mapping[ServiceKey, ServiceParts],
    say: Statuses,
) -> None:
    """Fills in the ports of `services`, and gives every route its status."""
    router = _Router(services, say)
    for route in http:
        router.attach_http(route)
    for tcp_route in sorted(tcp, key=lambda obj: obj.age):
        router.attach_tcp(tcp_route)


def _no(reason: str, message: str) -> Condition:
    return Condition("Accepted", "False", reason, message)


_YES = Condition("Accepted", "True", "Accepted")


class _Router:
    def __init__(self, services: Mapping[ServiceKey, ServiceParts], say: Statuses) -> None:
        self.services = services
        self.say = say

    def attach_http(self, obj: Object[HTTPRoute]) -> None:
        spec = obj.resource.spec
        if spec.hostnames:
            # GEP-1294: routes of a mesh match by the Service that is called, and hostnames are ignored.
            text = "spec.hostnames has no effect on a route whose parent is a Service: every host name matches"
            self.say.warn(obj, "HostnamesIgnored", text)
        backends, resolved = self.backends(obj)
        entries = _entries(obj, backends)
        attached: set[int] = set()
        verdicts = []
        for ref in spec.parent_refs:
            ports = self.parent_ports(obj, ref, "http")
            if isinstance(ports, Condition):
                verdicts.append(ports)
                continue
            verdicts.append(_YES)
            for port in ports:
                port.http_route = port.http_route or obj
                if id(port) not in attached:  # two parents may mean the same port
                    attached.add(id(port))
                    port.entries += entries
        self.conclude(obj, verdicts, resolved)

    def attach_tcp(self, obj: Object[TCPRoute]) -> None:
        (backends,), resolved = self.backends(obj)
        rule = Rule(f"{obj.title} rule 0", (), backends)
        verdicts = []
        for ref in obj.resource.spec.parent_refs:
            ports = self.parent_ports(obj, ref, "tcp")
            if isinstance(ports, Condition):
                verdicts.append(ports)
                continue
            taken = []
            for port in ports:
                owner = port.http_route or port.tcp_route
                if owner is not None and owner is not obj:
                    taken.append(f"port {port.spec.port} is routed by {first(owner)}, which comes first")
                else:
                    port.tcp_route, port.tcp_rule = obj, rule
            if len(taken) == len(ports):
                verdicts.append(_no("Conflicted", "; ".join(taken)))
                continue
            for text in taken:
                self.say.warn(obj, "Conflicted", text)
            verdicts.append(_YES)
        self.conclude(obj, verdicts, resolved)

    def conclude(self, obj: Object[Route], verdicts: Sequence[Condition], resolved: Condition) -> None:
        refs = obj.resource.spec.parent_refs
        parents = [
            ParentStatus(_parent_text(obj, ref), (verdict, resolved))
            for ref, verdict in zip(refs, verdicts, strict=True)
        ]
        none = _no("NoMatchingParent", "the route has no parentRefs")
        best = next((c for c in verdicts if c.status == "True"), verdicts[0] if verdicts else none)
        self.say.set(obj, (best, resolved), tuple(parents))

    def parent_ports(
        self, obj: Object[Route], ref: ParentRef, protocol: Literal["http", "tcp"]
    ) -> list[PortParts] | Condition:
        """The ports that `ref` means and that can carry `protocol`, or why there are none."""
        namespace = obj.resource.metadata.namespace
        if ref.kind != "Service" or ref.group:
            hint = "" if ref.kind not in ("Gateway", "Service") else ' (write group: "" and kind: Service)'
            return _no("NoMatchingParent", f"{ref.group or 'core'} {ref.kind} can't be a parent, only a Service{hint}")
        if ref.namespace not in (None, namespace):
            return _no("UnsupportedValue", f"a parent in another namespace (consumer route) is {NOT_YET}")
        service = self.services.get(ServiceKey(f"{namespace}/{ref.name}"))
        if service is None:
            return _no("NoMatchingParent", f"Service {namespace}/{ref.name} does not exist")
        if service.obj.resource.spec.headless:
            return _no("NoMatchingParent", f"Service {service.key} is headless: there is no address to route")
        ports = [
            port
            for number, port in service.ports.items()
            if ref.port in (None, number) and ref.section_name in (None, port.spec.name)
        ]
        if not ports:
            have = ", ".join(f"{n} {p.spec.name}".strip() for n, p in service.ports.items()) or "no TCP port"
            return _no("NoMatchingParent", f"Service {service.key} has no such port; it has: {have}")
        # A port that is opaque only by its number is routed by an HTTPRoute that names it; what is declared HTTP is
        # relayed unread by a TCPRoute that names it.
        exact = ref.port is not None or ref.section_name is not None
        if protocol == "http":
            usable = [port for port in ports if not (port.declared == "tcp" or (port.is_tcp and not exact))]
            what = f"the port of Service {service.key} is not HTTP but opaque TCP"
        else:
            usable = [port for port in ports if port.declared != "http" or exact]
            what = f"the ports of Service {service.key} are HTTP: name one to have it relayed unread"
        return usable or _no("UnsupportedProtocol", what)

    def backends(self, obj: Object[Route]) -> tuple[list[tuple[Backend, ...]], Condition]:
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

    def backend_problem(self, obj: Object[Route], ref: BackendRef, key: ServiceKey) -> tuple[str, str]:
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
        if port.declared == "tcp" and isinstance(obj.resource, HTTPRoute):
            return "UnsupportedProtocol", f"port {ref.port} of Service {key} is not HTTP but opaque TCP"
        return "", ""


def _parent_text(obj: Object[Route], ref: ParentRef) -> str:
    text = f"{ref.kind} {ref.namespace or obj.resource.metadata.namespace}/{ref.name}"
    text += f" port {ref.port}" if ref.port is not None else ""
    return text + (f" section {ref.section_name}" if ref.section_name is not None else "")


_PATH_KINDS: dict[str, Literal["exact", "regex", "prefix"]] = {
    "Exact": "exact",
    "RegularExpression": "regex",
    "PathPrefix": "prefix",
}
_PATH_RANK = {kind: rank for rank, kind in enumerate(_PATH_KINDS.values())}


def _entries(obj: Object[HTTPRoute], backends: Sequence[tuple[Backend, ...]]) -> list[Entry]:
    found: list[Entry] = []
    for number, rule in enumerate(obj.resource.spec.rules):
        for place, match in enumerate(_match(spec) for spec in rule.matches or (RouteMatch(),)):
            weight = (-len(match.path), not match.method, -len(match.headers), -len(match.query))
            order = (_PATH_RANK[match.path_kind], *weight, obj.age, number, place)
            name = f"{obj.title} rule {number}"
            found.append(Entry(order, match, name, backends[number], rule.timeouts.request))
    return found


def _match(spec: RouteMatch) -> Match:
    """A prefix loses its trailing "/"."""
    kind = _PATH_KINDS[spec.path.type]
    return Match(
        path_kind=kind,
        path=(spec.path.value.rstrip("/") or "/") if kind == "prefix" else spec.path.value,
        headers=tuple(
            HeaderMatch(name, *how) for name, how in _first_of_each((h.name.lower(), h) for h in spec.headers)
        ),
        query=tuple(QueryMatch(name, *how) for name, how in _first_of_each((q.name, q) for q in spec.query_params)),
        method=spec.method or "",
    )


def _first_of_each(
    matches: Iterable[tuple[str, HeaderMatchSpec | QueryParamMatchSpec]],
) -> Iterable[tuple[str, tuple[str, Literal["exact", "regex"]]]]:
    """Of several with one name the first counts (Gateway API)."""
    found: dict[str, tuple[str, Literal["exact", "regex"]]] = {}
    for name, match in matches:
        found.setdefault(name, (match.value, "exact" if match.type == "Exact" else "regex"))
    return found.items()


def _rules(entries: Iterable[Entry]) -> tuple[Rule, ...]:
    """In order of precedence. Matches of one rule stay together where nothing of another comes between."""
    rules: list[Rule] = []
    for entry in sorted(entries, key=lambda entry: entry.order):
        matches: tuple[Match, ...] = (entry.match,)
        if rules and rules[-1].name == entry.name:
            matches = rules.pop().matches + matches
        rules.append(Rule(entry.name, matches, entry.backends, entry.timeout_s))
    return tuple(rules)
