"""LoRA adapters at servers that are asked over HTTP: engines of kind `command` and `openai`.

Two protocols, told apart by what the server answers:

    llama-server   GET /lora-adapters lists [{"id", "path", "scale"}]: those it was started with. A request names
                   the number; an adapter of the fleet is found by its file's name
    vLLM           an adapter is a model by its own name. GET /v1/models lists it beside its base (`parent`). A
                   server that may load at run time takes POST /v1/load_lora_adapter {"lora_name", "lora_path"}
                   and .../unload_lora_adapter {"lora_name"}: 200 with a sentence, 400 for what is loaded
                   already or wrong, 404 or 500 with vLLM's error object, and a bare 404 where that is not
                   allowed (docs.vllm.ai, features/lora; vllm/entrypoints/openai/models/serving.py)

vLLM reads PEFT directories, so an adapter's source there is the one file `adapter_model.safetensors` where it
stands, with `adapter_config.json` beside it. Nothing here fails the base: what cannot be had is refused by name.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from calm.backends.upstream import VERSION_SEGMENT, HttpUpstream
from calm.errors import EngineLost
from calm.records import AdapterFile, Endpoint

LLAMA_SERVER_PATH = "/lora-adapters"
MODELS_PATH = "/v1/models"
LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
LOADED_BEFORE = re.compile(r"already (?:been )?loaded")
NO_RUNTIME_LOADING = (
    "the server loads no adapters at run time: start it with --enable-lora and the environment variable "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or name the adapter with --lora-modules {name}=DIRECTORY"
)


@dataclass(slots=True)
class Found:
    """What a server serves of the adapters it was asked for."""

    base: Endpoint
    adapters: dict[str, Endpoint] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    """Names at the server that were loaded now, and are ours to unload."""


class _Numbered(msgspec.Struct):
    id: int
    path: str


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Fault(msgspec.Struct):
    """vLLM's error: an object under `error` since 0.11, flat before."""

    error: dict[str, object] | None = None
    message: str | None = None


async def find_adapters(
    upstream: HttpUpstream,
    base: Endpoint,
    adapters: Sequence[AdapterFile],
    *,
    same_machine: bool,
    timeout_s: float,
) -> Found:
    """Where each adapter is asked, or why it is not served. Asks nothing when there are none.

    `same_machine`: the server reads the files we have. `timeout_s` is for each adapter and each list.
    """
    found = Found(base)
    if not adapters:
        return found
    asking = _Asking(upstream, base, timeout_s)
    try:
        numbered = await asking.numbered()
        served = None if numbered is not None else await asking.models()
    except EngineLost as error:
        found.refused.update({adapter.card.name: error.message for adapter in adapters})
        return found
    if numbered is not None:
        _by_number(found, adapters, numbered)
        return found
    for adapter in adapters:
        await _by_name(found, adapter, asking, served, same_machine)
    return found


async def unload(upstream: HttpUpstream, base: Endpoint, names: Sequence[str], timeout_s: float) -> None:
    """Take back what `find_adapters` loaded. A server that is gone or refuses has nothing to take back."""
    asking = _Asking(upstream, base, timeout_s)
    for name in names:
        try:
            await asking.post(UNLOAD_PATH, {"lora_name": name})
        except EngineLost:
            return


def name_at(adapter: AdapterFile) -> str:
    """What the server calls it."""
    return adapter.card.engine.upstream_model or adapter.card.name


# --- llama-server ----------------------------------------------------------------------------------


def _by_number(found: Found, adapters: Sequence[AdapterFile], numbered: Sequence[_Numbered]) -> None:
    """The base too is asked by a number, one that no adapter has: see llamacpp.base_among."""
    for adapter in adapters:
        wanted = _file_names(adapter)
        number = next((each.id for each in numbered if PurePath(each.path).name in wanted), None)
        if number is None:
            known = ", ".join(PurePath(each.path).name for each in numbered) or "none"
            found.refused[adapter.card.name] = (
                f"the server has no adapter {' or '.join(sorted(wanted))} (it has: {known}): start it with "
                "--lora FILE"
            )
        else:
            found.adapters[adapter.card.name] = replace(found.base, model=adapter.card.name, adapter=number)
    if numbered:
        found.base = replace(found.base, adapter=1 + max(each.id for each in numbered))


def _file_names(adapter: AdapterFile) -> set[str]:
    if adapter.weights is not None and adapter.card.engine.upstream_model is None:
        return {adapter.weights.name}
    name = PurePath(name_at(adapter)).name
    return {name} if name.endswith(".gguf") else {f"{name}.gguf"}


