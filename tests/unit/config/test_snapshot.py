from __future__ import annotations

import dataclasses
import itertools
import random
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.addr import ServiceKey, WorkloadKey
from netproxy.config import source
from netproxy.config.load import load
from netproxy.config.mesh import MeshConfigSpec
from netproxy.config.model import Document
from netproxy.config.shard import (
    AccessLog,
    Backend,
    Endpoint,
    ExternalShard,
    MeshShard,
    Rule,
    ServicePort,
    ServiceShard,
    WorkloadShard,
    decode_shard,
    encode_shard,
)
from netproxy.config.snapshot import Context, Snapshot, Traffic, build_snapshot, declared_protocol
from netproxy.config.validate import validate

from .meshes import attached, build, external, mtls, route, service, slice_of, tcp_route, to, workload


def shard(snapshot: Snapshot, name: str) -> ServiceShard:
    found = snapshot.shards[f"service/shop/{name}"]
    assert isinstance(found, ServiceShard)
    return found


def port(snapshot: Snapshot, name: str = "web", number: int = 80) -> ServicePort:
    return next(p for p in shard(snapshot, name).ports if p.port == number)


def rules(snapshot: Snapshot, name: str = "web", number: int = 80) -> tuple[Rule, ...]:
    found = port(snapshot, name, number).rules
    assert found is not None
    return found


def work(snapshot: Snapshot, name: str) -> WorkloadShard:
    found = snapshot.shards[f"workload/shop/{name}"]
    assert isinstance(found, WorkloadShard)
    return found


def said(snapshot: Snapshot, obj: str, kind: str = "Accepted") -> tuple[str, str, str] | None:
    found = snapshot.statuses[obj].get(kind)
    return (found.status, found.reason, found.message) if found else None


def rejected(snapshot: Snapshot) -> list[str]:
    return [str(error) for error in snapshot.rejected]


# --- services and endpoints


def test_an_empty_mesh() -> None:
    snapshot = build("")
    assert snapshot.shards == {"mesh": MeshShard()}
    assert snapshot.mesh == MeshShard()
    assert (snapshot.rejected, snapshot.local_workloads) == ((), ())
    assert snapshot.vip_networks == ("240.240.0.0/16", "fd00:240::/32")


def test_endpoints_of_a_selector() -> None:
    snapshot = build(
        service("web"),
        attached("web-2", '"10.0.0.2", "fd00::2"', app="web"),
        workload("web-1", "10.0.0.10", app="web"),
        workload("other", "10.0.0.3"),
        workload("elsewhere", "10.0.0.4", app="web", ns="other"),
    )
    identity = "spiffe://cluster.local/ns/shop/sa/web-2-sa"
    assert port(snapshot) == ServicePort(
        80,
        "http",
        "http",
        (
            Endpoint("10.0.0.10", 8080, True, WorkloadKey("shop/web-1")),
            Endpoint("10.0.0.2", 8080, True, WorkloadKey("shop/web-2"), identity, True),  # type: ignore[arg-type]
            Endpoint("fd00::2", 8080, True, WorkloadKey("shop/web-2"), identity, True),  # type: ignore[arg-type]
        ),
        http_version="1.1",
    )
    assert rejected(snapshot) == []


def test_target_ports_by_name_number_and_default() -> None:
    snapshot = build(
        service(
            "web", "{name: a, port: 80, targetPort: web}, {name: b, port: 81, targetPort: 9000}, {name: c, port: 82}"
        ),
        workload("web-1", "10.0.0.1", "ports: [{name: web, port: 8000}]", app="web"),
        workload("web-2", "10.0.0.2", "ports: [{name: web, port: 8001}]", app="web"),
        workload("web-3", "10.0.0.3", app="web"),
    )
    assert [(e.host, e.port) for e in port(snapshot).endpoints] == [("10.0.0.1", 8000), ("10.0.0.2", 8001)]
    assert {e.port for e in port(snapshot, number=81).endpoints} == {9000}
    assert {e.port for e in port(snapshot, number=82).endpoints} == {82}
    assert said(snapshot, "Service shop/web", "Warning") == (
        "True",
        "TargetPortNotFound",
        'port 80: Workload shop/web-3 has no port named "web"',
    )


def test_slices_match_by_port_name_and_join_the_selector() -> None:
    snapshot = build(
        service("web", "{name: http, port: 80, targetPort: 8080}, {name: other, port: 81}"),
        workload("web-1", "10.0.0.1", app="web"),
        workload("web-2", "10.0.0.2", app="web"),
        slice_of("web", "{addresses: [10.0.0.1], conditions: {ready: false}}, {addresses: [10.0.0.9, 10.0.0.8]}"),
        slice_of("web", "{addresses: [10.0.0.7], conditions: {terminating: true}}", suffix="2"),
        slice_of("web", "{addresses: [10.0.0.6]}", "{name: http, port: 8080, protocol: UDP}", suffix="3"),
    )
    assert [(e.host, e.port, e.ready, e.workload) for e in port(snapshot).endpoints] == [
        ("10.0.0.1", 8080, False, "shop/web-1"),  # the slice knows better
        ("10.0.0.2", 8080, True, "shop/web-2"),
        ("10.0.0.7", 8080, False, ""),
        ("10.0.0.8", 8080, True, ""),
        ("10.0.0.9", 8080, True, ""),
    ]
    assert [e.host for e in port(snapshot, number=81).endpoints] == ["10.0.0.1", "10.0.0.2"]
    assert said(snapshot, "EndpointSlice shop/web-1", "ResolvedRefs") == ("True", "ResolvedRefs", "")


