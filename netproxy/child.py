"""What brain and worker do alike at their start: die with the supervisor, say hello. Standard library only."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import select
import signal
import socket
import sys
from typing import NamedTuple

from . import log as own_log
from .channel import VERSION, Channel, ChannelBroken, Message
from .settings import NodeSettings

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_WELCOME_TIMEOUT_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class Joined(NamedTuple):
    channel: Channel
    slot: int
    settings: NodeSettings
    arena_fd: int
    region: int
    """Which one of the arena is ours; -1 for the brain."""


def join(role: str) -> Joined:
    """Introduce ourselves to the supervisor that started us (argv: descriptor, slot, its pid)."""
    fd, slot, parent = (int(argument) for argument in sys.argv[1:4])
    die_with_parent(parent)
    # A terminal tells its whole foreground group; what they mean is the supervisor's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    channel = Channel(socket.socket(fileno=fd))
    channel.send("hello", v=VERSION, role=role, slot=slot)
    message = _wait(channel)
    if message.op != "welcome" or message.fields["v"] != VERSION:
        raise ChannelBroken(f"expected a welcome in version {VERSION}, got {message.op}")
    settings = NodeSettings.from_json(message.fields["settings"])
    own_log.begin(role, message.fields.get("log_level", settings.log_level))
    # What libraries have to say must not wait for a reader either.
    logging.basicConfig(handlers=[_ToLog()], format="%(name)s: %(message)s", force=True)
    logging.captureWarnings(True)
    return Joined(channel, slot, settings, message.fds[0], message.fields["region"])


def _wait(channel: Channel) -> Message:
    while True:
        message = channel.receive()
        if message is not None:
            return message
        if not select.select([channel], [], [], _WELCOME_TIMEOUT_S)[0]:
            raise ChannelBroken("no welcome from the supervisor")


class _ToLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        own_log.log(self.format(record), own_log.ERROR if record.levelno >= logging.ERROR else own_log.WARNING)


def die_with_parent(parent: int) -> None:
    """SIGKILL us when `parent` dies; exit now if it has already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def drop_privileges(uid: int, gid: int, parent: int) -> None:
    """For good: no capability, no way back. Must be called in the only thread."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    die_with_parent(parent)  # again: a change of uid clears the death signal


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
