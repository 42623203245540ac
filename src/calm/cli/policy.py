"""`calm policy` and `calm goal`: steer the running server."""

from __future__ import annotations

import math
from collections.abc import Mapping

import click

from calm.cli.client import client_options, connect, decode
from calm.cli.options import json_option
from calm.cli.output import emit_json, printable

TERMS = ("latency", "energy", "quality", "cost")
Document = dict[str, object]


@click.group(short_help="Show or change who chooses the model.")
def policy() -> None:
    """Show or change who chooses the model of a request, and what matters in the choice, while the server
    runs. The change lasts until the server stops; the configuration file is what it starts from.

    \b
    Example:
      calm policy show
      calm policy set calm --weights latency=1,quality=2
      calm policy set calm --quality-floor 0.7
    """


@policy.command()
@json_option
@client_options
def show(as_json: bool, url: str, key_env: str) -> None:
    """Show the policy in force, its goal and weights, the floor under quality with its price, and the policies
    there are.

    \b
    Example:
      calm policy show
    """
    print_policy(connect(url, key_env).get("/calm/v1/policy", Document), as_json)


@policy.command(name="set")
@click.argument("spec")
@click.option("--goal", metavar="NAME", help="Named weights to go with it.")
@click.option(
    "--weights", metavar="NAME=W,...", help="Your own weights, e.g. latency=1,quality=2; others are 0."
)
@click.option(
    "--quality-floor",
    metavar="Q",
    help="Mean quality, e.g. 0.7, to hold at the least latency and energy; none takes it away.",
)
@json_option
@client_options
def set_policy(
    spec: str,
    goal: str | None,
    weights: str | None,
    quality_floor: str | None,
    as_json: bool,
    url: str,
    key_env: str,
) -> None:
    """Choose the policy: calm, paper[:mode[:lambda]], fixed:NAME, random[:seed], round-robin, least-loaded,
    or an installed plug-in; with a goal, or weights, of which only the ratios count; with a floor under
    quality. What is not given stays. Requests under way keep the choice they were made with.

    \b
    Example:
      calm policy set calm --goal energy
      calm policy set calm --quality-floor 0.7
      calm policy set fixed:tinyllama-1.1b
    """
    if goal is not None and weights is not None:
        raise click.UsageError("give --goal or --weights, not both: a goal is a name for weights")
    change = {"policy": spec, "goal": goal, "weights": parse_weights(weights)}
    floor = {} if quality_floor is None else {"quality_floor": parse_floor(quality_floor)}
    steer(
        {**{name: value for name, value in change.items() if value is not None}, **floor},
        as_json,
        url,
        key_env,
    )


@click.group(short_help="Show or change what matters in the choice.")
def goal() -> None:
    """Show or change the goal of the running server: a name for how much latency, energy, quality and cost
    count. A single request can ask for another with `calm ask --goal`.

    \b
    Example:
      calm goal set energy
    """


@goal.command(name="set")
@click.argument("name")
@json_option
@client_options
def set_goal(name: str, as_json: bool, url: str, key_env: str) -> None:
    """Set the goal: balanced, latency, energy, quality, or one of the configuration's [goals]. A floor under
    quality stays.

    \b
    Example:
      calm goal set latency
    """
    steer({"goal": name}, as_json, url, key_env)


@goal.command(name="list")
@json_option
@client_options
def list_goals(as_json: bool, url: str, key_env: str) -> None:
    """List the goals the running server knows, with their weights.

    \b
    Example:
      calm goal list
    """
    found = connect(url, key_env).get("/calm/v1/goals", dict[str, dict[str, dict[str, float]]])
    if as_json:
        emit_json(found)
        return
    from calm.cli.output import print_table

    rows = [(name, *(f"{w.get(t, 0):g}" for t in TERMS)) for name, w in found.get("goals", {}).items()]
    print_table(("goal", *TERMS), rows, right=range(1, 5))


def steer(change: Mapping[str, object], as_json: bool, url: str, key_env: str) -> None:
    """PUT what was given, and show what is in force now."""
    raw = connect(url, key_env).call("PUT", "/calm/v1/policy", change)
    print_policy(decode(raw, Document), as_json)


def parse_weights(text: str | None) -> dict[str, float] | None:
    """`latency=1,quality=2` -> numbers by term. Raises BadParameter."""
    if text is None:
        return None
    weights: dict[str, float] = {}
    for pair in text.split(","):
        name, _, figure = (part.strip() for part in pair.partition("="))
        if name not in TERMS:
            raise click.BadParameter(
                f'"{name}" is no term; there are {", ".join(TERMS)}', param_hint="--weights"
            )
        weights[name] = weight(name, figure)
    return weights


def weight(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f'{name}: "{text}" is no number of at least 0', param_hint="--weights")
    return value


def parse_floor(text: str) -> float | None:
    """0..1 exclusive; `none` and 0 for no floor, which is None. Raises BadParameter."""
    try:
        value = 0.0 if text.strip().lower() == "none" else float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise click.BadParameter(
            f'"{text}" is no number above 0 and below 1, and not none', param_hint="--quality-floor"
        )
    return value or None


def print_policy(found: Document, as_json: bool) -> None:
    if as_json:
        emit_json(found)
        return
    said = lines(found)
    width = max((len(name) for name, _ in said), default=0) + 2
    for name, value in said:
        click.echo(f"{click.style(f'{name:<{width}}', bold=True)}{printable(value)}")


def lines(found: Document) -> list[tuple[str, str]]:
    """Label and value; whatever else the server says about its policy is shown as it is."""
    return [(name, in_words(value)) for name, value in found.items() if value is not None]


def in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {item:g}" if isinstance(item, float | int) else f"{name} {item}"
            for name, item in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
