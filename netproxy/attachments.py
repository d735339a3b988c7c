"""What the supervisor holds of each workload: namespace, listeners, what keeps its steering alive.

Sockets are made inside the workload's network namespace, marked, and handed out as descriptors; who gets them and who
is told is the supervisor's business. All of it survives an upgrade: `takeover` gives what `take_over` gets. Standard
library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .channel import MAX_FDS
from .holder import Holder, release

_DNS_KINDS = ("dns", "dns-tcp")
"""Of listeners: datagrams and connections to the port for names. The other kinds are outbound and inbound."""
_BACKLOG = 4096
_DNS_BUFFER = 4 << 20
"""Of queries that wait in a worker's socket: the usual 208 KiB hold 277 of them, and resolvers ask in bursts."""
_MAX_SOCKETS = MAX_FDS
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_SO_MARK = 36
_SO_RCVBUFFORCE = 33
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Attached:
    """One workload's namespace. `listeners` by slot: [kind, family, fd]."""

    netns_fd: int
    spec: dict[str, Any]
    listeners: dict[int, list[tuple[str, int, int]]] = field(default_factory=dict)
    owner: Holder | None = None
    """Of the netlink socket that owns the table, under failure policy ``open``."""
    policy: str = "open"
    waiting: set[int] = field(default_factory=set)
    """Slots whose `listening` the brain waits for, and its request."""
    request: int = -1
    deadline: float = 0.0

    @property
    def is_handed_out(self) -> bool:
        """Its inbound listeners are known to eBPF one by one. In `spec`, so that it outlives an upgrade."""
        return bool(self.spec.get("handed_out"))


