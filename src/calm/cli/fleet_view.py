"""The fleet in tables: what a server says of it, or what its files say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from calm.cli.output import UNKNOWN, note, print_table, printable, seconds, size, warn

if TYPE_CHECKING:
    from calm.cli.documents import FilesView, FleetView, ModelView
    from calm.records import ModelCard

T = TypeVar("T")

NOT_SHOWN = frozenset({"model", "last_used_s", "retry_at_s"})
"""The name again, and instants of the server's own clock."""
HOLDS_MEMORY = frozenset({"loading", "ready", "draining", "unloading"})


def from_files(directory: Path) -> FilesView:
    """The cards of a directory, and whether their weights are cached. Raises BadInput."""
    from calm.cli.documents import FilesView
    from calm.registry import load_fleet
    from calm.settings import cache_dir

    load = load_fleet(directory)
    cache = cache_dir()
    return FilesView(
        fleet=str(directory),
        models=tuple(file_entry(card, directory, cache) for card in load.fleet.values()),
        problems=tuple(str(problem) for problem in load.problems),
    )


def file_entry(card: ModelCard, directory: Path, cache: Path) -> Mapping[str, object]:
    from calm.sources.fetch import cached_path

    path = cached_path(card.source, cache, directory) if card.source else None
    return {
        "name": card.name,
        "adapter_of": card.adapter_of,
        "engine": card.engine.kind,
        "placement": card.placement,
        "context": card.context,
        "capabilities": card.capabilities,
        "weights": "none needed" if card.source is None else "cached" if path else "missing",
        "bytes": path.stat().st_size if path else card.source.bytes if card.source else None,
        "description": card.description,
    }


def print_files(view: FilesView, *, asked: bool) -> None:
    """`asked`: the files were what the user wanted, and not what was left without a server."""
    note(f"from the cards in {view.fleet}" + ("" if asked else "; no server answers"))
    headers = ("model", "engine", "placement", "context", "capabilities", "weights", "size")
    entries = bases_first(view.models, lambda entry: (str(entry["name"]), text_or_none(entry["adapter_of"])))
    print_table(headers, [file_cells(entry) for entry in entries], right=(3, 6))
    tell_adapters(any(entry["adapter_of"] for entry in entries))
    for problem in view.problems:
        warn(problem)


def file_cells(entry: Mapping[str, object]) -> tuple[str, ...]:
    capabilities, length = entry["capabilities"], entry["bytes"]
    base = text_or_none(entry["adapter_of"])
    return (
        label(str(entry["name"]), base),
        on(base) if base else str(entry["engine"]),
        *(str(entry[field]) for field in ("placement", "context")),
        ", ".join(map(str, capabilities)) if isinstance(capabilities, tuple) else UNKNOWN,
        str(entry["weights"]),
        size(length) if isinstance(length, int) else UNKNOWN,
    )


def print_server(view: FleetView, url: str) -> None:
    note(f"from the server at {url}")
    headers = ("model", "state", "memory", "in flight", "waiting", "threads", "context", "capabilities")
    models = bases_first(view.models, lambda model: (model.name, model.adapter_of))
    print_table(headers, [server_cells(model) for model in models], right=range(2, 7))
    tell_adapters(any(model.adapter_of for model in models))
    click.echo(
        f"memory {size(view.used_bytes)} of {size(view.budget_bytes)}, "
        f"{view.in_flight} in flight, {view.queue_length} waiting"
    )
    for model in models:
        if failed_alone(model) and model.state is not None:
            warn(f"{model.name} cannot run {on(model.adapter_of)}: {model.state.reason or 'it was refused'}")
    for bad in view.refused:
        warn(f"{bad.file}: {f'{bad.field}: ' if bad.field else ''}{bad.reason}")


