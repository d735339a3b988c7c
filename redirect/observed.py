"""What the kernel has of ours in a namespace, in the terms of a plan: the difference to the desired is drift."""

from __future__ import annotations

import os

from redirect.backend import BACKENDS
from redirect.errors import RedirectError
from redirect.netns import identity, inside
from redirect.plan import Observed, check_node
from redirect.route import routing
from redirect.wanted import MECHANISMS, Family, Mechanism, Table

_IPV6 = "/proc/sys/net/ipv6/conf"  # of the reading thread's namespace


def observe(netns_fd: int, node: str, mechanisms: tuple[Mechanism, ...] = MECHANISMS) -> Observed:
    """Read tables, VIP routes and the state of lo. Changes nothing. RedirectError if the kernel does not answer.

    Only rules of these `mechanisms` are looked for; of none, the rest is told.
    """
    check_node(node)
    where = f"node {node} in {identity(netns_fd)}"
    with inside(netns_fd):
        try:
            return observe_here(node, mechanisms)
        except RedirectError as exc:
            raise RedirectError(str(exc), namespace=where, step="observe") from exc


def observe_here(
    node: str, mechanisms: tuple[Mechanism, ...] = MECHANISMS, needed: Mechanism | None = None
) -> Observed:
    """The same in the calling thread's current namespace.

    A mechanism that does not answer has no rules here: the kernel does not know it, or its commands are broken. It is
    an error of the one that is `needed`, and when none answers.
    """
    found: list[Table] = []
    failed: list[RedirectError] = []
    for mechanism in mechanisms:
        try:
            found += BACKENDS[mechanism].tables(node)
        except RedirectError as exc:
            if mechanism == needed:
                raise
            failed.append(exc)
    if failed and len(failed) == len(mechanisms):
        raise failed[0]
    found.sort(key=lambda table: table.generation)
    with routing() as rt:
        return Observed(node, rt.lo_up(), rt.routes(node), tuple(found), rt.addresses())


def dialable(netns_fd: int) -> frozenset[Family]:
    """The IP families in which the namespace has an address beyond loopback and link-local."""
    where = str(identity(netns_fd))
    with inside(netns_fd):
        try:
            with routing() as rt:
                return rt.families()
        except RedirectError as exc:
            raise RedirectError(str(exc), namespace=where, step="read addresses") from exc


def reachable(netns_fd: int) -> frozenset[Family]:
    """The IP families in which a packet can arrive, now or after an address was added: those to be steered.

    IPv6 is among them without any address: each interface for which it is on gets a link-local one by itself, and a
    neighbour may dial that.
    """
    with inside(netns_fd):
        return frozenset({4, 6}) if _ipv6_is_on() else frozenset({4})


def _ipv6_is_on() -> bool:
    """For any interface. `all` and `default` tell what was written there, not what is in force."""
    try:
        found = [name for name in os.listdir(_IPV6) if name not in ("all", "default")]
    except FileNotFoundError:
        return False  # a kernel without IPv6
    except OSError as exc:
        raise RedirectError(f"{_IPV6}: {exc}", step="ask for IPv6") from exc
    for name in found:
        try:
            with open(f"{_IPV6}/{name}/disable_ipv6") as file:
                if file.read().strip() == "0":
                    return True
        except FileNotFoundError:
            continue  # the interface went away
        except OSError as exc:
            raise RedirectError(f"{_IPV6}/{name}: {exc}", step="ask for IPv6") from exc
    return False
