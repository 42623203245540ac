"""Whose turn it is: requests wait in a short line for one of the slots."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus

from .answer import Answer, read_calls
from .refusal import Left, Refused
from .request import Asked
from .writer import Writer

QUEUE = 64
POLL_S = 0.05


class Service:
    """Answers requests, as many at once as there are slots; the others wait in line, and a few only."""

    def __init__(
        self, writer: Writer, model: str, slots: int, rest: Callable[[], None] = lambda: None
    ) -> None:
        """`rest` is called when the last of the requests under way is through."""
        self._writer = writer
        self._model = model
        self._rest = rest
        self._turns = threading.Semaphore(slots)
        self._places = threading.Semaphore(slots + QUEUE)
        self.busy = 0

    def answer(self, asked: Asked, alive: Callable[[], bool]) -> Answer:
        """Raises Refused, or Left when `alive` says that nobody waits any more."""
        with self._turn(alive):
            written = self._writer.write(asked, alive)
        text = self._writer.text(written)
        calls = read_calls(text, asked)
        if calls is None and asked.must_call and written.complete:
            raise Refused("the model wrote no valid call", status=HTTPStatus.INTERNAL_SERVER_ERROR)
        return Answer(model=self._model, written=written, calls=calls or (), text="" if calls == [] else text)

    @contextlib.contextmanager
    def _turn(self, alive: Callable[[], bool]) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            reason = "too many requests are waiting; try again in a moment"
            raise Refused(reason, status=HTTPStatus.TOO_MANY_REQUESTS)
        try:
            while not self._turns.acquire(timeout=POLL_S):
                if not alive():
                    raise Left
            self.busy += 1
            try:
                yield
            finally:
                self.busy -= 1
                self._turns.release()
                if not self.busy:
                    self._rest()
        finally:
            self._places.release()
