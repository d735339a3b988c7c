"""The hooks of a node, from the outside: open, enrol workloads, read what happened, remove.

    hooks = Hooks.open("node-a")              what is pinned is used again; else a short-lived process makes it
    hooks.configure(Proxy(...))               whose connections pass
    key = hooks.enrol_pod(netns_fd, Workload(...), listeners)
    hooks.listen(key, Listener(...))          a worker's inbound listener came
    hooks.counters(key)                       what became of its connections
    hooks.withdraw(key)
    hooks.retire()                            after an upgrade: all is enrolled, what was before may go
    hooks.close()                             the hooks stay

    clean("node-a")                           removes all of the node, whoever made it

One process, and one thread of it, at a time may have the Hooks of a node open. Nothing hangs on that process: programs,
links and maps are pinned, and decide by themselves while it is dead. A change is one write for a workload, so a
connection sees either the earlier or the later wish. Enrolling what is enrolled is a change, also after a restart, and
one of nothing writes nothing.

Everything raises RedirectError. Calls block for as long as bpf(2) takes, microseconds each; `open` up to seconds.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from redirect.bpf import bpffs, compiler, layout, pins, programs, syscall
from redirect.bpf.balance import Balanced, endpoint_rows, service_key, service_row
from redirect.bpf.layout import Count, Flag
from redirect.bpf.programs import HOOKS, INBOUND
from redirect.bpf.workload import Key, Workload, network_rows, value_rows
from redirect.errors import RedirectError
from redirect.netns import netns_cookie
from redirect.wanted import Family

LOAD_PATIENCE_S = 60.0
"""A compiler on a host that is busy with everything else."""
RETIRE_GRACE_S = 0.2
"""Between a connect() and the proxy's question where to."""
_ONLY = bytes(4)


@dataclass(frozen=True, slots=True)
class Proxy:
    """Whose connections pass: of processes in these cgroups (paths below cgroup2's mount), of sockets with the mark.

    `mask` 0: no socket is told by its mark.
    """

    cgroups: tuple[Path, ...] = ()
    mark: int = 0
    mask: int = 0

    def __post_init__(self) -> None:
        if len(self.cgroups) > layout.PROXY_CGROUPS:
            raise RedirectError(f"{len(self.cgroups)} cgroups of a proxy, {layout.PROXY_CGROUPS} are possible")
        if self.mark & ~self.mask:
            raise RedirectError(f"mark {self.mark:#x} is not within the mask {self.mask:#x}")


