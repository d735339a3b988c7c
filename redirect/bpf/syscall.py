"""bpf(2), the calls of it that steering needs. Standard library only; descriptors are owned by who asked for them.

Every error is a RedirectError whose `step` says what was being done. Numbers and structures: linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

from redirect.errors import RedirectError

_SYSCALLS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY = 0, 1, 2, 3, 4
PROG_LOAD, OBJ_PIN, OBJ_GET = 5, 6, 7
PROG_NEXT_ID, MAP_NEXT_ID, PROG_BY_ID, MAP_BY_ID, OBJ_INFO = 11, 12, 13, 14, 15
BTF_LOAD = 18
MAP_LOOKUP_BATCH, MAP_UPDATE_BATCH, MAP_DELETE_BATCH = 24, 26, 27
LINK_CREATE, LINK_UPDATE, LINK_BY_ID, LINK_NEXT_ID, LINK_DETACH = 28, 29, 30, 31, 34

LINK_OF_CGROUP = 3
ANY, NOEXIST, EXIST = 0, 1, 2
GONE = frozenset({errno.ENOLINK, errno.EINVAL, errno.ENOENT, errno.EBADF})
"""Of a link whose namespace or cgroup is no more."""
_NAME_BYTES = 16
_LOG_BYTES = 1 << 20
_BATCH = 256
_CHUNK = 4096
"""More than a bucket of a hash can have, or the kernel can't go on."""

_libc = ctypes.CDLL(None, use_errno=True)


def call(command: int, attributes: bytes | ctypes.Array[ctypes.c_char], step: str) -> int:
    """The raw call. RedirectError, with the OSError as its cause."""
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise RedirectError(f"bpf(2) is not known on {platform.machine()}", step=step)
    buffer = attributes if isinstance(attributes, ctypes.Array) else ctypes.create_string_buffer(attributes, 128)
    found = _libc.syscall(number, command, ctypes.byref(buffer), ctypes.sizeof(buffer))
    if found < 0:
        cause = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise RedirectError(str(cause), step=step) from cause
    return int(found)


def code_of(error: RedirectError) -> int:
    """The errno behind it, 0 when there is none."""
    cause = error.__cause__
    return cause.errno or 0 if isinstance(cause, OSError) else 0


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, max(len(data), 1))


# --- maps


def create_map(
    name: str, kind: int, key_size: int, value_size: int, max_entries: int, flags: int, types: tuple[int, int, int]
) -> int:
    """An fd. `types` are the fd of a BTF object and the ids of key and value in it; zeros for none."""
    attributes = struct.pack(
        "=IIIIIII16sIIII",
        kind, key_size, value_size, max_entries, flags, 0, 0, name.encode()[: _NAME_BYTES - 1], 0, *types,
    )  # fmt: skip
    return call(MAP_CREATE, attributes, f"create map {name}")


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """None: no such key."""
    k, value = _buffer(key), ctypes.create_string_buffer(value_size)
    try:
        call(MAP_LOOKUP, struct.pack("=I4xQQQ", fd, ctypes.addressof(k), ctypes.addressof(value), 0), "read map")
    except RedirectError as exc:
        if code_of(exc) == errno.ENOENT:
            return None
        raise
    return value.raw


def update(fd: int, key: bytes, value: bytes, flags: int = ANY, *, step: str = "write map") -> None:
    k, v = _buffer(key), _buffer(value)
    call(MAP_UPDATE, struct.pack("=I4xQQQ", fd, ctypes.addressof(k), ctypes.addressof(v), flags), step)


def delete(fd: int, key: bytes) -> bool:
    """False: there was no such key."""
    k = _buffer(key)
    try:
        call(MAP_DELETE, struct.pack("=I4xQQQ", fd, ctypes.addressof(k), 0, 0), "delete from map")
    except RedirectError as exc:
        if code_of(exc) == errno.ENOENT:
            return False
        raise
    return True


def update_batch(fd: int, pairs: list[tuple[bytes, bytes]]) -> None:
    """All of them in as few calls as the kernel takes. RedirectError when it stops; what was before is written."""
    for start in range(0, len(pairs), _BATCH):
        some = pairs[start : start + _BATCH]
        keys, values = _buffer(b"".join(key for key, _ in some)), _buffer(b"".join(value for _, value in some))
        attributes = struct.pack(
            "=QQQQIIQQ", 0, 0, ctypes.addressof(keys), ctypes.addressof(values), len(some), fd, 0, 0
        )
        call(MAP_UPDATE_BATCH, attributes, f"write {len(some)} entries of a map")


def delete_batch(fd: int, keys: list[bytes]) -> None:
    """All of them, whether they are there or not."""
    for start in range(0, len(keys), _BATCH):
        some = keys[start : start + _BATCH]
        buffer = _buffer(b"".join(some))
        attributes = struct.pack("=QQQQIIQQ", 0, 0, ctypes.addressof(buffer), 0, len(some), fd, 0, 0)
        try:
            call(MAP_DELETE_BATCH, attributes, f"delete {len(some)} entries of a map")
        except RedirectError as exc:
            if code_of(exc) != errno.ENOENT:
                raise
            # It stopped at one that was not there.
            for key in some:
                delete(fd, key)


