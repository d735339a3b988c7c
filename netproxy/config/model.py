"""The objects a user writes, typed: Kubernetes shapes and our own.

Field names are those of Kubernetes (camelCase) and unknown fields are errors: a typo must never be a setting
that silently does nothing. Values are strict (``port: "80"`` is text, hence an error), and ``null`` for a known field
is the same as leaving it out, as in Kubernetes. Fields of Kubernetes that mean nothing here are named in the
models, typed Any. What the Gateway API allows and netproxy can't do yet is refused with "not supported yet".

A check that concerns one field is on that field's type; one that compares fields is a model validator that names
the guilty field through `_problems`, so that every message carries the place of the very field.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from ..addr import canonical_ip
from ..errors import REASONS, ConfigError
from .shard import AccessLog, MeshShard

FieldPath = tuple[str | int, ...]
"""``("spec", "rules", 0)``, by the names in the file."""

MESH_API = "netproxy.mesh/v1alpha1"
GATEWAY_API = "gateway.networking.k8s.io/v1"
GATEWAY_GROUP = "gateway.networking.k8s.io"
NOT_YET = "not supported yet"

FLAGS = tuple(sorted({info.flag for info in REASONS.values()} - {"-"}))
"""What `errors.REASONS` puts into logs for requests that failed."""

MAX_MATCHES = 64
MAX_MATCHES_PER_ROUTE = 128


# --- what a source hands over, and what validation makes of it


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a document before its fields are looked at, such as a duplicate key."""

    path: FieldPath
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Document:
    """One object as plain Python values. `line_of` gives the line of a field, or of the nearest field around it."""

    file: str
    value: Mapping[str, Any]
    line_of: Callable[[FieldPath], int]
    problems: tuple[Problem, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line_of(())}"


# --- field types


def _matcher(pattern: str, longest: int, what: str) -> AfterValidator:
    find = re.compile(pattern).fullmatch

    def check(value: str) -> str:
        if len(value) > longest:
            raise ValueError(f"must be at most {longest} characters long")
        if find(value) is None:
            raise ValueError(what)
        return value

    return AfterValidator(check)


def _ip(text: str) -> str:
    if "%" in text:
        raise ValueError("must not have a zone")
    try:
        host = canonical_ip(text)
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 address") from None
    address = ipaddress.ip_address(host)
    if address.is_unspecified or address.is_multicast:
        raise ValueError("must be the address of one host")
    return host


_DURATION = re.compile(r"(?:[0-9]{1,5}(?:h|m|s|ms)){1,4}")
_DURATION_PART = re.compile(r"([0-9]+)(ms|h|m|s)")
_UNIT_MS = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


def _duration(text: object) -> float:
    """Seconds. The syntax is GEP-2257's: no fractions, no sign, at most four parts."""
    if not isinstance(text, str) or _DURATION.fullmatch(text) is None:
        raise ValueError('must be a duration such as "500ms", "10s" or "1h30m"')
    return sum(int(number) * _UNIT_MS[unit] for number, unit in _DURATION_PART.findall(text)) / 1000


def _timestamp(value: object) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError('must be a time such as "2025-01-31T12:00:00Z"')
    return value


_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _port_name(value: str) -> str:
    if value and _PORT_NAME.fullmatch(value) is None:
        hint = " (for a number leave out the quotes)" if value.isdecimal() else ""
        raise ValueError(f'must be a port name: lower case letters, digits and "-"{hint}')
    return value


