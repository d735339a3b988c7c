"""TCPRoutes; what HTTPRoute and TCPRoute do to one another; matches as they reach the shards."""

from __future__ import annotations

import pytest

from netproxy.addr import ServiceKey
from netproxy.config.shard import Backend, HeaderMatch, Match, QueryMatch, Rule, ServicePort, ServiceShard
from netproxy.config.snapshot import Snapshot

from .meshes import attached, build, route, service, tcp_route, to, workload

DB = service("db", "{name: a, port: 9000}, {name: mysql, port: 3306}, {name: http, port: 80}")
V1 = service("v1", "{name: x, port: 9000}")
OLD, YOUNG = "creationTimestamp: 2025-01-01T00:00:00Z", "creationTimestamp: 2025-02-01T00:00:00Z"


def parent(port: int | None = None, name: str = "db") -> str:
    return f'{{group: "", kind: Service, name: {name}{f", port: {port}" if port else ""}}}'


def ports(snapshot: Snapshot, name: str = "db") -> dict[int, ServicePort]:
    found = snapshot.shards[f"service/shop/{name}"]
    assert isinstance(found, ServiceShard)
    return {p.port: p for p in found.ports}


def said(snapshot: Snapshot, obj: str, kind: str = "Accepted") -> tuple[str, str, str] | None:
    found = snapshot.statuses[obj].get(kind)
    return (found.status, found.reason, found.message) if found else None


def routed(snapshot: Snapshot) -> dict[int, str]:
    """The route of each port."""
    return {
        number: (port.tcp_rule or (port.rules or (Rule("", (), ()),))[0]).name
        for number, port in ports(snapshot).items()
    }


def test_a_tcp_route_shares_connections_by_weight() -> None:
    snapshot = build(
        DB,
        V1,
        service("v2", "{name: http, port: 80}"),
        tcp_route("r", f"{to('v1', 9000, ', weight: 9')}, {to('v2', 80, ', weight: 0')}", parent(9000)),
    )
    found = ports(snapshot)
    backends = (Backend(ServiceKey("shop/v1"), 9000, 9), Backend(ServiceKey("shop/v2"), 80, 0))
    assert found[9000].tcp_rule == Rule("TCPRoute shop/r rule 0", (), backends)
    assert (found[9000].protocol, found[9000].rules) == ("tcp", None)
    assert (found[3306].tcp_rule, found[80].tcp_rule) == (None, None)
    assert said(snapshot, "TCPRoute shop/r") == ("True", "Accepted", "")
    assert said(snapshot, "TCPRoute shop/r", "ResolvedRefs") == ("True", "ResolvedRefs", "")
    assert [p.parent for p in snapshot.statuses["TCPRoute shop/r"].parents] == ["Service shop/db port 9000"]


@pytest.mark.parametrize(
    ("ref", "reason", "message"),
    [
        (to("gone"), "BackendNotFound", "Service shop/gone does not exist"),
        (to("v1", 1), "BackendNotFound", "Service shop/v1 has no TCP port 1"),
        ("{name: v1, port: 9000, namespace: other}", "RefNotPermitted", "Service other/v1 is in another namespace"),
        ("{name: v1, kind: Pod}", "InvalidKind", "core Pod can't be a backend, only a Service"),
    ],
)
def test_a_backend_that_cant_be_used_keeps_its_share(ref: str, reason: str, message: str) -> None:
    snapshot = build(DB, V1, tcp_route("r", f"{to('v1', 9000)}, {ref}"))
    rule = ports(snapshot)[9000].tcp_rule
    assert rule is not None
    assert [backend.invalid for backend in rule.backends] == ["", message]
    assert said(snapshot, "TCPRoute shop/r") == ("True", "Accepted", "")
    assert said(snapshot, "TCPRoute shop/r", "ResolvedRefs") == ("False", reason, message)


def test_which_ports_a_tcp_route_means() -> None:
    def names(*parents: str) -> set[int]:
        return {
            n for n, rule in routed(build(DB, V1, tcp_route("r", to("v1", 9000), ", ".join(parents)))).items() if rule
        }

    assert names(parent()) == {9000, 3306}  # port 80 is declared HTTP
    assert names(parent(80)) == {80}
    assert names(parent(9000), parent(3306)) == {9000, 3306}
    assert names(parent(), parent(9000)) == {9000, 3306}
    assert names(parent(1)) == set()
    only_http = build(service("db"), tcp_route("r", to("db")))
    assert said(only_http, "TCPRoute shop/r") == (
        "False",
        "UnsupportedProtocol",
        "the ports of Service shop/db are HTTP: name one to have it relayed unread",
    )


def test_http_that_workloads_would_not_take_unread_is_told() -> None:
    """They end it, since its x-forwarded-client-cert could be anybody's."""

    def warned(*workloads: str, to_port: int = 80) -> str:
        plain = "{name: x, port: 90, targetPort: 9000}"
        web = service("web", f"{{name: http, port: 80, targetPort: 8080}}, {plain}")
        snapshot = build(service("db", plain), web, tcp_route("r", to("web", to_port), parent(90)), *workloads)
        assert said(snapshot, "TCPRoute shop/r") == ("True", "Accepted", "")
        found = snapshot.statuses["TCPRoute shop/r"].get("Warning")
        return found.message if found is not None else ""

    text = "port 8080 of Workload shop/web-1 is for HTTP too, so HTTP/1.1 that is relayed to it unread is ended"
    assert warned(attached("web-1", "10.0.0.1", "web")).startswith(text)
    assert warned(attached("web-1", "10.0.0.1", "web"), to_port=90) == ""
    assert warned(workload("web-1", "10.0.0.1", app="web")) == ""
    assert warned(attached("web-1", "10.0.0.1", "web", "ports: [{port: 8080, appProtocol: tcp}]")) == ""


