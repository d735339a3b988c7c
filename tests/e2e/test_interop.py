"""Programs of others as real ends, where no other file has them: curl as HTTP/1.0, nghttp with uploads, trailers and
small windows, a WebSocket over HTTP/2 (RFC 8441), each to servers of HTTP/1.1 and of HTTP/2 through both agents."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from websockets.frames import Frame, Opcode

from examples.stage import wait_for
from tests.e2e.mesh import Journal, Mesh, dial, wait_listening

WEB, H2C, CHAT = "240.240.0.95", "240.240.0.96", "240.240.0.97"
CONTENT = bytes(range(256)) * 20_000


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.folder = mesh.stage.folder
        self.client, self.web, self.h2c = mesh.pod("client"), mesh.pod("web", 1), mesh.pod("h2c", 1)
        self.journal = Journal(self.folder / "web.journal")
        self.chat_journal = self.folder / "chat.journal"
        www = self.folder / "www"
        www.mkdir()
        (www / "large").write_bytes(CONTENT)
        (www / "small").write_bytes(b"small\n")
        web = {"name": "http", "port": 80, "targetPort": 8080}
        mesh.put(
            mesh.service("web", {"app": "web"}, [WEB], [web]),
            mesh.service("h2c", {"app": "h2c"}, [H2C], [{**web, "appProtocol": "kubernetes.io/h2c"}]),
            mesh.service("chat", {"app": "web"}, [CHAT], [{**web, "targetPort": 9001, "appProtocol": "http"}]),
        )
        mesh.serve(self.web, "origin", "8080", str(self.journal.path), "web")
        mesh.serve(self.web, "ws_echo", "9001", str(self.chat_journal), port=9001)
        self.h2c.start("nghttpd", "--no-tls", "--echo-upload", "--trailer=x-sum: 7", "-n1", "-d", str(www), "8080")
        wait_listening(self.h2c, 8080)

    def run(self, *argv: str) -> str:
        return self.client.run(*argv, timeout=60).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"i{os.getpid() % 100000}", tmp_path_factory.mktemp("interop")) as mesh:
        made = Lab(mesh)
        mesh.start()
        yield made


versions = pytest.mark.parametrize(
    ("flag", "version"), [("--http1.0", "1.0"), ("--http1.1", "1.1"), ("--http2-prior-knowledge", "2")]
)


@versions
@pytest.mark.parametrize("vip", [WEB, H2C])
def test_curl_gets_and_posts(lab: Lab, flag: str, version: str, vip: str) -> None:
    path = "/octets/5120000" if vip == WEB else "/large"
    got = lab.folder / "got"
    told = lab.run(
        "curl",
        "-sS",
        "-f",
        "-m",
        "30",
        flag,
        "-o",
        str(got),
        "-w",
        "%{http_code} %{http_version}",
        f"http://{vip}{path}",
    )
    # An HTTP/1.0 client is answered by a server of HTTP/1.1, which says so.
    assert told in ((f"200 {version}",) if version != "1.0" else ("200 1.0", "200 1.1"))
    assert got.stat().st_size == len(CONTENT)
    if vip == H2C:
        assert got.read_bytes() == CONTENT
    posted = lab.run(
        "curl", "-sS", "-f", "-m", "30", flag, "-H", "expect:", "--data-binary", f"@{lab.folder}/www/large", "-o",
        str(got), "-w", "%{http_code}", f"http://{vip}/small",
    )  # fmt: skip
    assert posted == "200"
    if vip == H2C:
        assert got.read_bytes() == CONTENT
    else:
        told_of = json.loads(got.read_bytes())
        assert (told_of["length"], told_of["sha256"]) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_nghttp_uploads_with_trailers(lab: Lab) -> None:
    sent = ["-d", f"{lab.folder}/www/large", "--no-content-length", "--trailer", "x-one: 1"]
    told = json.loads(lab.run("nghttp", *sent, f"http://{WEB}/upload"))
    assert (told["length"], told["sha256"]) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert ["x-one", "1"] in [[name.lower(), value] for name, value in told["trailers"]]


@pytest.mark.parametrize(("vip", "path", "trailer"), [(WEB, "/chunked", ""), (H2C, "/small", "x-sum: 7")])
def test_nghttp_gets_trailers(lab: Lab, vip: str, path: str, trailer: str) -> None:
    out = lab.run("nghttp", "-v", "-n", f"http://{vip}{path}")
    assert ":status: 200" in out
    # Behind the head another HEADERS frame of the server.
    assert len(re.findall(r"recv HEADERS frame", out)) == 2
    assert trailer in out


@pytest.mark.parametrize("bits", ["1", "8", "16", "30"])
@pytest.mark.parametrize(("vip", "path"), [(WEB, "/octets/200000"), (H2C, "/large")])
def test_nghttp_with_windows_of_its_own(lab: Lab, bits: str, vip: str, path: str) -> None:
    if bits == "1":
        path = "/octets/1000" if vip == WEB else "/small"
    out = lab.run("nghttp", "-s", "-n", "-w", bits, "-W", "16", f"http://{vip}{path}", f"http://{vip}{path}?2")
    assert len(re.findall(r" 200 +\d", out)) == 2


def test_h2load_uploads(lab: Lab) -> None:
    small = str(lab.folder / "www" / "small")
    for vip in (WEB, H2C):
        out = lab.run("h2load", "-n", "400", "-c", "4", "-m", "25", "-d", small, f"http://{vip}/small")
        assert "400 done, 400 succeeded, 0 failed, 0 errored" in out


# --- a WebSocket over HTTP/2


class Chat:
    """One WebSocket on a stream of its own, by the library h2, whose checks are on."""

    def __init__(self, lab: Lab) -> None:
        self.sock = dial(lab.client, CHAT, 80)
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.connection.initiate_connection()
        self.received = bytearray()
        self.status = 0
        self.ended = False
        self.wait(lambda: bool(self.connection.remote_settings.enable_connect_protocol))

    def write(self) -> None:
        self.sock.sendall(self.connection.data_to_send())

    def wait(self, condition: object) -> None:
        assert callable(condition)
        self.write()
        while not condition():
            data = self.sock.recv(65536)
            assert data, "the connection ended"
            for event in self.connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    self.status = int(dict(event.headers)[b":status"])
                elif isinstance(event, h2.events.DataReceived):
                    self.received += event.data
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended = True
                elif isinstance(event, h2.events.StreamReset):
                    # 0: the answer is complete, and the rest of the request is not wanted.
                    assert (event.error_code, self.ended) == (0, True)
                else:
                    assert not isinstance(event, h2.events.ConnectionTerminated), event
            self.write()

    def open(self, path: str = "/x?y") -> int:
        number = self.connection.get_next_available_stream_id()
        self.connection.send_headers(
            number,
            [
                (":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", path),
                (":authority", "chat"), ("sec-websocket-version", "13"), ("origin", "http://chat"),
            ],
        )  # fmt: skip
        self.wait(lambda: self.status)
        return number

    def send(self, number: int, octets: bytes) -> None:
        while octets:
            self.wait(lambda: self.connection.local_flow_control_window(number))
            size = min(self.connection.local_flow_control_window(number), self.connection.max_outbound_frame_size)
            self.connection.send_data(number, octets[:size])
            octets = octets[size:]
        self.write()

    def frame(self) -> tuple[Opcode, bytes]:
        """The next one, of the server's: not masked."""
        self.wait(lambda: len(self.received) >= 2)
        size, at = self.received[1], 2
        if size >= 126:
            at = 4 if size == 126 else 10
            self.wait(lambda: len(self.received) >= at)
            size = int.from_bytes(self.received[2:at], "big")
        self.wait(lambda: len(self.received) >= at + size)
        opcode, content = Opcode(self.received[0] & 15), bytes(self.received[at : at + size])
        assert self.received[0] & 0x80
        del self.received[: at + size]
        return opcode, content


