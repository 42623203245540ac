"""What is shown while a campaign runs: trials done, the current trial's requests, and when it will be over.

On a terminal two bars; into a pipe one line per trial. Always on stderr: stdout is for the table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from calm.report.records import Trial

OVERHEAD_S = 5.0
"""Guess of what a trial takes beyond its workload, until one has ended: a start, a last answer, an end."""


class Board:
    """Shows progress; owner of the estimate of what remains. Use as a context manager."""

    def __init__(self, planned_s: Sequence[float], console: Console | None = None) -> None:
        """`planned_s` are the durations of the workloads of the trials to come, in order."""
        self._planned_s = tuple(planned_s)
        self._took_s: list[float] = []
        self._began_s = time.monotonic()
        self._console = console or Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._trials = self._bars.add_task("trials", total=len(planned_s), left="")
        self._requests: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, title: str, requests: int) -> None:
        """A trial starts."""
        self._forget_requests()
        self._began_s = time.monotonic()
        self._requests = self._bars.add_task(f"  {title}", total=requests, left="")
        self._show_left()

    def request_ended(self) -> None:
        if self._requests is not None:
            self._bars.advance(self._requests)
        self._show_left()

    def end(self, title: str, said: str) -> None:
        """A trial is over; `said` is what came of it."""
        self._took_s.append(time.monotonic() - self._began_s)
        self._began_s = time.monotonic()
        self._forget_requests()
        self._bars.advance(self._trials)
        self._show_left()
        count = f"{len(self._took_s)}/{len(self._planned_s)}"
        self._console.print(f"{count}  {title}: {said}", style="dim", markup=False, soft_wrap=True)

    def _forget_requests(self) -> None:
        if self._requests is not None:
            self._bars.remove_task(self._requests)
            self._requests = None

    def _show_left(self) -> None:
        left_s = remaining_s(self._planned_s, self._took_s, time.monotonic() - self._began_s)
        self._bars.update(self._trials, left=in_words(left_s))


def remaining_s(planned_s: Sequence[float], took_s: Sequence[float], running_s: float) -> float:
    """Seconds until all is done: the workloads to come, each with the overhead that trials had so far."""
    done = len(took_s)
    extra_s = [took - planned for took, planned in zip(took_s, planned_s, strict=False)]
    overhead_s = sum(extra_s) / done if done else OVERHEAD_S
    to_come_s = sum(planned + max(0.0, overhead_s) for planned in planned_s[done:])
    return max(0.0, to_come_s - (running_s if done < len(planned_s) else 0.0))


def in_words(left_s: float) -> str:
    return f"about {duration_in_words(left_s)} left"


def duration_in_words(some_s: float) -> str:
    """40 s, 12 min, 2 h 05 min."""
    if some_s < 90:
        return f"{some_s:.0f} s"
    minutes = round(some_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def in_short(trial: Trial) -> str:
    """One trial in a few figures: enough to see that something is wrong before the campaign is over."""
    served = [row for row in trial.rows if row.status == "ok"]
    judged = [row.quality for row in served if row.quality is not None]
    parts = [f"{len(served)} of {len(trial.rows)} answered"]
    if served:
        parts.append(f"mean {sum(row.total_s for row in served) / len(served):.2f} s")
    if judged:
        parts.append(f"quality {sum(judged) / len(judged):.2f}")
    if trial.energy_j is not None:
        parts.append(f"{trial.energy_j:.0f} J")
    return ", ".join((*parts, f"{trial.loads} loads"))
