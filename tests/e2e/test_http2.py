"""Clients that speak HTTP/2 with prior knowledge: curl, nghttp and h2load, through both agents, to servers of HTTP/1.1
and HTTP/2."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator

import pytest

from examples.stage import Pod, wait_for
from tests.e2e.mesh import NAMESPACE, Journal, Mesh, wait_listening

WEB, H2C, AS_IT_CAME, NGINX, STRICT = (f"240.240.0.{number}" for number in (71, 72, 73, 74, 75))
XFCC = "x-forwarded-client-cert"
NGINX_CONF = """
daemon off; user root; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {folder}/access.log; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; default_type text/plain;
  server {{ listen 8080; keepalive_requests 100; location / {{ root {folder}/www; }} }}
}}
"""


class Lab:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.folder = mesh.stage.folder
        self.journal = Journal(self.folder / "web.journal")
        self.client = mesh.pod("client")
        self.outside = mesh.pod("outside", attach=False)
        self.web, self.h2c, self.nginx = mesh.pod("web", 1), mesh.pod("h2c", 1), mesh.pod("nginx", 1)
        www = self.folder / "www"
        www.mkdir()
        (www / "small").write_bytes(b"small\n")
        (www / "large").write_bytes(bytes(range(256)) * 20_000)
        for name, vip, app, protocol in (
            ("web", WEB, "web", "http"),
            ("h2c", H2C, "h2c", "kubernetes.io/h2c"),
            ("as-it-came", AS_IT_CAME, "h2c", ""),
            ("nginx", NGINX, "nginx", "http"),
        ):
            port = {"name": "p", "port": 80, "targetPort": 8080}
            mesh.put(mesh.service(name, {"app": app}, [vip], [{**port, "appProtocol": protocol} if protocol else port]))
        mesh.serve(self.web, "origin", "8080", str(self.journal.path), "web")
        self.h2c.start("nghttpd", "--no-tls", "--echo-upload", "-n1", "-d", str(www), "8080")
        (self.folder / "nginx.conf").write_text(NGINX_CONF.format(folder=self.folder))
        self.nginx.start(
            "/usr/sbin/nginx", "-p", str(self.folder), "-e", str(self.folder / "error.log"), "-c", "nginx.conf"
        )
        for pod in (self.h2c, self.nginx):
            wait_listening(pod, 8080)

    def curl(self, *argv: str, pod: Pod | None = None) -> str:
        return (pod or self.client).run("curl", "-sS", "--http2-prior-knowledge", "-m", "20", *argv).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Mesh(f"d{os.getpid() % 100000}", tmp_path_factory.mktemp("http2")) as mesh:
        made = Lab(mesh)
        mesh.start()
        yield made


def test_curl_to_http1(lab: Lab) -> None:
    told = json.loads(lab.curl("-f", "-H", "cookie: a=1", "-H", "cookie: b=2", f"http://{WEB}/a/b%20c?q=1"))
    fields = [(name.lower(), value) for name, value in told["headers"]]
    assert (told["method"], told["target"]) == ("GET", "/a/b%20c?q=1")
    assert [value for name, value in fields if name == "host"] == [WEB]
    assert [value for name, value in fields if name == "cookie"] == ["a=1; b=2"]
    assert any(name == XFCC and f"/ns/{NAMESPACE}/sa/" in value for name, value in fields)
    assert ("x-forwarded-proto", "http") in fields
    out = lab.curl("-o", "/dev/null", "-w", "%{http_code} %{http_version}", f"http://{WEB}/")
    assert out == "200 2"


@pytest.mark.parametrize("vip", [H2C, AS_IT_CAME])
def test_curl_to_http2(lab: Lab, vip: str) -> None:
    assert lab.curl("-f", f"http://{vip}/small") == "small\n"


@pytest.mark.parametrize("vip", [H2C, AS_IT_CAME, NGINX])
def test_a_large_answer(lab: Lab, vip: str) -> None:
    target = lab.folder / "got"
    lab.curl("-f", "-o", str(target), f"http://{vip}/large")
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(bytes(range(256)) * 20_000).digest()


def test_a_large_request(lab: Lab) -> None:
    sent = (lab.folder / "www" / "large").read_bytes()
    told = json.loads(lab.curl("-f", "--data-binary", f"@{lab.folder}/www/large", f"http://{WEB}/"))
    assert (told["length"], told["sha256"]) == (len(sent), hashlib.sha256(sent).hexdigest())
    target = lab.folder / "echoed"
    lab.curl("-f", "--data-binary", f"@{lab.folder}/www/large", "-o", str(target), f"http://{H2C}/small")
    assert target.read_bytes() == sent


def test_nghttp_has_many_on_one_connection(lab: Lab) -> None:
    urls = [f"http://{WEB}/{number}" for number in range(30)]
    out = lab.client.run("nghttp", "-s", "-n", *urls).stdout
    assert len(re.findall(r" 200 +\d+\S* /\d+", out)) == 30


def test_h2load(lab: Lab) -> None:
    for vip in (NGINX, H2C):
        out = lab.client.run("h2load", "-n", "1000", "-c", "4", "-m", "50", f"http://{vip}/small").stdout
        assert "1000 done, 1000 succeeded, 0 failed, 0 errored" in out


def test_what_is_refused_is_answered(lab: Lab) -> None:
    """By the agent of the caller, and as STRICT by the other's."""
    lab.mesh.put(lab.mesh.peer_authentication("STRICT", "web"))
    address = lab.web.addresses[0]

    def refused() -> bool:
        said = ["-o", "/dev/null", "-w", "%{http_code} %{http_version}"]
        return lab.curl(*said, f"http://{address}:8080/", pod=lab.outside) == "403 2"

    wait_for(refused, "STRICT to be in force", 20.0)
    assert json.loads(lab.curl(f"http://{address}:8080/", pod=lab.outside))["reason"] == "MTLS_REQUIRED"
    lab.mesh.drop("PeerAuthentication", "web")


def test_a_client_that_goes_leaves_the_others_alone(lab: Lab) -> None:
    for _ in range(3):
        slow = ["-m", "1", "--limit-rate", "10000", "-o", "/dev/null"]
        command = ["curl", "-s", "--http2-prior-knowledge", *slow, f"http://{NGINX}/large"]
        assert lab.client.run(*command, check=False).returncode == 28
        assert lab.curl(f"http://{NGINX}/small") == "small\n"


def test_what_breaks_the_protocol_is_told_why(lab: Lab) -> None:
    code = (
        "import socket,sys;s=socket.create_connection((sys.argv[1],80),20);"
        "s.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n'+bytes.fromhex('000000040000000000')"
        "+bytes.fromhex('000008060000000000')+b'12345678'+bytes.fromhex('000004080000000000')+bytes(4));"
        "d=b''\nwhile c:=s.recv(4096): d+=c\nsys.stdout.write(d.hex())"
    )
    out = bytes.fromhex(lab.client.run(sys.executable, "-c", code, WEB).stdout)
    assert b"12345678" in out
    assert out.endswith(b"WINDOW_UPDATE of nothing (RFC 9113 6.9)")
