"""Certificates and state while the CA or the disk fails: what runs goes on, and a new brain takes nothing away."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable

import pytest

from examples.agent import Agent
from examples.stage import wait_for
from tests.e2e.load import VIP, Scene
from tests.e2e.mesh import NAMESPACE, Mesh, get

MeshOf = Callable[..., Mesh]


def kill_brain(agent: Agent) -> None:
    """And wait for its replacement."""
    (old,) = agent.pids("brain")
    os.kill(old, signal.SIGKILL)

    def replaced() -> bool:
        try:
            return agent.pids("brain") not in ([], [old])
        except OSError:
            return False

    wait_for(replaced, "the brain to be replaced")


@pytest.mark.parametrize("store", ["kept", "lost"])
def test_a_brain_that_cant_open_the_ca_takes_no_certificate_away(mesh_of: MeshOf, store: str) -> None:
    """With the store, or with nothing but what the workers use already."""
    scene = Scene(mesh_of())
    scene.mesh.start()
    key = scene.mesh.stage.folder / "ca" / "ca.key"
    with scene.to_service() as load:
        key.chmod(0o640)
        for agent in scene.mesh.agents:
            if store == "lost":
                shutil.rmtree(scene.mesh.stage.folder / "state" / agent.name / "svid")
            kill_brain(agent)
            agent.wait_steered(*scene.mesh.attached(agent.name))
            assert str(key) in agent.status()["identity_error"]
        load.wait_ok(50, via=("mesh",))
        key.chmod(0o600)
        for agent in scene.mesh.agents:
            wait_for(lambda agent=agent: not agent.status()["identity_error"], "the CA to be opened again")
        load.wait_ok(50, via=("mesh",))
        attempts = load.stop()
    assert [attempt for attempt in attempts if not attempt.ok] == []
    assert {attempt.via for attempt in attempts} == {"mesh"}


def test_one_broken_certificate_file_is_no_matter_of_the_others(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    scene.mesh.start()
    agent = scene.agent
    (broken,) = (scene.mesh.stage.folder / "state" / agent.name / "svid").glob("*-web.*.svid")
    broken.write_bytes(b"\xff")
    key = scene.mesh.stage.folder / "ca" / "ca.key"
    key.chmod(0o640)
    assert agent.stop() == 0
    agent.start()
    agent.wait_steered(f"{NAMESPACE}/client-1")
    assert str(broken) in agent.status()["identity_error"]
    key.chmod(0o600)
    agent.wait_steered(*scene.mesh.attached(agent.name))
    assert get(scene.client, VIP, "/x").json()["meshed"]


def test_a_state_folder_that_cant_be_written_stops_nobody(mesh_of: MeshOf) -> None:
    scene = Scene(mesh_of(nodes=1))
    scene.mesh.start()
    agent = scene.agent
    state = scene.mesh.stage.folder / "state" / agent.name
    hidden = state.with_name("hidden")
    with scene.to_service() as load:
        state.rename(hidden)
        state.touch()  # every path below it fails
        kill_brain(agent)
        agent.wait_steered(*scene.mesh.attached(agent.name))
        scene.mesh.put(scene.mesh.service("more", {"app": "web"}, ["240.240.0.11"]))
        wait_for(lambda: len(agent.status()["services"]) == 2, "the change to be in force")
        assert get(scene.client, "240.240.0.11", "/x").status == 200
        (brain,) = agent.pids("brain")
        assert str(state) in agent.status()["state_error"]
        state.unlink()
        hidden.rename(state)
        wait_for(lambda: not agent.status()["state_error"], "the state to be written again")
        assert "more" in (state / "last-good.json").read_text()
        assert agent.pids("brain") == [brain]
        attempts = load.stop()
    assert [attempt for attempt in attempts if not attempt.ok] == []
