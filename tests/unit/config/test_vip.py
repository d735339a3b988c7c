from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from netproxy.addr import ServiceKey
from netproxy.config.vip import assign_vips

NETWORKS = ("240.240.0.0/16", "fd00:240::/32")
TINY = ("10.0.0.0/28", "fd00::/124")
keys = st.sets(st.integers(0, 30).map(lambda n: ServiceKey(f"ns/svc-{n}")), max_size=20)


def test_the_address_of_a_name_never_changes() -> None:
    # Written down: another value here moves every Service of every user.
    assert assign_vips([ServiceKey("shop/reviews")], {}, NETWORKS) == {
        "shop/reviews": ("240.240.222.78", "fd00:240:a1e2:8492:5ffb:4bc8:dc62:3652")
    }


@given(keys, keys, st.sets(st.sampled_from([f"10.0.0.{n}" for n in range(16)]), max_size=5))
def test_assignments_are_unique_stable_and_inside(
    old: set[ServiceKey], new: set[ServiceKey], reserved: set[str]
) -> None:
    before = assign_vips(old, {}, TINY, reserved)
    after = assign_vips(new, before, TINY, reserved)
    assert assign_vips(sorted(old, reverse=True), {}, TINY, reserved) == before
    assert assign_vips(new, after, TINY, reserved) == after
    assert set(after) == new
    flat = [vip for vips in after.values() for vip in vips]
    assert len(flat) == len(set(flat))
    assert not set(flat) & reserved
    for vip in flat:
        ip = ipaddress.ip_address(vip)
        network = ipaddress.ip_network(TINY[ip.version == 6])
        assert ip in network
        assert ip not in (network.network_address, network.broadcast_address)
    for key in old & new:
        assert set(before[key]) <= set(after[key])
    if len(new | old) <= 14 - len(reserved):
        assert all(len(vips) == 2 for vips in after.values())


def test_unusable_assignments_are_replaced() -> None:
    a, b = ServiceKey("ns/a"), ServiceKey("ns/b")
    fresh = assign_vips([a, b], {}, NETWORKS)
    for useless in ("192.0.2.1", "240.240.0.0", "240.240.255.255", "rubbish"):
        assert assign_vips([a], {a: (useless,)}, NETWORKS) == {a: fresh[a]}
    shared = assign_vips([a, b], {a: ("240.240.9.9",), b: ("240.240.9.9",)}, NETWORKS)
    assert shared == {a: ("240.240.9.9", fresh[a][1]), b: fresh[b]}
    assert assign_vips([a], {a: ("240.240.9.9",)}, NETWORKS, ["240.240.9.9"]) == {a: fresh[a]}


def test_a_full_network() -> None:
    found = assign_vips([ServiceKey(f"ns/{n}") for n in range(20)], {}, ["10.0.0.0/28", "fd00::/64"])
    assert sorted(len(vips) for vips in found.values()) == [1] * 6 + [2] * 14
