from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import stat
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from netproxy.admin import Admin
from netproxy.arena import ArenaReader, ArenaWriter
from netproxy.errors import ConfigError
from netproxy.observe.metrics import Condition
from netproxy.settings import NodeSettings, arena_size


class Source:
    def __init__(self) -> None:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, arena_size(1))
        self.writer = ArenaWriter(fd, 0, 1)
        self.arena = ArenaReader(fd, 1)
        os.close(fd)
        self.health = (True, "ok")
        self.level = "info"

    def condition(self) -> Condition:
        return Condition("node-a", {"http1": "native", "http2": "native"}, {}, {}, 0, {}, {}, True, 0.0)

    def healthy(self) -> tuple[bool, str]:
        return self.health

    def status(self) -> dict[str, Any]:
        return {"healthy": self.health[0], "node": "node-a"}

    async def config_dump(self, kind: str, name: str) -> dict[str, Any]:
        if name == "none":
            raise ConfigError("no such thing")
        return {"kind": kind, "name": name}

    def log_level(self) -> str:
        return self.level

    async def set_log_level(self, name: str) -> None:
        self.level = name


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[NodeSettings]:
    yield NodeSettings("node-a", "", str(tmp_path), "", "", admin_port=0, metrics_port=0)


def run(settings: NodeSettings, main: Callable[[aiohttp.ClientSession, Source], Coroutine[Any, Any, None]]) -> None:
    async def served() -> None:
        source = Source()
        admin = Admin(source, settings)
        await admin.start()
        try:
            connector = aiohttp.UnixConnector(settings.admin_socket)
            async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
                await main(session, source)
        finally:
            await admin.stop()
        assert not os.path.exists(settings.admin_socket)

    asyncio.run(served())


def test_health(settings: NodeSettings) -> None:
    async def main(session: aiohttp.ClientSession, source: Source) -> None:
        async with session.get("/healthz") as response:
            assert (response.status, await response.text()) == (200, "ok\n")
        source.health = (False, "no worker is ready")
        async with session.get("/healthz") as response:
            assert (response.status, await response.text()) == (503, "no worker is ready\n")

    run(settings, main)


def test_metrics_are_those_of_the_moment(settings: NodeSettings) -> None:
    async def main(session: aiohttp.ClientSession, source: Source) -> None:
        for number in (1, 2):
            source.writer.count("x")
            async with session.get("/metrics") as response:
                assert response.status == 200
                assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
                assert f'netproxy_events_total{{detail="",event="x"}} {number}.0\n' in await response.text()

    run(settings, main)


def test_status_and_what_does_not_exist(settings: NodeSettings) -> None:
    async def main(session: aiohttp.ClientSession, _source: Source) -> None:
        async with session.get("/status") as response:
            assert await response.json() == {"healthy": True, "node": "node-a"}
        async with session.get("/secret") as response:
            assert response.status == 404
        async with session.post("/status") as response:
            assert response.status == 405

    run(settings, main)


def test_config_dump(settings: NodeSettings) -> None:
    async def main(session: aiohttp.ClientSession, _source: Source) -> None:
        async with session.get("/config_dump?kind=service&name=shop/web") as response:
            assert await response.json() == {"kind": "service", "name": "shop/web"}
        async with session.get("/config_dump") as response:
            assert await response.json() == {"kind": "", "name": ""}
        async with session.get("/config_dump?name=none") as response:
            assert (response.status, await response.json()) == (404, {"error": "no such thing"})

    run(settings, main)


def test_log_level(settings: NodeSettings) -> None:
    async def main(session: aiohttp.ClientSession, source: Source) -> None:
        async with session.get("/log_level") as response:
            assert await response.json() == {"level": "info"}
        async with session.put("/log_level", data=b"debug\n") as response:
            assert (response.status, await response.json()) == (200, {"level": "debug"})
        assert source.level == "debug"
        for body in (b"", b"loud", b"\xff" * 1000):
            async with session.put("/log_level", data=body) as response:
                assert response.status == 400
                assert "none of error, warning, info, debug" in (await response.json())["error"]
        assert source.level == "debug"

    run(settings, main)


def test_the_port_changes_nothing_and_knows_its_name(settings: NodeSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def main() -> None:
        source = Source()
        admin = Admin(source, dataclasses.replace(settings, admin_port=port), retry_s=0.001)
        await admin.start()
        try:
            async with asyncio.timeout(5), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        assert (await (await session.get("/log_level")).json()) == {"level": "info"}
                        break
                    await asyncio.sleep(0)
                assert (await session.put("/log_level", data=b"debug")).status == 405
                assert (await session.get("/config_dump")).status == 200
                for host, status in (
                    ("localhost", 200),
                    (f"LocalHost:{port}", 200),
                    (f"[::1]:{port}", 200),
                    (f"rebound.example:{port}", 403),
                    ("127.0.0.1.example", 403),
                    ("", 403),
                ):
                    for target in ("/config_dump", "/status", "/metrics"):
                        async with session.get(target, headers={"host": host}) as response:
                            assert response.status == status, (host, target)
        finally:
            await admin.stop()
        assert source.level == "info"

    asyncio.run(main())


def test_a_port_that_is_taken_keeps_nobody_waiting(settings: NodeSettings) -> None:
    other = socket.create_server(("127.0.0.1", 0))
    port = other.getsockname()[1]

    async def main() -> None:
        admin = Admin(Source(), dataclasses.replace(settings, admin_port=port, metrics_port=port), retry_s=0.001)
        await admin.start()
        try:
            connector = aiohttp.UnixConnector(settings.admin_socket)
            async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
                assert (await session.get("/healthz")).status == 200
            other.close()
            async with asyncio.timeout(5), aiohttp.ClientSession() as session:
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        assert (await session.get(f"http://127.0.0.1:{port}/healthz")).status == 200
                        break
                    await asyncio.sleep(0)
        finally:
            await admin.stop()

    asyncio.run(main())


def test_a_successors_socket_stays(settings: NodeSettings) -> None:
    async def main() -> None:
        old, new = Admin(Source(), settings), Admin(Source(), settings)
        await old.start()
        await new.start()
        await old.stop()
        connector = aiohttp.UnixConnector(settings.admin_socket)
        async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
            assert (await session.get("/healthz")).status == 200
        await new.stop()

    asyncio.run(main())


def test_the_socket_is_ours_alone_and_replaces_an_old_one(settings: NodeSettings) -> None:
    Path(settings.admin_socket).write_text("left by another")

    async def main(_session: aiohttp.ClientSession, _source: Source) -> None:
        mode = os.stat(settings.admin_socket).st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600

    run(settings, main)
