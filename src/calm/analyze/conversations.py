"""Which models hold a conversation's prefix in their KV caches, and how much of it.

The next turn repeats everything said so far, so a model that served an earlier one skips that much prefill
(prefix caching: vLLM, Kwon et al. SOSP 2023; llama.cpp keeps the slot's tokens). The memory is bounded, ends
when the model is loaded anew, and is trusted as far as it has come true: engines report `cached_tokens`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from calm.records import ModelState

_CONVERSATIONS = 10_000
_HIT_PRIOR = 0.9
_HIT_RATE = 0.1
_RESIDENT = ("ready", "remote")


class Conversations:
    """A bounded least-recently-used map: conversation -> model -> (tokens in its cache, the model's load)."""

    def __init__(self, size: int = _CONVERSATIONS) -> None:
        self._size = size
        self._known: OrderedDict[str, dict[str, tuple[float, int]]] = OrderedDict()
        self._loads: dict[str, int] = {}
        self._hits: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    def served(self, conversation: str | None, model: str, tokens: float) -> None:
        """`tokens`: prompt and answer together, all of which the engine now has cached."""
        if conversation is None or tokens <= 0:
            return
        self._known.setdefault(conversation, {})[model] = (tokens, self._loads.get(model, 0))
        self._known.move_to_end(conversation)
        if len(self._known) > self._size:
            self._known.popitem(last=False)

    def loaded(self, model: str) -> None:
        """A fresh engine: its cache is empty."""
        self._loads[model] = self._loads.get(model, 0) + 1

    def forget(self, model: str) -> None:
        self.loaded(model)
        self._hits.pop(model, None)

    def came_true(self, model: str, expected: float, cached: int | None) -> None:
        """What the engine reported against what was expected to be cached."""
        if cached is None or expected < 1:
            return
        share = min(1.0, max(0.0, cached / expected))
        self._hits[model] = (1 - _HIT_RATE) * self._hits.get(model, _HIT_PRIOR) + _HIT_RATE * share

    def cached(
        self, conversation: str | None, states: Mapping[str, ModelState] | None = None
    ) -> Mapping[str, float]:
        """Tokens expected in the cache of each resident engine that knows the conversation."""
        known = self._known.get(conversation) if conversation is not None else None
        if not known:
            return {}
        return {
            model: tokens * self._hits.get(model, _HIT_PRIOR)
            for model, (tokens, load) in known.items()
            if load == self._loads.get(model, 0) and _resident(states, model)
        }


def _resident(states: Mapping[str, ModelState] | None, model: str) -> bool:
    state = states.get(model) if states is not None else None
    return state is None or state.residency in _RESIDENT
