"""The brain's certificates and what it keeps on disk, while the CA or the disk fails."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from netproxy import certificates as certificates_module
from netproxy.addr import SpiffeId
from netproxy.brain import Brain
from netproxy.channel import Channel
from netproxy.child import Joined
from netproxy.identity.ca import CertificateAuthority
from netproxy.settings import REGIONS_PER_WORKER, NodeSettings, arena_size

_WORKLOAD = """apiVersion: netproxy.mesh/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: shop}}
spec: {{addresses: ["10.0.0.{n}"], serviceAccount: {name}, attach: {{netns: /run/netns/no-such-{name}}}}}
---
"""
WEB, API = (SpiffeId(f"spiffe://cluster.local/ns/shop/sa/{name}") for name in ("web", "api"))


class Node:
    """The folders of a node; `brain` starts one on them, which finds `held` (key: version) at the supervisor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.state, self.ca = folder / "mesh", folder / "state", folder / "ca"
        self.config.mkdir()
        self.state.mkdir()
        self.put("web", "api")
        self.sent: list[tuple[str, str]] = []
        self.brains: list[tuple[Brain, Channel]] = []

    def close(self) -> None:
        for brain, channel in self.brains:
            channel.close()
            for executor in (brain.workloads._executor, brain._reader, brain.certificates._opener):
                executor.shutdown()

    def put(self, *names: str) -> None:
        text = "".join(_WORKLOAD.format(name=name, n=n) for n, name in enumerate(names, 1))
        (self.config / "mesh.yaml").write_text(text)

    def svid_file(self, name: str) -> Path:
        (found,) = (self.state / "svid").glob(f"*-{name}.*.svid")
        return found

    async def brain(self, held: dict[str, str] | None = None) -> Brain:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        arena = os.memfd_create("arena")
        os.ftruncate(arena, arena_size(REGIONS_PER_WORKER))
        settings = NodeSettings(
            "node-a", str(self.config), str(self.folder), str(self.state), str(self.ca), admin_port=0, metrics_port=0
        )
        channel = Channel(ours)
        brain = Brain(Joined(channel=channel, slot=0, region=-1, settings=settings, arena_fd=arena))
        self.brains.append((brain, channel))
        os.close(arena)
        self.sent = []
        brain.send = lambda op, _fds=(), **fields: self.sent.append((op, fields["key"]))  # type: ignore[method-assign]
        brain.children = {"attached": {}}
        brain.state.make()
        brain._versions = dict(held or {})
        await brain._configure()
        return brain


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(guarded())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def shards(sent: list[tuple[str, str]], op: str) -> set[str]:
    return {key for what, key in sent if what == op and key.startswith("svid/")}


def test_a_restart_finds_its_certificates_while_the_ca_cant_be_opened(node: Node) -> None:
    async def main() -> None:
        first = await node.brain()
        assert shards(node.sent, "put") == {f"svid/{WEB}", f"svid/{API}"}
        (node.ca / "ca.key").chmod(0o640)
        second = await node.brain(first._versions)
        assert second.certificates.svids == first.certificates.svids
        assert node.sent == []
        assert "ca.key" in second.status()["identity_error"]
        # When it can be opened again, they are looked at again.
        (node.ca / "ca.key").chmod(0o600)
        second.certificates._retry_at = 0.0
        await second._renew()
        assert (second.status()["identity_error"], second.certificates._unchecked, node.sent) == ("", set(), [])

    run(main)


def test_an_old_certificate_is_better_than_none(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        first = await node.brain()
        (node.ca / "ca.key").chmod(0o640)
        late = time.time() + 23 * 3600
        monkeypatch.setattr(certificates_module.time, "time", lambda: late)
        second = await node.brain(first._versions)
        assert second.certificates.svids == first.certificates.svids
        await second._renew()
        assert all(at > late for at in second.certificates._renew.values())
        assert second.certificates.svids == first.certificates.svids

    run(main)


def test_what_the_supervisor_holds_stays_while_it_is_wanted(node: Node) -> None:
    async def main() -> None:
        first = await node.brain()
        (node.ca / "ca.key").chmod(0o640)
        shutil.rmtree(node.state / "svid")
        second = await node.brain(first._versions)
        assert second.certificates.svids == {}
        assert node.sent == []
        assert second._versions == first._versions
        node.put("web")
        await second._configure()
        assert shards(node.sent, "drop") == {f"svid/{API}"}

    run(main)


@pytest.mark.parametrize("ca_works", [True, False])
def test_a_broken_file_is_the_matter_of_one_identity(node: Node, ca_works: bool) -> None:
    async def main() -> None:
        first = await node.brain()
        node.svid_file("api").write_bytes(b"\xff")
        if not ca_works:
            (node.ca / "ca.key").chmod(0o640)
        second = await node.brain(first._versions)
        assert second.certificates.svids[WEB] == first.certificates.svids[WEB]
        if ca_works:
            assert second.certificates.svids[API] != first.certificates.svids[API]
            assert shards(node.sent, "put") == {f"svid/{API}"}
            assert second.certificates.error == ""
        else:
            assert API not in second.certificates.svids
            assert node.sent == []
            assert str(node.svid_file("api")) in second.certificates.error

    run(main)


def test_a_ca_that_does_not_answer_stops_nobody(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        first = await node.brain()
        go_on, open_ca = asyncio.Event(), CertificateAuthority.open
        loop = asyncio.get_running_loop()

        def hang(*args: Any, **named: Any) -> CertificateAuthority:
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            return open_ca(*args, **named)

        monkeypatch.setattr(CertificateAuthority, "open", hang)
        monkeypatch.setattr(certificates_module, "_CA_TIMEOUT_S", 0.001)
        second = await node.brain(first._versions)
        assert second.certificates.svids == first.certificates.svids
        assert "does not answer" in second.certificates.error
        go_on.set()
        while second.certificates.error:
            second.certificates._retry_at = 0.0
            await second._renew()
        assert second.certificates.svids == first.certificates.svids

    run(main)


def test_a_disk_that_cant_be_written_is_told_and_written_later(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        node.state.rmdir()
        node.state.touch()  # everything below it is ENOTDIR
        brain = await node.brain()
        assert set(brain.certificates.svids) == {WEB, API}
        assert str(node.state) in brain.status()["state_error"]
        told = capfd.readouterr().err
        assert "goes on without" in told
        await brain._configure()
        assert capfd.readouterr().err == ""
        node.state.unlink()
        brain.state._retry_at = 0.0
        await brain._configure()
        assert brain.status()["state_error"] == ""
        files = {"vips.json", "nameservers.json", "last-good.json", "svid"}
        assert {path.name for path in node.state.iterdir()} == files
        assert {node.svid_file("web").exists(), node.svid_file("api").exists()} == {True}

    run(main)
