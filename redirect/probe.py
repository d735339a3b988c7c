"""Can this machine steer by nftables? Answered by doing it, in a scratch namespace which nobody else sees."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from redirect.apply import execute
from redirect.errors import RedirectError
from redirect.netfilter.rules import Family, Ports
from redirect.netns import unshare_netns
from redirect.observed import observe_here
from redirect.plan import FailurePolicy, Steering, plan

_NODE = "probe"


@dataclass(frozen=True, slots=True)
class Probe:
    """`families` which can be steered; `reason` says what is missing, empty when nothing is."""

    families: frozenset[Family]
    reason: str

    @property
    def ok(self) -> bool:
        return bool(self.families)


def probe() -> Probe:
    """Load the full rules, of both failure policies, for each IP family: kernel modules, libnftables and permissions
    are all exercised. Takes about a tenth of a second; the scratch namespace goes with the thread."""
    found: set[Family] = set()
    reasons: list[str] = []

    def attempt() -> None:
        families: tuple[Family, ...] = (4, 6)
        for family in families:
            try:
                unshare_netns()
                _try(family)
                found.add(family)
            except (RedirectError, OSError) as exc:
                reasons.append(f"IPv{family}: {exc}")

    # A thread of its own, because unshare has no way back.
    thread = threading.Thread(target=attempt, name="redirect-probe")
    thread.start()
    thread.join()
    return Probe(frozenset(found), "; ".join(reasons))


def _try(family: Family) -> None:
    policies: tuple[FailurePolicy, ...] = ("open", "closed")
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for policy in policies:
            desired = Steering(_NODE, frozenset({family}), policy, ports=Ports(dns=15053))
            owner_fd = execute(here, _NODE, plan(desired, observe_here(_NODE)))
            if owner_fd is not None:
                os.close(owner_fd)
            if policy == "open" and observe_here(_NODE).tables:
                raise RedirectError("an owned table outlived its owner", step="close owner")
    finally:
        os.close(here)
