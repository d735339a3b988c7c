"""Our own messages: lines on standard error, ``netproxy <role>: <text>``. Standard library only.

Nobody ever waits for the reader of standard error: a message that a pipe, socket or terminal does not take now is lost,
and the next one that gets through says how many were. (A regular file is written as usual.) Debug messages are at
most `DEBUG_RATE` a second and process; how many were left out is said too.

Levels may change at any time. Below info a message says its level.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

ERROR, WARNING, INFO, DEBUG = range(4)
LEVELS = ("error", "warning", "info", "debug")
DEBUG_RATE = 200
_MAX_LINE = 4096
"""A pipe takes so much in one piece (PIPE_BUF)."""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE, errno.ENOSYS)


class Log:
    def __init__(self, fd: int = 2, now: Callable[[], float] = time.monotonic) -> None:
        self.role = ""
        self.level = INFO
        self.lost = 0
        self._fd = fd
        self._now = now
        self._second = 0.0
        self._debugs = 0

    def say(self, text: str, level: int = INFO) -> None:
        if level > self.level or (level == DEBUG and not self._may_debug()):
            return
        for line in text.splitlines() or [""]:
            self._line(line, level)

    def _may_debug(self) -> bool:
        now = self._now()
        if now - self._second >= 1.0:
            left_out, self._second, self._debugs = self._debugs - DEBUG_RATE, now, 0
            if left_out > 0:
                self._line(f"{left_out} messages of this level were left out", DEBUG)
        self._debugs += 1
        return self._debugs <= DEBUG_RATE

    def _line(self, text: str, level: int) -> None:
        name = "" if level == INFO else f"{LEVELS[level]}: "
        who = f"netproxy {self.role}" if self.role else "netproxy"
        data = f"{who}: {name}{text}".encode("utf-8", "backslashreplace")
        if len(data) >= _MAX_LINE:
            data = data[: _MAX_LINE - 4] + b"..."
        if self.lost:
            notice = f"{who}: warning: messages that could not be written: {self.lost}\n"
            if not write_now(self._fd, notice.encode()):
                self.lost += 1
                return
            self.lost = 0
        if not write_now(self._fd, data + b"\n"):
            self.lost += 1


def write_now(fd: int, data: bytes) -> bool:
    """Write `data`, at most PIPE_BUF octets, if that needs no waiting; was it written?"""
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return os.write(fd, data) == len(data)
        try:
            return os.pwritev(fd, [data], -1, os.RWF_NOWAIT) == len(data)
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                return False
        # Terminals, and pipes before Linux 6.4: between the two calls another process may take the room.
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        return bool(poll.poll(0)) and os.write(fd, data) == len(data)
    except OSError:
        return False


_own = Log()


def begin(role: str, level: str) -> None:
    """`role` is what the messages of this process begin with. What nobody catches is told by us from now on."""
    _own.role = role
    set_level(level)
    # The interpreter's own way waits for a stuck reader: a process that fails would never end, nor be replaced.
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _uncaught(kind: type[BaseException], exc: BaseException | None, _trace: TracebackType | None) -> None:
    log_exception("uncaught", exc if exc is not None else kind())


def set_level(name: str) -> None:
    """One of `LEVELS`. Raises ValueError for others."""
    if name not in LEVELS:
        raise ValueError(f"{name!r} is none of {', '.join(LEVELS)}")
    _own.level = LEVELS.index(name)


def level() -> str:
    return LEVELS[_own.level]


def log(text: str, level: int = INFO) -> None:
    _own.say(text, level)


def debug(text: str) -> None:
    """Where `text` costs something, ask `debugging` first."""
    _own.say(text, DEBUG)


def debugging() -> bool:
    return _own.level >= DEBUG


def log_exception(text: str, exc: BaseException) -> None:
    """With the traceback, line by line."""
    _own.say("".join([f"{text}\n", *traceback.format_exception(exc)]).rstrip(), ERROR)
