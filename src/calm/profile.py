"""What each model costs on one machine: the file that `calm profile` measures and `calm replay` reads.

    [machine]                                    what it was measured on; two figures replay needs
    [models.NAME]                                rates, load time, memory, power
    [models.NAME.output_tokens.DOMAIN]           length of answers: mean and sd; `default` for other domains
    [models.NAME.quality]                        0..1 by domain; `default` for other domains

An adapter has an entry like any model. Its rates, lengths and quality are its own; `memory_bytes`, `load_s` and
`load_j` are what it adds to its base, and power, batching and unloading are its base's.

A served request takes overhead + prompt tokens not in the prefix cache / prefill_tps, alone; then one token
after the other. `decode_tps` is the engine's aggregate rate by how many sequences decode at once, between two
stated counts interpolated, beyond the last one constant. Every time is multiplied by a lognormal factor of
median 1 and sigma `jitter`, drawn per request, and by the machine's `contention` for the engines active.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from calm.errors import BadInput
from calm.records import Strict

DEFAULT = "default"
MOST_JITTER = 3.0
"""Beyond it one request in forty takes more than 350 times as long as the median one."""


class Length(Strict, frozen=True, kw_only=True):
    """Answer length in tokens, lognormal."""

    mean: float
    sd: float = 0.0


class MachineProfile(Strict, frozen=True, kw_only=True):
    """Where it was measured, and how engines share it."""

    name: str
    """Processor, cores, memory; or the publication the figures are from."""
    cores: int
    """Core tokens: engines may be active at once as long as their threads fit. 1: strictly one at a time."""
    contention: tuple[float, ...] = (1.0,)
    """Slowdown (>= 1) of each engine when 1, 2, ... engines are active; beyond the last one constant."""
    loads_block: bool = False
    """A load stops every engine meanwhile: one device, one thing at a time."""
    measured_at: str | None = None
    versions: Mapping[str, str] = {}
    meter: str | None = None
    """The energy meter's name, or how the joules were come by."""
    notes: tuple[str, ...] = ()


class ModelProfile(Strict, frozen=True, kw_only=True):
    """One model on that machine."""

    memory_bytes: int
    load_s: float
    unload_s: float = 0.1
    batching: Literal["continuous", "serial"] = "continuous"
    """serial: one request at a time, whatever the card's slots say."""
    prefill_tps: float
    """Prompt tokens read per second by one sequence; prompts are read one after the other."""
    overhead_s: float = 0.0
    """Per request, before the prompt is read: HTTP, template, tokenizer."""
    decode_tps: Mapping[str, float]
    """Sequences decoding at once (`"1"`, `"2"`, ...) -> tokens per second of all of them together."""
    template_tokens: float = 0.0
    """Tokens the chat template adds to every prompt."""
    tokens_per_char: float = 0.25
    cached_tokens: float = 0.0
    """Tokens of every prompt that the prefix cache has, once the engine has served one."""
    jitter: float = 0.0
    """Sigma of the lognormal factor on a request's times."""
    load_jitter: float = 0.0
    """The same of a load's time."""
    active_w: float
    """While it works on at least one request."""
    idle_w: float = 0.0
    """While it is in memory and has nothing to do."""
    load_j: float = 0.0
    """Joules of one load."""
    output_tokens: Mapping[str, Length]
    quality: Mapping[str, float] = {}
    quality_sd: float | None = None
    """Answers are graded with this spread (Beta) around their domain's quality; None: right or wrong."""

    def length(self, domain: str) -> Length:
        return self.output_tokens.get(domain) or self.output_tokens[DEFAULT]

    def quality_in(self, domain: str) -> float | None:
        """None where nothing was stated."""
        return self.quality.get(domain, self.quality.get(DEFAULT))


class Profile(Strict, frozen=True, kw_only=True):
    """A whole file."""

    machine: MachineProfile
    models: Mapping[str, ModelProfile]


def read_profile(path: Path) -> Profile:
    """Raises BadInput (field `profile`) with one line: file, place, reason."""
    try:
        document = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise _wrong(f"{path}: {error.strerror or error}; `calm profile` measures one") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _wrong(f"{path}: {error}") from None
    try:
        profile = msgspec.convert(document, Profile)
    except msgspec.ValidationError as error:
        raise _wrong(f"{path}: {_misfit(document) or error}") from None
    for problem in problems(profile):
        raise _wrong(f"{path}: {problem}")
    return profile


def _misfit(document: Mapping[str, object]) -> str | None:
    """The first model whose table has a wrong type or field, by its name: msgspec tells only that it is one."""
    models = document.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        try:
            msgspec.convert(model, ModelProfile)
        except msgspec.ValidationError as error:
            return f"models.{name}: {error}"
    return None


def write_profile(profile: Profile, path: Path) -> None:
    """A TOML file that `read_profile` reads back to an equal profile."""
    import tomli_w

    document = {key: _without_none(value) for key, value in msgspec.to_builtins(profile).items()}
    path.write_text(tomli_w.dumps(document), encoding="utf-8")


def problems(profile: Profile) -> Iterable[str]:
    """What the types do not say, as `models.NAME.field: reason`."""
    machine = profile.machine
    if machine.cores < 1:
        yield "machine.cores: must be at least 1"
    if not machine.contention or not all(1.0 <= factor < 1e3 for factor in machine.contention):
        yield "machine.contention: needs at least one factor, each 1 or more"
    if not profile.models:
        yield "models: needs at least one"
    for name, model in profile.models.items():
        for problem in _model_problems(model):
            yield f"models.{name}.{problem}"


def _model_problems(model: ModelProfile) -> Iterable[str]:
    for field in ("memory_bytes", "prefill_tps", "tokens_per_char"):
        if not 0 < getattr(model, field) < 1e18:
            yield f"{field}: must be above 0"
    for field in (
        "load_s", "unload_s", "overhead_s", "template_tokens", "cached_tokens", "active_w", "idle_w", "load_j",
    ):  # fmt: skip
        if not 0 <= getattr(model, field) < 1e18:
            yield f"{field}: must be 0 or more"
    for field in ("jitter", "load_jitter"):
        if not 0 <= getattr(model, field) <= MOST_JITTER:
            yield f"{field}: must be 0..{MOST_JITTER:g}, a sigma of logarithms"
    if model.quality_sd is not None and not 0 <= model.quality_sd <= 0.5:
        yield "quality_sd: must be 0..0.5, no spread within 0..1 is wider"
    yield from _table_problems(model)


def _table_problems(model: ModelProfile) -> Iterable[str]:
    if "1" not in model.decode_tps:
        yield 'decode_tps: the rate of one sequence, "1", is missing'
    for count, rate in model.decode_tps.items():
        if not (count.isascii() and count.isdigit()) or int(count) < 1 or not 0 < rate < 1e12:
            yield f"decode_tps.{count}: sequences (1 or more) = tokens per second (above 0)"
    if DEFAULT not in model.output_tokens:
        yield f"output_tokens: {DEFAULT} is missing"
    for domain, length in model.output_tokens.items():
        if not (1 <= length.mean < 1e9 and 0 <= length.sd < 1e9):
            yield f"output_tokens.{domain}: needs a mean of at least 1 and an sd of at least 0"
    for domain, quality in model.quality.items():
        if not 0 <= quality <= 1:
            yield f"quality.{domain}: must be 0..1"


def _without_none(value: object) -> object:
    """TOML has no null: what is None is left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _wrong(message: str) -> BadInput:
    return BadInput(message, field="profile")