class Listener(NamedTuple):
    """An inbound listener, of one worker and family. `fd` is a listening socket, which the kernel forgets when it is
    closed everywhere."""

    family: Family
    worker: int
    fd: int


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What the kernel has of a workload. `listeners`: (family, worker) that are there now."""

    key: Key
    netns: int
    flags: Flag
    outbound_port: int
    dns_port: int
    workers: int
    listeners: frozenset[tuple[int, int]]


class Link(NamedTuple):
    """An attached program, by the ids that bpftool shows.

    `target`: id of the cgroup, inode of the namespace; 0 when it was detached, or its namespace is gone.
    """

    name: str
    id: int
    program: int
    target: int


class Hooks:
    def __init__(self, node: str, mount: Path, maps: dict[str, int], codes: dict[str, bytes], stack: ExitStack) -> None:
        self.node = node
        self._mount = mount
        self.place = pins.place_of(node, mount)
        self._maps = maps
        self._codes = codes
        self._stack = stack
        self._cpus = _possible_cpus()
        self._scopes: dict[int, list[tuple[str, bytes]]] = {}
        self._sets: dict[int, list[bytes]] = {}
        self._known: dict[Key, tuple[int, int]] = {}
        """Namespace and flags, of what is enrolled: this is the only process that changes it."""
        self._last_id = 0
        self._last_scope = 0
        self._last_set = 0
        self._read()

    # --- open and close

    @classmethod
    def open(cls, node: str, *, mount: Path = bpffs.BPFFS, cgroup: Path | None = None) -> Hooks:
        """The node's hooks, attached to `cgroup`: the root of all unless a test has one of its own.

        bpffs is mounted on `mount` if it is not. Programs of other sources are replaced, each at one instant.
        """
        bpffs.mounted(mount)
        if not is_complete(node, mount):
            _run_loader(node, mount, cgroup or bpffs.cgroup_root())
        with ExitStack() as stack:
            maps = pins.open_maps(pins.place_of(node, mount), stack, make=False)
            _, codes = programs.unpacked(syscall.lookup(maps["image"], _ONLY, ctypes.sizeof(layout.Image)) or b"")
            if INBOUND.name not in codes:
                raise RedirectError("its instructions are not there", namespace=f"node {node}", step="open hooks")
            return cls(node, mount, maps, codes, stack.pop_all())

    def close(self) -> None:
        """Gives back descriptors. What is attached stays."""
        self._stack.close()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- workloads

    def configure(self, proxy: Proxy) -> None:
        config = self._config()
        ids = [bpffs.cgroup_id(path) for path in proxy.cgroups]
        config.proxy_cgroups[:] = ids + [0] * (layout.PROXY_CGROUPS - len(ids))
        config.mark, config.mask = proxy.mark, proxy.mask
        self._write_config(config)

    def enrol_pod(self, netns_fd: int, workload: Workload, listeners: Iterable[Listener] = ()) -> Key:
        """Steer the namespace, or change how. Listeners are there before the first connection needs them."""
        key = Key("pod", netns_cookie(netns_fd))
        self._enrol(key, key.number, netns_fd, workload, listeners)
        return key

    def enrol_cgroup(self, cgroup: Path, netns_fd: int, workload: Workload, listeners: Iterable[Listener] = ()) -> Key:
        """Steer what runs in the cgroup and below, in that network namespace: the host's. There is one such namespace.

        Inbound needs `scope.in_include_ports`: no other port of the host is touched.
        """
        key = Key("cgroup", bpffs.cgroup_id(cgroup))
        netns = netns_cookie(netns_fd)
        config = self._config()
        if config.host_netns not in (0, netns) and config.cgroups:
            raise RedirectError(
                "cgroups of another network namespace are enrolled", namespace=str(cgroup), step="enrol"
            )
        if workload.inbound and not workload.scope.in_include_ports:
            raise RedirectError("inbound needs the ports that are its own", namespace=str(cgroup), step="enrol")
        self._enrol(key, netns, netns_fd, workload, listeners)
        config = self._config()
        config.host_netns = netns
        config.cgroups = len(syscall.keys(self._maps["cgroups"], 8))
        self._write_config(config)
        return key

    def listen(self, key: Key, listener: Listener) -> None:
        """In place of the one that this worker had in this family."""
        row = self._row(key)
        if row is None:
            raise RedirectError("it is not enrolled", namespace=str(key), step="listen")
        self._listen(row.id, listener)

    def unlisten(self, key: Key, family: Family, worker: int) -> None:
        """Before a worker stops accepting. Nothing to do for one that is closed."""
        row = self._row(key)
        if row is not None:
            syscall.delete(self._maps["listeners"], bytes(layout.SlotKey(row.id, family, worker)))

    def withdraw(self, key: Key) -> None:
        """Nothing of it is steered any more; its namespace or cgroup may be gone. Established connections live on."""
        row = self._row(key)
        if row is None:
            return
        syscall.delete(self._maps[_map_of(key)], _number(key.number))
        self._known.pop(key, None)
        if key.kind == "cgroup":
            config = self._config()
            config.cgroups = len(syscall.keys(self._maps["cgroups"], 8))
            self._write_config(config)
            self._own_ports(key, row.netns, ())
        self._settle_inbound(row.netns)
        self._forget(row.id)
        self._drop_scope(row.scope)
        if not any(netns == row.netns for netns, _ in self._known.values()):
            size = ctypes.sizeof(layout.FlowKey)
            for name, value in (("flows", layout.Destination), ("legs", ctypes.c_uint8)):
                found = syscall.keys_at_once(self._maps[name], size, ctypes.sizeof(value))
                stale = [key for key in found if key[:8] == _number(row.netns)]
                syscall.delete_batch(self._maps[name], stale)

    def retire(self) -> list[str]:
        """Remove the sets of earlier layouts, when all that shall be steered is enrolled here: a proxy that was told of
        a connection still asks where to. Returns the names of what was removed."""
        with bpffs.locked(bpffs.folder(self.node, self._mount)):
            earlier = [place for place in bpffs.sets(self.node, self._mount) if place != self.place]
            return _remove(earlier, RETIRE_GRACE_S)

    # --- balanced services

    def balance(self, service: Balanced) -> None:
        """Make or change it. The endpoints are complete before the first connection sees one of them."""
        self._last_set += 1
        number = self._last_set
        rows = endpoint_rows(service, number)
        key = service_key(service.address, service.port)
        before = syscall.lookup(self._maps["services"], key, ctypes.sizeof(layout.Service))
        self._sets[number] = [row[0] for row in rows]
        try:
            syscall.update_batch(self._maps["endpoints"], rows)
            syscall.update(self._maps["services"], key, service_row(service, number), step="balance a service")
        except RedirectError:
            self._drop_set(number)
            raise
        if before is not None:
            self._drop_set(layout.Service.from_buffer_copy(before).set)

    def unbalance(self, address: str, port: int) -> None:
        key = service_key(address, port)
        before = syscall.lookup(self._maps["services"], key, ctypes.sizeof(layout.Service))
        if before is not None:
            syscall.delete(self._maps["services"], key)
            self._drop_set(layout.Service.from_buffer_copy(before).set)

    def balanced(self) -> dict[tuple[str, int], int]:
        """Services by VIP and port, with how many endpoints they have."""
        found = {}
        for octets in syscall.keys(self._maps["services"], ctypes.sizeof(layout.ServiceKey)):
            value = syscall.lookup(self._maps["services"], octets, ctypes.sizeof(layout.Service))
            if value is not None:
                key = layout.ServiceKey.from_buffer_copy(octets)
                place = (layout.text_of(bytes(key.address)), socket.ntohs(key.port))
                found[place] = int(layout.Service.from_buffer_copy(value).count)
        return found

    # --- facts

    def enrolled(self) -> dict[Key, Enrolled]:
        found = {}
        every = syscall.keys(self._maps["listeners"], ctypes.sizeof(layout.SlotKey))
        filled: dict[int, set[tuple[int, int]]] = {}
        for slot in map(layout.SlotKey.from_buffer_copy, every):
            filled.setdefault(slot.id, set()).add((slot.family, slot.worker))
        for key, row in self._rows():
            slots = frozenset(filled.get(row.id, ()))
            found[key] = Enrolled(key, row.netns, Flag(row.flags), row.outbound_port, row.dns_port, row.workers, slots)
        return found

    def is_current(self, key: Key, workload: Workload) -> bool:
        """Whether the kernel has it so: what `enrol` would change nothing of. Listeners are not looked at."""
        row = self._row(key)
        if row is None or bytes(row) != bytes(workload.row(row.netns, row.id, row.scope)):
            return False
        return self._has_scope(row.scope, workload) and (
            not workload.inbound or pins.is_attached(self.place / f"inbound_{row.netns}")
        )

    def counters(self, key: Key) -> dict[Count, int]:
        """Since it was enrolled; {} when it is not."""
        row = self._row(key)
        if row is None:
            return {}
        size = ctypes.sizeof(layout.Counters)
        value = syscall.lookup(self._maps["counters"], bytes(ctypes.c_uint32(row.id)), size * self._cpus)
        each = (layout.Counters * self._cpus).from_buffer_copy(value or bytes(size * self._cpus))
        return {what: sum(one.count[what] for one in each) for what in Count}

    def links(self) -> list[Link]:
        return links(self.node, mount=self._mount)

    # --- parts

    def _read(self) -> None:
        """Which scopes and sets of endpoints there are, so that what an earlier process left behind is removed."""
        for name, shape in (("networks", layout.NetworkKey), ("values", layout.ValueKey)):
            for key in syscall.keys(self._maps[name], ctypes.sizeof(shape)):
                self._scopes.setdefault(shape.from_buffer_copy(key).scope, []).append((name, key))
        for key in syscall.keys(self._maps["endpoints"], ctypes.sizeof(layout.EndpointKey)):
            self._sets.setdefault(layout.EndpointKey.from_buffer_copy(key).set, []).append(key)
        rows = self._rows()
        self._known = {key: (row.netns, row.flags) for key, row in rows}
        # Also above those of counters: a process that died while it enrolled leaves them.
        ids = [ctypes.c_uint32.from_buffer_copy(key).value for key in syscall.keys(self._maps["counters"], 4)]
        self._last_id = max([*ids, *(row.id for _, row in rows)], default=0)
        for number in set(ids) - {row.id for _, row in rows}:
            self._forget(number)
        self._last_scope = max([*self._scopes, *(row.scope for _, row in rows)], default=0)
        for scope in set(self._scopes) - {row.scope for _, row in rows}:
            self._drop_scope(scope)
        sets = set()
        for key in syscall.keys(self._maps["services"], ctypes.sizeof(layout.ServiceKey)):
            value = syscall.lookup(self._maps["services"], key, ctypes.sizeof(layout.Service))
            if value is not None:
                sets.add(layout.Service.from_buffer_copy(value).set)
        self._last_set = max([*self._sets, *sets], default=0)
        for number in set(self._sets) - sets:
            self._drop_set(number)

    def _enrol(self, key: Key, netns: int, netns_fd: int, workload: Workload, listeners: Iterable[Listener]) -> None:
        before = self._row(key)
        ports = workload.scope.in_include_ports if key.kind == "cgroup" and workload.inbound else ()
        self._check_ports(key, netns, ports)
        if before is None:
            self._last_id += 1
        number = self._last_id if before is None else before.id
        with ExitStack() as undo:
            if before is None:
                undo.callback(self._forget, number)
                empty = bytes(ctypes.sizeof(layout.Counters) * self._cpus)
                syscall.update(self._maps["counters"], bytes(ctypes.c_uint32(number)), empty, step=f"enrol {key}")
            for listener in listeners:
                self._listen(number, listener)
            if before is not None and self._has_scope(before.scope, workload):
                scope = before.scope
            else:
                scope = self._make_scope(workload)
                undo.callback(self._drop_scope, scope)
            row = bytes(workload.row(netns, number, scope))
            if before is None or row != bytes(before):
                syscall.update(self._maps[_map_of(key)], _number(key.number), row, step=f"enrol {key}")
            undo.pop_all()
        self._known[key] = (netns, int(workload.flags()))
        if before is not None and before.scope != scope:
            self._drop_scope(before.scope)
        if before is not None:
            self._drop_slots(number, range(workload.workers, before.workers))
        if key.kind == "cgroup":
            self._own_ports(key, netns, ports)
        self._settle_inbound(netns, netns_fd)

    def _forget(self, number: int) -> None:
        """What is kept under a workload's number."""
        self._drop_slots(number, range(layout.MAX_WORKERS))
        syscall.delete(self._maps["counters"], bytes(ctypes.c_uint32(number)))

    def _settle_inbound(self, netns: int, netns_fd: int = -1) -> None:
        """The program of a namespace is there while some workload in it takes connections."""
        path = self.place / f"inbound_{netns}"
        wanted = any(found == netns and flags & Flag.INBOUND for found, flags in self._known.values())
        if not wanted:
            bpffs.unpin(path)
        elif netns_fd >= 0 and not pins.is_attached(path):
            program = programs.load(INBOUND, self._codes[INBOUND.name], self._maps, netns)
            try:
                pins.attach(path, program, netns_fd, INBOUND.attach)
            finally:
                os.close(program)

    def _check_ports(self, key: Key, netns: int, ports: tuple[int, ...]) -> None:
        for port in ports:
            owner = syscall.lookup(self._maps["ports"], bytes(layout.PortKey(netns, port)), 8)
            if owner not in (None, _number(key.number)):
                raise RedirectError(f"port {port} is another workload's", namespace=str(key), step="enrol")

    def _own_ports(self, key: Key, netns: int, ports: tuple[int, ...]) -> None:
        """The ports of the host that lead to this cgroup's listeners."""
        wanted = {bytes(layout.PortKey(netns, port)) for port in ports}
        for found in syscall.keys(self._maps["ports"], ctypes.sizeof(layout.PortKey)):
            if found not in wanted and syscall.lookup(self._maps["ports"], found, 8) == _number(key.number):
                syscall.delete(self._maps["ports"], found)
        for found in wanted:
            syscall.update(self._maps["ports"], found, _number(key.number), step=f"enrol {key}")

    def _listen(self, number: int, listener: Listener) -> None:
        slot = layout.SlotKey(number, listener.family, listener.worker)
        syscall.update(
            self._maps["listeners"], bytes(slot), bytes(ctypes.c_uint32(listener.fd)), step="keep a listener"
        )

    def _drop_slots(self, number: int, workers: range) -> None:
        for worker in workers:
            for family in (4, 6):
                syscall.delete(self._maps["listeners"], bytes(layout.SlotKey(number, family, worker)))

    def _make_scope(self, workload: Workload) -> int:
        scope = self._last_scope = self._last_scope + 1
        rows = {
            "networks": network_rows(workload.networks(), scope),
            "values": value_rows(workload.values(), scope),
        }
        self._scopes[scope] = [(name, key) for name, found in rows.items() for key, _ in found]
        try:
            for name, found in rows.items():
                syscall.update_batch(self._maps[name], found)
        except RedirectError:
            self._drop_scope(scope)
            raise
        return scope

    def _has_scope(self, scope: int, workload: Workload) -> bool:
        wanted = {("networks", *row) for row in network_rows(workload.networks(), scope)}
        wanted |= {("values", *row) for row in value_rows(workload.values(), scope)}
        if {(name, key) for name, key, _ in wanted} != set(self._scopes.get(scope, ())):
            return False
        return all(syscall.lookup(self._maps[name], key, len(value)) == value for name, key, value in wanted)

    def _drop_scope(self, scope: int) -> None:
        for name, key in self._scopes.pop(scope, ()):
            syscall.delete(self._maps[name], key)

    def _drop_set(self, number: int) -> None:
        syscall.delete_batch(self._maps["endpoints"], self._sets.pop(number, []))

    def _row(self, key: Key) -> layout.Workload | None:
        value = syscall.lookup(self._maps[_map_of(key)], _number(key.number), ctypes.sizeof(layout.Workload))
        return None if value is None else layout.Workload.from_buffer_copy(value)

    def _rows(self) -> list[tuple[Key, layout.Workload]]:
        found = []
        for kind in ("pod", "cgroup"):
            for number in syscall.keys(self._maps[f"{kind}s"], 8):
                key = Key(kind, int.from_bytes(number, sys.byteorder))
                if (row := self._row(key)) is not None:
                    found.append((key, row))
        return found

    def _config(self) -> layout.Config:
        value = syscall.lookup(self._maps["config"], _ONLY, ctypes.sizeof(layout.Config))
        return layout.Config.from_buffer_copy(value or bytes(ctypes.sizeof(layout.Config)))

    def _write_config(self, config: layout.Config) -> None:
        syscall.update(self._maps["config"], _ONLY, bytes(config), step="configure")


