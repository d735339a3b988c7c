"""Our own messages."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netproxy import log
from netproxy.log import DEBUG, DEBUG_RATE, ERROR, INFO, WARNING, Log, write_now
from netproxy.logfile import STDOUT, open_target

PIPE = 4096


class Told:
    """A `Log` to a pipe of one page."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE)
        os.set_blocking(self.reader, False)
        self.log = Log(self.writer, lambda: self.now)
        self.log.role = "worker"

    def lines(self) -> list[str]:
        try:
            return os.read(self.reader, 1 << 20).decode().splitlines()
        except BlockingIOError:
            return []


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    os.close(made.reader)
    os.close(made.writer)


@pytest.mark.parametrize("level", range(4))
def test_levels(told: Told, level: int) -> None:
    told.log.level = level
    for of in (ERROR, WARNING, INFO, DEBUG):
        told.log.say(f"of {of}", of)
    lines = [
        "netproxy worker: error: of 0",
        "netproxy worker: warning: of 1",
        "netproxy worker: of 2",
        "netproxy worker: debug: of 3",
    ]
    assert told.lines() == lines[: level + 1]


def test_every_line_has_its_beginning(told: Told) -> None:
    told.log.say("one\ntwo\r\nthree\x1b[1m")
    assert told.lines() == ["netproxy worker: one", "netproxy worker: two", "netproxy worker: three\x1b[1m"]


def test_a_long_line_is_cut(told: Told) -> None:
    told.log.say("ä" * 5000)
    raw = os.read(told.reader, 1 << 16)
    assert len(raw) == PIPE and raw.endswith(b"...\n")


def test_nobody_waits_for_a_reader(told: Told) -> None:
    """What has no room is lost, and counted in the next message that has some."""
    for _ in range(3):
        told.log.say("x" * 4070)
    assert told.log.lost == 2
    assert len(told.lines()) == 1
    told.log.say("again")
    assert told.lines() == ["netproxy worker: warning: messages that could not be written: 2", "netproxy worker: again"]
    told.log.say("and again")
    assert told.lines() == ["netproxy worker: and again"]


def test_a_reader_that_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    made = Log(writer)
    made.say("nobody hears it")
    assert made.lost == 1
    os.close(writer)


def test_debug_messages_have_a_rate(told: Told) -> None:
    told.log.level = DEBUG
    said: list[str] = []
    for number in range(DEBUG_RATE + 50):
        told.log.say(str(number), DEBUG)
        said += told.lines()
    assert len(said) == DEBUG_RATE
    told.log.say("info has none")
    told.now += 1
    told.log.say("next", DEBUG)
    assert told.lines() == [
        "netproxy worker: info has none",
        "netproxy worker: debug: 50 messages of this level were left out",
        "netproxy worker: debug: next",
    ]


@pytest.mark.parametrize("kind", ["file", "terminal", "socket", "full", "closed"])
def test_what_a_message_may_be_written_to(kind: str, tmp_path: Path) -> None:
    if kind == "terminal":
        ours, theirs = pty.openpty()
        assert write_now(theirs, b"line\n")
        assert os.read(ours, 100) == b"line\r\n"
        os.close(ours)
    elif kind == "socket":
        # As systemd gives it: a stream to the journal.
        near, far = socket.socketpair()
        with near, far:
            sent = 0
            while write_now(near.fileno(), b"x" * 4095 + b"\n"):
                sent += 4096
            assert sent > 4096
            assert len(far.recv(sent, socket.MSG_WAITALL)) == sent
        return
    elif kind == "file":
        theirs = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        assert write_now(theirs, b"line\n")
        assert (tmp_path / "log").read_bytes() == b"line\n"
    else:
        theirs = os.open("/dev/full", os.O_WRONLY)
        if kind == "closed":
            os.close(theirs)
        assert not write_now(theirs, b"line\n")
        if kind == "closed":
            return
    os.close(theirs)


def test_the_level_of_this_process() -> None:
    before = log.level()
    try:
        log.set_level("debug")
        assert (log.level(), log.debugging()) == ("debug", True)
        log.set_level("info")
        assert not log.debugging()
        with pytest.raises(ValueError, match="loud"):
            log.set_level("loud")
        assert log.level() == "info"
    finally:
        log.set_level(before)


def test_a_traceback_line_by_line(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError as exc:
        log.log_exception("a connection failed", exc)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].endswith(": error: a connection failed")
    assert lines[-1].endswith(": error: RuntimeError: broken")
    assert all(": error: " in line for line in lines)


@pytest.mark.parametrize("where", ["fail()", "import threading; threading.Thread(target=fail).start()"])
def test_what_nobody_catches_waits_for_no_reader(where: str) -> None:
    program = f"""
from netproxy import log
log.begin("worker", "info")
def fail():
    raise RuntimeError("broken")
{where}
"""
    reader, stuck = os.pipe()
    fcntl.fcntl(stuck, fcntl.F_SETPIPE_SZ, PIPE)
    os.write(stuck, b"#" * PIPE)
    subprocess.run([sys.executable, "-c", program], stderr=stuck, timeout=20.0, check=False)
    os.close(stuck)
    assert os.read(reader, 1 << 20) == b"#" * PIPE
    os.close(reader)


# --- the file of the access log


def test_a_file_is_made_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        fd = open_target(str(path))
        os.write(fd, b"line\n")
        assert not os.get_inheritable(fd) and os.get_blocking(fd)
        os.close(fd)
    assert path.read_bytes() == b"line\nline\n"
    assert stat.S_IMODE(path.stat().st_mode) & ~0o640 == 0


@pytest.mark.parametrize(
    ("name", "error"),
    [("none/log", FileNotFoundError), ("folder", IsADirectoryError), ("file/log", NotADirectoryError)],
)
def test_what_is_no_target(tmp_path: Path, name: str, error: type[OSError]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(error):
        open_target(str(tmp_path / name))


def test_a_fifo_needs_no_reader(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = open_target(str(path))
    assert os.get_blocking(fd)
    os.write(fd, b"line\n")
    reader = os.open(path, os.O_RDONLY)
    assert os.read(reader, 100) == b"line\n"
    os.close(reader)
    os.write(fd, b"its reader is gone, the next one gets it\n")
    os.close(fd)


def test_standard_output() -> None:
    program = f"""
import os
from netproxy.logfile import open_target
os.write(open_target({STDOUT!r}), b"line\\n")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout == b"line\n"
