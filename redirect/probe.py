"""Can this machine steer, and by which mechanism? Answered by doing it, in scratch namespaces that nobody sees."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from redirect.apply import execute
from redirect.bpf import Hooks, Workload, bpffs, clean, is_complete
from redirect.errors import RedirectError
from redirect.netfilter.restore import host_variant
from redirect.netns import current, unshare_netns
from redirect.observed import observe_here
from redirect.plan import Steering, plan
from redirect.wanted import FailurePolicy, Family, Mechanism, Ports, Scope

Preference = Literal["auto", "ebpf", "nftables", "iptables"]

_CANDIDATES: dict[Preference, tuple[Mechanism, ...]] = {
    "auto": ("ebpf", "nftables", "iptables-nft", "iptables-legacy"),
    "ebpf": ("ebpf",),
    "nftables": ("nftables",),
    "iptables": ("iptables-nft", "iptables-legacy"),
}
"""In order, but of the variants of iptables the host's own comes first. eBPF costs a connection least, and nftables can
do all else that there is to do."""

_NODE = "probe"
_SCRATCH = "netproxy-probe-"
"""And the id of the process that tries: no node is named like that."""
_SCOPE = Scope(
    out_include_cidrs=("10.0.0.0/8", "fd00::/8"),
    out_exclude_uids=(1,),
    out_exclude_ports=(1, 2),
    in_exclude_cidrs=("192.0.2.0/24", "2001:db8::/32"),
)
"""So that all matches are exercised."""


@dataclass(frozen=True, slots=True)
class Probe:
    """`families` which can be steered; `reason` says what is missing, empty when nothing is."""

    families: frozenset[Family]
    reason: str
    mechanism: Mechanism = "nftables"

    @property
    def ok(self) -> bool:
        return bool(self.families)


@dataclass(frozen=True, slots=True)
class Choice:
    """`mechanism` None: none of those that were wanted works, and `reason` says why. Else it says why this one."""

    mechanism: Mechanism | None
    reason: str


def probe(mechanism: Mechanism = "nftables") -> Probe:
    """Load the full rules, of both failure policies, for each IP family: kernel modules, libnftables (commands of
    iptables) and permissions are all exercised. Takes about a tenth of a second, for eBPF one or two; the scratch
    namespace goes with the thread."""
    found: set[Family] = set()
    reasons: list[str] = []

    def attempt() -> None:
        families: tuple[Family, ...] = (4, 6)
        if mechanism == "ebpf":
            try:
                _try_hooks()
                found.update(families)
            except (RedirectError, OSError) as exc:
                reasons.extend(f"IPv{family}: {exc}" for family in families)
            return
        for family in families:
            try:
                unshare_netns()
                _try(family, mechanism)
                found.add(family)
            except (RedirectError, OSError) as exc:
                reasons.append(f"IPv{family}: {exc}")

    # A thread of its own, because unshare has no way back.
    thread = threading.Thread(target=attempt, name="redirect-probe")
    thread.start()
    thread.join()
    return Probe(frozenset(found), "; ".join(reasons), mechanism)


def choose(wanted: Preference, ask: Callable[[Mechanism], Probe] = probe, node: str = "") -> Choice:
    """Blocks for as long as the probes take. What a `node` has in force by eBPF is not tried again."""
    failed: list[str] = []
    for mechanism in _candidates(wanted):
        if mechanism == "ebpf" and node and is_complete(node):
            found = Probe(frozenset({4, 6}), "", mechanism)
        else:
            found = ask(mechanism)
        if found.ok:
            why = "the first that works" if wanted == "auto" else f"steering: {wanted} is configured"
            return Choice(mechanism, "; ".join([why, *failed, *([found.reason] if found.reason else [])]))
        failed.append(f"{mechanism} can't be used: {found.reason}")
    return Choice(None, "; ".join(failed))


def _try_hooks() -> None:
    """Load, attach to a cgroup in which nobody is, enrol a namespace in which nobody is; nothing of it stays.

    The names are of this process: two may try at the same time. What one left that was killed is removed.
    """
    root = bpffs.cgroup_root()
    for name in [*bpffs.nodes(), *(path.name for path in root.glob(f"{_SCRATCH}*"))]:
        if name.startswith(_SCRATCH) and not os.path.exists(f"/proc/{name.removeprefix(_SCRATCH)}"):
            _clean_scratch(name, root / name)
    name = f"{_SCRATCH}{os.getpid()}"
    try:
        (root / name).mkdir()
        with Hooks.open(name, cgroup=root / name) as hooks:
            unshare_netns()
            with current() as here:
                hooks.enrol_pod(here, Workload(frozenset({4, 6}), scope=_SCOPE))
            if lost := [link.name for link in hooks.links() if not link.target]:
                raise RedirectError(f"not attached: {', '.join(lost)}", step="try hooks")
    finally:
        _clean_scratch(name, root / name)


def _clean_scratch(name: str, cgroup: Path) -> None:
    try:
        clean(name)
    finally:
        with suppress(FileNotFoundError):
            cgroup.rmdir()


def _candidates(wanted: Preference) -> list[Mechanism]:
    """The host's variant is asked for only when it matters."""
    found = list(_CANDIDATES[wanted])
    variants = {"iptables-nft", "iptables-legacy"}.intersection(found)
    if len(variants) < 2:
        return found
    mine = host_variant()
    return sorted(found, key=lambda name: name in variants and name != mine)


def _try(family: Family, mechanism: Mechanism) -> None:
    policies: tuple[FailurePolicy, ...] = ("open", "closed")
    with current() as here:
        for policy in policies:
            desired = Steering(
                _NODE, frozenset({family}), policy, ports=Ports(dns=15053), scope=_SCOPE, mechanism=mechanism
            )
            owner_fd = execute(here, _NODE, plan(desired, observe_here(_NODE, (mechanism,))))
            if owner_fd is not None:
                os.close(owner_fd)
            if desired.owned and observe_here(_NODE, (mechanism,)).tables:
                raise RedirectError("an owned table outlived its owner", step="close owner")
