"""An HTTP/1 origin whose behaviour is chosen by the path.

Usage: ``origin.py PORT JOURNAL NAME [quiet]``. It listens on all addresses of its namespace and appends what it
saw to JOURNAL, one JSON object a line, always before it answers: ``open`` (a connection), ``request`` (a head),
``bad`` (octets that are none), ``gone`` (the client left while we were silent). `quiet` journals nothing.

A path whose first segment is in `BEHAVIOURS` does what it says there; any other is answered with JSON that tells
the request: server, connection number, method, target, headers, length and SHA-256 of the body, trailers.
"""

import hashlib
import itertools
import json
import os
import random
import socket
import sys
import threading

BLOCK = random.Random(7).randbytes(1_000_003)  # a prime: a repeated or lost piece of 2^n octets changes the checksum


class Gone(Exception):
    pass


class Request:
    def __init__(self, method, target, version, headers):
        self.method, self.target, self.version, self.headers = method, target, version, headers
        self.trailers = []

    def get(self, name):
        return next((value for key, value in self.headers if key.lower() == name), None)


class Connection:
    def __init__(self, server, sock, number):
        self.server, self.sock, self.number = server, sock, number
        self.file = sock.makefile("rb")
        self.open = True

    def journal(self, event, **fields):
        self.server.journal(event, connection=self.number, **fields)

    def run(self):
        try:
            while self.open:
                request = self.read_head()
                if request is None:
                    return
                self.journal("request", method=request.method, target=request.target, headers=request.headers)
                path = request.target.partition("?")[0].split("/")
                BEHAVIOURS.get(path[1] if len(path) > 1 else "", echo)(self, request, path[2:])
        except (OSError, Gone):
            pass
        finally:
            self.file.close()
            self.sock.close()

    # -- reading

    def read_head(self):
        line = self.file.readline(100_000)
        if not line:
            return None
        parts = line.decode("latin-1").split()
        if len(parts) != 3 or not parts[2].startswith("HTTP/"):
            self.journal("bad", octets=line[:200].decode("latin-1"))
            return None
        request = Request(*parts, self.read_fields())
        if (request.get("connection") or "").lower() == "close" or request.version == "HTTP/1.0":
            self.open = False
        return request

    def read_fields(self):
        fields = []
        while True:
            line = self.file.readline(100_000)
            if not line:
                raise Gone
            if line == b"\r\n":
                return fields
            name, _, value = line.decode("latin-1").partition(":")
            fields.append((name, value.strip()))

    def read_body(self, request):
        """Chunks of octets; fills in the trailers. Says 100 first if it is waited for."""
        if (request.get("expect") or "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.get("transfer-encoding"):
            while size := int(self.file.readline(1000).split(b";")[0], 16):
                yield self.read_exactly(size)
                self.file.readline(10)
            request.trailers = self.read_fields()
        else:
            left = int(request.get("content-length") or 0)
            while left:
                data = self.read_exactly(min(left, 65536))
                left -= len(data)
                yield data

    def read_exactly(self, size):
        data = self.file.read(size)
        if len(data) < size:
            raise Gone
        return data

    # -- writing

    def write(self, data):
        self.sock.sendall(data)

    def head(self, status, *fields, version="1.1"):
        self.write("".join([f"HTTP/{version} {status} Fine\r\n", *(f"{f}\r\n" for f in fields), "\r\n"]).encode())

    def answer(self, request, body, *fields, status=200):
        self.head(status, f"content-length: {len(body)}", f"x-server: {self.server.name}", *fields)
        if request.method != "HEAD":
            self.write(body)

    def end(self):
        """Close so that the other end reads everything we said."""
        self.open = False
        self.sock.shutdown(socket.SHUT_WR)
        while self.sock.recv(1 << 20):
            pass


def read_all(connection, request):
    digest, length = hashlib.sha256(), 0
    for data in connection.read_body(request):
        digest.update(data)
        length += len(data)
    return digest.hexdigest(), length


def echo(connection, request, _path):
    digest, length = read_all(connection, request)
    told = {
        "server": connection.server.name,
        "connection": connection.number,
        "method": request.method,
        "target": request.target,
        "version": request.version,
        "headers": request.headers,
        "length": length,
        "sha256": digest,
        "trailers": request.trailers,
    }
    connection.answer(request, json.dumps(told).encode(), "content-type: application/json")


def status(connection, request, path):
    """/status/204, /status/304: no body, and for 304 the length that a 200 would have had."""
    read_all(connection, request)
    connection.head(int(path[0]), *(["content-length: 5"] if path[0] == "304" else []), "x-kept: yes")


def octets(connection, request, path):
    """/octets/N and /octets/N/chunked: N octets of the pattern."""
    read_all(connection, request)
    left = int(path[0])
    chunked = path[1:] == ["chunked"]
    connection.head(200, "transfer-encoding: chunked" if chunked else f"content-length: {left}")
    at = 0
    while left:
        data = BLOCK[at : at + min(left, 65536)]
        at = (at + len(data)) % len(BLOCK)
        left -= len(data)
        connection.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
    if chunked:
        connection.write(b"0\r\n\r\n")


def chunked(connection, request, _path):
    """Three chunks and a trailer."""
    read_all(connection, request)
    connection.head(200, "transfer-encoding: chunked", "trailer: x-sum")
    if request.method != "HEAD":
        connection.write(b"5\r\nhello\r\n1;ext=1\r\n \r\n5\r\nworld\r\n0\r\nx-sum: 11\r\n\r\n")


def hop(connection, request, _path):
    """An answer with fields that are for the next hop only, and one that only the proxy may set."""
    fields = ("connection: x-private, keep-alive", "x-private: 1", "keep-alive: timeout=5", "upgrade: h2c")
    fields += ("proxy-connection: keep-alive", "x-netproxy-reason: forged", "x-kept: yes")
    connection.answer(request, b"hop", *fields)


def close(connection, request, _path):
    read_all(connection, request)
    connection.answer(request, b"last", "connection: close")
    connection.end()


def http10(connection, request, path):
    """/http10: with a length; /http10/until-close: without."""
    read_all(connection, request)
    connection.head(200, *([] if path else ["content-length: 300000"]), version="1.0")
    connection.write(b"0123456789" * 30_000)
    connection.end()


def torn(connection, request, path):
    """/torn, /torn/chunked: the body ends too soon. /torn/reset: with a reset."""
    read_all(connection, request)
    connection.head(200, "transfer-encoding: chunked" if path == ["chunked"] else "content-length: 100000")
    connection.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n" if path == ["chunked"] else b"x" * 1000)
    if path == ["reset"]:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.open = False
    else:
        connection.end()


MALFORMED = {
    "status": b"HTTP/1.1 abc Fine\r\n\r\n",
    "garbage": b"\x00\x01\x02 nonsense\r\n\r\n",
    "lengths": b"HTTP/1.1 200 Fine\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "both": b"HTTP/1.1 200 Fine\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare-lf": b"HTTP/1.1 200 Fine\ncontent-length: 0\n\n",
    "name": b"HTTP/1.1 200 Fine\r\nbad name: 1\r\ncontent-length: 0\r\n\r\n",
    "huge": b"HTTP/1.1 200 Fine\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
}


def malformed(connection, request, path):
    read_all(connection, request)
    connection.write(MALFORMED[path[0]])
    connection.end()


def silent(connection, request, _path):
    """Closes without a word."""
    read_all(connection, request)
    connection.end()


def hang(connection, request, _path):
    """Never answers; journals ``gone`` when the client leaves."""
    read_all(connection, request)
    connection.open = False
    try:
        connection.sock.recv(1)
    finally:
        connection.journal("gone")


def early(connection, request, _path):
    """Answers before it has read any of the body, and reads no more."""
    connection.answer(request, b"too large", "connection: close", status=413)
    connection.end()


BEHAVIOURS = {
    function.__name__: function
    for function in (status, octets, chunked, hop, close, http10, torn, malformed, silent, hang, early)
}


class Server:
    def __init__(self, port, journal, name, quiet):
        self.name, self.quiet = name, quiet
        self.file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.sock = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)

    def journal(self, event, **fields):
        if not self.quiet:
            os.write(self.file, json.dumps({"event": event, **fields}).encode() + b"\n")

    def run(self):
        for number in itertools.count():
            sock, address = self.sock.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, sock, number)
            connection.journal("open", client=address[0])
            threading.Thread(target=connection.run, daemon=True).start()


if __name__ == "__main__":
    Server(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:] == ["quiet"]).run()
