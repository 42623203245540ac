"""What a workload is made of. Quality is 0..1 everywhere; times are seconds from the start of the workload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from calm.records import Record

AnswerType = Literal["choice", "label", "number", "yes/no/maybe", "span", "sql", "python"]


class Recorded(Record, frozen=True, kw_only=True):
    """What one model answered to one query when it was asked for real: a line of an answers file."""

    query_id: str
    model: str
    quality: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    answer: str | None = None


class Query(Record, frozen=True, kw_only=True):
    """Something to ask, with what is needed to judge the answer or to know its quality beforehand."""

    id: str
    dataset: str
    """gsm8k, pubmedqa, ...; for a routing table its task."""
    domain: str
    """Key of priors.quality and of a profile's quality: math, medical, ..."""
    prompt: str
    """What the user types (prompts.py)."""
    answer: str | None = None
    answer_type: AnswerType | None = None
    choices: tuple[str, ...] = ()
    """Labels or option texts, in order; letters are A, B, ..."""
    known: Mapping[str, Recorded] = {}
    """By model: what is known to come out, from a routing table or an answers file."""


class Workload(Record, frozen=True, kw_only=True):
    """Query i is asked at `arrivals_s[i]`. Equal seeds give equal workloads."""

    name: str
    """Both specs, as in `worldcup x domains:gsm8k,pubmedqa`."""
    seed: int
    arrivals_s: tuple[float, ...]
    """Ascending, the first one at 0 or later."""
    queries: tuple[Query, ...]

    @property
    def duration_s(self) -> float:
        return self.arrivals_s[-1] if self.arrivals_s else 0.0


class WorkloadSpec(Record, frozen=True, kw_only=True):
    """How to make a workload, for any seed. Of requests, duration and rate any two say the third."""

    arrivals: str = "poisson"
    """poisson, constant, worldcup, azure, servegen[:MODEL], mooncake, csv:FILE."""
    queries: str
    """domains:NAME,NAME,... (all, evenly) or table:NAME-or-FILE[:TASK,TASK,...]."""
    data: str | None = None
    """Directory of the third-party data; traces and sets are read from it."""
    answers: str | None = None
    """An answers file (JSON lines of Recorded): what each model is known to answer to each query."""
    requests: int | None = None
    duration_s: float | None = None
    rate_rps: float | None = None
    split: str | None = None
    """train or test; None: both."""
    max_tokens: int | None = 128
    """Sent with every request."""
