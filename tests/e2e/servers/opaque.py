"""A TCP server that speaks no protocol anybody could recognize.

Usage: ``opaque.py PORT JOURNAL MODE [ADDRESS]``. Appends to JOURNAL, one JSON object a line: ``open`` with the
client's address, and ``end`` with what was received: length, SHA-256, and how it ended (``eof`` or ``reset``).

Modes: ``echo`` sends back what comes. ``greet`` speaks first, then echoes. ``digest`` reads to the end of the stream,
then answers length and SHA-256. ``parting`` says goodbye and ends its stream at once, and reads on.
``both N`` sends N octets of the pattern while it reads to the end, then length and SHA-256 of what it read.
"""

import hashlib
import json
import os
import random
import socket
import sys
import threading

BLOCK = random.Random(7).randbytes(1_000_003)
GREETING = b"220 opaque at your service\r\n"


def send_pattern(sock, size):
    while size:
        data = BLOCK[:size]
        sock.sendall(data)
        size -= len(data)


def serve(sock, address, mode, size, journal):
    journal("open", client=address[0])
    digest, length, how = hashlib.sha256(), 0, "eof"
    try:
        sender = None
        if mode == "greet":
            sock.sendall(GREETING)
        elif mode == "parting":
            sock.sendall(b"goodbye\r\n")
            sock.shutdown(socket.SHUT_WR)
        elif mode == "both":
            sender = threading.Thread(target=send_pattern, args=(sock, size))
            sender.start()
        while data := sock.recv(1 << 18):
            digest.update(data)
            length += len(data)
            if mode in ("echo", "greet"):
                sock.sendall(data)
        if sender is not None:
            sender.join()
        if mode in ("digest", "both"):
            sock.sendall(f"{length} {digest.hexdigest()}\n".encode())
    except OSError:
        how = "reset"
    journal("end", length=length, sha256=digest.hexdigest(), how=how)
    sock.close()


def main(port, path, mode, size="0", address="::"):
    if not size.isdigit():
        size, address = "0", size
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def journal(event, **fields):
        os.write(file, json.dumps({"event": event, **fields}).encode() + b"\n")

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, int(port)), family=family, dualstack_ipv6=address == "::", backlog=256)
    while True:
        sock, client = server.accept()
        threading.Thread(target=serve, args=(sock, client, mode, int(size), journal), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
