"""Every shape of HTTP/1.1 with real ends through two agents: curl, WebSockets, CONNECT; and octet by octet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from examples.stage import wait_for
from tests.e2e.mesh import NAMESPACE, HttpClient, Mesh, dial, socket_in
from tests.e2e.servers.opaque import BLOCK
from tests.edits import (
    Leg,
    Message,
    edited_request,
    edited_response,
    lines,
    may_be_http2,
    out_of_http2,
    request_octets,
    response_octets,
    through_http2,
)

WEB, RAW, CHAT, PROXY = (f"240.240.0.{number}" for number in (10, 11, 12, 13))
KIB = 1024
MIB = 1024 * KIB


class Shapes:
    """Client on node a; web, a proxy and what it proxies to on node b."""

    def __init__(self, mesh: Mesh) -> None:
        folder = mesh.stage.folder
        self.mesh = mesh
        self.client = mesh.pod("client")
        self.web = mesh.pod("web", 1)
        self.proxy = mesh.pod("proxy", 1)
        self.far = mesh.pod("far", 0)
        self.chat_journal = folder / "chat.journal"
        self.far_journal = folder / "far.journal"
        self.certificate = folder / "far.pem"
        for name, vip, app, port in (
            ("web", WEB, "web", 8080),
            ("raw", RAW, "web", 9000),
            ("chat", CHAT, "web", 9001),
            ("proxy", PROXY, "proxy", 8888),
        ):
            ports = [{"name": "http", "port": 80, "targetPort": port, "appProtocol": "http"}]
            mesh.put(mesh.service(name, {"app": app}, [vip], ports))
        slash = [{"matches": [{"path": {"value": "/"}}], "backendRefs": [{"name": "proxy", "port": 80}]}]
        mesh.put(mesh.route("proxy", slash))

    def start(self) -> None:
        mesh, folder = self.mesh, self.mesh.stage.folder
        subject = ["-subj", "/CN=far", "-addext", "subjectAltName=DNS:far"]
        key = folder / "far.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             *subject, "-keyout", key, "-out", self.certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        self.certificate.write_text(self.certificate.read_text() + key.read_text())
        config = folder / "tinyproxy.conf"
        options = ["Port 8888", "Listen 0.0.0.0", "Timeout 60", "MaxClients 50", "LogLevel Warning"]
        config.write_text("\n".join([*options, "ConnectPort 9443", "ConnectPort 9444", "ConnectPort 8080", ""]))
        mesh.serve(self.web, "origin", "8080", str(folder / "web.journal"), "web", "quiet")
        mesh.serve(self.web, "ws_echo", "9001", str(self.chat_journal), port=9001)
        mesh.serve(self.far, "tls_echo", "9443", str(self.certificate), port=9443)
        mesh.serve(self.far, "opaque", "9444", str(self.far_journal), "both", str(3 * MIB), port=9444)
        self.proxy.start("tinyproxy", "-d", "-c", str(config), log="tinyproxy.log")
        mesh.start()
        wait_for(lambda: self.proxy.run("ss", "-Hltn", "sport = :8888").stdout.strip(), "tinyproxy", 20)

    def curl(self, *argv: str) -> str:
        return self.client.run("curl", "-sS", "--max-time", "20", *argv).stdout

    def told(self, *argv: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.curl("-f", *argv))
        return found


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shapes]:
    with Mesh(f"s{os.getpid() % 100000}", tmp_path_factory.mktemp("shapes")) as mesh:
        made = Shapes(mesh)
        made.start()
        yield made


# --- curl


def test_curl_1_0(shapes: Shapes) -> None:
    answer = shapes.curl("-i", "--http1.0", f"http://{WEB}/x")
    assert answer.startswith("HTTP/1.1 200 ")
    assert "\nconnection: close" in answer.lower()
    assert "transfer-encoding" not in shapes.curl("-i", "--http1.0", f"http://{WEB}/chunked").lower()


def test_curl_methods_and_targets(shapes: Shapes) -> None:
    head = shapes.curl("-I", f"http://{WEB}/octets/1234")
    assert "content-length: 1234" in head.lower()
    told = shapes.told("-X", "OPTIONS", "--request-target", "*", f"http://{WEB}/")
    assert (told["method"], told["target"]) == ("OPTIONS", "*")
    told = shapes.told("-x", f"http://{WEB}:80", "http://elsewhere.example:81/a?b")
    assert told["target"] == "/a?b"
    assert ["host", "elsewhere.example:81"] in told["headers"]  # type: ignore[operator]


def test_curl_uploads(shapes: Shapes) -> None:
    small, large = shapes.mesh.stage.folder / "small", shapes.mesh.stage.folder / "large"
    small.write_bytes(b"tiny")
    large.write_bytes(os.urandom(2 * MIB))
    for body in (small, large):
        for argv in (["-H", "Expect: 100-continue"], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"]):
            told = shapes.told(*argv, "--data-binary", f"@{body}", f"http://{WEB}/up")
            assert told["length"] == body.stat().st_size
    refused = shapes.curl("-i", "-H", "Expect: 100-continue", "--data-binary", f"@{large}", f"http://{WEB}/early")
    assert refused.startswith("HTTP/1.1 413 ")
    assert "100 Continue" not in refused
    assert "\nconnection: close" in refused.lower()
    unknown = shapes.curl("-i", "-H", "Expect: 200-maybe", "-d", "x", f"http://{WEB}/up")
    assert unknown.startswith("HTTP/1.1 417 ")


def test_trailers(shapes: Shapes) -> None:
    with HttpClient(shapes.client, WEB) as client:
        answer = client.get("/chunked", "te: trailers")
        assert (answer.body, answer.trailers) == (b"hello world", [("x-sum", "11")])


# --- 1xx, and octet by octet: the application is this process


class App:
    """One end of a connection, octet by octet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(20)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            assert more, data
            data += more
        return data

    def read_head(self) -> bytes:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += self.read(1)
        return data


