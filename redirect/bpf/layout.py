"""What lies in the maps, and every number that programs and Python share.

The structures are those of `src/types.h`; a test compares sizes and offsets. Constants are given to the compiler as
macros (`macros`), so they stand here only. `MAPS` is the order in which the programs name them.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import socket
from dataclasses import dataclass
from enum import IntEnum, IntFlag

PROXY_CGROUPS = 4
CGROUP_DEPTH = 8
"""Levels below the root at which a workload's cgroup is looked for; systemd's units are within five."""
MAX_WORKERS = 64
MAX_WORKLOADS = 4096
MAX_NETWORKS = 1 << 16
MAX_VALUES = 1 << 16
MAX_SERVICES = 1 << 16
MAX_ENDPOINTS = 1 << 18
MAX_FLOWS = 1 << 16
"""Steered connections whose proxy has not yet asked where to; the oldest go first. 64 bytes each, made at once."""
MAX_LEGS = 1 << 14
"""Connections of workloads whose first packet is under way."""
MAX_LISTENERS = 1 << 14
IMAGE_BYTES = 1 << 16
HERE = 0x6E657470726F7879
"""In the place of a network namespace's cookie until the program is loaded for one."""


class Kind(IntEnum):
    """What was done to a socket."""

    NONE = 0
    STEERED = 1
    BALANCED = 2
    QUERIED = 3
    """Not connected: a query was sent to the resolver in place of this nameserver, the latest one."""


class Flag(IntFlag):
    """Of a workload."""

    OUTBOUND = 1 << 0
    INBOUND = 1 << 1
    CLOSED = 1 << 2
    IPV4 = 1 << 3
    IPV6 = 1 << 4
    BALANCE = 1 << 5
    OUT_INCLUDE_NETWORKS = 1 << 6
    OUT_INCLUDE_PORTS = 1 << 7
    OUT_EXCLUDE_PORTS = 1 << 8
    OUT_EXCLUDE_UIDS = 1 << 9
    IN_INCLUDE_PORTS = 1 << 10
    IN_EXCLUDE_PORTS = 1 << 11


class Network(IntFlag):
    """What a network is to a workload."""

    OWN = 1 << 0
    VIP = 1 << 1
    OUT_INCLUDE = 1 << 2
    OUT_EXCLUDE = 1 << 3
    IN_EXCLUDE = 1 << 4


class Value(IntEnum):
    """Lists of single numbers."""

    OUT_INCLUDE_PORT = 0
    OUT_EXCLUDE_PORT = 1
    OUT_EXCLUDE_UID = 2
    IN_INCLUDE_PORT = 3
    IN_EXCLUDE_PORT = 4


class ServiceFlag(IntFlag):
    AFFINITY = 1 << 0


class Count(IntEnum):
    """What became of connections, one counter each. The names are labels of metrics, so they stay.

    Outbound (`connect()`): `direct_no_listener` and `refused_no_listener` are the failure policy at work. Inbound
    (first packets): `inbound_local` came from inside of the namespace. `queries`: of names over UDP that went to the
    proxy, where those over TCP are `steered`; connected sockets count once.
    """

    STEERED = 0
    BALANCED = 1
    REFUSED_NO_LISTENER = 2
    REFUSED_NO_ENDPOINT = 3
    DIRECT_NO_LISTENER = 4
    BYPASS_PROXY = 5
    BYPASS_LOCAL = 6
    BYPASS_LINK_LOCAL = 7
    BYPASS_EXCLUDED = 8
    BYPASS_NOT_INCLUDED = 9
    BYPASS_DEVICE = 10
    BYPASS_FAMILY = 11
    BYPASS_DISABLED = 12
    INBOUND_STEERED = 13
    INBOUND_DIRECT_NO_LISTENER = 14
    INBOUND_REFUSED = 15
    INBOUND_EXCLUDED = 16
    INBOUND_NOT_INCLUDED = 17
    INBOUND_LOCAL = 18
    INBOUND_FAMILY = 19
    INBOUND_DISABLED = 20
    QUERIES = 21


COUNTERS = 32
"""Room for more, so that a new counter does not change a structure."""

U16, U32, U64 = ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
Address = U32 * 4


class Destination(ctypes.Structure):
    _fields_ = [("address", Address), ("port", U16), ("kind", U16)]


class Config(ctypes.Structure):
    _fields_ = [
        ("host_netns", U64),
        ("proxy_cgroups", U64 * PROXY_CGROUPS),
        ("mark", U32),
        ("mask", U32),
        ("cgroups", U32),
        ("reserved", U32),
    ]


class Workload(ctypes.Structure):
    _fields_ = [
        ("netns", U64),
        ("id", U32),
        ("scope", U32),
        ("flags", U32),
        ("listen4", U32),
        ("listen6", Address),
        ("outbound_port", U16),
        ("dns_port", U16),
        ("workers", U16),
        ("reserved", U16),
    ]


class FlowKey(ctypes.Structure):
    _fields_ = [("netns", U64), ("address", Address), ("port", U16), ("reserved", U16 * 3)]


class NetworkKey(ctypes.Structure):
    _fields_ = [("prefixlen", U32), ("scope", U32), ("address", Address)]


class ValueKey(ctypes.Structure):
    _fields_ = [("scope", U32), ("list", U32), ("value", U32)]


class SlotKey(ctypes.Structure):
    _fields_ = [("id", U32), ("family", U16), ("worker", U16)]


