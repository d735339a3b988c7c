"""What the eBPF hooks and Python share, and what becomes of wishes before the kernel sees them."""

from __future__ import annotations

import ctypes
import ipaddress
import struct
import subprocess
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirect import RedirectError, Scope
from redirect.bpf import Balanced, Target, Workload, layout
from redirect.bpf.balance import alias_table, endpoint_rows, service_row
from redirect.bpf.compiler import HEADERS, SOURCES
from redirect.bpf.layout import HERE, MAPS, STRUCTURES, Network, Value
from redirect.bpf.pins import types_of
from redirect.bpf.programs import HOOKS, helpers, linked, load, packed, unpacked
from redirect.bpf.workload import network_rows

BOTH = frozenset({4, 6})


def compiles(assertions: list[str]) -> bool:
    macros = [f"-D{name}={value}" for name, value in layout.macros().items()]
    where = ["-nostdinc", "-include", HEADERS / "include/linux/types.h", "-include", SOURCES[0]]
    done = subprocess.run(
        ["gcc", "-fsyntax-only", "-Werror", *macros, *where, "-x", "c", "-"],
        input="\n".join(f'_Static_assert({one}, "");' for one in assertions),
        text=True, capture_output=True,
    )  # fmt: skip
    return done.returncode == 0


def test_structures_are_the_same_in_c() -> None:
    assertions = []
    for name, structure in STRUCTURES.items():
        assertions.append(f"sizeof(struct {name}) == {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            found = getattr(structure, field)
            assertions.append(f"__builtin_offsetof(struct {name}, {field}) == {found.offset}")
            assertions.append(f"sizeof(((struct {name} *)0)->{field}) == {found.size}")
    assert compiles(assertions)
    assert not compiles([*assertions, "sizeof(struct workload) == 1"])
    # None is left out.
    assert {line.split()[1] for line in SOURCES[0].read_text().splitlines() if line.startswith("struct ")} == set(
        STRUCTURES
    )


def test_maps_fit_their_names_and_each_other() -> None:
    assert all(len(f"np_{made.name}") < 16 for made in MAPS)
    assert all(len(f"np_{hook.name}") < 16 for hook in HOOKS)
    assert len({made.name for made in MAPS}) == len(MAPS)


def load_64(source: int, low: int, high: int = 0) -> bytes:
    return struct.pack("=BBhi", 0x18, source << 4, 0, low) + struct.pack("=BBhi", 0, 0, 0, high)


def test_instructions_are_linked() -> None:
    low, high = struct.unpack("=ii", struct.pack("=Q", HERE))
    call = struct.pack("=BBhi", 0x85, 0, 0, 1)
    code = load_64(1, 2) + call + load_64(0, low, high) + load_64(0, low, 0) + load_64(1, 0)
    maps = {made.name: 100 + index for index, made in enumerate(MAPS)}
    cookie = 0x1_0000_0002
    assert linked(code, maps, cookie) == (
        load_64(1, 102) + call + load_64(0, 2, 1) + load_64(0, low, 0) + load_64(1, 100)
    )
    assert helpers(code) == {1}


def test_a_call_that_nobody_asked_for_is_refused() -> None:
    """bpf_probe_read, which bcc writes where it takes a pointer for one of a traced program."""
    with pytest.raises(RedirectError, match="113"):
        load(HOOKS[0], struct.pack("=BBhi", 0x85, 0, 0, 113), {})


def test_the_image_is_read_back() -> None:
    codes = {hook.name: bytes(range(16)) for hook in HOOKS}
    version, kept = unpacked(packed("v1", codes))
    assert version == "v1"
    assert kept == {"sk_lookup": bytes(range(16))}
    assert unpacked(bytes(ctypes.sizeof(layout.Image))) == ("", {})
    garbage = bytes(layout.Image(4, b"[1]\xff"))
    assert unpacked(garbage) == ("", {})
    with pytest.raises(RedirectError):
        packed("v1", dict.fromkeys(codes, bytes(layout.IMAGE_BYTES)))


def test_types_have_a_whole_header() -> None:
    blob = types_of(20)
    magic, version, flags, header, type_at, type_size, string_at, string_size = struct.unpack_from("=HBBIIIII", blob)
    assert (magic, version, flags, header, type_at) == (0xEB9F, 1, 0, 24, 0)
    assert string_at == type_size
    assert len(blob) == header + type_size + string_size


# --- networks


def answers(networks: dict[tuple[int, bytes], int], address: str) -> Network:
    """What the trie says: the longest prefix."""
    wanted = int(ipaddress.IPv6Address(bytes(layout.address(address))))
    best, bits = -1, 0
    for (length, octets), found in networks.items():
        if length > best and (wanted ^ int.from_bytes(octets)) >> (128 - length) == 0:
            best, bits = length, found
    return Network(bits)


def test_a_longer_prefix_has_what_the_shorter_ones_have() -> None:
    wanted = Workload(
        BOTH,
        own_addresses=("10.0.0.1", "fd00::1"),
        vip_cidrs=("10.0.0.0/30",),
        scope=Scope(out_exclude_cidrs=("0.0.0.0/0", "fd00::/16"), in_exclude_cidrs=("10.0.0.0/8", "::/0")),
    )
    networks = wanted.networks()
    assert answers(networks, "10.0.0.1") == Network.OWN | Network.VIP | Network.OUT_EXCLUDE | Network.IN_EXCLUDE
    assert answers(networks, "10.0.0.2") == Network.VIP | Network.OUT_EXCLUDE | Network.IN_EXCLUDE
    assert answers(networks, "10.1.0.1") == Network.OUT_EXCLUDE | Network.IN_EXCLUDE
    assert answers(networks, "11.0.0.1") & Network.OUT_EXCLUDE
    assert answers(networks, "fd00::1") == Network.OWN | Network.OUT_EXCLUDE | Network.IN_EXCLUDE
    assert answers(networks, "2001:db8::1") == Network.IN_EXCLUDE
    assert len(network_rows(networks, 7)) == len(networks)


def test_networks_of_one_family_do_not_reach_the_other() -> None:
    """::/0 covers IPv4 in mapped form, and must not mean it."""
    wanted = Workload(BOTH, vip_cidrs=(), scope=Scope(out_exclude_cidrs=("::/0",)))
    assert answers(wanted.networks(), "2001:db8::1") == Network.OUT_EXCLUDE
    assert answers(wanted.networks(), "192.0.2.1") == Network(0)
    wanted = Workload(BOTH, vip_cidrs=(), scope=Scope(out_exclude_cidrs=("0.0.0.0/0",)))
    assert answers(wanted.networks(), "2001:db8::1") == Network(0)
    assert answers(wanted.networks(), "192.0.2.1") == Network.OUT_EXCLUDE


def test_values_are_of_their_lists() -> None:
    wanted = Workload(BOTH, scope=Scope(out_exclude_ports=(80,), in_include_ports=(80, 81), out_exclude_uids=(80,)))
    assert wanted.values() == {
        (Value.OUT_EXCLUDE_PORT, 80), (Value.IN_INCLUDE_PORT, 80), (Value.IN_INCLUDE_PORT, 81),
        (Value.OUT_EXCLUDE_UID, 80),
    }  # fmt: skip


# --- balancing


def shares(rows: list[tuple[int, int]]) -> list[Fraction]:
    found: Counter[int] = Counter()
    for index, (threshold, alias) in enumerate(rows):
        # A full row keeps the one number that is not below its threshold, too: its alias is itself.
        found[index] += threshold
        found[alias] += (1 << 32) - threshold
    return [Fraction(found[index], len(rows) << 32) for index in range(len(rows))]


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=40))
def test_alias_tables_have_the_shares_of_the_weights(weights: list[int]) -> None:
    for share, weight in zip(shares(alias_table(weights)), weights, strict=True):
        assert abs(share - Fraction(weight, sum(weights))) < Fraction(len(weights), 1 << 32)


