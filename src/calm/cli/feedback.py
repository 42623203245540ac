"""`calm feedback`: rate an answer, so that the next choice is better."""

from __future__ import annotations

import click

from calm.cli.client import client_options, connect
from calm.cli.explain import LATEST, bare, latest_id
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
    well. The id is the last word of the line that `calm ask` prints; `last` stands for the latest request.

    \b
    Example:
      calm feedback last 4
      calm feedback 0193a5c7f2b80d1e6a3f9c52b14 5 --comment "exactly right"
    """
    client = connect(url, key_env)
    request_id = latest_id(client) if request_id == LATEST else bare(request_id)
    body: dict[str, object] = {"request_id": request_id, "rating": rating}
    if comment is not None:
        body["comment"] = comment
    client.call("POST", "/v1/feedback", body)
    if as_json:
        emit_json(body)
    else:
        click.echo(f"rated {printable(request_id)}: {rating:g} of 5")
