"""The whole way from rows to a member of the fleet; each stage hands plain values to the next.

    read -> tokenise (engine) -> train -> export -> engine agrees? -> evaluate (engine) -> card

An interrupted training goes on with the same command: its state lies in the cache under a digest of everything that
decides the result (base, rows, recipe), so another recipe starts anew and disturbs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from calm.errors import BadInput, CalmError
from calm.ports import Embedder
from calm.records import AdapterFile, ModelCard, SourceSpec
from calm.specialise.batches import Tokens, spread
from calm.specialise.card import FOLDER, Made, Origin, card_text, model_card, write_card
from calm.specialise.engine import engine_of
from calm.specialise.evaluation import Scores, evaluate
from calm.specialise.examples import BadRow, Example, Examples
from calm.specialise.field import Learned, fields_of
from calm.specialise.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from calm.specialise.model import Decoder
    from calm.specialise.train import Progress

AGREEMENT_ROWS = 24
AGREEMENT_TOKENS = 32
SPARE_TOKENS = 8
"""Room of an answer beyond the longest one learned."""
MOST_ANSWER_TOKENS = 256


class Board(Protocol):
    """Shows what is going on."""

    def stage(self, what: str, total: int | None = None) -> None: ...

    def advance(self) -> None: ...

    def trained(self, progress: Progress, steps: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be made, of what, and where."""

    base: ModelCard
    weights: Path
    origin: Origin
    examples: Examples
    recipe: Recipe
    directory: Path
    """Of the cards; the adapter lies in its folder `adapters`."""
    state: Path
    """Where unfinished trainings are kept."""
    run_dir: Path
    threads: int
    embedder: Embedder | None = None
    """What the server compares questions with; without one no fields are learned."""
    device: str = "cpu"
    evaluated_rows: int = 200


@dataclass(frozen=True, kw_only=True)
class Result:
    """What there is now."""

    card: Path
    adapter: Path
    page: Path
    made: Made
    too_long: tuple[str, ...]
    """Rows longer than the base's context, by file and line."""
    peak_bytes: int
    """Largest resident memory of this process."""


class Disagreement(CalmError):
    """Engine and trainer differ: what was trained is not what would be served."""

    code = "adapter_disagrees"


def specialise(job: Job, board: Board) -> Result:
    """Make a specialist. Raises BadInput, LoadFailed, Disagreement; Ctrl-C keeps the training for the same command."""
    read = _tokenised(job, board)
    train, held_out = read.train, read.held_out
    model = _model(job)
    home = job.state / fingerprint(job, train, held_out)
    best, progress, steps = _trained(job, model, train, held_out, home, board)
    adapter = home / f"{job.origin.name}.gguf"
    _exported(job, model, best, adapter)
    longest = max(len(row.answer) for row in train) + SPARE_TOKENS
    most = min(MOST_ANSWER_TOKENS, longest)
    answered, scores = asyncio.run(_asked(job, read.asked, adapter, most, board))
    agreed = _agreed(model, answered, job.recipe.piece_tokens)
    assert progress.best is not None
    made = Made(
        sha256=hashlib.sha256(adapter.read_bytes()).hexdigest(),
        size_bytes=adapter.stat().st_size,
        agreement=agreed,
        scores=scores,
        best=progress.best,
        steps=steps,
        tokens=progress.tokens,
        seconds=progress.seconds,
        answer_tokens=sum(len(row.answer) for row in train) / len(train),
        longest_answer_tokens=longest,
        fields=_fields(job, scores),
    )
    result = _written(job, made, adapter, read.too_long)
    shutil.rmtree(home, ignore_errors=True)
    return result


# --- stages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """The rows as the engine reads them."""

    train: list[Tokens]
    held_out: list[Tokens]
    asked: list[Example]
    """The held-out rows in words, those that fit the context."""
    too_long: tuple[str, ...]


def _tokenised(job: Job, board: Board) -> Read:
    """What is learned, what is held out, and the rows that do not fit the context."""
    rows = [*job.examples.of("train"), *job.examples.of("validation")]

    async def read() -> list[Tokens]:
        board.stage("reading rows with the engine's tokenizer", len(rows))
        async with engine_of(job.base, job.weights, job.threads, job.run_dir) as engine:
            return await engine.tokens(rows, board.advance)

    both = list(zip(rows, asyncio.run(read()), strict=True))
    fit = [(row, tokens) for row, tokens in both if len(tokens) <= job.base.context]
    return Read(
        train=[tokens for row, tokens in fit if row.part == "train"],
        held_out=[tokens for row, tokens in fit if row.part == "validation"],
        asked=[row for row, _ in fit if row.part == "validation"],
        too_long=tuple(row.where for row, tokens in both if len(tokens) > job.base.context),
    )


def _model(job: Job) -> Decoder:
    import torch

    from calm.specialise.model import Decoder
    from calm.specialise.weights import read_base

    torch.set_num_threads(job.threads)
    shape, weights = read_base(job.weights, torch.bfloat16)
    recipe = job.recipe
    model = Decoder(shape, weights, recipe.rank, recipe.alpha, recipe.seed, recipe.dropout)
    return model.to_device(torch.device(job.device))


