from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netproxy.addr import ServiceKey, SpiffeId, WorkloadKey
from netproxy.config.shard import (
    Backend,
    Endpoint,
    HeaderMatch,
    Match,
    MeshShard,
    Rule,
    ServicePort,
    ServiceShard,
    Shard,
    SvidShard,
    WorkloadShard,
)
from netproxy.decide.match import Request
from netproxy.decide.route import Tables
from netproxy.errors import Reason, Refused

V4, V6, DUAL = frozenset((4,)), frozenset((6,)), frozenset((4, 6))
A, B = Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80)


def service(
    name: str, *endpoints: Endpoint, vip: str = "240.0.0.1", port: int = 80, rules: tuple[Rule, ...] | None = None
) -> ServiceShard:
    return ServiceShard("shop", name, (vip,), (ServicePort(port, "http", "auto", endpoints, rules),))


def key(name: str) -> ServiceKey:
    return ServiceKey(f"shop/{name}")


def tables(*shards: Shard) -> Tables:
    made = Tables(random.Random(1).random)
    for shard in shards:
        made.put(shard)
    return made


# --- questions


def test_rules_in_order_and_none_that_matches() -> None:
    rules = (
        Rule("first", (Match("prefix", "/a"),), (Backend(key("a"), 80),), 2.5),
        Rule("second", (Match("prefix", "/"),), (Backend(key("b"), 80),)),
    )
    made = tables(service("web", rules=rules), service("a", A, vip="240.0.0.2"), service("b", B, vip="240.0.0.3"))
    port = made.ports[key("web"), 80]
    choice = made.route(port, Request("/a/x", {}), V4)
    assert (choice.service, choice.endpoint.endpoint, choice.rule, choice.request_timeout_s) == (
        key("a"),
        A,
        "first",
        2.5,
    )
    assert made.route(port, Request("/b", {}), V4).endpoint.endpoint == B
    made.put(service("web", rules=rules[:1]))
    with pytest.raises(Refused, match="no rule for GET /b of service shop/web:80") as caught:
        made.route(made.ports[key("web"), 80], Request("/b", {}), V4)
    assert caught.value.reason is Reason.NO_ROUTE
    made.put(service("web", A, rules=()))
    with pytest.raises(Refused):
        made.route(made.ports[key("web"), 80], Request("/", {}), V4)


@pytest.mark.parametrize(
    ("backends", "reason", "detail"),
    [
        ((), Reason.BACKEND_INVALID, "no backend with a weight"),
        ((Backend(key("web"), 80, weight=0),), Reason.BACKEND_INVALID, "no backend with a weight"),
        ((Backend(key("web"), 80, invalid="not granted"),), Reason.BACKEND_INVALID, "not granted"),
        ((Backend(key("gone"), 80),), Reason.BACKEND_INVALID, "shop/gone:80 does not exist"),
        ((Backend(key("web"), 81),), Reason.BACKEND_INVALID, "shop/web:81 does not exist"),
        ((Backend(key("web"), 80),), Reason.NO_HEALTHY_ENDPOINT, "1 endpoint"),
    ],
)
def test_refusals(backends: tuple[Backend, ...], reason: Reason, detail: str) -> None:
    unready = dataclasses.replace(A, ready=False)
    made = tables(service("web", unready, rules=(Rule("r", (), backends),)))
    with pytest.raises(Refused, match=detail) as caught:
        made.route(made.ports[key("web"), 80], Request("/", {}), V4)
    assert caught.value.reason is reason
    assert caught.value.decided_by == "r"


def test_invalid_backends_get_their_share() -> None:
    backends = (Backend(key("web"), 80, 3), Backend(key("web"), 80, 1, invalid="x"))
    made = tables(service("web", A, rules=(Rule("r", (), backends),)))
    refused = 0
    for _ in range(400):
        try:
            made.route(made.ports[key("web"), 80], Request("/", {}), V4)
        except Refused:
            refused += 1
    assert refused == 100


