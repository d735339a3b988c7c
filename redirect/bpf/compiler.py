"""From `src/` to instructions, by bcc with headers of our own: nothing of the kernel's sources is needed on the host.

Only the loader imports this, in a process of its own: libbcc brings clang, and some 100 MiB that are not given back.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from redirect.bpf.layout import HERE, fingerprint, macros
from redirect.bpf.programs import HOOKS
from redirect.errors import RedirectError

_HERE = Path(__file__).resolve().parent
SOURCES = tuple(
    _HERE / "src" / name
    for name in (
        "types.h", "maps.h", "decide.h",
        "connect.c", "sock_ops.c", "getsockopt.c", "getpeername.c", "sendmsg.c",
        "recvmsg.c", "sk_lookup.c",
    )
)  # fmt: skip
"""In this order: bcc rewrites, and keeps, only functions of its main file, so they become one."""
HEADERS = _HERE / "headers"


def version() -> str:
    """Of sources and maps: programs of another one are replaced."""
    found = hashlib.sha256(fingerprint().encode())
    for path in (*SOURCES, *sorted(HEADERS.rglob("*.h"))):
        found.update(f"{path.name}\0".encode() + path.read_bytes())
    found.update(repr(sorted(macros().items())).encode())
    return found.hexdigest()[:16]


def compiled() -> dict[str, bytes]:
    """Instructions by hook. RedirectError when bcc is not there or refuses; what it says goes to standard error."""
    # Read by libbcc before it compiles, in place of /lib/modules/*/build.
    os.environ["BCC_KERNEL_SOURCE"] = str(HEADERS)
    try:
        from bcc import BPF
    except (ImportError, OSError) as exc:
        raise RedirectError(f"bcc can't be imported: {exc}", step="compile") from exc
    text = "".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in SOURCES)
    flags = [f"-D{name}={value}" for name, value in macros().items()] + [f"-DHERE={HERE:#x}ULL"]
    try:
        module = BPF(text=text, cflags=[*flags, "-Wall", "-Werror=implicit-function-declaration"])
        return {hook.name: bytes(module.dump_func(hook.name)) for hook in HOOKS}
    except Exception as exc:
        raise RedirectError(str(exc), step="compile") from exc