def _trained(
    job: Job, model: Decoder, train: Sequence[Tokens], held_out: Sequence[Tokens], home: Path, board: Board
) -> tuple[Mapping[str, Tensor], Progress, int]:
    from calm.specialise.train import Trainer

    trainer = Trainer(model, job.recipe, train, held_out, home)
    board.stage("training", trainer.steps)
    best = trainer.run(board.trained)
    model.pairs.load_state_dict(best)
    model.eval()
    return best, trainer.progress, trainer.steps


def _exported(job: Job, model: Decoder, best: Mapping[str, Tensor], adapter: Path) -> None:
    from calm.specialise.export import write_adapter

    about = {"name": job.origin.name, "description": job.origin.description}
    if job.origin.data_licence:
        about["license"] = job.origin.data_licence
    write_adapter(adapter, model.shape.architecture, best, job.recipe.alpha, about)


async def _asked(
    job: Job, held_out: Sequence[Example], adapter: Path, most: int, board: Board
) -> tuple[list[Tokens], tuple[Scores, ...]]:
    """The engine's answers to held-out rows: as tokens for the agreement, judged for the card."""
    name = job.origin.name
    rows = spread(held_out, job.evaluated_rows)
    board.stage(f"asking {name} and {job.base.name} on the engine", len(rows))
    carried = AdapterFile(card=_adapter_card(job), weights=adapter)
    async with engine_of(job.base, job.weights, job.threads, job.run_dir, [carried]) as engine:
        if reason := engine.running.refused().get(name):
            raise Disagreement(f"the engine does not take the adapter: {reason}")
        asked = [
            await engine.answered(row, min(most, AGREEMENT_TOKENS), specialist=name)
            for row in spread(rows, AGREEMENT_ROWS)
        ]
        return asked, await evaluate(engine, rows, name, most, board.advance)


def _agreed(model: Decoder, answered: Sequence[Tokens], piece_tokens: int) -> float:
    from calm.specialise.agreement import ENOUGH, agreement

    share = agreement(model, answered, piece_tokens)
    if share is None or share < ENOUGH:
        said = (
            "the engine gave no answer" if share is None else f"engine and trainer agree on only {share:.0%}"
        )
        raise Disagreement(
            f"{said} of the tokens of held-out answers (at least {ENOUGH:.0%} is wanted): the adapter was left "
            "out of the fleet; please report it with the base's name"
        )
    return share


def _fields(job: Job, scores: Sequence[Scores]) -> tuple[Learned, ...]:
    """Which questions are its own, and what the base made of them."""
    if job.embedder is None:
        return ()
    untrained = {score.dataset: score.base for score in scores}
    return fields_of(job.examples.rows, job.origin.name, job.embedder, untrained)


def _written(job: Job, made: Made, trained: Path, too_long: tuple[str, ...]) -> Result:
    """Into the fleet at last, the card after what it names: until now a specialist it replaces was untouched."""
    adapter = job.directory / FOLDER / trained.name
    page, card = adapter.with_suffix(".md"), job.directory / f"{job.origin.name}.toml"
    adapter.parent.mkdir(parents=True, exist_ok=True)
    arriving = adapter.with_name(f".{adapter.name}.partial")
    shutil.copyfile(trained, arriving)
    arriving.replace(adapter)
    write_card(page, model_card(job.origin, made, job.recipe))
    write_card(card, card_text(job.origin, made))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(card=card, adapter=adapter, page=page, made=made, too_long=too_long, peak_bytes=peak)


def _adapter_card(job: Job) -> ModelCard:
    """As the engine needs it, before there is a digest."""
    return ModelCard(
        name=job.origin.name,
        description=job.origin.description,
        adapter_of=job.base.name,
        source=SourceSpec(parts=(f"file:{FOLDER}/{job.origin.name}.gguf",), sha256="0" * 64),
    )


# --- small decisions --------------------------------------------------------------------------------


def fingerprint(job: Job, train: Sequence[Tokens], held_out: Sequence[Tokens]) -> str:
    """A digest of what decides the result."""
    source = job.base.source
    told = msgspec.json.encode([source, job.origin.name, msgspec.to_builtins(job.recipe)])
    digest = hashlib.sha256(told)
    for row in (*train, *held_out):
        digest.update(repr((row.prompt, row.answer)).encode())
    return digest.hexdigest()[:32]


def named(bad: Sequence[BadRow], most: int = 5) -> list[str]:
    """The first bad rows in words, and how many more there are."""
    lines = [f"{row.where}: {row.reason}" for row in bad[:most]]
    return [*lines, f"and {len(bad) - most} more"] if len(bad) > most else lines


def check_base(card: ModelCard) -> None:
    """Raises BadInput (field `base`) for a model that cannot be trained on."""
    if card.adapter_of is not None:
        raise BadInput(f"{card.name} is an adapter of {card.adapter_of}: name that as --base", field="base")
    if card.engine.kind != "llamacpp" or card.source is None:
        raise BadInput(
            f"{card.name} runs on {card.engine.kind}: only models of CALM's own engine (llamacpp, a GGUF) are trained",
            field="base",
        )
