"""Is everything in a namespace still as it was? Asked so cheaply that it can be asked all the time.

Two netlink sockets made inside the namespace hear of changes: rules of nf_tables (those of iptables-nft are of them),
and links, addresses and routes. What exactly changed is not read: it says "look again", nothing more. A queue that
overflows says so too. Rules of legacy iptables and entries of eBPF are in no event: they are read and compared.

The sockets hold the namespace: close them when it goes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import socket
import struct

from redirect.ebpf import fingerprint
from redirect.errors import RedirectError
from redirect.netns import cookie, inside
from redirect.wanted import Mechanism

_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7
_ROUTE_GROUPS = (1, 5, 7, 9, 11)  # link, IPv4 address, IPv4 route, IPv6 address, IPv6 route
_GETGEN = (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_GEN_ID = 1
_REQUEST = 0x1
_ERROR = 2
_DATAGRAMS = 256
"""Read at once of what may be a flood; the rest is thrown away with the next."""

_LEGACY = {4: (socket.AF_INET, socket.SOL_IP, 112, 90), 6: (socket.AF_INET6, socket.IPPROTO_IPV6, 168, 142)}
"""Family, level, the size of struct ipt_entry (ip6t_entry), and where in it next_offset is. What comes behind that is
no part of the rule: a mark of the kernel's check for loops, and the counters."""
_GET_INFO, _GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32sI5I5III")  # name, valid_hooks, hook_entry, underflow, num_entries, size
_ENTRIES = struct.Struct("=32sII")  # name, size and padding
_TABLES = (b"raw", b"mangle", b"nat")

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Of one namespace. Not for several threads at once."""

    def __init__(self, netns_fd: int, node: str) -> None:
        """`node`: whose entries of eBPF. RedirectError if the namespace can't be watched."""
        self._node = node
        self._open: list[socket.socket] = []
        try:
            with inside(netns_fd):
                self._cookie = cookie()
                self._rules = self._socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
                self._ask = self._socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
                self._links = self._socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)
                for sock in (self._rules, self._ask, self._links):
                    sock.bind((0, 0))
                self._rules.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
                for group in _ROUTE_GROUPS:
                    self._links.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError as exc:
            self.close()
            raise RedirectError(str(exc), step="watch") from exc
        self._netns_fd = os.dup(netns_fd)

    def _socket(self, family: int, kind: int, protocol: int) -> socket.socket:
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
        self._open.append(sock)
        return sock

    def close(self) -> None:
        for sock in self._open:
            sock.close()
        self._open.clear()
        if getattr(self, "_netns_fd", -1) >= 0:
            os.close(self._netns_fd)
            self._netns_fd = -1

    def filenos(self) -> list[int]:
        """Readable when something changed."""
        return [self._rules.fileno(), self._links.fileno()] if self._open else []

    def drain(self) -> bool:
        """Forget what was heard. True: there was something."""
        heard = False
        for sock in (self._rules, self._links):
            for _ in range(_DATAGRAMS):
                try:
                    sock.recv(4096)  # the rest of a longer one is cut off
                except BlockingIOError:
                    break
                except OSError as exc:
                    if exc.errno != errno.ENOBUFS:
                        raise RedirectError(str(exc), step="watch") from exc
                heard = True
        return heard

    def fingerprint(self, mechanism: Mechanism) -> bytes:
        """As long as it is the same, so are the rules. Some microseconds, some hundred for legacy iptables."""
        if mechanism == "ebpf":
            return fingerprint(self._node, self._cookie)
        if mechanism != "iptables-legacy":
            return b"%d" % self._generation()
        try:
            with inside(self._netns_fd):
                return b"".join(_legacy(family) for family in _LEGACY)
        except OSError as exc:
            raise RedirectError(f"iptables: {exc}", step="watch") from exc

    def _generation(self) -> int:
        """The kernel counts the transactions of each namespace (Linux 3.18)."""
        try:
            self._ask.send(struct.pack("=IHHII", 20, _GETGEN, _REQUEST, 1, 0) + bytes(4))
            answer = self._ask.recv(4096)
        except OSError as exc:
            raise RedirectError(f"nf_tables: {exc}", step="watch") from exc
        kind = struct.unpack_from("=H", answer, 4)[0]
        if kind == _ERROR:
            raise RedirectError(f"nf_tables: {os.strerror(-struct.unpack_from('=i', answer, 16)[0])}", step="watch")
        place = 20
        while place + 8 <= len(answer):
            length, attribute = struct.unpack_from("=HH", answer, place)
            if attribute & 0x3FFF == _GEN_ID:
                return int(struct.unpack_from("!I", answer, place + 4)[0])
            place += (length + 3) & ~3
        raise RedirectError("nf_tables does not tell its generation", step="watch")


def _legacy(family: int) -> bytes:
    """Of the tables of one family that we use, in the calling thread's namespace."""
    domain, level, entry, next_offset = _LEGACY[family]
    digest = hashlib.sha256()
    try:
        sock = socket.socket(domain, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    except OSError:
        return b"-"  # a kernel without that family
    with sock:
        for table in _names(family):
            info = _getsockopt(sock, level, _GET_INFO, _INFO.pack(table, *[0] * 13), _INFO.size)
            size = _INFO.unpack(info)[-1]
            head = _ENTRIES.pack(table, size, 0)
            blob = bytearray(_getsockopt(sock, level, _GET_ENTRIES, head, len(head) + size)[len(head) :])
            place = 0
            while place + entry <= size:
                step = struct.unpack_from("=H", blob, place + next_offset)[0]
                blob[place + next_offset + 2 : place + entry] = bytes(entry - next_offset - 2)
                if step < entry:
                    break
                place += step
            digest.update(table + blob)
    return digest.digest()


def _names(family: int) -> list[bytes]:
    """Those of our tables that exist: asking for one that does not would make it."""
    try:
        with open(f"/proc/thread-self/net/{'ip' if family == 4 else 'ip6'}_tables_names", "rb") as file:
            there = file.read().split()
    except FileNotFoundError:
        return []
    return [table for table in _TABLES if table in there]


def _getsockopt(sock: socket.socket, level: int, option: int, given: bytes, size: int) -> bytes:
    """socket.getsockopt can't hand anything in."""
    buffer = ctypes.create_string_buffer(given, size)
    length = ctypes.c_uint32(size)
    if _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