@pytest.mark.parametrize("http_first", [True, False])
def test_an_http_route_comes_before_a_tcp_route(http_first: bool) -> None:
    texts = [route("h", f"{{backendRefs: [{to('v1', 9000)}]}}", parent(9000), YOUNG)]
    texts.insert(http_first, tcp_route("t", to("v1", 9000), parent(9000), OLD))
    snapshot = build(DB, V1, *texts)
    found = ports(snapshot)[9000]
    assert (found.protocol, found.tcp_rule) == ("http", None)
    assert said(snapshot, "HTTPRoute shop/h") == ("True", "Accepted", "")
    assert said(snapshot, "TCPRoute shop/t") == (
        "False",
        "Conflicted",
        f"port 9000 is routed by HTTPRoute shop/h at mesh.yaml:{11 if http_first else 16}, which comes first",
    )
    assert snapshot.rejected == ()


def test_of_two_tcp_routes_the_oldest_wins() -> None:
    snapshot = build(
        DB,
        V1,
        tcp_route("a", to("v1", 9000), parent(9000), YOUNG),
        tcp_route("b", to("v1", 9000), f"{parent(9000)}, {parent(3306)}", OLD),
        tcp_route("c", to("v1", 9000), parent()),
    )
    assert routed(snapshot) == {9000: "TCPRoute shop/b rule 0", 3306: "TCPRoute shop/b rule 0", 80: ""}
    conflict = "port {} is routed by TCPRoute shop/b at mesh.yaml:16, which comes first"
    assert said(snapshot, "TCPRoute shop/a") == ("False", "Conflicted", conflict.format(9000))
    both = f"{conflict.format(9000)}; {conflict.format(3306)}"
    assert said(snapshot, "TCPRoute shop/c") == ("False", "Conflicted", both)


def test_a_tcp_route_that_gets_some_of_its_ports_is_accepted_with_a_warning() -> None:
    snapshot = build(
        DB, V1, tcp_route("a", to("v1", 9000), parent(9000)), tcp_route("b", to("v1", 9000), parent(), YOUNG)
    )
    assert routed(snapshot) == {9000: "TCPRoute shop/b rule 0", 3306: "TCPRoute shop/b rule 0", 80: ""}
    snapshot = build(
        DB, V1, tcp_route("a", to("v1", 9000), parent(9000), OLD), tcp_route("b", to("v1", 9000), parent())
    )
    assert routed(snapshot) == {9000: "TCPRoute shop/a rule 0", 3306: "TCPRoute shop/b rule 0", 80: ""}
    assert said(snapshot, "TCPRoute shop/b") == ("True", "Accepted", "")
    assert said(snapshot, "TCPRoute shop/b", "Warning") == (
        "True",
        "Conflicted",
        "port 9000 is routed by TCPRoute shop/a at mesh.yaml:11, which comes first",
    )


def test_what_a_tcp_route_sends_to_is_opaque_inbound() -> None:
    snapshot = build(
        DB,
        service("v1", "{name: x, port: 9000, targetPort: 7000}"),
        workload("v1", "10.0.0.1"),
        workload("db", "10.0.0.2"),
        tcp_route("r", to("v1", 9000), parent(9000)),
    )
    found = snapshot.shards["workload/shop/v1"]
    assert found.protocols == {7000: "tcp"}  # type: ignore[union-attr]
    assert snapshot.shards["workload/shop/db"].protocols == {9000: "tcp", 80: "http", 3306: "tcp"}  # type: ignore[union-attr]


def test_headless_services_are_no_parents_and_known_as_headless() -> None:
    snapshot = build(
        service("db", "{name: a, port: 9000}", "clusterIP: None"),
        service("bare", "", "clusterIP: None"),
        workload("db", "10.0.0.2"),
        tcp_route("r", to("db", 9000)),
    )
    found = snapshot.shards["service/shop/db"]
    assert isinstance(found, ServiceShard)
    assert (found.headless, found.vips) == (True, ())
    assert [e.host for e in found.ports[0].endpoints] == ["10.0.0.2"]
    assert snapshot.shards["service/shop/bare"] == ServiceShard("shop", "bare", (), (), True)
    assert said(snapshot, "TCPRoute shop/r") == (
        "False",
        "NoMatchingParent",
        "Service shop/db is headless: there is no address to route",
    )
    warning = "a headless Service without a TCP port: its name stands for no address"
    assert said(snapshot, "Service shop/bare", "Warning") == ("True", "NoPorts", warning)
    assert said(snapshot, "Service shop/db", "Warning") is None


def test_matches_reach_the_shards() -> None:
    match = """{
      path: {type: RegularExpression, value: "/a/.*/"}, method: POST,
      headers: [{name: X-B, value: "b+", type: RegularExpression}, {name: x-a, value: A}, {name: x-b, value: c}],
      queryParams: [{name: q, value: "1"}, {name: Q, value: "2+", type: RegularExpression}, {name: q, value: "3"}]}"""
    (rule,) = ports(build(service("db"), route("r", f"{{matches: [{match}]}}", parent(80))))[80].rules or ()
    assert rule.matches == (
        Match(
            "regex",
            "/a/.*/",
            (HeaderMatch("x-b", "b+", "regex"), HeaderMatch("x-a", "A")),
            (QueryMatch("q", "1"), QueryMatch("Q", "2+", "regex")),
            "POST",
        ),
    )
