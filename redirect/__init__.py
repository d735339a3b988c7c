"""Steering of a network namespace's traffic to loopback listeners. Knows nothing of who listens there.

    desired (Steering) + what the kernel has (observe) -> plan -> apply (steer) -> what must be kept (Applied)

A workload is left either steered or untouched: what no listener takes goes its way under `failure_policy: open`, and is
refused under `closed`.

`wanted` is what all mechanisms are told, `backend` has them behind one interface, `netfilter` those that are rules;
`netns` opens and enters namespaces, `probe` says what works on this machine.
"""

from redirect.apply import Applied, Removed, remove, steer
from redirect.errors import RedirectError
from redirect.observed import dialable, observe, reachable
from redirect.plan import Observed, Steering
from redirect.wanted import Mechanism, Ports, Scope

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
