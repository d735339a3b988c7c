"""HTTP from a pod on one node to a pod on the other, through both agents; routing on one node."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.mesh import NAMESPACE, Answer, HttpClient, Journal, Mesh, Truncated, get, reset_on_close, socket_in

SPIFFE = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/"
WEB, WEB6 = "240.240.0.10", "fd00:240::10"
XFCC = "x-forwarded-client-cert"


class Web:
    """A mesh with clients of all families on node a, and `origin` servers on node b."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.journal = Journal(mesh.stage.folder / "web.journal")
        self.client = mesh.pod("client")
        self.client4 = mesh.pod("client4", families=(4,))
        self.client6 = mesh.pod("client6", families=(6,))
        self.outside = mesh.pod("outside", attach=False)
        self.server = mesh.pod("web", 1)
        self.server4 = mesh.pod("web4", 1, families=(4,))
        self.server6 = mesh.pod("web6", 1, families=(6,))

    def service(self, name: str, number: int, app: str, target: int = 8080) -> None:
        ports = [{"name": "http", "port": 80, "targetPort": target}]
        self.mesh.put(self.mesh.service(name, {"app": app}, [f"240.240.0.{number}", f"fd00:240::{number}"], ports))

    def told(self, answer: Answer) -> dict[str, Any]:
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json()
        return found


def field(told: dict[str, Any], name: str) -> list[str]:
    return [value for key, value in told["headers"] if key == name]


def backend(name: str, weight: int = 1, port: int = 80) -> dict[str, Any]:
    return {"name": name, "port": port, "weight": weight}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("http")
    with Mesh(f"h{os.getpid() % 100000}", folder, families=(4, 6)) as mesh:
        made = Web(mesh)
        for number, name in enumerate(("web", "web4", "web6"), 10):
            made.service(name, number, name)
        made.service("refused", 20, "web", target=9999)
        made.service("empty", 21, "nobody")
        made.service("abrupt", 25, "web", target=9413)
        for number, name in enumerate(("timed", "routed", "half"), 22):
            made.service(name, number, "web")
        any_path = {"matches": [{"path": {"value": "/"}}]}
        mesh.put(
            mesh.route("timed", [{**any_path, "backendRefs": [backend("web")], "timeouts": {"request": "300ms"}}]),
            mesh.route("routed", [{"matches": [{"path": {"value": "/known"}}], "backendRefs": [backend("web")]}]),
            mesh.route("half", [{**any_path, "backendRefs": [backend("web"), backend("missing")]}]),
        )
        for pod in (made.server, made.server4, made.server6):
            mesh.serve(pod, "origin", "8080", str(folder / f"{pod.name}.journal"), pod.name)
        mesh.start()
        yield made


# -- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "vip"), [("client", WEB), ("client", WEB6), ("client4", WEB), ("client6", WEB6)], ids=str
)
def test_curl_by_vip(web: Web, client: str, vip: str) -> None:
    host = f"[{vip}]" if ":" in vip else vip
    url = f"http://{host}/a/b%20c?q=1&r=%2f"
    told = json.loads(web.mesh.stage.pods[client].run("curl", "-sSf", "-H", "x-test: yes", url).stdout)
    assert (told["server"], told["method"], told["target"]) == ("web", "GET", "/a/b%20c?q=1&r=%2f")
    assert field(told, "host") == [host]
    assert field(told, "x-test") == ["yes"]
    assert field(told, "user-agent")[0].startswith("curl/")


def test_endpoints_of_one_family(web: Web) -> None:
    """A client reaches what has an address that it can dial; for the rest there is no endpoint."""
    assert web.told(get(web.client4, "240.240.0.11", "/"))["server"] == "web4"
    assert web.told(get(web.client6, "fd00:240::12", "/"))["server"] == "web6"
    # A virtual address says nothing about the family of what is behind it.
    assert web.told(get(web.client, "fd00:240::11", "/"))["server"] == "web4"
    assert web.told(get(web.client, "240.240.0.12", "/"))["server"] == "web6"
    for client, vip in ((web.client4, "240.240.0.12"), (web.client6, "fd00:240::11")):
        refused(get(client, vip, "/"), 503, "UH", "NO_HEALTHY_ENDPOINT")