class Raw:
    """`accept` gives the next new connection to the application behind RAW."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.listener = socket_in(shapes.web, socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.settimeout(20)
        self.listener.bind(("0.0.0.0", 9000))
        self.listener.listen()
        self.apps: list[App] = []

    def connect(self) -> HttpClient:
        return HttpClient(self.shapes.client, RAW)

    def accept(self) -> App:
        self.apps.append(App(self.listener.accept()[0]))
        return self.apps[-1]

    def close(self) -> None:
        for app in self.apps:
            app.sock.close()
        self.listener.close()


@pytest.fixture
def raw(shapes: Shapes) -> Iterator[Raw]:
    made = Raw(shapes)
    try:
        yield made
    finally:
        made.close()


EXPECTS = b"POST /x HTTP/1.1\r\nHost: raw\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
FINAL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def test_1xx_answers(raw: Raw) -> None:
    with raw.connect() as client:
        client.send(EXPECTS)
        app = raw.accept()
        assert b"\r\nexpect: 100-continue\r\n" in app.read_head()
        app.sock.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        assert App(client.sock).read(len(early)) == early
        client.send(b"body")
        assert app.read(4) == b"body"
        app.sock.sendall(FINAL)
        assert client.answer().body == b"ok"
    with raw.connect() as client:
        client.send(EXPECTS.replace(b"1.1", b"1.0") + b"body")
        app = raw.accept()
        assert b"expect" not in app.read_head()
        app.sock.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" + FINAL)
        answer = client.answer()
        assert (answer.status, answer.before) == (200, [])


def test_an_application_that_does_not_know_100(raw: Raw) -> None:
    """After a while the agent says so, and once."""
    with raw.connect() as client:
        client.send(EXPECTS)
        app = raw.accept()
        app.read_head()
        began = time.monotonic()
        line = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert App(client.sock).read(len(line)) == line
        assert time.monotonic() - began > 0.3  # of the 1.0 that is the default
        app.sock.sendall(line)
        client.send(b"body")
        assert app.read(4) == b"body"
        app.sock.sendall(FINAL)
        answer = client.answer()
        assert (answer.status, answer.before) == (200, [])


def test_an_application_that_closes(raw: Raw) -> None:
    with raw.connect() as client:
        client.send(b"GET /x HTTP/1.1\r\nHost: raw\r\n\r\n")
        app = raw.accept()
        app.read_head()
        app.sock.close()
        answer = client.answer()
        assert (answer.status, answer.get("x-netproxy-reason")) == (502, "UC")
        client.send(b"GET /x HTTP/1.1\r\nHost: raw\r\n\r\n")
        app = raw.accept()
        app.read_head()
        app.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        app.sock.close()
        with pytest.raises(ConnectionResetError):
            client.answer()


def test_a_put_that_loses_the_race_is_sent_again(raw: Raw) -> None:
    """On the way from the application's agent to the application."""
    put = b"PUT /x HTTP/1.1\r\nHost: raw\r\nContent-Length: 4\r\n\r\nbody"
    with raw.connect() as client:
        for number in range(2):
            client.send(put)
            app = raw.accept() if not number else raw.apps[-1]
            app.read_head()
            app.read(4)
            if number:
                app.sock.close()  # it had gone, as far as the agent may know, before the request came
                app = raw.accept()
                app.read_head()
                assert app.read(4) == b"body"
            app.sock.sendall(FINAL.replace(b"Connection: close\r\n", b""))
            assert client.answer().body == b"ok"


