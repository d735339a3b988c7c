"""What every connection of a worker shares, and the facts of one connection."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Protocol

from ..addr import ClientAddr, OriginalDst, SpiffeId, WorkloadKey
from ..config.shard import WorkloadShard
from ..decide.egress import Permission
from ..decide.route import PortTable, Tables
from ..observe.access import AccessLogger
from ..observe.record import Recorder
from ..upstream.connect import Dialer
from ..upstream.pool import Pool

if TYPE_CHECKING:
    from .shared import SharedConnections
    from .upstream import UpstreamHttp


class Live(Protocol):
    """A live connection, as the worker's sweep and its shutdown see it."""

    workload: WorkloadKey

    def check(self, now: float) -> None:
        """Called about twice a second: end what is past its deadline."""

    def drain(self) -> None:
        """Finish what is under way, begin nothing new, then close."""

    def abort(self) -> None: ...


class Resolver(Protocol):
    """Names of hosts outside of the mesh, as a workload's own resolvers know them."""

    async def resolve(self, workload: WorkloadKey, name: str, family: int) -> Sequence[str]:
        """Canonical addresses in IP family 4 or 6, at least one. Raises UpstreamError with DNS_FAILED."""


def _new_id() -> bytes:
    return str(uuid.uuid4()).encode()


class _WallClock:
    """The present as in Date (RFC 9110 section 5.6.7), made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def __call__(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True).encode()
        return self._text


@dataclass(slots=True)
class Services:
    loop: asyncio.AbstractEventLoop
    now: Callable[[], float]
    tables: Tables
    pool: Pool[UpstreamHttp]
    dialer: Dialer
    recorder: Recorder
    live: set[Live] = field(default_factory=set)
    draining: bool = False
    resolver: Resolver | None = None
    new_id: Callable[[], bytes] = _new_id
    """For ``x-request-id``."""
    date: Callable[[], bytes] = field(default_factory=_WallClock)
    access: AccessLogger = field(default_factory=lambda: AccessLogger("", lambda: 0.0))
    shared: SharedConnections = field(init=False)
    """To endpoints, in HTTP/2. Set by who makes this."""


@dataclass(slots=True)
class Facts:
    """Of one accepted connection. `peer` is the verified identity of the other end, "" without mesh TLS.

    `port` is the service port whose VIP was dialled (outbound only); `families` are those that the
    workload's namespace can dial.
    """

    workload: WorkloadKey
    shard: WorkloadShard
    families: frozenset[int]
    inbound: bool
    client: ClientAddr
    dst: OriginalDst
    port: PortTable | None = None
    egress: Permission | None = None
    """Of an outbound connection that leaves the mesh; with HTTP each request has its own as well."""
    peer: SpiffeId = SpiffeId("")
    peer_sha256: str = ""
    began: float = 0.0
    """When the connection was accepted; 0.0: nobody looked."""
    as_http1: bool = False
    """What comes in HTTP/2 was HTTP/1.1 before the agents, and is to be so again."""
