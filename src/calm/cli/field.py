"""`calm models field`: teaches routing which questions are a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.options import config_option, fleet_option, json_option, settings_of
from calm.cli.output import emit_json, note, print_table, warn
from calm.errors import BadInput

if TYPE_CHECKING:
    from calm.specialise.field import Learned


@click.command("field", short_help="Teach routing which questions are a model's own.")
@click.argument("name")
@click.option(
    "--data", "data_files", metavar="FILE", multiple=True, required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Questions it was made for (JSON lines, .gz too), in the forms of `calm specialise`.",
)  # fmt: skip
@click.option("--quality", type=click.FloatRange(0, 1), help="How good it is there, where that is known.")
@click.option(
    "--untrained", type=click.FloatRange(0, 1), help="How good a model is there that has not learned it."
)
@fleet_option
@config_option
@json_option
def field(
    name: str, data_files: tuple[Path, ...], quality: float | None, untrained: float | None,
    fleet: str | None, config_file: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Learn from questions which ones are a model's own (its field), and write that into its card.

    A description says what a model is about; a field says what its questions look like, and a small specialist is
    of use there alone. `calm specialise` does this by itself; this command is for models that come from elsewhere,
    or with other questions. A card's comments stay, and a running server takes the card up within a second.

    \b
    Example:
      calm models field tickets --data questions.jsonl --quality 0.9
    """
    from calm.registry import load_fleet
    from calm.settings import cache_dir, fleet_dir
    from calm.specialise.examples import HELD_OUT, read_examples
    from calm.specialise.field import fields_of
    from calm.specialise.run import named
    from calm.wiring import make_embedder

    settings = settings_of({"fleet": fleet}, config_file)
    directory = fleet_dir(settings)
    known = load_fleet(directory).fleet
    if name not in known:
        raise BadInput(f"no model {name!r} in {directory}; there are: {', '.join(known) or 'none'}")
    embedder = make_embedder(settings.policy.embedder, cache_dir())
    if embedder is None:
        raise BadInput("policy.embedder is none: without an embedder questions cannot be told apart")
    examples = read_examples(data_files, HELD_OUT)
    for line in named(examples.bad):
        warn(line)
    sets = {row.query.dataset for row in examples.rows}
    found = fields_of(
        examples.rows, name, embedder, {} if untrained is None else dict.fromkeys(sets, untrained)
    )
    if not found:
        raise BadInput("too few questions to learn a field from", field="data")
    card = directory / f"{name}.toml"
    write_fields(card, found, quality)
    emit_json([told(one) for one in found]) if as_json else show(card, found)


def write_fields(card: Path, found: Sequence[Learned], quality: float | None) -> None:
    """Put the fields into the card's file; everything else in it stays as it is."""
    import tomlkit

    from calm.specialise.card import write_card

    document = tomlkit.parse(card.read_text(encoding="utf-8"))
    fields = document.setdefault("fields", tomlkit.table(is_super_table=True))
    for one in found:
        table = tomlkit.table()
        table.add("embedder", one.spec.embedder)
        if one.spec.untrained is not None:
            table.add("untrained", one.spec.untrained)
        table.add("weights", one.spec.weights)
        fields[one.name] = table
        if quality is not None:
            priors = document.setdefault("priors", tomlkit.table(is_super_table=True))
            priors.setdefault("quality", tomlkit.table())[one.name] = quality
    write_card(card, tomlkit.dumps(document))


def told(one: Learned) -> dict[str, object]:
    return {
        "field": one.name, "questions": one.rows, "recognised": one.recognised, "captured": one.captured,
    }  # fmt: skip


def show(card: Path, found: Sequence[Learned]) -> None:
    note(f"{card} has its fields now")
    print_table(
        ("field", "questions", "of held-out ones recognised", "of everyday ones taken"),
        [
            (
                one.name, f"{one.rows:,}", "-" if one.recognised is None else f"{one.recognised:.1%}",
                f"{one.captured:.1%}",
            )
            for one in found
        ],
    )  # fmt: skip
