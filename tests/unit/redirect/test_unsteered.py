"""Which of a namespace's connections bypass the proxy."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from redirect import Scope, Steering
from redirect.unsteered import MAX_SOCKETS, SHOWN, Connection, _parse, _Socket, judge
from redirect.wanted import Ports

POD, PROXY = ip_address("10.0.0.2"), ip_address("127.0.0.1")
DESIRED = Steering("node-a", frozenset({4}), ports=Ports(dns=15053))
ESTABLISHED, LISTEN = 1, 10


def sock(local: Any, port: int, peer: Any, peer_port: int, *, uid: int = 7, mark: int = 0, state: int = 1) -> _Socket:
    return _Socket(state, ip_address(str(local)), port, ip_address(str(peer)), peer_port, uid, mark)


OLD = sock(POD, 5000, "10.0.0.9", 80)
SERVED = sock(POD, 8080, "10.0.0.9", 6000)
LISTENING = sock("0.0.0.0", 8080, "0.0.0.0", 0, state=LISTEN)


def test_old_ones_are_told() -> None:
    assert judge([OLD, SERVED, LISTENING], DESIRED).shown == (
        Connection("10.0.0.2:5000", "10.0.0.9:80"),
        Connection("10.0.0.2:8080", "10.0.0.9:6000"),
    )


@pytest.mark.parametrize(
    "found",
    [
        [OLD, sock(PROXY, 15001, POD, 5000, mark=0x539)],
        [OLD, sock(PROXY, 15053, POD, 5000, mark=0x539)],
        [OLD._replace(mark=0xA0539)],
        [sock(PROXY, 5000, PROXY, 80)],
        [sock(POD, 8080, POD, 6000), LISTENING],  # dialled by the proxy
        [sock("fe80::1", 5000, "fe80::2", 80)],
        [sock("fd00::1", 5000, "fd00::2", 80)],  # a family that is not steered
        [LISTENING],
    ],
)
def test_these_do_not_bypass(found: list[_Socket]) -> None:
    assert judge(found, DESIRED).count == 0


@pytest.mark.parametrize(
    ("scope", "count"),
    [
        ({"out_exclude_ports": (80,)}, 1),
        ({"out_exclude_cidrs": ("10.0.0.0/8",)}, 1),
        ({"out_exclude_uids": (7,)}, 1),
        ({"out_include_ports": (443,)}, 1),
        ({"out_include_ports": (80,)}, 2),
        ({"out_include_cidrs": ("192.168.0.0/16",)}, 1),
        ({"out_include_cidrs": ("10.0.0.0/8",)}, 2),
        ({"in_exclude_ports": (8080,)}, 1),
        ({"in_include_ports": (9090,)}, 1),
        ({"in_exclude_cidrs": ("10.0.0.9/32",)}, 1),
        ({"out_exclude_cidrs": ("10.0.0.0/8",), "in_exclude_ports": (8080,)}, 0),
    ],
)
def test_what_is_excluded_is_left_out(scope: dict[str, Any], count: int) -> None:
    assert judge([OLD, SERVED, LISTENING], replace(DESIRED, scope=Scope(**scope))).count == count


def test_only_the_first_are_shown() -> None:
    found = judge([OLD._replace(port=port) for port in range(5000, 5100)], DESIRED)
    assert (found.count, len(found.shown), found.complete) == (100, SHOWN, True)
    assert not judge([LISTENING] * MAX_SOCKETS, DESIRED).complete


@pytest.mark.parametrize(
    ("family", "local", "shown"),
    [
        (socket.AF_INET, socket.inet_aton("10.0.0.2") + bytes(12), "10.0.0.2"),
        (socket.AF_INET6, socket.inet_pton(socket.AF_INET6, "fd00::2"), "fd00::2"),
        (socket.AF_INET6, socket.inet_pton(socket.AF_INET6, "::ffff:10.0.0.2"), "10.0.0.2"),
    ],
)
def test_messages_of_the_kernel(family: int, local: bytes, shown: str) -> None:
    ids = struct.pack("!HH", 5000, 80) + local + local + bytes(12)
    message = struct.pack("=BBBB", family, ESTABLISHED, 0, 0) + ids + struct.pack("=IIIII", 0, 0, 0, 1000, 4)
    more = struct.pack("=HHI", 5, 8, 1) + struct.pack("=HHI", 8, 15, 0x539)
    assert _parse(message + more) == sock(shown, 5000, shown, 80, uid=1000, mark=0x539)
    assert _parse(message).mark == 0
