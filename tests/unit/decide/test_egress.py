from __future__ import annotations

import dataclasses
import ipaddress
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netproxy.addr import ServiceKey
from netproxy.config.shard import Endpoint, ExternalHost, ExternalPort, ExternalShard, ServicePort, ServiceShard
from netproxy.decide.egress import Egress, Permission, host_name, host_of
from netproxy.decide.route import Tables
from netproxy.errors import Reason, Refused

TLS, HTTP, TCP = ExternalPort(443, "", "tls"), ExternalPort(80, "", "http"), ExternalPort(5432, "", "tcp")


def external(name: str, *hosts: ExternalHost | str, **fields: object) -> ExternalShard:
    made = tuple(host if isinstance(host, ExternalHost) else ExternalHost(host) for host in hosts)
    return ExternalShard("shop", name, made, **{"ports": (TLS, HTTP, TCP), **fields})  # type: ignore[arg-type]


def egress(*shards: ExternalShard) -> Egress:
    made = Egress()
    for shard in shards:
        made.put(shard)
    return made


def told(permission: Permission | None) -> tuple[str, str, str] | None:
    """How, by whom, what is dialled."""
    if permission is None:
        return None
    assert permission.external is not None
    return permission.how, permission.external.shard.name, permission.name


ANY, VIP = "203.0.113.9", "240.240.0.9"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", ""),
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("_dns.example", "_dns.example"),
        ("localhost", "localhost"),
        (".", None),
        ("example..com", None),
        (".example.com", None),
        ("example.com..", None),
        ("-a.example", None),
        ("b\u00fccher.example", None),
        ("\u212aeys.example", None),
        ("a b", None),
        ("a\0b", None),
        ("*.example.com", None),
        ("10.0.0.1", None),
        ("fd00::1", None),
        ("[fd00::1]", None),
        ("example.com:443", None),
        ("a" * 64 + ".example", None),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
        ("a." * 126 + "a", "a." * 126 + "a"),
        ("a." * 127 + "a", None),
        ("?", None),
    ],
)
def test_names(text: str, name: str | None) -> None:
    assert host_name(text) == name


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("a.example", "a.example"),
        ("A.example:8080", "a.example"),
        ("a.example.:80", "a.example"),
        ("a.example:", "a.example"),
        ("a.example:http", None),
        ("a.example:\xb2", None),
        ("a.example:80:80", None),
        ("10.0.0.1:80", None),
        ("[fd00::1]:80", None),
        ("", ""),
        ("a.example,b.example", None),
    ],
)
def test_names_in_host_fields(authority: str, name: str | None) -> None:
    assert host_of(authority) == name


def test_by_name_exact_before_wildcards_the_longest_first() -> None:
    made = egress(
        external("wild", "*.example.com"),
        external("deep", "*.b.example.com"),
        external("exact", "a.b.example.com", ports=(TLS,)),
    )

    def by(name: str, port: int = 443, protocol: str = "tls") -> str:
        found = made.by_name(name, port, protocol)
        if found is None:
            return ""
        assert found.name == name
        assert found.external is not None
        assert found.external.has(name)
        return found.external.shard.name

    assert by("a.b.example.com") == "exact"
    assert by("a.b.example.com", 80, "http") == "deep"
    assert by("x.b.example.com") == "deep"
    assert by("b.example.com") == "wild"
    assert by("x.y.z.example.com") == "wild"
    assert by("example.com") == by("xexample.com") == by("com") == by("other.example") == ""
    assert by("a.b.example.com", 444) == by("a.b.example.com", 443, "http") == by("a.b.example.com", 5432, "tcp") == ""
    assert made.by_name("", 443, "tls") is made.by_name(None, 443, "tls") is None


def test_tls_at_any_address() -> None:
    made = egress(external("one", "one.example"))
    assert told(made.tls((ANY, 443), "one.example")) == ("name", "one", "one.example")
    for name in ("two.example", "", None):
        assert made.tls((ANY, 443), name) is None
    assert made.tls((ANY, 80), "one.example") is None
    assert made.opaque((ANY, 5432)) is None


