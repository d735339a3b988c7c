"""A cheap HTTP/1.1 client: keep-alive connections, one request at a time on each, for some seconds.

Usage: ``_client.py HOST PORT CONNECTIONS SECONDS``; prints JSON: requests, failed, seconds. It expects
every answer to be as long as the first one, so it need not parse the others.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

REQUEST = b"GET /bench HTTP/1.1\r\nhost: web\r\nuser-agent: bench\r\naccept: */*\r\n\r\n"


class Connection:
    def __init__(self, where: tuple[str, int]) -> None:
        self.sock = socket.create_connection(where, 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.left = 0


def length_of_answer(sock: socket.socket, request: bytes = REQUEST) -> int:
    """Asks once, and reads all of the answer. Exits when there is none, or not a 200."""
    sock.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        sys.exit(f"not answered: {head[:200]!r}")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    size = int(fields[b"content-length"])
    while len(body) < size:
        body += receive(sock)
    return len(head) + 4 + size


def receive(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    if not data:
        sys.exit("closed before the answer was there")
    return data


def main() -> None:
    host, port, count, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    connections = [Connection((host, port)) for _ in range(count)]
    size = length_of_answer(connections[0].sock)
    poll = select.epoll()
    by_fd = {connection.sock.fileno(): connection for connection in connections}
    requests = failed = 0
    begin = time.monotonic()
    for fd, connection in by_fd.items():
        poll.register(fd, select.EPOLLIN)
        connection.left = size
        connection.sock.sendall(REQUEST)
    while by_fd:
        running = time.monotonic() - begin < seconds
        for fd, _ in poll.poll(5.0):
            connection = by_fd[fd]
            data = connection.sock.recv(65536)
            connection.left -= len(data)
            if not data or connection.left < 0:
                failed += 1
            elif connection.left:
                continue
            else:
                requests += 1
                if running:
                    connection.left = size
                    connection.sock.sendall(REQUEST)
                    continue
            poll.unregister(fd)
            del by_fd[fd]
        if not running and time.monotonic() - begin > seconds + 10:
            failed += len(by_fd)
            break
    print(json.dumps({"requests": requests, "failed": failed, "seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
