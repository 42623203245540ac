"""What every fetch needs to know of its surroundings: other tools' configuration, TLS roots, patience.

CALM's own settings live in settings.py. The environment read here belongs to pip, npm, the hub's client and
OpenSSL, so that weights come through whatever index, proxy and certificate the user already works with.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import aiohttp
from yarl import URL

from calm.registry.validate import is_loopback

_CA_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like asyncio.to_thread, but a cancelled caller waits: no thread writes on after its lock is gone."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """`env` is the process environment unless a test says otherwise; `home` is where ~ points."""

    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    home: Path = field(default_factory=Path.home)
    allow_http: bool = False
    """Plain http to other machines. Content is verified either way; names and tokens would be visible."""
    attempts: int = 6
    """Tries in a row without one new byte before a transfer is given up."""
    stall_s: float = 60.0
    """A connection that is silent for so long is dropped and resumed."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def may_use(self, url: str, trusted_hosts: frozenset[str] = frozenset()) -> bool:
        """Whether a URL's scheme is safe enough: https, or http to this machine or an allowed host."""
        parsed = URL(url)
        if parsed.scheme != "http":
            return parsed.scheme == "https"
        return self.allow_http or is_loopback(url) or (parsed.host or "") in trusted_hosts


@asynccontextmanager
async def open_session(
    options: FetchOptions, extra_roots: tuple[str, ...] = ()
) -> AsyncIterator[aiohttp.ClientSession]:
    """A client that honours proxies, ~/.netrc and the user's certificates, and never decodes a body."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=options.stall_s)
    connector = aiohttp.TCPConnector(ssl=tls_context(options.env, extra_roots), limit=8)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        trust_env=True,
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "calm-orchestrator"},
    ) as session:
        yield session


def tls_context(env: Mapping[str, str], extra_roots: tuple[str, ...] = ()) -> ssl.SSLContext:
    """System roots (SSL_CERT_FILE, SSL_CERT_DIR) and every bundle that pip, requests or npm was given."""
    context = ssl.create_default_context()
    named = [env.get(variable) for variable in _CA_VARIABLES]
    for bundle in dict.fromkeys((*named, *extra_roots)):
        if bundle and Path(bundle).is_dir():
            context.load_verify_locations(capath=bundle)
        elif bundle and Path(bundle).is_file():
            context.load_verify_locations(cafile=bundle)
    return context
