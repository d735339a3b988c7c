"""Maps and links of a set, as they are pinned: found again, or made."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path

from redirect.bpf import bpffs, programs, syscall
from redirect.bpf.layout import MAPS, SK_STORAGE, Map, fingerprint
from redirect.bpf.programs import INBOUND
from redirect.errors import RedirectError


def place_of(node: str, mount: Path) -> Path:
    """The set of the present layout."""
    return bpffs.folder(node, mount) / fingerprint()


def open_maps(place: Path, stack: ExitStack, *, make: bool) -> dict[str, int]:
    """Descriptors by name, closed with the stack. Those that are missing are made."""
    found = {}
    for wanted in MAPS:
        path = place / f"map_{wanted.name}"
        fd = syscall.get(str(path))
        if fd is not None:
            stack.callback(os.close, fd)
            if not is_of(fd, wanted):
                raise RedirectError("it has another shape", namespace=str(path), step="open map")
        if fd is None:
            if not make:
                raise RedirectError("it is missing", namespace=str(path), step="open map")
            fd = make_map(wanted)
            stack.callback(os.close, fd)
            syscall.pin(fd, str(path))
        found[wanted.name] = fd
    return found


def is_of(fd: int, wanted: Map) -> bool:
    shape = (wanted.kind, wanted.key_size, wanted.value_size, wanted.max_entries, wanted.flags)
    return syscall.map_shape(fd) == shape


def make_map(wanted: Map) -> int:
    types = (0, 0, 0)
    if wanted.kind == SK_STORAGE:
        # The kernel wants to know the types of a socket's storage.
        types = (syscall.load_types(types_of(wanted.value_size)), 1, 3)
    try:
        return syscall.create_map(
            f"np_{wanted.name}",
            wanted.kind,
            wanted.key_size,
            wanted.value_size,
            wanted.max_entries,
            wanted.flags,
            types,
        )
    finally:
        if types[0]:
            os.close(types[0])


def types_of(value_size: int) -> bytes:
    """BTF with three types: 1 = int of 32 bits, 2 = octet, 3 = array of `value_size` octets.

    Documentation/bpf/btf.rst: header, types, strings.
    """
    strings = b"\0int\0octet\0"
    kind_int, kind_array, signed = 1 << 24, 3 << 24, 1 << 24
    types = struct.pack("=IIII", 1, kind_int, 4, signed | 32)
    types += struct.pack("=IIII", 5, kind_int, 1, 8)
    types += struct.pack("=IIIIII", 0, kind_array, 0, 2, 1, value_size)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


def attach(path: Path, program: int, target: int, kind: int) -> None:
    """By the link that is pinned there, else by a new one."""
    if not is_attached(path):
        bpffs.unpin(path)  # somebody detached it, or it is new
    link = syscall.get(str(path))
    try:
        if link is not None:
            syscall.update_link(link, program, f"swap the program of {path}")
            return
        link = syscall.create_link(program, target, kind, f"attach {path.name}")
        syscall.pin(link, str(path))
    finally:
        if link is not None:
            os.close(link)


def swap_inbound(path: Path, code: bytes, maps: dict[str, int]) -> None:
    """Of a namespace that is gone the link is left behind, and is removed."""
    program = programs.load(INBOUND, code, maps, int(path.name.partition("_")[2]))
    try:
        if is_attached(path):
            attach(path, program, -1, INBOUND.attach)
        else:
            bpffs.unpin(path)
    except RedirectError as exc:
        if syscall.code_of(exc) not in syscall.GONE:
            raise
        bpffs.unpin(path)
    finally:
        os.close(program)


def is_attached(path: Path) -> bool:
    """The link that is pinned there still has something to be attached to."""
    link = syscall.get(str(path))
    if link is None:
        return False
    try:
        return syscall.describe_link(link)[2] != 0
    finally:
        os.close(link)
