"""The flags that set settings, shared by the commands that start from them; and what the flags turn into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from calm.settings import Settings

C = TypeVar("C", bound=Callable[..., object])

FLAGS: Mapping[str, tuple[str, str]] = {
    "fleet": ("fleet", "dir"),
    "host": ("server", "host"),
    "port": ("server", "port"),
    "insecure": ("server", "insecure"),
    "policy": ("policy", "name"),
    "goal": ("policy", "goal"),
    "budget": ("memory", "budget"),
    "log_level": ("log", "level"),
}
"""Parameter of a command -> (section, field) of the settings."""

LEVELS = ("debug", "info", "warning", "error")

fleet_option = click.option(
    "--fleet", metavar="DIR", type=click.Path(file_okay=False), help="Directory of model cards (*.toml)."
)
config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Configuration file (TOML).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def settings_options(command: C) -> C:
    """Every flag of FLAGS, and --config."""
    for option in reversed(
        (
            fleet_option,
            config_option,
            click.option("--host", help="Address to listen on.  [default: 127.0.0.1]"),
            click.option(
                "--port",
                type=click.IntRange(0, 65535),
                metavar="PORT",
                help="TCP port; 0 picks a free one.  [default: 8420]",
            ),
            click.option(
                "--policy", metavar="SPEC", help="Who chooses: calm, paper, fixed:NAME, random, ..."
            ),
            click.option(
                "--goal", metavar="NAME", help="Named weights: balanced, latency, energy, quality, ..."
            ),
            click.option(
                "--budget", metavar="SIZE", help='Memory for models, e.g. "6GiB" or "60%" of what is free.'
            ),
            click.option("--log-level", type=click.Choice(LEVELS), help="Least severe message on stderr."),
            click.option(
                "--insecure/--secure",
                default=None,
                help="Serve other machines without API keys.  [default: secure]",
            ),
        )
    ):
        command = option(command)
    return command


def overrides(flags: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Flags that were given, as a layer of settings."""
    layer: dict[str, dict[str, object]] = {}
    for name, (section, field) in FLAGS.items():
        if flags.get(name) is not None:
            layer.setdefault(section, {})[field] = flags[name]
    return layer


def settings_of(flags: Mapping[str, object], config_file: str | None = None) -> Settings:
    """Defaults, file, environment and these flags. Raises BadInput."""
    from calm.settings import load_settings

    return load_settings(Path(config_file).expanduser() if config_file else None, overrides=overrides(flags))


def fleet_directory(fleet: str | None, config_file: str | None = None) -> Path:
    """The directory of cards that `--fleet` or the settings name."""
    from calm.settings import fleet_dir

    return fleet_dir(settings_of({"fleet": fleet}, config_file))