# --- vLLM ------------------------------------------------------------------------------------------


async def _by_name(
    found: Found, adapter: AdapterFile, asking: _Asking, served: frozenset[str] | None, same_machine: bool
) -> None:
    name = name_at(adapter)
    if name == found.base.model:
        reason: str | None = f"`{name}` is the base at the server: name the adapter in engine.upstream_model"
    elif served is None:  # no list to look into: the operator's word has to do
        stated = adapter.card.engine.upstream_model is not None
        reason = None if stated else "the server lists no models: name the adapter in engine.upstream_model"
    elif name in served:
        reason = None
    else:
        reason = await _load(found, adapter, asking, same_machine)
    if reason is None:
        found.adapters[adapter.card.name] = replace(found.base, model=name)
    else:
        found.refused[adapter.card.name] = reason


async def _load(found: Found, adapter: AdapterFile, asking: _Asking, same_machine: bool) -> str | None:
    """Have the server load it. None when it did, else why not."""
    name = name_at(adapter)
    directory = await asyncio.to_thread(peft_directory, adapter.weights)
    if isinstance(directory, str):
        return f"the server does not list `{name}`, and {directory}"
    if not same_machine:
        return (
            f"the server does not list `{name}` and cannot read this machine's files: start it with "
            f"--lora-modules {name}=DIRECTORY"
        )
    try:
        status, body = await asking.post(LOAD_PATH, {"lora_name": name, "lora_path": str(directory)})
    except EngineLost as error:
        return error.message
    if status == 200:
        found.loaded.append(name)
        return None
    said = fault_of(body)
    if status in (404, 405) and said is None:
        return NO_RUNTIME_LOADING.format(name=name)
    if said is not None and LOADED_BEFORE.search(said):
        return None
    return f"the server refused it: {said or f'HTTP {status}'}"


def peft_directory(weights: Path | None) -> Path | str:
    """The directory vLLM is to read, or why there is none. Blocking."""
    if weights is None:
        return "its card has no source to load"
    if weights.name != PEFT_FILE:
        return f"its source is {weights.name}, not the {PEFT_FILE} of a PEFT directory"
    directory = weights.absolute().parent
    if not (directory / PEFT_CONFIG).is_file():
        return f"no {PEFT_CONFIG} lies beside {weights.name}: use a file: source in its PEFT directory"
    return directory


def fault_of(body: bytes) -> str | None:
    """The message of vLLM's error object; None for any other body, such as a bare 404's."""
    fault = decoded(body, _Fault)
    if fault is None:
        return None
    message = fault.error.get("message") if fault.error is not None else fault.message
    return str(message) if message else None


T = TypeVar("T")


def decoded(body: bytes, kind: type[T]) -> T | None:
    """None for a body of another shape."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError:
        return None


# --- asking ----------------------------------------------------------------------------------------


class _Asking:
    """Small questions to one server, each with a time limit. Everything that breaks is EngineLost."""

    def __init__(self, upstream: HttpUpstream, endpoint: Endpoint, timeout_s: float) -> None:
        self._upstream = upstream
        self._endpoint = endpoint
        self._timeout_s = timeout_s

    async def numbered(self) -> list[_Numbered] | None:
        """llama-server's adapters; None when this is no llama-server. The path lies beside /v1, not in it."""
        root = VERSION_SEGMENT.sub("", self._endpoint.base_url.rstrip("/"))
        status, body = await self._get(replace(self._endpoint, base_url=root), LLAMA_SERVER_PATH)
        return decoded(body, list[_Numbered]) if status == 200 else None

    async def models(self) -> frozenset[str] | None:
        """Names of the models served; None when the server has no such list."""
        status, body = await self._get(self._endpoint, MODELS_PATH)
        models = decoded(body, _Models) if status == 200 else None
        return None if models is None else frozenset(model.id for model in models.data)

    async def post(self, path: str, body: Mapping[str, str]) -> tuple[int, bytes]:
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._upstream.post(self._endpoint, path, msgspec.json.encode(body)) as reply,
            ):
                return reply.status, await reply.read()
        except TimeoutError:
            raise self._late(path) from None

    async def _get(self, endpoint: Endpoint, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self._timeout_s), self._upstream.get(endpoint, path) as reply:
                return reply.status, await reply.read()
        except TimeoutError:
            raise self._late(path) from None

    def _late(self, path: str) -> EngineLost:
        return EngineLost(f"no answer from {path} within {self._timeout_s:g} s")
