"""What passes a network interface, written down: ``wiretap.py INTERFACE FILE`` until SIGTERM, then a pcap file.

It says "capturing" when it does, and what arrived before SIGTERM is in the file. Runs as a script in a node: standard
library only. Reading the file needs scapy.
"""

from __future__ import annotations

import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

_ETH_P_ALL = 3
_LONGEST = 256 * 1024  # a veth passes on what segmentation offload left in one piece
_TLS_HEADER = 5
_TLS_LONGEST = 2**14 + 256  # RFC 8446 section 5.2
_TLS_TYPES = {20: "change_cipher_spec", 21: "alert", 22: "handshake", 23: "application_data"}


class Flow(NamedTuple):
    """One direction of a TCP connection."""

    src: str
    sport: int
    dst: str
    dport: int

    def __str__(self) -> str:
        return f"{self.src}:{self.sport} -> {self.dst}:{self.dport}"


def capture(interface: str, file: Path) -> None:
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 16 * 1024 * 1024)  # SO_RCVBUFFORCE, which socket has no name for
        sock.bind((interface, 0))
        sock.setblocking(False)
        print("capturing", flush=True)
        frames: list[tuple[float, bytes]] = []
        while True:
            was_ended = ended
            try:
                while True:
                    frames.append((time.time(), sock.recv(_LONGEST)))
            except BlockingIOError:
                pass
            if was_ended:
                break
            select.select([sock], [], [], 0.1)
    with open(file, "wb") as out:
        out.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LONGEST, 1))
        for at, frame in frames:
            out.write(struct.pack("=IIII", int(at), int(at % 1 * 1e6), len(frame), len(frame)) + frame)


def streams(file: Path) -> dict[Flow, bytes]:
    """The payload of every TCP connection in the file, each direction in order, without what was sent twice.

    Raises ValueError when there is a hole in one.
    """
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.utils import rdpcap

    segments: dict[Flow, dict[int, bytes]] = {}
    packet: Any
    for packet in rdpcap(str(file)):
        network = packet.getlayer(IP) or packet.getlayer(IPv6)
        if network is None or TCP not in packet:
            continue
        tcp = packet[TCP]
        # Not scapy's payload: that has the padding of short frames in it.
        size = (network.len - network.ihl * 4 if IP in packet else network.plen) - tcp.dataofs * 4
        payload = bytes(tcp.payload)[:size]
        if payload:
            pieces = segments.setdefault(Flow(network.src, tcp.sport, network.dst, tcp.dport), {})
            if len(payload) > len(pieces.get(tcp.seq, b"")):
                pieces[tcp.seq] = payload
    return {flow: _in_order(flow, pieces) for flow, pieces in segments.items()}


def _in_order(flow: Flow, pieces: dict[int, bytes]) -> bytes:
    first = next(iter(pieces))
    # Relative to the first seen, so that sequence numbers may wrap; what is behind it is negative.
    relative = {(seq - first + 2**31) % 2**32 - 2**31: data for seq, data in pieces.items()}
    begin = at = min(relative)
    stream = bytearray()
    for offset in sorted(relative):
        if offset > at:
            raise ValueError(f"{flow}: {offset - at} octets are missing at {at - begin}")
        new = relative[offset][at - offset :]
        stream += new
        at += len(new)
    return bytes(stream)


def tls_records(stream: bytes) -> dict[str, int] | None:
    """How many records of each type a stream consists of; None when it is not TLS records from end to end."""
    found: dict[str, int] = {}
    at = 0
    while at < len(stream):
        if len(stream) < at + _TLS_HEADER:
            return None
        kind, major, minor, length = struct.unpack_from("!BBBH", stream, at)
        if kind not in _TLS_TYPES or major != 3 or minor not in (1, 3) or not 0 < length <= _TLS_LONGEST:
            return None
        at += _TLS_HEADER + length
        if at > len(stream):
            return None
        found[_TLS_TYPES[kind]] = found.get(_TLS_TYPES[kind], 0) + 1
    return found


def hexdump(data: bytes, lines: int = 4) -> str:
    rows = []
    for at in range(0, min(len(data), lines * 16), 16):
        row = data[at : at + 16]
        text = "".join(chr(octet) if 32 <= octet < 127 else "." for octet in row)
        rows.append(f"{at:04x}  {row.hex(' '):<47}  {text}")
    return "\n".join(rows)


if __name__ == "__main__":
    capture(sys.argv[1], Path(sys.argv[2]))
