"""llama.cpp through xllamacpp: one server in one child process per resident model, on a unix socket.

A child of its own because a crash then hurts one model, because llama.cpp holds Python's GIL for the whole
load, and because only the end of a process returns all memory to the system. The child opens no TCP port:
its socket lies in a directory that only this user may enter.

`card.context` is what one request may use. llama.cpp divides its n_ctx evenly among the slots (kv_unified is
off), so the child gets context times slots, and all of that KV cache is held from the start.

LoRA adapters are loaded with their base at scale 0 and asked for by number in each request. llama.cpp gives up
the whole load for one that does not fit, so their headers are held against the base's first; should it fail on
one all the same, the base is started again without it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from calm.backends.engine import SOCKET_NAME, ChildEngine, absolute, bring_up, make_home, remove_home
from calm.backends.process import clean_environment
from calm.backends.sandbox import confined
from calm.errors import BadInput, LoadFailed
from calm.gguf import Header, fits, read_header
from calm.records import AdapterFile, Endpoint, ModelCard

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
    "lora_adapters": "adapter_of in the adapter's card",
}

LORA_FAILED = re.compile(r"failed to (?:apply|load) lora adapter(?:: (.+))?")
KILLED = "killed by SIG"

Setting = str | int | float | bool


class LlamaCppBackend:
    """Starts llama.cpp children. `run_dir` is where their sockets lie, such as XDG_RUNTIME_DIR/calm."""

    def __init__(self, run_dir: Path, *, inherited: Mapping[str, str] = os.environ) -> None:
        self._run_dir = run_dir
        self._inherited = inherited

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> ChildEngine:
        if weights is None:
            raise LoadFailed(f"model {card.name}: engine llamacpp needs weights, but the card has no source")
        check_options(card)
        library = find_library(card)
        fitting, refused = await asyncio.to_thread(sort_adapters, weights, adapters)
        while True:
            try:
                engine = await self._start_in_home(card, absolute(weights), threads, fitting, library)
            except LoadFailed as error:
                blamed = blame(error.message, fitting)
                words = without_paths(error.message, (absolute(weights), *fitting.values()))
                if not blamed:
                    raise LoadFailed(words, field=error.field) from None
                refused |= {name: said_of_adapter(words) for name in blamed}
                fitting = {name: path for name, path in fitting.items() if name not in blamed}
            else:
                base = base_among(engine.endpoint, len(fitting))
                return engine.carry(numbered(engine.endpoint, fitting), refused, base)

    async def _start_in_home(
        self, card: ModelCard, weights: Path, threads: int, adapters: Mapping[str, Path], library: Path
    ) -> ChildEngine:
        home = make_home(self._run_dir)
        try:
            return await self._start(card, weights, threads, adapters, home, library)
        except LoadFailed as error:
            remove_home(home)
            raise LoadFailed(error.message.replace(str(home), ""), field=error.field) from None
        except BaseException:
            remove_home(home)
            raise

    async def _start(
        self,
        card: ModelCard,
        weights: Path,
        threads: int,
        adapters: Mapping[str, Path],
        home: Path,
        library: Path,
    ) -> ChildEngine:
        socket, plan = home / SOCKET_NAME, home / "plan.json"
        told = child_plan(card, weights, threads, socket, library, tuple(adapters.values()))
        plan.write_bytes(msgspec.json.encode(told))
        command = [sys.executable, "-I", "-S", str(CHILD), str(plan)]
        endpoint = Endpoint(base_url="http://localhost", model=card.name, socket=str(socket))
        environment = clean_environment(self._inherited, {**ENGINE_ENVIRONMENT, **card.engine.env})
        return await bring_up(
            card, confined(card, command, home, weights), environment, endpoint, home, "/health"
        )


def sort_adapters(base: Path, adapters: Sequence[AdapterFile]) -> tuple[dict[str, Path], dict[str, str]]:
    """(paths of those that fit the base, reasons of those that do not), by name. Blocking: reads headers.

    A base whose header cannot be read is left to llama.cpp, which knows better what it can load.
    """
    fitting: dict[str, Path] = {}
    refused: dict[str, str] = {}
    header = _base_header(base) if adapters else None
    for adapter in adapters:
        reason = _misfit(header, adapter)
        if reason is None and adapter.weights is not None:
            fitting[adapter.card.name] = absolute(adapter.weights)
        else:
            refused[adapter.card.name] = (
                reason or "its card has no source, and llama.cpp needs the adapter's file"
            )
    return fitting, refused


def _base_header(base: Path) -> Header | None:
    try:
        return read_header(base)
    except BadInput:
        return None


def _misfit(base: Header | None, adapter: AdapterFile) -> str | None:
    if adapter.weights is None:
        return None
    try:
        header = read_header(adapter.weights)
    except BadInput as error:
        return error.message
    return None if base is None else fits(base, header)


def blame(message: str, adapters: Mapping[str, Path]) -> list[str]:
    """The adapters a failed start is to be repeated without.

    Those whose file llama.cpp named; all when it failed on one without naming it or a signal ended it, which
    may have been for any of them; none when it failed on something else.
    """
    named = [name for name, path in adapters.items() if f"'{path}'" in message]
    if named:
        return named
    return list(adapters) if LORA_FAILED.search(message) or KILLED in message else []


def said_of_adapter(message: str) -> str:
    """llama.cpp's own words on the adapter, or all it said."""
    found = LORA_FAILED.search(message)
    return f"llama.cpp refused it: {found[1] or found[0]}" if found else message


def numbered(endpoint: Endpoint, adapters: Iterable[str]) -> dict[str, Endpoint]:
    """llama.cpp numbers adapters in the order they were given."""
    return {name: replace(endpoint, model=name, adapter=number) for number, name in enumerate(adapters)}


def base_among(endpoint: Endpoint, adapters: int) -> Endpoint:
    """Where the base is asked on an engine with so many adapters: by a number that none of them has.

    Numbers that are not named in a request's `lora` get scale 0, so this is the base. A request without `lora`
    would be the base too, but llama.cpp then keeps the prompt cache an adapter left in the slot, and answers
    from it (server-context.cpp, launch_slot_with_task: the cache is cleared only where `lora` is not empty).
    """
    return replace(endpoint, adapter=adapters) if adapters else endpoint


def child_plan(
    card: ModelCard,
    weights: Path,
    threads: int,
    socket: Path,
    library: Path,
    adapters: Sequence[Path] = (),
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
        "adapters": [str(path) for path in adapters],
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


def without_paths(message: str, files: Iterable[Path]) -> str:
    """Errors reach callers of the API, who need not know the machine's directories."""
    for file in files:
        message = message.replace(str(file), file.name)
    return message
