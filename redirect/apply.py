"""Executing a plan in a namespace, all of it or nothing.

All functions are synchronous, work in the calling thread (which must not be running an event loop) and may be used by
many threads at once. For one namespace and node the caller lets one call finish before the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from redirect.backend import BACKENDS
from redirect.bpf import Listener
from redirect.ebpf import ENTRIES
from redirect.errors import RedirectError
from redirect.netns import identity, inside
from redirect.observed import observe_here
from redirect.plan import (
    DIALECTS,
    AddRoute,
    CreateTable,
    DeleteRoute,
    DeleteTable,
    Dropped,
    LinkDown,
    LinkUp,
    Observed,
    Plan,
    Steering,
    Step,
    check_node,
    plan,
    undo,
)
from redirect.route import routing
from redirect.unsteered import translated
from redirect.wanted import MECHANISMS, Mechanism


@dataclass(frozen=True, slots=True)
class Applied:
    """What steering left behind, and what the caller must keep.

    owner_fd    set when a new owned table was made: the table lives until the last dup of this fd is closed.
    generation  of the rules now in force. The caller closes the owner fds it holds of any other generation, after this
                call: until then the older rules are there too, which leaves no gap.
    changed     False: everything was as desired, nothing was touched.
    lingering   owned tables of older generations, which are still there.
    undropped   why older rules are still there, which the next call looks at again; "" when they are not.
    settled     nothing was amiss: what changed followed from addresses, or from connections that ended.
    """

    owner_fd: int | None
    generation: int
    changed: bool
    lingering: tuple[str, ...] = ()
    undropped: str = ""
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """`left`: owned tables, which only the closing of their owner's fd removes."""

    left: tuple[str, ...]


def steer(
    netns_fd: int,
    desired: Steering,
    observed: Observed | None = None,
    mechanisms: tuple[Mechanism, ...] = MECHANISMS,
    listeners: Sequence[Listener] = (),
) -> Applied:
    """Make the namespace as desired. RedirectError: it failed and the steps done were undone.

    `mechanisms`: whose rules are looked for, when nothing was observed yet; others may have older rules of ours.
    `listeners`: inbound ones, for a mechanism that hands connections to sockets. They are the caller's to close.
    """
    where = _where(netns_fd, desired.node)
    with inside(netns_fd):
        if observed is None:
            try:
                observed = observe_here(desired.node, mechanisms, desired.mechanism)
            except RedirectError as exc:
                raise RedirectError(str(exc), namespace=where, step="observe") from exc
        observed = _with_connections(desired, observed)
        wanted = plan(desired, observed)
        run = _Execution(desired.node, where, listeners)
        owner_fd = None if wanted.empty else run.run(wanted)
        if (
            listeners
            and desired.mechanism == "ebpf"
            and not any(isinstance(step, CreateTable) for step in wanted.steps)
        ):
            ENTRIES.serve(desired.node, listeners)
    changed = bool(wanted.steps) or bool(wanted.drop and not run.undropped)
    undropped = run.undropped
    if wanted.kept and not undropped:
        undropped = f"connections of before still go by {', '.join(wanted.kept)}, which stays until they end"
    return Applied(owner_fd, wanted.generation, changed, wanted.lingering, undropped, wanted.settles)


def _with_connections(desired: Steering, observed: Observed) -> Observed:
    """Asked for only when it matters: something translates that shall not any more."""
    if DIALECTS[desired.mechanism].TRANSLATES or not any(DIALECTS[t.mechanism].TRANSLATES for t in observed.tables):
        return observed
    return replace(observed, translated=translated(desired.ports.outbound))


def execute(netns_fd: int, node: str, wanted: Plan) -> int | None:
    """Execute a plan; returns the new owner fd, if it makes an owned table. `steer` is plan and execute in one."""
    with inside(netns_fd):
        return _Execution(node, _where(netns_fd, node)).run(wanted)