def test_slices_without_a_service() -> None:
    snapshot = build(
        slice_of("web", "{addresses: [10.0.0.1]}"),
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: x}\naddressType: IPv4\n",
    )
    assert said(snapshot, "EndpointSlice shop/web-1", "ResolvedRefs") == (
        "False",
        "BackendNotFound",
        "Service shop/web does not exist",
    )
    assert said(snapshot, "EndpointSlice default/x") == (
        "False",
        "NoService",
        "the label kubernetes.io/service-name is missing",
    )


@pytest.mark.parametrize(
    ("app", "name", "expected"),
    [
        ("", "", None),
        ("", "web", None),
        ("", "http", "http"),
        ("", "http-web", "http"),
        ("", "httpx", None),
        ("", "tcp-x", "tcp"),
        ("", "https", "tcp"),
        ("", "tls-a", "tcp"),
        ("", "mysql", "tcp"),
        ("", "redis-1", "tcp"),
        ("", "grpc-web", "http"),
        ("", "grpc-web-x", "http"),
        ("http", "tcp", "http"),
        ("HTTP", "", "http"),
        ("http/1.1", "", "http"),
        ("kubernetes.io/ws", "", "http"),
        ("kubernetes.io/wss", "", "tcp"),
        ("postgres", "http", "tcp"),
        ("https", "http", "tcp"),
    ],
)
def test_declared_protocols(app: str, name: str, expected: str | None) -> None:
    assert declared_protocol(app, name) == (expected, "1.1" if expected == "http" else "", "")


@pytest.mark.parametrize(
    ("app", "name"), [("grpc", ""), ("kubernetes.io/h2c", ""), ("", "grpc"), ("", "http2-x"), ("h2c", "http")]
)
def test_http2_is_declared(app: str, name: str) -> None:
    assert declared_protocol(app, name) == ("http", "2", "")


def test_protocols_of_ports() -> None:
    snapshot = build(
        service(
            "web",
            "{name: a, port: 80}, {name: b, port: 3306}, {name: http-c, port: 5432},"
            "{name: d, port: 83, targetPort: 6379},"
            "{name: e, port: 84, appProtocol: amqp}, {name: grpc, port: 9300}, {name: dns, port: 53, protocol: UDP}",
        )
    )
    assert {p.port: p.protocol for p in shard(snapshot, "web").ports} == {
        80: "auto",
        3306: "tcp",
        5432: "http",
        83: "tcp",
        84: "auto",
        9300: "http",
    }
    assert {p.port: p.http_version for p in shard(snapshot, "web").ports if p.http_version} == {5432: "1.1", 9300: "2"}
    assert said(snapshot, "Service shop/web", "Warning") == (
        "True",
        "UnsupportedProtocol",
        'port 84: appProtocol "amqp" is not known: the port is sniffed; port 53/UDP: only TCP is routed',
    )


def test_what_a_service_asks_in_vain_is_told() -> None:
    snapshot = build(service("web", spec="sessionAffinity: ClientIP, internalTrafficPolicy: Local"))
    assert said(snapshot, "Service shop/web", "Warning") == (
        "True",
        "Ignored",
        "sessionAffinity ClientIP has no effect but where eBPF balances opaque TCP; "
        "internalTrafficPolicy Local has no effect",
    )


def test_vips_declared_assigned_and_none() -> None:
    text = (service("a"), service("b", spec="clusterIP: 10.96.0.1"), service("c", spec="clusterIP: None"))
    first = build(*text)
    assert shard(first, "a").vips == first.vips[ServiceKey("shop/a")]
    assert len(shard(first, "a").vips) == 2
    assert shard(first, "b").vips == ("10.96.0.1",)
    assert shard(first, "c").vips == ()
    assert set(first.vips) == {"shop/a"}
    kept = build(*text, vips={"shop/a": ("240.240.1.2", "fd00:240::9"), "shop/gone": ("240.240.1.3",)})
    assert kept.vips == {"shop/a": ("240.240.1.2", "fd00:240::9")}
    moved = build(*text, vips={"shop/a": ("10.96.0.1", "fd00:240::9")})
    assert moved.vips == {"shop/a": (first.vips[ServiceKey("shop/a")][0], "fd00:240::9")}


MESH = "apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\n"


def test_full_networks_are_told() -> None:
    services = [service(f"s{n}") for n in range(256)]
    mesh = MESH + "spec: {vipCidrs: {ipv4: 10.9.0.0/24}}"
    snapshot = build(mesh, *services)
    short = [s for s in snapshot.statuses.values() if s.get("Warning")]
    assert len(short) == 2
    assert said(snapshot, short[0].obj, "Warning") == (
        "True",
        "NoAddressLeft",
        "the networks of MeshConfig vipCidrs are full",
    )


def test_addresses_have_one_owner() -> None:
    snapshot = build(
        attached("a", "10.0.0.1"),
        workload("b", '10.0.0.2, "::ffff:10.0.0.1"'),
        workload("c", "10.0.0.3", "attach: {netns: /run/netns/a}"),
        workload("d", "10.0.0.2", "node: node-b, attach: {netns: /run/netns/a}"),
        service("x", spec="clusterIP: 10.9.9.9"),
        service("y", spec='clusterIP: "fd00::1", clusterIPs: ["fd00::1", 10.9.9.9]'),
        service("z", spec="clusterIP: 10.0.0.1"),
    )
    assert rejected(snapshot) == [
        "mesh.yaml:9: Workload shop/b: spec.addresses[1]: 10.0.0.1 is the address of Workload shop/a at mesh.yaml:1",
        "mesh.yaml:14: Workload shop/c: spec.attach.netns: is attached already by Workload shop/a at mesh.yaml:1",
        "mesh.yaml:29: Service shop/y: spec.clusterIP: is an address of Service shop/x at mesh.yaml:21",
        "mesh.yaml:34: Service shop/z: spec.clusterIP: is an address of Workload shop/a at mesh.yaml:1",
    ]
    assert set(snapshot.shards) == {"mesh", "service/shop/x", "workload/shop/a", "workload/shop/d"}
    assert said(snapshot, "Workload shop/b") == (
        "False",
        "Conflicted",
        "spec.addresses[1]: 10.0.0.1 is the address of Workload shop/a at mesh.yaml:1",
    )


