"""Kinds of Kubernetes and of its Gateway API.

Fields that mean nothing here are named, so that existing files work (`Ignored`); what the Gateway API allows and
netproxy can't do yet is refused (`NotYet`). The texts under the fields are those of the reference.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..addr import canonical_ip
from .fields import (
    NOT_YET,
    DnsLabel,
    DnsName,
    Duration,
    FieldPath,
    HeaderName,
    Hostname,
    Ignored,
    Ip,
    Items,
    Labels,
    Model,
    NotYet,
    ObjectMeta,
    Port,
    PortName,
    Protocol,
    TargetPort,
    below,
    one_ip,
    pattern,
    problems,
    twice,
)

GATEWAY_GROUP = "gateway.networking.k8s.io"
GATEWAY_API = f"{GATEWAY_GROUP}/v1"

MAX_MATCHES = 64
MAX_MATCHES_PER_ROUTE = 128
MAX_PATTERNS_PER_ROUTE = 64
"""Regular expressions: each may need `pattern.MAX_MEMORY` in every worker."""


# --- core/v1 Service


class ServicePortSpec(Model):
    port: Port
    """The port that clients dial."""
    name: PortName = ""
    """Required when there are several ports. The part before "-" declares the protocol if `appProtocol` does not:
    `http`, `http2`, `grpc`, `tcp`, `tls`, `https`, `mysql`, `redis`, `mongo`, `postgres` and the like."""
    target_port: TargetPort | None = None
    """The port of the workloads, by number, or by the name that a Workload gives it. Left out: the same as `port`."""
    protocol: Protocol = "TCP"
    """Only TCP is routed. UDP and SCTP ports are accepted and have no effect."""
    app_protocol: str = ""
    """`http` (or `kubernetes.io/ws`) refuses what is not HTTP, and speaks HTTP/1.1 to the workloads; `http2`, `grpc`
    and `kubernetes.io/h2c` do so in HTTP/2 without TLS (prior knowledge), whichever version the client speaks; `tcp`,
    `tls`, `https` and names of databases are relayed unread. Left out: the name decides, then the first octets of a
    connection, and requests go on in the version that they came in."""
    node_port: Ignored = None


class ServiceSpec(Model):
    selector: Labels = Field(default_factory=dict)
    """The Workloads of the same namespace that have all these labels are the endpoints. Left out: EndpointSlices
    alone name the endpoints."""
    ports: Items[ServicePortSpec] = ()
    """At least one, unless the Service is headless."""
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    """All but ExternalName, which is refused, mean the same here: the Service has virtual addresses."""
    cluster_ip: str = Field("", alias="clusterIP")
    """The virtual address. Left out: one per network of MeshConfig `vipCidrs` is chosen and kept. `None` makes the
    Service headless: its name means the addresses of its endpoints, which needs a TCP port."""
    cluster_ips: Annotated[Items[str], Field(alias="clusterIPs", max_length=2)] = ()
    """The virtual addresses of both families; the first is `clusterIP`."""
    session_affinity: Literal["None", "ClientIP"] = "None"
    """`ClientIP` has an effect where eBPF balances the connections of opaque TCP, and gives a warning."""
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    """Has no effect; Local gives a warning."""
    allocate_load_balancer_node_ports: Ignored = None
    external_ips: Ignored = Field(None, alias="externalIPs")
    external_name: Ignored = None
    external_traffic_policy: Ignored = None
    health_check_node_port: Ignored = None
    ip_families: Ignored = None
    ip_family_policy: Ignored = None
    load_balancer_class: Ignored = None
    load_balancer_ip: Ignored = Field(None, alias="loadBalancerIP")
    load_balancer_source_ranges: Ignored = None
    publish_not_ready_addresses: Ignored = None
    session_affinity_config: Ignored = None
    traffic_distribution: Ignored = None

    @property
    def headless(self) -> bool:
        return self.cluster_ip == "None"

    @property
    def cluster_addresses(self) -> tuple[str, ...]:
        """The declared VIPs, canonical; empty when they are to be assigned or the Service is headless."""
        declared = self.cluster_ips or (self.cluster_ip,)
        return tuple(canonical_ip(text) for text in declared if text not in ("", "None"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = below("ports", twice([(p.port, p.protocol) for p in self.ports], "port"))
        found += below("ports", twice([p.name or None for p in self.ports], "name"))
        if len(self.ports) > 1:
            found += [
                (("ports", i, "name"), "required when there are several ports")
                for i, p in enumerate(self.ports)
                if not p.name
            ]
        if self.type == "ExternalName":
            found.append((("type",), f"ExternalName is {NOT_YET}"))
        elif not self.ports and not self.headless:
            found.append((("ports",), "at least one port is required"))
        found += self._check_cluster_ips()
        if found:
            raise problems(*found)
        return self

    def _check_cluster_ips(self) -> list[tuple[FieldPath, str]]:
        found: list[tuple[FieldPath, str]] = []
        declared: list[tuple[FieldPath, str]] = [(("clusterIP",), self.cluster_ip)] if self.cluster_ip else []
        declared += [(("clusterIPs", i), text) for i, text in enumerate(self.cluster_ips)]
        for path, text in declared:
            if text != "None":
                try:
                    one_ip(text)
                except ValueError as exc:
                    found.append((path, f'{exc}, or "None" for a headless Service'))
        if found:
            return found
        if self.cluster_ip and self.cluster_ips and self.cluster_ips[0] != self.cluster_ip:
            found.append((("clusterIPs", 0), "must be the same as clusterIP"))
        if self.cluster_ips and not self.cluster_ip:
            found.append((("clusterIPs",), "needs clusterIP, with the same first address"))
        if len(self.cluster_ips) == 2 and (
            "None" in self.cluster_ips or len({":" in t for t in self.cluster_ips}) == 1
        ):
            found.append((("clusterIPs", 1), "must be of the other IP family than the first"))
        return found


class ServiceMeta(ObjectMeta):
    """Name and labels of a Service. Its name is one label of a DNS name."""

    name: DnsLabel
    """What clients call: `<name>` in the same namespace, `<name>.<namespace>`, `<name>.<namespace>.svc` and
    `<name>.<namespace>.svc.<clusterDomain>` everywhere."""


class Service(Model):
    """A name and virtual addresses for a group of workloads. What is dialled at a virtual address and port is balanced
    over the endpoints that are ready, by the routes that are attached to the port, if there are any."""

    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: ServiceMeta
    spec: ServiceSpec
    status: Ignored = None


# --- discovery.k8s.io/v1 EndpointSlice


class EndpointConditions(Model):
    ready: bool = True
    """False: gets no traffic."""
    serving: bool | None = None
    """Has no effect: `ready` and `terminating` decide."""
    terminating: bool = False
    """True: gets no new traffic."""


class SliceEndpoint(Model):
    addresses: Annotated[Items[Ip], Field(min_length=1, max_length=100)]
    """Each is an endpoint of its own."""
    conditions: EndpointConditions = EndpointConditions()
    """Whether the endpoint gets traffic."""
    deprecated_topology: Ignored = None
    hints: Ignored = None
    hostname: Ignored = None
    node_name: Ignored = None
    target_ref: Ignored = None
    zone: Ignored = None

    @property
    def ready(self) -> bool:
        return self.conditions.ready and not self.conditions.terminating


class SlicePort(Model):
    port: Port
    """The port that the endpoints listen on."""
    name: PortName = ""
    """The name of the Service's port that this one belongs to."""
    protocol: Protocol = "TCP"
    """Only TCP is routed."""
    app_protocol: str = ""
    """Has no effect: the Service's port decides."""


