"""Steering by eBPF: connections are sent to the proxy when they are made, and no packet is touched.

    connect4/6    connect() of a workload goes to the proxy's listener, or to an endpoint of a balanced service
    sock_ops      the source of that connection, and where it was to go, are noted before its first packet
    getsockopt    the proxy asks for the original destination, as it would ask netfilter
    getpeername   the application sees whom it asked for
    sk_lookup     a connection that comes in goes to a worker's listener

`hooks` is the door: `Hooks`, `clean`. `workload` and `balance` say what is wanted, `layout` what lies in the maps,
`src/` what runs in the kernel. `loader` is a short-lived process; only `compiler`, which it imports, knows bcc.
"""

from redirect.bpf.balance import Balanced, Target
from redirect.bpf.hooks import Enrolled, Hooks, Link, Listener, Proxy, clean, links, netns_cookie
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
    "links",
    "netns_cookie",
]
