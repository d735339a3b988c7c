"""A raw TCP server that sends back what it gets, on all addresses: ``echo.py PORT``. Standard library only."""

from __future__ import annotations

import socket
import socketserver
import sys


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6  # takes IPv4 too: net.ipv6.bindv6only is 0 in a new namespace
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    with Server(("::", int(sys.argv[1])), Echo) as server:
        server.serve_forever()
