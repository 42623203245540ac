"""`calm feedback`: rate an answer, so that the next choice is better."""

from __future__ import annotations

import click

from calm.cli.client import client_options, connect
from calm.cli.explain import bare
from calm.cli.options import json_option
from calm.cli.output import emit_json, printable


@click.command(short_help="Rate an answer from 1 to 5.")
@click.argument("request_id")
@click.argument("rating", type=click.FloatRange(1, 5))
@click.option("--comment", metavar="TEXT", help="What was good or bad about it.")
@json_option
@client_options
def feedback(
    request_id: str, rating: float, comment: str | None, as_json: bool, url: str, key_env: str
) -> None:
    """Rate an answer from 1 (useless) to 5 (perfect). CALM learns from it which model answers such questions
    well. The id is the last word of the line that `calm ask` prints.

    \b
    Example:
      calm feedback 0193a5c7f2b80d1e6a3f9c52b14 5 --comment "exactly right"
    """
    body: dict[str, object] = {"request_id": bare(request_id), "rating": rating}
    if comment is not None:
        body["comment"] = comment
    connect(url, key_env).call("POST", "/v1/feedback", body)
    if as_json:
        emit_json(body)
    else:
        click.echo(f"rated {printable(bare(request_id))}: {rating:g} of 5")
