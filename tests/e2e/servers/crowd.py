"""Slow clients, and good ones beside them, in one process.

Usage: ``crowd.py HOST PORT SECONDS SLOW RATE OUT``. Of SLOW clients a third sends a head, a third a body, both by one
octet a second; a third asks for much and reads nothing of it. Who is turned away comes again. RATE requests a second
go out on 20 connections that are kept. OUT gets a line of JSON when all slow clients are in their place, and one
with the counts at the end. The SECONDS begin with the first of these lines.
"""

import asyncio
import json
import socket
import sys
import time

HOST, PORT, SECONDS, SLOW, RATE, OUT = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
KEPT = 20
PATIENCE_S = 20.0
HEAD = b"GET /slow HTTP/1.1\r\nHost: web\r\nX-Padding: " + b"x" * 1000 + b"\r\n\r\n"
POST = b"POST /slow HTTP/1.1\r\nHost: web\r\nContent-Length: 100000\r\n\r\n"
BIG = b"GET /big HTTP/1.1\r\nHost: web\r\n\r\n"
GOOD = b"GET /good HTTP/1.1\r\nHost: web\r\n\r\n"

counts = {"good": 0, "failed": 0, "turned_away": {}, "slow_octets": 0, "failures": []}
latencies = []
in_place = set()


def turned_away(kind, how):
    counts["turned_away"][f"{kind}: {how}"] = counts["turned_away"].get(f"{kind}: {how}", 0) + 1


async def trickle(number, kind, first, rest):
    """Sends `first` at once and `rest` by the octet, until the other end has enough of it."""
    while True:
        try:
            reader, writer = await asyncio.open_connection(HOST, PORT)
            writer.write(first)
            said = asyncio.ensure_future(reader.read(12))
            for octet in rest:
                writer.write(bytes((octet,)))
                counts["slow_octets"] += 1
                in_place.add(number)
                await asyncio.wait([said], timeout=1.0)
                if said.done():
                    break
            turned_away(kind, (await said).decode("latin-1"))
            writer.close()
        except OSError as exc:
            turned_away(kind, repr(exc))
        await asyncio.sleep(0.5)


async def never_read(number):
    loop = asyncio.get_running_loop()
    while True:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, (HOST, PORT))
            await loop.sock_sendall(sock, BIG)
            await loop.sock_recv(sock, 100)
            in_place.add(number)
            await asyncio.sleep(1e6)
        except OSError as exc:
            turned_away("reader", repr(exc))
            await asyncio.sleep(0.5)
        finally:
            sock.close()


async def ask(reader, writer):
    writer.write(GOOD)
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(2)
    if not head.startswith(b"HTTP/1.1 200 ") or body != b"ok":
        raise ValueError(head[:200])


async def good(until):
    """One kept connection that asks at its times, late ones as soon as it can."""
    reader, writer = await asyncio.open_connection(HOST, PORT)
    due = time.monotonic()
    while due < until():
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        began = time.monotonic()
        try:
            await asyncio.wait_for(ask(reader, writer), PATIENCE_S)
            counts["good"] += 1
            latencies.append(time.monotonic() - began)
        except (OSError, ValueError, EOFError, TimeoutError) as exc:
            counts["failed"] += 1
            counts["failures"] = [*counts["failures"], repr(exc)][:5]
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, PORT)
        due += KEPT / RATE
    writer.close()


async def main():
    third = SLOW // 3
    tasks = [asyncio.ensure_future(trickle(number, "head", b"", HEAD)) for number in range(third)]
    tasks += [asyncio.ensure_future(trickle(third + number, "body", POST, bytes(100000))) for number in range(third)]
    tasks += [asyncio.ensure_future(never_read(2 * third + number)) for number in range(third)]
    ends = [float("inf")]
    kept = [asyncio.ensure_future(good(lambda: ends[0])) for _ in range(KEPT)]
    with open(OUT, "w", buffering=1) as out:
        while len(in_place) < 3 * third:
            await asyncio.sleep(0.1)
        ends[0] = time.monotonic() + SECONDS
        before = counts["good"]
        latencies.clear()
        out.write(json.dumps({"event": "in place"}) + "\n")
        await asyncio.gather(*kept)
        latencies.sort()
        counts["rate"] = (counts["good"] - before) / SECONDS
        counts["p50_ms"], counts["p99_ms"] = (
            round(1e3 * latencies[int(len(latencies) * share)], 1) for share in (0.5, 0.99)
        )
        out.write(json.dumps({"event": "done", **counts}) + "\n")
    for task in tasks:
        task.cancel()


asyncio.run(main())