def _target_port(value: object) -> int | str:
    if isinstance(value, str):
        if not value:
            raise ValueError("must be a port number or name")
        return _port_name(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a port number or name")
    if not 1 <= value <= 65535:
        raise ValueError("must be between 1 and 65535")
    return value


def _port_key(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 65535:
        return int(value)
    raise ValueError("must be a port number between 1 and 65535")


def _refuse_yet(value: Any) -> Any:
    if value is None or value in ([], {}):
        return None
    raise ValueError(NOT_YET)


def _network(version: int, longest: int) -> AfterValidator:
    example = "240.240.0.0/16" if version == 4 else "fd00:240::/32"

    def check(value: str) -> str:
        try:
            network = ipaddress.ip_network(value)
        except ValueError:
            network = None
        if network is None or network.version != version:
            raise ValueError(f"must be an IPv{version} network such as {example}")
        if network.prefixlen > longest:
            raise ValueError(f"must be /{longest} or larger")
        return str(network)

    return AfterValidator(check)


def _cidr(text: str) -> str:
    try:
        network = ipaddress.ip_network(canonical_ip(text) if "/" not in text else text)
    except ValueError:
        raise ValueError("must be an address or a network such as 10.0.0.0/8 or fd00::/8") from None
    if network.version == 6 and network.network_address.ipv4_mapped is not None:
        raise ValueError("must be written as an IPv4 network")
    return str(network)


def _flag(value: str) -> str:
    if value not in FLAGS:
        raise ValueError(f"must be one of {', '.join(FLAGS)}")
    return value


_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SAY_DNS = 'must be lower case letters, digits and "-", and begin and end with a letter or digit'
DnsLabel = Annotated[str, _matcher(_LABEL, 63, _SAY_DNS)]
DnsName = Annotated[str, _matcher(rf"{_LABEL}(\.{_LABEL})*", 253, _SAY_DNS + ' ("." between parts)')]
_QUALIFIED = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
LabelKey = Annotated[
    str,
    _matcher(rf"({_LABEL}(\.{_LABEL})*/)?{_QUALIFIED}", 317, 'must be a label key such as "app" or "example.com/app"'),
]
LabelValue = Annotated[
    str,
    _matcher(
        rf"{_QUALIFIED}?", 63, 'must be at most 63 letters, digits, "-", "_" and ".", and end with a letter or digit'
    ),
]
Hostname = Annotated[
    str, _matcher(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", 253, 'must be a host name in lower case, or "*." and a host name')
]
HeaderName = Annotated[str, _matcher(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+", 256, "must be the name of an HTTP header")]
NodeName = Annotated[
    str, _matcher(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", 253, 'must be letters, digits, "-", "_" and "."')
]
TrustDomain = Annotated[str, _matcher(r"[a-z0-9._-]+", 255, 'must be lower case letters, digits, ".", "_" and "-"')]
PortName = Annotated[str, AfterValidator(_port_name)]
TargetPort = Annotated[int | str, PlainValidator(_target_port)]
Port = Annotated[int, Field(ge=1, le=65535)]
PortKey = Annotated[int, BeforeValidator(_port_key)]
Ip = Annotated[str, AfterValidator(_ip)]
Cidr = Annotated[str, AfterValidator(_cidr)]
Uid = Annotated[int, Field(ge=0, le=2**32 - 2)]
Duration = Annotated[float, BeforeValidator(_duration)]
PositiveDuration = Annotated[float, BeforeValidator(_duration), Field(gt=0)]
Timestamp = Annotated[datetime, BeforeValidator(_timestamp)]
Labels = dict[LabelKey, LabelValue]
NotYet = Annotated[Any, AfterValidator(_refuse_yet)]

T = TypeVar("T")
Items = Annotated[tuple[T, ...], Field(strict=False)]

Protocol = Literal["TCP", "UDP", "SCTP"]
MtlsMode = Literal["DISABLE", "PERMISSIVE", "STRICT"]
FailurePolicy = Literal["open", "closed"]


def _problems(*problems: tuple[FieldPath, str]) -> PydanticCustomError:
    """Several problems of one model, each at a path below it."""
    return PydanticCustomError("problems", "invalid", {"problems": problems})


def _twice(values: list[Any], *field: str) -> list[tuple[FieldPath, str]]:
    """A problem for every value that an earlier item has already (None never counts)."""
    first: dict[Any, int] = {}
    found: list[tuple[FieldPath, str]] = []
    for index, value in enumerate(values):
        if value is None:
            continue
        if value in first:
            found.append(((index, *field), f"is the same as in item {first[value]}"))
        else:
            first[value] = index
    return found


def _below(field: str, problems: list[tuple[FieldPath, str]]) -> list[tuple[FieldPath, str]]:
    return [((field, *path), message) for path, message in problems]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=to_camel)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            known = {field.alias for field in cls.model_fields.values()}
            return {key: value for key, value in data.items() if value is not None or key not in known}
        return data


class ObjectMeta(_Model):
    name: DnsName
    namespace: DnsLabel = "default"
    labels: Labels = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    creation_timestamp: Timestamp | None = None
    generation: int = 0
    deletion_grace_period_seconds: Any = None
    deletion_timestamp: Any = None
    finalizers: Any = None
    generate_name: Any = None
    managed_fields: Any = None
    owner_references: Any = None
    resource_version: Any = None
    self_link: Any = None
    uid: Any = None


# --- core/v1 Service


class ServicePortSpec(_Model):
    port: Port
    name: PortName = ""
    target_port: TargetPort | None = None
    protocol: Protocol = "TCP"
    app_protocol: str = ""
    node_port: Any = None


class ServiceSpec(_Model):
    selector: Labels = Field(default_factory=dict)
    ports: Items[ServicePortSpec] = ()
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ip: str = Field("", alias="clusterIP")
    cluster_ips: Annotated[Items[str], Field(alias="clusterIPs", max_length=2)] = ()
    session_affinity: Literal["None", "ClientIP"] = "None"
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    allocate_load_balancer_node_ports: Any = None
    external_ips: Any = Field(None, alias="externalIPs")
    external_name: Any = None
    external_traffic_policy: Any = None
    health_check_node_port: Any = None
    ip_families: Any = None
    ip_family_policy: Any = None
    load_balancer_class: Any = None
    load_balancer_ip: Any = Field(None, alias="loadBalancerIP")
    load_balancer_source_ranges: Any = None
    publish_not_ready_addresses: Any = None
    session_affinity_config: Any = None
    traffic_distribution: Any = None

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
        found = _below("ports", _twice([(p.port, p.protocol) for p in self.ports], "port"))
        found += _below("ports", _twice([p.name or None for p in self.ports], "name"))
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
            raise _problems(*found)
        return self

    def _check_cluster_ips(self) -> list[tuple[FieldPath, str]]:
        found: list[tuple[FieldPath, str]] = []
        declared: list[tuple[FieldPath, str]] = [(("clusterIP",), self.cluster_ip)] if self.cluster_ip else []
        declared += [(("clusterIPs", i), text) for i, text in enumerate(self.cluster_ips)]
        for path, text in declared:
            if text != "None":
                try:
                    _ip(text)
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
    name: DnsLabel


class Service(_Model):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: ServiceMeta
    spec: ServiceSpec
    status: Any = None


# --- discovery.k8s.io/v1 EndpointSlice


class EndpointConditions(_Model):
    ready: bool = True
    serving: bool | None = None
    terminating: bool = False


class SliceEndpoint(_Model):
    addresses: Annotated[Items[Ip], Field(min_length=1, max_length=100)]
    conditions: EndpointConditions = EndpointConditions()
    deprecated_topology: Any = None
    hints: Any = None
    hostname: Any = None
    node_name: Any = None
    target_ref: Any = None
    zone: Any = None

    @property
    def ready(self) -> bool:
        return self.conditions.ready and not self.conditions.terminating


class SlicePort(_Model):
    port: Port
    name: PortName = ""
    protocol: Protocol = "TCP"
    app_protocol: str = ""


class EndpointSlice(_Model):
    api_version: Literal["discovery.k8s.io/v1"]
    kind: Literal["EndpointSlice"]
    metadata: ObjectMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: Annotated[Items[SliceEndpoint], Field(max_length=1000)] = ()
    ports: Annotated[Items[SlicePort], Field(max_length=20_000)] = ()

    @property
    def service_name(self) -> str:
        return self.metadata.labels.get("kubernetes.io/service-name", "")

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = _below("ports", _twice([p.name for p in self.ports], "name"))
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
            raise _problems(*found)
        return self


# --- gateway.networking.k8s.io/v1 HTTPRoute


class ParentRef(_Model):
    name: DnsName
    group: str = GATEWAY_GROUP
    kind: str = "Gateway"
    namespace: DnsLabel | None = None
    port: Port | None = None
    section_name: str | None = None


class BackendRef(_Model):
    name: DnsName
    group: str = ""
    kind: str = "Service"
    namespace: DnsLabel | None = None
    port: Port | None = None
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    filters: NotYet = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port is None and self.kind == "Service" and not self.group:
            raise _problems((("port",), "required for a Service"))
        return self


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


class PathMatch(_Model):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: Annotated[str, Field(max_length=1024)] = "/"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "RegularExpression":
            raise _problems((("type",), f"RegularExpression is {NOT_YET}"))
        if problem := _path_problem(self.value):
            raise _problems((("value",), problem))
        return self


class HeaderMatchSpec(_Model):
    name: HeaderName
    value: Annotated[str, Field(min_length=1, max_length=4096)]
    type: Literal["Exact", "RegularExpression"] = "Exact"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "RegularExpression":
            raise _problems((("type",), f"RegularExpression is {NOT_YET}"))
        return self


class RouteMatch(_Model):
    path: PathMatch = PathMatch()
    headers: Annotated[Items[HeaderMatchSpec], Field(max_length=16)] = ()
    query_params: NotYet = None
    method: NotYet = None


class RouteTimeouts(_Model):
    request: Duration = 0.0
    backend_request: NotYet = None


class RouteRule(_Model):
    name: DnsName | None = None
    matches: Annotated[Items[RouteMatch], Field(max_length=MAX_MATCHES)] = ()
    backend_refs: Annotated[Items[BackendRef], Field(max_length=16)] = ()
    timeouts: RouteTimeouts = RouteTimeouts()
    filters: NotYet = None
    retry: NotYet = None
    session_persistence: NotYet = None


class HTTPRouteSpec(_Model):
    parent_refs: Annotated[Items[ParentRef], Field(max_length=32)] = ()
    hostnames: Annotated[Items[Hostname], Field(max_length=16)] = ()
    rules: Annotated[Items[RouteRule], Field(min_length=1, max_length=16)] = (RouteRule(),)

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = _below("parentRefs", _twice(list(self.parent_refs)))
        found += _below("rules", _twice([rule.name for rule in self.rules], "name"))
        total = sum(len(rule.matches) for rule in self.rules)
        if total > MAX_MATCHES_PER_ROUTE:
            found.append((("rules",), f"has {total} matches in all, at most {MAX_MATCHES_PER_ROUTE} are allowed"))
        if found:
            raise _problems(*found)
        return self


class HTTPRoute(_Model):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: ObjectMeta
    spec: HTTPRouteSpec
    status: Any = None


# --- netproxy.mesh/v1alpha1


def _netns(path: str) -> str:
    if not path.startswith("/") or posixpath.normpath(path) != path or "\0" in path or path.startswith("//"):
        raise ValueError('must be an absolute path without ".." or a "/" at its end')
    return path


class Attach(_Model):
    """Where the workload lives, so that its traffic can be steered."""

    netns: Annotated[str, AfterValidator(_netns)] | None = None
    systemd_unit: NotYet = None
    cgroup: NotYet = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.netns is None:
            raise _problems((("netns",), "required: the path of the workload's network namespace"))
        return self


class WorkloadPort(_Model):
    port: Port
    name: PortName = ""
    app_protocol: str = ""


class WorkloadDns(_Model):
    """What becomes of the names that a workload asks for."""

    capture: bool = True
    """Queries to port 53, UDP and TCP, are answered by netproxy: names of the mesh from its configuration, others
    by the nameservers. False leaves them alone; then only addresses that are dialled can be routed."""
    nameservers: Annotated[Items[Ip], Field(max_length=8)] = ()
    """Resolvers for names that are none of the mesh, in order of preference, dialled from the workload's network.
    Left out: those of the workload's resolv.conf."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := _below("nameservers", _twice(list(self.nameservers))):
            raise _problems(*found)
        return self


_Ports = Annotated[Items[Port], Field(max_length=256)]
_Cidrs = Annotated[Items[Cidr], Field(max_length=256)]


class OutboundTraffic(_Model):
    """Which connections that the workload makes are steered. An exclusion wins over an inclusion, and virtual
    addresses of the mesh are steered always."""

    include_ports: _Ports = ()
    """Only connections to these ports are steered. Left out: all."""
    exclude_ports: _Ports = ()
    """Connections to these ports are not steered."""
    include_cidrs: _Cidrs = ()
    """Only connections to these addresses or networks are steered. Left out: all."""
    exclude_cidrs: _Cidrs = ()
    """Connections to these addresses or networks are not steered."""
    exclude_uids: Annotated[Items[Uid], Field(max_length=64)] = ()
    """Connections of processes of these users (numbers) are not steered."""


class InboundTraffic(_Model):
    """Which connections to the workload are steered. What is not steered reaches it as it came."""

    include_ports: _Ports = ()
    """Only connections to these ports are steered. Left out: all."""
    exclude_ports: _Ports = ()
    """Connections to these ports are not steered."""
    exclude_cidrs: _Cidrs = ()
    """Connections from these addresses or networks are not steered."""


class WorkloadTraffic(_Model):
    """What is steered. Lists may be given in any order; networks that overlap are merged."""

    outbound: OutboundTraffic = OutboundTraffic()
    """Of connections that the workload makes."""
    inbound: InboundTraffic = InboundTraffic()
    """Of connections to the workload."""


class WorkloadSpec(_Model):
    """`node` unset means the node that reads it. Without `attach` the workload is known but not steered."""

    addresses: Annotated[Items[Ip], Field(min_length=1, max_length=16)]
    node: NodeName | None = None
    service_account: DnsName = "default"
    attach: Attach | None = None
    failure_policy: FailurePolicy | None = None
    ports: Annotated[Items[WorkloadPort], Field(max_length=1000)] = ()
    dns: WorkloadDns = WorkloadDns()
    traffic: WorkloadTraffic = WorkloadTraffic()

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = _below("addresses", _twice(list(self.addresses)))
        found += _below("ports", _twice([p.port for p in self.ports], "port"))
        found += _below("ports", _twice([p.name or None for p in self.ports], "name"))
        if found:
            raise _problems(*found)
        return self


class Workload(_Model):
    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["Workload"]
    metadata: ObjectMeta
    spec: WorkloadSpec
    status: Any = None


class VipCidrs(_Model):
    ipv4: Annotated[str, _network(4, 24)] = "240.240.0.0/16"
    ipv6: Annotated[str, _network(6, 112)] = "fd00:240::/32"


_MESH, _LOG = MeshShard(), AccessLog()
"""The defaults: what a mesh without a MeshConfig has."""


class AccessLogSpec(_Model):
    """Which requests and connections are logged: a share of all, and besides those whatever one of the others names."""

    percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = _LOG.percent
    """Of all requests and connections, chosen at random. 0: none because of this field, 100: all."""
    min_status: Annotated[int, Field(ge=100, le=599)] | None = None
    """All requests answered with this HTTP status or a higher one."""
    min_duration: PositiveDuration | None = None
    """All requests and connections that took this long or longer."""
    flags: Annotated[Items[Annotated[str, AfterValidator(_flag)]], Field(max_length=64)] = _LOG.flags
    """All that ended with one of these response flags, such as UF (no connection to the endpoint)."""


class MeshConfigSpec(_Model):
    """What holds for the whole mesh. Times are durations such as "1h30m" or "500ms", sizes are in octets."""

    trust_domain: TrustDomain = _MESH.trust_domain
    outbound_policy: Literal["allow", "deny"] = _MESH.outbound_policy
    failure_policy: FailurePolicy = "open"
    steering: Literal["auto", "nftables", "iptables"] = "auto"
    """How traffic gets to the proxy. auto takes nftables where a probe of the kernel finds it, else iptables."""
    opaque_ports: Items[Port] = _MESH.opaque_ports
    vip_cidrs: VipCidrs = VipCidrs()
    cluster_domain: DnsName = _MESH.cluster_domain
    """The names of Services end with it: <service>.<namespace>.svc.<clusterDomain>."""
    detect_timeout: PositiveDuration = _MESH.detect_timeout_s
    header_timeout: PositiveDuration = _MESH.header_timeout_s
    idle_timeout: PositiveDuration = _MESH.idle_timeout_s
    connect_timeout: PositiveDuration = _MESH.connect_timeout_s
    handshake_timeout: PositiveDuration = _MESH.handshake_timeout_s
    pool_idle_timeout: PositiveDuration = _MESH.pool_idle_s
    tcp_idle_timeout: PositiveDuration = _MESH.tcp_idle_timeout_s
    expect_continue_timeout: PositiveDuration = _MESH.expect_continue_timeout_s
    """How long an upstream may keep silent about "Expect: 100-continue" before the proxy itself says 100."""
    max_head_bytes: Annotated[int, Field(ge=1024, le=1024 * 1024)] = _MESH.max_head_bytes
    max_headers: Annotated[int, Field(ge=1, le=10_000)] = _MESH.max_headers
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = _MESH.max_connections
    buffer_bytes: Annotated[int, Field(ge=4096, le=64 * 1024 * 1024)] = _MESH.buffer_bytes
    header_case: Literal["lower", "preserve"] = _MESH.header_case
    """How names of HTTP/1.1 header fields are passed on: in lower case, or as they came."""
    forwarded: Literal["append", "set", "preserve"] = _MESH.forwarded
    """What becomes of x-forwarded-for and x-forwarded-proto of a request that comes in: the client is added to what
    is there, replaces it, or nothing is touched."""
    request_id: bool = _MESH.request_id
    """A request without x-request-id gets one."""
    via: Annotated[
        str, _matcher(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]*", 64, "must be a token (RFC 9110) of letters and digits")
    ] = _MESH.via
    """The name under which the proxy adds itself to "via" (RFC 9110 section 7.6.3). Empty: it does not."""
    access_log: AccessLogSpec = AccessLogSpec()
    """Which requests and connections are logged. Left out: none."""
    dns_timeout: PositiveDuration = _MESH.dns_timeout_s
    """How long a forwarded DNS query waits for its answer."""
    dns_max_outstanding: Annotated[int, Field(ge=1, le=60_000)] = _MESH.dns_max_outstanding
    """How many forwarded DNS queries may wait for their answer, per worker."""


class MeshConfig(_Model):
    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["MeshConfig"]
    metadata: ObjectMeta
    spec: MeshConfigSpec = MeshConfigSpec()
    status: Any = None


class MtlsSetting(_Model):
    mode: MtlsMode


class LabelSelector(_Model):
    match_labels: Labels = Field(default_factory=dict)


class PeerAuthenticationSpec(_Model):
    """`mtls` left out takes the mode from the wider policy. An empty selector is no selector."""

    selector: LabelSelector = LabelSelector()
    mtls: MtlsSetting | None = None
    port_level_mtls: dict[PortKey, MtlsSetting] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port_level_mtls and not self.selector.match_labels:
            raise _problems((("portLevelMtls",), "needs selector.matchLabels"))
        return self


class PeerAuthentication(_Model):
    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["PeerAuthentication"]
    metadata: ObjectMeta
    spec: PeerAuthenticationSpec = PeerAuthenticationSpec()
    status: Any = None


Resource = Service | EndpointSlice | HTTPRoute | Workload | MeshConfig | PeerAuthentication
R_co = TypeVar("R_co", bound=Resource, covariant=True)


@dataclass(frozen=True, slots=True)
class Object(Generic[R_co]):
    """A valid resource and where it was written."""

    resource: R_co
    document: Document

    @property
    def name(self) -> str:
        """``ns/name``"""
        return f"{self.resource.metadata.namespace}/{self.resource.metadata.name}"

    @property
    def title(self) -> str:
        """``Kind ns/name``, as in `ConfigError.obj`."""
        return f"{self.resource.kind} {self.name}"

    @property
    def age(self) -> tuple[float, str]:
        """Sorts oldest first, then by name. An object without a creationTimestamp is younger than any with one."""
        created = self.resource.metadata.creation_timestamp
        return (created.timestamp() if created else float("inf"), self.name)

    def error(self, message: str, *path: str | int) -> ConfigError:
        document = self.document
        return ConfigError(
            message, file=document.file, line=document.line_of(path), obj=self.title, field=field_text(path)
        )


_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def field_text(path: FieldPath) -> str:
    """``spec.rules[0].weight``; ``metadata.labels[example.com/app]``"""
    text = ""
    for part in path:
        if isinstance(part, int) or _PLAIN_KEY.fullmatch(part) is None:
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
