"""`calm specialise`: a LoRA specialist from a file of rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.options import config_option, fleet_option, json_option, settings_of
from calm.cli.output import count, emit_json, note, print_table, size, warn
from calm.errors import BadInput, SourceError

if TYPE_CHECKING:
    from calm.records import ModelCard
    from calm.settings import Settings
    from calm.specialise.recipe import Recipe
    from calm.specialise.run import Job, Result

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
EXTRA = "calm specialise needs PyTorch: pip install 'calm-orchestrator[train]' (CPU only: pip install torch==2.13.0)"


@click.command(short_help="Train a specialist from your own rows.")
@click.option(
    "--base", metavar="MODEL", required=True, help="Model of the fleet to train on, as `smollm2-135m`."
)
@click.option(
    "--data", "data_files", metavar="FILE", multiple=True, required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Rows to learn (JSON lines, .gz too); give it several times for more files.",
)  # fmt: skip
@click.option("--name", metavar="NAME", required=True, help="Name of the specialist in the fleet.")
@click.option(
    "--description", metavar="TEXT", required=True,
    help="What it is good at, in the words of those who will ask: routing compares questions with it.",
)  # fmt: skip
@fleet_option
@config_option
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True, help="Most passes."
)
@click.option(
    "--rank", type=click.IntRange(1, 256), default=8, show_default=True, help="Rank of the adapter."
)
@click.option(
    "--learning-rate", type=click.FloatRange(0, 1, min_open=True), default=1e-3, show_default=True,
    help="Highest learning rate.",
)  # fmt: skip
@click.option(
    "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True,
    help="Share of each block's output left out at a step: 0.1 helps few rows seen many times.",
)  # fmt: skip
@click.option(
    "--rows-per-step", type=click.IntRange(1), default=16, show_default=True, help="Rows between two updates."
)
@click.option(
    "--patience", type=click.IntRange(1), default=6, show_default=True,
    help="Stop after so many looks at the held-out rows (four an epoch) without anything better.",
)  # fmt: skip
@click.option(
    "--held-out", type=click.FloatRange(0.01, 0.5), default=0.1, show_default=True,
    help="Share held out of rows that name no split.",
)  # fmt: skip
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the order of rows and the first weights."
)
@click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="Where to train.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: all cores]")
@click.option("--evaluate", type=click.IntRange(1), metavar="N", default=200, show_default=True,
              help="Held-out rows that base and specialist answer at the end.")  # fmt: skip
@click.option("--data-licence", metavar="TEXT", help="Licence of the rows, for the model card.")
@click.option("--limits", metavar="TEXT", help="What it must not be relied on for, for the model card.")
@click.option("--replace", "replace_", is_flag=True, help="Overwrite a specialist of that name.")
@json_option
def specialise(
    base: str, data_files: tuple[Path, ...], name: str, description: str, fleet: str | None,
    config_file: str | None, epochs: float, rank: int, learning_rate: float, dropout: float, rows_per_step: int,
    patience: int, held_out: float, seed: int, device: str, threads: int | None, evaluate: int, data_licence: str | None,
    limits: str | None, replace_: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a small adapter (LoRA) on a model of the fleet, from your own questions and answers, and add it to
    the fleet as a model of its own. It is trained on exactly the weights that are served, checked against the
    engine, and measured against its base on rows it has not learned. Ctrl-C keeps the training; the same
    command goes on.

    A row is a JSON object: {"messages": [...]}, {"prompt": ..., "completion": ...}, or {"question": ...,
    "context": ..., "choices": ..., "answer": ...}. Rows with "split": "test" are left alone.

    \b
    Example:
      calm specialise --base smollm2-135m --data tickets.jsonl --name tickets \\
          --description "Sorts customer tickets by team: billing, delivery, returns."
    """
    from calm.specialise.recipe import Recipe

    recipe = Recipe(
        rank=rank, alpha=2.0 * rank, epochs=epochs, learning_rate=learning_rate, dropout=dropout,
        rows_per_step=rows_per_step, patience=patience, seed=seed,
    )  # fmt: skip
    settings = settings_of({"fleet": fleet}, config_file)
    check_name(name)
    check_extra()
    from calm.settings import cache_dir
    from calm.specialise.card import Origin
    from calm.specialise.examples import read_examples
    from calm.specialise.run import Job, check_base, named
    from calm.wiring import make_embedder, runtime_directory

    card, directory = base_card(settings, base)
    check_base(card)
    check_free(directory, name, card, replace_=replace_)
    examples = read_examples(data_files, held_out)
    for line in named(examples.bad):
        warn(line)
    tell(examples)
    with runtime_directory() as run_dir:
        job = Job(
            base=card,
            weights=weights_of(card, directory),
            origin=Origin(
                name=name, base=base, base_licence=card.source.licence if card.source else None,
                description=description, data=tuple(path.name for path in data_files),
                data_licence=data_licence, limits=limits, rows=len(examples.of("train")),
                held_out=len(examples.of("validation")), bad=len(examples.bad),
                command=command(base, data_files, name, recipe),
            ),
            examples=examples, recipe=recipe, directory=directory, state=state_dir(), run_dir=run_dir,
            threads=threads or cores(), embedder=make_embedder(settings.policy.embedder, cache_dir()),
            device=device_of(device), evaluated_rows=evaluate,
        )  # fmt: skip
        result = make(job)
    emit_json(told(result)) if as_json else show(result)