def test_families() -> None:
    one = Endpoint("10.0.0.1", 80, workload=WorkloadKey("shop/one"))
    one6 = Endpoint("fd00::1", 80, workload=WorkloadKey("shop/one"))
    two6 = Endpoint("fd00::2", 80, workload=WorkloadKey("shop/two"))
    nobody6 = Endpoint("fd00::3", 80)
    made = tables(service("web", one, one6, two6, nobody6))
    port = made.ports[key("web"), 80]

    def seen(families: frozenset[int]) -> set[str]:
        return {made.tcp(port, families).endpoint.addr.host for _ in range(200)}

    assert seen(V4) == {"10.0.0.1"}
    assert seen(V6) == {"fd00::1", "fd00::2", "fd00::3"}
    assert seen(DUAL) == {"10.0.0.1", "fd00::2", "fd00::3"}
    with pytest.raises(Refused, match="none ready in a family of the client"):
        made.tcp(port, frozenset())


def test_destinations_that_are_no_service() -> None:
    identity = SpiffeId("spiffe://x")
    workload = WorkloadShard(
        "shop", "w", ("10.0.0.1", "fd00::1"), identity, "w", meshed=True, port_mtls={81: "DISABLE"}
    )
    made = tables(workload)
    meshed = made.direct("10.0.0.1", 80)
    assert meshed.endpoint == Endpoint("10.0.0.1", 80, True, WorkloadKey("shop/w"), identity, True)
    assert made.direct("10.0.0.1", 80) is meshed
    plain = made.direct("fd00::1", 81).endpoint
    assert (plain.meshed, plain.identity) == (False, "")
    assert made.direct("10.9.9.9", 80).endpoint == Endpoint("10.9.9.9", 80)
    # The identity is the present one.
    made.put(dataclasses.replace(workload, identity=SpiffeId("spiffe://y")))
    assert made.direct("10.0.0.1", 80).endpoint.identity == "spiffe://y"
    made.drop("workload/shop/w")
    assert made.workload_at("10.0.0.1") is None
    assert made.direct("10.0.0.1", 80).endpoint == Endpoint("10.0.0.1", 80)


def test_destinations_are_forgotten_but_not_those_in_use() -> None:
    made = tables()
    busy = made.direct("10.0.0.1", 1)
    busy.outstanding = 1
    for port in range(2, 5000):
        made.direct("10.0.0.1", port)
    assert len(made._direct) <= 4096
    assert made.direct("10.0.0.1", 1) is busy


# --- changes


def test_state_of_endpoints_survives_a_change_of_the_shard() -> None:
    made = tables(service("web", A))
    state = made.tcp(made.ports[key("web"), 80], V4).endpoint
    state.outstanding = 7
    made.put(service("web", B, A, vip="240.0.0.9", rules=()))
    port = made.ports[key("web"), 80]
    assert [s.outstanding for s in port.endpoints] == [0, 7]
    assert port.endpoints[1] is state
    assert made.service_at("240.0.0.9", 80) is port
    assert made.service_at("240.0.0.1", 80) is None
    made.put(service("web", B))
    made.put(service("web", A))
    assert made.ports[key("web"), 80].endpoints[0].outstanding == 0


def test_sequences_of_weights_survive_unless_the_weights_change() -> None:
    def rules(*weights: int, path: str = "/") -> tuple[Rule, ...]:
        return (Rule("r", (Match("prefix", path),), tuple(Backend(key("web"), 80, w) for w in weights)),)

    made = tables(service("web", A, rules=rules(1, 1)))

    def cycle() -> object:
        port = made.ports[key("web"), 80]
        made.route(port, Request("/a", {}), V4)
        return port.cycles["r"]

    first = cycle()
    made.put(service("web", A, B, rules=rules(1, 1, path="/a")))
    assert cycle() is first
    made.put(service("web", A, B, rules=rules(1, 2)))
    assert cycle() is not first


