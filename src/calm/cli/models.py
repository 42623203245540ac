"""`calm models`: the fleet, as the server has it and as its files say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.client import WORK_S, Client, NoServer, client_options, connect, decode, segment
from calm.cli.fleet_view import from_files, print_card, print_files, print_server
from calm.cli.group import Failure
from calm.cli.options import fleet_directory, fleet_option, json_option
from calm.cli.output import count, emit_json, note, printable, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calm.cli.weights import Fetched
    from calm.records import ModelCard


@click.group(short_help="List, add, remove, fetch and steer models.")
def models() -> None:
    """List, add, remove, fetch and steer the models of the fleet.

    \b
    Example:
      calm models list
      calm models add ./my-model.toml
    """


# --- looking --------------------------------------------------------------------------------------


@models.command(name="list")
@fleet_option
@json_option
@client_options
def list_models(fleet: str | None, as_json: bool, url: str, key_env: str) -> None:
    """List the models. From the running server when one answers, with what is loaded, the memory it takes and
    the requests under way; else, or with --fleet, from the cards in the fleet directory, with what is cached.

    \b
    Example:
      calm models list
      calm models list --fleet ./fleet --json
    """
    from calm.cli.documents import FleetView

    found = None if fleet else ask_server(connect(url, key_env), "/calm/v1/fleet")
    if found is None:
        directory = fleet_directory(fleet)
        view = from_files(directory)
        emit_json(view) if as_json else print_files(view, asked=fleet is not None)
    elif as_json:
        emit_json(raw_json(found))
    else:
        print_server(decode(found, FleetView), url)


@models.command()
@click.argument("name")
@fleet_option
@json_option
@client_options
def show(name: str, fleet: str | None, as_json: bool, url: str, key_env: str) -> None:
    """Show one model: its card, and from the running server, when one answers, its state. Values of an
    engine's environment are left out, because secrets may stand there.

    \b
    Example:
      calm models show smollm2-135m
    """
    found = None if fleet else ask_server(connect(url, key_env), f"/calm/v1/models/{segment(name)}")
    served = None if found is None else decode(found, dict[str, object])
    document = served or card_document(fleet_directory(fleet), name)
    emit_json(document) if as_json else print_card(document, from_server=found is not None)


def ask_server(client: Client, path: str) -> bytes | None:
    """The server's answer; None when nobody answers, so that the files are read instead."""
    try:
        return client.call("GET", path)
    except NoServer:
        return None


def raw_json(raw: bytes) -> object:
    import msgspec

    return msgspec.Raw(raw)


def card_document(directory: Path, name: str) -> dict[str, object]:
    import msgspec

    from calm.gateway.admin_api import public_card

    card: object = msgspec.to_builtins(public_card(card_named(directory, name)))
    return {"name": name, "adapters": adapters_of(directory, name), "card": card}


def adapters_of(directory: Path, name: str) -> list[str]:
    from calm.registry import load_fleet

    return [card.name for card in load_fleet(directory).fleet.values() if card.adapter_of == name]


def card_named(directory: Path, name: str) -> ModelCard:
    """Raises Failure with the problems of the file, or with the names there are."""
    from calm.registry import load_fleet
    from calm.registry.problems import did_you_mean

    load = load_fleet(directory)
    if name in load.fleet:
        return load.fleet[name]
    wrong = [str(problem) for problem in load.problems if Path(problem.file).stem == name]
    if wrong:
        raise Failure("\n".join(wrong))
    hint = did_you_mean(name, load.fleet) or f"there are: {', '.join(load.fleet) or 'none'}"
    raise Failure(f"no model `{name}` in {directory}; {hint}")


# --- the files ------------------------------------------------------------------------------------


@models.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--replace", is_flag=True, help="Overwrite a card of the same name.")
@fleet_option
@json_option
def add(file: str, replace: bool, fleet: str | None, as_json: bool) -> None:
    """Add a model: check its card, then copy it into the fleet directory under the model's name. A card that
    is wrong changes nothing; every mistake is shown with its field, the reason and a hint. A running server
    that serves this directory takes the model up by itself.

    \b
    Example:
      calm models add ./my-model.toml
      calm models pull my-model
    """
    from calm.registry import write_card

    directory = fleet_directory(fleet)
    card = write_card(directory, Path(file), replace=replace)
    if as_json:
        emit_json({"name": card.name, "file": str(directory / f"{card.name}.toml")})
        return
    click.echo(f"added {card.name} ({directory / f'{card.name}.toml'})")
    warn_of_base(directory, card)
    if card.source is not None:
        note(f"its weights are fetched by the server, or now: calm models pull {card.name}")


def warn_of_base(directory: Path, card: ModelCard) -> None:
    """An adapter that has no base to run on yet is a good card that serves nobody."""
    from calm.cli.output import warn
    from calm.registry import load_fleet

    if card.adapter_of is None:
        return
    for problem in load_fleet(directory).problems:
        if Path(problem.file).stem == card.name:
            warn(
                f"{card.name} does not serve yet: {problem.reason}"
                + (f" ({problem.hint})" if problem.hint else "")
            )


