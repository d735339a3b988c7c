"""Services of the host: processes of a cgroup in a network namespace that is not theirs alone. Only eBPF can tell them
apart, by the socket: an address is everybody's there.

What they open is steered as that of a pod, and of what comes in only what is for their own ports.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from redirect.apply import remove
from redirect.bpf import Hooks, Key, Listener, Proxy, bpffs
from redirect.ebpf import ENTRIES, workload_of
from redirect.errors import RedirectError
from redirect.netns import inside
from redirect.plan import Steering
from redirect.route import routing

OWN_NETNS = "/proc/self/ns/net"
"""The path of the agent's own network namespace, which is the host's."""
_SYSTEMD = Path("/run/systemd/system")
_PATIENCE_S = 10.0


def find_cgroup(cgroup: str = "", unit: str = "") -> Path | None:
    """The folder of a cgroup, by its path below cgroup2's mount or by the systemd unit that runs in it; None while
    there is none. RedirectError where cgroup2 is not mounted, or systemd does not answer. Blocks."""
    place = cgroup or _of_unit(unit)
    if not place.strip("/"):
        return None
    folder = bpffs.cgroup_root() / place.lstrip("/")
    return folder if folder.is_dir() else None


def _of_unit(unit: str) -> str:
    """As systemd says, and where it is not there as it would put it: below system.slice."""
    if not _SYSTEMD.is_dir():
        return f"system.slice/{unit}"
    command = ["systemctl", "show", "--property", "ControlGroup", "--value", "--", unit]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise RedirectError(str(exc), step=f"ask systemd for {unit}") from exc
    if done.returncode != 0:
        raise RedirectError(done.stderr.strip() or f"systemctl ended with {done.returncode}", step=f"ask for {unit}")
    return done.stdout.strip()


def enrol(netns_fd: int, cgroup: Path, desired: Steering, listeners: Sequence[Listener] = ()) -> bool:
    """Steer what runs in the cgroup and below, in that network namespace. True: something changed. RedirectError.

    Inbound are the ports of `desired.scope.in_include_ports`; without any nothing is. `listeners` are inbound ones of
    this service alone, as its `ports` are, and the caller's to close.
    """
    with inside(netns_fd), routing() as rt:
        wanted = replace(desired.wanted(), own_addresses=rt.addresses())
    workload = workload_of(wanted)
    workload = replace(workload, inbound=workload.inbound and bool(desired.scope.in_include_ports))

    def change(hooks: Hooks) -> bool:
        key = Key("cgroup", bpffs.cgroup_id(cgroup))
        hooks.configure(Proxy(mark=desired.mark, mask=desired.mask))
        if hooks.is_current(key, workload):
            for listener in listeners:
                hooks.listen(key, listener)
            return False
        hooks.enrol_cgroup(cgroup, netns_fd, workload, listeners)
        return True

    return ENTRIES.change(desired.node, change)


def withdraw(node: str, number: int) -> None:
    """Of a cgroup by its id, which may be gone. RedirectError."""
    if not bpffs.folder(node).is_dir():
        return

    ENTRIES.change(node, lambda hooks: hooks.withdraw(Key("cgroup", number)))


def let_go(netns_fd: int, node: str, cgroup: int) -> None:
    """All that is steered of the namespace, or of the cgroup with that id in it (0: none). RedirectError."""
    if cgroup:
        withdraw(node, cgroup)
    else:
        remove(netns_fd, node)
