"""What `calm specialise` shows while it works: stages, and for the training its loss, speed and time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from calm.cli.one_bar import OneBar
from calm.cli.output import seconds

if TYPE_CHECKING:
    from calm.specialise.train import Progress

LINE_EVERY_S = 30.0
"""Into a pipe or a log."""


class TrainingBoard(OneBar):
    """A Board of calm.specialise.run."""

    def __init__(self, stream: TextIO) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

        super().__init__(
            stream, TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"), said="",
        )  # fmt: skip
        self._line_at = 0.0
        self._began: tuple[float, int] | None = None
        self._checks = 0

    def stage(self, what: str, total: int | None = None) -> None:
        self.anew(total=total, description=what, said="")
        self.say(what)

    def trained(self, progress: Progress, steps: int) -> None:
        now = time.monotonic()
        began_at, began_step = self._began = self._began or (now, progress.step)
        done = progress.step - began_step
        left_s = (now - began_at) / done * (steps - progress.step) if done else None
        checked = len(progress.checks) != self._checks
        self._checks = len(progress.checks)
        said = in_words(progress, left_s)
        self.update(total=steps, completed=progress.step, said=said)
        if not self.watched and (checked or now - self._line_at > LINE_EVERY_S):
            self._line_at = now
            self.say(f"step {progress.step} of {steps}: {said}")


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
