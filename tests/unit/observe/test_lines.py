"""The thread that writes lines: nobody waits for it, and what it could not write is counted."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from netproxy.logfile import open_target
from netproxy.observe.lines import PIPE_BUF, LineWriter, Output

WAIT_S = 20.0
"""Never slept: how long a failing test takes."""


@pytest.fixture
def stuck() -> Iterator[tuple[int, int]]:
    """A pipe that is full, and nobody reads. (reading end, writing end); both are the test's to close."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BUF)
    os.write(writer, b"#" * (PIPE_BUF - 1) + b"\n")
    yield reader, writer


def written(writer: LineWriter) -> dict[str, int]:
    assert writer.close(WAIT_S)
    return {reason: n for reason, n in writer.counts().items() if n}


def to_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def test_lines_arrive_in_order(tmp_path: Path) -> None:
    writer = LineWriter(to_file(tmp_path / "log"))
    lines = [f"line {number}\n".encode() for number in range(5000)]
    for line in lines:
        writer.put(line)
    assert written(writer) == {"": 5000}
    assert (tmp_path / "log").read_bytes() == b"".join(lines)
    assert writer.counts() == {}
    assert writer.waiting == 0


def test_the_descriptor_is_closed_at_the_end() -> None:
    reader, end = os.pipe()
    writer = LineWriter(end)
    writer.put(b"last\n")
    assert writer.close(WAIT_S)
    assert os.read(reader, 100) == b"last\n"
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_a_pipe_gets_whole_lines_in_pieces_that_it_takes_at_once() -> None:
    """SOCK_DGRAM shows each write by itself."""

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    writer = LineWriter(theirs.detach())
    lines = [b"x" * size + b"\n" for size in (10, PIPE_BUF - 1, 1, 4000, 94, 95, 3000, 3000)]
    for line in lines:
        writer.put(line)
    ours.settimeout(WAIT_S)
    pieces: list[bytes] = []
    while sum(map(len, pieces)) < sum(map(len, lines)):
        pieces.append(ours.recv(1 << 16))
    assert writer.close(WAIT_S)
    ours.close()
    assert b"".join(pieces) == b"".join(lines)
    assert all(piece.endswith(b"\n") and len(piece) <= PIPE_BUF for piece in pieces)


def test_processes_that_share_a_pipe_do_not_mix() -> None:
    reader, end = os.pipe()
    writers = [LineWriter(os.dup(end)) for _ in range(3)]
    os.close(end)
    for number in range(200):
        for name, writer in zip(b"abc", writers, strict=True):
            writer.put(bytes([name]) * (number * 7 + 1) + b"\n")
    for writer in writers:
        writer.finish()
    with os.fdopen(reader, "rb") as file:
        lines = file.read().splitlines()
    assert all(len(set(line)) == 1 for line in lines)
    assert Counter(line[:1] for line in lines) == {b"a": 200, b"b": 200, b"c": 200}


@pytest.mark.parametrize(("lines", "octets", "fits"), [(10, 1 << 20, 10), (1000, 100, 10)])
def test_a_stuck_reader(stuck: tuple[int, int], lines: int, octets: int, fits: int) -> None:
    """The queue has a bound in lines and one in octets; put never waits, and close not for longer than it may."""
    reader, end = stuck
    writer = LineWriter(end, max_lines=lines, max_octets=octets)
    for number in range(50):
        writer.put(b"%8d\n" % number + b"")
        assert writer.waiting <= fits + 1
    lost = 50 - writer.waiting
    assert writer.counts() == {"full": lost}
    assert lost >= 50 - fits - 1
    assert not writer.close(0.0)
    # Once it is read, what was queued comes.
    with os.fdopen(reader, "rb") as file:
        assert len(file.read().splitlines()) == 1 + 50 - lost
    assert written(writer) == {"": 50 - lost}