def tcp_service(*backends: Backend) -> ServiceShard:
    rule = Rule("TCPRoute shop/db rule 0", (), backends)
    return ServiceShard("shop", "db", ("240.0.0.9",), (ServicePort(5432, "", "tcp", (A,), tcp_rule=rule),))


def test_opaque_connections_are_shared_by_weight() -> None:
    shares = Backend(key("a"), 80, 70), Backend(key("b"), 80, 20), Backend(key("a"), 81, 10, invalid="no port 81")
    made = tables(tcp_service(*shares), service("a", A, vip="240.0.0.2"), service("b", B, vip="240.0.0.3"))
    seen: Counter[object] = Counter()
    for number in range(200):
        try:
            choice = made.tcp(made.ports[key("db"), 5432], V4)
            assert choice.rule == "TCPRoute shop/db rule 0"
            seen[choice.endpoint.endpoint] += 1
        except Refused as exc:
            seen[exc.reason] += 1
        if number == 77:
            made.put(dataclasses.replace(tcp_service(*shares), headless=True))  # the sequence goes on
    assert seen == {A: 140, B: 40, Reason.BACKEND_INVALID: 20}
    made.put(service("a", vip="240.0.0.2"))
    made.put(tcp_service(shares[0]))
    with pytest.raises(Refused) as caught:
        made.tcp(made.ports[key("db"), 5432], V4)
    assert caught.value.reason is Reason.NO_HEALTHY_ENDPOINT


def test_what_a_pattern_costs_is_counted_not_raised() -> None:
    rules = (
        Rule("bad", (Match("regex", "/("), Match("exact", "/x", (HeaderMatch("a", "[", "regex"),))), (), 0.0),
        Rule("good", (Match("regex", "/[a-c]+"),), (Backend(key("web"), 80),)),
    )
    made = tables(service("web", A, rules=rules))
    assert made.broken_patterns == 2
    assert made.route(made.ports[key("web"), 80], Request("/abc", {}), V4).rule == "good"
    for path in ("/x", "/(", "/"):
        with pytest.raises(Refused, match="no rule"):
            made.route(made.ports[key("web"), 80], Request(path, {"a": "["}), V4)


def test_rules_are_prepared_anew_only_when_they_change() -> None:
    rules = (Rule("r", (Match("regex", "/("), Match("regex", "/[a-c]+")), (Backend(key("web"), 80),)),)
    made = tables(service("web", A, rules=rules))
    before = made.ports[key("web"), 80].rules
    made.put(service("web", A, B, rules=tuple(dataclasses.replace(rule) for rule in rules)))
    assert made.ports[key("web"), 80].rules is before
    assert made.broken_patterns == 1
    assert len(made.ports[key("web"), 80].ready[V4]) == 2
    made.put(service("web", A, B, rules=(dataclasses.replace(rules[0], name="s"),)))
    assert made.route(made.ports[key("web"), 80], Request("/abc", {}), V4).rule == "s"


def test_an_address_that_moves_to_another_service_in_any_order() -> None:
    before = service("a", A, vip="240.0.0.1"), service("b", B, vip="240.0.0.2")
    swapped = service("a", A, vip="240.0.0.2"), service("b", B, vip="240.0.0.1")
    for order in (swapped, swapped[::-1]):
        made = tables(*before)
        for shard in order:
            made.put(shard)
        found = made.service_at("240.0.0.1", 80), made.service_at("240.0.0.2", 80)
        assert [port.service if port else None for port in found] == [key("b"), key("a")]
        assert made.is_vip("240.0.0.1")
    made = tables(service("a", A))
    made.put(service("b", B))
    made.drop("service/shop/a")
    port = made.service_at("240.0.0.1", 80)
    assert port is not None
    assert port.service == key("b")


