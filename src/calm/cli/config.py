"""`calm config`: is the configuration right, and which value comes from where."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from calm.cli.options import json_option, overrides, settings_of, settings_options
from calm.cli.output import emit_json, note, print_table

if TYPE_CHECKING:
    from calm.settings import Settings


class Effective(NamedTuple):
    """One setting as it counts."""

    name: str
    value: object
    origin: str


@click.group(short_help="Check or show the configuration in force.")
def config() -> None:
    """Check the configuration, or show every value in force and where it comes from. Lowest first, settings
    come from: the defaults, the configuration file, the environment (CALM_SECTION__FIELD), flags.

    \b
    Example:
      calm config check
      calm config show
    """


@config.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@json_option
def check(file: str | None, as_json: bool) -> None:
    """Check a configuration file, or the one in force, together with the environment: names, types, and
    values that must fit each other. Exits 1 with the setting, its place and the reason when one is wrong.

    \b
    Example:
      calm config check
      calm config check ./calm.toml
    """
    from calm.cli.soundness import check_values

    settings = settings_of({}, file)
    check_values(settings)
    place = file_in_force(file)
    if as_json:
        emit_json({"ok": True, "file": str(place) if place else None})
    else:
        click.echo(f"ok: {place}" if place else "ok: no configuration file; defaults and environment")


@config.command()
@settings_options
@json_option
def show(config_file: str | None, as_json: bool, **flags: object) -> None:
    """Show every setting, the value in force and where it comes from. Takes the flags of `calm serve`, so
    that it can be seen what a command line would serve with.

    \b
    Example:
      calm config show
      calm config show --port 9000 --json
    """
    settings = settings_of(flags, config_file)
    place = file_in_force(config_file)
    found = list(effective(settings, place, os.environ, overrides(flags)))
    if as_json:
        emit_json([item._asdict() for item in found])
        return
    print_table(("setting", "value", "from"), [(i.name, shown(i.value), i.origin) for i in found])
    if place is None:
        note("no configuration file in force")


def file_in_force(file: str | None) -> Path | None:
    from calm.settings import config_path

    return Path(file).expanduser() if file else config_path(os.environ)


def effective(
    settings: Settings,
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Mapping[str, object]],
) -> Iterator[Effective]:
    """Every setting in the order of the reference page, with its highest origin."""
    from calm.settings import SECTIONS

    written = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    for section in SECTIONS:
        values = getattr(settings, section)
        for field in values.__struct_fields__:
            origin = origin_of(section, field, written, file, environ, flags)
            yield Effective(f"{section}.{field}", getattr(values, field), origin)
    for name, weights in settings.goals.items():
        yield Effective(f"goals.{name}", weights, f"file {file}")


def origin_of(
    section: str,
    field: str,
    written: Mapping[str, object],
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Mapping[str, object]],
) -> str:
    """flag, else environment, else file, else default."""
    variable = f"CALM_{section.upper()}__{field.upper()}"
    table = written.get(section)
    if field in flags.get(section, {}):
        return "flag"
    if environ.get(variable):
        return f"environment {variable}"
    if isinstance(table, dict) and field in table:
        return f"file {file}"
    return "default"


def shown(value: object) -> str:
    import msgspec

    if value is None:
        return "(unset)"
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()