def test_a_full_disk_is_counted_and_comes_back(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(fd)
    writer.put(b"one\n")
    writer.put(b"two\n")
    while writer.waiting:
        threading.Event().wait(0.001)
    assert writer.error == "No space left on device"
    assert writer.counts() == {"ENOSPC": 2}
    # The disk has room again.
    other = to_file(tmp_path / "log")
    os.dup2(other, fd)
    os.close(other)
    writer.put(b"three\n")
    assert written(writer) == {"": 1}
    assert writer.error == ""
    assert (tmp_path / "log").read_bytes() == b"three\n"


def test_a_reader_that_is_gone() -> None:
    reader, end = os.pipe()
    os.close(reader)
    writer = LineWriter(end)
    writer.put(b"one\n")
    assert written(writer) == {"EPIPE": 1}
    assert writer.error == "Broken pipe"


def test_a_line_that_was_cut_short_ends_before_the_next(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk that is full in the middle of a line."""
    program = f"""
import resource, signal, os
from netproxy.logfile import open_target
from netproxy.observe.lines import LineWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 100))
writer = LineWriter(os.open({str(tmp_path / "log")!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
for line in (b"first\\n", b"second\\n", b"third\\n"):
    writer.put(line)
while writer.waiting:
    pass
counts = writer.counts()
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
writer.put(b"fourth\\n")
assert writer.close({WAIT_S})
print(counts, writer.counts())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "{'EFBIG': 2, '': 1} {'': 1}\n"
    assert (tmp_path / "log").read_bytes() == b"first\nseco\nfourth\n"


@pytest.mark.parametrize(
    ("before", "after"), [(b"", b"line\n"), (b"whole\n", b"whole\nline\n"), (b'{"half', b'{"half\nline\n')]
)
def test_a_line_that_another_process_left_cut_short(tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "log").write_bytes(before)
    writer = LineWriter(open_target(str(tmp_path / "log")))
    writer.put(b"line\n")
    assert written(writer) == {"": 1}
    assert (tmp_path / "log").read_bytes() == after


def test_two_processes_and_a_full_disk(tmp_path: Path) -> None:
    """One tears a line, which the other, whose line was lost too, finds. A limit on files stands for the disk."""
    program = f"""
import resource, signal
from netproxy.logfile import open_target
from netproxy.logfile import open_target
from netproxy.observe.lines import LineWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
one, other = (LineWriter(open_target({str(tmp_path / "log")!r})) for _ in range(2))
def put(writer, line):
    writer.put(line)
    while writer.waiting:
        pass
put(other, b"first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 100))
put(one, b"second\\n")
put(other, b"third\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
put(other, b"fourth\\n")
put(one, b"fifth\\n")
assert one.close({WAIT_S}) and other.close({WAIT_S})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "log").read_bytes() == b"first\nseco\nfourth\nfifth\n"


def test_a_descriptor_that_somebody_made_non_blocking(stuck: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netproxy.observe.lines._ROOM_S", 0.001)
    reader, end = stuck
    os.set_blocking(end, False)
    writer = LineWriter(end)
    writer.put(b"one\n")
    assert written(writer) == {"EAGAIN": 1}
    os.close(reader)


def test_a_stuck_writer_does_not_keep_the_process_alive(stuck: tuple[int, int]) -> None:
    reader, end = stuck
    program = f"""
import os
import socket
from netproxy.logfile import open_target
from netproxy.observe.lines import LineWriter
writer = LineWriter({end})
writer.put(b"one\\n")
assert not writer.close(0.01)
"""
    subprocess.run([sys.executable, "-c", program], pass_fds=(end,), check=True, timeout=WAIT_S)
    os.close(reader)
    os.close(end)


# --- the lines of a process


class Told:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.said: list[str] = []
        self.output = Output(self.count, self.said.append)

    def count(self, reason: str, n: int) -> None:
        self.counts[reason] += n


def test_a_new_target_loses_nothing(tmp_path: Path) -> None:
    told = Told()
    told.output.put(b"before there is a target\n")
    for number in range(3):
        told.output.replace(to_file(tmp_path / f"{number}"))
        for line in range(100):
            told.output.put(b"%d %d\n" % (number, line))
    assert told.output.close(WAIT_S)
    for number in range(3):
        assert len((tmp_path / f"{number}").read_bytes().splitlines()) == 100
    assert told.counts == {"": 300}
    assert told.said == []


def test_an_error_is_told_once_and_when_it_is_over(tmp_path: Path) -> None:
    told = Told()
    told.output.replace(os.open("/dev/full", os.O_WRONLY))
    for number in range(3):
        told.output.put(b"lost\n")
        while told.counts["ENOSPC"] < number + 1:
            told.output.publish()
    told.output.publish()
    assert told.said == ["No space left on device: lines are lost"]
    told.output.replace(to_file(tmp_path / "log"))
    told.output.publish()
    assert told.said[1:] == ["it can be written again"]
    assert told.output.close(WAIT_S)


def test_writers_that_are_stuck_have_a_bound(stuck: tuple[int, int]) -> None:
    reader, end = stuck
    told = Told()
    told.output.replace(os.dup(end))
    for _ in range(6):
        told.output.put(b"line\n")
        told.output.replace(os.dup(end))
    assert len(told.said) == 2
    assert "stays" in told.said[0]
    told.output.put(b"line\n")
    assert not told.output.close(0.0)
    assert told.counts == {"stuck": 7}  # a process ends now
    os.close(end)
    with os.fdopen(reader, "rb") as file:
        assert file.read().count(b"line\n") == 7  # at its end every writer has written what it had, and closed
    assert told.output.close(WAIT_S)
    assert told.counts == {"stuck": 7, "": 7}
