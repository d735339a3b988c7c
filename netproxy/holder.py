"""Descriptors that go at once when this process dies, however many they are. Standard library only.

Closing the netlink socket which owns an nft table waits for an RCU grace period, and a dying process closes its
descriptors one after the other: 31 workloads were refused connections for up to 490 ms after a kill -9. So each lives
in a thread with a descriptor table of its own (unshare(2), CLONE_FILES), and those of a killed process are closed side
by side (30 tables: 421 ms before, 15 ms so; 2 cores, kernel 6.18).

The thread speaks over a socket pair: any octet asks for a duplicate, end of stream ends it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterable

_CLONE_FILES = 0x400
_STACK = 128 * 1024

_libc = ctypes.CDLL(None)


class Holder:
    """Takes `fd` over: it is open until `release`, and open nowhere else. Without a thread for it, it stays here."""

    def __init__(self, fd: int) -> None:
        self._here = -1
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=_hold, args=(fd, theirs.fileno()), name="holder", daemon=True)
        threading.stack_size(_STACK)
        # All signals are the main thread's: Python's handler writes to a descriptor which a holder does not have.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
            held = self._ours.recv(16) == b"held"
        except RuntimeError:  # no thread can be started
            held = False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        if held:
            os.close(fd)
        else:
            self._here = fd

    def duplicate(self) -> int:
        """Of the descriptor, in this thread's table. The caller closes it."""
        if self._here >= 0:
            return os.dup(self._here)
        self._ours.send(b"?")
        _, (fd,), _, _ = socket.recv_fds(self._ours, 16, 1)
        os.set_inheritable(fd, False)  # recv_fds of Python 3.11 ignores its flags
        return fd


def release(holders: Iterable[Holder]) -> None:
    """Close what they hold, all at the same time, and wait until it is."""
    leaving = list(holders)
    for holder in leaving:
        holder._ours.close()
        if holder._here >= 0:
            os.close(holder._here)
    for holder in leaving:
        if holder._here < 0:
            holder._thread.join()


def _hold(fd: int, channel: int) -> None:
    if _libc.unshare(_CLONE_FILES):
        os.write(channel, b"no")  # both descriptors are the caller's
        return
    # From here on this thread's descriptors are its own. Nothing of the others may live on in them.
    try:
        others = [int(entry) for entry in os.listdir("/proc/thread-self/fd")]
    except OSError:
        # No descriptor to be had for the listing. Ours are copies: the caller keeps its own.
        os.write(channel, b"no")
        os.closerange(0, 1 << 20)
        return
    for other in others:
        if other not in (fd, channel):
            try:
                os.close(other)
            except OSError:
                pass  # of the listing itself
    with socket.socket(fileno=channel) as sock:
        sock.send(b"held")
        while sock.recv(16):
            socket.send_fds(sock, [b"fd"], [fd])
    os.close(fd)
