"""Requests that are none: through the client's agent, and straight at the server's from outside of the mesh.

Each is answered with an error or the connection is closed. The application hears nothing of it, and a good
connection beside it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.mesh import Answer, HttpClient, Journal, Mesh, Truncated

VIP = "240.240.0.10"
HEAD_LIMIT, FIELD_LIMIT = 8192, 50
GET = b"GET / HTTP/1.1\r\nhost: web\r\n"
POST = b"POST / HTTP/1.1\r\nhost: web\r\n"


class Target:
    """A way to the application, and a good connection on it."""

    def __init__(self, where: Pod, host: str, port: int, journal: Journal) -> None:
        self.where, self.host, self.port, self.journal = where, host, port, journal
        self.good = HttpClient(where, host, port)

    def connect(self) -> HttpClient:
        return HttpClient(self.where, self.host, self.port)

    def try_good(self) -> None:
        """It still works; and apart from such requests the application has seen none."""
        assert self.good.get("/good").status == 200
        assert {item["target"] for item in self.journal.all("request")} <= {"/good"}
        assert not self.journal.all("bad")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(f"b{os.getpid() % 100000}", tmp_path_factory.mktemp("bad")) as mesh:
        mesh.pod("client")
        mesh.pod("outside", attach=False)
        server = mesh.pod("web", 1)
        mesh.put(
            mesh.service("web", {"app": "web"}, [VIP]),
            mesh.mesh_config(
                headerTimeout="1s", detectTimeout="300ms", maxHeadBytes=HEAD_LIMIT, maxHeaders=FIELD_LIMIT
            ),
        )
        mesh.serve(server, "origin", "8080", str(mesh.stage.folder / "web.journal"), "web")
        mesh.start()
        yield mesh


@pytest.fixture(scope="module")
def targets(mesh: Mesh) -> Iterator[dict[str, Target]]:
    journal = Journal(mesh.stage.folder / "web.journal")
    pods = mesh.stage.pods
    made = {
        "outbound": Target(pods["client"], VIP, 80, journal),
        "inbound": Target(pods["outside"], pods["web"].ip, 8080, journal),
    }
    yield made
    for target in made.values():
        target.good.__exit__(None, None, None)


@pytest.fixture(params=["outbound", "inbound"])
def target(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Iterator[Target]:
    found = targets[request.param]
    found.try_good()
    yield found
    found.try_good()


def answer_or_end(client: HttpClient) -> Answer | None:
    """None: closed without a word. Whatever was said, the connection is over then."""
    try:
        answer = client.answer()
    except (Truncated, ConnectionError):
        return None
    assert client.at_end()
    return answer


HEADS = {
    "garbage": (b"\x00\x01\x02\x03\xff\xfe\r\n\r\n", None),
    "not HTTP": (b"HELO mail.example\r\n", None),
    "a TLS record": (b"\x16\x03\x01\x00\x05hello" + b"\x00" * 100, None),
    "an HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", None),
    "HTTP/0.9": (b"GET /\r\n", 400),
    "HTTP/3.0": (b"GET / HTTP/3.0\r\nhost: web\r\n\r\n", 505),
    "lower-case version": (b"GET / http/1.1\r\nhost: web\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nhost: web\r\n\r\n", 400),
    "fragment in the target": (b"GET /#x HTTP/1.1\r\nhost: web\r\n\r\n", 400),
    "octet 0 in the target": (b"GET /\x00 HTTP/1.1\r\nhost: web\r\n\r\n", 400),
    "bare LF": (b"GET / HTTP/1.1\nhost: web\n\n", 400),
    "one bare LF": (GET + b"a: b\nc: d\r\n\r\n", 400),
    "bare CR": (GET + b"a: b\rc: d\r\n\r\n", 400),
    "obs-fold": (GET + b"a: b\r\n c\r\n\r\n", 400),
    "space before the first field": (b"GET / HTTP/1.1\r\n host: web\r\n\r\n", 400),
    "space before the colon": (GET + b"a : b\r\n\r\n", 400),
    "space in a name": (GET + b"a b: c\r\n\r\n", 400),
    "empty name": (GET + b": c\r\n\r\n", 400),
    "octet 0 in a value": (GET + b"a: \x00\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: other\r\n\r\n", 400),
    "host with a path": (b"GET / HTTP/1.1\r\nhost: web/x\r\n\r\n", 400),
    "two lengths": (POST + b"content-length: 4\r\ncontent-length: 5\r\n\r\nabcde", 400),
    "list of lengths": (POST + b"content-length: 4, 4\r\n\r\nabcd", 400),
    "negative length": (POST + b"content-length: -4\r\n\r\nabcd", 400),
    "length with a plus": (POST + b"content-length: +4\r\n\r\nabcd", 400),
    "hexadecimal length": (POST + b"content-length: 0x4\r\n\r\nabcd", 400),
    "length of 30 digits": (POST + b"content-length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "TE and length": (POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "length and TE": (POST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n", 400),
    "two TE": (POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "TE in HTTP/1.0": (b"POST / HTTP/1.0\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "TE with a tab": (POST + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "TE identity": (POST + b"transfer-encoding: identity\r\n\r\n", 501),
    "TE gzip": (POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "connection names the length": (POST + b"content-length: 4\r\nconnection: content-length\r\n\r\nabcd", 400),
    "CONNECT without a port": (b"CONNECT web HTTP/1.1\r\nhost: web\r\n\r\n", 400),
    "CONNECT with content": (b"CONNECT web:80 HTTP/1.1\r\nhost: web\r\ncontent-length: 4\r\n\r\n", 400),
    "unknown expectation": (POST + b"content-length: 4\r\nexpect: 100-continue, 200-ok\r\n\r\n", 417),
    "userinfo": (b"GET http://me@web/ HTTP/1.1\r\nhost: web\r\n\r\n", 400),
    "userinfo in host": (b"GET / HTTP/1.1\r\nhost: me@web\r\n\r\n", 400),
    "asterisk of GET": (b"GET * HTTP/1.1\r\nhost: web\r\n\r\n", 400),
    "a long line": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: web\r\n\r\n", 431),
    "a long line without an end": (b"GET /" + b"a" * 20_000, 431),
    "a large field": (GET + b"a: " + b"b" * 20_000 + b"\r\n\r\n", 431),
    "a head of one MiB": (GET + b"a: b\r\n" * 170_000, 431),
    "many fields": (GET + b"a: b\r\n" * (FIELD_LIMIT + 1) + b"\r\n", 431),
    "empty lines": (b"\r\n" * 1000 + GET + b"\r\n", 400),
    "LF before the request": (b"\n" + GET + b"\r\n", 400),
    "blank before the request": (b" " + GET + b"\r\n", 400),
    "tab in the request line": (b"GET\t/ HTTP/1.1\r\nhost: web\r\n\r\n", 400),
}
"""Octets, and the status they are answered with; None: no HTTP at all, the connection is closed."""


@pytest.mark.parametrize("name", HEADS)
def test_bad_head(target: Target, name: str) -> None:
    octets, status = HEADS[name]
    with target.connect() as client:
        try:
            client.send(octets)
        except ConnectionError:
            pass  # closed before it had all
        answer = answer_or_end(client)
    if status is None:
        assert answer is None
    elif answer is not None:
        assert answer.status == status
        assert answer.get("content-type") == "application/problem+json"
        assert answer.get("x-netproxy-reason") == "DPE"
        assert answer.get("connection") == "close"
    else:
        # A client that goes on sending may have its answer overtaken by a reset.
        assert len(octets) > 64 * 1024


@pytest.mark.parametrize("name", ["TE and length", "bare LF", "garbage", "empty lines"])
def test_bad_head_behind_a_good_one(target: Target, name: str) -> None:
    """The first is answered; the second, and what follows it, is not let through."""
    with target.connect() as client:
        client.send(b"GET /good HTTP/1.1\r\nhost: web\r\n\r\n" + HEADS[name][0] + GET + b"\r\n")
        assert client.answer().status == 200
        answer = answer_or_end(client)
        assert answer is not None and answer.status == 400


BODIES = {
    "no chunk size": b"x\r\nabc\r\n0\r\n\r\n",
    "negative chunk size": b"-3\r\nabc\r\n0\r\n\r\n",
    "chunk size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk longer than said": b"3\r\nabcd\r\n0\r\n\r\n",
    "chunk size ended by LF": b"3\nabc\r\n0\r\n\r\n",
    "chunk size of 20 digits": b"f" * 20 + b"\r\nabc",
    "long extension": b"3;" + b"a" * 20_000 + b"\r\nabc\r\n0\r\n\r\n",
    "forbidden trailer": b"3\r\nabc\r\n0\r\ncontent-length: 3\r\n\r\n",
    "folded trailer": b"3\r\nabc\r\n0\r\na: b\r\n c\r\n\r\n",
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_body(target: Target, name: str) -> None:
    """Its head is good and goes on; the application never has a whole request, and never the octets behind it."""
    with target.connect() as client:
        client.send(b"POST /good HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n" + BODIES[name])
        answer = answer_or_end(client)
    assert answer is not None and answer.status in (400, 431)
    assert answer.get("x-netproxy-reason") == "DPE"


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nho", b"G"], ids=["in a field", "in the method"])
def test_slow_head(target: Target, start: bytes) -> None:
    """It does not help to send an octet now and then."""
    with target.connect() as client:
        client.send(start)
        client.sock.settimeout(0.1)
        found = b""
        for _ in range(200):
            try:
                found = client.sock.recv(1 << 16)
                break
            except TimeoutError:
                try:
                    client.send(b"s" if start != b"G" else b"")
                except ConnectionError:
                    break
            except ConnectionError:
                break
        else:
            raise AssertionError("20 s later it is still open")
    assert found == b"" or found.startswith(b"HTTP/1.1 408 ")
    if start != b"G":
        assert b"x-netproxy-reason: DT" in found


def test_connections_that_say_nothing_disturb_nobody(target: Target) -> None:
    silent = [target.connect() for _ in range(100)]
    try:
        for _ in range(20):
            target.try_good()
        with target.connect() as another:
            assert another.get("/good").status == 200
    finally:
        for client in silent:
            client.__exit__(None, None, None)


def test_nothing_of_all_this_was_an_internal_error(mesh: Mesh, targets: dict[str, Target]) -> None:
    """And nothing of it is left."""
    for target in targets.values():
        target.try_good()
    for agent in mesh.agents:
        assert agent.metric("netproxy_events_total", event="internal_errors") == 0
        assert agent.status()["restarts"].get("worker", 0) == 0
        assert "Traceback" not in agent.log.read_text()
        wait_for(lambda agent=agent: agent.metric("netproxy_downstream_connections") < 20, "bad connections to be gone")
