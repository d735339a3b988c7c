"""What is wanted of the eBPF hooks, as text that says all of it. PURE.

There is one entry for a namespace and node, which is replaced in place. Generations are therefore names, by which a
plan tells a later wish from an earlier one; they are not in the kernel (see `redirect.ebpf`).

What differs from netfilter:
- connect() is steered, not packets: no address is translated, nothing is tracked, and what is established stays with
  whom it has, whatever becomes of the entry.
- Whether a listener is there is asked for every connection, by the kernel: ``open`` and ``closed`` both hold with
  nobody alive, and nothing has to be owned.
- Inbound connections are handed to the sockets of listeners, which have to be given to the kernel.
- Which addresses are the namespace's own has to be told (for netfilter the routing table says it).
- A user's id is that of the process that calls connect(), not of the one that made the socket.
"""

from __future__ import annotations

from redirect.netfilter import nft
from redirect.wanted import FailurePolicy, Listing, Wanted

DROPS_AT_ONCE = True
NEEDS_ADDRESSES = True
TRANSLATES = False
table_name = nft.table_name


def in_force(policy: FailurePolicy) -> FailurePolicy:
    return policy


def is_owned(_policy: FailurePolicy) -> bool:
    return False


def listing(wanted: Wanted) -> Listing:
    """The namespace's own addresses are the last line."""
    ports, scope = wanted.ports, wanted.scope
    words = {
        "enabled": wanted.enabled,
        "outbound": wanted.outbound,
        "families": sorted(wanted.families),
        "policy": wanted.failure_policy,
        "ports": (ports.outbound, ports.inbound, ports.dns),
        "mark": f"{wanted.mark:#x}/{wanted.mask:#x}",
        "workers": wanted.workers,
        "networks": wanted.vips,
        "scope": scope,
        "own": wanted.own_addresses,
    }
    return tuple(f"{name} {value}" for name, value in words.items())
