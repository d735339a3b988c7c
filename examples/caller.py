"""A client without any knowledge of the mesh, for more calls than one would start a curl for.

``http URL``: GET over and over, each on a connection of its own, one line per call: status, first line of the body.
Ends after ``--calls`` of them, or at SIGTERM. ``tcp HOST PORT TEXT``: sends the text, prints what came back. Runs as a
script in a pod: standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import signal
import socket
import sys
import threading
import urllib.parse


def call(host: str, port: int, path: str) -> str:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", path, headers={"connection": "close"})
        response = connection.getresponse()
        return f"{response.status} {response.read().decode(errors='replace').partition(chr(10))[0]}"
    except (OSError, http.client.HTTPException) as exc:
        return f"failed {exc!r}"
    finally:
        connection.close()


def http_calls(url: str, calls: int, threads: int) -> None:
    parts = urllib.parse.urlsplit(url)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    numbers = itertools.count(1)

    def run() -> None:
        while not ended.is_set() and next(numbers) <= calls:
            # One write per line: lines of several threads must not mix.
            sys.stdout.write(call(parts.hostname or "", parts.port or 80, parts.path or "/") + "\n")
            sys.stdout.flush()

    runners = [threading.Thread(target=run) for _ in range(threads)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()


def tcp_call(host: str, port: int, text: str) -> str:
    answer = b""
    try:
        with socket.create_connection((host, port), timeout=10) as sock:
            sock.sendall(text.encode())
            with contextlib.suppress(OSError):  # reset already: receiving says so
                sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                answer += data
    except OSError as exc:
        return f"failed {exc!r}"
    return answer.decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("http")
    verb.add_argument("url")
    verb.add_argument("--calls", type=int, default=1)
    verb.add_argument("--threads", type=int, default=1)
    verb = verbs.add_parser("tcp")
    verb.add_argument("host")
    verb.add_argument("port", type=int)
    verb.add_argument("text")
    options = parser.parse_args()
    if options.verb == "http":
        http_calls(options.url, options.calls, options.threads)
    else:
        print(tcp_call(options.host, options.port, options.text))


if __name__ == "__main__":
    main()
