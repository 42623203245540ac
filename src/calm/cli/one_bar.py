"""One bar on a terminal, lines in a log or a pipe: what long commands show while they work."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


class OneBar(AbstractContextManager["OneBar"]):
    """Draws its columns where somebody watches; elsewhere `say` writes a line and the bar is nothing."""

    def __init__(self, stream: TextIO, *columns: ProgressColumn, **fields: Any) -> None:
        """`fields` are the first values of what the columns show beside description, total and progress."""
        self._stream = stream
        self._bars = _bars(stream, columns) if stream.isatty() else None
        self._task = self._bars.add_task("", total=None, **fields) if self._bars else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @property
    def watched(self) -> bool:
        return self._bars is not None

    def anew(self, **values: Any) -> None:
        """Begins another stretch of work at nothing done."""
        if self._bars is not None and self._task is not None:
            self._bars.reset(self._task, **values)

    def update(self, **values: Any) -> None:
        """`total`, `completed`, `description` or a column's field."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, **values)

    def advance(self, by: float = 1.0) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, by)

    def say(self, line: str) -> None:
        """A line where no bar is drawn."""
        if self._bars is None:
            self._stream.write(line + "\n")
            self._stream.flush()


def _bars(stream: TextIO, columns: tuple[ProgressColumn, ...]) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(file=stream), transient=True, speed_estimate_period=300.0)
