# cython: annotation_typing=False
"""What every connection of a worker shares, and the facts of one connection."""

from __future__ import annotations

import asyncio
import os
from binascii import hexlify
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
from .trace import Ids

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


class _Ids:
    """Random UUIDs (RFC 9562 section 5.4), from randomness that is fetched for many at a time."""

    def __init__(self) -> None:
        self._octets = b""
        self._at = 0

    def __call__(self) -> bytes:
        return self.make()

    def make(self) -> bytes:
        at = self._at
        if at >= len(self._octets):
            self._octets, at = hexlify(os.urandom(4096)), 0
        self._at = at + 32
        text = self._octets
        return b"".join(
            (
                text[at : at + 8],
                b"-",
                text[at + 8 : at + 12],
                b"-4",
                text[at + 13 : at + 16],
                _VARIANTS[text[at + 16] & 3],
                text[at + 17 : at + 20],
                b"-",
                text[at + 20 : at + 32],
            )
        )


_VARIANTS = (b"-8", b"-9", b"-a", b"-b")


class _WallClock:
    """The present as in Date (RFC 9110 section 5.6.7), made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def __call__(self) -> bytes:
        second = int(wall_time())
        if second != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True).encode()
        return self._text


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
        self.new_id: Callable[[], bytes] = _Ids()
        """For ``x-request-id``."""
        self.date: Callable[[], bytes] = _WallClock()
        self.access = AccessLogger("", lambda: 0.0)
        self.trace_ids = Ids(os.urandom)
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
