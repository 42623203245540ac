"""A trial's rows become the figures that tables and plots show. Pure; numpy is the only help.

How failures count. A request that failed, timed out or was turned away has no latency that could be averaged: a
quick refusal would make a policy look fast. So latencies, first tokens and queueing are of completed requests
(status ok) alone, `completed` stands beside them, and a failure

    misses the SLO, whatever its time;
    has quality 0, because the user got nothing;
    counts in `requests`, and with it in joules per request, in the shares of the models and in the hit rate.

Two policies are compared by latency only where they completed about the same share. The headline quality is
`quality`: unanswered requests count as 0, answers that could not be judged are left out. `judged_quality` is
the mean over judged answers only: what those who got an answer got.

Percentiles are numpy's default, linear between the two nearest ranks (Hyndman and Fan 1996, type 7).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from calm.records import Record
from calm.report.records import Row, Trial


class Figures(Record, frozen=True, kw_only=True):
    """One trial in numbers. Shares are 0..1; None where nothing was measured."""

    requests: int
    completed: float | None
    """Share of the requests that ended with status ok."""
    mean_s: float | None
    """Total latency of completed requests; so are the percentiles."""
    p50_s: float | None
    p90_s: float | None
    p95_s: float | None
    p99_s: float | None
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    queue_mean_s: float | None
    load_mean_s: float | None
    """Waiting for loads, mean over completed requests, most of which waited for none."""
    energy_j_per_request: float | None
    """What the ledger attributed, mean over the requests that it metered."""
    total_j_per_request: float | None
    """All joules of all engines, loads and idling included, over all requests: the headline."""
    quality: float | None
    judged_quality: float | None
    hit_rate: float | None
    """Share of the decisions whose model was in memory."""
    loads: float
    peak_bytes: float
    slo_attainment: float | None
    """Share of all requests that completed within the SLO."""
    throughput_rps: float | None
    """Completed requests per second of the trial."""
    decision_p50_s: float | None
    decision_p99_s: float | None
    model_shares: Mapping[str, float]
    """Of all requests, by model, largest first; what is missing to 1 reached no model."""


def figures_of(trial: Trial, slo_s: float) -> Figures:
    """The figures of one trial; `slo_s` is the total latency that counts as in time."""
    rows = trial.rows
    completed = [row for row in rows if row.status == "ok"]
    total_s = [row.total_s for row in completed]
    ttft_s = [row.ttft_s for row in completed if row.ttft_s is not None]
    decision_s = [row.decision_s for row in rows if row.decision_s is not None]
    judged = [row.quality for row in completed if row.quality is not None]
    return Figures(
        requests=len(rows),
        completed=_over(len(completed), len(rows)),
        mean_s=_mean(total_s),
        p50_s=percentile(total_s, 50),
        p90_s=percentile(total_s, 90),
        p95_s=percentile(total_s, 95),
        p99_s=percentile(total_s, 99),
        ttft_mean_s=_mean(ttft_s),
        ttft_p50_s=percentile(ttft_s, 50),
        ttft_p95_s=percentile(ttft_s, 95),
        queue_mean_s=_mean([row.queue_s for row in completed]),
        load_mean_s=_mean([row.load_s for row in completed]),
        energy_j_per_request=_mean([row.energy_j for row in rows if row.energy_j is not None]),
        total_j_per_request=None if trial.energy_j is None else _over(trial.energy_j, len(rows)),
        quality=quality_of(rows),
        judged_quality=_mean(judged),
        hit_rate=_mean([row.hit for row in rows if row.hit is not None]),
        loads=trial.loads,
        peak_bytes=trial.peak_bytes,
        slo_attainment=_over(sum(seconds <= slo_s for seconds in total_s), len(rows)),
        throughput_rps=_over(len(completed), trial.duration_s),
        decision_p50_s=percentile(decision_s, 50),
        decision_p99_s=percentile(decision_s, 99),
        model_shares=model_shares(rows),
    )


def quality_of(rows: Sequence[Row]) -> float | None:
    """Mean quality 0..1: unanswered 0, unjudgeable left out. None where no answer was judged.

    Where nothing at all could be judged the failures alone would say 0, which nobody measured; but where
    everything failed it is 0.
    """
    failed = sum(row.status != "ok" for row in rows)
    judged = [row.quality for row in rows if row.status == "ok" and row.quality is not None]
    if not judged and failed < len(rows):
        return None
    return _over(sum(judged), len(judged) + failed)


def model_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of all requests by the model that served or was to serve them, largest first."""
    counts = Counter(row.model for row in rows if row.model is not None)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {model: count / len(rows) for model, count in ranked}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the nearest ranks; None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _over(amount: float, base: float) -> float | None:
    return amount / base if base > 0 else None
