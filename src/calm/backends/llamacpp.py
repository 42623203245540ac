"""llama.cpp through xllamacpp: one server in one child process per resident model, on a unix socket.

A child of its own because a crash then hurts one model, because llama.cpp holds Python's GIL for the whole
load, and because only the end of a process returns all memory to the system. The child opens no TCP port:
its socket lies in a directory that only this user may enter.

`card.context` is what one request may use. llama.cpp divides its n_ctx evenly among the slots (kv_unified is
off), so the child gets context times slots, and all of that KV cache is held from the start.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from calm.backends.engine import SOCKET_NAME, ChildEngine, absolute, bring_up, make_home, remove_home
from calm.backends.process import clean_environment
from calm.backends.sandbox import confined
from calm.errors import LoadFailed
from calm.records import Endpoint, ModelCard

CHILD = Path(__file__).with_name("llamacpp_child.py")
# Idle OpenMP threads give their core up after this many spins: it costs one engine nothing and two much less.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
CARD_FIELDS = {
    "model": "source",
    "model.path": "source",
    "model_alias": "name",
    "hostnames": "run directory",
    "port": "run directory",
    "api_keys": "run directory",
    "n_ctx": "context",
    "n_parallel": "engine.slots",
    "kv_unified": "engine.slots",
    "cpuparams.n_threads": "engine.threads",
    "cpuparams_batch.n_threads": "engine.threads",
    "chat_template": "chat.template",
}

Setting = str | int | float | bool


class LlamaCppBackend:
    """Starts llama.cpp children. `run_dir` is where their sockets lie, such as XDG_RUNTIME_DIR/calm."""

    def __init__(self, run_dir: Path, *, inherited: Mapping[str, str] = os.environ) -> None:
        self._run_dir = run_dir
        self._inherited = inherited

    async def start(self, card: ModelCard, weights: Path | None, threads: int) -> ChildEngine:
        if weights is None:
            raise LoadFailed(f"model {card.name}: engine llamacpp needs weights, but the card has no source")
        check_options(card)
        library = find_library(card)
        home = make_home(self._run_dir)
        try:
            return await self._start(card, absolute(weights), threads, home, library)
        except LoadFailed as error:
            remove_home(home)
            raise LoadFailed(without_paths(error.message, weights, home), field=error.field) from None
        except BaseException:
            remove_home(home)
            raise

    async def _start(
        self, card: ModelCard, weights: Path, threads: int, home: Path, library: Path
    ) -> ChildEngine:
        socket, plan = home / SOCKET_NAME, home / "plan.json"
        plan.write_bytes(msgspec.json.encode(child_plan(card, weights, threads, socket, library)))
        command = [sys.executable, "-I", "-S", str(CHILD), str(plan)]
        endpoint = Endpoint(base_url="http://localhost", model=card.name, socket=str(socket))
        environment = clean_environment(self._inherited, {**ENGINE_ENVIRONMENT, **card.engine.env})
        return await bring_up(
            card, confined(card, command, home, weights), environment, endpoint, home, "/health"
        )


def child_plan(
    card: ModelCard, weights: Path, threads: int, socket: Path, library: Path
) -> dict[str, object]:
    """What the child reads, see llamacpp_child: how this card differs from llama.cpp's defaults."""
    settings: dict[str, Setting] = {
        "model.path": str(weights),
        "model_alias": card.name,  # else answers carry the path of the weights as their model
        "hostnames": str(socket),
        "n_parallel": card.engine.slots,
        "n_ctx": card.context * card.engine.slots,
        "kv_unified": False,
        "n_threads_http": http_threads(card),
        "endpoint_metrics": True,
        "warmup": False,  # halves the load; the first request warms up as well
        "fit_params": False,  # CALM decides what fits
        "cache_ram_mib": 0,  # 8 GiB by default, outside of every budget
        "cache_idle_slots": False,
        "verbosity": 2,
        "ui": False,
        "cors_origins": "http://localhost",
    }
    if card.chat.template is not None:
        settings["chat_template"] = card.chat.template
    return {
        "library": str(library),
        "threads": threads,
        "set": {**settings, **embedding_settings(card)},
        "options": dict(card.engine.options),
    }


def http_threads(card: ModelCard) -> int:
    """A kept-alive connection occupies a thread of llama.cpp's HTTP server for its idle seconds too."""
    return 2 * card.concurrency + 4


def embedding_settings(card: ModelCard) -> dict[str, Setting]:
    """/v1/embeddings works beside chat, but an input has to fit in one physical batch.

    A chat model has no pooling of its own, so the mean is taken; an embedding model brings its own.
    """
    if "embeddings" not in card.capabilities:
        return {}
    settings: dict[str, Setting] = {"embedding": True, "n_batch": card.context, "n_ubatch": card.context}
    if {"chat", "completion"} & set(card.capabilities):
        settings["pooling_type"] = "mean"
    return settings


def check_options(card: ModelCard) -> None:
    """Parameters the card states elsewhere may not be contradicted in engine.options."""
    for name in card.engine.options:
        if name in CARD_FIELDS:
            field = f"engine.options.{name}"
            raise LoadFailed(f"model {card.name}: {field} is decided by {CARD_FIELDS[name]}", field=field)


def find_library(card: ModelCard) -> Path:
    """The directory xllamacpp lies in, found without importing it."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise LoadFailed(f"model {card.name}: engine llamacpp needs xllamacpp (pip install xllamacpp)")
    return Path(spec.origin).parent.parent


def without_paths(message: str, weights: Path, home: Path) -> str:
    """Errors reach callers of the API, who need not know the machine's directories."""
    return message.replace(str(absolute(weights)), weights.name).replace(str(home), "")