class PortKey(ctypes.Structure):
    _fields_ = [("netns", U64), ("port", U32), ("reserved", U32)]


class ServiceKey(ctypes.Structure):
    _fields_ = [("address", Address), ("port", U16), ("reserved", U16)]


class Service(ctypes.Structure):
    _fields_ = [("set", U32), ("count", U32), ("flags", U32)]


class EndpointKey(ctypes.Structure):
    _fields_ = [("set", U32), ("index", U32)]


class Endpoint(ctypes.Structure):
    _fields_ = [("address", Address), ("port", U16), ("reserved", U16), ("threshold", U32), ("alias", U32)]


class Counters(ctypes.Structure):
    _fields_ = [("count", U64 * COUNTERS)]


class Image(ctypes.Structure):
    """What must be found again to load programs for further namespaces without a compiler: JSON, and its length."""

    _fields_ = [("length", U32), ("text", ctypes.c_char * (IMAGE_BYTES - 4))]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "destination": Destination,
    "config": Config,
    "workload": Workload,
    "flow_key": FlowKey,
    "network_key": NetworkKey,
    "value_key": ValueKey,
    "slot_key": SlotKey,
    "port_key": PortKey,
    "service_key": ServiceKey,
    "service": Service,
    "endpoint_key": EndpointKey,
    "endpoint": Endpoint,
    "counters": Counters,
}
"""By their names in C."""

# Types of maps, and the flag, by their numbers in linux/bpf.h.
HASH, ARRAY, PERCPU_HASH, LRU_HASH, LPM_TRIE, SOCKHASH, SK_STORAGE = 1, 2, 5, 9, 11, 18, 24
NO_PREALLOC = 1

_Shape = (
    type[ctypes.Structure] | type[ctypes.c_uint8] | type[ctypes.c_int32] | type[ctypes.c_uint32] | type[ctypes.c_uint64]
)


@dataclass(frozen=True, slots=True)
class Map:
    """How a map is made. Two with the same `fingerprint` hold the same."""

    name: str
    kind: int
    key: _Shape
    value: _Shape
    max_entries: int
    flags: int = 0

    @property
    def key_size(self) -> int:
        return ctypes.sizeof(self.key)

    @property
    def value_size(self) -> int:
        return ctypes.sizeof(self.value)


MAPS: tuple[Map, ...] = (
    Map("config", ARRAY, U32, Config, 1),
    Map("pods", HASH, U64, Workload, MAX_WORKLOADS, NO_PREALLOC),
    Map("cgroups", HASH, U64, Workload, MAX_WORKLOADS, NO_PREALLOC),
    Map("ports", HASH, PortKey, U64, MAX_LISTENERS, NO_PREALLOC),
    Map("networks", LPM_TRIE, NetworkKey, U32, MAX_NETWORKS, NO_PREALLOC),
    Map("values", HASH, ValueKey, ctypes.c_uint8, MAX_VALUES, NO_PREALLOC),
    Map("peers", SK_STORAGE, ctypes.c_int32, Destination, 0, NO_PREALLOC),
    Map("flows", LRU_HASH, FlowKey, Destination, MAX_FLOWS),
    Map("legs", LRU_HASH, FlowKey, ctypes.c_uint8, MAX_LEGS),
    Map("listeners", SOCKHASH, SlotKey, U32, MAX_LISTENERS),
    Map("services", HASH, ServiceKey, Service, MAX_SERVICES, NO_PREALLOC),
    Map("endpoints", HASH, EndpointKey, Endpoint, MAX_ENDPOINTS, NO_PREALLOC),
    Map("counters", PERCPU_HASH, U32, Counters, MAX_WORKLOADS, NO_PREALLOC),
    Map("image", ARRAY, U32, Image, 1),
)

LAYOUT = 1
"""To be raised when the meaning of something in a map changes and its size does not."""


def fingerprint() -> str:
    """Of the maps: what was pinned under another one can't be used."""
    text = [str(LAYOUT)]
    text += [f"{m.name} {m.kind} {m.key_size} {m.value_size} {m.max_entries} {m.flags}" for m in MAPS]
    for name, structure in STRUCTURES.items():
        text.extend(f"{name}.{field[0]} {getattr(structure, field[0]).offset}" for field in structure._fields_)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def macros() -> dict[str, int]:
    """What the C sources are compiled with."""
    given = {
        "PROXY_CGROUPS": PROXY_CGROUPS,
        "CGROUP_DEPTH": CGROUP_DEPTH,
        "MAX_WORKERS": MAX_WORKERS,
        "COUNTERS": COUNTERS,
    }
    for prefix, numbers in (
        ("KIND", Kind),
        ("FLAG", Flag),
        ("NETWORK", Network),
        ("VALUE", Value),
        ("SERVICE", ServiceFlag),
        ("COUNT", Count),
    ):
        given |= {f"{prefix}_{member.name}": int(member) for member in numbers}
    given |= {f"MAP_{made.name.upper()}": index for index, made in enumerate(MAPS)}
    return given


def address(text: str) -> ctypes.Array[ctypes.c_uint32]:
    """Sixteen octets in network order, those of IPv4 in mapped form. ValueError."""
    parsed = ipaddress.ip_address(text)
    octets = parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed
    return Address.from_buffer_copy(octets)


def text_of(octets: bytes) -> str:
    """The reverse."""
    parsed = ipaddress.IPv6Address(octets)
    return str(parsed.ipv4_mapped or parsed)


def net16(port: int) -> int:
    return socket.htons(port)
