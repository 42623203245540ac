"""What one caller asks of CALM itself: the `calm` object and the `x-calm-*` headers, read and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec

from calm.errors import BadInput
from calm.gateway.shapes import convert
from calm.records import Privacy, Weights, Wishes

MAX_NAME_CHARS = 256
"""Longest goal or conversation id: they are stored with every request."""


def body_wishes(calm: Mapping[str, object]) -> Wishes:
    """Wishes of a `calm` object. Raises BadInput with a field such as `calm.deadline_s`."""
    fields = dict(calm)
    if isinstance(fields.get("weights"), Mapping):
        fields["weights"] = read_weights(fields["weights"], "calm.weights")
    wishes = convert(fields, Wishes, "calm")
    _check(wishes, lambda field: f"calm.{field}")
    return wishes


def header_wishes(headers: Mapping[str, str]) -> Wishes:
    """Wishes of the `x-calm-*` headers. Raises BadInput whose field is the header's name."""
    found = {field: headers[name] for field, name in HEADERS.items() if name in headers}
    if not found:
        return _NONE
    wishes = Wishes(
        goal=found.get("goal") or None,
        weights=_weights_header(found["weights"]) if "weights" in found else None,
        deadline_s=_number(found, "deadline_s"),
        max_energy_j=_number(found, "max_energy_j"),
        max_cost_usd=_number(found, "max_cost_usd"),
        allowed_models=_names(found["allowed_models"]) if "allowed_models" in found else None,
        privacy=_privacy(found["privacy"]) if "privacy" in found else None,
        conversation=found.get("conversation") or None,
    )
    _check(wishes, HEADERS.__getitem__)
    return wishes


def merge_wishes(first: Wishes, second: Wishes) -> Wishes:
    """Field by field, what `first` says, else what `second` says."""
    if second is _NONE:
        return first
    mine = {name: getattr(first, name) for name in Wishes.__struct_fields__}
    theirs = {name: getattr(second, name) for name in Wishes.__struct_fields__}
    return Wishes(**{name: theirs[name] if value is None else value for name, value in mine.items()})


def read_weights(value: object, field: str) -> Weights:
    """Weights someone stated: one left out counts nothing, rather than its default. Raises BadInput."""
    if not isinstance(value, Mapping):
        raise BadInput(f'{field}: must be an object such as {{"latency": 1, "quality": 2}}', field=field)
    weights = convert({**_ZERO, **value}, Weights, field)
    values = msgspec.structs.astuple(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in values) or sum(values) <= 0:
        raise BadInput(f"{field}: weights must be at least 0, and one of them more", field=field)
    return weights


HEADERS: Mapping[str, str] = {
    "goal": "x-calm-goal",
    "weights": "x-calm-weights",
    "deadline_s": "x-calm-deadline-s",
    "max_energy_j": "x-calm-max-energy-j",
    "max_cost_usd": "x-calm-max-cost-usd",
    "allowed_models": "x-calm-models",
    "privacy": "x-calm-privacy",
    "conversation": "x-calm-conversation",
}
"""Field of `Wishes` -> the header that sets it."""

_NONE = Wishes()
_PRIVACY: Mapping[str, Privacy] = {"any": "any", "local": "local"}
_ZERO = dict.fromkeys(Weights.__struct_fields__, 0.0)


def _weights_header(text: str) -> Weights:
    """ "latency=0.5,quality=0.5" """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    try:
        return read_weights({name.strip(): float(value) for name, _, value in pairs}, "x-calm-weights")
    except ValueError:
        hint = f'x-calm-weights: "{text[:80]}" is not like "latency=0.5,quality=0.5"'
        raise BadInput(hint, field="x-calm-weights") from None


def _number(found: Mapping[str, str], field: str) -> float | None:
    if field not in found:
        return None
    try:
        return float(found[field])
    except ValueError:
        name = HEADERS[field]
        raise BadInput(f'{name}: "{found[field][:40]}" is no number', field=name) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _privacy(text: str) -> Privacy:
    if text not in _PRIVACY:
        raise BadInput(f'x-calm-privacy: "{text[:40]}" is neither any nor local', field="x-calm-privacy")
    return _PRIVACY[text]


def _check(wishes: Wishes, name: Callable[[str], str]) -> None:
    """What the types do not say: signs, finiteness, lengths."""
    for field in ("deadline_s", "max_energy_j"):
        value = getattr(wishes, field)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadInput(f"{name(field)}: must be more than 0", field=name(field))
    cost = wishes.max_cost_usd
    if cost is not None and not (math.isfinite(cost) and cost >= 0):
        raise BadInput(f"{name('max_cost_usd')}: must be at least 0", field=name("max_cost_usd"))
    if wishes.allowed_models is not None and not wishes.allowed_models:
        raise BadInput(f"{name('allowed_models')}: names no model", field=name("allowed_models"))
    for field in ("goal", "conversation"):
        if len(getattr(wishes, field) or "") > MAX_NAME_CHARS:
            raise BadInput(f"{name(field)}: at most {MAX_NAME_CHARS} characters", field=name(field))
