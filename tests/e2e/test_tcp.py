"""Opaque bytes through both agents, and connections that must not go in circles or out of bounds."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.mesh import HttpClient, Journal, Mesh, dial, get, reset_on_close
from tests.e2e.servers.opaque import GREETING

NUMBERS = {"echo": 40, "greet": 41, "digest": 42, "parting": 43, "tls": 44, "private": 45, "own": 46, "near": 47}
PORTS = {"echo": 9000, "greet": 9001, "digest": 9002, "parting": 9003, "tls": 9443, "private": 9100}


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client = mesh.pod("client")
        self.near = mesh.pod("near")
        self.far = mesh.pod("far", 1)
        self.outside = mesh.stage.add_pod("outside", mesh.nodes[1])  # no Workload has its address
        mesh.put(mesh.mesh_config(detectTimeout="300ms"))
        for name, target in PORTS.items():
            port = {"port": target, "targetPort": target}
            if name in ("echo", "digest", "parting"):
                port["appProtocol"] = "tcp"
            mesh.put(mesh.service(name, {"app": "far"}, self.vips(name), [port]))
        mesh.put(mesh.service("own", {"app": "client"}, self.vips("own")))
        mesh.put(mesh.service("near", {"app": "near"}, self.vips("near")))

    @staticmethod
    def vips(name: str) -> list[str]:
        return [f"240.240.0.{NUMBERS[name]}", f"fd00:240::{NUMBERS[name]}"]

    def journal(self, name: str) -> Journal:
        return Journal(self.mesh.stage.folder / f"{name}.journal")

    def serve_opaque(self, pod: Pod, name: str, mode: str, *address: str) -> None:
        self.mesh.serve(
            pod, "opaque", str(PORTS[name]), str(self.journal(name).path), mode, *address, port=PORTS[name]
        )  # fmt: skip

    def dial(self, name: str, family: int = 4) -> socket.socket:
        return dial(self.client, self.vips(name)[family == 6], PORTS[name])

    def certificate(self) -> Path:
        path = self.mesh.stage.folder / "own.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", "/CN=own.example", "-addext", "subjectAltName=DNS:own.example", "-days", "2"]
        subprocess.run([*command, "-keyout", str(path), "-out", str(path) + ".crt"], check=True, capture_output=True)
        path.write_text(path.read_text() + Path(str(path) + ".crt").read_text())
        return path


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"t{os.getpid() % 100000}", tmp_path_factory.mktemp("tcp"), families=(4, 6)) as mesh:
        made = Lab(mesh)
        for name in ("echo", "greet", "digest", "parting"):
            made.serve_opaque(made.far, name, name)
        made.serve_opaque(made.far, "private", "echo", "127.0.0.1")
        made.serve_opaque(made.outside, "echo", "echo")
        mesh.serve(made.far, "tls_echo", str(PORTS["tls"]), str(made.certificate()), port=PORTS["tls"])
        for pod in (made.client, made.near):
            mesh.serve(pod, "origin", "8080", str(mesh.stage.folder / f"{pod.name}.journal"), pod.name)
        mesh.start()
        yield made


def read_to_end(sock: socket.socket) -> bytes:
    found = b""
    while data := sock.recv(1 << 16):
        found += data
    return found


def is_refused(where: Pod, host: str, port: int, say: bytes = b"anybody\r\n") -> bool:
    """Not one octet comes back, and the connection ends by itself."""
    try:
        with dial(where, host, port) as sock:
            sock.sendall(say)
            return sock.recv(1) == b""
    except ConnectionError:
        return True


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send, and read as many octets as were sent."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    found = bytearray()
    while len(found) < len(data) and (more := sock.recv(1 << 16)):
        found += more
    sender.join()
    return bytes(found)


# -- bytes as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "data",
    [b"\x00\xff binary \x80" * 100_000, b"GET / HTTP/1.1\nthis is no HTTP\r\n", b"\x16\x03\x01\x02\x00\x01hello"],
    ids=["binary", "like HTTP", "like TLS"],
)
def test_declared_tcp_is_never_parsed(lab: Lab, family: int, data: bytes) -> None:
    with lab.dial("echo", family) as sock:
        assert exchange(sock, data) == data


@pytest.mark.parametrize("family", [4, 6])
def test_server_that_speaks_first_on_an_undeclared_port(lab: Lab, family: int) -> None:
    """Both agents wait in vain for the client's first octets, then relay, and say so."""
    agent = lab.mesh.agents[0]

    def timeouts() -> float:
        return agent.metric("netproxy_events_total", event="protocol_detection_timeouts")

    before = timeouts()
    with lab.dial("greet", family) as sock:
        assert sock.recv(1000) == GREETING
        assert exchange(sock, b"EHLO\r\n") == b"EHLO\r\n"
    assert timeouts() == before + 1


