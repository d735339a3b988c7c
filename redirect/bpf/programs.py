"""The hooks: which function of `src/` is attached where, and how its instructions become a program of the kernel.

bcc compiles, and nothing more: a map is its index in `layout.MAPS` until `linked` puts in a descriptor, and a program
for one network namespace has `layout.HERE` until `linked` puts in its cookie. So instructions can be kept (in the map
`image`) and loaded again without a compiler.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass

from redirect.bpf import syscall
from redirect.bpf.layout import HERE, MAPS, Image
from redirect.errors import RedirectError

LICENSE = "Apache-2.0"
"""What the sources are under. None of the helpers they call asks for the GPL."""

_PSEUDO_MAP = 1
_LOAD_64 = 0x18
_CALL = 0x85

HELPERS = frozenset({1, 2, 3, 7, 15, 80, 84, 85, 86, 107, 122, 123, 124, 187})
"""By number, all that the sources call. bcc adds bpf_probe_read (4, 113) where it takes a pointer for a foreign one."""


@dataclass(frozen=True, slots=True)
class Hook:
    """`kind` and `attach` by their numbers in linux/bpf.h. Of a cgroup, or of one network namespace."""

    name: str
    kind: int
    attach: int
    per_namespace: bool = False


HOOKS: tuple[Hook, ...] = (
    # In the order in which they are attached: what tells of a steered connection is there before one is steered.
    Hook("sock_ops", 13, 3),
    Hook("getsockopt", 25, 21),
    Hook("getpeername4", 18, 29),
    Hook("getpeername6", 18, 30),
    Hook("recvmsg4", 18, 19),
    Hook("recvmsg6", 18, 20),
    Hook("sendmsg4", 18, 14),
    Hook("sendmsg6", 18, 15),
    Hook("connect4", 18, 10),
    Hook("connect6", 18, 11),
    Hook("sk_lookup", 30, 36, per_namespace=True),
)
INBOUND = HOOKS[-1]


def linked(code: bytes, maps: dict[str, int], here: int = HERE) -> bytes:
    """The instructions with descriptors of maps and the cookie of a namespace in their places."""
    out = bytearray(code)
    cookie = struct.pack("=Q", here)
    place = struct.pack("=Q", HERE)
    position = 0
    while position < len(out):
        if out[position] != _LOAD_64:
            position += 8
            continue
        source = out[position + 1] >> 4
        if source == _PSEUDO_MAP:
            index = struct.unpack_from("=i", out, position + 4)[0]
            struct.pack_into("=i", out, position + 4, maps[MAPS[index].name])
        elif out[position + 4 : position + 8] + out[position + 12 : position + 16] == place:
            out[position + 4 : position + 8] = cookie[:4]
            out[position + 12 : position + 16] = cookie[4:]
        position += 16
    return bytes(out)


def helpers(code: bytes) -> set[int]:
    """The numbers of the kernel's functions that it calls."""
    found = set()
    position = 0
    while position < len(code):
        if code[position] == _CALL and code[position + 1] >> 4 == 0:
            found.add(struct.unpack_from("=i", code, position + 4)[0])
        position += 16 if code[position] == _LOAD_64 else 8
    return found


def load(hook: Hook, code: bytes, maps: dict[str, int], here: int = HERE) -> int:
    """An fd of the program. RedirectError, also for calls that nobody asked for."""
    strange = helpers(code) - HELPERS
    if strange:
        raise RedirectError(f"calls the kernel's functions {sorted(strange)}", step=f"load program {hook.name}")
    return syscall.load_program(f"np_{hook.name}", hook.kind, hook.attach, linked(code, maps, here), LICENSE)


def packed(version: str, codes: dict[str, bytes]) -> bytes:
    """The value of the map `image`: what is in force, and the instructions that are loaded once per namespace."""
    kept = {hook.name: codes[hook.name] for hook in HOOKS if hook.per_namespace}
    text = to_text(version, kept).encode()
    if len(text) > Image.text.size:
        raise RedirectError(f"{len(text)} octets of instructions are too many", step="keep instructions")
    return bytes(Image(len(text), text))


def unpacked(value: bytes) -> tuple[str, dict[str, bytes]]:
    """The reverse. ("", {}) of one that was never written, or not by us."""
    image = Image.from_buffer_copy(value)
    return from_text(value[4 : 4 + image.length])


def to_text(version: str, codes: dict[str, bytes]) -> str:
    kept = {name: base64.b64encode(code).decode() for name, code in codes.items()}
    return json.dumps({"version": version, "codes": kept}, separators=(",", ":"))


def from_text(text: str | bytes) -> tuple[str, dict[str, bytes]]:
    """The reverse. ("", {}) of anything else."""
    try:
        found = json.loads(text)
        return str(found["version"]), {str(name): base64.b64decode(code) for name, code in found["codes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", {}