def links(node: str, *, mount: Path = bpffs.BPFFS) -> list[Link]:
    """What the node has attached, also by sets that are not retired; its hooks need not be open."""
    found = []
    for place in bpffs.sets(node, mount):
        for name in bpffs.pinned(place):
            fd = None if name.startswith("map_") else syscall.get(str(place / name))
            if fd is None:
                continue
            try:
                found.append(Link(name, *syscall.describe_link(fd)))
            finally:
                os.close(fd)
    return found


def clean(node: str, *, mount: Path = bpffs.BPFFS) -> list[str]:
    """Detach and remove all that the node has pinned, whatever made it. Returns the names; [] where nothing was."""
    place = bpffs.folder(node, mount)
    if not place.is_dir():
        return []
    with bpffs.locked(place):
        removed = _remove(bpffs.sets(node, mount), 0)
    bpffs.remove_folders(place, place.parent)
    return removed


def _remove(places: list[Path], grace_s: float) -> list[str]:
    """What steers goes first; after the grace what tells of it."""
    removed = []
    for is_last in (False, True):
        for place in places:
            for name in bpffs.pinned(place):
                if is_last or name.startswith(("link_connect", "link_sendmsg", "inbound_")):
                    bpffs.unpin(place / name)
                    removed.append(name)
        if removed and not is_last:
            time.sleep(grace_s)
    for place in places:
        bpffs.remove_folders(place)
    return removed


