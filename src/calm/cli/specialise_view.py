"""What `calm specialise` shows while it works: stages, and for the training its loss, speed and time left."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from calm.cli.output import seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from calm.specialise.train import Progress

LINE_EVERY_S = 30.0
"""Into a pipe or a log."""


class TrainingBoard(AbstractContextManager["TrainingBoard"]):
    """A Board of calm.specialise.run: a bar on a terminal, lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars = _bars(stream) if stream.isatty() else None
        self._task = self._bars.add_task("", total=None, said="") if self._bars else None
        self._line_at = 0.0
        self._began: tuple[float, int] | None = None
        self._checks = 0

    def __enter__(self) -> TrainingBoard:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, what: str, total: int | None = None) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.reset(self._task, total=total, description=what, said="")
        else:
            self._say(what)

    def advance(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)

    def trained(self, progress: Progress, steps: int) -> None:
        now = time.monotonic()
        began_at, began_step = self._began = self._began or (now, progress.step)
        done = progress.step - began_step
        left_s = (now - began_at) / done * (steps - progress.step) if done else None
        checked = len(progress.checks) != self._checks
        self._checks = len(progress.checks)
        said = in_words(progress, left_s)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=steps, completed=progress.step, said=said)
        elif checked or now - self._line_at > LINE_EVERY_S:
            self._line_at = now
            self._say(f"step {progress.step} of {steps}: {said}")

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def in_words(progress: Progress, left_s: float | None) -> str:
    """Loss, the last check, speed and what is left at most."""
    parts = [f"loss {progress.loss:.3f}"]
    if progress.checks:
        last = progress.checks[-1]
        parts.append(f"held out {last.loss:.3f}, {last.exact:.1%} exact")
    parts.append(f"{progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s")
    if left_s is not None:
        parts.append(f"at most {seconds(left_s)} left")
    return ", ".join(parts)


def _bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"), console=Console(file=stream), transient=True,
    )  # fmt: skip