def framed(opcode: Opcode, content: bytes) -> bytes:
    return Frame(opcode, content).serialize(mask=True)


def test_a_websocket_over_http2(lab: Lab) -> None:
    chat = Chat(lab)
    with chat.sock:
        number = chat.open()
        assert chat.status == 200
        for opcode, content in (
            (Opcode.TEXT, "text \u2603".encode()),
            (Opcode.BINARY, b"\x00\xff"),
            (Opcode.TEXT, b""),
            (Opcode.BINARY, os.urandom(1 << 20)),
        ):
            chat.send(number, framed(opcode, content))
            assert chat.frame() == (opcode, content)
        chat.send(number, framed(Opcode.PING, b"there?"))
        assert chat.frame() == (Opcode.PONG, b"there?")
        chat.send(number, framed(Opcode.CLOSE, (4003).to_bytes(2, "big") + b"over http/2"))
        assert chat.frame()[0] is Opcode.CLOSE
        chat.wait(lambda: chat.ended)
    wait_for(lambda: "4003 over http/2\n" in lab.chat_journal.read_text(), "the server to have the code", 20)


def test_a_websocket_and_requests_share_the_connection(lab: Lab) -> None:
    chat = Chat(lab)
    with chat.sock:
        first = chat.open()
        chat.status = 0
        second = chat.open("/second")
        chat.send(second, framed(Opcode.TEXT, b"second"))
        assert chat.frame() == (Opcode.TEXT, b"second")
        chat.send(first, framed(Opcode.TEXT, b"first"))
        assert chat.frame() == (Opcode.TEXT, b"first")
        chat.connection.reset_stream(first, 8)
        chat.send(second, framed(Opcode.TEXT, b"goes on"))
        assert chat.frame() == (Opcode.TEXT, b"goes on")
    wait_for(lambda: lab.chat_journal.read_text().count("1006 ") >= 2, "both to be gone at the server", 20)


def test_no_protocol_that_nobody_speaks(lab: Lab) -> None:
    """The server of HTTP/1.1 does not switch, so its refusal is the answer."""
    chat = Chat(lab)
    with chat.sock:
        number = chat.connection.get_next_available_stream_id()
        fields = [
            (":method", "CONNECT"),
            (":protocol", "gopher"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "chat"),
        ]
        chat.connection.send_headers(number, fields)
        chat.wait(lambda: chat.status)
        assert chat.status >= 400
        assert isinstance(chat.sock, socket.socket)
