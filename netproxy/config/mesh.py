"""Our own kinds. The texts under the fields are those of the reference."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from .fields import (
    Cidr,
    DnsName,
    ExternalCidr,
    ExternalIp,
    ExternalName,
    FailurePolicy,
    FieldPath,
    Flag,
    Ignored,
    Ip,
    Items,
    Labels,
    Model,
    MtlsMode,
    NodeName,
    ObjectMeta,
    Port,
    PortKey,
    PortName,
    PositiveDuration,
    SteeringPreference,
    Token,
    TrustDomain,
    Uid,
    Vip4Network,
    Vip6Network,
    below,
    problems,
    twice,
)
from .shard import AccessLog, MeshShard

MESH_API = "netproxy.mesh/v1alpha1"


# --- Workload


_is_unit = re.compile(r"[A-Za-z0-9:_.\\@-]{1,200}\.(?:service|scope|slice)").fullmatch


def _unit(name: str) -> str:
    if not _is_unit(name):
        raise ValueError('must be the name of a unit such as "reviews.service"')
    return name


def _netns(path: str) -> str:
    if not path.startswith("/") or posixpath.normpath(path) != path or "\0" in path or path.startswith("//"):
        raise ValueError('must be an absolute path without ".." or a "/" at its end')
    return path


def _cgroup(path: str) -> str:
    if _netns(path) == "/":
        raise ValueError("the root is everybody's")
    return path


class Attach(Model):
    """One of them. A cgroup or a unit is a service of the host: it lives in the agent's own network namespace, which it
    need not have for itself, and is steered by eBPF only."""

    netns: Annotated[str, AfterValidator(_netns)] | None = None
    """The path of the workload's network namespace, such as `/run/netns/reviews`. It may appear later."""
    systemd_unit: Annotated[str, AfterValidator(_unit)] | None = None
    """The unit whose processes it is, such as `reviews.service`. It may be started later, and again."""
    cgroup: Annotated[str, AfterValidator(_cgroup)] | None = None
    """The path of its cgroup below the mount of cgroup2, such as `/machine.slice/reviews`. It may appear later."""

    @property
    def is_host(self) -> bool:
        return self.netns is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("netns", "systemd_unit", "cgroup") if getattr(self, name) is not None]
        if not given:
            raise problems((("netns",), "one of netns, systemdUnit and cgroup is required"))
        if len(given) > 1:
            raise problems(((given[1],), "the other one says already where it lives"))
        return self


class WorkloadPort(Model):
    port: Port
    """A port that the workload listens on."""
    name: PortName = ""
    """What Services may call it in `targetPort`. It declares the protocol as the name of a Service's port does."""
    app_protocol: str = ""
    """As of a Service's port, for what comes in; it wins over what Services say. Left out: what the Services of the
    port agree on, else the first octets of a connection decide."""


