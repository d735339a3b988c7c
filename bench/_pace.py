"""Requests at an even rate, and how long each took from the moment at which it was due, whatever kept it.

Usage: ``python -m bench._pace HOST PORT PATH CONNECTIONS RATE SECONDS``; prints JSON: requests, us, failed, p50, p99,
p999 (all times in us).

wrk and h2load start requests at whole milliseconds, all connections at once: what they show then is the burst. Here a
timer of the kernel says when the next one is due, and it takes any connection that is free; without one it waits, and
its waiting counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import socket
import struct
import sys
import time
from collections import deque

from bench._client import length_of_answer

_libc = ctypes.CDLL(None, use_errno=True)
LATE_S = 5.0
"""What is not answered so long after the last was due has failed."""


def periodic(interval_ns: int) -> int:
    """A timer descriptor; a read tells how often it has been due."""
    fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    spec = struct.pack("qqqq", *divmod(interval_ns, 10**9), *divmod(interval_ns, 10**9))
    if fd < 0 or _libc.timerfd_settime(fd, 0, spec, None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd")
    return fd


def main() -> None:
    host, port, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    count, rate, seconds = int(sys.argv[4]), float(sys.argv[5]), float(sys.argv[6])
    request = f"GET {path} HTTP/1.1\r\nhost: web\r\nuser-agent: bench\r\naccept: */*\r\n\r\n".encode()
    free = deque(socket.create_connection((host, port), 10) for _ in range(count))
    for sock in free:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size = length_of_answer(free[0], request)
    poll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in free}
    for fd, sock in by_fd.items():
        sock.setblocking(False)
        poll.register(fd, select.EPOLLIN)
    gc.disable()
    interval = round(1e9 / rate)
    total = max(1, int(rate * seconds))
    timer = periodic(interval)
    begin = time.monotonic_ns() + interval
    poll.register(timer, select.EPOLLIN)
    due = sent = failed = 0
    started: dict[int, int] = {}
    left: dict[int, int] = {}
    times: list[int] = []
    last = begin + total * interval
    while len(times) + failed < total:
        if time.monotonic_ns() > last + LATE_S * 1e9 or not by_fd:
            failed = total - len(times)
            break
        for fd, _ in poll.poll(1.0):
            if fd == timer:
                due = min(total, due + int.from_bytes(os.read(timer, 8), sys.byteorder))
                continue
            sock = by_fd[fd]
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            left[fd] = left.get(fd, 0) - len(data)
            if data and left[fd] > 0:
                continue
            if fd in started:
                if data and left[fd] == 0:
                    times.append(time.monotonic_ns() - started.pop(fd))
                    free.append(sock)
                    continue
                failed += 1
                del started[fd]
            # Closed, or more than was asked for: no connection to go on with.
            poll.unregister(fd)
            del by_fd[fd]
            sock.close()
        while sent < due and free:
            sock = free.popleft()
            fd = sock.fileno()
            if fd < 0:
                continue
            started[fd], left[fd] = begin + sent * interval, size
            sent += 1
            try:
                sock.send(request)
            except OSError:
                pass  # its end is the next thing that we read
    spent = time.monotonic_ns() - begin
    times.sort()
    shown = {name: times[max(0, -(-len(times) * share // 1000) - 1)] / 1e3 if times else 0
             for name, share in (("p50", 500), ("p99", 990), ("p999", 999))}  # fmt: skip
    print(json.dumps({"requests": len(times), "us": spent / 1e3, "failed": failed, **shown}))


if __name__ == "__main__":
    main()
