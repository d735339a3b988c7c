"""A whole mesh for one test: a stage, resources in files, an agent per node, servers and clients in pods."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from examples.agent import Agent
from examples.stage import Node, Pod, Stage, wait_for

NAMESPACE = "shop"
_SERVERS = Path(__file__).parent / "servers"


class Mesh:
    """`families`: of the pods; `nodes`: 1 or 2; `workers` per agent. Nothing is started by itself.

    Resources are kept as one file each in `config`; `put` and `drop` change them, agents reload.
    """

    def __init__(
        self, prefix: str, folder: Path, *, families: Iterable[int] = (4,), nodes: int = 2, workers: int = 1
    ) -> None:
        self.config = folder / "mesh"
        self.config.mkdir(parents=True)
        self.stage = Stage(prefix, folder, families, nodes)
        self.agents = [Agent(self.stage, node, self.config, workers=workers) for node in self.stage.nodes]
        self.objects: dict[str, dict[str, Any]] = {}

    @property
    def nodes(self) -> list[Node]:
        return self.stage.nodes

    def close(self) -> None:
        self.stage.close()

    # -- resources ----------------------------------------------------------------------------------

    def put(self, *objects: dict[str, Any]) -> None:
        """Write objects atomically, one file each; an object of the same kind and name is replaced."""
        for obj in objects:
            name = f"{obj['kind']}-{obj['metadata'].get('namespace', 'default')}-{obj['metadata']['name']}".lower()
            self.objects[name] = obj
            temporary = self.config / f".{name}.tmp"
            temporary.write_text(yaml.safe_dump(obj))
            temporary.rename(self.config / f"{name}.yaml")

    def drop(self, kind: str, name: str, namespace: str = NAMESPACE) -> None:
        file = f"{kind}-{namespace}-{name}".lower()
        del self.objects[file]
        (self.config / f"{file}.yaml").unlink()

    def pod(
        self, name: str, node: int = 0, *, app: str = "", version: str = "v1", families: Iterable[int] | None = None,
        attach: bool = True, **spec: Any,
    ) -> Pod:  # fmt: skip
        """A pod and its Workload (labels app and version, service account = app)."""
        pod = self.stage.add_pod(name, self.nodes[node], families)
        self.put(self.workload(pod, app=app or name, version=version, attach=attach, **spec))
        return pod

    def workload(
        self, pod: Pod, *, app: str = "", version: str = "v1", attach: bool = True, **spec: Any
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "node": pod.node.netns, "addresses": pod.addresses, "serviceAccount": app or pod.name, **spec
        }  # fmt: skip
        if attach:
            body["attach"] = {"netns": pod.path}
        return {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "Workload",
            "metadata": {
                "name": pod.name,
                "namespace": NAMESPACE,
                "labels": {"app": app or pod.name, "version": version},
            },
            "spec": body,
        }

    @staticmethod
    def service(
        name: str, selector: dict[str, str], vips: list[str], ports: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """With fixed VIPs, so that a test knows them. Default port: http 80 -> 8080."""
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "selector": selector,
                "clusterIP": vips[0],
                "clusterIPs": vips,
                "ports": ports or [{"name": "http", "port": 80, "targetPort": 8080}],
            },
        }

    @staticmethod
    def route(service: str, rules: list[dict[str, Any]], name: str = "") -> dict[str, Any]:
        return {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": name or service, "namespace": NAMESPACE},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": service}], "rules": rules},
        }

    @staticmethod
    def peer_authentication(mode: str, app: str = "") -> dict[str, Any]:
        spec: dict[str, Any] = {"mtls": {"mode": mode}}
        if app:
            spec["selector"] = {"matchLabels": {"app": app}}
        return {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "PeerAuthentication",
            "metadata": {"name": app or "default", "namespace": NAMESPACE},
            "spec": spec,
        }

    @staticmethod
    def mesh_config(**spec: Any) -> dict[str, Any]:
        return {
            "apiVersion": "netproxy.mesh/v1alpha1",
            "kind": "MeshConfig",
            "metadata": {"name": "mesh", "namespace": "netproxy-system"},
            "spec": spec,
        }

    # -- running ------------------------------------------------------------------------------------

    def start(self) -> None:
        """All agents, until everything is steered."""
        for agent in self.agents:
            agent.start()
        for agent in self.agents:
            agent.wait_steered()

    def serve(self, pod: Pod, server: str, *argv: str, port: int = 8080) -> None:
        """Run ``tests/e2e/servers/<server>.py`` in the pod and wait until it listens on `port`."""
        pod.start(sys.executable, str(_SERVERS / f"{server}.py"), *argv, log=f"{pod.name}-{server}.log")
        wait_listening(pod, port)


def wait_listening(pod: Pod, port: int) -> None:
    wait_for(lambda: pod.run("ss", "-Hltn", f"sport = :{port}").stdout.strip(), f"{pod.name} to listen on {port}", 20.0)