# --- workloads


def test_local_workloads() -> None:
    text = (
        attached("a", "10.0.0.1"),
        attached("b", "10.0.0.2", spec="node: node-a, failurePolicy: closed, steering: iptables"),
        attached("c", "10.0.0.3", spec="node: node-b"),
        workload("d", "10.0.0.4"),
    )
    snapshot = build(*text)
    assert [
        (w.key, w.netns, w.failure_policy, w.steering, w.identity, w.addresses) for w in snapshot.local_workloads
    ] == [
        ("shop/a", "/run/netns/a", "open", "auto", "spiffe://cluster.local/ns/shop/sa/a-sa", ("10.0.0.1",)),
        ("shop/b", "/run/netns/b", "closed", "iptables", "spiffe://cluster.local/ns/shop/sa/b-sa", ("10.0.0.2",)),
    ]
    assert {n: work(snapshot, n).local for n in "abcd"} == {"a": True, "b": True, "c": False, "d": True}
    assert {n: work(snapshot, n).meshed for n in "abcd"} == {"a": True, "b": True, "c": True, "d": False}
    chosen = build(*text, local=frozenset({WorkloadKey("shop/c")}))
    assert [w.key for w in chosen.local_workloads] == ["shop/c"]


EVERY_SETTING = """
apiVersion: netproxy.mesh/v1alpha1
kind: MeshConfig
metadata: {name: m}
spec:
  trustDomain: example.org
  outboundPolicy: deny
  failurePolicy: closed
  steering: iptables
  opaquePorts: [9000, 80, 80]
  detectTimeout: 2s
  headerTimeout: 3s
  idleTimeout: 4s
  connectTimeout: 500ms
  handshakeTimeout: 5s
  tlsResumption: false
  poolIdleTimeout: 6s
  tcpIdleTimeout: 7s
  maxHeadBytes: 2048
  maxHeaders: 10
  maxConnections: 11
  bufferBytes: 8192
  expectContinueTimeout: 8s
  headerCase: preserve
  forwarded: set
  requestId: false
  via: mesh-1
  http2MaxStreams: 13
  http2KeepaliveInterval: 14s
  http2KeepaliveTimeout: 15s
  meshHttp: http2
  http2MaxUpstreamStreams: 13
  tracing: {percent: 2.5}
  accessLog: {percent: 12.5, minStatus: 500, minDuration: 250ms, flags: [UT, NR, UT]}
  clusterDomain: mesh.example
  dnsTimeout: 9s
  dnsMaxOutstanding: 12
"""


def test_mesh_config() -> None:
    second = "apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: a\n"
    snapshot = build(EVERY_SETTING, second, attached("a", "10.0.0.1"), service("x", "{port: 80}"))
    assert snapshot.mesh == MeshShard(
        trust_domain="example.org",
        outbound_policy="deny",
        opaque_ports=(80, 9000),
        detect_timeout_s=2.0,
        header_timeout_s=3.0,
        idle_timeout_s=4.0,
        connect_timeout_s=0.5,
        handshake_timeout_s=5.0,
        tls_resumption=False,
        pool_idle_s=6.0,
        tcp_idle_timeout_s=7.0,
        max_head_bytes=2048,
        max_headers=10,
        max_connections=11,
        buffer_bytes=8192,
        expect_continue_timeout_s=8.0,
        header_case="preserve",
        forwarded="set",
        request_id=False,
        via="mesh-1",
        http2_max_streams=13,
        http2_keepalive_s=14.0,
        http2_keepalive_timeout_s=15.0,
        mesh_http="http2",
        http2_max_upstream_streams=13,
        trace_percent=2.5,
        access_log=AccessLog(12.5, 500, 0.25, ("NR", "UT")),
        cluster_domain="mesh.example",
        dns_timeout_s=9.0,
        dns_max_outstanding=12,
    )
    assert snapshot.steering == snapshot.local_workloads[0].steering == "iptables"
    assert snapshot.local_workloads[0].failure_policy == "closed"
    assert snapshot.local_workloads[0].identity == "spiffe://example.org/ns/shop/sa/a-sa"
    assert port(snapshot, "x").protocol == "tcp"
    assert rejected(snapshot) == [
        "mesh.yaml:41: MeshConfig default/a: metadata.name: "
        "a mesh has one MeshConfig, and default/m at mesh.yaml:1 is it"
    ]


def test_every_knob_of_the_mesh_has_a_field() -> None:
    changed = build(EVERY_SETTING).mesh
    for field in dataclasses.fields(MeshShard):
        assert getattr(changed, field.name) != getattr(MeshShard(), field.name), f"{field.name} needs a field"


def test_a_mesh_config_that_says_nothing_is_none() -> None:
    empty = build(MESH)
    assert empty.mesh == MeshShard()
    assert empty.steering == "auto"
    nulls = ", ".join(f"{field.alias}: ~" for field in MeshConfigSpec.model_fields.values())
    assert build(f"{MESH}spec: {{{nulls}}}").mesh == MeshShard()


