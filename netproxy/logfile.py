"""The file that access logs go to, opened by the supervisor, written by the workers. Standard library only."""

from __future__ import annotations

import os
import stat

STDOUT = "-"


def open_target(path: str) -> int:
    """A descriptor to append lines to; `STDOUT` is our own standard output. Never waits, raises OSError.

    A FIFO is opened for both ways: so it needs no reader now, and outlives its readers.
    """
    if path == STDOUT:
        return os.dup(1)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = 0
    way = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_WRONLY
    flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    fd = os.open(path, way | flags, 0o640)
    os.set_blocking(fd, True)  # its writers have a thread that may wait
    return fd