class EndpointSlice(Model):
    """Endpoints of a Service, by address. They join those that the Service's selector finds; of an address that both
    name, the slice says whether it is ready. The Service is named by the label `kubernetes.io/service-name`."""

    api_version: Literal["discovery.k8s.io/v1"]
    kind: Literal["EndpointSlice"]
    metadata: ObjectMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    """The family of all addresses. FQDN is refused."""
    endpoints: Annotated[Items[SliceEndpoint], Field(max_length=1000)] = ()
    """The endpoints."""
    ports: Annotated[Items[SlicePort], Field(max_length=20_000)] = ()
    """What the endpoints listen on. Without any, the slice adds nothing."""

    @property
    def service_name(self) -> str:
        return self.metadata.labels.get("kubernetes.io/service-name", "")

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = below("ports", twice([p.name for p in self.ports], "name"))
        if self.address_type == "FQDN":
            found.append((("addressType",), f"FQDN is {NOT_YET}"))
        else:
            v6 = self.address_type == "IPv6"
            found += [
                (("endpoints", i, "addresses", j), f"is not an {self.address_type} address")
                for i, endpoint in enumerate(self.endpoints)
                for j, address in enumerate(endpoint.addresses)
                if (":" in address) is not v6
            ]
        if found:
            raise problems(*found)
        return self


