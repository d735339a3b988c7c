"""Planning, on a model of the kernel: what a plan does, and that undoing it is as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirect import Observed, Ports, RedirectError, Scope, Steering
from redirect.plan import (
    DIALECTS,
    AddRoute,
    CreateTable,
    DeleteRoute,
    DeleteTable,
    LinkDown,
    LinkUp,
    Plan,
    Step,
    plan,
    undo,
)
from redirect.wanted import MECHANISMS, Table

NODE = "node-a"
OWNER = 4242
EMPTY = Observed(NODE, lo_up=True, routes=frozenset(), tables=())
CIDRS = ["240.240.0.0/16", "fd00:240::/32", "10.7.0.0/24", "fd07::/64"]


def after(kernel: Observed, step: Step) -> Observed:
    """What a kernel does; it refuses what the real one would."""
    names = {(table.mechanism, table.name) for table in kernel.tables}
    match step:
        case LinkUp("lo") | LinkDown("lo"):
            assert kernel.lo_up is isinstance(step, LinkDown)
            return replace(kernel, lo_up=not kernel.lo_up)
        case AddRoute(cidr):
            assert cidr not in kernel.routes
            return replace(kernel, routes=kernel.routes | {cidr})
        case DeleteRoute(cidr):
            assert cidr in kernel.routes
            return replace(kernel, routes=kernel.routes - {cidr})
        case CreateTable(name, wanted, mechanism):
            assert (mechanism, name) not in names
            generation = kernel.generation + 1
            assert name == DIALECTS[mechanism].table_name(kernel.node, generation)
            owner = OWNER if DIALECTS[mechanism].is_owned(wanted.failure_policy) else None
            table = Table(name, generation, owner, DIALECTS[mechanism].listing(wanted), mechanism)
            return replace(kernel, tables=(*kernel.tables, table))
        case DeleteTable(name, _, mechanism):
            return without(kernel, ((mechanism, name),))
    raise AssertionError(step)


def without(kernel: Observed, names: tuple[tuple[str, str], ...]) -> Observed:
    assert set(names) <= {(table.mechanism, table.name) for table in kernel.tables}
    return replace(kernel, tables=tuple(table for table in kernel.tables if (table.mechanism, table.name) not in names))


def carry_out(kernel: Observed, wanted: Plan) -> Observed:
    for step in wanted.steps:
        kernel = after(kernel, step)
    return without(kernel, wanted.drop)


ports = st.builds(
    Ports,
    outbound=st.integers(1, 20000),
    inbound=st.integers(20001, 65534),
    dns=st.sampled_from([None, 65535]),
)
lists_of_ports = st.sets(st.integers(1, 65535), max_size=3).map(lambda chosen: tuple(sorted(chosen)))
lists_of_cidrs = st.sets(st.sampled_from(CIDRS)).map(lambda chosen: tuple(sorted(chosen)))
scopes = st.builds(
    Scope,
    out_include_cidrs=lists_of_cidrs,
    out_exclude_cidrs=lists_of_cidrs,
    out_include_ports=lists_of_ports,
    out_exclude_ports=lists_of_ports,
    out_exclude_uids=lists_of_ports,
    in_include_ports=lists_of_ports,
    in_exclude_ports=lists_of_ports,
    in_exclude_cidrs=lists_of_cidrs,
)
steerings = st.builds(
    Steering,
    node=st.just(NODE),
    families=st.sampled_from([frozenset({4}), frozenset({6}), frozenset({4, 6})]),
    failure_policy=st.sampled_from(["open", "closed"]),
    ports=st.one_of(st.just(Ports()), ports),
    vip_cidrs=lists_of_cidrs,
    enabled=st.booleans(),
    scope=st.one_of(st.just(Scope()), scopes),
    mechanism=st.sampled_from(MECHANISMS),
)


@st.composite
def kernels(draw: st.DrawFn) -> Observed:
    tables = []
    for number in sorted(draw(st.sets(st.integers(1, 9), max_size=3))):
        desired = draw(steerings)
        owner = draw(st.sampled_from([None, OWNER])) if desired.mechanism == "nftables" else None
        listing = draw(st.sampled_from([desired.listing(), ("output []",)]))
        name = DIALECTS[desired.mechanism].table_name(NODE, number)
        tables.append(Table(name, number, owner, listing, desired.mechanism))
    routes = draw(st.frozensets(st.sampled_from(CIDRS)))
    return Observed(NODE, lo_up=draw(st.booleans()), routes=routes, tables=tuple(tables))


@given(steerings, kernels())
def test_a_plan_leads_to_what_is_desired(desired: Steering, kernel: Observed) -> None:
    wanted = plan(desired, kernel)
    reached = carry_out(kernel, wanted)
    assert reached.lo_up
    assert reached.routes == desired.routes()
    newest = max(reached.tables, key=lambda table: table.generation)
    assert (newest.generation, newest.listing) == (wanted.generation, desired.listing())
    assert newest.mechanism == desired.mechanism
    assert (newest.owner is not None) is desired.owned
    older = [table for table in reached.tables if table is not newest]
    assert all(table.owner is not None for table in older)
    assert wanted.lingering == tuple(table.name for table in older)
    assert plan(desired, reached).empty


@given(steerings, kernels())
def test_undoing_any_part_of_a_plan_leaves_the_kernel_as_it_was(desired: Steering, kernel: Observed) -> None:
    steps = plan(desired, kernel).steps
    for count in range(len(steps) + 1):
        now = kernel
        for step in steps[:count]:
            now = after(now, step)
        for step in reversed(steps[:count]):
            now = after(now, undo(step))
        assert now == kernel


@given(steerings, kernels())
def test_some_rules_are_there_at_every_moment(desired: Steering, kernel: Observed) -> None:
    """Older rules are dropped only when the new ones are in."""
    wanted = plan(desired, kernel)
    for step in wanted.steps:
        before, kernel = kernel, after(kernel, step)
        assert {table.name for table in before.tables} <= {table.name for table in kernel.tables}
    assert wanted.generation not in {
        table.generation for table in kernel.tables if (table.mechanism, table.name) in wanted.drop
    }


@given(steerings, kernels())
def test_undo_of_undo_is_the_step(desired: Steering, kernel: Observed) -> None:
    for step in plan(desired, kernel).steps:
        assert undo(undo(step)) == step


def test_the_first_plan_and_then_none() -> None:
    desired = Steering(NODE, frozenset({4, 6}), "closed")
    wanted = plan(desired, replace(EMPTY, lo_up=False))
    assert wanted == Plan(
        steps=(
            LinkUp("lo"),
            AddRoute("240.240.0.0/16"),
            AddRoute("fd00:240::/32"),
            CreateTable("netproxy-node-a-g1", desired.wanted()),
        ),
        drop=(),
        generation=1,
        lingering=(),
    )
    reached = carry_out(replace(EMPTY, lo_up=False), wanted)
    assert plan(desired, reached) == Plan((), (), 1, ())


@pytest.mark.parametrize(
    ("before", "then", "dropped", "lingering"),
    [
        ("closed", "closed", (("nftables", "netproxy-node-a-g1"),), ()),
        ("closed", "open", (("nftables", "netproxy-node-a-g1"),), ()),
        ("open", "closed", (), ("netproxy-node-a-g1",)),
        ("open", "open", (), ("netproxy-node-a-g1",)),
    ],
)
def test_replacement(before: Any, then: Any, dropped: tuple[tuple[str, str], ...], lingering: tuple[str, ...]) -> None:
    kernel = carry_out(EMPTY, plan(Steering(NODE, frozenset({4}), before), EMPTY))
    wanted = plan(Steering(NODE, frozenset({4}), then, ports=Ports(outbound=1)), kernel)
    assert (wanted.drop, wanted.lingering, wanted.generation) == (dropped, lingering, 2)


def test_vip_routes_stay_while_disabled() -> None:
    desired = Steering(NODE, frozenset({4}))
    assert replace(desired, enabled=False).routes() == desired.routes() == {"240.240.0.0/16"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"node": ""},
        {"node": "Node"},
        {"node": "a" * 41},
        {"node": "a\n"},
        {"node": "a; flush ruleset"},
        {"families": frozenset()},
        {"families": frozenset({5})},
        {"failure_policy": "ajar"},
        {"ports": Ports(outbound=0)},
        {"ports": Ports(inbound=65536)},
        {"ports": Ports(outbound=15006)},
        {"ports": Ports(dns=15006)},
        {"ports": Ports(dns=65536)},
        {"mechanism": "ebtables"},
        {"mark": 0},
        {"mark": 0x1539},
        {"mask": 0},
        {"mask": 1 << 32},
        {"vip_cidrs": ("240.240.0.1/16",)},
        {"vip_cidrs": ("240.240.0.0",)},
        {"vip_cidrs": ("FD00:240::/32",)},
        {"vip_cidrs": ("everything",)},
    ],
)
def test_what_cannot_be_desired(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"node": NODE, "families": frozenset({4}), **wrong}
    with pytest.raises(RedirectError):
        Steering(**arguments)


def test_nodes_are_not_mixed() -> None:
    with pytest.raises(RedirectError, match="node-b"):
        plan(Steering("node-b", frozenset({4})), EMPTY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"out_include_ports": (2, 1)},
        {"in_exclude_ports": (1, 1)},
        {"in_include_ports": (0,)},
        {"out_exclude_ports": (65536,)},
        {"out_exclude_uids": (-1,)},
        {"out_exclude_uids": (2, 1)},
        {"out_include_cidrs": ("10.0.0.1/8",)},
        {"in_exclude_cidrs": ("everything",)},
        {"in_exclude_ports": tuple(range(1, 300))},
        {"out_exclude_cidrs": tuple(f"10.{one}.{two}.0/24" for one in range(2) for two in range(200))},
    ],
)
def test_what_no_scope_can_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(RedirectError, match=next(iter(wrong))):
        Scope(**wrong)


@given(steerings)
def test_rules_of_iptables_are_closed(desired: Steering) -> None:
    iptables = desired.mechanism.startswith("iptables")
    assert desired.policy_in_force == ("closed" if iptables else desired.failure_policy)
    assert desired.owned is (desired.policy_in_force == "open" and desired.mechanism == "nftables")


@given(steerings, kernels())
def test_another_mechanism_is_moved_to_with_new_rules_first(desired: Steering, kernel: Observed) -> None:
    kernel = carry_out(kernel, plan(replace(desired, mechanism="nftables", failure_policy="closed"), kernel))
    wanted = plan(replace(desired, mechanism="iptables-nft"), kernel)
    assert [type(step) for step in wanted.steps] == [CreateTable]
    assert len(wanted.drop) + len(wanted.lingering) == len(kernel.tables)


TO_HOOKS = Steering(NODE, frozenset({4}), "closed", mechanism="ebpf")


def test_hooks_that_connections_need_stay_until_they_end() -> None:
    rules = replace(TO_HOOKS, mechanism="nftables")
    kernel = replace(carry_out(EMPTY, plan(rules, EMPTY)), translated=True)
    wanted = plan(TO_HOOKS, kernel)
    inert = replace(rules, enabled=False)
    assert [(step.wanted, step.mechanism) for step in wanted.steps if isinstance(step, CreateTable)] == [
        (inert.wanted(), "nftables"),
        (TO_HOOKS.wanted(), "ebpf"),
    ]
    assert (wanted.drop, wanted.kept) == ((("nftables", "netproxy-node-a-g1"),), ("netproxy-node-a-g2",))
    kernel = carry_out(kernel, wanted)
    again = plan(TO_HOOKS, kernel)
    assert again.empty and again.kept == wanted.kept
    # They ended: it goes, and nobody has meddled.
    last = plan(TO_HOOKS, replace(kernel, translated=False))
    assert (last.steps, last.drop, last.kept, last.settles) == ((), (("nftables", "netproxy-node-a-g2"),), (), True)
    # Back to rules there is nothing to be kept.
    back = carry_out(kernel, plan(rules, kernel))
    assert [table.mechanism for table in back.tables] == ["nftables"]


def test_own_addresses_are_followed_and_nobody_has_meddled() -> None:
    kernel = carry_out(EMPTY, plan(TO_HOOKS, EMPTY))
    moved = replace(kernel, addresses=("10.0.0.7",))
    wanted = plan(TO_HOOKS, moved)
    (step,) = wanted.steps
    assert isinstance(step, CreateTable) and step.wanted.own_addresses == ("10.0.0.7",)
    assert wanted.settles
    assert plan(TO_HOOKS, carry_out(moved, wanted)).empty
    assert not plan(replace(TO_HOOKS, ports=Ports(outbound=1)), moved).settles
    # Rules of netfilter ask the routing table.
    rules = replace(TO_HOOKS, mechanism="nftables")
    assert plan(rules, replace(carry_out(EMPTY, plan(rules, EMPTY)), addresses=("10.0.0.7",))).empty


@given(steerings)
def test_what_a_workload_opens_can_be_let_go_alone(desired: Steering) -> None:
    """At a stop, before what comes to it."""
    letting = replace(desired, outbound=False)
    off = replace(desired, enabled=False)
    if desired.mechanism != "ebpf":
        outbound = [line for line in letting.listing() if "output" in line or " nat " in line]
        assert outbound == [line for line in off.listing() if "output" in line or " nat " in line]
    assert (letting.listing() != off.listing()) is (desired.enabled or desired.mechanism == "ebpf")
