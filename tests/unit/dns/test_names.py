from __future__ import annotations

from dataclasses import replace

import pytest

from netproxy.addr import WorkloadKey
from netproxy.config.shard import Endpoint, ExternalHost, MeshShard
from netproxy.dns.names import MAX_ADDRESSES, Answer, Names, RecordType, Service
from tests.unit.dns.shards import DUAL, external, headless, service, small_mesh, workload

WEB = "web.shop.svc.cluster.local"
FOUR, SIX = frozenset((4,)), frozenset((6,))


def ask(
    names: Names, name: str, kind: RecordType = "A", namespace: str = "shop", families: frozenset[int] = DUAL
) -> Answer | None:
    return names.lookup(name.split(".") if name else [], kind, namespace, families)


@pytest.mark.parametrize(
    ("name", "namespace", "address"),
    [
        ("web", "shop", "240.240.0.1"),
        ("web", "other", "240.240.0.2"),
        ("web", "third", None),
        ("web.shop", "other", "240.240.0.1"),
        ("web.other", "shop", "240.240.0.2"),
        ("web.third", "shop", None),
        ("web.shop.svc", "other", "240.240.0.1"),
        ("web.shop.svc.cluster.local", "other", "240.240.0.1"),
        ("web.other.svc.cluster.local", "shop", "240.240.0.2"),
        ("web.shop.svc.cluster", "shop", None),
        ("web.shop.svc.cluster.local.corp.example", "shop", None),
        ("web.shop.svc.cluster.local.local", "shop", None),
        ("web.shop.pod.cluster.local", "shop", None),
        ("web.shop.cluster.local", "shop", None),
        ("web.corp.example", "shop", None),
        ("x.web.shop.svc.cluster.local", "shop", None),
        ("svc.cluster.local", "shop", None),
        ("cluster.local", "shop", None),
        ("db.example.com", "shop", "240.240.1.1"),
        ("db.example.com", "other", "240.240.1.1"),
        ("x.db.example.com", "shop", None),
        ("a.example.org", "shop", None),
        ("*.example.org", "shop", None),
        ("full.example.com", "shop", None),
        ("", "shop", None),
    ],
)
def test_every_form(name: str, namespace: str, address: str | None) -> None:
    found = ask(small_mesh(), name, namespace=namespace)
    assert (found and list(found.addresses)) == (address and [address])


@pytest.mark.parametrize(
    ("kind", "families", "wanted"),
    [
        ("A", DUAL, ["240.240.0.1"]),
        ("AAAA", DUAL, ["fd00:240::1"]),
        ("A", SIX, []),
        ("AAAA", FOUR, []),
        ("ANY", DUAL, ["240.240.0.1"]),
        ("ANY", SIX, ["fd00:240::1"]),
        ("OTHER", DUAL, []),
        ("SRV", DUAL, []),
        ("PTR", DUAL, []),
        ("A", frozenset(), []),
    ],
)
def test_types_and_families(kind: RecordType, families: frozenset[int], wanted: list[str]) -> None:
    assert ask(small_mesh(), "web", kind, families=families) == Answer(WEB, addresses=tuple(wanted))


@pytest.mark.parametrize("form", ["web", "web.shop", "web.shop.svc", WEB])
def test_service_records(form: str) -> None:
    names = small_mesh()
    target = Answer(WEB, services=(Service(80, WEB),), additional=("240.240.0.1", "fd00:240::1"))
    assert ask(names, f"_http._tcp.{form}", "SRV") == target
    assert ask(names, f"_http._tcp.{form}", "ANY") == target
    assert ask(names, f"_http._tcp.{form}", "SRV", families=SIX) == target._replace(additional=("fd00:240::1",))
    assert ask(names, f"_http._tcp.{form}", "A") == Answer(WEB)
    assert ask(names, f"_grpc._tcp.{form}", "SRV") == Answer(WEB, exists=False)
    assert ask(names, f"_http._udp.{form}", "SRV") is None
    assert ask(names, f"_http._tcp.x{form}", "SRV") is None


def test_service_records_of_others() -> None:
    names = small_mesh()
    found = ask(names, "_postgres._tcp.db.example.com", "SRV")
    assert found is not None
    assert list(found.services) == [Service(5432, "db.example.com")]
    found = ask(names, "_http._tcp.each", "SRV")
    assert found is not None
    assert [port for port, _ in found.services] == [8080, 8081]
    names.put(headless())
    assert ask(names, "_http._tcp.each", "SRV") == Answer("each.shop.svc.cluster.local")


