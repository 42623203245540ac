"""`calm replay`: policies compared on simulated time, with the code that serves."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from calm.cli.group import INTERRUPTED
from calm.cli.options import fleet_option, json_option, settings_of
from calm.cli.output import count
from calm.cli.studies import (
    Keeper,
    cards_of,
    check_extra,
    digest,
    interrupted,
    short_digest,
    show_study,
    workload_conditions,
)
from calm.cli.study_options import StudyPlan, plan_of, study_options

if TYPE_CHECKING:
    from calm.profile import Profile
    from calm.records import ModelCard
    from calm.replay.house import House
    from calm.report.files import StudyDirectory
    from calm.workloads.workload import Source

TITLE = "calm replay"
REMARK = "simulated time: engines take what the profile says, decisions take no time"


@click.command(short_help="Compare policies on simulated time.")
@study_options
@fleet_option
@click.option(
    "--profile",
    "profile_file",
    metavar="FILE",
    required=True,
    type=click.Path(dir_okay=False),
    help="What each model costs on a machine; `calm profile` measures it.",
)
@click.option(
    "--budget",
    metavar="SIZE",
    help='Memory for models, e.g. "6GiB" or "50%" of what all models take.  [default: all of them]',
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds after which a request has failed.  [default: none]",
)
@click.option(
    "--warm-start",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Rated requests of another seed before each trial, not counted: the policy has learned from them.",
)
@click.option(
    "--max-queue", type=click.IntRange(0), metavar="N", help="Requests that may wait.  [default: any number]"
)
@click.option(
    "--overload", is_flag=True, help="Run a load even if it is far beyond what the models can serve."
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes.  [default: one for each core]")
@json_option
def replay(as_json: bool, fleet: str | None, profile_file: str, budget: str | None, **flags: object) -> None:
    """Replay a workload on simulated time: the loop, planner and residency machine that serve, on engines that
    take as long as a profile says. A day takes seconds. Beside the policies of `calm serve` there are some that
    know the future: the policies oracle, oracle:calm and hindsight (the best static weights), and the cache belady.
    With --out an interrupted study goes on where it stopped when the same command is given again.

    \b
    Example:
      calm replay --profile profile.toml --data ./data --arrivals worldcup --requests 500 --duration 1200 \\
          --queries domains:pubmedqa,headlines_finance,banking77 \\
          --policy calm --policy paper --policy random --policy oracle --out ./study
    """  # fmt: skip
    plan = plan_of(flags)
    check_extra()
    cards, profile = fleet_and_profile(fleet, profile_file)
    house = house_of(plan, cards, profile, budget, flags)
    warm_start = cast("int", flags["warm_start"])
    source = checked(plan, house, warm_start, overload=bool(flags["overload"]))
    keeper = Keeper(wide(plan), directory_of(plan, house, warm_start))
    run(plan, house, source, keeper, processes=cast("int | None", flags["jobs"]), warm_start=warm_start)
    finish(plan, (*source.notes, *remarks(warm_start)), keeper, as_json=as_json)


# --- what the flags say -----------------------------------------------------------------------------


def fleet_and_profile(fleet: str | None, profile_file: str) -> tuple[Mapping[str, ModelCard], Profile]:
    """Raises BadInput for an unreadable file, no good card, or a model that the profile lacks."""
    from calm.profile import read_profile
    from calm.replay.cards import fleet_for

    cards, _ = cards_of(settings_of({"fleet": fleet}))
    profile = read_profile(Path(profile_file))
    fleet_for(cards, profile)
    return cards, profile


def house_of(
    plan: StudyPlan,
    cards: Mapping[str, ModelCard],
    profile: Profile,
    budget: str | None,
    flags: Mapping[str, object],
) -> House:
    """What all trials share. Raises BadInput when the budget is malformed."""
    from calm.replay.house import ENDLESS_QUEUE, NO_DEADLINE_S, House, whole_fleet_bytes
    from calm.settings import cache_dir, parse_bytes
    from calm.wiring import load_minilm

    house = House(
        fleet=cards,
        profile=profile,
        budget_bytes=0,
        feedback=plan.feedback,
        max_tokens=plan.workload.max_tokens,
        deadline_s=cast("float | None", flags["deadline"]) or NO_DEADLINE_S,
        max_queue=ENDLESS_QUEUE if flags["max_queue"] is None else cast("int", flags["max_queue"]),
        minilm=partial(load_minilm, cache_dir()),
    )
    whole = whole_fleet_bytes(house)
    return replace(house, budget_bytes=whole if budget is None else parse_bytes(budget, whole))


def checked(plan: StudyPlan, house: House, warm_start: int, *, overload: bool) -> Source:
    """Everything that can be refused is refused now. Raises BadInput."""
    from calm.replay.study import check_load, check_setups, load_of
    from calm.workloads.workload import open_source

    check_setups(plan.setups, house)
    source = open_source(plan.workload, list(house.fleet))
    counted, _ = load_of(source.workload, plan.seeds[0], warm_start)
    if not overload:
        check_load(plan.setups, house, counted)
    return source


def wide(plan: StudyPlan) -> StudyPlan:
    """The plan with every point of `hindsight`'s grid: what is kept and resumed."""
    from calm.replay.study import jobs_of

    return replace(plan, setups=tuple(dict.fromkeys(setup for setup, _ in jobs_of(plan.setups, plan.seeds))))


