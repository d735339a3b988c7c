from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.addr import ClientAddr, EndpointAddr, OriginalDst, canonical_ip, join_host_port, spiffe_id


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("FD00:0::AB", "fd00::ab"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:a00:1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::10.0.0.1", "::a00:1"),
    ],
)
def test_canonical_ip(text: str, canonical: str) -> None:
    assert canonical_ip(text) == canonical


@pytest.mark.parametrize("text", ["", "web", "10.0.0", "10.0.0.1:80", "[::1]", "010.0.0.1", "10.0.0.256", "1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        canonical_ip(text)


@given(st.ip_addresses())
def test_canonical_is_stable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    once = canonical_ip(address.exploded)
    assert canonical_ip(once) == once == canonical_ip(str(address))


@pytest.mark.parametrize("kind", [ClientAddr, OriginalDst, EndpointAddr])
def test_text(kind: type[ClientAddr] | type[OriginalDst] | type[EndpointAddr]) -> None:
    assert str(kind("10.0.0.1", 80)) == "10.0.0.1:80"
    assert str(kind("fd00::1", 80)) == "[fd00::1]:80" == join_host_port("fd00::1", 80)


def test_spiffe_id() -> None:
    assert spiffe_id("cluster.local", "shop", "web") == "spiffe://cluster.local/ns/shop/sa/web"
