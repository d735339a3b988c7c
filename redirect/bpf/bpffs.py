"""Where things are pinned: `<bpffs>/netproxy/<node>/<layout>/`, and the file systems that this needs.

    map_<name>             maps
    link_<hook>            what attaches a program at the cgroup
    inbound_<cookie>       what attaches the inbound program to a network namespace

A set of its own for each layout of the maps: an upgrade that changes them works beside the earlier set until that is
retired. A program is held by its link. Names of a new bpffs (`maps.debug`, `progs.debug`) are the kernel's: nothing is
ever removed but what is named above.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redirect.errors import RedirectError

BPFFS = Path("/sys/fs/bpf")
BPF_MAGIC = 0xCAFE4A11
CGROUP2_MAGIC = 0x63677270
_FOLDER = "netproxy"
_NODE = re.compile(r"[a-z0-9-]{1,40}")
_LAYOUT = re.compile(r"[0-9a-f]{16}")
_OURS = re.compile(r"(map|link)_[a-z0-9_]+|inbound_[0-9]+")

_libc = ctypes.CDLL(None, use_errno=True)


def filesystem(path: Path) -> int:
    """f_type of statfs(2), 0 where there is nothing."""
    buffer = (ctypes.c_long * 64)()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        return 0
    return int(buffer[0])


def mounted(bpffs: Path = BPFFS) -> Path:
    """The folder, with a bpffs mounted on it if there was none. RedirectError."""
    if filesystem(bpffs) == BPF_MAGIC:
        return bpffs
    if _libc.mount(b"bpf", os.fsencode(bpffs), b"bpf", 0, b"mode=0700") != 0:
        cause = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise RedirectError(str(cause), step=f"mount bpffs on {bpffs}") from cause
    return bpffs


def cgroup_root() -> Path:
    """Where cgroup2 is mounted, alone or beside the older hierarchies. RedirectError where it is not."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError as exc:
        raise RedirectError(str(exc), step="look for cgroup2") from exc
    for line in lines:
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4].encode().decode("unicode_escape"))
    raise RedirectError("no cgroup2 is mounted", step="look for cgroup2")


def cgroup_id(path: Path) -> int:
    """By which the kernel tells cgroups apart: the inode, while the cgroup lives. RedirectError."""
    if filesystem(path) != CGROUP2_MAGIC:
        raise RedirectError("no cgroup of version 2", namespace=str(path), step="identify cgroup")
    try:
        return path.stat().st_ino
    except OSError as exc:
        raise RedirectError(str(exc), namespace=str(path), step="identify cgroup") from exc


def folder(node: str, bpffs: Path = BPFFS) -> Path:
    """RedirectError for a name that is no node's."""
    if not _NODE.fullmatch(node):
        raise RedirectError(f"node name {node!r} is not of the form {_NODE.pattern}")
    return bpffs / _FOLDER / node


def sets(node: str, bpffs: Path = BPFFS) -> list[Path]:
    """Folders of the node's layouts."""
    try:
        return sorted(path for path in folder(node, bpffs).iterdir() if _LAYOUT.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise RedirectError(str(exc), namespace=str(folder(node, bpffs)), step="list pins") from exc


def nodes(bpffs: Path = BPFFS) -> list[str]:
    """Those which have something pinned."""
    try:
        return sorted(path.name for path in (bpffs / _FOLDER).iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def pinned(place: Path) -> list[str]:
    """Names of what a set has pinned."""
    try:
        return sorted(name for name in os.listdir(place) if _OURS.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise RedirectError(str(exc), namespace=str(place), step="list pins") from exc


def unpin(path: Path) -> bool:
    """False: it was not there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise RedirectError(str(exc), namespace=str(path), step="unpin") from exc
    return True


def remove_folders(*paths: Path) -> None:
    """In this order, up to one that is not empty: what is not ours stays, with its folder."""
    for path in paths:
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EBUSY):
                return
            raise RedirectError(str(exc), namespace=str(path), step="remove folder") from exc


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One at a time changes what is pinned there. Waits for the other, which only loads."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise RedirectError(str(exc), namespace=str(path), step="lock pins") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