def test_what_of_a_workload_is_steered() -> None:
    traffic = """traffic: {
      outbound: {includePorts: [443, 80, 443], excludePorts: [22], includeCidrs: ["fd00::/8", 10.1.0.0/16, 10.0.0.0/8],
        excludeCidrs: [10.2.0.0/25, 10.2.0.128/25, "::1", 192.0.2.7, "::ffff:192.0.2.6"], excludeUids: [1000, 0]},
      inbound: {includePorts: [8080], excludePorts: [9091, 9090], excludeCidrs: [0.0.0.0/0]}}"""
    snapshot = build(attached("a", "10.0.0.1", spec=traffic), attached("b", "10.0.0.2"))
    a, b = snapshot.local_workloads
    assert a.traffic == Traffic(
        out_include_cidrs=("10.0.0.0/8", "fd00::/8"),
        out_exclude_cidrs=("10.2.0.0/24", "192.0.2.6/31", "::1/128"),
        out_include_ports=(80, 443),
        out_exclude_ports=(22,),
        out_exclude_uids=(0, 1000),
        in_include_ports=(8080,),
        in_exclude_ports=(9090, 9091),
        in_exclude_cidrs=("0.0.0.0/0",),
    )
    assert b.traffic == Traffic()


def test_the_dns_of_a_workload() -> None:
    servers = 'dns: {nameservers: [192.0.2.53, "fd00::53"]}'
    snapshot = build(
        attached("a", "10.0.0.1", spec=servers),
        attached("b", "10.0.0.2", spec="dns: {capture: false}"),
        attached("c", "10.0.0.3", spec=f"node: other, {servers}"),
    )
    a, b = snapshot.local_workloads
    assert (a.dns_capture, a.nameservers) == (True, ("192.0.2.53", "fd00::53"))
    assert (b.dns_capture, b.nameservers) == (False, ())
    wrong = build(workload("a", "10.0.0.1", "dns: {nameservers: [192.0.2.53, 240.240.0.9]}"))
    assert rejected(wrong) == [
        "mesh.yaml:4: Workload shop/a: spec.dns.nameservers[1]: 240.240.0.9 is a virtual address (MeshConfig vipCidrs)"
    ]
    assert [work(snapshot, name).nameservers for name in "abc"] == [("192.0.2.53", "fd00::53"), (), ()]


def test_what_a_route_attaches_to_and_sends_to_is_http_inbound() -> None:
    snapshot = build(
        workload("a", "10.0.0.1", app="web"),
        workload("b", "10.0.0.2", app="v2"),
        workload("c", "10.0.0.3", "ports: [{port: 8080, name: tcp}]", app="v2"),
        service("web", "{name: x, port: 80, targetPort: 8080}, {name: y, port: 81, targetPort: 8081}"),
        service("v2", "{name: x, port: 80, targetPort: 8080}, {name: y, port: 3306}"),
        route(
            "r",
            f"{{backendRefs: [{to('v2')}, {to('v2', 3306)}, {to('v2', 9)}, {to('missing')}]}}",
            '{group: "", kind: Service, name: web, port: 80}',
        ),
        route("unattached", f"{{backendRefs: [{to('web', 81)}]}}", '{group: "", kind: Service, name: missing}'),
    )
    assert work(snapshot, "a").protocols == {8080: "http"}
    assert work(snapshot, "b").protocols == {8080: "http", 3306: "http"}
    assert work(snapshot, "c").protocols == {8080: "tcp", 3306: "http"}


def test_inbound_protocols_come_from_the_workload_then_from_services_that_agree() -> None:
    snapshot = build(
        workload(
            "a",
            "10.0.0.1",
            "ports: [{port: 8080, appProtocol: http}, {name: tcp-x, port: 7, appProtocol: ssh}]",
            app="web",
        ),
        service("s1", "{name: tcp, port: 80, targetPort: 8080}", "selector: {app: web}"),
        service("s2", "{name: http, port: 80, targetPort: 9090}", "selector: {app: web}"),
        service("s3", "{name: http, port: 80, targetPort: 9091}", "selector: {app: web}"),
        service("s4", "{name: tcp, port: 80, targetPort: 9091}", "selector: {app: web}"),
        service("s5", "{name: x, port: 80, targetPort: 9092}", "selector: {app: web}"),
    )
    assert work(snapshot, "a").protocols == {8080: "http", 9090: "http"}
    assert said(snapshot, "Workload shop/a", "Warning") is not None


def modes(snapshot: Snapshot, *names: str) -> list[str]:
    return [work(snapshot, name).mtls for name in names]


def test_peer_authentication_precedence() -> None:
    text = [attached("a", "10.0.0.1"), attached("b", "10.0.0.2"), attached("c", "10.0.0.3")]
    assert modes(build(*text), "a", "b") == ["PERMISSIVE", "PERMISSIVE"]
    text.append(mtls("mesh", "mtls: {mode: STRICT}", "netproxy-system"))
    assert modes(build(*text), "a", "b") == ["STRICT", "STRICT"]
    text.append(mtls("elsewhere", "mtls: {mode: DISABLE}", "other"))
    assert modes(build(*text), "a", "b") == ["STRICT", "STRICT"]
    text.append(mtls("ns", "mtls: {mode: PERMISSIVE}"))
    assert modes(build(*text), "a", "b") == ["PERMISSIVE", "PERMISSIVE"]
    text.append(
        mtls("a", "selector: {matchLabels: {app: a}}, mtls: {mode: DISABLE}, portLevelMtls: {80: {mode: STRICT}}")
    )
    text.append(mtls("c", "selector: {matchLabels: {app: c}}, portLevelMtls: {80: {mode: DISABLE}}"))
    snapshot = build(*text)
    assert modes(snapshot, "a", "b", "c") == ["DISABLE", "PERMISSIVE", "PERMISSIVE"]
    assert [work(snapshot, n).port_mtls for n in "abc"] == [{80: "STRICT"}, {}, {80: "DISABLE"}]