class WorkloadDns(Model):
    capture: bool = True
    """Queries to port 53, UDP and TCP, are answered by netproxy: names of the mesh from its configuration, others
    by the nameservers. False leaves them alone; then only what is dialled by address can be routed."""
    nameservers: Annotated[Items[Ip], Field(max_length=8)] = ()
    """Resolvers for names that are none of the mesh, in order of preference, dialled from the workload's network.
    Left out: those of the workload's resolv.conf. Under `outboundPolicy: deny` they also say where a host of an
    ExternalService without `endpoints` is; then loopback, and the resolv.conf of a process (`/proc/PID/ns/net`), are
    not taken for that, since they are the workload's own word."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := below("nameservers", twice(list(self.nameservers))):
            raise problems(*found)
        return self


_Ports = Annotated[Items[Port], Field(max_length=256)]
_Cidrs = Annotated[Items[Cidr], Field(max_length=256)]


class OutboundTraffic(Model):
    include_ports: _Ports = ()
    """Only connections to these ports are steered. Left out: all."""
    exclude_ports: _Ports = ()
    """Connections to these ports are not steered."""
    include_cidrs: _Cidrs = ()
    """Only connections to these addresses or networks are steered. Left out: all."""
    exclude_cidrs: _Cidrs = ()
    """Connections to these addresses or networks are not steered."""
    exclude_uids: Annotated[Items[Uid], Field(max_length=64)] = ()
    """Connections of processes of these users, by number, are not steered."""


class InboundTraffic(Model):
    include_ports: _Ports = ()
    """Only connections to these ports are steered. Left out: all."""
    exclude_ports: _Ports = ()
    """Connections to these ports are not steered."""
    exclude_cidrs: _Cidrs = ()
    """Connections from these addresses or networks are not steered."""


class WorkloadTraffic(Model):
    outbound: OutboundTraffic = OutboundTraffic()
    """Which of the connections that the workload makes. An exclusion wins over an inclusion, and the virtual addresses
    of the mesh are always steered."""
    inbound: InboundTraffic = InboundTraffic()
    """Which of the connections to the workload. An exclusion wins over an inclusion. What is not steered reaches the
    workload as it came: mesh TLS is not taken off, and plaintext comes in even if mesh TLS is required."""


class WorkloadSpec(Model):
    addresses: Annotated[Items[Ip], Field(min_length=1, max_length=16)]
    """The workload's own addresses. No other Workload and no Service may have them."""
    node: NodeName | None = None
    """The node that it runs on. Left out: the node that reads the file."""
    service_account: DnsName = "default"
    """Its identity is `spiffe://<trustDomain>/ns/<namespace>/sa/<serviceAccount>`."""
    attach: Attach | None = None
    """Where it lives. Left out: the workload is known, but not steered, and gets no mesh TLS."""
    failure_policy: FailurePolicy | None = None
    """What becomes of its traffic while no agent runs. `open`: it flows unsteered; `closed`: it is refused. Left
    out: MeshConfig says."""
    steering: SteeringPreference | None = None
    """How its traffic gets to the proxy. Left out: MeshConfig says. A change closes no connection."""
    ports: Annotated[Items[WorkloadPort], Field(max_length=1000)] = ()
    """What it listens on. Only ports that something is to be said about need to be named; of a service of the host (see
    `attach`) all that shall be steered, since others on the host may listen on the rest."""
    dns: WorkloadDns = WorkloadDns()
    """Who answers the names that it asks for."""
    traffic: WorkloadTraffic = WorkloadTraffic()
    """What of its traffic is steered. Left out: all TCP. Networks in its lists that overlap are merged."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = below("addresses", twice(list(self.addresses)))
        found += below("ports", twice([p.port for p in self.ports], "port"))
        found += below("ports", twice([p.name or None for p in self.ports], "name"))
        if self.attach is not None and self.attach.is_host and self.steering in ("nftables", "iptables"):
            found.append((("steering",), "a service of the host is steered by eBPF only"))
        if found:
            raise problems(*found)
        return self


class Workload(Model):
    """One pod, container or process with a network of its own. Services select it by its labels."""

    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["Workload"]
    metadata: ObjectMeta
    spec: WorkloadSpec
    status: Ignored = None


# --- ExternalService


class ExternalPort(Model):
    port: Port
    """The port that workloads dial."""
    protocol: Literal["TLS", "HTTP", "TCP"]
    """TLS is relayed and known by its server name (SNI), HTTP is known by its Host and proxied, TCP is relayed and
    known by its address alone."""
    name: PortName = ""
    """For people."""
    target_port: Port | None = None
    """The port of the endpoints of `hosts`. Left out: the same as `port`."""


class ExternalServiceSpec(Model):
    hosts: Annotated[Items[ExternalName], Field(max_length=64)] = ()
    """Names, such as `api.example.com`, or `*.example.com` for all names below it at any depth, but not itself. A
    name has one ExternalService. Each name that is not a wildcard gets virtual addresses that are kept; a workload that
    asks for the name is told those. At any other address, TLS and HTTP are known by SNI or Host."""
    addresses: Annotated[Items[ExternalCidr], Field(max_length=256)] = ()
    """Addresses and networks. What is dialled there, on one of the ports, goes there; with `hosts`, TLS and HTTP only
    if SNI or Host is one of them. A network has one ExternalService per port, unless hosts tell several apart."""
    ports: Annotated[Items[ExternalPort], Field(min_length=1, max_length=64)]
    """What may be called."""
    endpoints: Annotated[Items[ExternalIp], Field(max_length=64)] = ()
    """Where the hosts are. Left out: what their names resolve to."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = below("hosts", twice(list(self.hosts)))
        found += below("addresses", twice(list(self.addresses)))
        found += below("ports", twice([p.port for p in self.ports], "port"))
        found += below("ports", twice([p.name or None for p in self.ports], "name"))
        found += below("endpoints", twice(list(self.endpoints)))
        if not self.hosts and not self.addresses:
            found.append((("hosts",), "hosts, addresses or both are required"))
        elif not self.hosts:
            text = "needs hosts: what is dialled by address goes to that address and port"
            if self.endpoints:
                found.append((("endpoints",), text))
            found += [(("ports", i, "targetPort"), text) for i, p in enumerate(self.ports) if p.target_port is not None]
        found += self._check_tcp()
        if found:
            raise problems(*found)
        return self

    def _check_tcp(self) -> list[tuple[FieldPath, str]]:
        wildcard = next((i for i, host in enumerate(self.hosts) if host.startswith("*.")), None)
        if wildcard is None:
            return []
        text = f"TCP can't tell the names of a wildcard (hosts[{wildcard}]) apart: use TLS or HTTP, or list the names"
        return [(("ports", i, "protocol"), text) for i, p in enumerate(self.ports) if p.protocol == "TCP"]