def test_at_the_vip_of_a_host() -> None:
    made = egress(external("one", ExternalHost("one.example", (VIP,))), external("two", "two.example"))
    assert made.is_vip(VIP)
    assert made.at_vip(VIP, 8080) is None
    assert told(made.opaque((VIP, 5432))) == ("vip", "one", "one.example")
    assert made.opaque((VIP, 443)) is None
    for ask, port in ((made.tls, 443), (made.http, 80)):
        assert told(ask((VIP, port), "one.example")) == told(ask((VIP, port), "")) == ("vip", "one", "one.example")
        # Another host that is allowed as well: to where that one is.
        assert told(ask((VIP, port), "two.example")) == ("name", "two", "two.example")
        assert ask((VIP, port), "three.example") is ask((VIP, port), None) is None
    assert made.http((VIP, 443), "one.example") is made.tls((VIP, 80), "one.example") is None


def test_networks_the_longest_prefix_first() -> None:
    made = egress(
        external("all", networks=("10.0.0.0/8", "fd00::/8")),
        external("half", networks=("10.1.0.0/16",), ports=(ExternalPort(443, "", "tcp"),)),
        external("named", "*.example", networks=("10.1.2.0/24",)),
        external("same", networks=("10.0.0.0/8",)),
    )

    def names(host: str, port: int = 443) -> list[str]:
        return [found.shard.name for found in made.at_address(host, port)]

    assert names("10.1.2.3") == ["named", "half", "all", "same"]
    assert names("10.1.3.3") == ["half", "all", "same"]
    assert names("10.1.2.3", 5432) == ["named", "all", "same"]
    assert names("fd00::1") == ["all"]
    assert names("fe80::1") == names("10.1.2.3", 1) == names("11.0.0.1") == []
    assert told(made.tls(("10.1.2.3", 443), "a.example")) == ("network", "named", "")
    assert told(made.tls(("10.1.2.3", 443), "other")) == ("network", "all", "")
    assert told(made.tls(("10.9.9.9", 443), None)) == ("network", "all", "")
    assert told(made.opaque(("10.1.2.3", 443))) == ("network", "half", "")
    assert made.opaque(("10.9.9.9", 443)) is None
    assert told(made.http(("10.1.2.3", 80), "a.example")) == ("network", "named", "")


def test_where_the_first_octets_decide() -> None:
    made = egress(external("named", "a.example", ports=(TLS,)), external("net", networks=("10.0.0.0/8",)))
    assert made.asks((ANY, 443))
    assert not made.asks((ANY, 80))
    assert made.asks(("10.0.0.1", 80))
    assert made.expects_http(("10.0.0.1", 80))
    assert not made.expects_http(("10.0.0.1", 443))
    assert not made.expects_http((ANY, 80))


def test_what_was_allowed_and_is_no_more() -> None:
    one = external("one", ExternalHost("one.example", (VIP,)), "*.two.example", networks=("10.0.0.0/8",))
    made = egress(one)
    cases = {
        (VIP, 443): made.tls((VIP, 443), ""),
        (VIP, 5432): made.opaque((VIP, 5432)),
        (ANY, 443): made.tls((ANY, 443), "a.two.example"),
        ("10.0.0.1", 443): made.tls(("10.0.0.1", 443), "one.example"),
        ("10.0.0.1", 5432): made.opaque(("10.0.0.1", 5432)),
    }

    def still() -> list[tuple[str, int]]:
        return [dst for dst, permission in cases.items() if permission and made.still(permission, dst)]

    assert still() == list(cases)
    made.put(dataclasses.replace(one, endpoints=("10.9.9.9",)))
    assert still() == list(cases)
    made.put(dataclasses.replace(one, networks=("10.0.0.0/16",)))
    assert still() == list(cases)
    made.put(dataclasses.replace(one, networks=()))
    assert still() == [(VIP, 443), (VIP, 5432), (ANY, 443)]
    made.put(dataclasses.replace(one, hosts=(ExternalHost("one.example", ("240.240.0.10",)),)))
    assert still() == [("10.0.0.1", 443), ("10.0.0.1", 5432)]
    made.put(dataclasses.replace(one, hosts=(ExternalHost("other.example", (VIP,)),)))
    assert still() == [("10.0.0.1", 5432)]
    made.put(dataclasses.replace(one, ports=(dataclasses.replace(TLS, protocol="tcp"), TCP)))
    assert still() == [(VIP, 5432), ("10.0.0.1", 5432)]
    made.drop(ServiceKey("external/shop/one"))
    assert still() == []