def test_peer_authentication_ties() -> None:
    snapshot = build(
        attached("a", "10.0.0.1"),
        mtls("b", "selector: {matchLabels: {app: a}}, mtls: {mode: DISABLE}"),
        mtls("a", "selector: {matchLabels: {app: a}}"),
        mtls("young", "mtls: {mode: DISABLE}", meta=", creationTimestamp: 2025-02-01T00:00:00Z"),
        mtls("old", "mtls: {mode: STRICT}", meta=", creationTimestamp: 2025-01-01T00:00:00Z"),
        mtls("another", "mtls: {mode: DISABLE}"),
    )
    assert modes(snapshot, "a") == ["STRICT"]
    assert said(snapshot, "PeerAuthentication shop/b", "Warning") == (
        "True",
        "Conflicted",
        "Workload shop/a: PeerAuthentication shop/a selects it too and comes first",
    )
    assert sorted(error.obj for error in snapshot.rejected) == [
        "PeerAuthentication shop/another",
        "PeerAuthentication shop/young",
    ]
    assert "PeerAuthentication shop/old at mesh.yaml:21 holds for namespace shop already" in str(snapshot.rejected[0])


def test_meshed_counts_the_mode_of_the_port() -> None:
    snapshot = build(
        service("web", "{name: a, port: 80, targetPort: 8080}, {name: b, port: 81, targetPort: 9090}"),
        attached("web", "10.0.0.1"),
        mtls(
            "m", "selector: {matchLabels: {app: web}}, mtls: {mode: DISABLE}, portLevelMtls: {9090: {mode: PERMISSIVE}}"
        ),
    )
    assert [(e.meshed, bool(e.identity), e.workload) for p in shard(snapshot, "web").ports for e in p.endpoints] == [
        (False, False, "shop/web"),
        (True, True, "shop/web"),
    ]
    assert work(snapshot, "web").meshed
    off = build(attached("web", "10.0.0.1"), mtls("m", "mtls: {mode: DISABLE}"))
    assert not work(off, "web").meshed
    assert len(off.local_workloads) == 1


# --- routes


def test_a_route_with_weights_and_a_timeout() -> None:
    refs = f"{to('v1', more=', weight: 90')}, {to('v2', more=', weight: 0')}"
    rule = f"{{backendRefs: [{refs}], timeouts: {{request: 1500ms}}}}"
    snapshot = build(service("web"), service("v1"), service("v2"), route("r", rule))
    (found,) = rules(snapshot)
    assert found.name == "HTTPRoute shop/r rule 0"
    assert found.backends == (Backend(ServiceKey("shop/v1"), 80, 90), Backend(ServiceKey("shop/v2"), 80, 0))
    assert found.request_timeout_s == 1.5
    assert [(m.path_kind, m.path, m.headers) for m in found.matches] == [("prefix", "/", ())]
    assert port(snapshot, "v1").rules is None
    assert said(snapshot, "HTTPRoute shop/r") == ("True", "Accepted", "")
    assert said(snapshot, "HTTPRoute shop/r", "ResolvedRefs") == ("True", "ResolvedRefs", "")
    assert [p.parent for p in snapshot.statuses["HTTPRoute shop/r"].parents] == ["Service shop/web"]


@pytest.mark.parametrize(
    ("ref", "reason", "message"),
    [
        ("{name: gone, port: 80}", "BackendNotFound", "Service shop/gone does not exist"),
        ("{name: web, port: 81}", "BackendNotFound", "Service shop/web has no TCP port 81"),
        ("{name: web, port: 53}", "BackendNotFound", "Service shop/web has no TCP port 53"),
        ("{name: web, port: 3306}", "UnsupportedProtocol", "port 3306 of Service shop/web is not HTTP but opaque TCP"),
        ("{name: x, namespace: other, port: 80}", "RefNotPermitted", "Service other/x is in another namespace"),
        ("{name: x, kind: Bucket, group: a.b}", "InvalidKind", "a.b Bucket can't be a backend, only a Service"),
        ("{name: x, kind: Pod}", "InvalidKind", "core Pod can't be a backend, only a Service"),
    ],
)
def test_a_backend_that_is_not_there_keeps_its_share(ref: str, reason: str, message: str) -> None:
    ports = "{name: http, port: 80}, {name: mysql, port: 3306}, {name: dns, port: 53, protocol: UDP}"
    snapshot = build(
        service("web", ports), service("x", ns="other"), route("r", f"{{backendRefs: [{to('web')}, {ref}]}}")
    )
    good, bad = rules(snapshot)[0].backends
    assert (good.invalid, bad.invalid, bad.weight) == ("", message, 1)
    assert said(snapshot, "HTTPRoute shop/r") == ("True", "Accepted", "")
    assert said(snapshot, "HTTPRoute shop/r", "ResolvedRefs") == ("False", reason, message)


def test_all_unresolved_backends_are_named_once() -> None:
    refs = ", ".join(to(name) for name in ("a", "b", "a"))
    snapshot = build(service("web"), route("r", f"{{backendRefs: [{refs}]}}, {{backendRefs: [{refs}]}}"))
    assert said(snapshot, "HTTPRoute shop/r", "ResolvedRefs") == (
        "False",
        "BackendNotFound",
        "Service shop/a does not exist; Service shop/b does not exist",
    )


def test_a_rule_without_backends_stays() -> None:
    assert rules(build(service("web"), route("r", "{}")))[0].backends == ()


