"""What an outcome truly shows, and nothing more: pure functions from what happened to observations.

A cancelled request says how fast its prompt was read and its tokens came, but not how long the answer would
have been; a rejected one says nothing about the model. Unknown is None.
"""

from __future__ import annotations

from calm.records import Outcome

_MIN_DECODED = 4  # fewer tokens measure the clock rather than the decoder
_SERVED = ("ok", "cancelled", "timeout")


def served(outcome: Outcome) -> bool:
    """The engine worked on it without failing."""
    return outcome.model is not None and outcome.status in _SERVED


def uncached_tokens(outcome: Outcome) -> float | None:
    """Prompt tokens the engine had to read."""
    if outcome.prompt_tokens is None:
        return None
    return float(max(0, outcome.prompt_tokens - (outcome.cached_tokens or 0)))


def prefill_s(outcome: Outcome) -> float | None:
    """The engine's own figure, else the time to the first token less the waits before it."""
    if not served(outcome):
        return None
    if outcome.prefill_s is not None:
        return outcome.prefill_s if outcome.prefill_s > 0 else None
    if outcome.ttft_s is None:
        return None
    seconds = outcome.ttft_s - outcome.queue_s - outcome.load_s
    return seconds if seconds > 0 else None


def streamed(outcome: Outcome) -> bool:
    """The first token's time is known apart from the last one's."""
    return outcome.ttft_s is not None and outcome.ttft_s < outcome.total_s


def decode_s(outcome: Outcome, expected_prefill_s: float | None) -> float | None:
    """From the first token to the last. Without streaming: what is left after the prompt's time."""
    if not served(outcome):
        return None
    if outcome.ttft_s is not None and outcome.ttft_s < outcome.total_s:
        return outcome.total_s - outcome.ttft_s
    prefill = prefill_s(outcome) if outcome.prefill_s is not None else expected_prefill_s
    if prefill is None or outcome.status != "ok":
        return None
    seconds = outcome.total_s - outcome.queue_s - outcome.load_s - prefill
    return seconds if seconds > 0 else None


def tpot_s(outcome: Outcome, samples: int, expected_prefill_s: float | None) -> float | None:
    """Seconds a token and sequence; `samples` are decoded side by side."""
    tokens = outcome.completion_tokens
    seconds = decode_s(outcome, expected_prefill_s)
    if tokens is None or seconds is None:
        return None
    steps = tokens / max(1, samples) - 1
    return seconds / steps if steps >= _MIN_DECODED - 1 else None


def length(outcome: Outcome, samples: int) -> tuple[float, bool] | None:
    """(tokens of one sample, cut off?), only of an answer that was allowed to end."""
    if outcome.status != "ok" or not outcome.completion_tokens:
        return None
    return outcome.completion_tokens / max(1, samples), outcome.finish_reason == "length"


def joules(outcome: Outcome) -> tuple[float, float, float] | None:
    """(joules, uncached prompt tokens, output tokens) of a whole answer with known counts."""
    uncached = uncached_tokens(outcome)
    if outcome.status != "ok" or outcome.energy is None or uncached is None:
        return None
    return outcome.energy.joules, uncached, float(outcome.completion_tokens or 0)


def service_s(outcome: Outcome) -> float | None:
    """Seconds the engine was busy with it: what the next in the queue waits for."""
    if not served(outcome):
        return None
    seconds = outcome.total_s - outcome.queue_s - outcome.load_s
    return seconds if seconds > 0 else None
