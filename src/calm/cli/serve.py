"""`calm serve`: settings, weights, then the server; the last lines say how to ask it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.client import DEFAULT_URL, KEY_ENV
from calm.cli.options import settings_of, settings_options
from calm.cli.output import count, warn
from calm.errors import BadInput, SourceError

if TYPE_CHECKING:
    from calm.cli.weights import Fetched
    from calm.registry import FleetLoad
    from calm.settings import Settings


@click.command(short_help="Start the server.")
@settings_options
def serve(config_file: str | None, **flags: object) -> None:
    """Serve the fleet on one OpenAI-compatible endpoint until Ctrl-C. Missing weights are fetched first and
    verified, then kept in the cache, so that later starts need no network. A model whose weights cannot be
    had is left out and the others serve. Cards that change in the fleet directory take effect at once.

    \b
    Example:
      calm serve
      calm serve --fleet ./fleet --port 9000 --budget 4GiB --goal energy
    """
    from calm.cli.logs import set_up_logging

    settings = settings_of(flags, config_file)
    set_up_logging(settings.log.level)
    check_door(settings)
    prepare(settings)
    run(settings)


def check_door(settings: Settings) -> None:
    """An address that would be refused anyway is refused before anything is fetched."""
    from calm.gateway.auth import Keys
    from calm.gateway.server import check_bind
    from calm.settings import keys_path

    check_bind(settings.server.host, Keys(keys_path()), insecure=settings.server.insecure)


def prepare(settings: Settings) -> None:
    """The fleet is readable and its weights are there. Raises BadInput, SourceError when none can serve."""
    from calm.registry import load_fleet
    from calm.settings import fleet_dir

    directory = fleet_dir(settings)
    load = load_fleet(directory)
    for problem in load.problems:
        warn(str(problem))
    if not load.fleet:
        raise BadInput(no_fleet(directory, load), field="fleet")
    if settings.fleet.fetch:
        fetch_missing(settings, directory, load)
    else:
        check_weights(directory, load)


def check_weights(directory: Path, load: FleetLoad) -> None:
    """Without fetching, at least one model's weights must be here. Raises SourceError; the server names the rest."""
    from calm.cli import weights
    from calm.settings import cache_dir

    absent = weights.missing(load.fleet.values(), directory, cache_dir())
    if len(absent) == len(load.fleet):
        raise SourceError("no model's weights are here and fleet.fetch is off; run `calm models pull`")


def no_fleet(directory: Path, load: FleetLoad) -> str:
    if load.problems:
        return f"no card in {directory} is good; mend the above, then start again"
    return (
        f"{directory} has no model cards; add one with `calm models add FILE`, or name another with --fleet"
    )


def fetch_missing(settings: Settings, directory: Path, load: FleetLoad) -> None:
    """Raises SourceError when not one model could be served."""
    from calm.cli import weights
    from calm.settings import cache_dir
    from calm.sources.assets import cached_minilm

    cache = cache_dir()
    absent = weights.missing(load.fleet.values(), directory, cache)
    embedder = weights.needs_minilm(settings) and cached_minilm(cache) is None
    if not absent and not embedder:
        return
    click.echo(f"fetching weights of {count(len(absent), 'model')} into {cache} (once)", err=True)
    failed = [f for f in weights.fetch(absent, directory, cache, assets=embedder) if f.error]
    report(failed, able=len(load.fleet) - sum(f.name != weights.MINILM for f in failed))


def report(failed: list[Fetched], *, able: int) -> None:
    for item in failed:
        warn(f"{item.name}: {item.error}")
    if failed and not able:
        raise SourceError("no model's weights could be fetched; see above, then try `calm models pull`")


def run(settings: Settings) -> None:
    """Serve until told to stop."""
    import uvloop

    from calm.gateway.auth import Keys
    from calm.settings import keys_path
    from calm.wiring import run_server

    def announce(url: str) -> None:
        """On stdout and at once, so that a script can wait for it."""
        click.echo(how_to_ask(url, keyed=not Keys(keys_path()).empty))
        sys.stdout.flush()

    uvloop.run(run_server(settings, on_ready=announce))


def how_to_ask(url: str, *, keyed: bool = False) -> str:
    """Lines to paste, with the real URL; `keyed`: callers need an API key."""
    url = reachable(url)
    flag = "" if url == DEFAULT_URL else f" --url {url}"
    auth = f' -H "Authorization: Bearer ${KEY_ENV}"' if keyed else ""
    key = f'os.environ["{KEY_ENV}"]' if keyed else '"none"'
    return f"""\
CALM serves at {url}    (Ctrl-C stops it)

  curl {url}/v1/chat/completions{auth} -H 'Content-Type: application/json' \\
    -d '{{"model": "calm", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'

  calm ask "Why is the sky blue?"{flag}

  {"import os; " if keyed else ""}from openai import OpenAI
  chat = OpenAI(base_url="{url}/v1", api_key={key}).chat.completions
  print(chat.create(model="calm", messages=[{{"role": "user", "content": "Hi"}}]).choices[0].message)"""


def reachable(url: str) -> str:
    """An address that stands for all of them, as one that can be called from this machine."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