@pytest.mark.parametrize(
    ("parent", "reason", "message"),
    [
        ('{group: "", kind: Service, name: gone}', "NoMatchingParent", "Service shop/gone does not exist"),
        (
            '{group: "", kind: Service, name: web, port: 81}',
            "NoMatchingParent",
            "Service shop/web has no such port; it has: 80 http, 3306 mysql, 6379 cache",
        ),
        (
            '{group: "", kind: Service, name: web, port: 80, sectionName: mysql}',
            "NoMatchingParent",
            "Service shop/web has no such port; it has: 80 http, 3306 mysql, 6379 cache",
        ),
        (
            '{group: "", kind: Service, name: headless}',
            "NoMatchingParent",
            "Service shop/headless is headless: there is no address to route",
        ),
        (
            '{group: "", kind: Service, name: web, namespace: other}',
            "UnsupportedValue",
            "a parent in another namespace (consumer route) is not supported yet",
        ),
        (
            '{group: "", kind: Service, name: web, sectionName: mysql}',
            "UnsupportedProtocol",
            "the port of Service shop/web is not HTTP but opaque TCP",
        ),
        (
            "{name: gw}",
            "NoMatchingParent",
            'gateway.networking.k8s.io Gateway can\'t be a parent, only a Service (write group: "" and kind: Service)',
        ),
        ("{name: x, group: a.b, kind: C}", "NoMatchingParent", "a.b C can't be a parent, only a Service"),
    ],
)
def test_parents_that_dont_match(parent: str, reason: str, message: str) -> None:
    snapshot = build(
        service("web", "{name: http, port: 80}, {name: mysql, port: 3306}, {name: cache, port: 6379}"),
        service("headless", spec="clusterIP: None"),
        route("r", f"{{backendRefs: [{to('web')}]}}", parent),
    )
    assert said(snapshot, "HTTPRoute shop/r") == ("False", reason, message)
    assert rejected(snapshot) == []
    assert all(p.rules is None for s in snapshot.shards.values() if isinstance(s, ServiceShard) for p in s.ports)


def test_which_ports_a_parent_means() -> None:
    ports = "{name: http, port: 80}, {name: web, port: 81}, {name: cache, port: 6379}, {name: tcp, port: 90}"
    ref = '{group: "", kind: Service, name: web'

    def routed(*parents: str) -> dict[int, str]:
        snapshot = build(service("web", ports), route("r", "{}", ", ".join(parents)))
        return {p.port: p.protocol for p in shard(snapshot, "web").ports if p.rules is not None}

    assert routed(ref + "}") == {80: "http", 81: "http"}  # opaque by its number: not unless it is named
    assert routed(ref + ", port: 81}") == {81: "http"}
    assert routed(ref + ", sectionName: web}") == {81: "http"}
    assert routed(ref + ", port: 6379}") == {6379: "http"}
    assert routed(ref + ", port: 90}") == {}
    assert routed(ref + ", namespace: shop, port: 80, sectionName: http}", ref + ", port: 81}") == {
        80: "http",
        81: "http",
    }


def test_a_port_that_two_parents_mean_has_each_rule_once() -> None:
    ref = '{group: "", kind: Service, name: web'
    snapshot = build(service("web"), route("r", "{}", f"{ref}}}, {ref}, port: 80}}, {ref}, port: 9}}"))
    assert len(rules(snapshot)) == 1
    assert len(rules(snapshot)[0].matches) == 1
    status = snapshot.statuses["HTTPRoute shop/r"]
    assert [(p.parent, p.conditions[0].status) for p in status.parents] == [
        ("Service shop/web", "True"),
        ("Service shop/web port 80", "True"),
        ("Service shop/web port 9", "False"),
    ]
    assert status.conditions[0].status == "True"


def test_a_route_without_parents() -> None:
    text = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec: {}\n"
    assert said(build(text), "HTTPRoute default/r") == ("False", "NoMatchingParent", "the route has no parentRefs")


EXACT = "path: {type: Exact, value: /a/b}"
OLD, YOUNG = "creationTimestamp: 2025-01-01T00:00:00Z", "creationTimestamp: 2025-02-01T00:00:00Z"
# Every row comes before all rows below it.
PRECEDENCE = [
    ("exact-headers", f"{EXACT}, headers: [{{name: a, value: x}}]", ""),
    ("exact", EXACT, ""),
    ("longest", "path: {value: /a/bb}", ""),
    ("long-two-headers", "path: {value: /a/b}, headers: [{name: a, value: x}, {name: b, value: x}]", ""),
    ("long-one-header", "path: {value: /a/b}, headers: [{name: a, value: x}]", ""),
    ("long-one-header-twice", "path: {value: /a/b/}, headers: [{name: a, value: x}, {name: A, value: y}]", ""),
    ("long-old", "path: {value: /a/b}", OLD),
    ("long-young", "path: {value: /a/b/}", YOUNG),  # the trailing slash counts for nothing
    ("long-a", "path: {value: /a/b}", ""),
    ("long-b", "path: {value: /a/b}", ""),
    ("short-headers", "path: {value: /a}, headers: [{name: a, value: x}, {name: b, value: x}]", ""),
    ("short", "path: {value: /a}", ""),
    ("all-header", "headers: [{name: a, value: x}]", ""),
    ("all", "", OLD),
]


@pytest.mark.parametrize("seed", range(5))
def test_precedence_across_routes(seed: int) -> None:
    rows = list(PRECEDENCE)
    random.Random(seed).shuffle(rows)
    snapshot = build(
        service("web"), *(route(name, f"{{matches: [{{{match}}}]}}", meta=meta) for name, match, meta in rows)
    )
    names = [rule.name.removeprefix("HTTPRoute shop/").removesuffix(" rule 0") for rule in rules(snapshot)]
    assert names == [name for name, _, _ in PRECEDENCE]


