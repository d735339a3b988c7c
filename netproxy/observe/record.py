# cython: annotation_typing=False
"""Counting in a worker: names of the series, and how a request or connection is entered.

Labels travel as the arena's row labels, in the order of `REQUEST_LABELS` and `CONNECTION_LABELS`.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from ..arena import (
    BUCKETS_US,
    CONN_BYTES_IN,
    CONN_BYTES_OUT,
    CONN_CLOSED,
    CONN_OPENED,
    CONNECTIONS,
    GAUGE_DOWNSTREAM,
    REQ_BUCKETS,
    REQ_BYTES_IN,
    REQ_BYTES_OUT,
    REQ_COUNT,
    REQ_SUM_US,
    REQUESTS,
    ArenaWriter,
)
from ..errors import Reason

REQUEST_LABELS = (
    "reporter",
    "source_workload",
    "source_principal",
    "destination_workload",
    "destination_service",
    "protocol",
    "security",
    "code",
    "flag",
    "reason",
    "grpc_status",
)
CONNECTION_LABELS = (
    "reporter",
    "source_workload",
    "source_principal",
    "destination_workload",
    "destination_service",
    "security",
    "flag",
    "reason",
)

_BUCKETS = len(BUCKETS_US)

DNS_QUERIES = "dns_queries"
"""The event of an answered query; its detail is ``mesh/<rcode>`` or ``forwarded/<rcode>``."""


LINES_WRITTEN = "access_log_lines"
LINES_LOST = "access_log_dropped"
"""Events of the arena, the second with the reason as its detail."""


class Parties(NamedTuple):
    """Who talks to whom. Workloads as ``namespace/name``, "unknown" when none has the address."""

    reporter: str
    """``source`` (outbound) or ``destination`` (inbound)."""
    source_workload: str
    source_principal: str
    destination_workload: str
    destination_service: str


class Who:
    """Whose requests are counted, and the row of the last one: mostly the next one ends alike."""

    def __init__(self, parties: Parties, security: str) -> None:
        self.parties = parties
        self.security = security
        self.row = -1
        self.status = 0
        self.reason = Reason.OK
        self.protocol = ""
        self.grpc_status = -1


class Recorder:
    def __init__(self, arena: ArenaWriter) -> None:
        self.arena = arena
        self._cells = arena.cells
        self._bounds = array("Q", BUCKETS_US)
        self._rows: dict[tuple[object, ...], int] = {}

    def _row(self, kind: int, key: tuple[object, ...], labels: tuple[str, ...]) -> int:
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) > 8192:
                self._rows.clear()
            row = self._rows[key] = self.arena.row(kind, labels)
        return row

    def request(
        self,
        parties: Parties,
        security: str,
        status: int,
        reason: Reason,
        numbers: tuple[float, int, int],
        *,
        protocol: str = "http/1.1",
        grpc_status: int = -1,
    ) -> None:
        """`numbers`: duration in seconds, octets of request body, octets of response body. `protocol`: the client's.
        `grpc_status`: 0 to 16, -1 for what is not gRPC or ended without one."""
        self.count(Who(parties, security), status, reason, protocol, grpc_status, numbers[0], numbers[1], numbers[2])

    def count(
        self,
        who: Who,
        status: int,
        reason: Reason,
        protocol: str,
        grpc_status: int,
        duration_s: float,
        moved_in: int,
        moved_out: int,
    ) -> None:
        """As `request`."""
        if (
            who.row < 0
            or who.status != status
            or who.reason is not reason
            or who.grpc_status != grpc_status
            or who.protocol != protocol
        ):
            self._find(who, status, reason, protocol, grpc_status)
        row = who.row
        duration_us = int(duration_s * 1e6)
        cells = self._cells
        cells[row + REQ_COUNT] += 1
        cells[row + REQ_SUM_US] += duration_us
        cells[row + REQ_BYTES_IN] += moved_in
        cells[row + REQ_BYTES_OUT] += moved_out
        bounds = self._bounds
        bucket = 0
        while bucket < _BUCKETS and bounds[bucket] < duration_us:
            bucket += 1
        cells[row + REQ_BUCKETS + bucket] += 1

    def _find(self, who: Who, status: int, reason: Reason, protocol: str, grpc_status: int) -> None:
        key = (REQUESTS, who.parties, who.security, status, reason, protocol, grpc_status)
        row = self._rows.get(key)
        if row is None:
            grpc = str(grpc_status) if grpc_status >= 0 else ""
            labels = (*who.parties, protocol, who.security, str(status), reason.info.flag, reason.name, grpc)
            row = self._row(REQUESTS, key, labels)
        who.row, who.status, who.reason, who.protocol, who.grpc_status = row, status, reason, protocol, grpc_status

    def opened(self) -> None:
        self.arena.gauges[GAUGE_DOWNSTREAM] += 1

    def gone(self) -> None:
        if self.arena.gauges[GAUGE_DOWNSTREAM]:  # counting must never raise into the data path
            self.arena.gauges[GAUGE_DOWNSTREAM] -= 1

    def connection(self, parties: Parties, security: str, reason: Reason) -> int:
        """Row of an opaque connection's series; add to its cells with `moved`, `connection_closed`."""
        key = (CONNECTIONS, parties, security, reason)
        labels = (*parties, security, reason.info.flag, reason.name)
        return self._row(CONNECTIONS, key, labels)

    def connection_opened(self, parties: Parties, security: str) -> None:
        self.arena.cells[self.connection(parties, security, Reason.OK) + CONN_OPENED] += 1

    def connection_closed(self, parties: Parties, security: str, reason: Reason, moved: tuple[int, int]) -> None:
        """`moved`: octets from the client, octets to the client."""
        row = self.connection(parties, security, reason)
        cells = self.arena.cells
        cells[row + CONN_CLOSED] += 1
        cells[row + CONN_BYTES_IN] += moved[0]
        cells[row + CONN_BYTES_OUT] += moved[1]
