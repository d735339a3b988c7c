"""Prometheus text from the arena and the brain's own condition. Runs at scrape time, in the brain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .. import __version__
from ..arena import (
    BUCKETS_US,
    CONN_BYTES_IN,
    CONN_BYTES_OUT,
    CONN_CLOSED,
    CONN_OPENED,
    CONNECTIONS,
    EVENTS,
    GAUGE_DOWNSTREAM,
    GAUGE_POOLED,
    GAUGE_UPSTREAM,
    REQ_BUCKETS,
    REQ_BYTES_IN,
    REQ_BYTES_OUT,
    REQ_COUNT,
    REQ_SUM_US,
    REQUESTS,
    ArenaReader,
    Row,
)
from .record import CONNECTION_LABELS, DNS_QUERIES, LINES_LOST, LINES_WRITTEN, REQUEST_LABELS

_DURATION_LABELS = REQUEST_LABELS[:7]


@dataclass(frozen=True, slots=True)
class Condition:
    """What the brain knows at scrape time. Keys of `steering` are workloads: (mechanism, policy, state)."""

    node: str
    engines: dict[str, str]
    """What speaks HTTP: of ``http1`` and ``http2``."""
    steering: dict[str, tuple[str, str, str]]
    certificates: dict[str, float]
    """Identity -> end of validity, Unix seconds."""
    rejected: int
    restarts: dict[str, int]
    processes: dict[tuple[str, int], bool]
    """(role, slot) -> ready."""
    config_ok: bool
    config_age_s: float
    repairs: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """Workload -> how often its rules or routes had to be put back, the seconds until then in all and the last time."""
    unsteered: dict[str, int] = field(default_factory=dict)
    """Workload -> established connections that bypass the proxy."""
    steered: dict[str, dict[str, int]] = field(default_factory=dict)
    """Workload -> what became of its connections in the kernel, where eBPF counts them."""


class _Collector:
    def __init__(self, arena: ArenaReader, condition: Callable[[], Condition]) -> None:
        self._arena = arena
        self._condition = condition

    def collect(self) -> Iterator[Metric]:
        rows = list(self._arena.rows())
        yield from _requests([row for row in rows if row.kind == REQUESTS])
        yield from _connections([row for row in rows if row.kind == CONNECTIONS])
        yield from _events([row for row in rows if row.kind == EVENTS])
        for name, text, index in (
            ("netproxy_downstream_connections", "Connections of workloads that are open now.", GAUGE_DOWNSTREAM),
            ("netproxy_upstream_http_connections", "HTTP connections to endpoints, busy or idle.", GAUGE_UPSTREAM),
            ("netproxy_upstream_http_idle", "HTTP connections to endpoints that wait in the pool.", GAUGE_POOLED),
        ):
            yield GaugeMetricFamily(name, text, value=self._arena.gauge(index))
        yield from _condition(self._condition())


def access_lines(arena: ArenaReader) -> dict[str, Any]:
    """``written``, and ``dropped`` by reason."""
    events = {row.labels: row.cells[0] for row in arena.rows() if row.kind == EVENTS}
    return {
        "written": events.get((LINES_WRITTEN, ""), 0),
        "dropped": {labels[1]: n for labels, n in events.items() if labels[0] == LINES_LOST and n},
    }


def registry(arena: ArenaReader, condition: Callable[[], Condition]) -> CollectorRegistry:
    made = CollectorRegistry(auto_describe=False)
    made.register(_Collector(arena, condition))
    return made


def render(made: CollectorRegistry) -> bytes:
    return generate_latest(made)


def _pad(labels: tuple[str, ...], length: int) -> tuple[str, ...]:
    """The overflow row has one label; show it in every position."""
    return labels if len(labels) == length else (labels[0],) * length


def _requests(rows: list[Row]) -> Iterator[Metric]:
    total = CounterMetricFamily("netproxy_requests", "HTTP requests that ended.", labels=REQUEST_LABELS)
    received = CounterMetricFamily("netproxy_request_bytes", "Octets of request bodies.", labels=_DURATION_LABELS)
    sent = CounterMetricFamily("netproxy_response_bytes", "Octets of response bodies.", labels=_DURATION_LABELS)
    duration = HistogramMetricFamily(
        "netproxy_request_duration_seconds", "From the request's head to the response's end.", labels=_DURATION_LABELS
    )
    summed: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if not row.cells[REQ_COUNT]:
            continue
        labels = _pad(row.labels, len(REQUEST_LABELS))
        total.add_metric(labels, row.cells[REQ_COUNT])
        cells = summed.setdefault(labels[: len(_DURATION_LABELS)], [0] * len(row.cells))
        for index, value in enumerate(row.cells):
            cells[index] += value
    for labels, cells in summed.items():
        received.add_metric(labels, cells[REQ_BYTES_IN])
        sent.add_metric(labels, cells[REQ_BYTES_OUT])
        buckets, running = [], 0
        for index, bound in enumerate(BUCKETS_US):
            running += cells[REQ_BUCKETS + index]
            buckets.append((f"{bound / 1e6:g}", float(running)))
        running += cells[REQ_BUCKETS + len(BUCKETS_US)]
        buckets.append(("+Inf", float(running)))
        duration.add_metric(labels, buckets, sum_value=cells[REQ_SUM_US] / 1e6)
    yield from (total, received, sent, duration)


def _connections(rows: list[Row]) -> Iterator[Metric]:
    names = (
        ("netproxy_tcp_connections_opened", "Opaque connections that were opened.", CONN_OPENED),
        ("netproxy_tcp_connections_closed", "Opaque connections that ended, by reason.", CONN_CLOSED),
        ("netproxy_tcp_received_bytes", "Octets from clients of opaque connections.", CONN_BYTES_IN),
        ("netproxy_tcp_sent_bytes", "Octets to clients of opaque connections.", CONN_BYTES_OUT),
    )
    for name, text, index in names:
        family = CounterMetricFamily(name, text, labels=CONNECTION_LABELS)
        for row in rows:
            if row.cells[index]:
                family.add_metric(_pad(row.labels, len(CONNECTION_LABELS)), row.cells[index])
        yield family


def _events(rows: list[Row]) -> Iterator[Metric]:
    family = CounterMetricFamily("netproxy_events", "Rare events of the data path.", labels=("event", "detail"))
    lines = CounterMetricFamily("netproxy_access_log_lines", "Lines written to the access log.")
    lost = CounterMetricFamily(
        "netproxy_access_log_dropped", "Lines of the access log that were lost, and why.", labels=("reason",)
    )
    names = CounterMetricFamily(
        "netproxy_dns_queries",
        "Queries for names that were answered: by the mesh, or by a resolver of the workload.",
        labels=("source", "rcode"),
    )
    for row in rows:
        event, detail = _pad(row.labels, 2)
        if event == LINES_WRITTEN:
            lines.add_metric((), row.cells[0])
        elif event == LINES_LOST:
            lost.add_metric((detail,), row.cells[0])
        elif event == DNS_QUERIES:
            names.add_metric(detail.split("/"), row.cells[0])
        elif row.cells[0]:
            family.add_metric((event, detail), row.cells[0])
    yield from (family, lines, lost, names)


def _condition(now: Condition) -> Iterator[Metric]:
    build = GaugeMetricFamily(
        "netproxy_build_info", "1; version and engines in labels.", labels=("version", "node", *now.engines)
    )
    build.add_metric((__version__, now.node, *now.engines.values()), 1)
    yield build
    steering = GaugeMetricFamily(
        "netproxy_workload_steering",
        "1 for the state each local workload is in.",
        labels=("workload", "mechanism", "failure_policy", "state"),
    )
    for workload, (mechanism, policy, state) in now.steering.items():
        steering.add_metric((workload, mechanism, policy, state), 1)
    yield steering
    repairs = CounterMetricFamily(
        "netproxy_steering_repairs", "Times that rules or routes were found changed and put back.", labels=("workload",)
    )
    gaps = CounterMetricFamily(
        "netproxy_steering_gap_seconds",
        "Until the repairs, from the kernel's event, else from the last look that found all well (an upper bound).",
        labels=("workload",),
    )
    last_gap = GaugeMetricFamily(
        "netproxy_steering_last_gap_seconds", "The same, of the last repair; 0: none yet.", labels=("workload",)
    )
    for workload, (count, gap_s, last_gap_s) in now.repairs.items():
        repairs.add_metric((workload,), count)
        gaps.add_metric((workload,), gap_s)
        last_gap.add_metric((workload,), last_gap_s)
    yield from (repairs, gaps, last_gap)
    bypassing = GaugeMetricFamily(
        "netproxy_unsteered_connections",
        "Established connections that bypass the proxy, since they are older than the rules.",
        labels=("workload",),
    )
    for workload, count in now.unsteered.items():
        bypassing.add_metric((workload,), count)
    yield bypassing
    steered = CounterMetricFamily(
        "netproxy_steering_connections",
        "Connections that eBPF decided about, by what it did and why.",
        labels=("workload", "result"),
    )
    for workload, results in now.steered.items():
        for result, count in results.items():
            if count:
                steered.add_metric((workload, result), count)
    yield steered
    certificates = GaugeMetricFamily(
        "netproxy_certificate_not_after_seconds", "End of validity of a local SVID.", labels=("identity",)
    )
    for identity, not_after in now.certificates.items():
        certificates.add_metric((identity,), not_after)
    yield certificates
    yield GaugeMetricFamily(
        "netproxy_rejected_objects", "Configuration objects that can't be used.", value=now.rejected
    )
    yield GaugeMetricFamily("netproxy_config_ok", "1 when the last read of the files worked.", value=now.config_ok)
    yield GaugeMetricFamily("netproxy_config_age_seconds", "Since the snapshot in force.", value=now.config_age_s)
    restarts = CounterMetricFamily("netproxy_process_restarts", "Unplanned ends of a process.", labels=("role",))
    for role, count in now.restarts.items():
        restarts.add_metric((role,), count)
    yield restarts
    ready = GaugeMetricFamily("netproxy_process_ready", "1 when the process is ready.", labels=("role", "slot"))
    for (role, slot), is_ready in now.processes.items():
        ready.add_metric((role, str(slot)), is_ready)
    yield ready