def test_endpoints_of_the_families_of_the_client() -> None:
    made = Tables(random.Random(1).random)
    shard = external("one", "one.example", endpoints=("10.0.0.1", "10.0.0.2", "fd00::1"))
    made.put(dataclasses.replace(shard, ports=(dataclasses.replace(TLS, target_port=8443),)))
    permission = made.egress.by_name("one.example", 443, "tls")
    assert permission is not None
    assert permission.external is not None
    firsts = set()
    for _ in range(50):
        found = made.declared(permission.external, frozenset((4,)))
        assert {state.addr for state in found} == {("10.0.0.1", 8443), ("10.0.0.2", 8443)}
        firsts.add(found[0].addr.host)
    assert firsts == {"10.0.0.1", "10.0.0.2"}
    assert {state.addr.host for state in made.declared(permission.external, frozenset((6,)))} == {"fd00::1"}
    made.put(dataclasses.replace(shard, endpoints=("fd00::1",)))
    permission = made.egress.by_name("one.example", 443, "tls")
    assert permission is not None
    assert permission.external is not None
    with pytest.raises(Refused, match="none in a family of the client") as caught:
        made.declared(permission.external, frozenset((4,)))
    assert caught.value.reason is Reason.NO_HEALTHY_ENDPOINT


def test_a_vip_that_moves_in_any_order() -> None:
    def shards(swap: bool) -> list[ExternalShard]:
        vips = ("240.240.0.1", "240.240.0.2")[:: -1 if swap else 1]
        return [external(name, ExternalHost(f"{name}.example", (vip,))) for name, vip in zip("ab", vips, strict=True)]

    for order in (1, -1):
        made = egress(*shards(False))
        for shard in shards(True)[::order]:
            made.put(shard)
        assert told(made.at_vip("240.240.0.1", 443)) == ("vip", "b", "b.example")
        assert told(made.at_vip("240.240.0.2", 443)) == ("vip", "a", "a.example")
    tables = Tables(lambda: 0.0)
    tables.put(shards(False)[0])
    tables.put(ServiceShard("shop", "a", ("240.240.0.3",), (ServicePort(80, "", "auto", (Endpoint("10.0.0.1", 80),)),)))
    assert tables.is_vip("240.240.0.1")
    assert tables.is_vip("240.240.0.3")
    tables.drop("external/shop/a")
    tables.drop("external/shop/a")
    assert not tables.is_vip("240.240.0.1")
    assert tables.is_vip("240.240.0.3")


hosts = st.sampled_from(["a.example", "b.example", "*.example", "*.a.example"])
networks = st.sampled_from(["10.0.0.0/8", "10.0.0.0/30", "10.0.0.1/32", "fd00::/8", "0.0.0.0/0"])
ports = st.lists(
    st.builds(ExternalPort, st.sampled_from([80, 443]), st.just(""), st.sampled_from(["tls", "http", "tcp"])),
    max_size=2,
    unique_by=lambda port: port.port,
).map(tuple)


@st.composite
def snapshots(draw: st.DrawFn) -> dict[str, ExternalShard]:
    """Consistent: no VIP has two owners."""
    out = {}
    vips = draw(st.permutations(["240.0.0.0", "240.0.0.1", "240.0.0.2"]))
    for name in draw(st.sampled_from(("abc", "ab", "c", ""))):
        names = draw(st.lists(hosts, max_size=2, unique=True))
        made = tuple(ExternalHost(host, (vips.pop(),) if vips and host[0] != "*" else ()) for host in names)
        shard = ExternalShard("shop", name, made, draw(st.lists(networks, max_size=2).map(tuple)), draw(ports))
        out[shard.key()] = shard
    return out


@settings(deadline=None)
@given(st.lists(snapshots(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_tables_equal_those_built_from_scratch(history: list[dict[str, ExternalShard]], rng: random.Random) -> None:
    made = Egress()
    current: dict[str, ExternalShard] = {}
    for snapshot in history:
        steps = [name for name in {**current, **snapshot} if current.get(name) != snapshot.get(name)]
        rng.shuffle(steps)
        for name in steps:
            if name in snapshot:
                made.put(snapshot[name])
            else:
                made.drop(ServiceKey(name))
        current = snapshot
        assert vars(made) == vars(egress(*snapshot.values()))
        for host in ("10.0.0.1", "10.0.0.2", "10.9.9.9", "fd00::1", "192.0.2.1"):
            address = ipaddress.ip_address(host)
            expected = {
                shard.name
                for shard in snapshot.values()
                if any(spec.port == 443 for spec in shard.ports)
                and any(address in ipaddress.ip_network(cidr) for cidr in shard.networks)
            }
            found = [external.shard.name for external in made.at_address(host, 443)]
            assert len(found) == len(set(found))
            assert set(found) == expected