# --- before -----------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name: small letters, digits, . _ and -", field="name")


def check_extra() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise BadInput(EXTRA)


def base_card(settings: Settings, name: str) -> tuple[ModelCard, Path]:
    """The card to train on and the directory it lies in. Raises BadInput for an unknown name."""
    from calm.registry import load_fleet
    from calm.settings import fleet_dir

    directory = fleet_dir(settings)
    load = load_fleet(directory)
    if name not in load.fleet:
        known = ", ".join(n for n, card in load.fleet.items() if card.adapter_of is None) or "none"
        raise BadInput(f"no model {name!r} in {directory}; there are: {known}", field="base")
    return load.fleet[name], directory


def check_free(directory: Path, name: str, base: ModelCard, *, replace_: bool) -> None:
    card = directory / f"{name}.toml"
    if name == base.name:
        raise BadInput(f"{name} is the base itself: give the specialist a name of its own", field="name")
    if card.exists() and not replace_:
        raise BadInput(f"{card} exists: choose another --name, or --replace it", field="name")


def weights_of(card: ModelCard, directory: Path) -> Path:
    from calm.settings import cache_dir
    from calm.sources.fetch import cached_path

    assert card.source is not None
    path = cached_path(card.source, cache_dir(), directory)
    if path is None:
        raise SourceError(
            f"{card.name}: its weights are not here; `calm models pull {card.name}` fetches them"
        )
    return path


def tell(examples: object) -> None:
    from calm.specialise.examples import Examples

    assert isinstance(examples, Examples)
    parts = {part: len(examples.of(part)) for part in ("train", "validation", "test")}
    left = f", {parts['test']:,} of a test split left alone" if parts["test"] else ""
    bad = f", {len(examples.bad):,} unusable" if examples.bad else ""
    note(f"{count(parts['train'], 'row')} to learn, {parts['validation']:,} held out{left}{bad}")


def state_dir() -> Path:
    from calm.settings import cache_dir

    return cache_dir() / "specialise"


def cores() -> int:
    from calm.monitor.resources import Resources

    return Resources().cores()


def device_of(wish: str) -> str:
    import torch

    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available():
        raise BadInput("PyTorch sees no CUDA device; leave --device out to train on the CPU", field="device")
    return wish


def command(base: str, data: tuple[Path, ...], name: str, recipe: Recipe) -> str:
    """What to type to make it again; files by their names only."""
    files = " ".join(f"--data {path.name}" for path in data)
    return (
        f"calm specialise --base {base} {files} --name {name} --rank {recipe.rank} --epochs {recipe.epochs:g} "
        f"--learning-rate {recipe.learning_rate:g} --dropout {recipe.dropout:g} --rows-per-step {recipe.rows_per_step} "
        f"--patience {recipe.patience} --seed {recipe.seed}"
    )


# --- meanwhile and after ----------------------------------------------------------------------------


def make(job: Job) -> Result:
    from calm.cli.specialise_view import TrainingBoard
    from calm.specialise.run import specialise as run

    try:
        with TrainingBoard(sys.stderr) as board:
            return run(job, board)
    except KeyboardInterrupt:
        click.echo(err=True)
        note("the training is kept; the same command goes on where this one stopped")
        raise


def told(result: Result) -> dict[str, object]:
    """For --json."""
    import msgspec

    return {
        "card": str(result.card), "adapter": str(result.adapter), "model_card": str(result.page),
        "peak_bytes": result.peak_bytes, "too_long": list(result.too_long), **msgspec.to_builtins(result.made),
    }  # fmt: skip


def show(result: Result) -> None:
    made = result.made
    if result.too_long:
        warn(
            f"{count(len(result.too_long), 'row')} longer than the context: {', '.join(result.too_long[:5])}"
        )
    print_table(
        ("data set", "rows", "base", "specialist", "base, s", "specialist, s"),
        [
            (
                s.dataset,
                str(s.rows),
                f"{s.base:.3f}",
                f"{s.specialist:.3f}",
                f"{s.base_s:.2f}",
                f"{s.specialist_s:.2f}",
            )
            for s in made.scores
        ],
    )
    rate = made.tokens / max(made.seconds, 1e-9)
    note(
        f"{made.tokens:,} tokens at {rate:.0f} tokens/s; best at step {made.best.step} of {made.steps}; engine and "
        f"trainer agree on {made.agreement:.1%}; {size(result.peak_bytes)} of memory at most"
    )
    note(f"{result.adapter} ({size(made.size_bytes)}), {result.page} and {result.card} written")
    note("a running server takes it up within a second")
