"""Steering by eBPF as one of the mechanisms: a namespace's entry in the maps of the node's hooks (`redirect.bpf`).

    create      hooks loaded if they are not, listeners, then the entry: one write, all of it or nothing
    delete      of the generation in force: the one before it comes back if it was replaced just now, else the entry
                steers nothing any more. It stays until `withdraw`, since the proxy may not have asked yet where to
                connections that were steered a moment ago were going
    withdraw    nothing of the namespace is left
    release     nothing of the node is left, unless somebody is still enrolled

The process that creates is the only one that does so for a node, and remembers what it wanted: what the kernel has is
compared with that. What another process left there steers, and is nothing that anybody could want.

Calls may come from many threads; the lock is held for microseconds, but for the load of the hooks, which takes a
second. Namespaces are the calling thread's current one.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from redirect.bpf import Balanced, Count, Hooks, Key, Listener, Proxy, Workload, bpffs, clean, layout, syscall
from redirect.bpf.pins import is_attached, place_of
from redirect.bpf.programs import HOOKS
from redirect.entries import listing
from redirect.errors import RedirectError
from redirect.netfilter.nft import parse_table_name, table_name
from redirect.netns import cookie, current
from redirect.wanted import Table, Wanted

_T = TypeVar("_T")
_STEERS = layout.Flag.OUTBOUND | layout.Flag.INBOUND


@dataclass(frozen=True, slots=True)
class _Placed:
    """What this process has put there."""

    name: str
    generation: int
    wanted: Wanted
    before: _Placed | None = None
    """What it took the place of, until that is dropped."""


class Entries:
    """The `Backend`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hooks: dict[str, Hooks] = {}
        self._balanced: dict[str, dict[tuple[str, int], Balanced]] = {}
        """By node, what is wanted; None yet: what is in the maps stays."""
        self._unbalanced: dict[str, dict[tuple[str, int], str]] = {}
        """Which of them could not be had, and why."""
        self._placed: dict[tuple[str, int], _Placed] = {}

    def tables(self, node: str) -> list[Table]:
        if not bpffs.folder(node).is_dir():
            return []
        number = cookie()
        with self._lock:
            placed = self._placed.get((node, number))
            if placed is None:
                row = _row(node, number)
                if row is None or not row.flags & _STEERS:
                    return []
                return [Table(table_name(node, 1), 1, None, ("of another process",), "ebpf")]
            changed = self._difference(node, Key("pod", number), placed)
        found = (f"changed: {changed}",) if changed else listing(placed.wanted)
        return [Table(placed.name, placed.generation, None, found, "ebpf")]

    def create(self, name: str, wanted: Wanted, listeners: Iterable[Listener] = ()) -> int | None:
        node, generation = _parse(name)
        number = cookie()
        with current() as here, self._lock:
            hooks = self._opened(node)
            hooks.configure(Proxy(mark=wanted.mark, mask=wanted.mask))
            hooks.enrol_pod(here, workload_of(wanted), listeners)
            before = self._placed.get((node, number))
            self._placed[node, number] = _Placed(name, generation, wanted, before)
            if self._may_retire(node):
                hooks.retire()
        return None

    def serve(self, node: str, listeners: Iterable[Listener]) -> None:
        """More listeners, or others, for what is there."""
        key = Key("pod", cookie())
        with self._lock:
            hooks = self._hooks.get(node)
            if hooks is not None and _row(node, key.number) is not None:
                for listener in listeners:
                    hooks.listen(key, listener)

    def delete(self, names: tuple[str, ...]) -> None:
        number = cookie()
        for name in names:
            node, _ = _parse(name)
            with self._lock:
                self._delete(node, number, name)

    def _delete(self, node: str, number: int, name: str) -> None:
        placed = self._placed.get((node, number))
        if placed is None:
            _withdraw_raw(node, number)
            return
        if placed.name != name:
            if placed.before is not None and placed.before.name == name:
                self._placed[node, number] = _Placed(placed.name, placed.generation, placed.wanted)
            return
        hooks = self._opened(node)
        with current() as here:
            if placed.before is not None:
                hooks.enrol_pod(here, workload_of(placed.before.wanted))
                self._placed[node, number] = placed.before
            else:
                hooks.enrol_pod(here, workload_of(placed.wanted, steers=False))
                del self._placed[node, number]

    def withdraw(self, node: str) -> None:
        """All of this namespace goes, whoever put it there."""
        if not bpffs.folder(node).is_dir():
            return
        number = cookie()
        with self._lock:
            self._placed.pop((node, number), None)
            hooks = self._hooks.get(node)
            if hooks is not None:
                hooks.withdraw(Key("pod", number))
            else:
                _withdraw_raw(node, number)

    def release(self, node: str) -> bool:
        """False: somebody is enrolled, so the hooks stay."""
        with self._lock:
            if any(_numbers(place, kind) for place in bpffs.sets(node) for kind in ("pods", "cgroups")):
                return False
            hooks = self._hooks.pop(node, None)
            if hooks is not None:
                hooks.close()
            clean(node)
            return True

    def balance(self, node: str, services: Iterable[Balanced]) -> dict[tuple[str, int], str]:
        """These and no others, now or when there are hooks. Why, for those that can't: they are the proxy's."""
        with self._lock:
            before = self._balanced.get(node)
            wanted = self._balanced[node] = {(service.address, service.port): service for service in services}
            hooks = self._hooks.get(node)
            if hooks is not None and wanted != before:
                try:
                    self._settle_balanced(node, hooks, before or {})
                except RedirectError:
                    del self._balanced[node]  # nobody knows what is in the maps: the next call puts it all
                    raise
            return dict(self._unbalanced.get(node, {}))

    def _settle_balanced(self, node: str, hooks: Hooks, before: Mapping[tuple[str, int], Balanced]) -> None:
        """`before`: what is in the maps already, with all of its endpoints."""
        wanted = self._balanced.get(node)
        if wanted is None:
            return
        earlier, failed = self._unbalanced.get(node, {}), dict[tuple[str, int], str]()
        self._unbalanced[node] = failed
        for place in hooks.balanced().keys() - wanted.keys():
            hooks.unbalance(*place)
        for place, service in wanted.items():
            if before.get(place) == service and place not in earlier:
                continue
            try:
                hooks.balance(service)
            except RedirectError as exc:
                failed[place] = str(exc)
                hooks.unbalance(*place)

    def change(self, node: str, work: Callable[[Hooks], _T]) -> _T:
        """For what is no namespace's: one at a time, with hooks that are whole."""
        with self._lock:
            return work(self._opened(node))

    def counters(self, node: str, key: Key) -> dict[Count, int]:
        """Since it was enrolled; {} when it is not. Never waits."""
        hooks = self._hooks.get(node)
        return hooks.counters(key) if hooks is not None else {}

    def _opened(self, node: str) -> Hooks:
        """Loaded and attached, also when somebody has taken a part of it away."""
        hooks = self._hooks.get(node)
        if hooks is not None and not _missing(node):
            return hooks
        if hooks is not None:
            del self._hooks[node]
            hooks.close()
            # What was in the maps may be gone: each is to be placed again, and its listeners are.
            self._placed = {key: placed for key, placed in self._placed.items() if key[0] != node}
        hooks = Hooks.open(node)
        try:
            self._settle_balanced(node, hooks, {})
        except RedirectError:
            hooks.close()
            raise
        self._hooks[node] = hooks
        for key in hooks.enrolled():
            if key.kind == "pod" and (node, key.number) not in self._placed:
                path = _place(node) / f"inbound_{key.number}"
                if path.exists() and not is_attached(path):  # its namespace went while nobody looked
                    hooks.withdraw(key)
        return hooks

    def _may_retire(self, node: str) -> bool:
        """All who are enrolled in the maps of an earlier layout, and still there, are enrolled in the present ones."""
        earlier = [place for place in bpffs.sets(node) if place != _place(node)]
        present = set(_numbers(_place(node), "cgroups"))
        return bool(earlier) and all(
            present.issuperset(_numbers(place, "cgroups"))
            and all(
                (node, number) in self._placed for number in _numbers(place) if is_attached(place / f"inbound_{number}")
            )
            for place in earlier
        )

    def _difference(self, node: str, key: Key, placed: _Placed) -> str:
        """From what this process has put there; "": none."""
        if missing := _missing(node):
            return missing
        hooks = self._hooks.get(node)
        if hooks is None or not hooks.is_current(key, workload_of(placed.wanted)):
            return "the entry"
        return ""