def test_a_rule_is_split_only_where_another_comes_between() -> None:
    snapshot = build(
        service("web"),
        route("a", "{matches: [{path: {value: /x}}, {path: {type: Exact, value: /y}}, {path: {value: /zz}}]}, {}"),
        route("b", "{matches: [{path: {value: /m}}], timeouts: {request: 1s}}"),
    )
    assert [(rule.name, [m.path for m in rule.matches]) for rule in rules(snapshot)] == [
        ("HTTPRoute shop/a rule 0", ["/y", "/zz", "/x"]),
        ("HTTPRoute shop/b rule 0", ["/m"]),
        ("HTTPRoute shop/a rule 1", ["/"]),
    ]
    snapshot = build(
        service("web"),
        route("a", f"{{matches: [{{path: {{value: /x}}}}, {{path: {{value: /xxx}}}}], backendRefs: [{to('web')}]}}"),
        route("b", "{matches: [{path: {value: /xx}}]}"),
    )
    found = rules(snapshot)
    assert [(rule.name, [m.path for m in rule.matches]) for rule in found] == [
        ("HTTPRoute shop/a rule 0", ["/xxx"]),
        ("HTTPRoute shop/b rule 0", ["/xx"]),
        ("HTTPRoute shop/a rule 0", ["/x"]),
    ]
    assert found[0].backends == found[2].backends != ()


def test_rule_order_is_the_last_tie() -> None:
    snapshot = build(service("web"), route("r", "{timeouts: {request: 1s}}, {timeouts: {request: 2s}}"))
    assert [rule.request_timeout_s for rule in rules(snapshot)] == [1.0, 2.0]


def test_header_names_are_lower_case_and_the_first_of_equals_counts() -> None:
    snapshot = build(
        service("web"), route("r", "{matches: [{headers: [{name: X-A, value: V}, {name: x-a, value: W}]}]}")
    )
    assert [(h.name, h.value) for h in rules(snapshot)[0].matches[0].headers] == [("x-a", "V")]


# --- the whole


def test_statuses_of_what_validation_rejected() -> None:
    bad = "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  ports: [{port: 0}]\n  typ: a\n"
    snapshot = build(bad, service("web"), service("web"))
    status = snapshot.statuses["Service default/x"]
    assert (status.file, status.line) == ("mesh.yaml", 5)
    assert said(snapshot, "Service default/x") == (
        "False",
        "Invalid",
        'spec.ports[0].port: must be at least 1, not 0; spec.typ: unknown field; did you mean "type"?',
    )
    assert said(snapshot, "Service shop/web") == ("True", "Accepted", "")
    assert len(snapshot.rejected) == 3


def test_host_names_of_a_route_have_no_effect_and_a_warning_says_so() -> None:
    route = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  hostnames: [shop.example.com]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
    snapshot = build(service("web"), route)
    assert said(snapshot, "HTTPRoute shop/web") == ("True", "Accepted", "")
    warning = said(snapshot, "HTTPRoute shop/web", "Warning")
    assert warning is not None
    assert warning[:2] == ("True", "HostnamesIgnored")
    without = build(service("web"), route.replace("  hostnames: [shop.example.com]\n", ""))
    assert said(without, "HTTPRoute shop/web", "Warning") is None
    assert rules(without) == rules(snapshot)


def test_a_snapshot_cant_be_changed() -> None:
    snapshot = build(service("web"))
    assert isinstance(snapshot.shards, types.MappingProxyType)
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.rejected = ()  # type: ignore[misc]


def test_the_order_of_objects_does_not_matter() -> None:
    old = build(service("a"), service("b"), attached("a", "10.0.0.1"))
    assert build(attached("a", "10.0.0.1"), service("b"), service("a")).shards == old.shards


def test_load_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("web"))
    (tmp_path / "b.yaml").write_text("a: [")
    (tmp_path / "c.yaml").write_text(workload("web", "10.0.0.1"))
    snapshot = load(tmp_path, Context("node-a"))
    assert [e.host for e in port(snapshot).endpoints] == ["10.0.0.1"]
    assert [Path(error.file).name for error in snapshot.rejected] == ["b.yaml"]


@pytest.mark.parametrize(("name", "local"), [("bookshop", 5), ("egress", 1)])
def test_the_examples(name: str, local: int) -> None:
    snapshot = load(Path(__file__).parents[3] / "examples" / name, Context("node-a"))
    assert rejected(snapshot) == []
    assert len(snapshot.local_workloads) == local
    assert all(
        c.status == ("True" if c.type != "Warning" else "") for s in snapshot.statuses.values() for c in s.conditions
    )
    consistent(snapshot)


# Names are few, so that random subsets have references that dangle, addresses that clash and objects that are bad.
POOL = [
    *(
        service(n, ports)
        for n in "abc"
        for ports in ("{name: http, port: 80}", "{name: mysql, port: 80}", "{name: x, port: 0}")
    ),
    *(
        service(n, spec=f"clusterIP: {ip}")
        for n, ip in (("a", "10.0.0.1"), ("b", "10.5.5.5"), ("c", "10.5.5.5"), ("d", "None"))
    ),
    *(attached(f"{n}{i}", f"10.0.0.{i}", app=n) for n in "abc" for i in (1, 2)),
    *(slice_of(n, f"{{addresses: [10.0.0.{i}]}}", suffix=str(i)) for n in "ab" for i in (1, 9)),
    *(
        route(
            f"r{n}",
            f"{{backendRefs: [{to('a')}, {to('b')}, {to('d')}]}}, "
            f"{{matches: [{{path: {{value: /{n}}}}}], backendRefs: [{to('c', n)}]}}",
            f'{{group: "", kind: Service, name: {parent}}}',
        )
        for n, parent in itertools.product((80, 81), "abd")
    ),
    *(
        tcp_route(f"t{n}", f"{to('a')}, {to('c', n)}", f'{{group: "", kind: Service, name: {parent}}}')
        for n, parent in itertools.product((80, 81), "ab")
    ),
    external("e", "hosts: [a.example.com], addresses: [10.0.0.1]"),
    external("f", 'hosts: [a.example.com, "*.example.com"], addresses: [10.5.0.0/16]'),
    external("g", "hosts: [a, b.shop], addresses: [10.5.5.0/24, 240.240.0.1]"),
    external("h", "addresses: [10.0.0.0/8], endpoints: [10.9.9.9]"),
    external("i", "hosts: [b.example.com], endpoints: [10.0.0.2]"),
    mtls("m", "mtls: {mode: DISABLE}"),
    mtls("n", "selector: {matchLabels: {app: a}}, portLevelMtls: {80: {mode: STRICT}}"),
    "apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\nspec: {trustDomain: x.y}\n",
    "apiVersion: netproxy.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: n}\n",
    "kind: Unknown\n",
]
DOCUMENTS = [source.parse(text.lstrip().encode(), f"{n}.yaml")[0][0] for n, text in enumerate(POOL)]


