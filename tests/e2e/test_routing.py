"""Which rule a request gets, asked with curl: the tables of the Gateway API's conformance tests, and TCP by weight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.mesh import Journal, Mesh, dial
from tests.e2e.servers.opaque import GREETING

BACKENDS = ("v1", "v2", "v3")


def rule(to: str, *matches: dict[str, Any]) -> dict[str, Any]:
    return {"matches": list(matches), "backendRefs": [{"name": to, "port": 80}]} if matches else {
        "backendRefs": [{"name": to, "port": 80}]
    }  # fmt: skip


def exact(path: str, **more: Any) -> dict[str, Any]:
    return {"path": {"type": "Exact", "value": path}, **more}


def prefix(path: str, **more: Any) -> dict[str, Any]:
    return {"path": {"type": "PathPrefix", "value": path}, **more}


def regex(path: str, **more: Any) -> dict[str, Any]:
    return {"path": {"type": "RegularExpression", "value": path}, **more}


def headers(kind: str = "Exact", **values: str) -> dict[str, Any]:
    return {"headers": [{"type": kind, "name": name, "value": value} for name, value in values.items()]}


def query(kind: str = "Exact", **values: str) -> dict[str, Any]:
    return {"queryParams": [{"type": kind, "name": name, "value": value} for name, value in values.items()]}


ROUTES: dict[str, list[dict[str, Any]]] = {
    "exact": [rule("v1", exact("/one")), rule("v2", exact("/two"))],
    "order": [
        rule("v3", prefix("/match")),
        rule("v2", exact("/match/exact")),
        rule("v1", exact("/match"), prefix("/match/prefix")),
        rule("v3", exact("/match/exact/one")),
        rule("v2", prefix("/match/prefix/one")),
    ],
    "header": [
        rule("v1", headers(version="one")),
        rule("v2", headers(version="two")),
        rule("v1", headers(version="two", color="orange")),
        rule("v1", headers(color="blue"), headers(color="green")),
        rule("v2", headers(color="red"), headers(color="yellow")),
    ],
    "matching": [
        rule("v1", prefix("/"), headers(version="one")),
        rule("v2", prefix("/v2"), headers(version="two")),
    ],
    "method": [
        rule("v1", {"method": "POST"}),
        rule("v2", {"method": "GET"}),
        rule("v1", prefix("/path1", method="GET")),
        rule("v2", headers(version="one") | {"method": "PUT"}),
        rule("v3", prefix("/path2", method="POST", **headers(version="two"))),
        rule("v1", prefix("/path3", method="PATCH"), prefix("/path4", method="DELETE", **headers(version="three"))),
        rule("v1", prefix("/path5")),
        rule("v2", {"method": "PATCH"}),
        rule("v3", headers(version="four")),
    ],
    "query": [
        rule("v1", query(animal="whale")),
        rule("v2", query(animal="dolphin")),
        rule("v3", query(animal="dolphin", color="blue")),
        rule("v3", query(ANIMAL="Whale")),
        rule("v1", prefix("/path1", **query(animal="whale"))),
        rule("v2", headers(version="one") | query(animal="whale")),
        rule("v3", prefix("/path2", **query(animal="whale"), **headers(version="two"))),
        rule("v1", prefix("/path3", **query(animal="shark")),
             prefix("/path4", **query(animal="dolphin"), **headers(version="three"))),
        rule("v1", prefix("/path5")),
        rule("v2", headers(version="four")),
        rule("v3", query(animal="hydra")),
    ],
    "regex": [
        rule("v1", regex("/v[0-9]+(/.*)?")),
        rule("v2", headers("RegularExpression", version="(alpha|beta)-[0-9]{1,3}")),
        rule("v3", query("RegularExpression", animal="wh.*|shark")),
        rule("v3", exact("/v9")),
        rule("v2", prefix("/v9/long/prefix/that/is/longer/than/the/expression")),
    ],
}  # fmt: skip

# A request as curl's arguments after the path; the backend that gets it, or the status of the refusal.
REQUESTS: dict[str, list[tuple[str, tuple[str, ...], str]]] = {
    "exact": [
        ("/one", (), "v1"),
        ("/two", (), "v2"),
        ("/one?x=/two", (), "v1"),
        ("/", (), "404"),
        ("/one/example", (), "404"),
        ("/two/", (), "404"),
        ("/Two", (), "404"),
        ("//one", (), "404"),
        ("/%6fne", (), "404"),
    ],
    "order": [
        ("/match", (), "v1"),
        ("/match/exact", (), "v2"),
        ("/match/exact/one", (), "v3"),
        ("/match/prefix/one/any", (), "v2"),
        ("/match/prefix/any", (), "v1"),
        ("/match/any", (), "v3"),
        ("/matches", (), "404"),
    ],
    "header": [
        ("/", ("-H", "version: one"), "v1"),
        ("/", ("-H", "version: two"), "v2"),
        ("/", ("-H", "version: two", "-H", "color: orange"), "v1"),
        ("/", ("-H", "VERSION: two", "-H", "Color: orange"), "v1"),
        ("/", ("-H", "color: blue"), "v1"),
        ("/", ("-H", "color: green"), "v1"),
        ("/", ("-H", "color: red"), "v2"),
        ("/", ("-H", "color: yellow"), "v2"),
        ("/", ("-H", "version: two", "-H", "color: blue"), "v2"),
        ("/", ("-H", "color: orange"), "404"),
        ("/", ("-H", "color: purple"), "404"),
        ("/", ("-H", "color: Blue"), "404"),
        ("/", ("-H", "version: one", "-H", "version: two"), "404"),
        ("/", (), "404"),
    ],
    "matching": [
        ("/", (), "v1"),
        ("/example", (), "v1"),
        ("/", ("-H", "version: one"), "v1"),
        ("/v2", (), "v2"),
        ("/v2/", (), "v2"),
        ("/v2/example", (), "v2"),
        ("/", ("-H", "version: two"), "v2"),
        ("/v2example", (), "v1"),
        ("/foo/v2/example", (), "v1"),
    ],
    "method": [
        ("/", ("-X", "POST"), "v1"),
        ("/", (), "v2"),
        ("/", ("-I",), "404"),
        ("/path1", (), "v1"),
        ("/", ("-X", "PUT", "-H", "version: one"), "v2"),
        ("/path2", ("-X", "POST", "-H", "version: two"), "v3"),
        ("/path3", ("-X", "PATCH"), "v1"),
        ("/path4", ("-X", "DELETE", "-H", "version: three"), "v1"),
        ("/path1", ("-X", "PUT"), "404"),
        ("/path4", ("-X", "DELETE"), "404"),
        ("/path5", ("-X", "PATCH"), "v1"),
        ("/", ("-X", "PATCH", "-H", "version: four"), "v2"),
        ("/", ("-X", "OPTIONS"), "404"),
        ("/", ("-X", "get"), "404"),
    ],
    "query": [
        ("/?animal=whale", (), "v1"),
        ("/?animal=dolphin", (), "v2"),
        ("/?animal=dolphin&color=blue", (), "v3"),
        ("/?color=blue&x&animal=dolphin", (), "v3"),
        ("/?ANIMAL=Whale", (), "v3"),
        ("/?animal=whale&otherparam=irrelevant", (), "v1"),
        ("/?animal=dolphin&color=yellow", (), "v2"),
        ("/?animal=wh%61le&animal=dolphin", (), "v1"),
        ("/?color=blue", (), "404"),
        ("/?animal=dog", (), "404"),
        ("/?animal=whaledolphin", (), "404"),
        ("/?animal=Whale", (), "404"),
        ("/", (), "404"),
        ("/path1?animal=whale", (), "v1"),
        ("/?animal=whale", ("-H", "version: one"), "v2"),
        ("/path2?animal=whale", ("-H", "version: two"), "v3"),
        ("/path3?animal=shark", (), "v1"),
        ("/path4?animal=dolphin", ("-H", "version: three"), "v1"),
        ("/path5?animal=hydra", (), "v1"),
        ("/?animal=hydra", ("-H", "version: four"), "v2"),
        ("/path3", (), "404"),
        ("/path4?animal=shark", (), "404"),
    ],
    "regex": [
        ("/v1", (), "v1"),
        ("/v12/any", (), "v1"),
        ("/v9", (), "v3"),
        ("/v9/long/prefix/that/is/longer/than/the/expression", (), "v1"),
        ("/v", (), "404"),
        ("/v1x", (), "404"),
        ("/x/v1", (), "404"),
        ("/", ("-H", "version: beta-12"), "v2"),
        ("/", ("-H", "version: xbeta-12"), "404"),
        ("/", ("-H", "version: beta-1234"), "404"),
        ("/?animal=whole%20one", (), "v3"),
        ("/?animal=shark", (), "v3"),
        ("/?animal=sharks", (), "404"),
    ],
}


SHARES = {"shared": {"v1": 70, "v2": 30}, "partly": {"v1": 5, "v3": 3, "missing": 2}}
CONNECTIONS = 200


def tcp_route(name: str, shares: dict[str, int]) -> dict[str, Any]:
    backends = [{"name": f"{app}-tcp", "port": 9000, "weight": weight} for app, weight in shares.items()]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1alpha2",
        "kind": "TCPRoute",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": name}],
            "rules": [{"backendRefs": backends}],
        },
    }


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client = mesh.pod("client")
        self.journals: dict[str, Journal] = {}
        for number, name in enumerate(BACKENDS, 10):
            pod = mesh.pod(name, attach=False)  # the rules of the client are what is asked
            mesh.put(mesh.service(name, {"app": name}, [f"240.240.0.{number}"]))
            journal = mesh.stage.folder / f"{name}.journal"
            mesh.serve(pod, "origin", "8080", str(journal), name)
            self.journals[name] = Journal(mesh.stage.folder / f"{name}-tcp.journal")
            mesh.serve(pod, "opaque", "9000", str(self.journals[name].path), "greet", port=9000)
            port = {"port": 9000, "targetPort": 9000, "appProtocol": "tcp"}
            mesh.put(mesh.service(f"{name}-tcp", {"app": name}, [f"240.240.1.{number}"], [port]))
        for number, name in enumerate(ROUTES, 20):
            mesh.put(mesh.service(name, {"app": "nobody"}, [f"240.240.0.{number}"]), mesh.route(name, ROUTES[name]))
        for number, (name, shares) in enumerate(SHARES.items(), 40):
            port = {"port": 9000, "targetPort": 9000}
            mesh.put(mesh.service(name, {"app": "nobody"}, [f"240.240.0.{number}"], [port]), tcp_route(name, shares))
        self.vips = {name: f"240.240.0.{number}" for number, name in enumerate(ROUTES, 20)}
        self.vips |= {name: f"240.240.0.{number}" for number, name in enumerate(SHARES, 40)}

    def ask(self, service: str, path: str, *argv: str) -> str:
        """The backend that answered, or the status."""
        run = self.client.run(
            "curl", "-s", "--path-as-is", "-w", "\n%{http_code}", *argv, f"http://{self.vips[service]}{path}"
        )
        body, _, status = run.stdout.rpartition("\n")
        return str(json.loads(body)["server"]) if status == "200" else status


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"r{os.getpid() % 100000}", tmp_path_factory.mktemp("routing"), nodes=1) as mesh:
        made = Lab(mesh)
        mesh.start()
        yield made


@pytest.mark.parametrize("service", ROUTES)
def test_table(lab: Lab, service: str) -> None:
    assert not lab.mesh.agents[0].status()["rejected"]
    found = [(path, argv, lab.ask(service, path, *argv)) for path, argv, _ in REQUESTS[service]]
    assert found == REQUESTS[service]


@pytest.mark.parametrize("service", SHARES)
def test_tcp_by_weight(lab: Lab, service: str) -> None:
    """Exactly, not likely. The share of a backend that does not exist is reset."""
    before = {name: journal.count("open") for name, journal in lab.journals.items()}
    refused = 0
    for _ in range(CONNECTIONS):
        try:
            with dial(lab.client, lab.vips[service], 9000) as sock:
                assert sock.recv(100) == GREETING
        except ConnectionResetError:
            refused += 1
    found = {name: journal.count("open") - before[name] for name, journal in lab.journals.items()}
    found["missing"] = refused
    total = sum(SHARES[service].values())
    assert found == {
        name: CONNECTIONS * SHARES[service].get(name, 0) // total for name in (*BACKENDS, "missing")
    }  # fmt: skip
    reason = {"reason": "BACKEND_INVALID", "destination_service": f"shop/{service}"}
    assert lab.mesh.agents[0].metric("netproxy_tcp_connections_closed_total", **reason) == refused


def test_an_http_request_on_a_port_of_a_tcp_route_is_not_looked_at(lab: Lab) -> None:
    with dial(lab.client, lab.vips["shared"], 9000) as sock:
        request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
        sock.sendall(request)
        with sock.makefile("rb") as file:
            assert file.read(len(GREETING) + len(request)) == GREETING + request


@pytest.mark.parametrize(("service", "status"), [("matching", b"200"), ("exact", b"404"), ("order", b"404")])
def test_connect_has_no_path(lab: Lab, service: str, status: bytes) -> None:
    """Only the prefix / is for it."""
    with dial(lab.client, lab.vips[service], 80) as sock, sock.makefile("rb") as file:
        sock.sendall(b"CONNECT one.example:80 HTTP/1.1\r\nhost: one.example:80\r\n\r\n")
        assert file.readline().split()[1] == status
