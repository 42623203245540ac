"""`calm knowledge`: what was observed so far, read beside the running server."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.options import config_option, json_option, settings_of
from calm.cli.output import UNKNOWN, count, emit_json, joules, number, print_table, seconds, size

if TYPE_CHECKING:
    from calm.records import KnowledgeSummary, ModelSummary


@click.group(short_help="Summarise or export what was observed.")
def knowledge() -> None:
    """Read what CALM remembers: requests, decisions, predictions beside outcomes, energy, feedback. Works on
    the database file, so the server may be running or not.

    \b
    Example:
      calm knowledge summary
      calm knowledge export --out ./knowledge
    """


@knowledge.command()
@config_option
@json_option
def summary(config_file: str | None, as_json: bool) -> None:
    """Summarise what is stored: how many requests by status, and for each model the means of what was
    predicted and what was observed.

    \b
    Example:
      calm knowledge summary
    """
    from calm.stores.reads import KnowledgeReader

    found = KnowledgeReader(database(config_file)).summary()
    if as_json:
        emit_json(found)
        return
    click.echo(headline(found))
    if found.models:
        print_models(found)
    for meter in found.energy:
        click.echo(
            f"{joules(meter.joules)} over {count(meter.requests, 'request')} ({meter.meter}, {meter.kind})"
        )


@knowledge.command()
@click.option(
    "--out", required=True, metavar="DIR", type=click.Path(file_okay=False), help="Where the files go."
)
@click.option("--since", metavar="DATE", help="Only what came after, e.g. 2026-11-01 or 2026-11-01T12:00.")
@click.option("--embeddings", is_flag=True, help="Include the queries' vectors.")
@click.option("--force", is_flag=True, help="Overwrite files of an earlier export.")
@config_option
@json_option
def export(
    out: str, since: str | None, embeddings: bool, force: bool, config_file: str | None, as_json: bool
) -> None:
    """Write the knowledge to Parquet files, one for requests (decision, prediction, outcome), one for
    feedback and one for residency events, for notebooks and for training elsewhere. Consistent while the
    server writes. Prompts are in it only if the operator lets CALM store them.

    \b
    Example:
      calm knowledge export --out ./knowledge --since 2026-11-01
    """
    from calm.stores.export import export_parquet

    report = export_parquet(
        database(config_file),
        Path(out).expanduser(),
        since=None if since is None else unix_seconds(since),
        embeddings=embeddings,
        overwrite=force,
    )
    if as_json:
        emit_json(report)
        return
    for table, rows in report.rows.items():
        file = Path(out) / f"{table}.parquet"
        click.echo(f"{file}: {count(rows, 'row')}, {size(report.bytes.get(file.name))}")


def database(config_file: str | None) -> Path:
    from calm.settings import knowledge_path

    return knowledge_path(settings_of({}, config_file))


def unix_seconds(text: str) -> float:
    """A date or a time, local unless it says otherwise. Raises BadParameter."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise click.BadParameter(
            f'"{text}" is no date; write 2026-11-01 or 2026-11-01T12:00', param_hint="--since"
        ) from None


def headline(found: KnowledgeSummary) -> str:
    if not found.requests:
        return 'nothing stored yet; ask something: calm ask "Why is the sky blue?"'
    statuses = ", ".join(f"{number} {status}" for status, number in sorted(found.statuses.items()))
    since = ""
    if found.since_wall_s is not None:
        since = f" since {datetime.datetime.fromtimestamp(found.since_wall_s).astimezone():%Y-%m-%d %H:%M}"
    return (
        f"{count(found.requests, 'request')}{since} ({statuses or 'none ended'}), "
        f"{count(found.feedback, 'rating')}, {count(found.events, 'residency event')}"
    )


def print_models(found: KnowledgeSummary) -> None:
    headers = ("model", "requests", "ok", "first token", "total", "output tokens", "energy", "rating")
    print_table(headers, [model_cells(model) for model in found.models], right=range(1, 8))
    click.echo("figures are means: observed (predicted)")


def model_cells(model: ModelSummary) -> tuple[str, ...]:
    def both(observed: str, predicted: str) -> str:
        return observed if predicted == UNKNOWN else f"{observed} ({predicted})"

    return (
        model.model,
        str(model.requests),
        str(model.ok),
        both(seconds(model.observed_ttft_s), seconds(model.predicted_ttft_s)),
        both(seconds(model.observed_total_s), seconds(model.predicted_total_s)),
        both(number(model.observed_output_tokens), number(model.predicted_output_tokens)),
        both(joules(model.observed_energy_j), joules(model.predicted_energy_j)),
        number(model.rating),
    )
