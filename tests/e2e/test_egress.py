"""What leaves the mesh: ExternalServices and the outbound policy, with nginx, OpenSSL and curl."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.mesh import HttpClient, Journal, Mesh, dial, wait_listening
from tests.e2e.servers.opaque import GREETING
from tests.e2e.test_resilience import wait_replaced

NGINX = """
daemon off; master_process off; user root; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 128; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; default_type text/plain;
  server {{
    listen 80; listen [::]:80;
    listen 443 ssl; listen [::]:443 ssl;
    ssl_certificate {folder}/own.crt; ssl_certificate_key {folder}/own.key;
    location / {{ return 200 "{name} $host\\n"; }}
    location /slow {{ limit_rate 1000; alias {folder}/; }}
  }}
}}
"""
FAMILIES = (4, 6)
NO_CHECK = ssl.create_default_context()
NO_CHECK.check_hostname, NO_CHECK.verify_mode = False, ssl.CERT_NONE


def external(name: str, *hosts: str, ports: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "netproxy.mesh/v1alpha1",
        "kind": "ExternalService",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {**({"hosts": list(hosts)} if hosts else {}), "ports": ports, **spec},
    }


WEB = [{"port": 80, "protocol": "HTTP"}, {"port": 443, "protocol": "TLS"}]
RAW = [{"port": 9000, "protocol": "TCP"}]


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.agent = mesh.agents[0]
        self.client = mesh.pod("client")
        self.good = self.outside("good")
        self.other = self.outside("other")
        self.resolver = mesh.stage.add_pod("resolver", mesh.nodes[0])
        self.start_resolver()
        mesh.put(
            external("good", "good.example", ports=WEB, endpoints=self.good.addresses),
            external("wild", "*.wild.example", ports=WEB, endpoints=self.good.addresses),
        )
        mesh.put(external("named", "named.example", "*.named.example", "half.example", ports=WEB))
        mesh.put(external("raw", "raw.example", ports=RAW))
        self.policy("deny")

    def start_resolver(self) -> None:
        """It knows where good and other are, and says of half.example that it is also where nobody listens."""
        where = {"named.example": [self.good], "raw.example": [self.good], "a.named.example": [self.other]}
        where |= {"loop.named.example": [], "half.example": [self.resolver, self.good]}
        hosts = self.mesh.stage.folder / "names"
        lines = [f"{address} {name}" for name, pods in where.items() for pod in pods for address in pod.addresses]
        hosts.write_text("\n".join([*lines, "127.0.0.1 loop.named.example"]) + "\n")
        self.resolver.start(
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"),
            *("--pid-file=", "--local=/example/", f"--addn-hosts={hosts}"),
        )
        wait_listening(self.resolver, 53)
        self.client.resolv(self.resolver.ip)

    def policy(self, policy: str) -> None:
        self.mesh.put(self.mesh.mesh_config(detectTimeout="300ms", outboundPolicy=policy))

    def outside(self, name: str) -> Pod:
        """No Workload has its address. nginx on 80 and 443, a server that speaks first on 9000."""
        pod = self.mesh.stage.add_pod(name, self.mesh.nodes[0])
        folder = self.mesh.stage.folder / name
        folder.mkdir()
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", f"/CN={name}", "-days", "2", "-keyout", str(folder / "own.key")]
        subprocess.run([*command, "-out", str(folder / "own.crt")], check=True, capture_output=True)
        (folder / "large").write_bytes(bytes(1_000_000))
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, name=name))
        pod.start("/usr/sbin/nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", "nginx.conf")
        self.mesh.serve(pod, "opaque", "9000", str(folder / "journal"), "greet", port=9000)
        wait_listening(pod, 443)
        return pod

    def opened(self, pod: Pod) -> int:
        """Connections to port 9000."""
        return Journal(self.mesh.stage.folder / pod.name / "journal").count("open")

    def curl(self, url: str, at: str, *argv: str) -> str:
        """What is answered, with `url`'s name taken to be at the address `at`; "" when the connection is reset."""
        name = url.partition("://")[2].partition("/")[0].partition(":")[0]
        at = f"[{at}]" if ":" in at else at
        resolve = [part for port in (80, 443, 81) for part in ("--resolve", f"{name}:{port}:{at}")]
        return self.client.run("curl", "-sk", "-m", "20", *resolve, *argv, url, check=False).stdout

    def greeted(self, host: str, port: int = 9000) -> bool:
        """Does a server that speaks first get to say it?"""
        try:
            with dial(self.client, host, port) as sock:
                return sock.recv(100) == GREETING
        except ConnectionError:
            return False

    def event(self, event: str, detail: str) -> float:
        return self.agent.metric("netproxy_events_total", event=event, detail=detail)

    def in_force(self, policy: str) -> None:
        """Wait until the policy is."""
        self.policy(policy)
        wait_for(lambda: self.greeted(self.other.ip) == (policy == "allow"), f"the policy {policy} to be in force")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"x{os.getpid() % 100000}", tmp_path_factory.mktemp("egress"), families=FAMILIES, nodes=1) as mesh:
        made = Lab(mesh)
        mesh.start()
        assert not made.agent.status()["rejected"]
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_leads_to_where_it_is(lab: Lab, family: int) -> None:
    """Whatever address the client claims for it: with a forged SNI or Host nobody gets to the other server."""
    for pod in (lab.good, lab.other):
        at = pod.addresses[family == 6]
        for name in ("good.example", "a.wild.example", "a.b.wild.example", "GOOD.example"):
            assert lab.curl(f"http://{name}/", at) == f"good {name.lower()}\n"
            assert lab.curl(f"https://{name}/", at) == f"good {name.lower()}\n"
    service = {"destination_service": "external/shop/wild"}
    assert lab.agent.metric("netproxy_requests_total", **service) >= 4
    assert lab.agent.metric("netproxy_tcp_connections_opened_total", **service) >= 4