class ExternalService(Model):
    """Something outside of the mesh that workloads of every namespace may call. With MeshConfig `outboundPolicy: deny`
    the ExternalServices are the list of what may be called at all; with `allow` they name it in metrics and logs.

    Of several that fit a connection, a virtual address comes before a network, and both before SNI or Host. Of networks
    the smallest wins, of names the exact one, then the longest wildcard. What is dialled by virtual address or by name
    goes to the endpoints, or to what the name resolves to, whatever address the client gave with the name."""

    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["ExternalService"]
    metadata: ObjectMeta
    spec: ExternalServiceSpec
    status: Ignored = None


# --- MeshConfig


class VipCidrs(Model):
    ipv4: Vip4Network = "240.240.0.0/16"
    """For IPv4: a /24 or larger."""
    ipv6: Vip6Network = "fd00:240::/32"
    """For IPv6: a /112 or larger."""


_MESH, _LOG = MeshShard(), AccessLog()
"""The defaults: what a mesh without a MeshConfig has."""


class AccessLogSpec(Model):
    percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = _LOG.percent
    """Of all requests, chosen by their id, so that both agents log the same ones, and of all connections, at random.
    0: none for this reason; 100: all."""
    min_status: Annotated[int, Field(ge=100, le=599)] | None = None
    """All requests that were answered with this HTTP status or a higher one."""
    min_duration: PositiveDuration | None = None
    """All requests and connections that took this long or longer."""
    flags: Annotated[Items[Flag], Field(max_length=64)] = _LOG.flags
    """All that ended with one of these [response flags](#response-flags), such as `UF` or `UH`."""


class TracingSpec(Model):
    percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    """Of the traces that begin here, so many are sampled. What the caller has decided is kept."""


