"""Descriptors in threads of their own."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

from netproxy.holder import Holder, release


def is_closed(reader: int) -> bool:
    """The last copy of the pipe's other end is closed."""
    return bool(select.select([reader], [], [], 0)[0]) and os.read(reader, 1) == b""


def test_a_held_descriptor_is_open_until_its_release() -> None:
    pipes = [os.pipe() for _ in range(5)]
    before = len(os.listdir("/proc/self/fd"))
    holders = [Holder(writer) for _, writer in pipes]
    readers = [reader for reader, _ in pipes]
    assert not any(map(is_closed, readers))
    copy = holders[0].duplicate()
    assert not os.get_inheritable(copy)
    release(holders)
    assert [is_closed(reader) for reader in readers] == [False, True, True, True, True]
    os.close(copy)
    assert is_closed(readers[0])
    assert len(os.listdir("/proc/self/fd")) == before - len(pipes)
    for reader in readers:
        os.close(reader)


def test_a_holder_keeps_nothing_else_open() -> None:
    reader, writer = os.pipe()
    held, end = os.pipe()
    holder = Holder(end)
    os.close(writer)
    assert is_closed(reader)
    release([holder])
    assert is_closed(held)
    os.close(reader)
    os.close(held)


def test_no_signal_goes_to_a_holder() -> None:
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    holder = Holder(writer)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    (task,) = (thread.native_id for thread in threading.enumerate() if thread.name == "holder")
    (mask,) = re.findall(r"SigBlk:\s(\w+)", Path(f"/proc/self/task/{task}/status").read_text())
    assert int(mask, 16) & 1 << (signal.SIGTERM - 1)
    release([holder])
    os.close(reader)


PROGRAM = """
import os, sys
from netproxy.holder import Holder
holder = Holder(int(sys.argv[1]))
if len(sys.argv) > 2:
    fd = holder.duplicate()
    os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], str(fd)])
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_holds_nothing() -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-c", PROGRAM, str(writer)]
    with subprocess.Popen(
        command, pass_fds=[writer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert not is_closed(reader)
        process.kill()
        process.wait()
    assert is_closed(reader)
    os.close(reader)


def test_a_duplicate_outlives_execve() -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-c", PROGRAM, str(writer), PROGRAM]
    with subprocess.Popen(
        command, pass_fds=[writer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert not is_closed(reader)
        process.kill()
        process.wait()
    assert is_closed(reader)
    os.close(reader)