def test_pod_address(web: Web) -> None:
    """Not routed, but authenticated."""
    for address in web.server.addresses:
        with HttpClient(web.client, address, 8080) as client:
            told = web.told(client.get("/direct"))
        assert told["target"] == "/direct"
        assert field(told, XFCC)[0].endswith(f"URI={SPIFFE}client")


def test_client_identity_is_told(web: Web) -> None:
    """And never believed when the client says it."""
    forged = f"x-Forwarded-client-CERT: By=x;Hash=0;URI={SPIFFE}admin"
    told = web.told(get(web.client, WEB, "/", forged, forged))
    (value,) = [value for key, value in told["headers"] if key.lower() == XFCC]
    parts = dict(part.split("=", 1) for part in value.split(";"))
    assert parts["URI"] == f"{SPIFFE}client"
    assert parts["By"] == f"{SPIFFE}web"
    assert len(bytes.fromhex(parts["Hash"])) == 32
    with HttpClient(web.outside, web.server.ip, 8080) as client:
        told = web.told(client.get("/", forged))
    assert not [key for key, _ in told["headers"] if "forwarded-client" in key.lower()]


def test_hop_by_hop_fields_end_at_the_hop(web: Web) -> None:
    sent = ("connection: x-secret, keep-alive", "x-secret: 1", "keep-alive: timeout=9", "proxy-connection: keep-alive")
    told = web.told(get(web.client, WEB, "/", *sent, "te: trailers, deflate", "upgrade: h2c", "x-kept: yes"))
    names = {key for key, _ in told["headers"]}
    assert not names & {"x-secret", "keep-alive", "proxy-connection", "upgrade"}
    assert field(told, "x-kept") == ["yes"]
    assert field(told, "te") == ["trailers"]
    answer = get(web.client, WEB, "/hop")
    names = {key for key, _ in answer.headers}
    assert not names & {"x-private", "keep-alive", "proxy-connection", "upgrade", "x-netproxy-reason"}
    assert answer.get("x-kept") == "yes"