def keys(fd: int, key_size: int) -> list[bytes]:
    """As they were in one walk. One that is deleted meanwhile makes the walk begin anew, so it is bounded."""
    found: dict[bytes, None] = {}
    following = ctypes.create_string_buffer(key_size)
    current: ctypes.Array[ctypes.c_char] | None = None
    while True:
        at = ctypes.addressof(current) if current is not None else 0
        try:
            call(MAP_NEXT_KEY, struct.pack("=I4xQQQ", fd, at, ctypes.addressof(following), 0), "walk a map")
        except RedirectError as exc:
            if code_of(exc) == errno.ENOENT:
                return list(found)
            raise
        key = following.raw
        if key in found:
            return list(found)
        found[key] = None
        current = _buffer(key)


def keys_at_once(fd: int, key_size: int, value_size: int) -> list[bytes]:
    """Of a hash, many with each call. What comes or goes meanwhile may be missed."""
    found: list[bytes] = []
    some_keys, some_values = (
        ctypes.create_string_buffer(key_size * _CHUNK),
        ctypes.create_string_buffer(value_size * _CHUNK),
    )
    place = ctypes.create_string_buffer(key_size)  # of four octets for a hash, of a key's size for other kinds
    begun = False
    while True:
        at = ctypes.addressof(place)
        attributes = ctypes.create_string_buffer(
            struct.pack(
                "=QQQQIIQQ",
                at if begun else 0, at, ctypes.addressof(some_keys), ctypes.addressof(some_values), _CHUNK, fd, 0, 0,
            )
        )  # fmt: skip
        try:
            call(MAP_LOOKUP_BATCH, attributes, "read a map")
            ended = False
        except RedirectError as exc:
            if code_of(exc) != errno.ENOENT:
                raise
            ended = True
        count = struct.unpack_from("=I", attributes.raw, 32)[0]
        found += [some_keys.raw[index * key_size : (index + 1) * key_size] for index in range(count)]
        if ended:
            return found
        begun = True


# --- programs and links


def load_program(name: str, kind: int, attach: int, code: bytes, license_name: str) -> int:
    """An fd. When the verifier refuses, it is asked again for its reason, whose end is in the message."""
    instructions, licence = _buffer(code), _buffer(license_name.encode() + b"\0")

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attributes = struct.pack(
            "=IIQQIIQII16sII",
            kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(licence),
            0 if log is None else 1, 0 if log is None else len(log), 0 if log is None else ctypes.addressof(log),
            0, 0, name.encode()[: _NAME_BYTES - 1], 0, attach,
        )  # fmt: skip
        return call(PROG_LOAD, attributes, f"load program {name}")

    try:
        return attempt(None)
    except RedirectError as exc:
        if code_of(exc) not in (errno.EACCES, errno.EINVAL):
            raise
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return attempt(log)
        except RedirectError as again:
            lines = log.value.decode(errors="replace").strip().splitlines()
            why = "; ".join(line.strip() for line in lines[-4:] if not line.startswith("processed"))
            raise RedirectError(f"{again}: {why}" if why else str(again)) from again.__cause__


def load_types(blob: bytes) -> int:
    """An fd of a BTF object."""
    data = _buffer(blob)
    return call(BTF_LOAD, struct.pack("=QQIIII", ctypes.addressof(data), 0, len(blob), 0, 0, 0), "load types")


def create_link(program: int, target: int, attach: int, step: str) -> int:
    """An fd. The program is attached beside those of others, as long as something holds the link."""
    return call(LINK_CREATE, struct.pack("=IIII", program, target, attach, 0), step)


def update_link(link: int, program: int, step: str) -> None:
    """At one instant: each event is seen by the old program or by the new one."""
    call(LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0), step)


# --- pins


def pin(fd: int, path: str) -> None:
    name = _buffer(path.encode() + b"\0")
    call(OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0), f"pin {path}")


def get(path: str) -> int | None:
    """An fd, None where nothing is pinned."""
    name = _buffer(path.encode() + b"\0")
    try:
        return call(OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0), f"open {path}")
    except RedirectError as exc:
        if code_of(exc) == errno.ENOENT:
            return None
        raise


# --- what there is


def info(fd: int, size: int = 256) -> bytes:
    """The object's own description, as linux/bpf.h lays it out for its kind."""
    found = ctypes.create_string_buffer(size)
    attributes = ctypes.create_string_buffer(struct.pack("=IIQ", fd, size, ctypes.addressof(found)), 16)
    call(OBJ_INFO, attributes, "describe")
    return found.raw


def map_shape(fd: int) -> tuple[int, int, int, int, int]:
    """Kind, size of key and value, entries, flags."""
    kind, _, key_size, value_size, max_entries, flags = struct.unpack_from("=IIIIII", info(fd))
    return kind, key_size, value_size, max_entries, flags


def identity(fd: int) -> int:
    """The id which bpftool shows."""
    return int(struct.unpack_from("=II", info(fd))[1])


def describe_link(fd: int) -> tuple[int, int, int]:
    """Its id, that of its program, and what it is attached to: id of a cgroup, inode of a network namespace.

    0: nothing any more. A namespace's inode has 32 bits, and an attach type behind it.
    """
    found = info(fd)
    kind, number, program = struct.unpack_from("=III", found)
    target = struct.unpack_from("=Q" if kind == LINK_OF_CGROUP else "=I", found, 16)[0]
    return number, program, target


def ids(next_command: int) -> Iterator[int]:
    """Of all programs, maps or links of the machine."""
    current = 0
    while True:
        attributes = ctypes.create_string_buffer(struct.pack("=III", current, 0, 0), 12)
        try:
            call(next_command, attributes, "list")
        except RedirectError as exc:
            if code_of(exc) == errno.ENOENT:
                return
            raise
        current = struct.unpack_from("=II", attributes.raw)[1]
        yield current
