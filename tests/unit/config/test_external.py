"""ExternalServices: shards, virtual addresses, and what they may not claim."""

from __future__ import annotations

import ipaddress

import pytest

from netproxy.config.shard import ExternalHost, ExternalPort, ExternalShard, ServiceShard
from netproxy.config.snapshot import Snapshot

from .meshes import attached, build, external, service, workload

MESH = "apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\n"


def shard(snapshot: Snapshot, name: str, ns: str = "shop") -> ExternalShard:
    found = snapshot.shards[f"external/{ns}/{name}"]
    assert isinstance(found, ExternalShard)
    return found


def rejected(snapshot: Snapshot) -> list[str]:
    return [f"{e.obj}: {e.field}: {e.message}" for e in snapshot.rejected]


def test_everything_reaches_the_shard() -> None:
    snapshot = build(
        external(
            "api",
            'hosts: [api.example.com, "*.example.com"], endpoints: ["2001:db8::1", 192.0.2.1],'
            'addresses: [198.51.100.128/25, 198.51.100.0/25, "2001:db8:1::/48", 10.0.0.1]',
            "{port: 443, protocol: TLS, name: https, targetPort: 8443}, {port: 80, protocol: HTTP}",
        ),
        external("db", "hosts: [db.example.com]", "{port: 5432, protocol: TCP}"),
    )
    assert snapshot.rejected == ()
    vips = snapshot.vips["api.example.com"]
    assert [ipaddress.ip_address(vip).version for vip in vips] == [4, 6]
    assert shard(snapshot, "api") == ExternalShard(
        "shop",
        "api",
        (ExternalHost("api.example.com", vips), ExternalHost("*.example.com", ())),
        ("10.0.0.1/32", "198.51.100.0/25", "198.51.100.128/25", "2001:db8:1::/48"),
        (ExternalPort(80, "", "http"), ExternalPort(443, "https", "tls", 8443)),
        ("2001:db8::1", "192.0.2.1"),
    )
    assert set(snapshot.vips) == {"api.example.com", "db.example.com"}
    status = snapshot.statuses["ExternalService shop/api"].get("Accepted")
    assert status is not None
    assert status.status == "True"


def test_virtual_addresses_are_kept_and_shared_with_services() -> None:
    text = (service("web"), external("x", "hosts: [a.example.com, b.example.com]"))
    first = build(*text)
    assert build(*text, vips=first.vips).vips == first.vips
    # From before there were ExternalServices: only keys of Services.
    old = build(*text, vips={"shop/web": first.vips["a.example.com"]})
    assert old.vips["shop/web"] == first.vips["a.example.com"]
    assert old.vips["a.example.com"] != first.vips["a.example.com"]
    assert old.vips["b.example.com"] == first.vips["b.example.com"]
    # A host that moves to another object keeps them.
    moved = build(service("web"), external("y", "hosts: [b.example.com]"), vips=first.vips)
    assert shard(moved, "y").hosts == (ExternalHost("b.example.com", first.vips["b.example.com"]),)
    assert set(moved.vips) == {"shop/web", "b.example.com"}
    web = moved.shards["service/shop/web"]
    assert isinstance(web, ServiceShard)
    assert web.vips == first.vips["shop/web"]


def test_a_full_network_is_told() -> None:
    mesh = f"{MESH}spec: {{vipCidrs: {{ipv4: 10.9.0.0/24}}}}"
    hosts = [f"h{n}.example.com" for n in range(256)]
    texts = [external(f"x{n}", f"hosts: [{', '.join(hosts[n : n + 64])}]") for n in range(0, 256, 64)]
    snapshot = build(mesh, *texts)
    assert sum(len(vips) for vips in snapshot.vips.values()) == 254 + 256
    warned = [s.obj for s in snapshot.statuses.values() if s.get("Warning")]
    assert 1 <= len(warned) <= 2
    assert snapshot.rejected == ()


CLUSTER = "is within the names of the mesh (MeshConfig clusterDomain cluster.local)"


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("web", "is a name of Service shop/web at mesh.yaml:1"),
        ("web.shop", "is a name of Service shop/web at mesh.yaml:1"),
        ("web.shop.svc", 'is within the names of the mesh: what ends with ".svc" is a Service'),
        ("other.shop.svc", 'is within the names of the mesh: what ends with ".svc" is a Service'),
        ("*.svc", 'is within the names of the mesh: what ends with ".svc" is a Service'),
        ("web.shop.svc.cluster.local", CLUSTER),
        ("x.cluster.local", CLUSTER),
        ("cluster.local", CLUSTER),
        ("*.cluster.local", CLUSTER),
        ("*.local", CLUSTER),
        ("a.example.com", "belongs to ExternalService other/first at mesh.yaml:6"),
        ("*.example.com", "belongs to ExternalService other/first at mesh.yaml:6"),
        ("local", ""),
        ("svc", ""),
        ("web.other", ""),
        ("nas", ""),
        ("*.web.shop", ""),
        ("b.example.com", ""),
        ("*.a.example.com", ""),
        ("x.mycluster.local", ""),
    ],
)
def test_names_that_belong_to_somebody(host: str, message: str) -> None:
    snapshot = build(
        service("web"),
        external("first", 'hosts: [a.example.com, "*.example.com"]', ns="other"),
        external("x", f'hosts: ["{host}"]'),
    )
    assert rejected(snapshot) == ([f"ExternalService shop/x: spec.hosts[0]: {message}"] if message else [])
    assert ("external/shop/x" in snapshot.shards) is not bool(message)
    if not message:
        assert (host in snapshot.vips) is not host.startswith("*.")


