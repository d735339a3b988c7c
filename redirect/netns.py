"""Network namespaces: open one, name it, and run code inside one.

setns(2) is per thread, so `inside` may be used by many threads at once. A thread that cannot come back would do its
next work, for whomever, in somebody's pod: that ends the process. Never `await` inside.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from redirect.errors import RedirectError

CLONE_NEWNET = 0x40000000
NSFS_MAGIC = 0x6E736673
NS_GET_NSTYPE = 0xB703  # _IO(0xb7, 3), Linux 4.11
SO_NETNS_COOKIE = 71  # Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)  # os.setns and os.unshare came with Python 3.12


class NetnsId(NamedTuple):
    """What tells namespaces apart, however many paths lead to one. Valid as long as the namespace lives."""

    dev: int
    ino: int

    def __str__(self) -> str:
        return f"net:[{self.ino}]"


def identity(netns_fd: int) -> NetnsId:
    """The namespace behind an open fd."""
    try:
        stat = os.fstat(netns_fd)
    except OSError as exc:
        raise RedirectError(str(exc), namespace=f"fd {netns_fd}", step="identify namespace") from exc
    return NetnsId(stat.st_dev, stat.st_ino)


def open_netns(path: str) -> int:
    """Open a network namespace (`/run/netns/NAME`, `/proc/PID/ns/net`); the caller closes the fd.

    The path comes from configuration: it is first opened with O_PATH, so that a FIFO does not block and a device is not
    operated, and only then for real when it lies on nsfs and is a network namespace. RedirectError otherwise.
    """
    step = "open namespace"
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if _filesystem(handle) != NSFS_MAGIC:
                raise RedirectError("not a namespace file", namespace=path, step=step)
            fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(handle)
    except OSError as exc:
        raise RedirectError(str(exc), namespace=path, step=step) from exc
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError as exc:
        os.close(fd)
        raise RedirectError(str(exc), namespace=path, step=step) from exc
    if kind != CLONE_NEWNET:
        os.close(fd)
        raise RedirectError("a namespace, but not a network namespace", namespace=path, step=step)
    return fd


@contextmanager
def current() -> Iterator[int]:
    """An fd of the calling thread's own namespace. RedirectError."""
    try:
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise RedirectError(str(exc), step="open own namespace") from exc
    try:
        yield fd
    finally:
        os.close(fd)


def cookie() -> int:
    """The number by which the kernel's programs know the calling thread's namespace."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)
    except OSError as exc:
        raise RedirectError(str(exc), step="ask for the namespace's cookie") from exc


def netns_cookie(netns_fd: int) -> int:
    """The same of another one."""
    with inside(netns_fd):
        return cookie()


@contextmanager
def inside(netns_fd: int) -> Iterator[None]:
    """Run the block with the calling thread in that network namespace. Needs CAP_SYS_ADMIN.

    RedirectError if the namespace cannot be entered. Not being able to return aborts the process.
    """
    with current() as home:
        if _libc.setns(netns_fd, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise RedirectError(os.strerror(number), namespace=f"fd {netns_fd}", step="enter namespace")
        try:
            yield
        finally:
            if _libc.setns(home, CLONE_NEWNET) != 0:
                os.abort()


def unshare_netns() -> None:
    """Put the calling thread into a new, empty network namespace. There is no way back: let the thread end."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        raise RedirectError(os.strerror(ctypes.get_errno()), step="make a scratch namespace")


def _filesystem(fd: int) -> int:
    """f_type of fstatfs(2), which Python does not expose: the first word of a struct of at most 120 bytes."""
    buffer = (ctypes.c_long * 64)()
    if _libc.fstatfs(fd, ctypes.byref(buffer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(buffer[0])
