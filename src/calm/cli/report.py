"""`calm report`: a study's table and plots again; and how replay and bench show what they found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.options import json_option
from calm.cli.output import emit_json, heading, note, print_table, printable, warn

if TYPE_CHECKING:
    from calm.report.records import Study
    from calm.report.tables import Table


@click.command(short_help="Print a study's table and draw its plots again.")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@json_option
@click.option(
    "--baseline",
    metavar='"POLICY / CACHE"',
    help="Compare every other row with this one: ratios, paired by seed.",
)
@click.option("--wide", is_flag=True, help="Every figure there is, each with its 95 % interval.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables, for a document.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw the plots into DIR.")
def report(
    directory: str, as_json: bool, baseline: str | None, wide: bool, markdown: bool, plots: bool
) -> None:
    """Print the table of a study that calm replay or calm bench left in DIR, and draw its plots again. Nothing
    is run: the figures are made from the trials that were kept.

    \b
    Example:
      calm report results --baseline "paper / lru"
    """
    from calm.report.files import load_study

    path = Path(directory)
    study = load_study(path)
    if as_json:
        emit_json(document(study, baseline))
    else:
        print_study(study, wide=wide, markdown=markdown)
        if baseline is not None:
            print_comparison(study, baseline, markdown=markdown)
    if plots:
        draw(study, path)


def show(study: Study, out: Path | None, as_json: bool) -> None:
    """What `calm replay` and `calm bench` end with: the table and its remarks, and with `out` results.json
    and the plots in that directory. Plots that cannot be drawn are a warning: the figures are safe by then.

    Raises BadInput where scipy is missing or `out` cannot be written.
    """
    from calm.errors import BadInput
    from calm.report.files import StudyDirectory

    if out is not None:
        StudyDirectory.reopen(out).finish(study)
    if as_json:
        emit_json(document(study, None))
    else:
        print_study(study)
    if out is None:
        return
    try:
        draw(study, out)
    except BadInput as error:
        warn(f"no plots: {error.message}")


def document(study: Study, baseline: str | None) -> dict[str, object]:
    """What --json prints: results.json without the list of files, and the comparisons where asked for."""
    from calm.report.tables import comparison, setup_called, summarise

    found: dict[str, object] = {
        "title": study.title,
        "provenance": study.provenance,
        "slo_s": study.slo_s,
        "notes": study.notes,
        "summaries": summarise(study),
    }
    if baseline is not None:
        found["comparisons"] = comparison(study, setup_called(study, baseline))
    return found


def print_study(study: Study, *, wide: bool = False, markdown: bool = False) -> None:
    from calm.report.tables import remarks, summarise, to_table

    summaries = summarise(study)
    print_one(to_table(summaries, wide=wide), markdown)
    for remark in remarks(study, summaries):
        if markdown:
            click.echo(f"- {printable(remark)}")
        else:
            note(remark)


def print_comparison(study: Study, baseline: str, *, markdown: bool = False) -> None:
    from calm.report.tables import comparison, comparison_table, setup_called

    found = comparison(study, setup_called(study, baseline))
    title = f"against {printable(baseline)}: ratios, below 1 is less; of quality and shares the difference"
    if markdown:
        click.echo(f"\n{title}\n")
    else:
        heading(title)
    print_one(comparison_table(found), markdown)


def print_one(table: Table, markdown: bool) -> None:
    from calm.report.tables import to_markdown

    if markdown:
        click.echo(printable(to_markdown(table)))
    else:
        print_table(table.headers, table.rows, right=table.right)


def draw(study: Study, directory: Path) -> None:
    from calm.report.plots import draw_all

    paths = draw_all(study, directory)
    note(f"{len(paths)} pictures in {directory}")
