# cython: annotation_typing=False
"""What follows from the facts of a connection, whatever it carries: mesh TLS or not, and who talks to whom."""

from __future__ import annotations

from ..addr import EndpointAddr, ServiceKey, SpiffeId, WorkloadKey
from ..config.shard import WorkloadShard
from ..decide.route import Choice
from ..errors import UpstreamError
from ..identity.tls import ALPN_HTTP1
from ..log import debug, debugging
from ..observe.record import Parties, Who
from ..stream import Stream
from ..upstream.pool import PoolKey
from .services import Facts, Services

_MAX_PATHS = 64


class Path:
    """From one connection to one endpoint: what is the same for all of its requests."""

    def __init__(self, facts: Facts, services: Services, choice: Choice) -> None:
        self.service = choice.service
        self.identity = mesh_identity(facts, choice)
        tls = f"{ALPN_HTTP1} {self.identity}" if self.identity else ""
        self.key = PoolKey(facts.workload, choice.endpoint.addr, tls)
        """Of a connection of HTTP/1.1."""
        self.shared_keys: dict[str, PoolKey] = {}
        """Of connections of HTTP/2, by their ALPN protocol."""
        self.who = Who(parties(facts, services, choice), security(facts, choice))


def path_to(facts: Facts, services: Services, choice: Choice) -> Path:
    """Made anew after each change of the configuration."""
    paths, version = facts.paths, services.tables.version
    if facts.paths_version != version or len(paths) >= _MAX_PATHS:
        paths.clear()
        facts.paths_version = version
    path = paths.get(choice.endpoint)
    if path is None or path.service != choice.service:
        path = paths[choice.endpoint] = Path(facts, services, choice)
    return path


def must_be_mesh_tls(facts: Facts, shard: WorkloadShard) -> bool:
    """Is this an inbound connection without a verified peer, to a port that now wants one?"""
    mode = shard.port_mtls.get(facts.dst.port, shard.mtls)
    return facts.inbound and mode == "STRICT" and not facts.peer


def mesh_identity(facts: Facts, choice: Choice) -> SpiffeId | None:
    """The identity that the endpoint must prove, None when mesh TLS is not used to it.

    Never towards the own application: an inbound leg, or a workload that calls itself (local traffic does
    not pass its own inbound steering).
    """
    endpoint = choice.endpoint.endpoint
    if facts.inbound or not endpoint.meshed or endpoint.host in facts.shard.addresses:
        return None
    return endpoint.identity


async def dial(
    services: Services,
    facts: Facts,
    choice: Choice,
    endpoint: EndpointAddr,
    alpn: tuple[str, ...],
    *,
    connect_s: float = 0.0,
) -> Stream:
    """A stream to the chosen endpoint, as this workload; mesh TLS if the endpoint is meshed. Raises UpstreamError.

    `alpn`: what is offered to an agent, which chooses. `connect_s`: less than the connect timeout of the mesh, when
    others may have to be tried.
    """
    theirs = mesh_identity(facts, choice)
    tls = (facts.shard.identity, theirs, alpn) if theirs is not None else None
    mesh = services.tables.mesh
    timeouts_s = (connect_s or mesh.connect_timeout_s, mesh.handshake_timeout_s)
    try:
        return await services.dialer.dial(facts.workload, endpoint, timeouts_s, tls=tls, high_water=mesh.buffer_bytes)
    except UpstreamError as exc:
        if debugging():
            debug(f"{facts.workload} could not reach {exc.detail or endpoint}: {exc.reason.name}")
        raise


def parties(facts: Facts, services: Services, choice: Choice | None) -> Parties:
    own = f"{facts.shard.namespace}/{facts.shard.name}"
    if facts.inbound:
        source = services.tables.workload_at(facts.client.host)
        name = f"{source.namespace}/{source.name}" if source is not None else "unknown"
        return Parties("destination", name, facts.peer or "unknown", own, "")
    external = facts.egress.external if facts.egress is not None else None
    service = facts.port.service if facts.port else external.service if external else ServiceKey("")
    if choice is not None and choice.service:
        service = choice.service
    workload: WorkloadKey | str = choice.endpoint.endpoint.workload if choice is not None else ""
    return Parties("source", own, facts.shard.identity, workload or "unknown", service)


def security(facts: Facts, choice: Choice | None) -> str:
    if facts.inbound:
        return "mutual_tls" if facts.peer else "none"
    return "mutual_tls" if choice is not None and mesh_identity(facts, choice) is not None else "none"