def test_what_is_dropped_is_gone() -> None:
    made = tables(service("web", A), SvidShard(SpiffeId("spiffe://x"), "", "", "", 0.0), MeshShard(max_headers=3))
    assert made.mesh.max_headers == 3
    assert "spiffe://x" in made.svids
    for gone in ("service/shop/web", "service/shop/web", "svid/spiffe://x", "workload/shop/never", "mesh"):
        made.drop(gone)
    assert not made.services
    assert not made.ports
    assert not made.svids
    assert not made.is_vip("240.0.0.1")
    assert made.service_at("240.0.0.1", 80) is None


hosts = st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"])
endpoints = st.builds(Endpoint, hosts, st.just(80), ready=st.booleans())
backends = st.builds(
    Backend, st.sampled_from([key("a"), key("b"), key("c")]), st.sampled_from([80, 81]), st.integers(0, 2)
)
rules = st.none() | st.lists(
    st.builds(Rule, st.sampled_from("rs"), st.just((Match("prefix", "/"),)), st.lists(backends, max_size=2).map(tuple)),
    max_size=2,
).map(tuple)
ports = st.lists(
    st.builds(
        ServicePort,
        st.sampled_from([80, 81]),
        st.just(""),
        st.just("auto"),
        st.lists(endpoints, max_size=3).map(tuple),
        rules,
    ),
    max_size=2,
    unique_by=lambda port: port.port,
).map(tuple)


@st.composite
def snapshots(draw: st.DrawFn) -> dict[str, Shard]:
    """Consistent: no address has two owners."""
    out: dict[str, Shard] = {}
    vips = draw(st.permutations(["240.0.0.0", "240.0.0.1", "240.0.0.2"]))
    addresses = draw(st.permutations(["10.0.0.1", "10.0.0.2", "fd00::1"]))
    for name in draw(st.sampled_from(("abc", "abc", "ab", "ac", "c", ""))):
        shard = ServiceShard("shop", name, (vips.pop(),)[: draw(st.sampled_from((1, 1, 0)))], draw(ports))
        out[shard.key()] = shard
    for name in draw(st.sets(st.sampled_from("xy"))):
        identity = SpiffeId(f"spiffe://{name}")
        workload = WorkloadShard("shop", name, (addresses.pop(),), identity, name, meshed=draw(st.booleans()))
        out[workload.key()] = workload
    return out


def index(made: Tables) -> object:
    return (
        {where: (port.service, port.spec) for where, port in made._by_vip.items()},
        made._vips,
        made._by_address,
        made._endpoints,
        {where: port.spec for where, port in made.ports.items()},
        made.services,
        made.workloads,
    )


@settings(deadline=None)
@given(st.lists(snapshots(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_tables_equal_those_built_from_scratch(history: list[dict[str, Shard]], rng: random.Random) -> None:
    made = tables()
    current: dict[str, Shard] = {}
    for snapshot in history:
        steps: list[str] = [name for name in {**current, **snapshot} if current.get(name) != snapshot.get(name)]
        rng.shuffle(steps)
        for name in steps:
            if name in snapshot:
                made.put(snapshot[name])
            else:
                made.drop(name)
            # In the middle of a change as well: an answer or a refusal, and no answer that is not in the tables.
            ask_everything(made)
        current = snapshot
        assert index(made) == index(tables(*snapshot.values()))


def ask_everything(made: Tables) -> None:
    for number in range(4):
        for port_number in (80, 81):
            port = made.service_at(f"240.0.0.{number}", port_number)
            if port is None:
                continue
            assert made.ports[port.service, port.port] is port
            for families in (V4, V6, DUAL):
                try:
                    choice = made.route(port, Request("/", {}), families)
                except Refused as exc:
                    assert exc.reason in (Reason.NO_ROUTE, Reason.BACKEND_INVALID, Reason.NO_HEALTHY_ENDPOINT)
                else:
                    assert choice.service in made.services
                    assert choice.endpoint.endpoint.ready
                    assert (6 if ":" in choice.endpoint.addr.host else 4) in families
    for host in ("10.0.0.1", "10.0.0.2", "fd00::1"):
        made.direct(host, 80)
