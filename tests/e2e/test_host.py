"""A service of the host: steered by its cgroup in a network namespace that is not its alone, and its neighbours not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from examples.stage import wait_for
from redirect.bpf.bpffs import cgroup_root
from tests.e2e.load import VIP, Scene
from tests.e2e.mesh import NAMESPACE, Mesh, get
from tests.kernel.test_bpf import in_cgroup

MeshOf = Callable[..., Mesh]
KEY = f"{NAMESPACE}/backup"
HOST, OWN_VIP = "10.80.1.254", "240.240.0.30"
WITNESS = Path(__file__).parent / "servers" / "witness.py"


class Lab:
    """A node with a service of its own on port 8080 and a neighbour of that on 8081, and a mesh on another node."""

    def __init__(self, mesh: Mesh, cgroup: Path, **spec: Any) -> None:
        self.mesh, self.cgroup = mesh, cgroup
        self.agent, self.node = mesh.agents[0], mesh.nodes[0]
        self.scene = Scene(mesh, client=None)
        self.far = mesh.pod("far-1", 1)
        self.spec = spec
        self.put()
        mesh.put(mesh.service("backup", {"app": "backup"}, [OWN_VIP]))
        cgroup.mkdir(parents=True)
        for port in (8080, 8081):
            with in_cgroup(cgroup) if port == 8080 else no_cgroup():
                journal = str(mesh.stage.folder / f"host-{port}.log")
                self.node.start(sys.executable, str(WITNESS), str(port), journal, log=f"host-{port}.out")
            listens = ["ss", "-Hltn", f"sport = :{port}"]
            wait_for(lambda listens=listens: self.node.run(*listens).stdout.strip(), f"port {port} to be listened on")
        mesh.start()

    def put(self, **changes: Any) -> None:
        path = "/" + str(self.cgroup.relative_to(cgroup_root()))
        spec = {"node": self.node.netns, "addresses": [HOST], "serviceAccount": "backup", "ports": [{"port": 8080}]}
        self.mesh.put(
            {
                "apiVersion": "netproxy.mesh/v1alpha1",
                "kind": "Workload",
                "metadata": {"name": "backup", "namespace": NAMESPACE, "labels": {"app": "backup"}},
                "spec": spec | {"attach": {"cgroup": path}} | self.spec | changes,
            }
        )

    def is_meshed(self) -> bool:
        """What the service opens."""
        with in_cgroup(self.cgroup):
            return bool(get(self.node, self.scene.server.ip, "/x", port=8080).json()["meshed"])

    def serves(self, port: int) -> bool | None:
        """Does a proxy take what comes for it? None: while two agents disagree."""
        answer = get(self.far, HOST, "/x", port=port)
        return bool(answer.json()["meshed"]) if answer.status == 200 else None

    def listeners(self) -> list[str]:
        """Of the proxy, for the service."""
        return [place for place in self.node.run("ss", "-Hltn").stdout.split() if ":151" in place]

    def assert_all(self) -> None:
        assert self.is_meshed()
        with in_cgroup(self.cgroup):
            assert get(self.node, VIP, "/x").json()["meshed"]
        assert self.serves(8080)
        assert get(self.far, OWN_VIP, "/x").json()["meshed"]
        self.assert_neighbours()

    def assert_neighbours(self) -> None:
        """The same address, the same user, another cgroup."""
        assert not get(self.node, self.scene.server.ip, "/x", port=8080).json()["meshed"]
        assert self.serves(8081) is False


@contextmanager
def no_cgroup() -> Iterator[None]:
    yield


def end(cgroup: Path) -> None:
    """The service, and its cgroup."""

    def removed() -> bool:
        for pid in (cgroup / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            cgroup.rmdir()
        except OSError:  # the last of its processes is not quite gone
            return False
        return True

    wait_for(removed, "the cgroup to be removed")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    path = cgroup_root() / f"netproxy-e2e-{os.getpid()}"
    yield path
    if path.exists():
        end(path)


@pytest.fixture
def unit() -> Iterator[Path]:
    """Where systemd would put one, on a host without systemd."""
    assert not Path("/run/systemd/system").exists(), "systemd runs here, and its units are its own"
    path = cgroup_root() / "system.slice" / f"netproxy-e2e-{os.getpid()}.service"
    yield path
    if path.exists():
        end(path)
    with suppress(OSError):
        path.parent.rmdir()


def test_a_service_is_steered_and_its_neighbours_are_not(mesh_of: MeshOf, cgroup: Path) -> None:
    lab = Lab(mesh_of(), cgroup)
    lab.assert_all()
    status = next(item for item in lab.agent.status()["workloads"] if item["workload"] == KEY)
    assert (status["steering"], status["cgroup"], status["netns"]) == ("ebpf", str(cgroup), "")
    assert status["connections"]["steered"] >= 2 and status["connections"]["inbound_steered"] >= 1
    checked = subprocess.run(lab.agent.command("check"), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    # Gone from the configuration, it is let alone, and comes back.
    lab.mesh.drop("Workload", "backup")
    wait_for(lambda: not lab.is_meshed() and lab.serves(8080) is False, "it to be released")
    assert not lab.listeners()
    lab.put(ports=[])
    lab.agent.wait_steered(KEY)
    assert lab.is_meshed()
    wait_for(lambda: lab.serves(8080) is False, "no port to be its own")
    lab.put()
    wait_for(lambda: lab.serves(8080), "its port to be steered")
    lab.assert_all()


def test_its_unit_is_started_again(mesh_of: MeshOf, unit: Path) -> None:
    lab = Lab(mesh_of(), unit, ports=[], attach={"systemdUnit": unit.name})
    check_made_again(lab, unit)


def test_its_cgroup_is_made_again(mesh_of: MeshOf, cgroup: Path) -> None:
    lab = Lab(mesh_of(), cgroup, ports=[])
    check_made_again(lab, cgroup)


def check_made_again(lab: Lab, cgroup: Path) -> None:
    assert lab.is_meshed()
    end(cgroup)

    def state() -> str:
        return next(item["state"] for item in lab.agent.status()["workloads"] if item["workload"] == KEY)

    wait_for(lambda: state() == "absent", "it to be missed")
    cgroup.mkdir()
    lab.agent.wait_steered(KEY)
    assert lab.is_meshed()


@pytest.mark.parametrize("policy", ["open", "closed"])
def test_who_dies_and_what_the_policy_says(mesh_of: MeshOf, cgroup: Path, policy: str) -> None:
    lab = Lab(mesh_of(), cgroup, failurePolicy=policy)
    (brain,) = lab.agent.pids("brain")
    os.kill(brain, signal.SIGKILL)
    lab.assert_all()
    wait_for(lambda: lab.agent.is_steered() and brain not in lab.agent.pids("brain"), "another brain")
    lab.assert_all()
    assert lab.listeners()
    lab.agent.kill_all()
    # A dead process shows as such a moment before the last of its threads lets go of the sockets.
    wait_for(lambda: not lab.listeners(), "the listeners to be closed")
    lab.assert_neighbours()
    if policy == "open":
        assert not lab.is_meshed()
    else:
        with pytest.raises(ConnectionRefusedError):
            lab.is_meshed()
        with pytest.raises(ConnectionRefusedError):
            get(lab.mesh.nodes[1], HOST, "/x", port=8080)
    lab.agent.start()
    lab.agent.wait_steered()
    lab.assert_all()
    assert lab.agent.stop() == 0
    subprocess.run(lab.agent.command("clean"), stdin=subprocess.DEVNULL, capture_output=True, check=True)
    lab.assert_neighbours()
    assert not lab.is_meshed()
