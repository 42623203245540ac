"""`calm keys`: who may use a server that others can reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from calm.cli.options import json_option
from calm.cli.output import emit_json, note, print_table

if TYPE_CHECKING:
    from calm.gateway.auth import Keys


@click.group(short_help="Make, list and revoke API keys.")
def keys() -> None:
    """Make, list and revoke the API keys of this machine's server. Only hashes are kept. As soon as there is
    one key every caller needs one; a running server follows within a second.

    \b
    Example:
      calm keys create alice
      calm keys create ops --admin
    """


@keys.command()
@click.argument("name")
@click.option("--admin", is_flag=True, help="May also load models, change the policy and read all requests.")
@json_option
def create(name: str, admin: bool, as_json: bool) -> None:
    """Make a key and print it. This is the only time it is seen: CALM keeps its hash. Hand it over on a safe
    way; clients send it as `Authorization: Bearer calm-…`, the command line takes it from CALM_API_KEY.

    \b
    Example:
      export CALM_API_KEY=$(calm keys create alice)
    """
    key = open_keys().create(name, "admin" if admin else "user")
    if as_json:
        emit_json({"name": name, "role": "admin" if admin else "user", "key": key})
        return
    click.echo(key)
    note(f"key of {name} ({'admin' if admin else 'user'}); it is not shown again")


@keys.command(name="list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys by name, with their role and the day they were made. The keys themselves are not kept.

    \b
    Example:
      calm keys list
    """
    entries = open_keys().list()
    rows = [{"name": name, "role": entry.role, "created": entry.created} for name, entry in entries.items()]
    if as_json:
        emit_json(rows)
    elif rows:
        print_table(("name", "role", "created"), [tuple(row.values()) for row in rows])
    else:
        note("no keys: whoever reaches the loopback address may use the server; calm keys create NAME")


@keys.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Revoke a key for good. A running server refuses it within a second; requests under way finish.

    \b
    Example:
      calm keys revoke alice
    """
    book = open_keys()
    book.revoke(name)
    click.echo(f"revoked {name}")
    if book.empty:
        note("that was the last key: the server now serves this machine's users without one")


def open_keys() -> Keys:
    from calm.gateway.auth import Keys
    from calm.settings import keys_path

    return Keys(keys_path())
