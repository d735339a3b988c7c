"""Established TCP connections of a namespace that bypass the proxy, by sock_diag.

Rules take connections as they open. Those that were there before, or that opened in a gap, stay as they are: here they
are found. A connection of the app goes through the proxy when the proxy has the other end of it: for one that the app
made, the accepted socket on loopback:outbound, whose peer is the app's address and port; for one made to the app, the
peer is an address of this namespace, from which the proxy dialled. The proxy's own sockets carry its mark.

Left out is what is not steered by intention: loopback, link-local, and what the scope excludes.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from redirect.errors import RedirectError
from redirect.netns import inside
from redirect.plan import Steering
from redirect.wanted import Scope

MAX_SOCKETS = 20_000
"""Looked at in one namespace; what is beyond is told, not looked at."""
SHOWN = 5

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST_DUMP = 0x1 | 0x300
_ERROR, _DONE = 2, 3
_ESTABLISHED, _LISTEN = 1, 10
_REQUEST = struct.Struct("=BBBxI48s")
_MESSAGE = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
_MARK = 15  # INET_DIAG_MARK, for who has CAP_NET_ADMIN
_BUFFER = 1 << 16
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Connection(NamedTuple):
    local: str
    peer: str


@dataclass(frozen=True, slots=True)
class Unsteered:
    """`shown`: the first of them. `complete`: False when there were more sockets than are looked at."""

    count: int
    shown: tuple[Connection, ...]
    complete: bool = True


class _Socket(NamedTuple):
    state: int
    local: _Address
    port: int
    peer: _Address
    peer_port: int
    uid: int
    mark: int


def unsteered(netns_fd: int, desired: Steering) -> Unsteered:
    """RedirectError if the kernel does not answer."""
    with inside(netns_fd):
        try:
            found = list(_dump())
        except OSError as exc:
            raise RedirectError(f"sock_diag: {exc}", step="list connections") from exc
    return judge(found, desired)


def ends(port: int) -> set[tuple[str, int]]:
    """The peers of sockets on that local port, in the calling thread's namespace."""
    return {(str(item.peer), item.peer_port) for item in _dump() if item.port == port and item.state == _ESTABLISHED}


def translated(port: int) -> bool:
    """Are there connections that netfilter redirected to that local port, in the calling thread's namespace? Their
    clients have an address beyond loopback. RedirectError if the kernel does not answer."""
    try:
        return any(
            item.port == port and item.state == _ESTABLISHED and item.local.is_loopback and not item.peer.is_loopback
            for item in _dump()
        )
    except OSError as exc:
        raise RedirectError(f"sock_diag: {exc}", step="list connections") from exc


def judge(found: list[_Socket], desired: Steering) -> Unsteered:
    ports = desired.ports
    own = {ports.outbound, ports.inbound} | ({ports.dns} if ports.dns is not None else set())
    proxied = {(item.peer, item.peer_port) for item in found if item.port in own}
    serving = {item.port for item in found if item.state == _LISTEN}
    here = {item.local for item in found}
    vips = _networks(desired.vip_cidrs)
    scope = _Scoped(desired.scope)
    bypassing = []
    for item in found:
        if (
            item.state != _ESTABLISHED
            or item.mark & desired.mask == desired.mark
            or item.port in own
            or (item.local, item.port) in proxied
            or item.peer in here
            or item.local.is_loopback
            or item.peer.is_link_local
            or item.local.version not in desired.families
        ):
            continue
        # Who listens on the port was dialled; the listener may be gone by now, then it looks like one made by the app.
        inbound = item.port in serving
        if scope.takes_inbound(item) if inbound else (_within(item.peer, vips) or scope.takes_outbound(item)):
            bypassing.append(Connection(_text(item.local, item.port), _text(item.peer, item.peer_port)))
    return Unsteered(len(bypassing), tuple(sorted(bypassing)[:SHOWN]), len(found) < MAX_SOCKETS)


class _Scoped:
    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._include, self._exclude = _networks(scope.out_include_cidrs), _networks(scope.out_exclude_cidrs)
        self._clients = _networks(scope.in_exclude_cidrs)

    def takes_outbound(self, item: _Socket) -> bool:
        scope = self._scope
        return not (
            item.uid in scope.out_exclude_uids
            or item.peer_port in scope.out_exclude_ports
            or _within(item.peer, self._exclude)
            or (scope.out_include_ports and item.peer_port not in scope.out_include_ports)
            or (self._include and not _within(item.peer, self._include))
        )

    def takes_inbound(self, item: _Socket) -> bool:
        scope = self._scope
        return not (
            item.port in scope.in_exclude_ports
            or _within(item.peer, self._clients)
            or (scope.in_include_ports and item.port not in scope.in_include_ports)
        )


def _networks(cidrs: tuple[str, ...]) -> list[_Network]:
    return [ipaddress.ip_network(cidr) for cidr in cidrs]


def _within(address: _Address, networks: list[_Network]) -> bool:
    return any(address in network for network in networks)


def _text(address: _Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _dump() -> Iterator[_Socket]:
    """TCP sockets of the calling thread's namespace that are established or listen."""
    left = MAX_SOCKETS
    states = 1 << _ESTABLISHED | 1 << _LISTEN
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, states, bytes(48))
            sock.send(struct.pack("=IHHII", 16 + len(request), _BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
            done = False
            while not done and left > 0:
                data = sock.recv(_BUFFER)
                while len(data) >= 16:
                    length, kind = struct.unpack_from("=IH", data)
                    if kind == _DONE:
                        done = True
                        break
                    if kind == _ERROR:
                        number = -struct.unpack_from("=i", data, 16)[0]
                        if number == 2:  # ENOENT: a kernel without that family
                            done = True
                            break
                        raise OSError(number, os.strerror(number))
                    yield _parse(data[16:length])
                    left -= 1
                    data = data[(length + 3) & ~3 :]


def _parse(message: bytes) -> _Socket:
    family, state, _, _, port, peer_port, local, peer, *rest = _MESSAGE.unpack_from(message)
    uid, mark, place = rest[5], 0, _MESSAGE.size
    while place + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, place)
        if kind == _MARK:
            mark = struct.unpack_from("=I", message, place + 4)[0]
        place += max((length + 3) & ~3, 4)
    return _Socket(
        state,
        _address(family, local),
        int.from_bytes(port, "big"),
        _address(family, peer),
        int.from_bytes(peer_port, "big"),
        uid,
        mark,
    )


def _address(family: int, data: bytes) -> _Address:
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(data[:4])
    address = ipaddress.IPv6Address(data)
    return address.ipv4_mapped or address