ENTRIES = Entries()
"""One for a process, as there is one kernel."""


def release(node: str) -> bool:
    """Take the node's hooks off and all that is pinned; False: somebody is enrolled, so they stay. RedirectError."""
    return ENTRIES.release(node)


def balance(node: str, services: Iterable[Balanced]) -> dict[tuple[str, int], str]:
    """Services whose connections are balanced where they are made, by all workloads that the node steers by eBPF: these
    and no others. By address and port, why some could not be had. RedirectError."""
    return ENTRIES.balance(node, services)


def counters(node: str, key: Key) -> dict[str, int]:
    """Connections of the namespace or cgroup, by what became of them; {} when it is not steered by eBPF here. Takes
    microseconds. RedirectError."""
    return {what.name.lower(): count for what, count in ENTRIES.counters(node, key).items()}


def fingerprint(node: str, number: int) -> bytes:
    """As long as it is the same, so is the entry. Lists of networks and ports, and whether what is pinned is attached,
    only a look tells.

    Pins are told apart by inode: when the repair of one workload has put new ones in their places, what the others had
    in the old maps is gone.
    """
    row = _row(node, number)
    if row is None:
        return b""
    pins = [
        f"inbound_{number}",
        *(f"link_{hook.name}" for hook in HOOKS if not hook.per_namespace),
        *(f"map_{made.name}" for made in layout.MAPS),
    ]
    return bytes(row) + b"".join(_inode(_place(node) / name).to_bytes(8, sys.byteorder) for name in pins)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _parse(name: str) -> tuple[str, int]:
    found = parse_table_name(name)
    if found is None:
        raise RedirectError(f"{name!r} is no generation's name")
    return found