CASES = [
    Message([(b"Host", b"raw")]),
    Message(
        [(b"User-Agent", b"x"), (b"HOST", b"raw:80"), (b"Cookie", b"a=b"), (b"cookie", b"c=d")], target=b"/a?b=%20"
    ),
    Message([(b"Host", b"raw"), (b"Content-Length", b"5")], method=b"POST", body=b"0\r\n\r\n"),
    Message(
        [(b"Host", b"raw"), (b"Transfer-Encoding", b"Chunked"), (b"Trailer", b"X-Sum")],
        method=b"PUT",
        body=b"abc",
        trailers=[(b"X-Sum", b"3")],
    ),
    Message([], target=b"/old", version=b"1.0"),
    Message([(b"Host", b"raw"), (b"Expect", b"100-continue")], target=b"/old", version=b"1.0"),
    Message([(b"Host", b"other")], target=b"http://raw:81/x?y"),
    Message([(b"Host", b"other")], target=b"http://raw", method=b"OPTIONS"),
    Message([(b"Host", b"raw")], target=b"*", method=b"OPTIONS"),
    Message([(b"Host", b"raw")], method=b"HEAD"),
    Message([(b"Connection", b"X-Secret, keep-alive"), (b"X-Secret", b"1"), (b"Keep-Alive", b"5"), (b"Host", b"raw")]),
    Message([(b"Host", b"raw"), (b"TE", b"gzip, trailers"), (b"Connection", b"TE"), (b"X-After", b"1")]),
    Message([(b"Host", b"raw"), (b"Upgrade", b"h2c, x/1"), (b"Connection", b"Upgrade"), (b"X-After", b"1")]),
    Message(
        [
            (b"Host", b"raw"),
            (b"Upgrade", b"h2c"),
            (b"Connection", b"Upgrade, HTTP2-Settings"),
            (b"HTTP2-Settings", b"A"),
        ]
    ),
    Message(
        [
            (b"Host", b"raw"),
            (b"X-Forwarded-For", b"192.0.2.1"),
            (b"X-Forwarded-Proto", b"https"),
            (b"X_Forwarded_For", b"192.0.2.2"),
            (b"X-Forwarded-Host", b"h"),
            (b"Forwarded", b"for=x"),
        ]
    ),
    Message([(b"Host", b"raw"), (b"X-Request-Id", b"mine"), (b"Via", b"1.0 old"), (b"X-Last", b"1")]),
    Message([(b"X-FORWARDED-CLIENT-CERT", b"URI=evil"), (b"X_Forwarded_Client_Cert", b"URI=evil"), (b"Host", b"raw")]),
]
ANSWERS = [
    Message([(b"Content-Length", b"2"), (b"Date", b"today"), (b"ETag", b'"1"')], body=b"ok"),
    Message([(b"Set-Cookie", b"a"), (b"SET-COOKIE", b"b"), (b"X-Netproxy-Reason", b"NR"), (b"Content-Length", b"0")]),
    Message([(b"Transfer-Encoding", b"chunked")], status=404, body=b"not here", trailers=[(b"X-T", b"1")]),
    Message([(b"Connection", b"close"), (b"Via", b"1.1 app")], body=b"until the end"),
    Message([(b"Keep-Alive", b"5"), (b"Connection", b"x-a"), (b"X-A", b"1")], status=204),
    Message([(b"Content-Length", b"7")], status=304),
    Message([(b"Upgrade", b"y"), (b"Connection", b"Upgrade"), (b"Content-Length", b"0")], status=426),
]
MODES = {
    "as it is": {},
    "http1": {"meshHttp": "http1", "requestId": False},
    "everything": {"headerCase": "preserve", "forwarded": "set", "via": "mesh"},
    "nothing": {"headerCase": "preserve", "forwarded": "preserve", "requestId": False},
}
DATE = rb"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} GMT"
UUID = rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
XFCC = rb"By=spiffe://cluster\.local/ns/%b/sa/web;Hash=[0-9a-f]{64};URI=spiffe://cluster\.local/ns/%b/sa/client" % (
    NAMESPACE.encode(), NAMESPACE.encode()
)  # fmt: skip


