"""netproxy: a service mesh for Linux hosts.

The map, in the order a request sees it::

    accept/    listener inside the pod's namespace, original destination, protocol sniffing
    identity/  SVIDs, the CA, mesh TLS
    codec/     bytes <-> events (HTTP/1)
    decide/    route match, weights, endpoint choice
    upstream/  pooled and fresh connections to endpoints
    relay/     one exchange, or opaque bytes, both ways

and in the order a change of configuration sees it::

    config/    files -> objects -> snapshot (shards)  ->  workers

``supervisor.py``, ``brain.py`` and ``worker.py`` put these together, one process each.
Steering lives in the top-level package ``redirect``, which knows nothing of netproxy.
"""

__version__ = "0.1.0"
