"""Shards: the immutable pieces of a snapshot, as they travel to the workers.

One shard per service, per workload, per SVID, and one for the mesh. A shard names other shards by key
only where the builder has checked that the other exists; what does not exist is marked invalid in
the shard itself, so that no consumer can find a dangling reference.

The wire form is JSON. `key()` is ``<kind>/<namespace>/<name>`` (``mesh`` for the mesh), the key of the
supervisor's store.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from ..addr import ServiceKey, SpiffeId, WorkloadKey

MtlsMode = Literal["DISABLE", "PERMISSIVE", "STRICT"]
AppProtocol = Literal["auto", "http", "tcp"]
"""``auto`` sniffs; ``http`` refuses what is not HTTP; ``tcp`` never parses (app's own TLS, databases)."""
HttpVersion = Literal["", "1.1", "2"]
"""What the endpoints of a port are spoken to in; "": as the request came."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One ready or unready address of a backend. `workload` is "" when no Workload has this address.

    `identity` is set, and mesh TLS is used, exactly when `meshed` is true.
    """

    host: str
    port: int
    ready: bool = True
    workload: WorkloadKey = WorkloadKey("")
    identity: SpiffeId = SpiffeId("")
    meshed: bool = False


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    name: str
    """Lower case."""
    value: str
    kind: Literal["exact", "regex"] = "exact"


@dataclass(frozen=True, slots=True)
class QueryMatch:
    """The first parameter of that name counts. Names and values are case-sensitive, as decoded from a form."""

    name: str
    value: str
    kind: Literal["exact", "regex"] = "exact"


@dataclass(frozen=True, slots=True)
class Match:
    """All parts must match (AND). `path_kind` prefix matches by path element (Gateway API).

    Regular expressions are RE2's, valid, and match the whole path or value. `method` "" matches every method.
    """

    path_kind: Literal["exact", "prefix", "regex"] = "prefix"
    path: str = "/"
    headers: tuple[HeaderMatch, ...] = ()
    query: tuple[QueryMatch, ...] = ()
    method: str = ""


@dataclass(frozen=True, slots=True)
class Backend:
    """A weighted reference to ``service:port``. `invalid` says why it gets 500 for its share, "" when valid."""

    service: ServiceKey
    port: int
    weight: int = 1
    invalid: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a route. `name` is for people: ``HTTPRoute shop/reviews rule 0``."""

    name: str
    matches: tuple[Match, ...]
    backends: tuple[Backend, ...]
    request_timeout_s: float = 0.0
    """0: none."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service.

    `rules` is in order of precedence already and None when no route is attached (then requests go to
    the port's own endpoints); an empty tuple answers 404 to everything.
    """

    port: int
    name: str
    protocol: AppProtocol
    endpoints: tuple[Endpoint, ...]
    rules: tuple[Rule, ...] | None = None
    tcp_rule: Rule | None = None
    """Of a TCPRoute: its backends share the port's opaque connections. `matches` is empty."""
    http_version: HttpVersion = ""
    """Requests to `endpoints`, whatever route they come by, are of this version."""


@dataclass(frozen=True, slots=True)
class ServiceShard:
    namespace: str
    name: str
    vips: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    headless: bool = False
    """Its name means the addresses of its endpoints."""

    def key(self) -> str:
        return f"service/{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ExternalHost:
    """One name of an ExternalService. `vips` is empty for a wildcard ("*.example.com": any depth, not the apex)."""

    name: str
    """Lower case, without a dot at its end."""
    vips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExternalPort:
    """``tls`` is relayed and known by its SNI, ``http`` known by its Host, ``tcp`` opaque."""

    port: int
    name: str = ""
    protocol: Literal["tls", "http", "tcp"] = "tcp"
    target_port: int = 0
    """Where the endpoints listen; 0: on `port`."""


@dataclass(frozen=True, slots=True)
class ExternalShard:
    """Something outside of the mesh that workloads may call, from any namespace.

    Called by a VIP of a host (its name was asked for), by an address within `networks`, or, where `hosts` are given,
    at any address if SNI or Host is one of them. `endpoints`: where a named host is; () means what its name
    resolves to. Key of its ports in tables and metrics: ``external/<namespace>/<name>``.
    """

    namespace: str
    name: str
    hosts: tuple[ExternalHost, ...] = ()
    networks: tuple[str, ...] = ()
    """CIDRs; a single address is /32 or /128."""
    ports: tuple[ExternalPort, ...] = ()
    endpoints: tuple[str, ...] = ()

    def key(self) -> str:
        return f"external/{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class WorkloadShard:
    """A workload of any node. `local` workloads are steered on this node and have an SVID here.

    `port_mtls` overrides `mtls` by port, `protocols` declares the application protocol by port.
    """

    namespace: str
    name: str
    addresses: tuple[str, ...]
    identity: SpiffeId
    service_account: str
    labels: dict[str, str] = field(default_factory=dict)
    node: str = ""
    local: bool = False
    meshed: bool = False
    mtls: MtlsMode = "PERMISSIVE"
    port_mtls: dict[int, MtlsMode] = field(default_factory=dict)
    protocols: dict[int, AppProtocol] = field(default_factory=dict)
    nameservers: tuple[str, ...] = ()
    """Of a local one: addresses of the resolvers that get what is no name of the mesh, in order of preference."""
    host_ports: tuple[int, ...] | None = None
    """Of a service of the host those that come to its proxy: others at its addresses are somebody else's. None: all."""
    trusted_nameservers: tuple[str, ...] = ()
    """Those of them that the workload did not choose and can't be itself: where ``outboundPolicy: deny`` lets it go
    must not be its own word.
    """

    def key(self) -> str:
        return f"workload/{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class SvidShard:
    """Certificate chain and key (PEM) of a local identity, and the roots it trusts."""

    identity: SpiffeId
    chain_pem: str
    key_pem: str
    bundle_pem: str
    not_after: float
    """Unix time, seconds."""

    def key(self) -> str:
        return f"svid/{self.identity}"

    def __repr__(self) -> str:
        return f"SvidShard({self.identity!r}, not_after={self.not_after})"


@dataclass(frozen=True, slots=True)
class AccessLog:
    """Which requests and connections are logged: a share of all, and whatever is as said here."""

    percent: float = 0.0
    min_status: int = 0
    """0: the status makes nobody be logged. So do 0.0 and () below."""
    min_duration_s: float = 0.0
    flags: tuple[str, ...] = ()

    @property
    def off(self) -> bool:
        return not (self.percent or self.min_status or self.min_duration_s or self.flags)


@dataclass(frozen=True, slots=True)
class MeshShard:
    """What holds for the whole mesh. Times in seconds, sizes in octets."""

    trust_domain: str = "cluster.local"
    outbound_policy: Literal["allow", "deny"] = "allow"
    opaque_ports: tuple[int, ...] = (25, 53, 587, 3306, 4444, 5432, 6379, 9300, 11211, 27017)
    detect_timeout_s: float = 1.0
    header_timeout_s: float = 15.0
    idle_timeout_s: float = 300.0
    connect_timeout_s: float = 5.0
    handshake_timeout_s: float = 10.0
    """Of mesh TLS, after the connection is there: the peer is alive, but may be busy."""
    tls_resumption: bool = True
    pool_idle_s: float = 4.0
    """Below the 5 s after which common servers close an idle connection, so that we seldom meet them closing."""
    tcp_idle_timeout_s: float = 3600.0
    max_head_bytes: int = 64 * 1024
    max_headers: int = 256
    max_connections: int = 20_000
    buffer_bytes: int = 256 * 1024
    expect_continue_timeout_s: float = 1.0
    """So long an upstream may keep silent about ``Expect: 100-continue``; then we say 100. curl waits as long."""
    header_case: Literal["lower", "preserve"] = "lower"
    forwarded: Literal["append", "set", "preserve"] = "append"
    """What the workload's own agent does with ``x-forwarded-for`` and ``x-forwarded-proto`` of what comes in."""
    request_id: bool = True
    """A request without ``x-request-id`` gets one."""
    via: str = ""
    """Our name in ``via``; "": none is added."""
    mesh_http: Literal["auto", "http1", "http2"] = "auto"
    """What HTTP/1.1 requests travel in between agents. What is HTTP/2 at its ends always travels in HTTP/2."""
    http2_max_streams: int = 100
    """Requests at once on one HTTP/2 connection of a client."""
    http2_keepalive_s: float = 0.0
    """A client of HTTP/2 that is silent for so long is asked for a sign of life; 0.0: none is."""
    http2_keepalive_timeout_s: float = 20.0
    http2_max_upstream_streams: int = 100
    """On one HTTP/2 connection to an endpoint. RFC 9113 recommends that servers allow no fewer."""
    trace_percent: float = -1.0
    """Of new traces, so many are sampled; below 0: traces are neither begun nor continued, their fields pass."""
    access_log: AccessLog = AccessLog()
    cluster_domain: str = "cluster.local"
    dns_timeout_s: float = 4.0
    """For the answer to a forwarded query; glibc asks again after 5 s."""
    dns_max_outstanding: int = 1024
    """Forwarded queries that wait for an answer, per worker. One workload never has more than are free for others."""

    def key(self) -> str:
        return "mesh"


Shard = ServiceShard | ExternalShard | WorkloadShard | SvidShard | MeshShard

_KINDS: dict[str, type[Any]] = {
    "service": ServiceShard,
    "external": ExternalShard,
    "workload": WorkloadShard,
    "svid": SvidShard,
    "mesh": MeshShard,
}


@functools.cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[kind])


def preload() -> None:
    """Build all readers and writers now. pydantic imports modules at first use, which a worker no longer can
    when its user may not read the interpreter's files.
    """
    for kind in _KINDS:
        _adapter(kind)
    decode_shard("mesh", encode_shard(MeshShard()))


def encode_shard(shard: Shard) -> bytes:
    """Canonical: equal shards give equal bytes."""
    return _adapter(shard.key().partition("/")[0]).dump_json(shard)


def decode_shard(key: str, data: bytes) -> Shard:
    """Raises ValueError when `key` or `data` is not a shard's."""
    kind = key.partition("/")[0]
    if kind not in _KINDS:
        raise ValueError(f"unknown shard kind {kind!r}")
    shard: Shard = _adapter(kind).validate_json(data)
    return shard
