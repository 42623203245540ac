"""How a fetch and a conversion show themselves: a small Protocol, bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars


FETCHING = "fetching"


class Progress(Protocol):
    """Hears about one fetch. A fetch of several archives starts and ends several times in a row, and so does
    one whose file is converted afterwards."""

    def on_start(self, name: str, total: int | None, doing: str = FETCHING) -> None:
        """`total` bytes are expected, None when the server does not say. A resumed transfer then advances at
        once by what is there already. `doing` is what is being done, in a word or two."""
        ...

    def on_advance(self, n: int) -> None:
        """`n` more bytes. Negative when a server could not resume and the transfer starts again."""
        ...

    def on_done(self) -> None: ...


class Silent:
    """Shows nothing."""

    def on_start(self, name: str, total: int | None, doing: str = FETCHING) -> None:
        pass

    def on_advance(self, n: int) -> None:
        pass

    def on_done(self) -> None:
        pass


class ProgressBoard(AbstractContextManager["ProgressBoard"]):
    """One line per concurrent fetch: `with ProgressBoard() as board: fetch(..., progress=board.line())`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars = _bars(self._stream) if self._stream.isatty() else None

    def __enter__(self) -> ProgressBoard:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def line(self) -> Progress:
        return PlainLines(self._stream) if self._bars is None else RichLine(self._bars)


class RichLine:
    """A bar of a rich display."""

    def __init__(self, bars: RichBars) -> None:
        self._bars = bars
        self._task = bars.add_task("", visible=False, start=False)

    def on_start(self, name: str, total: int | None, doing: str = FETCHING) -> None:
        description = name if doing == FETCHING else f"{name}, {doing}"
        self._bars.reset(self._task, description=description, total=total, visible=True)

    def on_advance(self, n: int) -> None:
        self._bars.advance(self._task, n)

    def on_done(self) -> None:
        self._bars.stop_task(self._task)


class PlainLines:
    """A line at the start, at every quarter and at the end, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = ""
        self._total: int | None = None
        self._have = 0
        self._quarter = 0

    def on_start(self, name: str, total: int | None, doing: str = FETCHING) -> None:
        self._name, self._total, self._have, self._quarter = name, total, 0, 0
        self._say(doing + (f" {megabytes(total)}" if total else ""))

    def on_advance(self, n: int) -> None:
        self._have += n
        quarter = 4 * self._have // self._total if self._total else 0
        if self._quarter < quarter < 4:
            self._quarter = quarter
            self._say(f"{25 * quarter} %")

    def on_done(self) -> None:
        self._say(f"done, {megabytes(self._have)}")

    def _say(self, words: str) -> None:
        self._stream.write(f"{self._name}: {words}\n")
        self._stream.flush()


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _bars(stream: TextIO) -> RichBars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichBars

    return RichBars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