def test_openssl_s_client_sees_the_certificate_of_the_named_one(lab: Lab) -> None:
    run = subprocess.run(
        lab.client.command("openssl", "s_client", "-connect", f"{lab.other.ip}:443", "-servername", "good.example"),
        capture_output=True, text=True, input="", timeout=30, check=False,
    )  # fmt: skip
    assert "CN = good" in run.stdout
    with dial(lab.client, lab.other.ip, 443) as sock, pytest.raises(OSError):
        NO_CHECK.wrap_socket(sock)  # no SNI


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_that_is_asked_for(lab: Lab, family: int) -> None:
    """To the client it is a virtual address; where it is, is what the client's own resolver says."""
    lab.in_force("deny")

    def ask(url: str) -> str:
        return lab.client.run("curl", "-sk", "-m", "20", f"-{family}", url, check=False).stdout

    for name, pod in (("named.example", "good"), ("a.named.example", "other"), ("half.example", "good")):
        assert ask(f"http://{name}/") == f"{pod} {name}\n"
        assert ask(f"https://{name}/") == f"{pod} {name}\n"
    found = lab.client.run("getent", f"ahostsv{family}", "raw.example").stdout.split()[0]
    assert ipaddress.ip_address(found) in ipaddress.ip_network(("240.240.0.0/16", "fd00:240::/32")[family == 6])
    assert lab.greeted(found)
    assert not lab.greeted(found, 9001)
    service = {"destination_service": "external/shop/raw"}
    assert lab.agent.metric("netproxy_tcp_connections_opened_total", **service) >= 1


def test_names_that_lead_nowhere(lab: Lab) -> None:
    for name, why in (("no.named.example", "no.named.example"), ("loop.named.example", "stands for 127.0.0.1")):
        answer = json.loads(lab.curl(f"http://{name}/", lab.other.ip))
        assert (answer["status"], answer["reason"]) == (503, "DNS_FAILED")
        assert answer["decided_by"] == "ExternalService shop/named"
        assert why in answer["detail"]
        assert lab.curl(f"https://{name}/", lab.other.ip) == ""
    # And one that is known leads there, from wherever.
    assert lab.curl("https://named.example/", lab.other.ip) == "good named.example\n"
    assert lab.curl("https://a.named.example/", lab.good.ip) == "other a.named.example\n"


def test_what_is_not_declared_is_refused_and_told(lab: Lab) -> None:
    lab.in_force("deny")
    denied = {kind: lab.event("egress_denied", kind) for kind in ("http", "tls", "tcp")}
    for pod in (lab.good, lab.other):
        for name in ("evil.example", "wild.example", "xgood.example"):
            answer = lab.curl(f"http://{name}/", pod.ip, "-i")
            assert answer.startswith("HTTP/1.1 502 ")
            assert "\nx-netproxy-reason: NR\n" in answer
            assert '"reason": "EGRESS_DENIED"' in answer
            assert f"hosts: [{name}]" in answer
            assert lab.curl(f"https://{name}/", pod.ip) == ""
        # The port is part of what is allowed.
        assert "EGRESS_DENIED" in lab.curl("http://good.example:81/", pod.ip)
        opened = lab.opened(pod)
        assert not lab.greeted(pod.ip)
        assert lab.opened(pod) == opened
    assert lab.event("egress_denied", "http") == denied["http"] + 8
    assert lab.event("egress_denied", "tls") == denied["tls"] + 6
    assert lab.event("egress_denied", "tcp") >= denied["tcp"] + 2
    assert lab.event("protocol_detection_timeouts", "egress") > 0


def test_each_request_of_a_connection_has_its_own_host(lab: Lab) -> None:
    lab.in_force("deny")
    with HttpClient(lab.client, lab.other.ip, 80) as client:
        for host, status in (("good.example", 200), ("evil.example", 502), ("a.wild.example", 200), ("good", 502)):
            client.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = client.answer()
            assert (answer.status, answer.body.startswith(b"good")) == (status, status == 200)


