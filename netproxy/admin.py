"""The node's HTTP doors: admin (loopback and a unix socket), metrics and health. Served by the brain.

=================  ==========================================================
``/healthz``       200 ``ok`` or 503 with the reason
``/metrics``       Prometheus text
``/status``        JSON, what ``netproxy status`` shows (admin only)
``/config_dump``   JSON, the effective configuration without private keys; ``?kind=`` and ``?name=`` (admin only)
``/log_level``     JSON; PUT with a level as the body changes it, on the unix socket only (admin only)
=================  ==========================================================

What changes something is asked for on the unix socket only, which is root's: on loopback everybody on this host may
ask, and so may a browser or a proxy that somebody else directs there. A page whose name has been made to mean this
host's loopback (DNS rebinding) can't read either: there only addresses and ``localhost`` are taken for our name.

The unix socket always works. A port that is taken is logged, and tried again until it is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import json
import os
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from .arena import ArenaReader
from .errors import ConfigError
from .log import LEVELS, WARNING, log
from .observe.metrics import Condition, registry, render
from .settings import NodeSettings

_MAX_LEVEL = 64
_SILENT = 20
"""So many attempts may fail before it is said: a predecessor may still be closing the port."""


class Source(Protocol):
    """What the brain tells."""

    arena: ArenaReader

    def condition(self) -> Condition: ...

    def healthy(self) -> tuple[bool, str]: ...

    def status(self) -> dict[str, Any]: ...

    async def config_dump(self, kind: str, name: str) -> dict[str, Any]: ...

    def log_level(self) -> str: ...

    async def set_log_level(self, name: str) -> None: ...


@web.middleware
async def _only_loopback_names(request: web.Request, handler: Handler) -> web.StreamResponse:
    # Who sends no Host is no browser. (`request.host` would look up a name of ours, and wait for it.)
    if not _is_rebound(request.headers.get("host", "localhost")):
        return await handler(request)
    return web.json_response({"error": "ask for this by an address or as localhost"}, status=403)


def _is_rebound(host: str) -> bool:
    """Is it a name that somebody's DNS may have made to mean us?"""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return True
    return False


class Admin:
    def __init__(self, source: Source, settings: NodeSettings, *, retry_s: float = 0.1) -> None:
        self._source = source
        self._settings = settings
        self._registry = registry(source.arena, source.condition)
        self._runners: list[web.AppRunner] = []
        self._retry_s = retry_s
        self._listening: list[asyncio.Task[None]] = []
        self._inode = 0

    async def start(self) -> None:
        """The unix socket answers when this returns; TCP ports do as soon as they are free."""
        settings = self._settings
        public = web.Application()
        public.add_routes([web.get("/healthz", self._healthz), web.get("/metrics", self._metrics)])
        reading = [
            web.get("/healthz", self._healthz),
            web.get("/metrics", self._metrics),
            web.get("/status", self._status),
            web.get("/config_dump", self._config_dump),
            web.get("/log_level", self._log_level),
        ]
        private, loopback = web.Application(), web.Application(middlewares=[_only_loopback_names])
        private.add_routes([*reading, web.put("/log_level", self._set_log_level)])
        loopback.add_routes(reading)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(settings.admin_socket)
        runner = await self._runner(private)
        await web.UnixSite(runner, settings.admin_socket).start()
        os.chmod(settings.admin_socket, 0o600)
        self._inode = os.stat(settings.admin_socket).st_ino
        if settings.admin_port:
            self._begin(await self._runner(loopback), "127.0.0.1", settings.admin_port)
        if settings.metrics_port:
            self._begin(await self._runner(public), settings.metrics_address, settings.metrics_port)

    def _begin(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._listening.append(asyncio.get_running_loop().create_task(self._listen(runner, host, port)))

    async def _runner(self, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _listen(self, runner: web.AppRunner, host: str, port: int) -> None:
        for attempt in itertools.count(1):
            site = web.TCPSite(runner, host, port, reuse_address=True)
            try:
                await site.start()
                break
            except OSError as exc:
                await site.stop()
                if attempt == _SILENT:
                    log(f"admin on {host}:{port}: {exc}; tried again", WARNING)
            await asyncio.sleep(self._retry_s * (1 if attempt < _SILENT else 10))
        if attempt > _SILENT:
            log(f"admin listens on {host}:{port}")

    async def stop(self) -> None:
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            # A successor may have put its own there.
            if os.stat(self._settings.admin_socket).st_ino == self._inode:
                os.unlink(self._settings.admin_socket)
        for runner in self._runners:
            await runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        ok, detail = self._source.healthy()
        return web.Response(text=f"{detail}\n", status=200 if ok else 503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=render(self._registry), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._source.status())

    async def _config_dump(self, request: web.Request) -> web.Response:
        try:
            found = await self._source.config_dump(request.query.get("kind", ""), request.query.get("name", ""))
        except ConfigError as exc:
            return web.json_response({"error": str(exc)}, status=404)
        # Of a large mesh it takes its time, which is not the loop's.
        return web.json_response(text=await asyncio.to_thread(json.dumps, found))

    async def _log_level(self, _request: web.Request) -> web.Response:
        return web.json_response({"level": self._source.log_level()})

    async def _set_log_level(self, request: web.Request) -> web.Response:
        level = (await request.content.read(_MAX_LEVEL)).decode("latin-1").strip()
        if level not in LEVELS:
            return web.json_response({"error": f"{level!r} is none of {', '.join(LEVELS)}"}, status=400)
        await self._source.set_log_level(level)
        return web.json_response({"level": self._source.log_level()})
