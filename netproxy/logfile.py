"""The file that access logs go to, opened by the supervisor, written by the workers. Standard library only."""

from __future__ import annotations

import os
import stat

STDOUT = "-"


def open_target(path: str) -> int:
    """A descriptor to append lines to; `STDOUT` is our own standard output. Never waits, raises OSError.

    Opened for both ways: so a FIFO needs no reader now, and outlives its readers; of a file it can be seen how it ends.
    """
    if path == STDOUT:
        return os.dup(1)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    way = os.O_RDWR if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else os.O_WRONLY
    flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    fd = os.open(path, way | flags, 0o640)
    os.set_blocking(fd, True)  # its writers have a thread that may wait
    return fd
