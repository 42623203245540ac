"""`calm version`."""

from __future__ import annotations

import platform

import click

from calm import __version__
from calm.cli.output import emit_json


@click.command(short_help="Print the version.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> None:
    """Print the versions of CALM and of the Python it runs on: what a report of a fault should begin with.

    \b
    Example:
      calm version
    """
    found = {"calm": __version__, "python": platform.python_version(), "platform": platform.platform()}
    if as_json:
        emit_json(found)
    else:
        click.echo(f"calm {found['calm']} (Python {found['python']}, {found['platform']})")
