"""How the command line writes: figures with units, tables, JSON, and text that others wrote made harmless."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

import click

from calm.report import units

PIPE_COLUMNS = 200
"""Width of a table that goes into a pipe or a file: nobody's window, so nothing is cut."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNKNOWN = "-"


def printable(text: str) -> str:
    """Without control characters: what a model or a file says must not steer the terminal."""
    return _CONTROL.sub("", text)


def note(text: str) -> None:
    """A dim remark on stderr, so that stdout stays what was asked for."""
    click.echo(click.style(printable(text), dim=True), err=True)


def warn(text: str) -> None:
    click.echo(click.style("warning: ", fg="yellow", bold=True) + printable(text), err=True)


def emit_json(value: object) -> None:
    """Any record or document as indented JSON on stdout. What is not finite becomes null."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
    """`right` are the columns of figures."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    figures = frozenset(right)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)


def heading(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)


# --- figures ------------------------------------------------------------------------------------


def seconds(value: float | None) -> str:
    return UNKNOWN if value is None else units.seconds(value)


def size(count: float | None) -> str:
    return UNKNOWN if count is None else units.size(count)


def joules(value: float | None) -> str:
    return UNKNOWN if value is None else units.joules(value)


def number(value: float | None, digits: int = 3) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}g}"


def count(value: int, noun: str) -> str:
    """1 model, 2 models."""
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"
