"""A server that already runs and is not ours: Ollama, vLLM, llama-swap, a cloud API.

Nothing is started or stopped; `start` only asks whether the server is there and takes our key, so that a
wrong URL or a missing key is reported as a failed load and not by the first user's request. Adapters it does
not list are loaded into it where it lets us (`served_adapters`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from calm.backends.served_adapters import MODELS_PATH, Found, find_adapters, unload
from calm.backends.upstream import HttpUpstream, Secrets, is_loopback, no_secrets, url_of
from calm.errors import EngineLost, LoadFailed
from calm.records import AdapterFile, Endpoint, ModelCard

DEFAULT_HEALTH = "/health"
PROBE_TIMEOUT_S = 15.0
UNLOAD_TIMEOUT_S = 5.0
# A server without the probed path is still a server.
ALIVE_STATUSES = frozenset((404, 405, 501))


class RemoteEngine:
    """A RunningEngine that costs no memory here and cannot be seen to die: its requests tell.

    `found` is what it serves of the adapters asked for; those it loaded for us are unloaded at the end.
    """

    def __init__(self, endpoint: Endpoint, found: Found | None = None, secrets: Secrets = no_secrets) -> None:
        self._found = found or Found(endpoint)
        self._secrets = secrets

    @property
    def endpoint(self) -> Endpoint:
        return self._found.base

    def adapters(self) -> Mapping[str, Endpoint]:
        return self._found.adapters

    def refused(self) -> Mapping[str, str]:
        return self._found.refused

    def pids(self) -> tuple[int, ...]:
        return ()

    def footprint_bytes(self) -> int | None:
        return None

    async def died(self) -> str:
        """Never returns: losing a connection to a remote server does not mean that it is gone."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def stop(self) -> None:
        names, self._found.loaded = self._found.loaded, []
        if names:
            async with HttpUpstream(self._secrets) as upstream:
                await unload(upstream, self.endpoint, names, UNLOAD_TIMEOUT_S)


class RemoteBackend:
    """`secrets` looks up environment variables by name, for `engine.api_key_env`."""

    def __init__(self, secrets: Secrets = no_secrets) -> None:
        self._secrets = secrets

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> RemoteEngine:
        endpoint = endpoint_of(card)
        async with HttpUpstream(self._secrets) as upstream:
            await probe(upstream, card, endpoint)
            found = await find_adapters(
                upstream,
                endpoint,
                adapters,
                same_machine=is_loopback(endpoint.base_url),
                timeout_s=card.engine.start_timeout_s,
            )
        return RemoteEngine(endpoint, found, self._secrets)


async def probe(upstream: HttpUpstream, card: ModelCard, endpoint: Endpoint) -> None:
    """Raises LoadFailed unless the server is there and takes our key."""
    path = probe_path(card)
    timeout_s = min(card.engine.start_timeout_s, PROBE_TIMEOUT_S)
    try:
        async with asyncio.timeout(timeout_s), upstream.get(endpoint, path) as reply:
            status = reply.status
    except TimeoutError:
        raise LoadFailed(f"model {card.name}: no answer within {timeout_s:g} s") from None
    except EngineLost as error:
        raise LoadFailed(f"model {card.name}: {error.message}", field="engine.url") from None
    complaint = complaint_about(status, card, url_of(endpoint.base_url, path))
    if complaint:
        raise LoadFailed(f"model {card.name}: {complaint}", field="engine.url")


def endpoint_of(card: ModelCard) -> Endpoint:
    url = (card.engine.url or "").strip().rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise LoadFailed(
            f"model {card.name}: engine.url must begin with http:// or https://", field="engine.url"
        )
    model = card.engine.upstream_model or card.name
    return Endpoint(base_url=url, model=model, api_key_env=card.engine.api_key_env)


def probe_path(card: ModelCard) -> str:
    """The card's own health path, else the list of models, which every such server has."""
    return MODELS_PATH if card.engine.health == DEFAULT_HEALTH else card.engine.health


def complaint_about(status: int, card: ModelCard, url: str) -> str | None:
    """What is wrong with a probe's status, None when it will do."""
    if status in (401, 403):
        advice = (
            f"is the key in {card.engine.api_key_env} right?"
            if card.engine.api_key_env
            else "set engine.api_key_env to the name of the environment variable with the key"
        )
        return f"{url} answered {status}: {advice}"
    if status < 400 or status in ALIVE_STATUSES or status == 429:
        return None
    return f"{url} answered {status}"
