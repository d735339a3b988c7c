"""Connections that stay: each makes one request, reads the answer and is idle until the program is told to end.

Usage: ``python -m bench._idle HOST PORT COUNT READY [CERTIFICATE KEY CA ALPN]``; writes the file READY when all are
there.
"""

from __future__ import annotations

import resource
import signal
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench._client import length_of_answer

AT_ONCE = 4
"""So that client and proxy do not wait for each other: a handshake is work for both."""


def main() -> None:
    host, port, count, ready, *tls = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = make_context(*tls) if tls else None

    def connect(_number: int) -> socket.socket:
        sock = socket.create_connection((host, int(port)), 20)
        # Else the request waits for the other end to acknowledge the handshake's last flight, 40 ms of a delayed ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            sock = context.wrap_socket(sock, server_hostname="web")
        length_of_answer(sock)
        return sock

    with ThreadPoolExecutor(AT_ONCE) as threads:
        held = list(threads.map(connect, range(int(count))))
    Path(ready).write_text(f"{len(held)}\n")
    signal.pause()


def make_context(certificate: str, key: str, ca: str, alpn: str) -> ssl.SSLContext:
    """The certificate of the other end is not judged here: who is who is not the question."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(ca)
    context.check_hostname = False
    context.set_alpn_protocols([alpn])
    return context


if __name__ == "__main__":
    main()
