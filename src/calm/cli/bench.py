"""`calm bench`: policies compared on the real server, the real engine and real models."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from calm.cli.group import INTERRUPTED, Failure
from calm.cli.options import fleet_option, json_option, settings_of
from calm.cli.output import count, note, size
from calm.cli.studies import (
    Keeper,
    cards_of,
    check_extra,
    digest,
    interrupted,
    show_study,
    workload_conditions,
)
from calm.cli.study_options import StudyPlan, plan_of, study_options
from calm.errors import BadInput, SourceError

if TYPE_CHECKING:
    from calm.bench.campaign import Terms
    from calm.records import ModelCard
    from calm.report.files import StudyDirectory
    from calm.report.records import Setup, Trial
    from calm.settings import Settings
    from calm.workloads.workload import Source

HINDSIGHT = frozenset({"oracle", "belady", "hindsight"})
TITLE = "calm bench"


@click.command(short_help="Compare policies on the real engine and models.")
@study_options
@fleet_option
@click.option(
    "--budget",
    metavar="SIZE",
    help='Memory for models, e.g. "6GiB" or "60%" of what is free.  [default: 60%]',
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="S",
    help="Seconds after which a request has failed.",
)
@click.option(
    "--warm-start",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Rated requests of another seed before each trial, not counted: the policy has learned from them.",
)
@json_option
def bench(as_json: bool, fleet: str | None, budget: str | None, **flags: object) -> None:
    """Measure policies on the real server. For every policy, cache, goal and seed a server of its own is
    started with an empty knowledge base, asked the same questions at the same times over HTTP, and its answers
    are judged and rated. Trials of all candidates are interleaved. With --out an interrupted campaign goes on
    where it stopped when the same command is given again.

    \b
    Example:
      calm bench --data ./data --queries domains:gsm8k,pubmedqa --requests 50 --rate 0.5 \\
          --policy calm --policy random --policy fixed:smollm2-135m --seeds 5 --out ./study
    """
    plan = plan_of(flags)
    check_extra()
    settings = settings_of({"fleet": fleet, "budget": budget})
    cards, directory = cards_of(settings)
    check(plan.setups, settings, cards, directory)
    source = source_of(plan, cards)
    keeper = Keeper(plan, directory_of(plan, settings, cards, flags))
    terms = terms_of(plan, settings, cards, directory, flags, keeper.trials)
    run(plan, source, terms, keeper, as_json=as_json)


# --- what is refused before anything starts -----------------------------------------------------------


def check(
    setups: Sequence[Setup], settings: Settings, cards: Mapping[str, ModelCard], directory: Path
) -> None:
    """Raises BadInput or SourceError for the first thing that a trial would stumble over."""
    for setup in setups:
        check_setup(setup, settings, cards)
    check_weights(setups, cards, directory)


def check_setup(setup: Setup, settings: Settings, cards: Mapping[str, ModelCard]) -> None:
    """Raises BadInput: a policy, cache or goal that there is not, or only in replay."""
    from calm.bench.server import KEEP_ALL
    from calm.execute.eviction import parse_eviction
    from calm.plan import goals
    from calm.plan.paper import parse_paper
    from calm.plan.policies import make_policy

    for flag, spec in (("policy", setup.policy), ("cache", setup.cache)):
        if spec.partition(":")[0] in HINDSIGHT:
            raise BadInput(
                f"--{flag} {spec}: only replay can know the future; run it with `calm replay`", field=flag
            )
    name, _, argument = setup.policy.partition(":")
    if name == "paper":
        parse_paper(argument)  # building it would need the embedder's weights
    else:
        make_policy(setup.policy, models=list(cards))
    if setup.cache != KEEP_ALL:
        parse_eviction(setup.cache)
    goals.read_aim(setup.goal, {**goals.GOALS, **settings.goals})


def check_weights(setups: Sequence[Setup], cards: Mapping[str, ModelCard], directory: Path) -> None:
    """Raises SourceError naming what is not here: a bench fetches nothing, that would be measured too."""
    from calm.cli.weights import missing
    from calm.settings import cache_dir
    from calm.sources.assets import cached_minilm

    cache = cache_dir()
    absent = [card.name for card in missing(cards.values(), directory, cache)]
    if absent:
        raise SourceError(f"no weights of {', '.join(absent)} here; run `calm models pull` first")
    if any(s.policy.partition(":")[0] == "paper" for s in setups) and cached_minilm(cache) is None:
        raise SourceError(
            "the paper's policy needs the MiniLM embedder; run `calm models pull --assets` first"
        )


def check_budget(budget_bytes: int, setups: Sequence[Setup], cards: Mapping[str, ModelCard]) -> None:
    """Raises BadInput (field `budget`) when the largest model, or with cache `none` all of them, cannot fit."""
    from calm.bench.server import KEEP_ALL
    from calm.execute.sizing import size_fleet

    needs = size_fleet(cards, 1).bytes
    largest = max(needs, key=needs.__getitem__)
    if needs[largest] > budget_bytes:
        raise BadInput(
            f"a budget of {size(budget_bytes)} cannot hold {largest} ({size(needs[largest])}); "
            "give a larger --budget, or another --fleet",
            field="budget",
        )
    if any(setup.cache == KEEP_ALL for setup in setups) and sum(needs.values()) > budget_bytes:
        raise BadInput(
            f"--cache none keeps all models in memory, about {size(sum(needs.values()))}, and the budget is "
            f"{size(budget_bytes)}; give a larger --budget or another --cache",
            field="budget",
        )


def source_of(plan: StudyPlan, cards: Mapping[str, ModelCard]) -> Source:
    """Recorded answers only say which questions to ask: those that a replay with the same file asks.

    Raises BadInput for a routing table, whose answers are other models', and as open_source does.
    """
    from calm.workloads.workload import open_source

    if plan.workload.queries.partition(":")[0] == "table":
        raise BadInput(
            f"--queries {plan.workload.queries}: a routing table says what other models answered; a bench judges "
            "real answers, so give domains:NAME,...",
            field="queries",
        )
    return open_source(plan.workload, list(cards))


# --- the campaign -------------------------------------------------------------------------------------


def directory_of(
    plan: StudyPlan, settings: Settings, cards: Mapping[str, ModelCard], flags: Mapping[str, object]
) -> StudyDirectory | None:
    """Where trials are kept. Raises BadInput when it holds trials of other settings."""
    from calm.report.files import StudyDirectory, fingerprint

    if plan.out is None:
        return None
    return StudyDirectory(plan.out, fingerprint(conditions(plan, settings, cards, flags)))


def conditions(
    plan: StudyPlan, settings: Settings, cards: Mapping[str, ModelCard], flags: Mapping[str, object]
) -> dict[str, object]:
    """What all trials of a directory have in common, beside setup and seed. No path of this machine."""
    return {
        "engine": "real",
        **workload_conditions(plan.workload),
        "feedback": plan.feedback,
        "fleet": {name: digest(card) for name, card in cards.items()},
        "budget": settings.memory.budget,
        "deadline_s": flags["deadline"],
        "warm_start": flags["warm_start"],
    }


def terms_of(
    plan: StudyPlan,
    settings: Settings,
    cards: Mapping[str, ModelCard],
    directory: Path,
    flags: Mapping[str, object],
    done: Sequence[Trial] = (),
) -> Terms:
    """What is the same for all trials. A share of the free memory is what it was for those already `done`.

    Raises BadInput when the budget is malformed or too small.
    """
    from calm.bench.campaign import Terms
    from calm.settings import budget_bytes

    budget = done[0].budget_bytes if done else budget_bytes(settings)
    check_budget(budget, plan.setups, cards)
    return Terms(
        base=settings,
        fleet=directory,
        cards=cards,
        budget_bytes=budget,
        deadline_s=cast("float", flags["deadline"]),
        max_tokens=plan.workload.max_tokens,
        feedback=plan.feedback,
        warm_start=cast("int", flags["warm_start"]),
    )


def run(plan: StudyPlan, source: Source, terms: Terms, keeper: Keeper, *, as_json: bool) -> None:
    """Raises Failure when not one trial completed, Exit (130) after Ctrl-C."""
    import asyncio

    from calm.bench.campaign import Campaign, interleaved, still_missing
    from calm.report.files import provenance
    from calm.workloads.judge import judge

    came_from = provenance(shlex.join(("calm", *sys.argv[1:])))
    jobs = interleaved(plan.setups, plan.seeds)
    missing = still_missing(jobs, keeper.trials)
    say_plan(len(jobs), [source.workload(job.seed).duration_s for job in missing], terms)
    campaign = Campaign(terms, source.workload, judge, keeper.keep)
    try:
        asyncio.run(campaign.run(missing))
    except KeyboardInterrupt:
        interrupted(plan, len(keeper.trials), len(jobs))
        raise click.exceptions.Exit(INTERRUPTED) from None
    study = keeper.study(TITLE, came_from, (*source.notes, *campaign.notes))
    if not study.trials:
        raise Failure(f"no trial completed; {campaign.notes[0]}")
    show_study(study, plan.out, as_json)


def say_plan(jobs: int, missing_s: Sequence[float], terms: Terms) -> None:
    """`missing_s` are the durations of the workloads to come."""
    from calm.bench.progress import duration_in_words, remaining_s

    done = jobs - len(missing_s)
    before = f", {done} of them done before" if done else ""
    takes = f", {duration_in_words(remaining_s(missing_s, (), 0.0))} or more" if missing_s else ""
    models = f"{count(len(terms.cards), 'model')} in {size(terms.budget_bytes)}"
    note(f"{count(jobs, 'trial')}{before}{takes}; {models}")
