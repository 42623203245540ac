"""The fleet as a value: loaded from a directory, compared with another, merged with what served before."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from calm.errors import BadInput
from calm.records import ModelCard
from calm.registry.adapters import join
from calm.registry.problems import CardProblem
from calm.registry.validate import check

MAX_CARD_BYTES = 1 << 20
"""A card is a page; a larger file is weights dropped into the wrong directory."""


class Fleet(Mapping[str, ModelCard]):
    """Immutable mapping name -> card, iterated in order of names. Equal fleets have equal `revision`s."""

    __slots__ = ("_cards", "_revision")

    def __init__(self, cards: Iterable[ModelCard] = ()) -> None:
        self._cards = {card.name: card for card in sorted(cards, key=lambda card: card.name)}
        encoded = msgspec.json.encode(tuple(self._cards.values()), order="sorted")
        self._revision = hashlib.sha256(encoded).hexdigest()[:12]

    @property
    def revision(self) -> str:
        """Changes with any card's content and comes back when the content does."""
        return self._revision

    def __getitem__(self, name: str) -> ModelCard:
        return self._cards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cards)

    def __len__(self) -> int:
        return len(self._cards)

    def __eq__(self, other: object) -> bool:
        return self._revision == other._revision if isinstance(other, Fleet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._revision)

    def __repr__(self) -> str:
        return f"Fleet({', '.join(self._cards)} @ {self._revision})"


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """The cards that may serve and the files that may not."""

    fleet: Fleet
    problems: tuple[CardProblem, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetChange:
    """Names, sorted. A changed card keeps its name and differs in anything else."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def load_fleet(directory: Path) -> FleetLoad:
    """Every `*.toml` of the directory, adapters completed from their bases.

    Raises BadInput only when the directory itself cannot be read.
    """
    cards: list[ModelCard] = []
    problems: list[CardProblem] = []
    for file in card_files(directory):
        card, found = read_card(file)
        problems += found
        if card is not None:
            cards.append(card)
    joined, refused = join(cards)
    problems += [
        CardProblem(
            file=str(directory / f"{name}.toml"),
            field=complaint.field,
            reason=complaint.reason,
            hint=complaint.hint,
        )
        for name, complaint in refused.items()
    ]
    return FleetLoad(Fleet(joined), tuple(problems))


def card_files(directory: Path) -> list[Path]:
    """The metadata files of a fleet, sorted. Hidden files are editors' leavings."""
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise BadInput(
            f"cannot read the fleet directory {directory}: {error.strerror}. "
            "Create it, or name another with --fleet.",
            field="fleet",
        ) from error
    return [entry for entry in entries if entry.suffix == ".toml" and not entry.name.startswith(".")]


def read_card(file: Path, *, in_place: bool = True) -> tuple[ModelCard | None, list[CardProblem]]:
    """One file -> its card, or None and every problem. Unless `in_place`, any file name will do."""
    try:
        text = _read_text(file)
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        return None, [CardProblem(file=str(file), field=None, reason=_unreadable(error), hint=None)]
    return check(data, str(file), file.stem if in_place else None)


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise OSError(None, "not a file")
    with file.open("rb") as stream:
        raw = stream.read(MAX_CARD_BYTES + 1)
    if len(raw) > MAX_CARD_BYTES:
        raise ValueError("larger than 1 MiB: this is no metadata file")
    return raw.decode()


def _unreadable(error: Exception) -> str:
    if isinstance(error, tomllib.TOMLDecodeError):
        return f"not valid TOML: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return str(error)


def diff(old: Fleet, new: Fleet) -> FleetChange:
    return FleetChange(
        added=tuple(name for name in new if name not in old),
        changed=tuple(name for name in new if name in old and new[name] != old[name]),
        removed=tuple(name for name in old if name not in new),
    )


def keep_previous(previous: Fleet, load: FleetLoad) -> FleetLoad:
    """A file that turned bad leaves its model's last good card serving; its problem is still reported.

    A file that is gone takes its model with it, and so the adapters of a base that is gone.
    """
    stems = {Path(problem.file).stem for problem in load.problems}
    kept = [previous[name] for name in sorted(stems) if name in previous and name not in load.fleet]
    if not kept:
        return load
    joined, _ = join([*load.fleet.values(), *kept])  # anew: the base of one that is kept may have changed
    return FleetLoad(Fleet(joined), load.problems)
