"""Lines to a descriptor that may block, by a thread of its own. Standard library only.

The loop puts lines into a bounded queue and never waits; a daemon thread writes them, which releases the interpreter's
lock. What can't be written is lost and counted::

    queue full          ``full``            the reader of a pipe is stuck, or the disk slower than the requests
    write fails         name of the errno   ``ENOSPC``, ``EIO``, ``EPIPE``, ...; the next lines are tried again
    no room for 1 s     ``EAGAIN``          somebody made the descriptor non-blocking
    our end comes       ``stuck``           what was still queued, since the thread could not be waited for

Regular files get many lines with one call: an append goes in one piece. Anything else gets at most PIPE_BUF octets a
call, always whole lines: then those of several processes that share a pipe never mix. What a full disk took of a line
stays there, and the next line that can be written begins a new one, whichever process was the one that tore.

A thread that is stuck in the kernel can't be ended, only left: `close` bounds the wait, and the process must then end
with os._exit.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from queue import Empty, SimpleQueue

MAX_LINES = 16_384
MAX_OCTETS = 8 * 1024 * 1024
PIPE_BUF = select.PIPE_BUF
_FILE_BATCH = 256 * 1024
_PAUSE_S = 0.02
"""Between two batches, so that the thread is not woken for every line."""
_ROOM_S = 1.0
_END = ord("\n")
_MAX_OLD = 4
"""So many writers may be stuck at targets of before."""


class LineWriter:
    """Owns `fd` and closes it at its end. `put`, `counts` and `close` are for one thread, the loop's."""

    def __init__(self, fd: int, *, max_lines: int = MAX_LINES, max_octets: int = MAX_OCTETS) -> None:
        self._fd = fd
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._batch = _FILE_BATCH if self._is_file else PIPE_BUF
        self._max = (max_lines, max_octets)
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._put = (0, 0)
        self._done = (0, 0)
        """Lines and octets, the thread's. Each of the two is replaced whole, so that the other side may read it."""
        self._full = 0
        self._written = 0
        self._lost: dict[str, int] = {}
        """The thread's, by name of the errno."""
        self._told: Counter[str] = Counter()
        self._doubtful = self._is_file
        """The file may end within a line: before our first one, and after a failure, which others had too."""
        self._torn = False
        """Our last line is not whole."""
        self.error = ""
        """Why the last write failed; "" when it did not."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """`line` has its end, and at most PIPE_BUF octets. Never blocks."""
        lines, octets = self._put[0] - self._done[0], self._put[1] - self._done[1]
        if lines >= self._max[0] or octets + len(line) > self._max[1]:
            self._full += 1
            return
        self._put = (self._put[0] + 1, self._put[1] + len(line))
        self._queue.put(line)

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return self._put[0] - self._done[0]

    def counts(self) -> dict[str, int]:
        """Since the last call: lines lost by reason, and those written as ``""``."""
        now = Counter(self._lost.copy())
        now[""], now["full"] = self._written, self._full
        new = now - self._told
        self._told = now
        return dict(new)

    def finish(self) -> None:
        """No line comes any more: the thread writes what is queued, closes the descriptor and ends."""
        if not self._closing.is_set():
            self._closing.set()
            self._queue.put(None)

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def close(self, timeout_s: float) -> bool:
        """`finish`, and wait for it. False: the thread is stuck."""
        self.finish()
        self._thread.join(timeout_s)
        return self.finished

    # -- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            more = True
            while more:
                line = self._queue.get()
                self._closing.wait(_PAUSE_S)
                more = self._drain(line)
        finally:
            os.close(self._fd)

    def _drain(self, line: bytes | None) -> bool:
        """Write `line` and what waits behind it. False: that was the end."""
        while line:
            batch, size = [line], len(line)
            line = self._next()
            while line and size + len(line) <= self._batch:
                batch.append(line)
                size += len(line)
                line = self._next()
            self._write(batch, size)
        return line is not None

    def _next(self) -> bytes | None:
        """b"" when none waits, None when none will come."""
        try:
            return self._queue.get_nowait()
        except Empty:
            return b""

    def _write(self, batch: list[bytes], size: int) -> None:
        head = b"\n" if self._doubtful and self._ends_within_a_line() else b""
        data = head + b"".join(batch)
        at, failed = 0, 0
        while at < len(data) and not failed:
            try:
                at += os.write(self._fd, data[at:] if at else data)
            except BlockingIOError:
                failed = 0 if self._has_room() else errno.EAGAIN
            except OSError as exc:
                failed = exc.errno or errno.EIO
        written = len(batch)
        if failed:
            taken = data[:at]
            written = taken[len(head) :].count(b"\n")
            name = errno.errorcode.get(failed, str(failed))
            self._lost[name] = self._lost.get(name, 0) + len(batch) - written
        if data[:at]:
            self._torn = data[at - 1] != _END
        self._doubtful = self._torn or (self._is_file and bool(failed))
        self.error = os.strerror(failed) if failed else ""
        self._written += written
        self._done = (self._done[0] + len(batch), self._done[1] + size)

    def _ends_within_a_line(self) -> bool:
        """Looked at twice: the write of another process may be half-way."""
        for again in (True, False) if self._is_file else ():
            try:
                size = os.fstat(self._fd).st_size
                if not size or os.pread(self._fd, 1, size - 1)[:1] in (b"", b"\n"):
                    return False
            except OSError:
                return self._torn  # it can't be read: we know of our own lines only
            if again:
                time.sleep(_PAUSE_S)
        return self._is_file or self._torn

    def _has_room(self) -> bool:
        """Wait for it. False: there was none in time."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(_ROOM_S * 1000))


