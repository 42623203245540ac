"""From one model's timings to its entry in the profile. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from calm.bench.fitting import (
    length_of,
    line,
    log_spread,
    prefill_rate,
    relative_spread,
    rounded,
    service_s,
)
from calm.bench.measure_answers import short
from calm.bench.measure_engine import Timings
from calm.bench.measure_probe import Answered
from calm.profile import DEFAULT, ModelProfile
from calm.records import ModelCard

TOKENS_PER_CHAR = 0.25
"""For an engine that does not count prompt tokens: English in common vocabularies."""


def figures(card: ModelCard, seen: Timings) -> ModelProfile:
    """Raises ValueError with what the engine did not show. Joules that nothing metered come out as 0."""
    prefill_tps, overhead_s = reading(seen.prompts)
    decode_tps = decoding(seen)
    per_char, template_tokens = prompt_tokens(seen)
    return ModelProfile(
        memory_bytes=seen.footprint_bytes or 1,
        load_s=rounded(median(seen.loads.load_s)),
        unload_s=rounded(median(seen.loads.unload_s)),
        batching="serial" if card.concurrency > 1 and list(decode_tps) == ["1"] else "continuous",
        prefill_tps=rounded(prefill_tps),
        overhead_s=rounded(overhead_s),
        decode_tps={count: rounded(rate) for count, rate in decode_tps.items()},
        template_tokens=rounded(template_tokens),
        tokens_per_char=rounded(per_char),
        cached_tokens=float(median(answer.cached_tokens for answer in seen.prompts)),
        jitter=rounded(jitter(seen.singles, overhead_s, prefill_tps, decode_tps["1"])),
        load_jitter=rounded(relative_spread(seen.loads.load_s)),
        active_w=rounded(seen.active_w or 0.0),
        idle_w=rounded(seen.idle_w or 0.0),
        load_j=rounded(median(seen.loads.load_j)) if seen.loads.load_j else 0.0,
        output_tokens={DEFAULT: short(length_of([answer.output_tokens for answer in seen.answers]))},
        quality=dict(card.priors.quality),
    )


def reading(prompts: Sequence[Answered]) -> tuple[float, float]:
    """(prefill_tps, overhead_s): the engine's own prefill times where it tells them, else time to first token.
    What comes before the engine begins to read, and what every prompt costs whatever its length, is overhead."""
    points = [(read_tokens(a), a.ttft_s if a.prefill_s is None else a.prefill_s) for a in prompts]
    prefill_tps, intercept_s = prefill_rate(points)
    before_s = [max(0.0, a.ttft_s - a.prefill_s) for a in prompts if a.prefill_s is not None]
    return prefill_tps, intercept_s + (median(before_s) if before_s else 0.0)


def read_tokens(answer: Answered) -> float:
    known = answer.read_tokens
    return answer.prompt_chars * TOKENS_PER_CHAR if known is None else known


def decoding(seen: Timings) -> dict[str, float]:
    """Median aggregate rate by the number of sequences."""
    counts = sorted({count for count, _ in seen.decoding})
    rates = {str(count): median(rate for n, rate in seen.decoding if n == count) for count in counts}
    return rates if "1" in rates else {"1": rate_of_answers(seen.answers), **rates}


def rate_of_answers(answers: Sequence[Answered]) -> float:
    """Of engines whose answers were too short to overlap. Raises ValueError for nothing but single tokens."""
    rates = [
        (answer.output_tokens - 1) / (answer.tokens_s[-1] - answer.tokens_s[0])
        for answer in answers
        if answer.tokens_s[-1] > answer.tokens_s[0]
    ]
    if not rates:
        raise ValueError("its answers were too short to time a token")
    return median(rates)


def prompt_tokens(seen: Timings) -> tuple[float, float]:
    """(tokens per character, tokens of the template), from prompts of one token and of many."""
    counted = [
        (float(answer.prompt_chars), float(answer.prompt_tokens))
        for answer in (*seen.tiny, *seen.singles)
        if answer.prompt_tokens is not None
    ]
    if not counted:
        return TOKENS_PER_CHAR, 0.0
    template_tokens, per_char = line(counted)
    return per_char or TOKENS_PER_CHAR, template_tokens


def jitter(singles: Sequence[Answered], overhead_s: float, prefill_tps: float, decode_tps: float) -> float:
    """Sigma of log(observed / service model) over requests that had the engine to themselves."""
    return log_spread(
        [
            answer.total_s
            / service_s(
                read_tokens(answer),
                answer.output_tokens,
                overhead_s=overhead_s,
                prefill_tps=prefill_tps,
                decode_tps=decode_tps,
            )
            for answer in singles
        ]
    )