class MeshConfigSpec(Model):
    """Times are durations such as `1h30m` or `500ms`, sizes are in octets."""

    trust_domain: TrustDomain = _MESH.trust_domain
    """The first part of all identities."""
    outbound_policy: Literal["allow", "deny"] = _MESH.outbound_policy
    """What becomes of TCP connections to what is neither in the mesh nor an ExternalService: relayed as they are, or
    refused. Both are counted. What is not steered is not asked: UDP (QUIC with it), and what `Workload.traffic`
    excludes."""
    failure_policy: FailurePolicy = "open"
    """Of Workloads that do not say it themselves."""
    steering: SteeringPreference = "auto"
    """How traffic gets to the proxy. `auto` takes eBPF if a probe of the kernel finds that it works, else nftables,
    else iptables. With iptables every workload's failure policy is `closed`. A
    Workload may say something else."""
    opaque_ports: Annotated[Items[Port], Field(max_length=1000)] = _MESH.opaque_ports
    """Ports whose connections are relayed unread unless something declares them otherwise: servers that speak first."""
    vip_cidrs: VipCidrs = VipCidrs()
    """The networks that virtual addresses are chosen from. Nothing else may use them; what changes here moves them."""
    cluster_domain: DnsName = _MESH.cluster_domain
    """The end of the full names of Services: `<service>.<namespace>.svc.<clusterDomain>`."""
    detect_timeout: PositiveDuration = _MESH.detect_timeout_s
    """How long the first octets of a connection are waited for where the protocol is not declared. Then it is
    relayed unread, or closed where only HTTP may pass."""
    header_timeout: PositiveDuration = _MESH.header_timeout_s
    """For the whole head of a request, from its first octet."""
    idle_timeout: PositiveDuration = _MESH.idle_timeout_s
    """How long an HTTP connection, or a relayed one that is closed in one direction, may be without any octet."""
    connect_timeout: PositiveDuration = _MESH.connect_timeout_s
    """For the connection to an endpoint."""
    handshake_timeout: PositiveDuration = _MESH.handshake_timeout_s
    """For the handshake of mesh TLS, once the connection is there."""
    tls_resumption: bool = _MESH.tls_resumption
    """Whether a handshake of mesh TLS may go on from an earlier one of the same two workloads, for half of the CPU: for
    2 h at most, never past the end of a certificate, and never with another certificate or other roots."""
    pool_idle_timeout: PositiveDuration = _MESH.pool_idle_s
    """How long a connection to an endpoint is kept for the next request. Below what servers allow (often 5 s)."""
    tcp_idle_timeout: PositiveDuration = _MESH.tcp_idle_timeout_s
    """How long a relayed connection may be without any octet."""
    expect_continue_timeout: PositiveDuration = _MESH.expect_continue_timeout_s
    """How long an upstream may keep silent about `Expect: 100-continue` before the proxy itself says 100."""
    max_head_bytes: Annotated[int, Field(ge=1024, le=1024 * 1024)] = _MESH.max_head_bytes
    """Of a request or answer, all header fields together; a larger request is answered 431."""
    max_headers: Annotated[int, Field(ge=1, le=10_000)] = _MESH.max_headers
    """Header fields of a request or answer; with more a request is answered 431."""
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = _MESH.max_connections
    """Open connections from clients, per worker. Past it new ones are refused and counted."""
    buffer_bytes: Annotated[int, Field(ge=4096, le=64 * 1024 * 1024)] = _MESH.buffer_bytes
    """What is held per connection and direction while the receiver is slow; then the sender has to wait."""
    header_case: Literal["lower", "preserve"] = _MESH.header_case
    """How the names of HTTP/1.1 header fields are passed on: in lower case, or as they came."""
    forwarded: Literal["append", "set", "preserve"] = _MESH.forwarded
    """What becomes of `x-forwarded-for` and `x-forwarded-proto` of a request that comes in: the client is added to
    what is there, replaces it, or nothing is touched."""
    request_id: bool = _MESH.request_id
    """A request without `x-request-id` gets one."""
    via: Token = _MESH.via
    """The name under which the proxy adds itself to `via` (RFC 9110, section 7.6.3). Empty: it does not."""
    mesh_http: Literal["auto", "http1", "http2"] = _MESH.mesh_http
    """What HTTP/1.1 requests travel in between agents: connections of HTTP/1.1, one request at a time on each, or
    HTTP/2, where many share one. `auto` is what costs less CPU: `http2`. What is HTTP/2 at both ends (gRPC) always
    travels in HTTP/2; HTTP/1.1 with `headerCase: preserve`, an Upgrade, and what goes to an agent that does not know
    HTTP/2, in HTTP/1.1."""
    http2_max_streams: Annotated[int, Field(ge=1, le=10_000)] = _MESH.http2_max_streams
    """Requests at once on one HTTP/2 connection of a client, which is told so when it connects. More are refused."""
    http2_keepalive_interval: PositiveDuration | None = None
    """How long an HTTP/2 connection of a client may be silent before it is asked for a sign of life (PING). Left out:
    it is never asked."""
    http2_keepalive_timeout: PositiveDuration = _MESH.http2_keepalive_timeout_s
    """How long the answer may take before the connection is closed."""
    http2_max_upstream_streams: Annotated[int, Field(ge=1, le=10_000)] = _MESH.http2_max_upstream_streams
    """Requests at once on one HTTP/2 connection to an endpoint, if that allows as many. More are put on further
    connections."""
    tracing: TracingSpec | None = None
    """Requests are spans: each agent continues the trace that a request names (W3C Trace Context, else B3, which is
    passed on in its own form) or begins one. Left out: the fields of traces pass as they are."""
    access_log: AccessLogSpec = AccessLogSpec()
    """Which requests and connections are logged: a share of all, and besides those what any of the other fields names.
    Left out: none."""
    dns_timeout: PositiveDuration = _MESH.dns_timeout_s
    """How long a forwarded DNS query waits for its answer."""
    dns_max_outstanding: Annotated[int, Field(ge=1, le=60_000)] = _MESH.dns_max_outstanding
    """How many forwarded DNS queries may wait for their answer, per worker. One workload never has more than are
    free for the others, so half of all when it is alone."""