def test_headless_answers_turn() -> None:
    names = small_mesh()
    answers = [ask(names, "each") for _ in range(4)]
    assert {tuple(answer.addresses) for answer in answers if answer} == {
        ("10.0.0.7", "10.0.0.8"),
        ("10.0.0.8", "10.0.0.7"),
    }
    assert ask(names, "each", "AAAA") == Answer("each.shop.svc.cluster.local", addresses=())
    names.put(headless(*(Endpoint(f"10.1.{n // 250}.{n % 250}", 80) for n in range(500))))
    seen = set()
    for _ in range(500):
        found = ask(names, "each")
        assert found is not None
        assert len(found.addresses) == MAX_ADDRESSES
        seen |= set(found.addresses)
    assert len(seen) == 500


def test_pointers() -> None:
    names = small_mesh()
    assert ask(names, "1.0.240.240.in-addr.arpa", "PTR") == Answer(WEB, pointers=(WEB,))
    six = "1." + "0." * 23 + "0.4.2.0.0.0.d.f.ip6.arpa"
    assert ask(names, six, "PTR") == Answer(WEB, pointers=(WEB,))
    assert ask(names, six, "A") == Answer(WEB)
    assert ask(names, "1.1.240.240.in-addr.arpa", "PTR") == Answer("db.example.com", pointers=("db.example.com",))
    for other in ("9.0.240.240", "0.240.240", "1.1.0.240.240", "01.0.240.240", "x.0.240.240", ""):
        assert ask(names, f"{other}.in-addr.arpa".lstrip("."), "PTR") is None
    assert ask(names, six.replace("1.0.", "10.0.", 1), "PTR") is None
    assert ask(names, six.replace("1.0.", "_.0.", 1), "PTR") is None
    assert ask(names, "arpa", "PTR") is None


def test_changes() -> None:
    names = small_mesh()
    names.put(replace(service("web", "shop", 1), vips=("240.240.0.9",)))
    assert ask(names, "web") == Answer(WEB, addresses=("240.240.0.9",))
    assert ask(names, "web", "AAAA") == Answer(WEB, addresses=())
    assert ask(names, "1.0.240.240.in-addr.arpa", "PTR") is None
    names.put(MeshShard(cluster_domain="mesh.example"))
    assert ask(names, WEB) is None
    assert ask(names, "web") == Answer("web.shop.svc.mesh.example", addresses=("240.240.0.9",))
    assert ask(names, "web.shop.svc.mesh.example") is not None
    assert names.domain == "mesh.example"
    names.drop("service/shop/web")
    assert ask(names, "web") is None
    assert ask(names, "9.0.240.240.in-addr.arpa", "PTR") is None
    names.drop("service/shop/web")
    names.drop("external/shop/db")
    assert ask(names, "db.example.com") is None
    names.drop("external/shop/none")
    names.drop("mesh")
    names.drop("svid/spiffe://cluster.local/ns/shop/sa/web")
    assert ask(names, "web.other") is not None


def test_a_host_or_address_that_moves_in_any_order() -> None:
    """The new owner's shard may come before the old one's goes."""
    names = small_mesh()
    names.put(external("new", ExternalHost("db.example.com", ("240.240.1.1",))))
    names.put(external("db", ExternalHost("else.example.com", ("240.240.1.2",))))
    assert ask(names, "db.example.com") == Answer("db.example.com", addresses=("240.240.1.1",))
    assert ask(names, "1.1.240.240.in-addr.arpa", "PTR") is not None
    names.drop("external/shop/db")
    assert ask(names, "db.example.com") is not None
    assert ask(names, "else.example.com") is None


def test_a_service_wins_over_a_host() -> None:
    names = small_mesh()
    names.put(external("x", ExternalHost("web.shop", ("240.240.1.9",))))
    assert ask(names, "web.shop") == Answer(WEB, addresses=("240.240.0.1",))
    names.drop("service/shop/web")
    assert ask(names, "web.shop") == Answer("web.shop", addresses=("240.240.1.9",))


def test_workloads_of_this_node() -> None:
    names = small_mesh()
    key = WorkloadKey("shop/client")
    assert names.workload(key) == workload()
    names.put(replace(workload(), local=False))
    assert names.workload(key) is None
    names.put(workload())
    names.drop("workload/shop/client")
    assert names.workload(key) is None
