"""The mechanisms behind one interface, which take to the kernel what is wanted and say what it has.

Each works in the calling thread's current network namespace, and raises RedirectError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from redirect.bpf import Listener
from redirect.ebpf import ENTRIES
from redirect.netfilter import session
from redirect.netfilter.restore import Variant
from redirect.wanted import Mechanism, Table, Wanted


class Backend(Protocol):
    def tables(self, node: str) -> list[Table]: ...

    def create(self, name: str, wanted: Wanted, listeners: Iterable[Listener] = (), /) -> int | None:
        """Make a table (a generation), all of it or nothing. Returns the fd on which the life of an owned one hangs.

        Inbound `listeners` are for a mechanism that hands connections to sockets; others find them by their port.
        """

    def delete(self, names: tuple[str, ...]) -> None:
        """Only those without an owner."""


BACKENDS: dict[Mechanism, Backend] = {
    "nftables": session,
    "iptables-nft": Variant("iptables-nft"),
    "iptables-legacy": Variant("iptables-legacy"),
    "ebpf": ENTRIES,
}