def test_absolute_form(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        told = web.told(client.get("http://elsewhere.example/abs?x"))
    assert (told["target"], field(told, "host")) == ("/abs?x", ["elsewhere.example"])


# -- connections ----------------------------------------------------------------------------------------------


def test_connections_are_kept_and_shared(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        seen = [web.told(client.get(f"/{n}"))["connection"] for n in range(20)]
    opened = web.journal.count("open")
    seen += [web.told(get(web.client, WEB, f"/{n}"))["connection"] for n in range(20)]
    assert len(set(seen)) == 1
    assert web.journal.count("open") == opened


def test_origin_that_closes_after_each_answer(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        for _ in range(5):
            answer = client.get("/close")
            assert (answer.status, answer.body) == (200, b"last")
            assert answer.get("connection") is None


def test_client_that_closes_after_its_request(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        answer = client.get("/", "connection: close")
        assert web.told(answer)["target"] == "/"
        assert answer.get("connection") == "close"
        assert client.at_end()


def test_pipelined_requests_are_answered_in_order(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        body = b"POST /body HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\n\r\nbody"
        client.send(b"".join(b"GET /%d HTTP/1.1\r\nhost: web\r\n\r\n" % n + body for n in range(30)))
        for n in range(30):
            assert web.told(client.answer())["target"] == f"/{n}"
            assert web.told(client.answer())["length"] == 4


def test_client_that_breaks_off_takes_its_request_along(web: Web) -> None:
    before = web.journal.count("gone")
    with HttpClient(web.client, WEB) as client:
        client.send(b"GET /hang HTTP/1.1\r\nhost: web\r\n\r\n")
        wait_for(lambda: "/hang" in {r["target"] for r in web.journal.all("request")[-3:]}, "the request to arrive")
        reset_on_close(client.sock)
    wait_for(lambda: web.journal.count("gone") > before, "the origin to see the client leave")


# -- bodies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [204, 304])
def test_answers_that_never_have_a_body(web: Web, code: int) -> None:
    with HttpClient(web.client, WEB) as client:
        for _ in range(2):
            answer = client.get(f"/status/{code}")
            assert (answer.status, answer.get("x-kept")) == (code, "yes")
            assert answer.get("content-length") == ("5" if code == 304 else None)
            assert answer.get("transfer-encoding") is None
        assert web.told(client.get("/after"))["target"] == "/after"


@pytest.mark.parametrize("path", ["/", "/octets/1000000", "/octets/1000000/chunked", "/chunked"])
def test_head(web: Web, path: str) -> None:
    if path.startswith("/octets"):
        path = path.replace("1000000", "0")  # the origin would send them
    with HttpClient(web.client, WEB) as client:
        answer = client.get(path, method="HEAD")
        assert answer.status == 200
        assert answer.get("content-length") or answer.get("transfer-encoding")
        assert web.told(client.get("/after"))["target"] == "/after"


def test_chunked_both_ways_with_trailers(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        head = b"POST /x HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\ntrailer: x-check\r\n\r\n"
        client.send(head + b'3;a="b"\r\nabc\r\n1')
        client.send(b"0\r\n0123456789abcdef\r\n0\r\nX-Check: 19\r\n\r\n")
        told = web.told(client.answer())
        assert told["length"] == 19
        assert told["sha256"] == hashlib.sha256(b"abc0123456789abcdef").hexdigest()
        assert told["trailers"] == [["x-check", "19"]]
        answer = client.get("/chunked", "te: trailers")
        assert answer.body == b"hello world"
        assert answer.get("trailer") == "x-sum"
        assert answer.trailers == [("x-sum", "11")]
        assert client.get("/octets/3000000/chunked").body == pattern(3_000_000)


def pattern(size: int) -> bytes:
    from tests.e2e.servers.origin import BLOCK

    return (BLOCK * (size // len(BLOCK) + 1))[:size]


def test_http_1_0_client(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        client.send(b"GET /old HTTP/1.0\r\nhost: web\r\n\r\n")
        assert web.told(client.answer())["target"] == "/old"
        assert client.at_end()
    with HttpClient(web.client, WEB) as client:
        client.send(b"GET /chunked HTTP/1.0\r\nhost: web\r\n\r\n")
        answer = client.answer()
        assert answer.get("transfer-encoding") is None
        assert answer.body == b"hello world"


def test_http_1_0_client_without_host(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        client.send(b"GET /old HTTP/1.0\r\n\r\n")
        told = web.told(client.answer())
    assert field(told, "host") == [WEB]
    with HttpClient(web.client6, WEB6) as client:
        client.send(b"GET /old HTTP/1.0\r\n\r\n")
        told = web.told(client.answer())
    assert field(told, "host") == [f"[{WEB6}]"]


@pytest.mark.parametrize("path", ["/http10", "/http10/until-close"])
def test_http_1_0_origin(web: Web, path: str) -> None:
    with HttpClient(web.client, WEB) as client:
        for _ in range(2):
            assert client.get(path).body == b"0123456789" * 30_000


def test_expect_continue_as_curl_does_it(web: Web) -> None:
    body = web.mesh.stage.folder / "body"
    body.write_bytes(pattern(3_000_000))
    found = web.client.run("curl", "-sSfv", "--data-binary", f"@{body}", f"http://{WEB}/post")
    assert "Expect: 100-continue" in found.stderr
    assert "HTTP/1.1 100" in found.stderr
    told = json.loads(found.stdout)
    assert (told["length"], told["sha256"]) == (3_000_000, hashlib.sha256(pattern(3_000_000)).hexdigest())


def test_expect_continue_waits_for_the_origin(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        client.send(b"POST /x HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n")
        line = client.sock.recv(1000)
        assert line.startswith(b"HTTP/1.1 100 ") and line.endswith(b"\r\n\r\n")
        client.send(b"body")
        assert web.told(client.answer())["length"] == 4
        # Refused without asking for the body.
        client.send(b"POST /early HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n")
        answer = client.answer()
        assert (answer.status, answer.before, answer.body) == (413, [], b"too large")


@pytest.mark.parametrize("how", ["length", "chunked"])
def test_large_upload(web: Web, how: str) -> None:
    body = web.mesh.stage.folder / "large"
    body.write_bytes(pattern(20_000_000))
    extra = ["-H", "transfer-encoding: chunked"] if how == "chunked" else []
    told = json.loads(web.client.run("curl", "-sSf", "-T", str(body), *extra, f"http://{WEB}/put").stdout)
    assert (told["method"], told["length"]) == ("PUT", 20_000_000)
    assert told["sha256"] == hashlib.sha256(pattern(20_000_000)).hexdigest()
    assert bool(field(told, "transfer-encoding")) == (how == "chunked")


def test_early_answer(web: Web) -> None:
    """The origin has said no; what the client still wants to send goes nowhere, but it can read the answer."""
    with HttpClient(web.client, WEB) as client:
        client.send(b"POST /early HTTP/1.1\r\nhost: web\r\ncontent-length: 100000000\r\n\r\n" + b"x" * 100_000)
        answer = client.answer()
        assert (answer.status, answer.body) == (413, b"too large")
        assert client.at_end()


def test_early_answer_of_an_application_that_closes_at_once(web: Web) -> None:
    """With most of the upload unread, so its own kernel resets the connection right behind the answer."""
    uploads, size = 10, 26_000_000

    def refuse_all() -> None:
        for _ in range(uploads):
            sock, _ = server.accept()
            with sock:
                seen = b""
                while b"\r\n\r\n" not in seen:
                    seen += sock.recv(1000)
                sock.sendall(b"HTTP/1.1 413 No\r\ncontent-length: 9\r\n\r\ntoo large")

    with socket_in(web.server, socket.AF_INET) as server:
        server.settimeout(20)
        server.bind(("0.0.0.0", 9413))
        server.listen()
        thread = threading.Thread(target=refuse_all)
        thread.start()
        found = []
        for _ in range(uploads):
            with HttpClient(web.client, "240.240.0.25") as client:
                client.send(f"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: {size}\r\n\r\n".encode())
                with contextlib.suppress(ConnectionError):
                    client.send(bytes(size))
                answer = client.answer()
                found.append((answer.status, answer.body, answer.get("connection")))
        thread.join()
    assert found == [(413, b"too large", "close")] * uploads


def test_upload_that_the_client_breaks_off(web: Web) -> None:
    """The origin must not take a part for the whole."""
    requests = web.journal.count("request")
    with HttpClient(web.client, WEB) as client:
        client.send(b"POST /broken HTTP/1.1\r\nhost: web\r\ncontent-length: 100\r\n\r\nabc")
        wait_for(lambda: web.journal.count("request") > requests, "the head to arrive")
    assert web.told(get(web.client, WEB, "/after"))["target"] == "/after"
    assert web.journal.count("request") == requests + 2


# -- what goes wrong upstream ---------------------------------------------------------------------------------


def refused(answer: Answer, status: int, flag: str, reason: str) -> dict[str, Any]:
    """It is an answer of ours; its body."""
    assert answer.status == status, answer
    assert answer.get("x-netproxy-reason") == flag
    assert answer.get("content-type") == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["reason"]) == (status, reason)
    assert body["title"]
    return body


@pytest.mark.parametrize("path", ["/torn", "/torn/chunked", "/torn/reset"])
def test_a_torn_answer_never_looks_whole(web: Web, path: str) -> None:
    with HttpClient(web.client, WEB) as client, pytest.raises((Truncated, ConnectionResetError)):
        client.get(path)
    found = web.client.run("curl", "-sS", f"http://{WEB}{path}", check=False)
    assert found.returncode in (18, 56), found  # partial file, failure in receiving


@pytest.mark.parametrize("what", ["status", "garbage", "lengths", "both", "bare-lf", "name", "huge", "switch"])
def test_malformed_answer(web: Web, what: str) -> None:
    with HttpClient(web.client, WEB) as client:
        refused(client.get(f"/malformed/{what}"), 502, "UPE", "UPSTREAM_PROTOCOL")
        assert web.told(client.get("/after"))["target"] == "/after"


def test_origin_that_closes_without_a_word(web: Web) -> None:
    with HttpClient(web.client, WEB) as client:
        refused(client.get("/silent"), 502, "UC", "UPSTREAM_CLOSED")
        assert web.told(client.get("/after"))["target"] == "/after"


def test_connection_refused(web: Web) -> None:
    body = refused(get(web.client, "240.240.0.20", "/"), 503, "UF", "CONNECT_FAILED")
    assert body["endpoints_tried"] == [f"{web.server.ip}:9999"]


def test_no_endpoint(web: Web) -> None:
    with HttpClient(web.client, "240.240.0.21") as client:
        for _ in range(2):
            body = refused(client.get("/"), 503, "UH", "NO_HEALTHY_ENDPOINT")
            assert f"{NAMESPACE}/empty:80" in body["detail"]


def test_unknown_backend_fails_for_its_share(web: Web) -> None:
    with HttpClient(web.client, "240.240.0.24") as client:
        answers = [client.get("/") for _ in range(20)]
    assert Counter(answer.status for answer in answers) == {200: 10, 500: 10}
    for answer in answers:
        if answer.status == 500:
            body = refused(answer, 500, "NC", "BACKEND_INVALID")
            assert "missing" in body["detail"]
            assert body["decided_by"] == f"HTTPRoute {NAMESPACE}/half rule 0"


def test_no_rule(web: Web) -> None:
    with HttpClient(web.client, "240.240.0.23") as client:
        refused(client.get("/unknown"), 404, "NR", "NO_ROUTE")
        assert web.told(client.get("/known/path"))["target"] == "/known/path"


def test_request_timeout(web: Web) -> None:
    gone = web.journal.count("gone")
    with HttpClient(web.client, "240.240.0.22") as client:
        body = refused(client.get("/hang"), 504, "UT", "UPSTREAM_TIMEOUT")
        assert body["decided_by"] == f"HTTPRoute {NAMESPACE}/timed rule 0"
        wait_for(lambda: web.journal.count("gone") > gone, "the origin to be left alone")
        assert web.told(client.get("/after"))["target"] == "/after"


@pytest.mark.parametrize("vip", [WEB, WEB6])
def test_unknown_port_of_a_vip(web: Web, vip: str) -> None:
    opened = web.journal.count("open")
    with pytest.raises(ConnectionError), HttpClient(web.client, vip, 81) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        client.sock.recv(1)
        raise AssertionError("not refused")
    assert web.journal.count("open") == opened


# -- routing --------------------------------------------------------------------------------------------------

SHOP = "240.240.0.30"


class Shop:
    """One node: a client, and two versions of a service."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client: Pod = mesh.pod("client")
        for number, version in enumerate(("v1", "v2"), 31):
            pod = mesh.pod(version, app="shop", version=version)
            mesh.put(mesh.service(f"shop-{version}", {"app": "shop", "version": version}, [f"240.240.0.{number}"]))
            mesh.serve(pod, "origin", "8080", str(mesh.stage.folder / f"{version}.journal"), version)
        mesh.put(mesh.service("shop", {"app": "shop"}, [SHOP]))

    def who(self, path: str, *fields: str) -> str:
        answer = get(self.client, SHOP, path, *fields)
        return str(answer.json()["server"]) if answer.status == 200 else str(answer.status)

    def weigh(self, v1: int, v2: int, marker: str) -> None:
        """And wait until it is in force: then the marker's path has a backend that does not exist."""
        rules = [
            {"matches": [{"path": {"type": "Exact", "value": marker}}], "backendRefs": [backend("nothing")]},
            {"backendRefs": [backend("shop-v1", v1), backend("shop-v2", v2)]},
        ]
        self.mesh.put(self.mesh.route("shop", rules))
        wait_for(lambda: self.who(marker) == "500", "the new weights")

    def shares(self, requests: int) -> Counter[str]:
        with HttpClient(self.client, SHOP) as client:
            return Counter(client.get("/").json()["server"] for _ in range(requests))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with Mesh(f"r{os.getpid() % 100000}", tmp_path_factory.mktemp("routing"), nodes=1) as mesh:
        made = Shop(mesh)
        mesh.start()
        yield made


def test_rules_and_their_precedence(shop: Shop) -> None:
    """Exact before prefix, the longer prefix before the shorter, more headers before fewer; order does not matter."""

    def rule(to: str, *matches: dict[str, Any]) -> dict[str, Any]:
        return {"matches": list(matches), "backendRefs": [backend(f"shop-{to}")]}

    def prefix(value: str, **headers: str) -> dict[str, Any]:
        return {
            "path": {"type": "PathPrefix", "value": value},
            "headers": [{"name": name, "value": wanted} for name, wanted in headers.items()],
        }

    exact = {"path": {"type": "Exact", "value": "/a/b"}}
    shop.mesh.put(
        shop.mesh.route(
            "shop",
            [
                rule("v1", prefix("/a")),
                rule("v2", prefix("/a/b/"), prefix("/h", Canary="yes")),
                rule("v1", exact),
                rule("v1", prefix("/h"), prefix("/h", canary="yes", x="1")),
            ],
        )
    )
    wait_for(lambda: shop.who("/nowhere") == "404", "the route to be in force")
    wanted = {
        "/a": "v1", "/a/": "v1", "/a/x?q=/a/b/c": "v1", "/abc": "404", "/A": "404", "/a/b": "v1", "/a/b?x": "v1",
        "/a/b/": "v2", "/a/b/c": "v2", "/a/bc": "v1", "/h": "v1", "/h/x": "v1",
    }  # fmt: skip
    assert {path: shop.who(path) for path in wanted} == wanted
    assert shop.who("/h", "canary: yes") == "v2"
    assert shop.who("/h", "CANARY: yes") == "v2"
    assert shop.who("/h", "canary: Yes") == "v1"
    assert shop.who("/h", "canary: yes", "canary: yes") == "v1"
    assert shop.who("/h/x", "canary: yes", "x: 1") == "v1"
    assert shop.who("/x", "canary: yes") == "404"


def test_shares_are_exact_and_change_at_once(shop: Shop) -> None:
    for number, (v1, v2) in enumerate(((90, 10), (10, 90), (1, 0), (2, 1))):
        shop.weigh(v1, v2, f"/marker-{number}")
        found = shop.shares(500)
        assert sum(found.values()) == 500
        assert abs(found["v2"] - 500 * v2 / (v1 + v2)) <= 1, (v1, v2, found)


def test_a_reload_closes_no_connection(shop: Shop) -> None:
    shop.weigh(1, 0, "/before")
    with HttpClient(shop.client, SHOP) as client:
        assert client.get("/").json()["server"] == "v1"
        shop.weigh(0, 1, "/then")
        assert client.get("/").json()["server"] == "v2"


def test_a_bad_object_blocks_nothing(shop: Shop) -> None:
    shop.weigh(1, 0, "/good")
    bad = shop.mesh.route("shop-v2", [{"backendRefs": [backend("shop-v1", weight=-1)]}], name="bad")
    shop.mesh.put(bad)
    (shop.mesh.config / "broken.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: x\n")
    try:
        # What comes after them, in time and in the order of files, takes effect.
        shop.weigh(0, 1, "/still-good")
        assert shop.who("/") == "v2"
        status = shop.mesh.agents[0].status()
        assert status["healthy"]
        (file,) = [path for path in shop.mesh.config.iterdir() if path.name.endswith("-bad.yaml")]
        line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "weight: -1" in text)
        (error,) = [text for text in status["rejected"] if "-bad.yaml" in text]
        assert error.startswith(f"{file}:{line}: HTTPRoute {NAMESPACE}/bad: spec.rules[0].backendRefs[0].weight: ")
        (item,) = [item for item in status["objects"] if item["object"] == f"HTTPRoute {NAMESPACE}/bad"]
        assert item["conditions"][0]["status"] == "False"
        (error,) = [text for text in status["rejected"] if "broken.yaml" in text]
        assert error.startswith(f"{shop.mesh.config / 'broken.yaml'}:")
        # People see it too.
        agent = shop.mesh.agents[0]
        printed = agent.node.run(*agent.command("status"), check=False).stdout
        assert f"{file}:{line}" in printed.replace("\n", "")
    finally:
        (shop.mesh.config / "broken.yaml").unlink()
        shop.mesh.drop("HTTPRoute", "bad")
    wait_for(lambda: not shop.mesh.agents[0].status()["rejected"], "the status to be clean again")


def test_changes_under_load(shop: Shop) -> None:
    """Requests go on while the route changes: each one is answered by one side or the other."""
    shop.weigh(1, 0, "/load")
    stop = threading.Event()
    failed: list[object] = []
    seen: Counter[str] = Counter()

    def ask() -> None:
        try:
            with HttpClient(shop.client, SHOP) as client:
                while not stop.is_set():
                    seen[client.get("/").json()["server"]] += 1
        except Exception as exc:  # noqa: BLE001 - whatever it is, the test has failed
            failed.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(6):
            shop.weigh(number % 2, 1 - number % 2, f"/load-{number}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert seen["v1"] and seen["v2"]
