"""What travels between the nodes, and who may talk to whom."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

from examples.stage import WIRE, Node, Pod, wait_for
from tests.e2e.mesh import Answer, HttpClient, Journal, Mesh, dial, get, socket_in

MARKER = "marker-5f0c2e7d91"
APPS = {"strict": 50, "loose": 51, "plain": 52}
"""Named after their PeerAuthentication: STRICT, PERMISSIVE, DISABLE."""
XFCC = "x-forwarded-client-cert"


# -- the wire -------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """One direction of a TCP connection."""

    source: bytes
    destination: bytes
    ports: bytes


class Wire:
    """Everything that passes a node's wire interface while it is open."""

    def __init__(self, node: Node) -> None:
        self._sock = socket_in(node, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._sock.bind((WIRE, 0x0003))  # ETH_P_ALL
        self._sock.setblocking(False)
        self.frames: list[bytes] = []

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.take()
        self._sock.close()

    def take(self) -> None:
        """What the kernel has recorded so far. A packet is there before its receiver has it."""
        while True:
            try:
                self.frames.append(self._sock.recv(1 << 18))
            except BlockingIOError:
                break
        dropped = struct.unpack("II", self._sock.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
        assert dropped == 0

    def streams(self) -> dict[Flow, bytes]:
        """The octets of each direction, in order. One that began earlier starts where it is first seen."""
        pieces: dict[Flow, dict[int, bytes]] = {}
        first: dict[Flow, int] = {}
        for frame in self.frames:
            for flow, sequence, is_syn, payload in _segments(frame):
                if is_syn:
                    first[flow] = (sequence + 1) & 0xFFFFFFFF
                elif payload:
                    first.setdefault(flow, sequence)
                    at = (sequence - first[flow]) & 0xFFFFFFFF
                    if len(payload) > len(pieces.setdefault(flow, {}).get(at, b"")):
                        pieces[flow][at] = payload
        return {flow: _join(found) for flow, found in pieces.items()}


def _segments(frame: bytes) -> Iterator[tuple[Flow, int, bool, bytes]]:
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and packet[9] == 6:
        addresses, at = (packet[12:16], packet[16:20]), (packet[0] & 15) * 4
        end = int.from_bytes(packet[2:4], "big")
    elif kind == b"\x86\xdd" and packet[6] == 6:
        addresses, at = (packet[8:24], packet[24:40]), 40
        end = 40 + int.from_bytes(packet[4:6], "big")
    else:
        return
    tcp = packet[at:end]
    sequence = int.from_bytes(tcp[4:8], "big")
    yield Flow(*addresses, tcp[:4]), sequence, bool(tcp[13] & 2), tcp[(tcp[12] >> 4) * 4 :]


def _join(pieces: dict[int, bytes]) -> bytes:
    found = bytearray()
    for at, piece in sorted(pieces.items()):
        assert at <= len(found), "the capture has a gap"
        found[at : at + len(piece)] = piece
    return bytes(found)


def tls_records(stream: bytes) -> list[tuple[int, bytes]]:
    """(content type, fragment) of each record; every octet belongs to one (RFC 8446 section 5.1)."""
    found, at = [], 0
    while at < len(stream):
        kind, version, length = stream[at], stream[at + 1 : at + 3], int.from_bytes(stream[at + 3 : at + 5], "big")
        assert kind in (20, 21, 22, 23), f"no TLS record at octet {at}: {stream[at : at + 40]!r}"
        assert version in (b"\x03\x01", b"\x03\x03") and length <= 16384 + 256
        assert at + 5 + length <= len(stream), "the last record is cut"
        found.append((kind, stream[at + 5 : at + 5 + length]))
        at += 5 + length
    return found


def server_hello_version(records: list[tuple[int, bytes]]) -> bytes | None:
    """The negotiated version, from supported_versions (RFC 8446 section 4.2.1); None: it is no server's direction."""
    kind, hello = records[0]
    if kind != 22 or hello[0] != 2:
        return None
    at = 4 + 2 + 32
    at += 1 + hello[at] + 2 + 1
    end = at + 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 2
    while at < end:
        extension, size = struct.unpack_from("!HH", hello, at)
        if extension == 43:
            return hello[at + 4 : at + 4 + size]
        at += 4 + size
    return b""


# -- a mesh with one server of each mode ----------------------------------------------------------------------


class Vault:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client = mesh.pod("client")
        self.outside = mesh.pod("outside", attach=False)
        self.servers: dict[str, Pod] = {}
        self.received: dict[str, list[bytearray]] = {}
        mesh.put(mesh.mesh_config(detectTimeout="300ms"))
        for (app, number), mode in zip(APPS.items(), ("STRICT", "PERMISSIVE", "DISABLE"), strict=True):
            pod = self.servers[app] = mesh.pod(app, 1)
            ports = [
                {"name": "http", "port": 80, "targetPort": 8080},
                {"name": "tcp", "port": 9000, "targetPort": 9000},
            ]
            mesh.put(
                mesh.service(app, {"app": app}, [f"240.240.0.{number}", f"fd00:240::{number}"], ports),
                mesh.peer_authentication(mode, app),
            )
            mesh.serve(pod, "origin", "8080", str(self.journal(app).path), app)
            mesh.serve(pod, "opaque", "9000", str(self.journal(f"{app}-tcp").path), "echo", port=9000)
            self.listen(pod, app)

    def listen(self, pod: Pod, app: str) -> None:
        """Port 7070, of no Service: whatever comes is kept, and answered when it looks like a head."""
        server = socket_in(pod, socket.AF_INET)
        server.bind(("0.0.0.0", 7070))
        server.listen(64)
        self.received[app] = []

        def keep(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                seen = bytearray()
                self.received[app].append(seen)
                while b"\r\n\r\n" not in seen.lstrip() and (data := sock.recv(65536)):
                    seen += data
                sock.sendall(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=keep, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def journal(self, name: str) -> Journal:
        return Journal(self.mesh.stage.folder / f"{name}.journal")

    def vip(self, app: str, family: int = 4) -> str:
        return f"240.240.0.{APPS[app]}" if family == 4 else f"fd00:240::{APPS[app]}"


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    with Mesh(f"m{os.getpid() % 100000}", tmp_path_factory.mktemp("mtls"), families=(4, 6)) as mesh:
        made = Vault(mesh)
        mesh.start()
        yield made


def talk_http(where: Pod, host: str, port: int = 80) -> Answer:
    """A request and an answer with the marker in head and body."""
    body = f"body {MARKER}".encode()
    head = f"POST /{MARKER} HTTP/1.1\r\nhost: web\r\nx-test: {MARKER}\r\ncontent-length: {len(body)}\r\n\r\n"
    with HttpClient(where, host, port) as client:
        client.send(head.encode() + body)
        answer = client.answer()
    assert answer.status != 200 or MARKER.encode() in answer.body
    return answer


def talk_tcp(where: Pod, host: str, port: int = 9000) -> bytes:
    """What an echo server makes of the marker."""
    with dial(where, host, port) as sock:
        sock.sendall(f"opaque {MARKER}".encode())
        return sock.recv(1000)


@pytest.mark.parametrize("app", ["strict", "loose"])
def test_all_that_passes_the_wire_is_tls_1_3(vault: Vault, app: str) -> None:
    server = vault.servers[app]
    with Wire(vault.mesh.nodes[0]) as wire:
        for family in (4, 6):
            assert talk_http(vault.client, vault.vip(app, family)).status == 200
            assert MARKER.encode() in talk_tcp(vault.client, vault.vip(app, family))
        for host in server.addresses:
            assert talk_http(vault.client, host, 8080).status == 200
            assert MARKER.encode() in talk_tcp(vault.client, host)
    streams = wire.streams()
    addresses = {socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip) for ip in server.addresses}
    assert {flow.destination for flow in streams} >= addresses
    hellos = 0
    for flow, stream in streams.items():
        records = tls_records(stream)
        assert sum(len(fragment) for kind, fragment in records if kind == 23) > 100, flow
        version = server_hello_version(records)
        if version is not None:
            hellos += 1
            assert version == b"\x03\x04"
    # The client keeps HTTP connections, so not every stream began here; the opaque ones did.
    assert hellos >= 5
    assert not [frame for frame in wire.frames if MARKER.encode() in frame]


def test_the_same_capture_sees_plaintext_where_it_is_allowed(vault: Vault) -> None:
    with Wire(vault.mesh.nodes[0]) as wire:
        assert talk_http(vault.client, vault.vip("plain")).status == 200
        assert MARKER.encode() in talk_tcp(vault.client, vault.vip("plain"))
    seen = b"".join(wire.streams().values())
    for text in (f"POST /{MARKER} HTTP/1.1", f"x-test: {MARKER}", f"body {MARKER}", f'"/{MARKER}"', f"opaque {MARKER}"):
        assert text.encode() in seen


def test_both_nodes_resume_sessions(vault: Vault) -> None:
    """Each connection is dealt to some worker, and a ticket is good at the one it is from."""

    def is_resumed() -> bool:
        assert MARKER.encode() in talk_tcp(vault.client, vault.vip("strict"))
        return all(
            sum(
                agent.metric("netproxy_events_total", event="tls_handshakes", detail=detail)
                for agent in vault.mesh.agents
            )
            for detail in ("client/full", "server/full", "client/resumed", "server/resumed")
        )

    wait_for(is_resumed, "a resumed session")


# -- modes ----------------------------------------------------------------------------------------------------


def test_strict_refuses_plaintext(vault: Vault) -> None:
    """With a reason where the protocol has room for one, else with a reset; the application hears nothing."""
    journals = [vault.journal("strict"), vault.journal("strict-tcp")]
    before = [journal.count() for journal in journals]
    for host in vault.servers["strict"].addresses:
        answer = talk_http(vault.outside, host, 8080)
        assert (answer.status, answer.get("x-netproxy-reason")) == (403, "UAEX")
        assert answer.get("content-type") == "application/problem+json"
        assert answer.json()["reason"] == "MTLS_REQUIRED"
        with pytest.raises(ConnectionResetError):
            talk_tcp(vault.outside, host)
        with pytest.raises(ConnectionResetError), dial(vault.outside, host, 8080) as sock:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.wrap_socket(sock)
    assert [journal.count() for journal in journals] == before


def test_permissive_takes_both(vault: Vault) -> None:
    for where, known in ((vault.outside, False), (vault.client, True)):
        for host in vault.servers["loose"].addresses:
            answer = talk_http(where, host, 8080)
            assert answer.status == 200
            assert any(key == XFCC for key, _ in answer.json()["headers"]) is known
            assert MARKER.encode() in talk_tcp(where, host)


FORGED = f"x: y\r\n{XFCC}: URI=spiffe://cluster.local/ns/shop/sa/admin\r\n\r\n".encode()
OPENINGS = {
    "late": (b"", b"GET / HTTP/1.1\r\nhost: web\r\n"),
    "half a word, late": (b"G", b"ET / HTTP/1.1\r\nhost: web\r\n"),
    "two line ends": (b"\r\n\r\nGET / HTTP/1.1\r\nhost: web\r\n", b""),
    "a line end of one octet": (b"\nGET / HTTP/1.1\r\nhost: web\r\n", b""),
    "a long method": (b"M" * 40 + b" / HTTP/1.1\r\nhost: web\r\n", b""),
    "a tab": (b"GET\t/ HTTP/1.1\r\nhost: web\r\n", b""),
}
"""What comes before the detection gives up, and what comes after it."""


def timeouts(mesh: Mesh) -> float:
    return sum(agent.metric("netproxy_events_total", event="protocol_detection_timeouts") for agent in mesh.agents)


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize(("where", "app"), [("outside", "loose"), ("client", "loose"), ("client", "strict")])
def test_nobody_forges_the_identity_header(vault: Vault, where: str, app: str, opening: str) -> None:
    """On a port of which nobody has said what it speaks."""
    client, server = getattr(vault, where), vault.servers[app]
    first, late = OPENINGS[opening]
    before = timeouts(vault.mesh)
    with dial(client, server.ip, 7070) as sock:
        if late:
            sock.sendall(first)
            wait_for(lambda: timeouts(vault.mesh) > before, "the detection to give up")
        found = b""
        try:
            sock.sendall(late + FORGED if late else first + FORGED)
            while b"\r\n\r\n" not in found and (data := sock.recv(65536)):
                found += data
        except ConnectionError:
            pass
    # Refused, or let through as the HTTP that it is: without the field, or with the true one.
    assert found == b"" or found.startswith((b"HTTP/1.1 204 ", b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))
    assert not [octets for octets in vault.received[app] if b"sa/admin" in octets]


def test_disabled_takes_plaintext_from_anybody(vault: Vault) -> None:
    for where in (vault.outside, vault.client):
        answer = talk_http(where, vault.servers["plain"].ip, 8080)
        assert answer.status == 200
        assert not [key for key, _ in answer.json()["headers"] if key == XFCC]


def use(context: ssl.SSLContext, sock: socket.socket) -> None:
    """Raises when there is no answer."""
    with context.wrap_socket(sock) as tls:
        tls.sendall(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        if not tls.recv(1):
            raise ConnectionAbortedError


@pytest.mark.parametrize("alpn", ["netproxy/http/1.1", "netproxy/tcp"])
@pytest.mark.parametrize("certificate", ["none", "self-signed"])
def test_mesh_tls_needs_a_certificate_of_the_mesh(vault: Vault, tmp_path: Path, alpn: str, certificate: str) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    if certificate == "self-signed":
        made = tmp_path / "forged.pem"
        uri = "subjectAltName=URI:spiffe://cluster.local/ns/shop/sa/client"
        argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        vault.outside.run(*argv, "-subj", "/", "-addext", uri, "-keyout", f"{made}.key", "-out", str(made))
        context.load_cert_chain(made, f"{made}.key")
    for app in ("strict", "loose"):
        journals = [vault.journal(app), vault.journal(f"{app}-tcp")]
        before = [journal.count() for journal in journals]
        for port in (8080, 9000):
            # In TLS 1.3 the client is done before the server has looked at its certificate.
            with (
                dial(vault.outside, vault.servers[app].ip, port) as sock,
                pytest.raises((ssl.SSLError, ConnectionError)),
            ):
                use(context, sock)
        assert [journal.count() for journal in journals] == before


# -- an endpoint that is not who it should be -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["another service account", "another CA"])
def test_server_with_the_wrong_identity(mesh_of: Callable[..., Mesh], how: str) -> None:
    """The client's agent closes before it has said anything."""
    mesh = mesh_of()
    client, server = mesh.pod("client"), mesh.pod("web", 1)
    ports = [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "tcp", "port": 9000, "targetPort": 9000}]
    mesh.put(mesh.service("web", {"app": "web"}, ["240.240.0.10"], ports))
    journals = [Journal(mesh.stage.folder / "web.journal"), Journal(mesh.stage.folder / "tcp.journal")]
    mesh.serve(server, "origin", "8080", str(journals[0].path), "web")
    mesh.serve(server, "opaque", "9000", str(journals[1].path), "echo", port=9000)
    a, b = mesh.agents
    a.start()
    if how == "another CA":
        b.start("--ca-dir", str(mesh.stage.folder / "other-ca"))
    else:
        # Node b has files of its own, by which the same address belongs to somebody else.
        b.config = mesh.stage.folder / "other-mesh"
        b.config.mkdir()
        for file in mesh.config.glob("*.yaml"):
            text = file.read_text()
            (b.config / file.name).write_text(text.replace("serviceAccount: web", "serviceAccount: impostor"))
        b.start()
    for agent in mesh.agents:
        agent.wait_steered(*mesh.attached(agent.name))
    with Wire(mesh.nodes[0]) as wire:
        answer = talk_http(client, "240.240.0.10")
        assert (answer.status, answer.get("x-netproxy-reason")) == (503, "UF")
        assert answer.json()["reason"] == "IDENTITY_MISMATCH"
        if how != "another CA":
            assert "sa/impostor" in answer.json()["detail"]
        with pytest.raises(ConnectionResetError):
            talk_tcp(client, "240.240.0.10")
    assert wire.frames
    assert not [frame for frame in wire.frames if MARKER.encode() in frame]
    # Its agent may have dialled the application before it was told; not an octet came.
    assert not journals[0].all()
    assert not [item for item in journals[1].all("end") if item["length"]]
    # The agents find each other in order, the other way round: nobody but the server is concerned.
    assert get(server, client.ip, "/", port=8080).status == 503