def found(pattern: bytes, octets: bytes, otherwise: bytes = b"?") -> bytes:
    """What only the agent knows, in what it wrote: of the form that it must have."""
    match = re.search(rb"(?:^|\n)[a-z-]+: (" + pattern + rb")\r\n", octets)
    return match[1] if match else otherwise


def exchange(raw: Raw, request: Message, response: Message, mesh: dict[str, object]) -> None:
    out = Leg(str(mesh.get("headerCase", "lower")), str(mesh.get("forwarded", "append")), dialled=RAW.encode())
    out = replace(out, via=str(mesh.get("via", "")).encode())
    into = replace(out, inbound=True, client=raw.shapes.client.ip.encode())
    version = request.version
    head = b"%b %b HTTP/%b\r\n" % (request.method, request.target, version) + lines(request.fields)
    body = request_octets(replace(request, fields=[f for f in request.fields if f[0] in (b"Transfer-Encoding",)]))
    body = body.partition(b"\r\n\r\n")[2] if request.get(b"transfer-encoding") else request.body
    with raw.connect() as client:
        client.send(head + body)
        app = raw.accept()
        got = app.read_head()
        if mesh.get("requestId", True):
            out = replace(out, request_id=found(UUID, got))
        into = replace(into, xfcc=found(XFCC, got))
        between = was = edited_request(request, out)
        in_http2 = mesh.get("meshHttp") != "http1" and out.header_case == "lower" and may_be_http2(was)
        if in_http2:
            between = through_http2(was)
        restored = edited_request(between, into)
        expected = request_octets(out_of_http2(restored, was) if in_http2 else restored)
        assert got + app.read(len(expected) - len(got)) == expected
        to_head = request.method == b"HEAD"
        answer = b"HTTP/1.1 %d Odd\r\n" % response.status + lines(response.fields)
        if not to_head and response.status not in (204, 304):
            answer += response_octets(response).partition(b"\r\n\r\n")[2]
        app.sock.sendall(answer)
        app.sock.shutdown(socket.SHUT_WR)  # so that the next request has a connection of its own
        reader = App(client.sock)
        got = reader.read_head()
        date = found(DATE, got)
        passed = edited_response(response, between, replace(into, date=date))
        if in_http2:
            passed = through_http2(passed)
        edited = edited_response(passed, request, replace(out, date=date))
        expected = response_octets(edited, to_head=to_head)
        assert got + reader.read(len(expected) - len(got)) == expected
        assert app.sock.recv(1) == b""


@pytest.mark.parametrize("mode", MODES)
def test_what_arrives_is_what_was_sent_and_the_documented_edits(raw: Raw, mode: str) -> None:
    mesh, spec = raw.shapes.mesh, MODES[mode]
    mesh.put(mesh.mesh_config(**spec))
    probe = {"lower": "host", "preserve": "HoSt"}[str(spec.get("headerCase", "lower"))]

    def in_force() -> bool:
        with HttpClient(raw.shapes.client, WEB) as client:
            client.send(b"GET / HTTP/1.1\r\nHoSt: web\r\n\r\n")
            told = client.answer().json()
        names = {name for name, _ in told["headers"]}
        forwarded = "x-forwarded-for" in names
        return (
            probe in names
            and forwarded == (spec.get("forwarded") != "preserve")
            and ("via" in names) == ("via" in spec)
            and ("x-request-id" in names) == bool(spec.get("requestId", True))
        )

    wait_for(in_force, f"both agents to have {spec}", 20)
    for number, request in enumerate(CASES):
        exchange(raw, request, ANSWERS[number % len(ANSWERS)], spec)
    for response in ANSWERS:
        exchange(raw, CASES[0], response, spec)


# --- WebSockets


@contextlib.contextmanager
def websocket(shapes: Shapes) -> Iterator[ClientConnection]:
    sock = dial(shapes.client, CHAT, 80)
    with connect("ws://chat/x?y", sock=sock, max_size=8 * MIB, compression=None, ping_interval=None) as connection:
        yield connection


