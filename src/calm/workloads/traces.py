"""Arrival traces as they lie on the disk -> seconds, ascending.

worldcup   traces/worldcup98_day53.txt.gz      seconds between arrivals, one per line
azure      traces/azure2023_conv.csv.gz        column t_s
mooncake   traces/mooncake_synthetic.jsonl.gz  member t_s
csv:FILE   one's own: a column t_s, or a single column of seconds
servegen   traces/servegen_rate_600s.csv.gz    no arrivals: request rate and burstiness per 600 s window

A file is read once per process.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calm.errors import BadInput
from calm.records import Record
from calm.workloads.files import REFERENCE, data_file, json_rows, malformed, numbered_lines

FIELD = "arrivals"
FILES = {
    "worldcup": "worldcup98_day53.txt.gz",
    "azure": "azure2023_conv.csv.gz",
    "mooncake": "mooncake_synthetic.jsonl.gz",
}
SERVEGEN_FILE = "servegen_rate_600s.csv.gz"

Floats = NDArray[np.float64]


class RateSeries(NamedTuple):
    """Request rates of one production model over time, piecewise constant."""

    edges_s: Floats
    """Ends of the windows, from 0: one more than there are windows."""
    rates_rps: Floats
    cvs: Floats
    """Coefficient of variation of the times between arrivals, per window."""


class _Mark(Record, frozen=True, kw_only=True):
    t_s: float


def read_trace(name: str, detail: str, data: str | None) -> Floats:
    """Arrival times of a trace, in seconds, ascending, at least one.

    Raises BadInput (field `arrivals` or `data`): no such trace, no directory, no file, a malformed line.
    """
    if name == "csv":
        return _read(name, Path(detail))
    return _read(name, data_file(data, "traces", FILES[name]))


@lru_cache(maxsize=8)
def _read(name: str, path: Path) -> Floats:
    if name == "worldcup":
        return _array(_running_sum(path), path)
    pairs = _marks(path) if name == "mooncake" else _column(path)
    return _array(_ascending(pairs, path), path)


def _array(times: Iterable[float], path: Path) -> Floats:
    found = np.fromiter(times, np.float64)
    if not len(found):
        raise BadInput(f"{path}: holds no arrivals", field=FIELD)
    found.setflags(write=False)
    return found


def _running_sum(path: Path) -> Iterator[float]:
    at_s = 0.0
    for number, line in numbered_lines(path, FIELD):
        at_s += _seconds(line, path, number)
        yield at_s


def _marks(path: Path) -> Iterator[tuple[int, float]]:
    return ((number, mark.t_s) for number, mark in json_rows(path, _Mark, FIELD))


def _column(path: Path) -> Iterator[tuple[int, float]]:
    """Of a header with `t_s` that column; without a header the only one."""
    column = None
    for number, line in numbered_lines(path, FIELD):
        cells = cells_of(line, path, number)
        if column is None:
            column = _column_index(cells, path, number)
            if "t_s" in cells:
                continue
        if len(cells) <= column:
            raise malformed(path, number, "no value in column t_s", FIELD)
        yield number, _seconds(cells[column], path, number)


def _column_index(first: list[str], path: Path, number: int) -> int:
    if "t_s" in first:
        return first.index("t_s")
    if len(first) == 1 and _number(first[0]) is not None:
        return 0
    raise malformed(path, number, "needs a column t_s, or a single column of seconds", FIELD)


def _ascending(pairs: Iterable[tuple[int, float]], path: Path) -> Iterator[float]:
    before = 0.0
    for number, at_s in pairs:
        if not (math.isfinite(at_s) and at_s >= 0):
            raise malformed(path, number, f"{at_s} is no time of 0 s or later", FIELD)
        if at_s < before:
            raise malformed(path, number, f"{at_s:g} s comes after {before:g} s; times must ascend", FIELD)
        before = at_s
        yield at_s


def cells_of(line: str, path: Path, number: int) -> list[str]:
    """The cells of one line of CSV, stripped."""
    try:
        return [cell.strip() for cell in next(csv.reader([line]), [])]
    except csv.Error as error:
        raise malformed(path, number, str(error), FIELD) from None


def _seconds(text: str, path: Path, number: int) -> float:
    value = _number(text)
    if value is None or not math.isfinite(value) or value < 0:
        raise malformed(path, number, f"{text.strip()[:40]!r} is no number of seconds, 0 or more", FIELD)
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- ServeGen --------------------------------------------------------------------------------------


def read_rates(model: str, data: str | None) -> RateSeries:
    """The rate series of a ServeGen model; "" for the first one of the file.

    Raises BadInput as `read_trace` does; an unknown model is answered with those there are.
    """
    series = _read_rates(data_file(data, "traces", SERVEGEN_FILE))
    if model and model not in series:
        raise BadInput(f'no ServeGen model "{model}"; there are: {", ".join(series)}', field=FIELD)
    return series[model or next(iter(series))]


@lru_cache(maxsize=2)
def _read_rates(path: Path) -> dict[str, RateSeries]:
    rows: dict[str, list[tuple[float, float, float]]] = {}
    lines = numbered_lines(path, FIELD)
    number, header = next(lines, (1, ""))
    places = _places(cells_of(header, path, number), path, number)
    for number, line in lines:
        cells = cells_of(line, path, number)
        if len(cells) <= max(places):
            raise malformed(path, number, "too few columns", FIELD)
        model, start, rate, cv = (cells[place] for place in places)
        window = (_seconds(start, path, number), _seconds(rate, path, number), _cv(cv, path, number))
        rows.setdefault(model, []).append(window)
    if not rows:
        raise BadInput(f"{path}: holds no windows; see {REFERENCE}", field=FIELD)
    return {model: _series(windows, model, path) for model, windows in rows.items()}


def _places(header: list[str], path: Path, number: int) -> tuple[int, ...]:
    names = ("model", "t_s", "rate_rps", "rate_weighted_iat_cv")
    missing = [name for name in names if name not in header]
    if missing:
        raise malformed(path, number, f"no column {missing[0]}", FIELD)
    return tuple(header.index(name) for name in names)


def _cv(text: str, path: Path, number: int) -> float:
    """Empty where nobody asked in the window; 1 then, which nothing is drawn with."""
    return _seconds(text, path, number) if text else 1.0


def _series(windows: list[tuple[float, float, float]], model: str, path: Path) -> RateSeries:
    starts, rates, cvs = np.asarray(windows, np.float64).T
    widths = np.diff(starts)
    if not len(widths) or (widths <= 0).any() or not rates.any():
        raise BadInput(
            f"{path}: {model} needs at least two windows, ascending, one with requests", field=FIELD
        )
    edges = np.append(starts, starts[-1] + widths[-1]) - starts[0]
    return RateSeries(edges, rates, cvs)
