# cython: annotation_typing=False
"""What every connection of a worker shares, and the facts of one connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from email.utils import formatdate
from time import time as wall_time
from typing import TYPE_CHECKING, Protocol

from ..addr import ClientAddr, OriginalDst, SpiffeId, WorkloadKey
from ..config.shard import MeshShard, WorkloadShard
from ..decide.egress import Permission
from ..decide.route import EndpointState, PortTable, Tables
from ..observe.access import AccessLogger
from ..observe.record import Recorder
from ..observe.spans import Spans
from ..upstream.connect import Dialer
from ..upstream.pool import Pool
from .ids import UUID, Ids
from .trace import TraceIds

if TYPE_CHECKING:
    from .exchange import RequestEdits
    from .facts import Path
    from .shared import SharedConnections


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


class Stamps:
    """What each message gets of its own. A class, for tests to have others."""

    def __init__(self) -> None:
        self._ids = Ids(UUID, os.urandom)
        self._date = b""
        self._until = 0.0

    def request_id(self) -> bytes:
        """For ``x-request-id``: a random UUID."""
        return self._ids.take()

    def date(self, now: float) -> bytes:
        """The present as in Date (RFC 9110 section 5.6.7), made once a second of the clock that `now` is of: a wall
        clock that was set is followed within one."""
        if now >= self._until:
            wall = wall_time()
            self._date = formatdate(int(wall), usegmt=True).encode()
            self._until = now + 1.0 - wall % 1.0
        return self._date


class Services:
    shared: SharedConnections
    """To endpoints, in HTTP/2. Set by who makes this."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        tables: Tables,
        pool: Pool,
        dialer: Dialer,
        recorder: Recorder,
    ) -> None:
        self.loop = loop
        self.now = now
        self.tables = tables
        self.pool = pool
        self.dialer = dialer
        self.recorder = recorder
        self.live: set[Live] = set()
        self.draining = False
        self.resolver: Resolver | None = None
        self.stamps = Stamps()
        self.access = AccessLogger("", lambda: 0.0)
        self.trace_ids = TraceIds(os.urandom)
        self.spans = Spans(recorder.arena.count)
        self.wall: Callable[[], float] = wall_time


_NOBODY = SpiffeId("")


class Facts:
    """Of one accepted connection. `peer` is the verified identity of the other end, "" without mesh TLS.

    `port` is the service port whose VIP was dialled (outbound only); `families` are those that the
    workload's namespace can dial.
    """

    def __init__(
        self,
        workload: WorkloadKey,
        shard: WorkloadShard,
        families: frozenset[int],
        inbound: bool,
        client: ClientAddr,
        dst: OriginalDst,
        port: PortTable | None = None,
        *,
        egress: Permission | None = None,
        peer: SpiffeId = _NOBODY,
        peer_sha256: str = "",
    ) -> None:
        self.workload = workload
        self.shard = shard
        self.families = families
        self.inbound = inbound
        self.client = client
        self.dst = dst
        self.port = port
        self.egress = egress
        """Of an outbound connection that leaves the mesh; with HTTP each request has its own as well."""
        self.peer = peer
        self.peer_sha256 = peer_sha256
        self.began = 0.0
        """When the connection was accepted; 0.0: nobody looked."""
        self.as_http1 = False
        """What comes in HTTP/2 was HTTP/1.1 before the agents, and is to be so again."""
        # Of its requests, see `facts` and `request`.
        self.paths: dict[EndpointState, Path] = {}
        self.paths_version = -1
        self.edits: RequestEdits | None = None
        self.edits_for: MeshShard | None = None
        self.table: PortTable | None = None
        """Of `port`, as it is in the version `table_version` of the tables."""
        self.table_version = -1
