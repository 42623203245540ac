"""What a training leaves in the fleet: a card that a running CALM picks up, and a page that says how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from calm.records import Record
from calm.specialise.evaluation import Scores
from calm.specialise.field import FREE, Learned, field_name
from calm.specialise.recipe import Check, Recipe

FOLDER = "adapters"
"""Beside the cards."""
OUT_OF_FIELD = 0.1
"""Quality expected of a specialist elsewhere: it answers everything in the form of its own field."""


class Origin(Record, frozen=True, kw_only=True):
    """What a specialist was made of."""

    name: str
    base: str
    base_licence: str | None
    description: str
    data: tuple[str, ...]
    """Names of the files, without their directories."""
    data_licence: str | None
    limits: str | None
    """What it must not be used for, in the maker's words."""
    rows: int
    held_out: int
    bad: int
    command: str


class Made(Record, frozen=True, kw_only=True):
    """What came out."""

    sha256: str
    size_bytes: int
    agreement: float
    scores: tuple[Scores, ...]
    best: Check
    steps: int
    tokens: int
    seconds: float
    answer_tokens: float
    """Mean length of an answer."""
    longest_answer_tokens: int
    """What an answer may take: the longest one learned, and some room."""
    fields: tuple[Learned, ...] = ()
    """Which questions are its own; none without an embedder."""


def domains_of(scores: Sequence[Scores], name: str) -> dict[str, float]:
    """Quality prior by domain: the mean over the domain's held-out rows."""
    by_domain: dict[str, list[Scores]] = {}
    for score in scores:
        by_domain.setdefault(name if score.domain == FREE else score.domain, []).append(score)
    return {
        domain: round(sum(s.specialist * s.rows for s in found) / sum(s.rows for s in found), 3)
        for domain, found in by_domain.items()
    }


def quality_of(made: Made, name: str) -> dict[str, float]:
    """What the card states: quality by field where it has fields, so that it is expected there alone; else by
    domain."""
    if not made.fields:
        return domains_of(made.scores, name)
    known = {field.name for field in made.fields}
    return {
        field: round(score.specialist, 3)
        for score in made.scores
        if (field := field_name(score.dataset, name)) in known
    }


def card_text(origin: Origin, made: Made) -> str:
    """The card `NAME.toml`, ready to be edited."""
    domains = domains_of(made.scores, origin.name)
    lines = [
        "#:schema ../docs/schema/model-card.schema.json",
        "#",
        f"# A LoRA adapter on {origin.base}, made by `calm specialise`; {FOLDER}/{origin.name}.md says from what.",
        "",
        f"name = {_quoted(origin.name)}",
        f"description = {_quoted(origin.description)}",
        f"adapter_of = {_quoted(origin.base)}",
        f"domains = [{', '.join(_quoted(domain) for domain in domains)}]",
        "",
        "[source]",
        f'parts = ["file:{FOLDER}/{origin.name}.gguf"]',
        f'sha256 = "{made.sha256}"',
        f"bytes = {made.size_bytes:_}",
        *([f"licence = {_quoted(origin.base_licence)}   # the base's"] if origin.base_licence else []),
        "",
        "[chat]",
        f"answer_tokens = {made.longest_answer_tokens}   # the longest learned answer and some room",
        "",
        "[priors]",
        f"output_tokens = {made.answer_tokens:.1f}",
        "",
        *_quality(quality_of(made, origin.name)),
        *(line for field in made.fields for line in _field(field)),
    ]
    return "\n".join(lines) + "\n"


def _field(field: Learned) -> list[str]:
    untrained = [] if field.spec.untrained is None else [f"untrained = {round(field.spec.untrained, 3)}"]
    return [
        "",
        "# Which questions are its own, learned from them: a line through their embedding and form. `untrained` is what",
        "# a model without training reaches there: measured for the base.",
        f"[fields.{_quoted(field.name)}]",
        f"embedder = {_quoted(field.spec.embedder)}",
        *untrained,
        f'weights = "{field.spec.weights}"',
    ]


def _quality(quality: Mapping[str, float]) -> list[str]:
    """Nothing where no answer could be judged: then ratings have to teach it."""
    if not quality:
        return ["# Its answers could not be judged, so nothing is claimed of their quality."]
    return [
        "# Measured on held-out rows; `default` is for questions outside its field.",
        "[priors.quality]",
        *(f"{_quoted(name)} = {value}" for name, value in quality.items()),
        f"default = {OUT_OF_FIELD}",
    ]


def model_card(origin: Origin, made: Made, recipe: Recipe) -> str:
    """The page `adapters/NAME.md`: data, licence, recipe, figures, limits."""
    return "\n".join(
        [
            f"# {origin.name}",
            "",
            origin.description,
            "",
            f"A LoRA adapter of rank {recipe.rank} on {origin.base} ({made.size_bytes / 1e6:.1f} MB).",
            "",
            "## Data",
            "",
            f"{', '.join(origin.data)}: {origin.rows:,} rows learned, {origin.held_out:,} held out"
            + (f", {origin.bad:,} left out as unusable" if origin.bad else "")
            + ". Rows of a test split were not read.",
            "",
            f"Licence of the data: {origin.data_licence or 'not stated'}. Licence of the base: "
            f"{origin.base_licence or 'not stated'}.",
            "",
            "## Figures",
            "",
            "On held-out rows that stopped the training but were not learned, answered by the engine:",
            "",
            "| data set | rows | base | specialist | base, s | specialist, s |",
            "|---|---|---|---|---|---|",
            *(
                f"| {s.dataset} | {s.rows} | {s.base:.3f} | {s.specialist:.3f} | {s.base_s:.3f} | {s.specialist_s:.3f} |"
                for s in made.scores
            ),
            "",
            *_recognition(made.fields),
            f"Engine and trainer agree on {made.agreement:.1%} of the tokens of greedy answers.",
            "",
            "## Recipe",
            "",
            "```text",
            origin.command,
            "```",
            "",
            f"LoRA on attention and feed-forward, rank {recipe.rank}, alpha {recipe.alpha:g}, learning rate "
            f"{recipe.learning_rate:g}, {recipe.rows_per_step} rows a step, at most {recipe.epochs:g} epochs, seed "
            f"{recipe.seed}. The best check was at step {made.best.step} of {made.steps}; {made.tokens:,} tokens in "
            f"{made.seconds / 60:.0f} minutes ({made.tokens / max(made.seconds, 1e-9):.0f} tokens/s).",
            "",
            "## Limits",
            "",
            origin.limits or _limits(made),
            "",
        ]
    )


def _recognition(fields: Sequence[Learned]) -> list[str]:
    """How well routing will tell its questions from others."""
    lines = [
        f"Routing takes {'-' if f.recognised is None else format(f.recognised, '.1%')} of the held-out questions of "
        f"{f.name} for its own, and {f.captured:.1%} of everyday questions."
        for f in fields
    ]
    return [*lines, ""] if lines else []


def _limits(made: Made) -> str:
    quality = fmean(s.specialist for s in made.scores) if made.scores else 0.0
    return (
        "It answers in the form of its training rows, whatever it is asked, and knows little besides. "
        f"On its own field it is wrong in about {1 - quality:.0%} of the cases: no advice should rest on it alone."
    )


def _quoted(text: str) -> str:
    import msgspec

    return msgspec.json.encode(text).decode()


def write_card(path: Path, text: str) -> None:
    """At once or not at all: a running server reads the directory."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