def test_half_close_by_the_client(lab: Lab) -> None:
    data = b"all there is" * 10_000
    with lab.dial("digest") as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode()
    assert lab.journal("digest").all("end")[-1]["how"] == "eof"


def test_half_close_without_a_word(lab: Lab) -> None:
    with lab.dial("digest") as sock:
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == f"0 {hashlib.sha256(b'').hexdigest()}\n".encode()


def test_half_close_by_the_server(lab: Lab) -> None:
    ended = lab.journal("parting").count("end")
    data = b"last words" * 50_000
    with lab.dial("parting") as sock:
        sock.sendall(data[:10])
        assert read_to_end(sock) == b"goodbye\r\n"
        sock.sendall(data[10:])
    wait_for(lambda: lab.journal("parting").count("end") > ended, "the server to see the end")
    found = lab.journal("parting").all("end")[-1]
    assert (found["length"], found["how"]) == (len(data), "eof")
    assert found["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_reset_stays_a_reset(lab: Lab) -> None:
    """An end of stream would tell the server that it has everything."""
    ended = lab.journal("digest").count("end")
    with lab.dial("digest") as sock:
        sock.sendall(b"only a part")
        wait_for(lambda: lab.journal("digest").count("open") > ended, "the server to be connected")
        reset_on_close(sock)
    wait_for(lambda: lab.journal("digest").count("end") > ended, "the server to see the end")
    assert lab.journal("digest").all("end")[-1]["how"] == "reset"


@pytest.mark.parametrize("direct", [False, True], ids=["by VIP", "by pod address"])
def test_the_applications_own_tls_is_not_touched(lab: Lab, direct: bool) -> None:
    own = (lab.mesh.stage.folder / "own.pem").read_text()
    context = ssl.create_default_context(cafile=str(lab.mesh.stage.folder / "own.pem"))
    sock = dial(lab.client, lab.far.ip, PORTS["tls"]) if direct else lab.dial("tls")
    with sock, context.wrap_socket(sock, server_hostname="own.example") as tls:
        assert tls.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(own[own.index("-----BEGIN CERT") :])
        tls.sendall(b"secret")
        assert tls.recv(100) == b"secret"


def test_openssl_through_the_mesh(lab: Lab) -> None:
    argv = ["openssl", "s_client", "-connect", f"{lab.vips('tls')[0]}:{PORTS['tls']}", "-servername", "own.example"]
    found = lab.client.run(*argv, "-CAfile", str(lab.mesh.stage.folder / "own.pem"), "-verify_return_error")
    assert "Verify return code: 0 (ok)" in found.stdout


# -- where it must not go -------------------------------------------------------------------------------------


def test_loopback_of_a_pod_is_private(lab: Lab) -> None:
    with dial(lab.far, "127.0.0.1", PORTS["private"]) as sock:
        assert exchange(sock, b"own") == b"own"
    opened = lab.journal("private").count("open")
    for where in (lab.client, lab.near, lab.outside):
        assert is_refused(where, lab.far.ip, PORTS["private"])
    for vip in lab.vips("private"):
        assert is_refused(lab.client, vip, PORTS["private"])
    assert lab.journal("private").count("open") == opened


def test_own_address_and_loopback_are_not_steered(lab: Lab) -> None:
    for host in (*lab.client.addresses, "127.0.0.1", "::1"):
        with HttpClient(lab.client, host, 8080) as client:
            answer = client.get("/own", "x-forwarded-client-cert: kept")
            assert answer.json()["server"] == "client"
            assert ["x-forwarded-client-cert", "kept"] in answer.json()["headers"]


def test_service_that_selects_its_client(lab: Lab) -> None:
    for vip in lab.vips("own"):
        assert get(lab.client, vip, "/own").json()["server"] == "client"


def test_two_pods_of_one_node(lab: Lab) -> None:
    for vip in lab.vips("near"):
        told = get(lab.client, vip, "/near").json()
        assert told["server"] == "near"
        assert [v for k, v in told["headers"] if k == "x-forwarded-client-cert" and v.endswith("/sa/client")]
    with HttpClient(lab.near, lab.client.ip, 8080) as client:
        assert client.get("/").json()["server"] == "client"


@pytest.mark.parametrize("say", [b"GET / HTTP/1.0\r\n\r\n", b"\x00\x01\x02\x03", b""], ids=["http", "raw", "eof"])
def test_the_listeners_themselves_lead_nowhere(lab: Lab, say: bytes) -> None:
    """Dialled from inside by any address, and from outside by the pod's: no answer of an app, no loop."""
    own = [(lab.client, host) for host in ("127.0.0.1", "::1", *lab.client.addresses)]
    others = [(pod, host) for pod in (lab.near, lab.far, lab.outside) for host in lab.client.addresses]
    journals = [lab.journal(name) for name in ("client", "near")]
    before = [journal.count() for journal in journals]
    workers = [agent.pids("worker") for agent in lab.mesh.agents]
    for where, host in own + others:
        for port in (15001, 15006):
            try:
                with dial(where, host, port) as sock:
                    sock.sendall(say)
                    if not say:
                        sock.shutdown(socket.SHUT_WR)
                    found = read_to_end(sock)
            except ConnectionError:
                continue
            assert found == b"" or found.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 502 ")), (where.name, host, port)
    assert [journal.count() for journal in journals] == before
    assert [agent.pids("worker") for agent in lab.mesh.agents] == workers
    for agent in lab.mesh.agents:
        wait_for(lambda agent=agent: agent.metric("netproxy_downstream_connections") < 32, "no loop")
        assert agent.metric("netproxy_events_total", event="internal_errors") == 0
    assert get(lab.client, lab.vips("near")[0], "/").status == 200


def test_nobody_listens(lab: Lab) -> None:
    assert is_refused(lab.client, lab.far.ip, 9999)


def test_unknown_destinations(lab: Lab) -> None:
    """Relayed as they are, or refused when the policy says so; what the mesh knows is not concerned."""
    hosts = lab.outside.addresses
    data = b"GET /x HTTP/1.1\nnot parsed\x00" * 1000
    for host in hosts:
        with dial(lab.client, host, PORTS["echo"]) as sock:
            assert exchange(sock, data) == data
    opened = lab.journal("echo").count("open")
    lab.mesh.put(lab.mesh.mesh_config(detectTimeout="300ms", outboundPolicy="deny"))
    try:
        wait_for(lambda: is_refused(lab.client, hosts[0], PORTS["echo"]), "the policy to be in force")
        opened = lab.journal("echo").count("open")
        for host in hosts:
            assert is_refused(lab.client, host, PORTS["echo"], b"\x00not parsed" * 1000)
        assert lab.journal("echo").count("open") == opened
        with lab.dial("echo") as sock:
            assert exchange(sock, data) == data
        with dial(lab.client, lab.far.ip, PORTS["echo"]) as sock:
            assert exchange(sock, data) == data
    finally:
        lab.mesh.put(lab.mesh.mesh_config(detectTimeout="300ms"))
    wait_for(lambda: not is_refused(lab.client, hosts[0], PORTS["echo"]), "the policy to be gone")
