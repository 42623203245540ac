"""Adding and removing metadata files: validated before, and visible to a watching server all at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from calm.errors import BadInput, UnknownModel
from calm.records import ModelCard
from calm.registry.fleet import read_card
from calm.registry.limits import NAME_PATTERN, matches
from calm.registry.problems import did_you_mean
from calm.registry.validate import relative_parts


def write_card(directory: Path, source_file: Path, *, replace: bool = False) -> ModelCard:
    """Copy a card into the fleet as `NAME.toml`, comments included, and return it.

    Raises BadInput when the card is wrong, its name is taken (unless `replace`), or a `file:` part is
    relative and would point elsewhere from its new place.
    """
    card = _valid(source_file)
    elsewhere = source_file.resolve().parent != directory.resolve()
    if elsewhere and relative_parts(card):
        raise BadInput(
            f"{relative_parts(card)[0]} is relative to the card, which moves; write an absolute path",
            field="source.parts",
        )
    directory.mkdir(parents=True, exist_ok=True)
    _publish(source_file.read_bytes(), directory / f"{card.name}.toml", replace=replace)
    return card


def remove_card(directory: Path, name: str) -> Path:
    """Delete the metadata file of a model and return its path; cached weights stay. Raises UnknownModel."""
    file = directory / f"{name}.toml"
    if not matches(NAME_PATTERN, name) or not file.is_file():
        known = sorted(entry.stem for entry in directory.glob("*.toml"))
        raise UnknownModel(f"no model `{name}` in {directory}; {_instead(name, known)}", field="name")
    file.unlink()
    return file


def _instead(name: str, known: list[str]) -> str:
    return did_you_mean(name, known) or (f"there are: {', '.join(known)}" if known else "the fleet is empty")


def _valid(source_file: Path) -> ModelCard:
    """The card, whatever its file is called: the name inside decides what it will be called."""
    card, problems = read_card(source_file, in_place=False)
    if card is None:
        raise BadInput("\n".join(str(problem) for problem in problems), field=problems[0].field)
    return card


def _publish(content: bytes, target: Path, *, replace: bool) -> None:
    """Temporary file, fsync, then one rename (or link, which refuses to overwrite)."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        if replace:
            Path(temporary).replace(target)
        else:
            target.hardlink_to(temporary)
    except FileExistsError as error:
        raise BadInput(f"{target} exists; --replace overwrites it", field="name") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
