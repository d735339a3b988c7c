"""Talking to nf_tables in the calling thread's current network namespace: the mechanism ``nftables``.

Rules go through libnftables (Debian python3-nftables); which tables exist and who owns them is asked by netlink,
because libnftables does not tell. An owned table (`flags owner`, Linux 5.12) belongs to one netlink socket and goes
when the last fd of that socket is closed, by kill -9 too. libnftables opens that socket itself, in the namespace of the
constructing thread, and hides it: it is found among this process's fds by the owner's port id, which the kernel gave.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from redirect.errors import RedirectError
from redirect.netfilter import nft
from redirect.netns import SO_NETNS_COOKIE
from redirect.wanted import Listing, Table, Wanted

NETLINK_NETFILTER = 12

_GETTABLE = (10 << 8) | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_REQUEST_DUMP = 0x1 | 0x300
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
_NFPROTO_INET = 1
_TABLE_NAME, _TABLE_OWNER = 1, 7
_ATTEMPTS = 20  # a dump is interrupted by every change another process makes meanwhile

# libnftables keeps parser state in globals; one command takes a few milliseconds.
_libnftables = threading.Lock()


class KernelTable(NamedTuple):
    name: str
    owner: int | None  # port id of the owning netlink socket


def tables(node: str) -> list[Table]:
    """This node's, with what they hold."""
    found = []
    for table in kernel_tables():
        name = nft.parse_table_name(table.name)
        if name is None or name[0] != node:
            continue
        try:
            listing = list_table(table.name, owned=table.owner is not None)
        except RedirectError:
            if table in kernel_tables():
                raise
            continue  # went away between the two questions, as owned tables do
        found.append(Table(table.name, name[1], table.owner, listing))
    return found


def create(name: str, wanted: Wanted, _listeners: object = ()) -> int | None:
    """Returns the fd on which the life of an owned one hangs."""
    text = nft.create(name, wanted)
    if nft.is_owned(wanted.failure_policy):
        return create_owned(name, text)
    run(text)
    return None


def delete(names: tuple[str, ...]) -> None:
    """All or none."""
    run(nft.delete(names))


def run(commands: str, *, json: bool = False) -> str:
    """Execute nft commands as one transaction and return the output. RedirectError with nft's words if it fails."""
    with _libnftables, _Library() as library:
        return library.run(commands, json=json)


def create_owned(name: str, commands: str) -> int:
    """Execute the commands which make the owned table `name`; its life hangs on the returned fd (close-on-exec)."""
    with _libnftables, _Library() as library:
        library.run(commands)
        owners = {table.name: table.owner for table in kernel_tables()}
        owner = owners.get(name)
        if owner is None:
            raise RedirectError("the kernel made the table without an owner")
        return _socket_of(owner)


def list_table(name: str, *, owned: bool) -> Listing:
    """What the table holds.

    libnftables 1.0.6 reads the name of the flag `owner` past the end of an array (`"flags": "<the last identifier>"`,
    or an answer that breaks off there), so an owned table is listed by its chains. Nothing is missed: sets and the
    like can only be put there by its owner.
    """
    try:
        if not owned:
            return nft.read_listing(run(f"list table inet {name}", json=True))
        with _libnftables, _Library() as library:
            chains = nft.chains_of(name, library.run("list chains inet", json=True))
            return nft.read_listing(*(library.run(f"list chain inet {name} {chain}", json=True) for chain in chains))
    except ValueError as exc:
        raise RedirectError(f"nft's answer is not JSON: {exc}") from exc


def kernel_tables() -> list[KernelTable]:
    """All tables of family inet in this namespace."""
    for _ in range(_ATTEMPTS):
        found = _dump_tables()
        if found is not None:
            return found
    raise RedirectError(f"the list of tables changed {_ATTEMPTS} times while it was read")


class _Library:
    """One libnftables context, and so one netlink socket, used under the lock. Freed on leaving: an exception's
    traceback would otherwise keep it, and with it an owned table, for as long as somebody looks at the exception."""

    def __init__(self) -> None:
        try:
            import nftables
        except ImportError as exc:
            raise RedirectError("the Python binding of libnftables is not installed (python3-nftables)") from exc
        try:
            self._context: Any = nftables.Nftables()  # type: ignore[no-untyped-call]
        except OSError as exc:
            raise RedirectError(f"libnftables cannot be loaded: {exc}") from exc

    def __enter__(self) -> _Library:
        return self

    def __exit__(self, *_: object) -> None:
        self._context = None

    def run(self, commands: str, *, json: bool = False) -> str:
        self._context.set_json_output(json)
        # As octets: comments in rules of others are any.
        code, output, error = self._context.cmd(commands.encode())
        if code != 0:
            raise RedirectError(" ".join(error.decode(errors="replace").split()) or f"nft failed with {code}")
        return str(output.decode(errors="replace"))


def _dump_tables() -> list[KernelTable] | None:
    """None: something changed during the dump, ask again."""
    found: list[KernelTable] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
            sock.bind((0, 0))
            request = struct.pack("=BBH", _NFPROTO_INET, 0, 0)
            sock.send(struct.pack("=IHHII", 16 + len(request), _GETTABLE, _REQUEST_DUMP, 1, 0) + request)
            interrupted = False
            while True:
                for kind, flags, payload in _messages(sock.recv(1 << 16)):
                    interrupted = interrupted or bool(flags & _DUMP_INTERRUPTED)
                    if kind == _DONE:
                        return None if interrupted else found
                    if kind == _ERROR:
                        number = -struct.unpack_from("=i", payload)[0]
                        if number == errno.EINTR:
                            return None
                        raise RedirectError(f"nf_tables: {os.strerror(number)}")
                    found.append(_table(payload[4:]))
    except OSError as exc:
        raise RedirectError(f"nf_tables: {exc}") from exc


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(data) >= 16:
        length, kind, flags, _, _ = struct.unpack_from("=IHHII", data)
        yield kind, flags, data[16:length]
        data = data[(length + 3) & ~3 :]


def _table(attributes: bytes) -> KernelTable:
    values = {}
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        values[kind & 0x3FFF] = attributes[4:length]
        attributes = attributes[(length + 3) & ~3 :]
    owner = values.get(_TABLE_OWNER)
    return KernelTable(
        values[_TABLE_NAME].rstrip(b"\0").decode(errors="replace"),
        struct.unpack("!I", owner)[0] if owner else None,
    )


def _socket_of(port_id: int) -> int:
    """A dup of this process's nfnetlink socket with that port id in the current namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as here:
        cookie = here.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            candidate = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue  # closed by another thread meanwhile
        with candidate:
            if (
                candidate.family == socket.AF_NETLINK
                and candidate.proto == NETLINK_NETFILTER
                and candidate.getsockname()[0] == port_id
                and candidate.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8) == cookie
            ):
                return candidate.detach()
    raise RedirectError("the netlink socket which owns the table was not found among the open files")
