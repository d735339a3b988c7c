"""Steering of a network namespace's traffic to loopback listeners. Knows nothing of who listens there.

    desired (Steering) + what the kernel has (observe) -> plan -> apply (steer) -> what must be kept (Applied)

A workload is left either steered or untouched: rules under `failure_policy: open` belong to a netlink socket and go
with its last holder; under `closed` they stay until `remove`.

`netns` opens and enters namespaces, `probe` says whether this machine can do it, `netfilter` has the rules.
"""

from redirect.apply import Applied, Removed, remove, steer
from redirect.errors import RedirectError
from redirect.netfilter.rules import Mechanism, Ports, Scope
from redirect.observed import dialable, observe, reachable
from redirect.plan import Observed, Steering

__all__ = [
    "Applied",
    "Mechanism",
    "Observed",
    "Ports",
    "RedirectError",
    "Removed",
    "Scope",
    "Steering",
    "dialable",
    "observe",
    "reachable",
    "remove",
    "steer",
]
