"""`calm doctor`: the findings of calm.doctor, one a line, worst news impossible to miss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from calm.cli.options import config_option, fleet_option, json_option, settings_of
from calm.cli.output import count, emit_json, printable

if TYPE_CHECKING:
    from calm.doctor import Check
    from calm.settings import Settings

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(short_help="Find what stands in the way of a good service.")
@fleet_option
@config_option
@json_option
@click.pass_context
def doctor(context: click.Context, fleet: str | None, config_file: str | None, as_json: bool) -> None:
    """Look at everything a good service depends on: the configuration, cores, memory and the budget, GPUs,
    energy meters and which is used, engines, the fleet and its weights, disk, the knowledge database, the
    port. Each line says ok, warn or fail, and what to do. Changes nothing; exits 1 only on a fail.

    \b
    Example:
      calm doctor
      calm doctor --json
    """
    from calm.cli.config import file_in_force
    from calm.doctor import diagnose

    def load() -> Settings:
        return checked({"fleet": fleet}, config_file)

    checks = []
    for check in diagnose(load, file_in_force(config_file)):
        checks.append(check)
        if not as_json:
            show(check)
    failures = sum(check.status == "fail" for check in checks)
    if as_json:
        emit_json({"ok": not failures, "checks": checks})
    else:
        warnings = sum(check.status == "warn" for check in checks)
        click.echo(f"{count(failures, 'failure')}, {count(warnings, 'warning')}")
    context.exit(1 if failures else 0)


def checked(flags: dict[str, object], config_file: str | None) -> Settings:
    """Settings that `calm serve` would start with. Raises BadInput."""
    from calm.cli.soundness import check_values

    settings = settings_of(flags, config_file)
    check_values(settings)
    return settings


def show(check: Check) -> None:
    """`warn  energy   found`, and below it what to do."""
    status = click.style(f"{check.status:<5}", fg=COLOURS[check.status], bold=True)
    click.echo(f"{status} {click.style(check.name, bold=True)}: {printable(check.found)}")
    if check.fix:
        click.echo(f"      -> {printable(check.fix)}")