def _map_of(key: Key) -> str:
    return f"{key.kind}s"


def _number(number: int) -> bytes:
    return bytes(ctypes.c_uint64(number))


def _possible_cpus() -> int:
    """Values of a per-CPU map have a place for each CPU that there could be."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.rpartition(",")[2].rpartition("-")[2]) + 1


def is_complete(node: str, mount: Path = bpffs.BPFFS) -> bool:
    """All that the present sources would pin is pinned, and attached."""
    place = pins.place_of(node, mount)
    attached = [hook for hook in HOOKS if not hook.per_namespace]
    if not {f"map_{made.name}" for made in layout.MAPS} <= set(bpffs.pinned(place)):
        return False
    if not all(pins.is_attached(place / f"link_{hook.name}") for hook in attached):
        return False
    with ExitStack() as stack, suppress(RedirectError):
        maps = pins.open_maps(place, stack, make=False)
        value = syscall.lookup(maps["image"], _ONLY, ctypes.sizeof(layout.Image))
        return value is not None and programs.unpacked(value)[0] == compiler.version()
    return False


_compiled = {"instructions": ""}
"""What a loader of this process has printed: the next one need not compile."""


def _run_loader(node: str, mount: Path, cgroup: Path) -> None:
    command = [sys.executable, "-P", "-m", "redirect.bpf.loader", node, str(mount), str(cgroup)]
    step = "load hooks"
    try:
        given = _compiled["instructions"]
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=LOAD_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise RedirectError(str(exc), namespace=f"node {node}", step=step) from exc
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise RedirectError(lines[-1], namespace=f"node {node}", step=step)
    _compiled["instructions"] = done.stdout