def directory_of(plan: StudyPlan, house: House, warm_start: int) -> StudyDirectory | None:
    """Where trials are kept. Raises BadInput when it holds trials of other settings."""
    from calm.report.files import StudyDirectory, fingerprint

    if plan.out is None:
        return None
    return StudyDirectory(plan.out, fingerprint(conditions(plan, house, warm_start)))


def conditions(plan: StudyPlan, house: House, warm_start: int = 0) -> dict[str, object]:
    """What all trials of a directory have in common, beside setup and seed. No path of this machine."""
    import msgspec

    profile = msgspec.json.encode(house.profile, order="deterministic")
    return {
        "engine": "simulated",
        **workload_conditions(plan.workload),
        "feedback": plan.feedback,
        "fleet": {name: digest(card) for name, card in house.fleet.items()},
        "profile": short_digest(profile),
        "budget_bytes": house.budget_bytes,
        "deadline_s": house.deadline_s,
        "max_queue": house.max_queue,
        **({"warm_start": warm_start} if warm_start else {}),
    }


# --- running ----------------------------------------------------------------------------------------


def run(
    plan: StudyPlan,
    house: House,
    source: Source,
    keeper: Keeper,
    *,
    processes: int | None,
    warm_start: int = 0,
) -> None:
    """Raises Exit (130) after Ctrl-C, with what is finished kept."""
    from calm.replay.study import jobs_of, run_jobs

    done = {(trial.setup, trial.seed) for trial in keeper.trials}
    jobs = [job for job in jobs_of(plan.setups, plan.seeds) if job not in done]
    try:
        with Steps(len(jobs)) as step:
            for trial in run_jobs(jobs, house, source.workload, processes or cores(), warm_start=warm_start):
                keeper.keep(trial)
                step()
    except KeyboardInterrupt:
        interrupted(plan, len(keeper.trials), len(done) + len(jobs))
        raise click.exceptions.Exit(INTERRUPTED) from None


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Steps:
    """A bar on stderr with the time left; `step()` for each trial that ends."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("trials"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("trials", total=total)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._bar.stop()

    def __call__(self) -> None:
        self._bar.advance(self._task)


def remarks(warm_start: int) -> tuple[str, ...]:
    """What a reader of the figures must know of the way they came about."""
    warm = f"{count(warm_start, 'rated request')} before each trial {'is' if warm_start == 1 else 'are'} not counted"
    return (REMARK, warm) if warm_start else (REMARK,)


def finish(plan: StudyPlan, notes: Sequence[str], keeper: Keeper, *, as_json: bool) -> None:
    """Table, results.json and plots."""
    import msgspec

    from calm.replay.study import chosen
    from calm.report.files import provenance

    command = shlex.join(("calm", *sys.argv[1:]))
    study = keeper.study(TITLE, provenance(command), notes)
    trials = chosen(plan.setups, study.trials)
    show_study(msgspec.structs.replace(study, trials=trials), plan.out, as_json)
