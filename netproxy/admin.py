"""The node's HTTP doors: admin (loopback and a unix socket), metrics and health. Served by the brain.

================  ==========================================================
``/healthz``      200 ``ok`` or 503 with the reason
``/metrics``      Prometheus text
``/status``       JSON, what ``netproxy status`` shows (admin only)
================  ==========================================================

A port that is taken is logged and does without: the unix socket always works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import Any, Protocol

from aiohttp import web

from .arena import ArenaReader
from .observe.metrics import Condition, registry, render
from .settings import NodeSettings


class Source(Protocol):
    """What the brain tells."""

    arena: ArenaReader

    def condition(self) -> Condition: ...

    def healthy(self) -> tuple[bool, str]: ...

    def status(self) -> dict[str, Any]: ...


class Admin:
    def __init__(self, source: Source, settings: NodeSettings) -> None:
        self._source = source
        self._settings = settings
        self._registry = registry(source.arena, source.condition)
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        settings = self._settings
        public = web.Application()
        public.add_routes([web.get("/healthz", self._healthz), web.get("/metrics", self._metrics)])
        private = web.Application()
        private.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
            ]
        )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(settings.admin_socket)
        runner = await self._runner(private)
        await web.UnixSite(runner, settings.admin_socket).start()
        os.chmod(settings.admin_socket, 0o600)
        if settings.admin_port:
            await self._listen(runner, "127.0.0.1", settings.admin_port)
        if settings.metrics_port:
            await self._listen(await self._runner(public), settings.metrics_address, settings.metrics_port)

    async def _runner(self, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _listen(self, runner: web.AppRunner, host: str, port: int) -> None:
        for attempt in range(20):
            try:
                await web.TCPSite(runner, host, port, reuse_address=True).start()
                return
            except OSError as exc:
                if attempt == 19:
                    print(f"netproxy brain: admin on {host}:{port}: {exc}", file=sys.stderr, flush=True)
                await asyncio.sleep(0.1)  # a predecessor may still be closing it

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._settings.admin_socket)

    async def _healthz(self, _request: web.Request) -> web.Response:
        ok, detail = self._source.healthy()
        return web.Response(text=f"{detail}\n", status=200 if ok else 503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=render(self._registry), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._source.status())