def test_websocket_messages(shapes: Shapes) -> None:
    with websocket(shapes) as chat:
        for message in ("text \u2603", b"\x00\xff binary", "", b"", os.urandom(MIB), "x" * MIB):
            chat.send(message)
            assert chat.recv(timeout=20) == message
        chat.send([b"one ", b"message in ", b"fragments"])
        assert chat.recv(timeout=20) == b"one message in fragments"
        assert chat.ping(b"are you there").wait(20)
        big = os.urandom(MIB)
        for _ in range(8):
            chat.send(big)
            assert chat.recv(timeout=20) == big


def test_websocket_close_codes(shapes: Shapes) -> None:
    with websocket(shapes) as chat:
        chat.close(4001, "client")
    with websocket(shapes) as chat:
        chat.send("close 4002 server")
        with pytest.raises(ConnectionClosed) as caught:
            chat.recv(timeout=20)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4002, "server")
    wait_for(lambda: "4001 client\n" in shapes.chat_journal.read_text(), "the server to have the code", 20)


def handshaken(shapes: Shapes) -> tuple[socket.socket, ClientProtocol]:
    """A WebSocket without a library between its frames and the wire."""
    sock = dial(shapes.client, CHAT, 80)
    protocol = ClientProtocol(parse_uri("ws://chat/"), max_size=8 * MIB)
    protocol.send_request(protocol.connect())
    for data in protocol.data_to_send():
        sock.sendall(data)
    while protocol.state is not OPEN:
        protocol.receive_data(sock.recv(65536))
        assert protocol.handshake_exc is None
    protocol.events_received()
    return sock, protocol


def frames_of(sock: socket.socket, protocol: ClientProtocol) -> Iterator[Frame]:
    while data := sock.recv(65536):
        protocol.receive_data(data)
        yield from (event for event in protocol.events_received() if isinstance(event, Frame))


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
def test_websocket_sizes(shapes: Shapes, opcode: Opcode) -> None:
    """At the edges of the frame lengths, and in writes of one octet."""
    sock, protocol = handshaken(shapes)
    frames = frames_of(sock, protocol)
    with sock:
        for size in (0, 1, 125, 126, 127, 65535, 65536, MIB):
            data = b"*" * size
            octets = Frame(opcode, data).serialize(mask=True)
            chop = 1 if size < 200 else 997 if size < MIB else 65536
            for at in range(0, len(octets), chop):
                sock.sendall(octets[at : at + chop])
            frame = next(frames)
            assert (frame.opcode, bytes(frame.data)) == (opcode, data)
        # In fragments, with a ping between them.
        for octets in (
            Frame(opcode, b"a", fin=False).serialize(mask=True),
            Frame(Opcode.PING, b"p").serialize(mask=True),
            Frame(Opcode.CONT, b"b").serialize(mask=True),
        ):
            sock.sendall(octets)
        assert next(frames).opcode is Opcode.PONG
        assert bytes(next(frames).data) == b"ab"


def test_websocket_that_is_half_open(shapes: Shapes) -> None:
    """A client that ends its stream without a word: the server knows, and ends its own."""
    ended = shapes.chat_journal.read_text().count("1006") if shapes.chat_journal.exists() else 0
    sock, _ = handshaken(shapes)
    with sock:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    wait_for(lambda: shapes.chat_journal.read_text().count("1006") > ended, "the server to see the end", 20)


def test_octets_behind_the_upgrade_are_not_lost(raw: Raw) -> None:
    asks = b"GET /x HTTP/1.1\r\nHost: raw\r\nUpgrade: odd/1\r\nConnection: Upgrade\r\n\r\n"
    switch = b"HTTP/1.1 101 Go\r\nUpgrade: odd/1\r\nConnection: Upgrade\r\n\r\n"
    with raw.connect() as client:
        client.send(asks + b"early")
        app = raw.accept()
        assert b"\r\nupgrade: odd/1\r\nconnection: upgrade\r\n" in app.read_head().lower()
        app.sock.sendall(switch + b"at once")
        assert app.read(5) == b"early"
        client.sock.shutdown(socket.SHUT_WR)
        assert app.sock.recv(1) == b""
        app.sock.sendall(b", and later")
        app.sock.close()
        got = b""
        while more := client.sock.recv(65536):
            got += more
        assert got.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert got.partition(b"\r\n\r\n")[2] == b"at once, and later"