def workload_of(wanted: Wanted, *, steers: bool = True) -> Workload:
    steers = steers and wanted.enabled
    return Workload(
        families=wanted.families,
        ports=wanted.ports,
        scope=wanted.scope,
        vip_cidrs=wanted.vips,
        own_addresses=wanted.own_addresses,
        policy=wanted.failure_policy,
        outbound=steers and wanted.outbound,
        inbound=steers,
        workers=wanted.workers,
    )


def _missing(node: str) -> str:
    """Which part of the node's hooks is not there, or not attached; "": none."""
    place = _place(node)
    for made in layout.MAPS:
        if not (place / f"map_{made.name}").exists():
            return f"map_{made.name} is not pinned"
    for hook in HOOKS:
        if not hook.per_namespace and not is_attached(place / f"link_{hook.name}"):
            return f"link_{hook.name} is not attached"
    return ""


def _place(node: str) -> Path:
    return place_of(node, bpffs.BPFFS)


def _pods(place: Path) -> int | None:
    """An fd of the map, which is the caller's; None where there is none."""
    return syscall.get(str(place / "map_pods"))


def _row(node: str, number: int) -> layout.Workload | None:
    fd = _pods(_place(node))
    if fd is None:
        return None
    try:
        value = syscall.lookup(fd, _number(number), ctypes.sizeof(layout.Workload))
        return None if value is None else layout.Workload.from_buffer_copy(value)
    finally:
        os.close(fd)


def _numbers(place: Path, kind: str = "pods") -> list[int]:
    """Cookies of all who are enrolled there, or ids of cgroups."""
    fd = syscall.get(str(place / f"map_{kind}"))
    if fd is None:
        return []
    try:
        return [int.from_bytes(key, sys.byteorder) for key in syscall.keys(fd, 8)]
    finally:
        os.close(fd)


def _withdraw_raw(node: str, number: int) -> None:
    """For a process that has not opened the hooks. Lists of the entry stay, for the next who opens them or `clean`."""
    for place in bpffs.sets(node):
        fd = _pods(place)
        if fd is None:
            continue
        try:
            syscall.delete(fd, _number(number))
            bpffs.unpin(place / f"inbound_{number}")
        finally:
            os.close(fd)


def _number(number: int) -> bytes:
    return bytes(ctypes.c_uint64(number))
