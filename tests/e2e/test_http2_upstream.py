"""Clients of either version and servers that speak HTTP/2 only: nghttpd and nginx, and nghttpd behind another agent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.mesh import Mesh, wait_listening

NGINX = """
daemon off; user root; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 128; }}
http {{
  log_format l "$server_protocol $connection $request"; access_log {folder}/access.log l;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; default_type text/plain;
  server {{
    listen 8080 http2; http2_max_concurrent_streams 4; keepalive_requests 50;
    location / {{ root {folder}/www; }}
  }}
}}
"""
SERVERS = {"nghttpd": 61, "nginx": 62, "far": 63}


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client = mesh.pod("client")
        self.folder = mesh.stage.folder
        www = self.folder / "www"
        www.mkdir()
        (www / "small").write_bytes(b"small\n")
        (www / "large").write_bytes(bytes(range(256)) * 20_000)
        self.pods: dict[str, Pod] = {
            "nghttpd": mesh.pod("nghttpd", attach=False),
            "nginx": mesh.pod("nginx", attach=False),
            "far": mesh.pod("far", 1),
        }
        for name, number in SERVERS.items():
            port = {"name": "web", "port": 80, "targetPort": 8080, "appProtocol": "kubernetes.io/h2c"}
            mesh.put(mesh.service(name, {"app": name}, [self.vip(name)], [port]))
            assert number
        for name in ("nghttpd", "far"):
            self.pods[name].start("nghttpd", "--no-tls", "--echo-upload", "-n1", "-d", str(www), "8080")
        (self.folder / "nginx.conf").write_text(NGINX.format(folder=self.folder))
        self.pods["nginx"].start(
            "/usr/sbin/nginx", "-p", str(self.folder), "-e", str(self.folder / "error.log"), "-c", "nginx.conf"
        )
        for pod in self.pods.values():
            wait_listening(pod, 8080)

    @staticmethod
    def vip(name: str) -> str:
        return f"240.240.0.{SERVERS[name]}"

    def curl(self, name: str, path: str, *argv: str) -> str:
        return self.client.run("curl", "-s", "--http1.1", "-m", "20", *argv, f"http://{self.vip(name)}{path}").stdout

    def connections(self, name: str) -> int:
        """That the server has."""
        return len(self.pods[name].run("ss", "-Htn", "state", "established", "sport = :8080").stdout.splitlines())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"h{os.getpid() % 100000}", tmp_path_factory.mktemp("http2")) as mesh:
        made = Lab(mesh)
        mesh.start()
        yield made


servers = pytest.mark.parametrize("server", list(SERVERS))


@servers
def test_an_answer(lab: Lab, server: str) -> None:
    assert lab.curl(server, "/small") == "small\n"
    assert lab.curl(server, "/missing", "-o", "/dev/null", "-w", "%{http_code} %{http_version}") == "404 1.1"


@servers
def test_a_client_of_http2(lab: Lab, server: str) -> None:
    command = ["curl", "-s", "--http2-prior-knowledge", "-m", "20", "-w", "%{http_version}"]
    assert lab.client.run(*command, f"http://{lab.vip(server)}/small").stdout == "small\n2"


def test_a_client_of_http2_that_dials_the_pod(lab: Lab) -> None:
    """In the version that the request came in, all the way."""
    url = f"http://{lab.pods['far'].ip}:8080/small"
    command = ["curl", "-s", "--http2-prior-knowledge", "-m", "20", "-w", "%{http_version}", url]
    assert lab.client.run(*command).stdout == "small\n2"


@servers
def test_a_large_answer(lab: Lab, server: str) -> None:
    target = lab.folder / f"{server}.got"
    lab.curl(server, "/large", "-o", str(target))
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(bytes(range(256)) * 20_000).digest()


@pytest.mark.parametrize("server", ["nghttpd", "far"])
@pytest.mark.parametrize("how", ["length", "chunked"])
def test_a_large_request(lab: Lab, server: str, how: str) -> None:
    sent, target = lab.folder / "www" / "large", lab.folder / f"{server}-{how}.got"
    chunked = ["-H", "transfer-encoding: chunked"] if how == "chunked" else []
    lab.curl(server, "/small", "--data-binary", f"@{sent}", "-H", "expect:", *chunked, "-o", str(target))
    assert target.read_bytes() == sent.read_bytes()


@servers
def test_a_client_that_goes_leaves_the_others_alone(lab: Lab, server: str) -> None:
    for _ in range(5):
        slow = ["-m", "1", "--limit-rate", "10000", "-o", "/dev/null"]
        command = ["curl", "-s", *slow, f"http://{lab.vip(server)}/large"]
        assert lab.client.run(*command, check=False).returncode == 28
        assert lab.curl(server, "/small") == "small\n"


@servers
def test_many_at_once(lab: Lab, server: str) -> None:
    """More than one connection takes at nginx, which also ends its connections by GOAWAY."""
    urls = f"http://{lab.vip(server)}/small?[1-200]"
    out = lab.client.run("curl", "-s", "-Z", "--parallel-max", "40", "--http1.1", "-m", "60", urls).stdout
    assert out == "small\n" * 200
    if server == "nghttpd":
        assert lab.connections(server) == 1


def test_nginx_got_http2_on_few_connections(lab: Lab) -> None:
    log = lab.folder / "access.log"
    lab.curl("nginx", "/small?last")
    wait_for(lambda: "last" in log.read_text(), "the request to be logged", 10.0)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert {line[0] for line in lines} == {"HTTP/2.0"}
    assert len({line[1] for line in lines}) < len(lines) / 2