# --- gateway.networking.k8s.io: what routes have in common


class ParentRef(Model):
    name: DnsName
    """The Service."""
    group: str = GATEWAY_GROUP
    """Write `""`. The default is the Gateway API's and means a Gateway, which can't be a parent here."""
    kind: str = "Gateway"
    """Write `Service`."""
    namespace: DnsLabel | None = None
    """Left out: the route's. Another one is not supported yet."""
    port: Port | None = None
    """Left out: all ports of the Service whose protocol fits the route."""
    section_name: str | None = None
    """The port by its name. With `port`: both must fit."""


class BackendRef(Model):
    name: DnsName
    """The Service whose endpoints get the traffic. Routes that are attached to it are not applied again."""
    group: str = ""
    """Only `""`."""
    kind: str = "Service"
    """Only `Service`."""
    namespace: DnsLabel | None = None
    """Left out: the route's. Another one is refused (RefNotPermitted)."""
    port: Port | None = None
    """A port of the Service; required."""
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """The share of the traffic: this weight by the sum of the rule's weights. 0: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port is None and self.kind == "Service" and not self.group:
            raise problems((("port",), "required for a Service"))
        return self


# --- HTTPRoute


_PATH = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})+")
_NEVER_IN_PATH = ("//", "/./", "/../", "%2f", "%2F", "#")


def _path_problem(value: str) -> str:
    """What the Gateway API forbids in an Exact or PathPrefix value, or ""."""
    if not value.startswith("/"):
        return 'must start with "/"'
    for part in _NEVER_IN_PATH:
        if part in value:
            return f'must not contain "{part}"'
    for end in ("/..", "/."):
        if value.endswith(end):
            return f'must not end with "{end}"'
    return "" if _PATH.fullmatch(value) else "contains a character that is not allowed in a path"


def _check_pattern(value: str) -> None:
    try:
        pattern(value)
    except ValueError as exc:
        raise problems((("value",), str(exc))) from None


class HTTPBackendRef(BackendRef):
    filters: NotYet = None


class PathMatch(Model):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    """How `value` is compared with the path without its query, case-sensitively. PathPrefix compares whole elements:
    `/abc` matches `/abc`, `/abc/` and `/abc/d`, not `/abcd`."""
    value: Annotated[str, Field(max_length=1024)] = "/"
    """Starts with "/", unless it is a regular expression, which has to match the whole path."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "RegularExpression":
            _check_pattern(self.value)
        elif problem := _path_problem(self.value):
            raise problems((("value",), problem))
        return self


