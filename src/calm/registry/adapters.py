"""Adapters completed from their bases: the one place where the whole card of a specialist is made.

An adapter's file says what is its own: what it is good at, where its weights are, what it was measured to do.
Everything about the engine is its base's. It is copied into the card here, once, when the fleet is loaded, so
that whoever reads a card later (routing asks for its context and its placement, dispatch for its kind of
engine, tables for its slots) finds the truth without knowing that there are adapters at all.

Completing a card twice changes nothing; so a card that serves on after its file turned bad is completed anew
from the base that is in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from calm.records import ChatSpec, ModelCard, PriceSpec, PriorSpec, Record
from calm.registry.problems import did_you_mean

CARRIERS = frozenset({"llamacpp", "command", "openai"})
"""Kinds of engine that can carry adapters."""


class Misplaced(Record, frozen=True, kw_only=True):
    """Why an adapter cannot serve: dotted field, reason, hint."""

    field: str
    reason: str
    hint: str | None = None


def join(cards: Iterable[ModelCard]) -> tuple[list[ModelCard], dict[str, Misplaced]]:
    """The cards with every adapter completed, and by name the adapters that have no base to run on."""
    known = {card.name: card for card in cards}
    joined: list[ModelCard] = []
    refused: dict[str, Misplaced] = {}
    for card in known.values():
        base = known.get(card.host)
        wrong = None if base is card else misplaced(card, base, known)
        if wrong is not None:
            refused[card.name] = wrong
        else:
            joined.append(card if base is card or base is None else completed(card, base))
    return joined, refused


def misplaced(card: ModelCard, base: ModelCard | None, known: Mapping[str, ModelCard]) -> Misplaced | None:
    """What speaks against an adapter on this base; None when nothing does."""
    name = card.host
    if base is None:
        hint = did_you_mean(name, known) or f"add {name}.toml, or correct it if it was refused"
        return Misplaced(field="adapter_of", reason=f"no good card of `{name}` is in the fleet", hint=hint)
    if base.adapter_of is not None:
        reason = f"`{name}` is itself an adapter, of `{base.adapter_of}`"
        return Misplaced(field="adapter_of", reason=reason, hint=f'write adapter_of = "{base.adapter_of}"')
    if base.engine.kind not in CARRIERS:
        reason = f"`{name}` runs on an engine of kind `{base.engine.kind}`, which carries no adapters"
        return Misplaced(field="adapter_of", reason=reason)
    if card.source is None and base.engine.kind == "llamacpp":
        return Misplaced(
            field="source",
            reason="an adapter on a llamacpp engine needs its weights",
            hint="add [source] with parts and sha256 of its GGUF",
        )
    return None


def completed(card: ModelCard, base: ModelCard) -> ModelCard:
    """The adapter's card with what is its base's filled in."""
    return replace(
        card,
        placement=base.placement,
        context=base.context,
        engine=replace(base.engine, upstream_model=card.engine.upstream_model),
        chat=_chat(card.chat, base.chat),
        priors=_priors(card.priors, base.priors),
        price=_price(card.price, base.price),
        sandbox=base.sandbox,
        max_in_flight=base.max_in_flight,
    )


def _chat(own: ChatSpec, base: ChatSpec) -> ChatSpec:
    """How long it may talk is its own alone, as in `_priors`: a limit of its base's could not be lifted."""
    return replace(
        base,
        stop=own.stop or base.stop,
        trim=own.trim or base.trim,
        answer_tokens=own.answer_tokens,
    )


def _priors(own: PriorSpec, base: PriorSpec) -> PriorSpec:
    """Speed and joules are the base's where nobody measured the adapter's own; what it knows and how long it
    talks is what it was trained for."""
    return replace(
        own,
        prefill_tps=own.prefill_tps or base.prefill_tps,
        decode_tps=own.decode_tps or base.decode_tps,
        load_s=base.load_s if own.load_s is None else own.load_s,
        energy_j_per_token=(
            base.energy_j_per_token if own.energy_j_per_token is None else own.energy_j_per_token
        ),
    )


def _price(own: PriceSpec, base: PriceSpec) -> PriceSpec:
    return base if own == PriceSpec() else own