def test_an_alias_table_of_equal_weights_needs_no_alias() -> None:
    assert alias_table([3, 3, 3]) == [((1 << 32) - 1, index) for index in range(3)]


def test_endpoints_without_weight_get_nothing() -> None:
    service = Balanced("240.240.0.1", 80, (Target("10.0.0.1", 8080, 0), Target("10.0.0.2", 8081, 5)), affinity=True)
    ((key, value),) = endpoint_rows(service, 9)
    assert (layout.EndpointKey.from_buffer_copy(key).set, layout.EndpointKey.from_buffer_copy(key).index) == (9, 0)
    found = layout.Endpoint.from_buffer_copy(value)
    assert layout.text_of(bytes(found.address)) == "10.0.0.2"
    row = layout.Service.from_buffer_copy(service_row(service, 9))
    assert (row.set, row.count, row.flags) == (9, 1, 1)
    empty = Balanced("240.240.0.1", 80, ())
    assert endpoint_rows(empty, 1) == []
    assert layout.Service.from_buffer_copy(service_row(empty, 1)).count == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ("240.240.0.1", 80, (Target("fd00::1", 80),)),
        ("vip", 80, ()),
        ("240.240.0.1", 0, ()),
        ("240.240.0.1", 80, (Target("10.0.0.1", 70000),)),
        ("240.240.0.1", 80, (Target("10.0.0.1", 80, -1),)),
    ],
)
def test_a_service_that_makes_no_sense_is_refused(wrong: tuple[str, int, tuple[Target, ...]]) -> None:
    with pytest.raises(RedirectError):
        Balanced(*wrong)