def test_a_tunnel_is_counted_with_its_octets(shapes: Shapes) -> None:
    """As one request, when it has ended."""
    agent = shapes.mesh.agents[0]

    def counted() -> float:
        return agent.metric("netproxy_request_bytes_total", destination_service=f"{NAMESPACE}/chat")

    before = counted()
    with websocket(shapes) as chat:
        chat.send(bytes(100 * KIB))
        chat.recv(timeout=20)
    wait_for(lambda: counted() >= before + 100 * KIB, "the tunnel to be counted", 20)


# --- CONNECT through a proxy in the mesh


def tunnel_to(shapes: Shapes, host: str, port: int) -> socket.socket:
    sock = dial(shapes.client, PROXY, 80)
    sock.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        more = sock.recv(1)
        assert more, head
        head += more
    assert head.startswith(b"HTTP/1.1 200 "), head
    assert b"content-length" not in head and b"transfer-encoding" not in head
    return sock


def test_connect_with_tls_inside(shapes: Shapes) -> None:
    context = ssl.create_default_context(cafile=str(shapes.certificate))
    context.check_hostname = False
    with tunnel_to(shapes, shapes.far.ip, 9443) as sock, context.wrap_socket(sock) as tls:
        for size in (1, 70_000, MIB):
            data = os.urandom(size)
            sender = threading.Thread(target=tls.sendall, args=(data,))
            sender.start()
            got = b""
            while len(got) < size:
                got += tls.recv(65536)
            sender.join()
            assert got == data


def test_connect_with_anything_inside(shapes: Shapes) -> None:
    """Both ways at once, each in its own time. tinyproxy does not know half-close, so the end is of both."""
    with tunnel_to(shapes, shapes.far.ip, 9444) as sock:
        data = os.urandom(2 * MIB)
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        got = b""
        while len(got) < 3 * MIB:
            more = sock.recv(65536)
            assert more
            got += more
        sender.join()
    assert got == (BLOCK * 4)[: 3 * MIB]
    digest = hashlib.sha256(data).hexdigest()
    wait_for(lambda: digest in shapes.far_journal.read_text(), "the other end to have it all", 20)


def test_connect_by_curl(shapes: Shapes) -> None:
    answer = shapes.curl("-i", "-p", "-x", f"http://{PROXY}:80", f"http://{shapes.web.ip}:8080/through?x")
    connect, _, rest = answer.partition("\n\n")
    assert connect.startswith("HTTP/1.1 200 ")
    assert rest.startswith("HTTP/1.1 200 ")
    assert json.loads(rest.partition("\n\n")[2])["target"] == "/through?x"


def test_connect_that_is_refused(shapes: Shapes) -> None:
    """By the proxy, whose answer passes; the connection ends, since what follows might be the tunnel's."""
    with HttpClient(shapes.client, PROXY) as client:
        client.send(f"CONNECT {shapes.far.ip}:9 HTTP/1.1\r\nHost: x:9\r\n\r\nearly octets".encode())
        answer = client.answer("CONNECT")
        assert answer.status == 403
        assert answer.get("x-netproxy-reason") is None
        assert answer.get("connection") == "close"
        assert client.at_end()


# --- the agent is replaced under them


def test_a_tunnel_outlives_an_upgrade_of_the_agent_until_the_drain_ends(shapes: Shapes) -> None:
    agent = shapes.mesh.agents[0]
    with websocket(shapes) as chat:
        chat.send("before")
        assert chat.recv(timeout=20) == "before"
        old = set(agent.pids("worker"))
        assert agent.process is not None
        os.kill(agent.process.pid, signal.SIGUSR2)

        def replaced() -> bool:
            with contextlib.suppress(OSError):
                now = set(agent.pids("worker"))
                return bool(now) and not now & old
            return False

        wait_for(replaced, "a new worker", 60)
        chat.send("after")
        assert chat.recv(timeout=20) == "after"
        with websocket(shapes) as other:
            other.send("new")
            assert other.recv(timeout=20) == "new"
        with pytest.raises(ConnectionClosed):
            chat.recv(timeout=60)
    wait_for(
        lambda: agent.metric("netproxy_requests_total", code="101", reason="DRAINING") == 1,
        "the tunnel to be counted as cut by the drain",
        20,
    )