class MeshConfig(Model):
    """What holds for the whole mesh. A mesh has one at most; without one the defaults hold."""

    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["MeshConfig"]
    metadata: ObjectMeta
    spec: MeshConfigSpec = MeshConfigSpec()
    status: Ignored = None


# --- PeerAuthentication


class MtlsSetting(Model):
    mode: MtlsMode
    """`PERMISSIVE`: mesh TLS between workloads of the mesh, and plaintext from others is taken too. `STRICT`: mesh TLS
    only. `DISABLE`: no mesh TLS."""


class LabelSelector(Model):
    match_labels: Labels = Field(default_factory=dict)
    """Workloads of the same namespace that have all these labels."""


class PeerAuthenticationSpec(Model):
    selector: LabelSelector = LabelSelector()
    """Which workloads it is for. Left out or empty: all of the namespace."""
    mtls: MtlsSetting | None = None
    """Left out: what the wider policy says."""
    port_level_mtls: dict[PortKey, MtlsSetting] = Field(default_factory=dict)
    """The mode of single ports of the selected workloads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port_level_mtls and not self.selector.match_labels:
            raise problems((("portLevelMtls",), "needs selector.matchLabels"))
        return self


class PeerAuthentication(Model):
    """Whether connections to workloads have to use mesh TLS. One with a selector comes before the one of the namespace,
    and that before the one of the namespace `netproxy-system`, which holds for the mesh. Of equals the oldest wins.
    Without any the mode is PERMISSIVE."""

    api_version: Literal["netproxy.mesh/v1alpha1"]
    kind: Literal["PeerAuthentication"]
    metadata: ObjectMeta
    spec: PeerAuthenticationSpec = PeerAuthenticationSpec()
    status: Ignored = None
