"""The flags that `calm replay` and `calm bench` share, and the plan they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import click

from calm.errors import BadInput

if TYPE_CHECKING:
    from calm.report.records import Setup
    from calm.workloads.records import WorkloadSpec

C = TypeVar("C", bound=Callable[..., object])
DATA_ENV = "CALM_DATA"
SPLITS = ("train", "test", "held-out")


@dataclass(frozen=True)
class StudyPlan:
    """Which trials to run: every setup on every seed's workload."""

    workload: WorkloadSpec
    setups: tuple[Setup, ...]
    seeds: tuple[int, ...]
    feedback: float
    """Share of the answers that are rated, 0..1."""
    slo_s: float
    out: Path | None


_OPTIONS = (
    click.option(
        "--arrivals", metavar="TRACE", default="poisson", show_default=True,
        help="poisson, constant, worldcup, azure, servegen[:MODEL], mooncake or csv:FILE.",
    ),
    click.option(
        "--queries", metavar="SET", required=True,
        help="domains:gsm8k,pubmedqa,... or table:NAME-or-FILE[:TASK,...].",
    ),
    click.option(
        "--data", metavar="DIR", envvar=DATA_ENV, type=click.Path(file_okay=False),
        help=f"Directory of traces and query sets.  [env: {DATA_ENV}]",
    ),
    click.option(
        "--answers", metavar="FILE", type=click.Path(dir_okay=False),
        help="Recorded answers (calm profile --answers): replay takes length and quality of each model's answer from "
        "them; bench asks the questions in them.",
    ),
    click.option("--requests", type=click.IntRange(1), metavar="N", help="Requests of a trial."),
    click.option("--duration", type=click.FloatRange(0, min_open=True), metavar="S", help="Seconds of a trial."),
    click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="RPS", help="Mean requests per second."),
    click.option(
        "--split",
        type=click.Choice(SPLITS),
        help="Use only this split of the query sets; held-out: rows that no shipped specialist has learned.",
    ),
    click.option(
        "--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer, in tokens."
    ),
    click.option(
        "--policy", "policies", metavar="SPEC", multiple=True, default=("calm",), show_default=True,
        help="Who chooses; give it several times to compare.",
    ),
    click.option(
        "--cache", "caches", metavar="SPEC", multiple=True, default=("calm",), show_default=True,
        help="Who leaves memory: calm, lru, lfu, fifo, each also as lru:3 (at most 3 models); none keeps all.",
    ),
    click.option(
        "--goal", "goals", metavar="GOAL", multiple=True,
        help="Named weights, your own (latency=1,quality=2), a floor (quality>=0.7), or both.",
    ),
    click.option(
        "--queue", "queues", type=click.Choice(("fifo", "stcf")), multiple=True, default=("fifo",),
        show_default=True, help="Order of the waiting requests.",
    ),
    click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Repetitions, seeds 0, 1, ..."),
    click.option(
        "--feedback", type=click.FloatRange(0, 1), default=1.0, show_default=True,
        help="Share of the answers that are rated; ratings teach every policy that learns.",
    ),
    click.option(
        "--slo", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, metavar="S",
        help="Total latency that counts as in time.",
    ),
    click.option(
        "--out", metavar="DIR", type=click.Path(file_okay=False),
        help="Keep trials, results.json and plots here; the same command again resumes.",
    ),
)  # fmt: skip


def study_options(command: C) -> C:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def plan_of(flags: Mapping[str, object], scenario: str = "") -> StudyPlan:
    """What the flags say. Raises BadInput where they contradict each other or leave the load open."""
    from calm.report.records import Setup
    from calm.workloads.records import WorkloadSpec

    def many(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cast("tuple[str, ...]", flags[name])))

    data = cast("str | None", flags["data"])
    workload = WorkloadSpec(
        arrivals=cast("str", flags["arrivals"]),
        queries=cast("str", flags["queries"]),
        data=data,
        answers=cast("str | None", flags["answers"]),
        requests=cast("int | None", flags["requests"]),
        duration_s=cast("float | None", flags["duration"]),
        rate_rps=cast("float | None", flags["rate"]),
        split=cast("str | None", flags["split"]),
        max_tokens=cast("int", flags["max_tokens"]),
    )
    given = [workload.requests, workload.duration_s, workload.rate_rps]
    if all(value is not None for value in given):
        raise BadInput("give two of --requests, --duration and --rate; they say the third", field="rate")
    setups = tuple(
        Setup(policy=policy, cache=cache, queue=queue, scenario=scenario, goal=goal)
        for policy in many("policies")
        for cache in many("caches")
        for queue in many("queues")
        for goal in (many("goals") or (None,))
    )
    out = cast("str | None", flags["out"])
    return StudyPlan(
        workload=workload,
        setups=setups,
        seeds=tuple(range(cast("int", flags["seeds"]))),
        feedback=cast("float", flags["feedback"]),
        slo_s=cast("float", flags["slo"]),
        out=Path(out) if out else None,
    )