class Attachments:
    """`mark`: of all sockets."""

    def __init__(self, mark: int) -> None:
        self.by_key: dict[str, Attached] = {}
        self._mark = mark
        self._home_fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    # -- workloads ----------------------------------------------------------------------------------

    def renew(self, key: str, netns_fd: int, spec: dict[str, Any]) -> Attached | None:
        """`spec` is what is wanted now, where the workload is still in this namespace: then `netns_fd` is closed.

        Else None, and nothing has happened. Listeners that are still wanted stay, with their connections; those for
        names are closed if their port changes.
        """
        item = self.by_key.get(key)
        if item is None or not os.path.sameopenfile(item.netns_fd, netns_fd):
            return None
        os.close(netns_fd)
        if spec.get("dns_port", 0) != item.spec.get("dns_port", 0):
            for sockets in item.listeners.values():
                _close([entry for entry in sockets if entry[0] in _DNS_KINDS])
                sockets[:] = [entry for entry in sockets if entry[0] not in _DNS_KINDS]
        item.spec = spec
        return item

    def add(self, key: str, netns_fd: int, spec: dict[str, Any]) -> Attached:
        """Of a workload that there is none of. `netns_fd` is ours now."""
        item = self.by_key[key] = Attached(netns_fd, spec)
        return item

    def remove(self, key: str) -> None:
        """The rules are gone and all is closed when this returns."""
        item = self.by_key.pop(key)
        for sockets in item.listeners.values():
            _close(sockets)
        disown([item])
        os.close(item.netns_fd)

    def state(self) -> dict[str, dict[str, Any]]:
        """For the brain."""
        return {
            key: {
                "owned": item.owner is not None,
                "policy": item.policy,
                "slots": sorted(item.listeners),
                "ports": [item.spec["outbound_port"], item.spec["inbound_port"], item.spec.get("dns_port", 0)],
                **_ns_id(item),
            }
            for key, item in self.by_key.items()
        }

    # -- sockets ------------------------------------------------------------------------------------

    def listen(self, item: Attached, slot: int) -> list[tuple[str, int, int]]:
        """All listeners of a worker's there; those that it does not have yet are made. Raises OSError.

        SO_REUSEPORT: one socket, hence one queue, per worker.
        """
        there = item.listeners.get(slot, [])
        there += self._missing(item, {(kind, family) for kind, family, _ in there})
        item.listeners[slot] = there
        return there

    def _missing(self, item: Attached, there: set[tuple[str, int]]) -> list[tuple[str, int, int]]:
        made: list[tuple[str, int, int]] = []
        spec = item.spec
        ports = {"outbound": spec["outbound_port"], "inbound": spec["inbound_port"]}
        if dns_port := spec.get("dns_port", 0):  # a brain of before an upgrade sends none
            ports |= dict.fromkeys(_DNS_KINDS, dns_port)
        missing = [(kind, family) for family in spec["families"] for kind in ports if (kind, family) not in there]
        if not missing:
            return made
        try:
            with self._inside(item.netns_fd):
                for kind, family in missing:
                    with self._listener(kind, family, ports[kind]) as sock:
                        made.append((kind, family, os.dup(sock.fileno())))
        except OSError:
            _close(made)
            raise
        return made

    def inbound(self, item: Attached, family: int) -> tuple[list[int], list[int]]:
        """Slots and their inbound listeners, which stay ours. From now on it matters when there are others."""
        item.spec["handed_out"] = True
        found = [
            (slot, fd)
            for slot, sockets in sorted(item.listeners.items())
            for kind, of, fd in sockets
            if kind == "inbound" and of == family
        ]
        return [slot for slot, _ in found], [fd for _, fd in found]

    def holds_listeners(self, slot: int) -> bool:
        return any(slot in item.listeners for item in self.by_key.values())

    def close_slot(self, slot: int) -> None:
        for item in self.by_key.values():
            _close(item.listeners.pop(slot, []))

    def close_listeners(self) -> None:
        for item in self.by_key.values():
            for sockets in item.listeners.values():
                _close(sockets)
            item.listeners.clear()

    def sockets(self, item: Attached, family: int, kind: str, n: int) -> tuple[list[int], str]:
        """Up to `n` unconnected ones, the caller's to close, and why they are fewer."""
        fds: list[int] = []
        try:
            with self._inside(item.netns_fd):
                while len(fds) < min(n, _MAX_SOCKETS):
                    fds.append(self._socket(family, kind).detach())
        except OSError as exc:
            return fds, str(exc)
        return fds, ""

    @contextlib.contextmanager
    def _inside(self, netns_fd: int) -> Iterator[None]:
        if _libc.setns(netns_fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            if _libc.setns(self._home_fd, _CLONE_NEWNET):
                os.abort()  # in the wrong namespace nothing may go on

    def _socket(self, family: int, kind: str) -> socket.socket:
        sort = socket.SOCK_DGRAM if kind == "dgram" else socket.SOCK_STREAM
        sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, sort | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, self._mark)
        return sock

    def _listener(self, kind: str, family: int, port: int) -> socket.socket:
        sock = self._socket(family, "dgram" if kind == "dns" else "stream")
        try:
            if kind == "dns":
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DNS_BUFFER)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == "inbound":
                transparent = (
                    (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT) if family == 6 else (socket.IPPROTO_IP, _IP_TRANSPARENT)
                )
                sock.setsockopt(*transparent, 1)
            sock.bind(("::1" if family == 6 else "127.0.0.1", port))
            if kind != "dns":
                sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    # -- upgrade ------------------------------------------------------------------------------------

    def takeover(self) -> list[list[Any]]:
        """As JSON. Owners are duplicated: see `drop_duplicates`."""
        return [
            [
                key,
                item.netns_fd,
                item.spec,
                {str(slot): sockets for slot, sockets in item.listeners.items()},
                -1 if item.owner is None else item.owner.duplicate(),
                item.policy,
            ]
            for key, item in self.by_key.items()
        ]

    def take_over(self, rows: list[list[Any]]) -> None:
        for key, netns_fd, spec, listeners, owner_fd, policy in rows:
            slots = {int(s): [(kind, family, number) for kind, family, number in v] for s, v in listeners.items()}
            self.by_key[key] = Attached(netns_fd, spec, slots, Holder(owner_fd) if owner_fd >= 0 else None, policy)


def descriptors(rows: list[list[Any]]) -> set[int]:
    """Of a `takeover`."""
    out = set()
    for _, netns_fd, _, listeners, owner_fd, _ in rows:
        out.add(netns_fd)
        out |= {fd for sockets in listeners.values() for _, _, fd in sockets}
        if owner_fd >= 0:
            out.add(owner_fd)
    return out


def drop_duplicates(rows: list[list[Any]]) -> None:
    """Of a `takeover` that does not come to be. Their holders live on."""
    for _, _, _, _, owner_fd, _ in rows:
        if owner_fd >= 0:
            os.close(owner_fd)


def own(item: Attached, fd: int) -> None:
    """From now on `fd`, which is ours, owns its table; -1: nothing does."""
    old, item.owner = item.owner, Holder(fd) if fd >= 0 else None
    if old is not None:
        release([old])


def disown(items: Iterable[Attached]) -> None:
    """Close what owns their tables: the rules are gone when this returns."""
    items = list(items)
    release(item.owner for item in items if item.owner is not None)
    for item in items:
        item.owner = None


def _ns_id(item: Attached) -> dict[str, int]:
    stat = os.fstat(item.netns_fd)
    return {"dev": stat.st_dev, "ino": stat.st_ino}


def _close(sockets: list[tuple[str, int, int]]) -> None:
    for _, _, fd in sockets:
        os.close(fd)