def server_cells(model: ModelView) -> tuple[str, ...]:
    state = model.state
    last = (str(model.context or UNKNOWN), ", ".join(model.capabilities))
    name = label(model.name, model.adapter_of)
    if state is None:
        return name, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, *last
    if model.adapter_of is not None:
        stands = "failed" if failed_alone(model) else on(model.adapter_of)
        return name, stands, "", "", "", "", *last
    return (
        name,
        state.residency + (", pinned" if state.pinned else ""),
        memory(model),
        f"{state.in_flight}/{state.slots}",
        str(state.waiting),
        str(state.threads or UNKNOWN),
        *last,
    )


# --- adapters -------------------------------------------------------------------------------------


def bases_first(entries: Sequence[T], names: Callable[[T], tuple[str, str | None]]) -> list[T]:
    """Each base followed by its adapters, else in the order given; `names`: an entry's name and its base's."""
    found = [(*names(entry), entry) for entry in entries]
    places = {name: place for place, (name, _, _) in enumerate(found)}
    found.sort(key=lambda one: (places.get(one[1] or one[0], len(places)), one[1] is not None))
    return [entry for _, _, entry in found]


def label(name: str, base: str | None) -> str:
    return f"  {name}" if base else name


def on(base: str | None) -> str:
    return f"on {base}"


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def failed_alone(model: ModelView) -> bool:
    """An adapter that its base's engine could not take."""
    state = model.state
    if model.adapter_of is None or state is None:
        return False
    return state.residency == "failed" and state.model == model.name


def tell_adapters(any_there: bool) -> None:
    if any_there:
        note("indented: adapters, in memory with the base above them and served by its engine")


def memory(model: ModelView) -> str:
    """What it holds; in brackets, what it is expected to take."""
    state = model.state
    if state is None or state.residency == "remote":
        return UNKNOWN
    shown = size(state.footprint_bytes)
    return shown if state.residency in HOLDS_MEMORY else f"({shown})"


def standing(model: ModelView) -> str:
    """`ready, pinned, 211.0 MB, loaded in 0.42 s`, after an action."""
    state = model.state
    if state is None:
        return "no state known"
    where = on(model.adapter_of) if model.adapter_of and not failed_alone(model) else ""
    parts = [where, state.residency, "pinned" if state.pinned else "", state.reason or ""]
    if state.residency == "ready":
        parts += [size(state.footprint_bytes), f"loaded in {seconds(state.load_s)}" if state.load_s else ""]
    return ", ".join(filter(None, parts))


# --- one model ----------------------------------------------------------------------------------


def print_card(document: Mapping[str, object], *, from_server: bool) -> None:
    """The card field by field, and before it, from a server, the model's state."""
    note("from the server" if from_server else "from its card; no server answers or --fleet was given")
    note_family(document)
    found = list(rows(document))
    width = max((len(name) for name, _ in found), default=0) + 2
    for name, value in found:
        click.echo(f"{click.style(f'{name:<{width}}', bold=True)}{printable(value)}")


def note_family(document: Mapping[str, object]) -> None:
    """Whose adapter it is, or which adapters it carries."""
    card, adapters = document.get("card"), document.get("adapters")
    base = text_or_none(card.get("adapter_of")) if isinstance(card, Mapping) else None
    if base is not None:
        note(f"an adapter {on(base)}: engine, context, chat template, memory and state are those of {base}")
    elif isinstance(adapters, list | tuple) and adapters:
        note(f"its engine also serves its adapters: {', '.join(map(str, adapters))}")


def rows(document: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Dotted names and values; what is unset or empty is left out."""
    state, card = document.get("state"), document.get("card")
    if isinstance(state, Mapping):
        yield from flat({name: v for name, v in state.items() if name not in NOT_SHOWN}, "state.")
    if isinstance(card, Mapping):
        yield from flat(card, "")


def flat(fields: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            if value:
                yield prefix + name, ", ".join(map(str, value))
        elif value not in (None, ""):
            yield prefix + name, written(name, value)


def written(name: str, value: object) -> str:
    """Sizes with a unit, the rest as it is."""
    if isinstance(value, int) and (name == "bytes" or name.endswith("_bytes")):
        return size(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
