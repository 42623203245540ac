"""Starting and stopping the door: where it may listen, and how it closes without cutting answers off."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

from aiohttp import web

from calm.errors import BadInput
from calm.gateway.app import FLIGHTS, LIMITS
from calm.gateway.auth import Keys, is_loopback

log = logging.getLogger("calm.gateway")

ABORT_S = 2.0
"""After the grace, how long cancelled handlers get to say so to their clients."""
BACKLOG = 1024


class Server:
    """A listening door. `url` is where it is reached; `stop` closes it."""

    def __init__(self, runner: web.AppRunner, app: web.Application, host: str, port: int) -> None:
        self._runner = runner
        self._flights = app[FLIGHTS]
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def stop(self, grace_s: float = 10.0) -> bool:
        """Accept nothing new, let running answers finish for `grace_s`, then end them with an error.

        True when all of them finished. Idempotent.
        """
        self._flights.closing = True
        for site in self._runner.sites:
            await site.stop()
        finished = await self._flights.drained(grace_s)
        if not finished:
            log.warning(
                "%d requests were still running after %g s and were ended", len(self._flights), grace_s
            )
            self._flights.abort()
            await self._flights.drained(ABORT_S)
        await self._runner.cleanup()
        return finished


def check_bind(host: str, keys: Keys, *, insecure: bool) -> bool:
    """Whether `host` is loopback only. Raises BadInput for an open address without keys."""
    loopback = is_loopback(host) and host != ""
    if not loopback and keys.empty and not insecure:
        raise BadInput(
            f"{host or 'every address'} is reachable from other machines and there are no API keys. "
            "Make one with `calm keys create NAME`, bind 127.0.0.1, or accept the risk with --insecure.",
            field="server.host",
        )
    return loopback


async def start(app: web.Application, host: str, port: int) -> Server:
    """Listen. `port` 0 picks a free one. Raises BadInput when the address cannot be had."""
    limits = app[LIMITS]
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=limits.keepalive_s,
        shutdown_timeout=ABORT_S,
        lingering_time=2.0,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        await site.start()
    except (OSError, OverflowError) as error:
        with suppress(asyncio.CancelledError):
            await runner.cleanup()
        raise BadInput(f"cannot listen on {host}:{port}: {_reason(error)}", field="server.port") from None
    return Server(runner, app, host, runner.addresses[0][1])


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host"
    return getattr(error, "strerror", None) or str(error)
