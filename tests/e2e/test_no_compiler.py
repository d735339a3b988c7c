"""Installed where no C compiler is: everything works, by the reference engines, and says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from examples.agent import Agent
from examples.stage import Node, Stage
from tests.e2e.mesh import Mesh, wait_listening

ROOT = Path(__file__).parents[2]
VIP = "240.240.0.71"
PYPROJECT = ("pyproject.toml", "README.md", "LICENSE")
SAYS = "{}: not compiled, a request costs more"


class Installation:
    """The project in a venv of its own, which finds everything else in ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.empty = folder / "bin"
        self.empty.mkdir()
        # No compiler by any name, and no variable that leads to one.
        self.environ = {"PATH": str(self.empty), "HOME": str(folder), "COLUMNS": "200", "NO_COLOR": "1", "CC": "cc"}

    def install(self) -> str:
        source = self.folder / "source"
        source.mkdir()
        for name in PYPROJECT:
            shutil.copy(ROOT / name, source)
        for package in ("netproxy", "redirect"):
            built = shutil.ignore_patterns("*.so", "*_native.c", "delivery.c", "__pycache__", "*.egg-info")
            shutil.copytree(ROOT / package, source / package, built)  # type: ignore[call-overload]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder / "venv"], check=True)
        # Not of our venv: its own .pth files, which lead to this checkout.
        (self.site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--no-cache-dir"]
        pip = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "-v", *options, source]
        done = subprocess.run(pip, capture_output=True, text=True, env=self.environ, cwd=self.folder, timeout=150)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    @property
    def site(self) -> Path:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.folder / "venv" / "lib" / version / "site-packages"

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-P", "-m", "netproxy", *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.tools, timeout=60)

    @property
    def tools(self) -> dict[str, str]:
        """For an agent, which may use the host's programs."""
        return {**self.environ, "PATH": os.environ["PATH"]}


class InstalledAgent(Agent):
    def __init__(self, installation: Installation, stage: Stage, node: Node, config: Path) -> None:
        super().__init__(stage, node, config)
        self.python = installation.python

    def command(self, verb: str, *argv: str) -> list[str]:
        _, *rest = super().command(verb, *argv)
        return [str(self.python), "-P", *rest]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    made = Installation(tmp_path_factory.mktemp("installed"))
    before = {path: path.stat().st_mtime_ns for path in built()}
    assert shutil.which("cc", path=made.environ["PATH"]) is None
    text = made.install()
    assert "h1_native" in text and "h2_native" in text, text[-4000:]
    assert {path: path.stat().st_mtime_ns for path in built()} == before  # the checkout is as it was
    return made


def built() -> list[Path]:
    return [
        *ROOT.glob("netproxy/**/*.so"),
        *ROOT.glob("netproxy/**/*.c"),
        *ROOT.glob("build"),
        *ROOT.glob("*.egg-info"),
    ]


def test_what_is_installed_is_whole_without_anything_compiled(installation: Installation) -> None:
    assert not list((installation.site / "netproxy").rglob("*.so"))
    code = "import netproxy.codec.h1 as h1, netproxy.codec.h2 as h2; print(h1.__file__, h1.ENGINES, h2.ENGINES)"
    done = subprocess.run(
        [installation.python, "-P", "-c", code], capture_output=True, text=True, env=installation.environ
    )
    where = installation.site / "netproxy" / "codec" / "h1.py"
    assert done.stdout.strip() == f"{where} ('reference',) ('reference',)", done.stderr


def test_check_says_so(installation: Installation, tmp_path: Path) -> None:
    done = installation.run("check", "--node", "none", "--run-root", str(tmp_path), "-o", "json")
    found = {item["name"]: item for item in json.loads(done.stdout)["checks"]}
    parts = {"HTTP/1 engine": "reference", "HTTP/2 engine": "reference", "relay": "interpreted", "TCP streams": "loop"}
    for name, part in parts.items():
        assert (found[name]["ok"], found[name]["detail"]) == (None, SAYS.format(part))


@pytest.mark.parametrize("protocol", ["1", "2"])
def test_what_was_not_compiled_can_not_be_chosen(installation: Installation, protocol: str, tmp_path: Path) -> None:
    done = installation.run("run", "-f", str(tmp_path), "--node", "none", f"--http{protocol}-engine", "native")
    assert done.returncode == 2
    assert done.stderr == f"netproxy: no HTTP/{protocol} engine 'native' here, there is: reference\n"


def test_an_agent_serves_both_versions_and_says_so(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    www = tmp_path / "www"
    www.mkdir()
    (www / "small").write_bytes(b"small\n")
    with Mesh(f"n{os.getpid() % 100000}", tmp_path / "mesh-of-one", nodes=1) as mesh:
        client, server = mesh.pod("client"), mesh.pod("web", attach=False)
        port = {"name": "web", "port": 80, "targetPort": 8080, "appProtocol": "kubernetes.io/h2c"}
        mesh.put(mesh.service("web", {"app": "web"}, [VIP], [port]))
        server.start("nghttpd", "--no-tls", "-n1", "-d", str(www), "8080")
        wait_listening(server, 8080)
        mesh.agents = [InstalledAgent(installation, mesh.stage, mesh.nodes[0], mesh.config)]
        mesh.start()
        (agent,) = mesh.agents
        for version in ("--http1.1", "--http2-prior-knowledge"):
            assert client.run("curl", "-sf", version, "-m", "20", f"http://{VIP}/small").stdout == "small\n"
        parts = {"http1": "reference", "http2": "reference", "relay": "interpreted", "streams": "loop"}
        assert agent.status()["engine"] == parts
        assert agent.metric("netproxy_build_info", **parts) == 1
        said = installation.run("status", "--node", agent.name, "--run-root", str(agent.run_root)).stdout
        assert "HTTP/1 engine reference, HTTP/2 engine reference, relay interpreted, TCP streams loop" in said.replace(
            "\n", " "
        )
        assert agent.stop() == 0