def remove(netns_fd: int, node: str) -> Removed:
    """Remove this node's plain tables, of every mechanism, and VIP routes. Close the owner fds first: rules go before
    routes.

    lo stays up, because nobody can tell who else relies on it.
    """
    check_node(node)
    where = _where(netns_fd, node)
    step = "observe"
    with inside(netns_fd):
        try:
            observed = observe_here(node)
            step = "delete tables"
            _drop(Dropped(table.mechanism, table.name) for table in observed.tables if table.owner is None)
            ENTRIES.withdraw(node)
            step = "delete VIP routes"
            with routing() as rt:
                for cidr in sorted(observed.routes):
                    rt.delete_route(cidr, node)
        except RedirectError as exc:
            raise RedirectError(str(exc), namespace=where, step=step) from exc
    return Removed(tuple(table.name for table in observed.tables if table.owner is not None))


def _where(netns_fd: int, node: str) -> str:
    return f"node {node} in {identity(netns_fd)}"


class _Execution:
    """One run of a plan in the current namespace."""

    def __init__(self, node: str, where: str, listeners: Sequence[Listener] = ()) -> None:
        self._node = node
        self._listeners = listeners
        self._where = where
        self._owner_fd: int | None = None
        self.undropped = ""

    def run(self, wanted: Plan) -> int | None:
        done: list[Step] = []
        step = ""
        try:
            for each in wanted.steps:
                step = _describe(each)
                self._do(each)
                done.append(each)
                if isinstance(each, CreateTable):
                    step = f"verify table {each.name}"
                    _verify(each, self._node)
            step = f"drop {', '.join(name for _, name in wanted.drop)}"
            _drop(table for table in wanted.drop if DIALECTS[table.mechanism].DROPS_AT_ONCE)
        except RedirectError as exc:
            failures = self._undo(done)
            message = "; ".join([str(exc), *failures])
            raise RedirectError(message, namespace=self._where, step=step) from exc
        try:
            _drop(table for table in wanted.drop if not DIALECTS[table.mechanism].DROPS_AT_ONCE)
        except RedirectError as exc:
            self.undropped = f"older rules can't be removed: {exc}"  # half of them may be gone: no way back
        return self._owner_fd

    def _undo(self, done: list[Step]) -> list[str]:
        """Go back as far as possible; what could not be undone, in words."""
        failures = []
        for step in reversed(done):
            try:
                self._do(undo(step))
            except RedirectError as exc:
                failures.append(f"not undone ({_describe(step)}): {exc}")
        return failures

    def _do(self, step: Step) -> None:
        match step:
            case LinkUp(name) | LinkDown(name):
                with routing() as rt:
                    rt.set_link(name, up=isinstance(step, LinkUp))
            case AddRoute(cidr):
                with routing() as rt:
                    rt.add_route(cidr, self._node)
            case DeleteRoute(cidr):
                with routing() as rt:
                    rt.delete_route(cidr, self._node)
            case CreateTable(name, wanted, mechanism):
                self._owner_fd = BACKENDS[mechanism].create(name, wanted, self._listeners)
            case DeleteTable(name, wanted, mechanism):
                if not DIALECTS[mechanism].is_owned(wanted.failure_policy):
                    BACKENDS[mechanism].delete((name,))
                elif self._owner_fd is not None:
                    os.close(self._owner_fd)
                    self._owner_fd = None
            case _:
                assert_never(step)


def _drop(tables: Iterable[Dropped]) -> None:
    names: dict[Mechanism, list[str]] = {}
    for mechanism, name in tables:
        names.setdefault(mechanism, []).append(name)
    for mechanism, found in names.items():
        BACKENDS[mechanism].delete(tuple(found))


def _verify(made: CreateTable, node: str) -> None:
    """Read the new table back. A libnftables or iptables which words rules in a way we do not know would otherwise look
    like drift for ever, and every look would replace the table."""
    tables = BACKENDS[made.mechanism].tables(node)
    found = next((table.listing for table in tables if table.name == made.name), ())
    expected = DIALECTS[made.mechanism].listing(made.wanted)
    if found != expected:
        odd = next((line for line in found if line not in expected), "a rule is missing")
        raise RedirectError(f"the kernel lists other rules than were loaded: {odd}")


def _describe(step: Step) -> str:
    match step:
        case LinkUp(name):
            return f"bring {name} up"
        case LinkDown(name):
            return f"bring {name} down"
        case AddRoute(cidr):
            return f"add route {cidr}"
        case DeleteRoute(cidr):
            return f"delete route {cidr}"
        case CreateTable(name):
            return f"create table {name}"
        case DeleteTable(name):
            return f"delete table {name}"
    assert_never(step)
