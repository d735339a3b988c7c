from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from netproxy.arena import BUCKETS_US, GAUGE_DOWNSTREAM, REQ_BUCKETS, REQUESTS, ArenaReader, ArenaWriter
from netproxy.errors import Reason
from netproxy.observe.metrics import Condition, registry, render
from netproxy.observe.record import CONNECTION_LABELS, DNS_QUERIES, REQUEST_LABELS, Parties, Recorder
from netproxy.settings import ARENA_ROWS, arena_size

CONDITION = Condition(
    node="node-a",
    engines={"http1": "native", "http2": "reference"},
    steering={"shop/web": ("nft", "closed", "steered")},
    certificates={"spiffe://x": 1e9},
    rejected=2,
    restarts={"worker": 3},
    processes={("worker", 0): True, ("worker", 1): False},
    config_ok=True,
    config_age_s=1.5,
    repairs={"shop/web": (4, 0.75, 0.25)},
    unsteered={"shop/web": 3},
    steered={"shop/web": {"steered": 7, "bypass_device": 0}},
)
WHO = Parties("source", "shop/client", "spiffe://c", "shop/web", "shop/web")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Bench:
    def __init__(self, workers: int = 2) -> None:
        self.fd = os.memfd_create("arena")
        os.ftruncate(self.fd, arena_size(workers))
        self.recorders = [Recorder(ArenaWriter(self.fd, slot, workers)) for slot in range(workers)]
        self.registry = registry(ArenaReader(self.fd, workers), lambda: CONDITION)

    def samples(self) -> Samples:
        text = render(self.registry).decode()
        out: Samples = {}
        for family in text_string_to_metric_families(text):
            assert family.name.startswith("netproxy_")
            assert family.documentation.endswith((".", "a label."))
            for sample in family.samples:
                where = sample.name, frozenset(sample.labels.items())
                assert where not in out, where
                out[where] = sample.value
        return out

    def named(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        return {labels: value for (found, labels), value in self.samples().items() if found == name}

    def one(self, name: str) -> float:
        (value,) = self.named(name).values()
        return value


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    os.close(made.fd)


def test_nothing_has_happened(bench: Bench) -> None:
    assert bench.one("netproxy_downstream_connections") == 0
    assert bench.one("netproxy_config_ok") == 1
    assert bench.one("netproxy_rejected_objects") == 2
    assert bench.one("netproxy_config_age_seconds") == 1.5
    assert bench.one("netproxy_process_restarts_total") == 3
    assert bench.one("netproxy_certificate_not_after_seconds") == 1e9
    ready = bench.named("netproxy_process_ready")
    assert ready == {
        frozenset({("role", "worker"), ("slot", "0")}): 1,
        frozenset({("role", "worker"), ("slot", "1")}): 0,
    }
    steering = {("workload", "shop/web"), ("mechanism", "nft"), ("failure_policy", "closed"), ("state", "steered")}
    assert bench.named("netproxy_workload_steering") == {frozenset(steering): 1}
    assert bench.one("netproxy_steering_repairs_total") == 4
    assert bench.one("netproxy_steering_gap_seconds_total") == 0.75
    assert bench.one("netproxy_steering_last_gap_seconds") == 0.25
    assert bench.one("netproxy_unsteered_connections") == 3
    steered = bench.named("netproxy_steering_connections_total")
    assert steered == {frozenset({("workload", "shop/web"), ("result", "steered")}): 7}
    assert not bench.named("netproxy_requests_total")


def test_requests_of_all_workers(bench: Bench) -> None:
    for recorder in bench.recorders:
        recorder.request(WHO, "mutual_tls", 200, Reason.OK, (0.003, 10, 20))
    bench.recorders[0].request(WHO, "mutual_tls", 404, Reason.NO_ROUTE, (0.0001, 1, 2))
    requests = bench.named("netproxy_requests_total")
    common = dict(zip(REQUEST_LABELS, (*WHO, "http/1.1", "mutual_tls"), strict=False))
    assert requests == {
        frozenset({**common, "code": "200", "flag": "-", "reason": "OK", "grpc_status": ""}.items()): 2,
        frozenset({**common, "code": "404", "flag": "NR", "reason": "NO_ROUTE", "grpc_status": ""}.items()): 1,
    }
    # What lasts and how much is not kept by status.
    assert bench.named("netproxy_request_bytes_total") == {frozenset(common.items()): 21}
    assert bench.named("netproxy_response_bytes_total") == {frozenset(common.items()): 42}
    assert bench.one("netproxy_request_duration_seconds_count") == 3
    assert bench.one("netproxy_request_duration_seconds_sum") == pytest.approx(0.0061)


def test_the_histogram_is_cumulative_and_bounds_are_inclusive(bench: Bench) -> None:
    bounds = [bound / 1e6 for bound in BUCKETS_US]
    recorder = bench.recorders[0]
    for bound in bounds:
        recorder.request(WHO, "none", 200, Reason.OK, (bound, 0, 0))
    recorder.request(WHO, "none", 200, Reason.OK, (bounds[-1] + 1, 0, 0))
    found = bench.named("netproxy_request_duration_seconds_bucket")
    by_bound = {float(dict(labels)["le"]): value for labels, value in found.items()}
    assert list(by_bound) == [*bounds, float("inf")]
    assert list(by_bound.values()) == [*range(1, len(bounds) + 1), len(bounds) + 1]
    assert REQ_BUCKETS + len(BUCKETS_US) < 32


def test_connections(bench: Bench) -> None:
    for recorder in bench.recorders:
        recorder.connection_opened(WHO, "none")
        recorder.opened()
    bench.recorders[0].connection_closed(WHO, "none", Reason.UPSTREAM_CLOSED, (5, 6))
    bench.recorders[0].gone()
    assert bench.one("netproxy_downstream_connections") == 1
    assert bench.one("netproxy_tcp_connections_opened_total") == 2
    closed = {**dict(zip(CONNECTION_LABELS, WHO, strict=False)), "security": "none", "flag": "UC"}
    closed["reason"] = "UPSTREAM_CLOSED"
    assert bench.named("netproxy_tcp_connections_closed_total") == {frozenset(closed.items()): 1}
    assert bench.one("netproxy_tcp_received_bytes_total") == 5
    assert bench.one("netproxy_tcp_sent_bytes_total") == 6


def test_events_and_odd_label_values(bench: Bench) -> None:
    odd = 'a "quoted" \\ back\nslash é'
    bench.recorders[0].arena.count("refused_connections", detail=odd)
    bench.recorders[1].arena.count("internal_errors")
    assert bench.named("netproxy_events_total") == {
        frozenset({("event", "refused_connections"), ("detail", odd)}): 1,
        frozenset({("event", "internal_errors"), ("detail", "")}): 1,
    }


def test_queries_for_names(bench: Bench) -> None:
    for recorder, detail in zip(
        bench.recorders * 2, ("mesh/NOERROR", "mesh/NOERROR", "forwarded/NXDOMAIN"), strict=False
    ):
        recorder.arena.count(DNS_QUERIES, detail=detail)
    assert bench.named("netproxy_dns_queries_total") == {
        frozenset({("source", "mesh"), ("rcode", "NOERROR")}): 2,
        frozenset({("source", "forwarded"), ("rcode", "NXDOMAIN")}): 1,
    }
    assert bench.named("netproxy_events_total") == {}


def test_overflow_rows_are_shown_as_such(bench: Bench) -> None:
    recorder = bench.recorders[0]
    for number in range(ARENA_ROWS):
        recorder.connection(WHO._replace(source_workload=f"shop/{number}"), "none", Reason.OK)
    for number in range(5):
        recorder.request(WHO._replace(source_workload=f"shop/{number}"), "none", 200, Reason.OK, (0.0, 0, 0))
    recorder.connection_closed(WHO, "none", Reason.OK, (1, 1))
    recorder.arena.count("late")
    overflow = frozenset((name, "overflow") for name in REQUEST_LABELS)
    assert bench.named("netproxy_requests_total") == {overflow: 5}
    assert bench.one("netproxy_events_total") == 1
    assert bench.one("netproxy_tcp_connections_closed_total") == 1


def test_the_recorder_finds_its_row_again_when_its_memory_was_full(bench: Bench) -> None:
    recorder = bench.recorders[0]
    recorder.request(WHO, "none", 200, Reason.OK, (0.0, 0, 0))
    for number in range(8200):
        recorder.connection(WHO._replace(source_workload=str(number)), "none", Reason.OK)
    recorder.request(WHO, "none", 200, Reason.OK, (0.0, 0, 0))
    (row,) = [row for row in ArenaReader(bench.fd, 2).rows() if row.kind == REQUESTS and row.cells[0]]
    assert row.cells[0] == 2
    assert bench.recorders[0].arena.gauges[GAUGE_DOWNSTREAM] == 0