def consistent(snapshot: Snapshot) -> None:
    services = {s.key().removeprefix("service/"): s for s in snapshot.shards.values() if isinstance(s, ServiceShard)}
    workloads = {s.key().removeprefix("workload/"): s for s in snapshot.shards.values() if isinstance(s, WorkloadShard)}
    vips = [vip for s in services.values() for vip in s.vips]
    externals = [s for s in snapshot.shards.values() if isinstance(s, ExternalShard)]
    hosts = [host for s in externals for host in s.hosts]
    assert len({host.name for host in hosts}) == len(hosts)
    vips += [vip for host in hosts for vip in host.vips]
    addresses = [address for w in workloads.values() for address in w.addresses]
    assert len(vips + addresses) == len(set(vips + addresses))
    for found in services.values():
        for p in found.ports:
            assert len({(e.host, e.port) for e in p.endpoints}) == len(p.endpoints)
            for endpoint in p.endpoints:
                assert endpoint.meshed == bool(endpoint.identity)
                if endpoint.workload:
                    owner = workloads[endpoint.workload]
                    assert endpoint.host in owner.addresses
                    assert endpoint.meshed <= owner.meshed
                    assert endpoint.identity in ("", owner.identity)
                else:
                    assert not endpoint.meshed
            assert p.tcp_rule is None or (p.rules is None and p.protocol == "tcp")
            for rule in (*(p.rules or ()), *filter(None, [p.tcp_rule])):
                assert bool(rule.matches) is (rule is not p.tcp_rule)
                for backend in rule.backends:
                    if not backend.invalid:
                        assert backend.port in {q.port for q in services[backend.service].ports}
    for key, found_shard in snapshot.shards.items():
        assert found_shard.key() == key
        assert decode_shard(key, encode_shard(found_shard)) == found_shard


@given(st.lists(st.sampled_from(DOCUMENTS), max_size=25))
def test_no_subset_of_objects_gives_a_dangling_reference(documents: list[Document]) -> None:
    valid = validate(documents)
    snapshot = build_snapshot(valid.objects, Context("node-a"), valid.errors)
    consistent(snapshot)
    refused = {error.obj for error in snapshot.rejected}
    for obj in valid.objects:
        assert obj.title in snapshot.statuses
        status = snapshot.statuses[obj.title].get("Accepted")
        assert status is not None
        key = f"{obj.resource.kind.lower().removesuffix('service') or 'service'}/{obj.name}"
        if key in snapshot.shards:
            assert status.status == "True"
        elif obj.resource.kind in ("Service", "Workload", "ExternalService"):
            assert obj.title in refused
    again = build_snapshot(valid.objects, Context("node-a", snapshot.vips), valid.errors)
    assert again.shards == snapshot.shards
    assert again.statuses == snapshot.statuses


@given(st.permutations(range(6)))
def test_the_order_of_files_changes_nothing(order: list[int]) -> None:
    text = [service("a"), service("b"), attached("a1", "10.0.0.1", "a"), attached("a2", "10.0.0.2", "a")]
    text += [
        route("r", f"{{backendRefs: [{to('b')}]}}", '{group: "", kind: Service, name: a}'),
        slice_of("b", "{addresses: [10.0.0.2]}"),
    ]
    assert build(*(text[i] for i in order)).shards == build(*text).shards


def test_a_service_of_the_host() -> None:
    spec = "ports: [{port: 8080}, {port: 9000}, {port: 9001}], steering: auto"
    traffic = "traffic: {inbound: {excludePorts: [9001]}}"
    snapshot = build(
        workload("backup", "10.0.0.1", f"attach: {{systemdUnit: backup.service}}, {spec}, {traffic}"),
        workload("other", "10.0.0.2", "attach: {cgroup: /a/b}, traffic: {inbound: {includePorts: [80]}}"),
        workload("twin", "10.0.0.3", "attach: {cgroup: /a/b}"),
        service("backup", "{name: a, port: 80, targetPort: 8080}, {name: b, port: 81, targetPort: 9001}"),
    )
    backup, other = snapshot.local_workloads
    assert (backup.netns, backup.unit, backup.cgroup, backup.steering) == ("", "backup.service", "", "ebpf")
    assert (backup.traffic.in_include_ports, backup.traffic.in_exclude_ports) == ((8080, 9000), ())
    assert (other.cgroup, other.traffic.in_include_ports) == ("/a/b", ())
    assert [str(error) for error in snapshot.rejected if "is attached already by Workload shop/other" in str(error)]
    # Others speak mesh TLS to what is its own, and to nothing else at its address.
    ports = {port.port: port.endpoints[0].meshed for port in shard(snapshot, "backup").ports}
    assert ports == {80: True, 81: False}