class Output:
    """The lines of one process, to whatever the target is by now. `count(reason, n)` is told what became of them."""

    def __init__(self, count: Callable[[str, int], None], tell: Callable[[str], None]) -> None:
        self._count = count
        self._tell = tell
        self._writer: LineWriter | None = None
        self._old: list[LineWriter] = []
        """They still write what they had when the target was opened anew."""
        self._error = ""

    def put(self, line: bytes) -> None:
        if self._writer is not None:
            self._writer.put(line)

    def replace(self, fd: int) -> None:
        """Lines from now on go to `fd`, which is ours; what is queued goes where it should have gone."""
        self.publish()
        if len(self._old) >= _MAX_OLD:
            os.close(fd)
            self._tell("the target was opened anew, but too many writers are stuck at the old one: it stays")
            return
        try:
            writer = LineWriter(fd)
        except (OSError, RuntimeError) as exc:
            os.close(fd)
            self._tell(f"no thread to write to the new target: {exc}; the old one stays")
            return
        if self._writer is not None:
            self._writer.finish()
            self._old.append(self._writer)
        self._writer = writer

    def publish(self) -> None:
        """Tell the counts since the last time, and an error that is new or gone."""
        for writer in (*self._old, *filter(None, (self._writer,))):
            # What it finishes after this look is in the counts of the next one.
            finished = writer.finished
            for reason, n in writer.counts().items():
                self._count(reason, n)
            if finished and writer in self._old:
                self._old.remove(writer)
        error = self._writer.error if self._writer is not None else ""
        if error != self._error:
            self._error = error
            self._tell(f"{error}: lines are lost" if error else "it can be written again")

    def close(self, timeout_s: float) -> bool:
        """Write what is queued. False: a thread is stuck, so that the process can't end by itself."""
        writers = [*self._old, *filter(None, (self._writer,))]
        for writer in writers:
            writer.finish()
        until = time.monotonic() + timeout_s
        done = [writer.close(max(0.0, until - time.monotonic())) for writer in writers]
        self.publish()
        if left := sum(writer.waiting for writer in writers):
            self._count("stuck", left)
        return all(done)