def test_what_is_not_declared_is_let_through_as_it_is(lab: Lab) -> None:
    lab.in_force("allow")
    try:
        allowed = {kind: lab.event("egress_allowed", kind) for kind in ("http", "tls", "tcp")}
        assert lab.curl("http://evil.example/", lab.other.ip) == "other evil.example\n"
        assert lab.curl("https://evil.example/", lab.other.ip) == "other evil.example\n"
        assert lab.curl("https://good.example/", lab.other.ip) == "good good.example\n"
        assert lab.greeted(lab.other.ip)
        for kind, count in allowed.items():
            assert lab.event("egress_allowed", kind) > count
    finally:
        lab.in_force("deny")


def test_by_address(lab: Lab) -> None:
    """Within its networks an address is dialled as it is, and only on its ports."""
    lab.in_force("deny")
    web = [{"port": 80, "protocol": "HTTP"}, {"port": 443, "protocol": "TLS"}, *RAW]
    lab.mesh.put(external("net", ports=web, addresses=[lab.other.ip, f"{lab.other.addresses[1]}/128"]))
    try:
        wait_for(lambda: lab.greeted(lab.other.ip), "the ExternalService to be in force")
        assert lab.greeted(lab.other.addresses[1])
        assert not lab.greeted(lab.good.ip)
        for address in lab.other.addresses:
            assert lab.curl("http://any.example/", address) == "other any.example\n"
            assert lab.curl("https://any.example/", address) == "other any.example\n"
        assert lab.curl("https://any.example/", lab.good.ip) == ""
        assert lab.agent.metric("netproxy_tcp_connections_opened_total", destination_service="external/shop/net") >= 4
    finally:
        lab.mesh.drop("ExternalService", "net")
    wait_for(lambda: not lab.greeted(lab.other.ip), "the ExternalService to be gone")


def test_without_a_brain_and_with_a_new_worker(lab: Lab) -> None:
    """What may leave is in the supervisor's store, and names are asked for by the worker."""
    lab.in_force("deny")
    brain, workers = lab.agent.pids("brain"), lab.agent.pids("worker")
    os.kill(brain[0], signal.SIGSTOP)
    try:
        os.kill(workers[0], signal.SIGKILL)
        # Refused while there is no worker, and never let through otherwise.
        wait_for(lambda: lab.curl("https://named.example/", lab.other.ip), "the worker to be replaced")
        for _ in range(5):
            assert lab.curl("https://named.example/", lab.other.ip) == "good named.example\n"
            assert lab.curl("https://evil.example/", lab.other.ip) == ""
            assert "EGRESS_DENIED" in lab.curl("http://evil.example/", lab.other.ip)
    finally:
        os.kill(brain[0], signal.SIGCONT)
    wait_replaced(lab.agent, "worker", set(workers))


def test_a_change_ends_just_what_it_forbids(lab: Lab) -> None:
    lab.in_force("allow")
    with (
        dial(lab.client, lab.other.ip, 9000) as undeclared,
        NO_CHECK.wrap_socket(dial(lab.client, lab.good.ip, 443), server_hostname="good.example") as declared,
        HttpClient(lab.client, lab.other.ip, 80) as slow,
        HttpClient(lab.client, lab.other.ip, 80) as forbidden,
    ):
        assert undeclared.recv(100) == GREETING
        forbidden.send(b"GET /slow/large HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        slow.send(b"GET /slow/large HTTP/1.1\r\nHost: good.example\r\n\r\n")
        for client in (slow, forbidden):
            assert client.sock.recv(15) == b"HTTP/1.1 200 OK"
        lab.policy("deny")
        for sock in (undeclared, forbidden.sock):
            with pytest.raises(ConnectionResetError):
                while sock.recv(100_000):
                    pass
        declared.sendall(b"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n")
        assert declared.recv(1000).startswith(b"HTTP/1.1 200")
        slow.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            while slow.sock.recv(100_000):
                pass
        # And what was declared ends with its declaration.
        lab.mesh.drop("ExternalService", "good")
        try:
            for sock in (declared, slow.sock):
                sock.settimeout(20)
                wait_end(sock)
            closed = {"destination_service": "external/shop/good", "reason": "EGRESS_DENIED"}
            assert lab.agent.metric("netproxy_tcp_connections_closed_total", **closed) == 1
        finally:
            lab.mesh.put(external("good", "good.example", ports=WEB, endpoints=lab.good.addresses))
    wait_for(lambda: lab.curl("http://good.example/", lab.good.ip).startswith("good "), "the host to be back")


def wait_end(sock: socket.socket) -> None:
    """Of a connection; a TLS socket may tell a reset as an end of stream."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(100_000):
            pass
