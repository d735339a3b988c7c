"""VIP routes, loopback and addresses, by rtnetlink in the calling thread's current namespace.

A route is ours if it has our protocol number and the node's metric. The metric keeps two nodes apart in one namespace
(the kernel allows the same prefix twice with different metrics) and is large, so that an operator's own route wins.
Call from a thread in which no event loop runs: pyroute2 runs one of its own.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from redirect.errors import RedirectError
from redirect.wanted import Family

PROTOCOL = 78  # rtm_protocol; free in Linux's rtnetlink.h and in iproute2's rt_protos.d

_MAIN, _UNICAST, _SCOPE_LINK = 254, 1, 253
_IFF_UP = 1
_LOOPBACK = 1  # lo is the first interface of every namespace


def metric(node: str) -> int:
    return 0x40000000 | (zlib.crc32(node.encode()) & 0x3FFFFFFF)


class Routing:
    """An open rtnetlink socket; made by `routing()`. Network errors come out as RedirectError."""

    def __init__(self, ipr: Any) -> None:
        self._ipr = ipr

    def lo_up(self) -> bool:
        (link,) = self._ipr.link("get", index=_LOOPBACK)
        return bool(link["flags"] & _IFF_UP)

    def set_link(self, name: str, *, up: bool) -> None:
        (index,) = self._ipr.link_lookup(ifname=name)
        self._ipr.link("set", index=index, state="up" if up else "down")

    def routes(self, node: str) -> frozenset[str]:
        found = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._ipr.route("dump", family=family):
                # Without IPv6 in the kernel its dump answers with other families.
                if route["family"] == family and _is_ours(route, node):
                    found.add(f"{route.get('dst')}/{route['dst_len']}")
        return frozenset(str(ipaddress.ip_network(cidr)) for cidr in found)

    def add_route(self, cidr: str, node: str) -> None:
        self._ipr.route("add", **_route(cidr, node))

    def delete_route(self, cidr: str, node: str) -> None:
        try:
            self._ipr.route("del", **_route(cidr, node))
        except NetlinkError as exc:
            if exc.code not in (errno.ESRCH, errno.ENOENT):  # it is gone: as wanted
                raise

    def families(self) -> frozenset[Family]:
        found = map(ipaddress.ip_address, self.addresses())
        return frozenset(4 if address.version == 4 else 6 for address in found if not address.is_link_local)

    def addresses(self) -> tuple[str, ...]:
        """Of all interfaces, without loopback, sorted."""
        found = set()
        for message in self._ipr.get_addr():
            text = message.get("local") or message.get("address")
            if message["family"] not in (socket.AF_INET, socket.AF_INET6) or text is None:
                continue
            address = ipaddress.ip_address(text)
            if not address.is_loopback:
                found.add(str(address))
        return tuple(sorted(found))


@contextmanager
def routing() -> Iterator[Routing]:
    try:
        with IPRoute() as ipr:  # type: ignore[no-untyped-call]
            yield Routing(ipr)
    except (NetlinkError, OSError) as exc:
        raise RedirectError(f"rtnetlink: {exc}") from exc


def _route(cidr: str, node: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"dst": cidr, "oif": _LOOPBACK, "proto": PROTOCOL, "priority": metric(node)}
    if ipaddress.ip_network(cidr).version == 4:
        return {**parts, "family": socket.AF_INET, "scope": _SCOPE_LINK}
    return {**parts, "family": socket.AF_INET6}


def _is_ours(route: Any, node: str) -> bool:
    return bool(
        route["proto"] == PROTOCOL
        and route["type"] == _UNICAST
        and route.get("table") == _MAIN
        and route.get("oif") == _LOOPBACK
        and route.get("priority") == metric(node)
    )