VIPS = "is within the virtual addresses {} (MeshConfig vipCidrs)"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("240.240.1.2", VIPS.format("240.240.0.0/16")),
        ("240.240.0.0/16", VIPS.format("240.240.0.0/16")),
        ("fd00:240::/64", VIPS.format("fd00:240::/32")),
        ("10.96.0.1", "is an address of Service shop/web at mesh.yaml:1"),
        ("10.0.0.1", "is an address of Workload shop/a at mesh.yaml:6"),
        ("192.0.2.0/24", "192.0.2.0/24 with port 443 belongs to ExternalService other/first at mesh.yaml:11"),
        ("2001:db8::/32", "2001:db8::/32 with port 443 belongs to ExternalService other/first at mesh.yaml:11"),
        ("192.0.2.7", ""),  # the smaller one wins
        ("192.0.0.0/16", ""),
        ("0.0.0.0/0", ""),
        ("::/0", ""),
        ("10.0.0.0/8", ""),  # what is in it of the mesh comes first, address by address
        ("224.0.0.0/3", ""),
        ("192.0.3.0/24", ""),
        ("192.0.1.255", ""),
    ],
)
def test_addresses_that_belong_to_somebody(address: str, message: str) -> None:
    snapshot = build(
        service("web", spec="clusterIP: 10.96.0.1"),
        attached("a", "10.0.0.1"),
        external("first", 'addresses: [192.0.2.0/24, "2001:db8::/32"]', ns="other"),
        external("x", f'addresses: ["{address}"]', "{port: 80, protocol: HTTP}, {port: 443, protocol: TLS}"),
        external("free", f'addresses: ["{address}"]', "{port: 8080, protocol: TCP}"),
    )
    assert rejected(snapshot)[:1] == ([f"ExternalService shop/x: spec.addresses[0]: {message}"] if message else [])
    # On another port the same address is free, unless it is the mesh's.
    assert ("external/shop/free" in snapshot.shards) == (not message or "with port" in message)


def test_endpoints_are_not_of_the_mesh() -> None:
    snapshot = build(
        service("web", spec="clusterIP: 10.96.0.1"),
        workload("a", "10.0.0.1"),
        external("x", "hosts: [a.b], endpoints: [240.240.0.9, 10.96.0.1, 10.0.0.1, 10.0.0.2]"),
    )
    assert rejected(snapshot) == [
        "ExternalService shop/x: spec.endpoints[0]: is a virtual address (MeshConfig vipCidrs)",
        "ExternalService shop/x: spec.endpoints[1]: is an address of Service shop/web at mesh.yaml:1",
    ]
    status = snapshot.statuses["ExternalService shop/x"].get("Accepted")
    assert status is not None
    assert (status.status, status.reason) == ("False", "Conflicted")
    assert status.message.count("; ") == 1
    way_out = build(workload("a", "10.0.0.1"), external("x", "hosts: [a.b], endpoints: [10.0.0.1]"))
    assert way_out.rejected == ()


def test_networks_are_compared_one_by_one() -> None:
    halves = external("a", "addresses: [192.0.2.128/25, 192.0.2.0/25, 192.0.2.7]")
    for address, clash in (("192.0.2.0/24", False), ("192.0.2.0/25", True), ("192.0.2.7/32", True)):
        snapshot = build(halves, external("b", f"addresses: [{address}]"))
        text = f"{address} with port 443 belongs to ExternalService shop/a at mesh.yaml:1"
        assert rejected(snapshot) == ([f"ExternalService shop/b: spec.addresses[0]: {text}"] if clash else [])
    assert shard(build(halves), "a").networks == ("192.0.2.0/25", "192.0.2.7/32", "192.0.2.128/25")


@pytest.mark.parametrize(
    ("hosts", "other_hosts", "port", "other_port", "apart"),
    [
        ("a.b", "c.d", "TLS", "TLS", True),
        ("a.b", "c.d", "HTTP", "HTTP", True),
        ("a.b", "c.d", "TCP", "TCP", False),
        ("a.b", "c.d", "TLS", "HTTP", False),
        ("a.b", "c.d", "TLS", "TCP", False),
        ("", "c.d", "TLS", "TLS", False),
        ("a.b", "", "TLS", "TLS", False),
    ],
)
def test_hosts_tell_one_network_apart(hosts: str, other_hosts: str, port: str, other_port: str, apart: bool) -> None:
    one = external("a", f"hosts: [{hosts}], addresses: [192.0.2.0/24]", f"{{port: 443, protocol: {port}}}")
    two = external("b", f"hosts: [{other_hosts}], addresses: [192.0.2.0/24]", f"{{port: 443, protocol: {other_port}}}")
    assert (not build(one, two).rejected) is apart


def test_what_is_rejected_claims_nothing() -> None:
    snapshot = build(
        external("a", "hosts: [one.example.com, cluster.local], addresses: [192.0.2.1]"),
        external("b", "hosts: [one.example.com], addresses: [192.0.2.0/24]"),
    )
    assert set(snapshot.shards) == {"mesh", "external/shop/b"}
    assert [e.obj for e in snapshot.rejected] == ["ExternalService shop/a"]


def test_the_cluster_domain_is_the_configured_one() -> None:
    mesh = (
        "apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\nspec: {clusterDomain: example.com}"
    )
    snapshot = build(mesh, external("a", "hosts: [api.example.com]"), external("b", "hosts: [x.cluster.local]"))
    assert [e.obj for e in snapshot.rejected] == ["ExternalService shop/a"]
