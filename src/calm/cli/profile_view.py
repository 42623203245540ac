"""What `calm profile` shows: a bar with the time left while it measures, then the figures as a table."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

import click

from calm.cli.one_bar import OneBar
from calm.cli.output import UNKNOWN, note, print_table, seconds, size

if TYPE_CHECKING:
    from calm.profile import Length, MachineProfile, ModelProfile, Profile

SOME = 0.05
"""Share of the work from which on the time it took says something about the rest."""


class Board(OneBar):
    """A Watch of calm.bench.measure_engine: the bar is in seconds of expected work."""

    def __init__(self, stream: TextIO) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

        super().__init__(
            stream, TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        )
        self._total_s = self._done_s = 0.0
        self._begun_s = time.monotonic()

    def expect(self, total_s: float) -> None:
        """About how many seconds of work there are."""
        self._total_s = total_s
        self.update(total=total_s)

    def stage(self, name: str, what: str) -> None:
        self.update(description=f"{name}: {what}")
        self.say(f"{name}: {what}{self._left()}")

    def advance(self, by: float = 1.0) -> None:
        self._done_s += by
        super().advance(by)

    def _left(self) -> str:
        """As the expected time has run true so far, this is left."""
        if not SOME * self._total_s <= self._done_s < self._total_s:
            return ""
        left_s = (time.monotonic() - self._begun_s) * (self._total_s - self._done_s) / self._done_s
        return f" (about {seconds(left_s)} left)"


def board() -> Board:
    return Board(sys.stderr)


# --- the figures ------------------------------------------------------------------------------------

COLUMNS = ("model", "load", "memory", "reads tok/s", "writes tok/s", "tokens out", "quality", "working")
"""What tells models apart at a glance; the file has the rest."""


def show(profile: Profile) -> None:
    click.echo(machine_line(profile.machine))
    click.echo()
    rows = [row(name, model) for name, model in profile.models.items()]
    print_table(COLUMNS, rows, right=range(1, len(COLUMNS)))
    for remark in profile.machine.notes:
        note(remark)


def machine_line(machine: MachineProfile) -> str:
    slower = [f"{count} at once {factor:.2f}x" for count, factor in enumerate(machine.contention, start=1)][
        1:
    ]
    contention = f"; contention: {', '.join(slower)}" if slower else ""
    return f"{machine.name}; meter {machine.meter or UNKNOWN}{contention}"


def row(name: str, model: ModelProfile) -> tuple[str, ...]:
    return (
        name,
        seconds(model.load_s),
        size(model.memory_bytes),
        f"{model.prefill_tps:.3g}",
        writing(model),
        spread(model.output_tokens["default"]),
        quality(model),
        f"{model.active_w:.3g} W",
    )


def writing(model: ModelProfile) -> str:
    """Tokens per second of one sequence, and of as many as were measured together: `53.1 (4: 90.2)`."""
    rates = sorted((int(count), rate) for count, rate in model.decode_tps.items())
    last = f" ({rates[-1][0]}: {rates[-1][1]:.3g})" if len(rates) > 1 else ""
    return f"{rates[0][1]:.3g}{last}"


def spread(length: Length) -> str:
    return f"{length.mean:.0f} ± {length.sd:.0f}"


def quality(model: ModelProfile) -> str:
    known = model.quality_in("default")
    return UNKNOWN if known is None else f"{known:.2f}"
