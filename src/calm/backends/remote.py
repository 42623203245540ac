"""A server that already runs and is not ours: Ollama, vLLM, llama-swap, a cloud API.

Nothing is started or stopped; `start` only asks whether the server is there and takes our key, so that a
wrong URL or a missing key is reported as a failed load and not by the first user's request.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from calm.backends.upstream import HttpUpstream, Secrets, no_secrets, url_of
from calm.errors import EngineLost, LoadFailed
from calm.records import Endpoint, ModelCard

DEFAULT_HEALTH = "/health"
MODELS_PATH = "/v1/models"
PROBE_TIMEOUT_S = 15.0
# A server without the probed path is still a server.
ALIVE_STATUSES = frozenset((404, 405, 501))


class RemoteEngine:
    """A RunningEngine that costs no memory here and cannot be seen to die: its requests tell."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def pids(self) -> tuple[int, ...]:
        return ()

    def footprint_bytes(self) -> int | None:
        return None

    async def died(self) -> str:
        """Never returns: losing a connection to a remote server does not mean that it is gone."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def stop(self) -> None:
        return None


class RemoteBackend:
    """`secrets` looks up environment variables by name, for `engine.api_key_env`."""

    def __init__(self, secrets: Secrets = no_secrets) -> None:
        self._secrets = secrets

    async def start(self, card: ModelCard, weights: Path | None, threads: int) -> RemoteEngine:
        endpoint = endpoint_of(card)
        path = probe_path(card)
        timeout_s = min(card.engine.start_timeout_s, PROBE_TIMEOUT_S)
        async with HttpUpstream(self._secrets) as upstream:
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
        return RemoteEngine(endpoint)


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
