"""What is compiled here. Without a C compiler at the installation nothing is, and everything works, slower."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from functools import cache

RELAY = "netproxy.relay.request"
"""Of the Python modules with types beside them, which are compiled together, the one that a request costs most."""
STREAMS = "netproxy.tcp_native"


@cache
def is_compiled(module: str) -> bool:
    """Does not import it, only the packages that it is in."""
    spec = importlib.util.find_spec(module)
    return spec is not None and str(spec.origin).endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


def relay() -> str:
    return "compiled" if is_compiled(RELAY) else "interpreted"


def streams() -> str:
    return "native" if is_compiled(STREAMS) else "loop"
