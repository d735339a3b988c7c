"""Which resolvers a workload has: those that it declares, else those of its resolv.conf. A part of the brain.

The file is that of whoever is attached::

    /proc/<pid>/ns/net     etc/resolv.conf below that process's root
    /run/netns/<name>      /etc/netns/<name>/resolv.conf if that exists, as `ip netns exec` does, else the host's
    any other path         the host's

Read again when it changed. What can't be used leaves what was known before, and a note for the status. Loopback
addresses mean the workload's own loopback, since it is asked from inside its namespace.

Threat: a process's root is what that process made it. The file is opened within that root (a link in it leads nowhere
else), only if it is a plain file, and only its first `MAX_FILE` octets are worth reading. And whoever answers for a
name decides where a call to it goes: `Found.trusted` leaves out what that file says, and loopback, where the workload
may listen itself. What is declared is trusted whatever it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .addr import WorkloadKey, canonical_ip, is_loopback
from .config.snapshot import LocalWorkload
from .log import WARNING, log

HOST_FILE = "/etc/resolv.conf"
MAX_FILE = 64 * 1024
MAX_NAMESERVERS = 3
"""MAXNS of resolv.h: what comes after them glibc does not ask either."""

_DNS = 53
_PROCESS = re.compile(r"/proc/(\d+)/ns/net")
_NAMED = re.compile(r"(?:/var)?/run/netns/([^/]+)")
_SYS_OPENAT2 = 437
_RESOLVE_IN_ROOT = 0x10

_libc = ctypes.CDLL(None, use_errno=True)

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Found:
    """`source` is ``Workload`` or a path; `note` says what of it can't be used, "" when all is well.

    `trusted`: those of `nameservers` whose answers are not the workload's own.
    """

    nameservers: tuple[str, ...] = ()
    source: str = ""
    note: str = ""
    trusted: tuple[str, ...] = ()


@dataclass(slots=True)
class _Known:
    want: LocalWorkload
    found: Found
    stamp: _Stamp | None = None


class Resolvers:
    """By local workload. `dns_port` is where we listen for queries; virtual addresses are no resolvers either.

    `before` is what a predecessor knew: it counts until a file can be read.
    """

    def __init__(self, dns_port: int, before: Mapping[str, tuple[str, ...]] = {}, *, root: str = "/") -> None:
        self._dns_port = dns_port
        self._before = dict(before)
        self._root = root
        self._vip_networks: tuple[str, ...] = ()
        self._known: dict[WorkloadKey, _Known] = {}

    def found(self, key: str) -> Found:
        known = self._known.get(WorkloadKey(key))
        return known.found if known is not None else Found()

    @property
    def nameservers(self) -> dict[str, tuple[str, ...]]:
        return {key: known.found.nameservers for key, known in self._known.items()}

    def look(self, workloads: Iterable[LocalWorkload], vip_networks: Sequence[str]) -> bool:
        """Read what is new or changed. True when any workload has other resolvers now. Blocks."""
        before = self._all()
        wanted = {item.key: item for item in workloads}
        for key in set(self._known) - set(wanted):
            del self._known[key]
        if tuple(vip_networks) != self._vip_networks:
            self._vip_networks = tuple(vip_networks)
            for known in self._known.values():
                known.stamp = None
        usable = _Usable(self._dns_port, vip_networks)
        for key, item in wanted.items():
            self._look(key, item, usable)
        return before != self._all()

    def _all(self) -> dict[WorkloadKey, tuple[tuple[str, ...], tuple[str, ...]]]:
        return {key: (known.found.nameservers, known.found.trusted) for key, known in self._known.items()}

    def _look(self, key: WorkloadKey, item: LocalWorkload, usable: _Usable) -> None:
        known = self._known.get(key)
        same = known is not None and (known.want.netns, known.want.nameservers) == (item.netns, item.nameservers)
        if item.nameservers:
            nameservers, note = usable.sort_out(item.nameservers)
            self._known[key] = _Known(item, Found(nameservers, "Workload", note, nameservers))
            return
        folder, path = self._place(item.netns)
        last = known if known is not None and same else None
        source = os.path.join(folder, path)
        try:
            with contextlib.ExitStack() as stack:
                fd = _open_within(folder, path)
                stack.callback(os.close, fd)
                stamp = _stamp(os.fstat(fd))
                if last is not None and last.stamp == stamp and last.found.source == source:
                    return
                text = os.read(fd, MAX_FILE + 1)
            if len(text) > MAX_FILE:
                raise ValueError(f"is larger than {MAX_FILE} octets")
            nameservers, note = usable.sort_out(_nameservers(text.decode(errors="replace")))
            note = note or ("" if nameservers else "names no nameserver")
            found = Found(nameservers, source, note, _trusted(item, nameservers))
        except (OSError, ValueError) as exc:
            why = exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)
            if known is not None:
                kept, trusted = known.found.nameservers, known.found.trusted
            else:
                kept = self._before.get(key, ())
                trusted = _trusted(item, kept)
            found = Found(kept, source, f"{why}; what was known before stays" if kept else why, trusted)
            stamp = None
        if found.note and (known is None or known.found.note != found.note):
            log(f"{key}: nameservers: {source}: {found.note}", WARNING)
        self._known[key] = _Known(item, found, stamp)

    def _place(self, netns: str) -> tuple[str, str]:
        """(folder that no link may lead out of, path in it)"""
        if process := _PROCESS.fullmatch(netns):
            return f"/proc/{process[1]}/root", "etc/resolv.conf"
        if (named := _NAMED.fullmatch(netns)) and named[1] not in (".", ".."):
            path = f"etc/netns/{named[1]}/resolv.conf"
            if os.path.lexists(os.path.join(self._root, path)):
                return self._root, path
        return self._root, HOST_FILE.lstrip("/")


def _trusted(item: LocalWorkload, nameservers: Sequence[str]) -> tuple[str, ...]:
    """Of those in a file."""
    if _PROCESS.fullmatch(item.netns):
        return ()
    return tuple(address for address in nameservers if not is_loopback(address))


class _Usable:
    """Which addresses may be asked."""

    def __init__(self, dns_port: int, vip_networks: Sequence[str]) -> None:
        self._dns_port = dns_port
        self._networks = [ipaddress.ip_network(cidr) for cidr in vip_networks]

    def sort_out(self, given: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Canonical, each once, the first `MAX_NAMESERVERS` of them; and why others are not used."""
        taken: list[str] = []
        notes: list[str] = []
        for text in given:
            try:
                address = canonical_ip(text)
                objection = self._objection(text, address)
            except ValueError:
                address, objection = text[:64], "is no address"
            if objection:
                notes.append(f"{address} {objection}")
            elif address not in taken:
                taken.append(address)
        if len(taken) > MAX_NAMESERVERS:
            notes.append(f"only the first {MAX_NAMESERVERS} of {len(taken)} are asked")
        return tuple(taken[:MAX_NAMESERVERS]), "; ".join(notes[:3])

    def _objection(self, text: str, address: str) -> str:
        found = ipaddress.ip_address(address)
        if "%" in text or (found.version == 6 and found.is_link_local):
            return "is link-local, and workers have no interface to ask it by"
        if any(found in network for network in self._networks):
            return "is a virtual address, which leads to us and not to a resolver"
        if self._dns_port == _DNS and is_loopback(address):
            return "is where we listen ourselves"
        if found.is_unspecified or found.is_multicast:
            return "can't be asked"
        return ""


def _nameservers(text: str) -> list[str]:
    """resolv.conf(5): the keyword at the beginning of a line, then white space and the value."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver" and line.startswith("nameserver"):
            found.append(words[1])
    return found


def _open_within(folder: str, path: str) -> int:
    """A plain file, for reading. Raises OSError, or ValueError for anything else."""
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct open_how of openat2(2), Linux 5.6. Without O_NONBLOCK a FIFO would block.
        how = struct.pack("QQQ", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0, _RESOLVE_IN_ROOT)
        fd = int(_libc.syscall(_SYS_OPENAT2, root, path.encode(), how, len(how)))
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(root)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("is no plain file")
    return fd


def _stamp(found: os.stat_result) -> _Stamp:
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