class HeaderMatchSpec(Model):
    name: HeaderName
    """Case does not matter. Of several matches with one name the first counts."""
    value: Annotated[str, Field(min_length=1, max_length=4096)]
    """The whole value, case-sensitive, or a regular expression that has to match all of it. A header that came
    several times is its values joined by ","."""
    type: Literal["Exact", "RegularExpression"] = "Exact"
    """How `value` is compared."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "RegularExpression":
            _check_pattern(self.value)
        return self


class QueryParamMatchSpec(Model):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Case-sensitive, as decoded. Of several matches with one name the first counts."""
    value: Annotated[str, Field(min_length=1, max_length=1024)]
    """The whole value, case-sensitive, as decoded, or a regular expression that has to match all of it. Of a parameter
    that came several times the first counts."""
    type: Literal["Exact", "RegularExpression"] = "Exact"
    """How `value` is compared."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "RegularExpression":
            _check_pattern(self.value)
        return self


class RouteMatch(Model):
    path: PathMatch = PathMatch()
    """Left out: every path."""
    headers: Annotated[Items[HeaderMatchSpec], Field(max_length=16)] = ()
    """All of them must fit."""
    query_params: Annotated[Items[QueryParamMatchSpec], Field(max_length=16)] = ()
    """All of them must fit."""
    method: Literal["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"] | None = None
    """Left out: every method."""

    @property
    def patterns(self) -> int:
        """How many regular expressions it has."""
        kinds = [self.path.type, *(h.type for h in self.headers), *(q.type for q in self.query_params)]
        return kinds.count("RegularExpression")


class RouteTimeouts(Model):
    request: Duration = 0.0
    """For the whole request, from its head to the end of the answer; past it the client gets 504. `0s`: none."""
    backend_request: NotYet = None


class RouteRule(Model):
    name: DnsName | None = None
    """For people; unique in the route."""
    matches: Annotated[Items[RouteMatch], Field(max_length=MAX_MATCHES)] = ()
    """The rule is for requests that fit any of them, and a request fits one if it fits all its parts. Left out: for
    all requests. A route may have 128 in all."""
    backend_refs: Annotated[Items[HTTPBackendRef], Field(max_length=16)] = ()
    """Where the requests go. Without any, and for the share of one that does not exist or can't be used, the answer
    is 500."""
    timeouts: RouteTimeouts = RouteTimeouts()
    """How long a request may take."""
    filters: NotYet = None
    retry: NotYet = None
    session_persistence: NotYet = None


class HTTPRouteSpec(Model):
    parent_refs: Annotated[Items[ParentRef], Field(max_length=32)] = ()
    """The Service ports whose requests the route decides about. Without any the route has no effect."""
    hostnames: Annotated[Items[Hostname], Field(max_length=16)] = ()
    """Has no effect and gives a warning: the Service that was dialled decides, not the host name."""
    rules: Annotated[Items[RouteRule], Field(min_length=1, max_length=16)] = (RouteRule(),)
    """Which requests go where. Left out: one rule without backends."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = below("parentRefs", twice(list(self.parent_refs)))
        found += below("rules", twice([rule.name for rule in self.rules], "name"))
        total = sum(len(rule.matches) for rule in self.rules)
        if total > MAX_MATCHES_PER_ROUTE:
            found.append((("rules",), f"has {total} matches in all, at most {MAX_MATCHES_PER_ROUTE} are allowed"))
        total = sum(match.patterns for rule in self.rules for match in rule.matches)
        if total > MAX_PATTERNS_PER_ROUTE:
            text = f"has {total} regular expressions in all, at most {MAX_PATTERNS_PER_ROUTE} are allowed"
            found.append((("rules",), text))
        if found:
            raise problems(*found)
        return self


class HTTPRoute(Model):
    """Which requests to a Service go where. A port with a route carries HTTP only, and a request that no rule of the
    port's routes fits is answered 404.

    Of all matches that fit a request, over all routes of the port, the first of this order wins: path type (Exact, then
    RegularExpression, then PathPrefix), the longest path or expression, one with a method, most headers, most query
    parameters, the oldest route, the first by namespace and name, the first in the route. The choice comes before the
    question whether the backend can be used.

    Regular expressions are RE2's (https://github.com/google/re2/wiki/Syntax): linear time, no back references and no
    look-around. They must match the whole text. One may have 1024 characters and need 1 MiB of memory; a route may have
    64 of them. A request whose path, headers or parameters are so long that comparing might take more than 50 ms is
    answered 431."""

    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: ObjectMeta
    spec: HTTPRouteSpec
    status: Ignored = None


# --- TCPRoute


class TCPRouteRule(Model):
    name: DnsName | None = None
    """For people."""
    backend_refs: Annotated[Items[BackendRef], Field(min_length=1, max_length=16)]
    """Which Services share the connections. Those of one that does not exist or can't be used are closed."""


class TCPRouteSpec(Model):
    parent_refs: Annotated[Items[ParentRef], Field(max_length=32)] = ()
    """The Service ports whose connections the route decides about. Without a port or a name of one, all TCP ports
    that are not declared HTTP. Without any parent the route has no effect."""
    rules: Annotated[Items[TCPRouteRule], Field(min_length=1, max_length=1)]
    """Exactly one: there is nothing in a TCP connection that could choose between several."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := below("parentRefs", twice(list(self.parent_refs))):
            raise problems(*found)
        return self


class TCPRoute(Model):
    """Which connections to a Service go where, by weight. A port with a TCPRoute is relayed unread. An HTTPRoute on the
    same port wins, and of several TCPRoutes the oldest. HTTP/1.1 that is relayed unread to a workload whose port is
    declared HTTP is ended there, and the route gets a warning: declare the port `tcp` in the Workload, or use an
    HTTPRoute."""

    api_version: Literal["gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1alpha2"]
    kind: Literal["TCPRoute"]
    metadata: ObjectMeta
    spec: TCPRouteSpec
    status: Ignored = None


Route = HTTPRoute | TCPRoute