@models.command()
@click.argument("name")
@click.option(
    "--weights", is_flag=True, help="Also delete its weights from the cache, unless another card uses them."
)
@fleet_option
@json_option
def remove(name: str, weights: bool, fleet: str | None, as_json: bool) -> None:
    """Remove a model: delete its card from the fleet directory. A running server lets its answers finish and
    then unloads it. The weights stay in the cache unless --weights is given.

    \b
    Example:
      calm models remove tinyllama-1.1b
    """
    from calm.registry import load_fleet, remove_card

    directory = fleet_directory(fleet)
    before = load_fleet(directory).fleet if directory.is_dir() else {}
    adapters = [card.name for card in before.values() if card.adapter_of == name]
    file = remove_card(directory, name)
    freed = forget_weights(before.get(name), [c for n, c in before.items() if n != name]) if weights else 0
    if as_json:
        emit_json({"name": name, "file": str(file), "freed_bytes": freed})
    else:
        click.echo(f"removed {name} ({file})" + (f", {size(freed)} freed" if freed else ""))
        if adapters:
            note(f"its adapters serve no more, for they ran on its engine: {', '.join(adapters)}")


def forget_weights(card: ModelCard | None, others: Sequence[ModelCard]) -> int:
    """Bytes freed; files that other cards of this fleet use are kept."""
    from calm.settings import cache_dir
    from calm.sources.fetch import digests, remove_cached

    if card is None or card.source is None:
        return 0
    keep = frozenset().union(*(digests(other.source) for other in others if other.source is not None))
    return remove_cached(card.source, cache_dir(), keep=keep)


@models.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--assets", is_flag=True, help="Also fetch the MiniLM embedder, which the paper's policy needs."
)
@click.option("--verify", is_flag=True, help="Read cached files in full again and compare their digests.")
@fleet_option
@json_option
def pull(names: tuple[str, ...], assets: bool, verify: bool, fleet: str | None, as_json: bool) -> None:
    """Fetch weights into the cache: of the models named, or of the whole fleet. What is there and verified is
    not fetched again; a download that broke off goes on where it stopped. Every file is compared with the
    sha256 of its card before it is used. Exits 1 when one could not be had.

    \b
    Example:
      calm models pull
      calm models pull smollm2-135m --verify
    """
    from calm.cli import weights
    from calm.settings import cache_dir

    directory, cache = fleet_directory(fleet), cache_dir()
    cards = wanted(directory, names)
    absent = {card.name for card in weights.missing(cards, directory, cache)}
    done = weights.fetch(cards, directory, cache, assets=assets, verify=verify)
    if as_json:
        emit_json([{"name": d.name, "path": str(d.path) if d.path else None, "error": d.error} for d in done])
    else:
        for item in done:
            report(item, fetched=item.name in absent)
    if failed := [item for item in done if item.error]:
        raise Failure(
            f"{count(len(failed), 'file')} could not be fetched: {', '.join(f.name for f in failed)}"
        )


def wanted(directory: Path, names: tuple[str, ...]) -> list[ModelCard]:
    """The cards named, or all good ones; a bad card is told and passed over."""
    from calm.cli.output import warn
    from calm.registry import load_fleet

    if names:
        return [card_named(directory, name) for name in dict.fromkeys(names)]
    load = load_fleet(directory)
    for problem in load.problems:
        warn(str(problem))
    return list(load.fleet.values())


def report(item: Fetched, *, fetched: bool) -> None:
    if item.path is None:
        click.echo(click.style("failed  ", fg="red") + printable(f"{item.name}: {item.error}"))
    else:
        click.echo(
            f"{'fetched ' if fetched else 'verified'} {item.name}  {item.path}  "
            f"{size(item.path.stat().st_size)}"
        )


# --- the server -----------------------------------------------------------------------------------


def act(verb: str, name: str, as_json: bool, url: str, key_env: str) -> None:
    """POST one action and say how the model stands now."""
    from calm.cli.documents import ModelView
    from calm.cli.fleet_view import standing

    raw = connect(url, key_env).call("POST", f"/calm/v1/models/{segment(name)}/{verb}", {}, timeout_s=WORK_S)
    if as_json:
        emit_json(raw_json(raw))
    else:
        click.echo(f"{name}: {standing(decode(raw, ModelView))}")


@models.command()
@click.argument("name")
@json_option
@client_options
def load(name: str, as_json: bool, url: str, key_env: str) -> None:
    """Load a model into memory now, and wait until it can answer. Others leave for it if the budget asks for
    it, but none that is generating or pinned.

    \b
    Example:
      calm models load smollm2-135m
    """
    act("load", name, as_json, url, key_env)


@models.command()
@click.argument("name")
@json_option
@client_options
def unload(name: str, as_json: bool, url: str, key_env: str) -> None:
    """Unload a model: let its running answers finish, then give its memory back. The next request that wants
    it loads it again. A base takes its adapters with it; an adapter alone cannot be unloaded.

    \b
    Example:
      calm models unload tinyllama-1.1b
    """
    act("unload", name, as_json, url, key_env)


@models.command()
@click.argument("name")
@json_option
@client_options
def pin(name: str, as_json: bool, url: str, key_env: str) -> None:
    """Keep a model in memory: load it if need be, and never evict it until it is unpinned. To pin an adapter
    is to pin its base.

    \b
    Example:
      calm models pin smollm2-135m
    """
    act("pin", name, as_json, url, key_env)


@models.command()
@click.argument("name")
@json_option
@client_options
def unpin(name: str, as_json: bool, url: str, key_env: str) -> None:
    """Let a pinned model be evicted again when its space is needed.

    \b
    Example:
      calm models unpin smollm2-135m
    """
    act("unpin", name, as_json, url, key_env)
