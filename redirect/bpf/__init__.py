"""Steering by eBPF: connections are sent to the proxy when they are made, and no packet is touched.

    connect4/6    connect() of a workload goes to the proxy's listener, or to an endpoint of a balanced service
    sendmsg4/6    a query for names goes to the proxy's resolver; recvmsg4/6: its answer is from whom was asked
    sock_ops      the source of that connection, and where it was to go, are noted before its first packet
    getsockopt    the proxy asks for the original destination, as it would ask netfilter
    getpeername   the application sees whom it asked for
    sk_lookup     a connection that comes in goes to a worker's listener

Linux 5.18 or later (bpf_set_retval), cgroup2 and bcc are needed. What differs from netfilter: own addresses have to be
told (`Workload.own_addresses`), the application's getsockname() is loopback, a socket bound to a device passes, and one
that asks several nameservers without being connected sees all answers from the latest.

`hooks` is the door: `Hooks`, `clean`. `workload` and `balance` say what is wanted, `layout` what lies in the maps,
`src/` what runs in the kernel. `loader` is a short-lived process; only `compiler`, which it imports, knows bcc.
"""

from redirect.bpf.balance import Balanced, Target
from redirect.bpf.hooks import Enrolled, Hooks, Link, Listener, Proxy, clean, is_complete, links
from redirect.bpf.layout import Count
from redirect.bpf.workload import Key, Workload

__all__ = [
    "Balanced",
    "Count",
    "Enrolled",
    "Hooks",
    "Key",
    "Link",
    "Listener",
    "Proxy",
    "Target",
    "Workload",
    "clean",
    "is_complete",
    "links",
]
