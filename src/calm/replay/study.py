"""Many trials: checked before anything runs, spread over processes, kept as each one ends.

A trial depends on nothing but its arguments, so the order and the number of processes change no figure. The
policy `hindsight` stands for a grid of static weights, each run on every seed; the best of them by the
operator's own QoS, chosen when all outcomes are known, is what no setting made beforehand can beat.
"""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace as with_changed
from multiprocessing import active_children, get_context
from statistics import fmean

from msgspec.structs import replace

from calm.errors import BadInput, CalmError
from calm.execute.eviction import parse_eviction
from calm.plan import goals as goal_book
from calm.plan.engines import families
from calm.plan.policies import make_policy
from calm.profile import ModelProfile
from calm.records import Weights
from calm.replay.cards import fleet_for
from calm.replay.embedding import remembering
from calm.replay.hindsight import belady_count
from calm.replay.house import House, run_trial, whole_fleet_bytes
from calm.report.records import Setup, Trial
from calm.workloads.records import Workload
from calm.workloads.workload import warm_up

HINDSIGHT = "hindsight"
ORACLES = ("oracle", "oracle:calm")
GRID_STEPS = 4
"""The grid of static weights has steps of a quarter: 15 points over latency, energy and quality."""
MOST_OVERLOAD = 10.0
"""Offered work over capacity beyond which a run says nothing but that it was overloaded."""

Job = tuple[Setup, int]
Load = tuple[Workload, Workload | None]
"""What is counted, and what is served and rated before it."""


# --- what is refused before anything runs ---------------------------------------------------------


def check_setups(setups: Iterable[Setup], house: House) -> None:
    """Raises BadInput for the first policy, cache or goal that cannot be run on this fleet and budget."""
    fleet_for(house.fleet, house.profile)
    once = with_changed(house, minilm=remembering(house.minilm))
    for setup in setups:
        _check_policy(setup.policy, once)
        _check_cache(setup.cache)
        goal_book.read_aim(setup.goal)
    _check_budget(house)


def _check_policy(spec: str, house: House) -> None:
    if spec in (HINDSIGHT, *ORACLES):
        return
    try:
        make_policy(spec, embedder=house.minilm, models=list(house.fleet))
    except BadInput as error:
        also = ", ".join((*ORACLES, HINDSIGHT))
        raise BadInput(f"{error.message} (replay also has {also})", field="policy") from None


def _check_cache(spec: str) -> None:
    if spec.partition(":")[0] == "belady":
        belady_count(spec)
    elif spec != "none":
        try:
            parse_eviction(spec)
        except BadInput as error:
            raise BadInput(f"{error.message} (replay also has none, belady[:K])", field="cache") from None


def _check_budget(house: House) -> None:
    """The largest model alone has to fit, with its adapters, as it is and as its card says."""
    models = house.profile.models
    needs = {
        host: sum(max(models[card.name].memory_bytes, card.memory_hint_bytes or 0) for card in family)
        for host, family in families(house.fleet).items()
        if not house.fleet[host].remote
    }
    largest = max(needs, key=needs.__getitem__, default=None)
    need = 0 if largest is None else needs[largest]
    if need > house.budget_bytes:
        raise BadInput(
            f"a budget of {house.budget_bytes / 1e9:.2f} GB cannot hold {largest} ({need / 1e9:.2f} GB); "
            f"give a larger --budget or leave the model out (all models take "
            f"{whole_fleet_bytes(house) / 1e9:.2f} GB)",
            field="budget",
        )


def check_load(setups: Iterable[Setup], house: House, workload: Workload) -> None:
    """Raises BadInput where a load is so far beyond what its models can serve that figures mean nothing.

    A single request has no rate: it is never too much.
    """
    if len(workload.queries) < 2:
        return
    fixed = (s.policy.partition(":")[2] if s.policy.startswith("fixed:") else None for s in setups)
    for name in dict.fromkeys(fixed):
        over = overload([name] if name else list(house.fleet), house, workload)
        if over > MOST_OVERLOAD:
            raise BadInput(
                f"the load is {over:,.0f} times what {name or 'the fastest models together'} can serve at best: "
                f"lower --rate, lengthen --duration, or say --overload to run it all the same",
                field="rate",
            )


def overload(models: Sequence[str], house: House, workload: Workload) -> float:
    """Least work the workload can be, over what the machine can do in its time.

    Every request on the quickest of `models`, each engine at its best batch, as many engines as there are cores.
    """
    engines = min(len({house.fleet[name].host for name in models}), house.profile.machine.cores)
    kinds = Counter((query.domain, len(query.prompt)) for query in workload.queries)
    longest = {name: house.fleet[name].chat.longest(house.max_tokens) for name in models}
    work_s = sum(
        count * min(least_s(house.profile.models[m], domain, chars, longest[m]) for m in models)
        for (domain, chars), count in kinds.items()
    )
    return work_s / engines / max(workload.duration_s, 1e-9)


def least_s(model: ModelProfile, domain: str, prompt_chars: int, max_tokens: int | None) -> float:
    """Engine seconds of one request at the engine's best rate."""
    tokens = min(model.length(domain).mean, max_tokens or math.inf)
    rate = model.decode_tps["1"] if model.batching == "serial" else max(model.decode_tps.values())
    prompt = model.template_tokens + model.tokens_per_char * prompt_chars - model.cached_tokens
    return model.overhead_s + max(prompt, 0.0) / model.prefill_tps + tokens / rate


# --- running --------------------------------------------------------------------------------------


def jobs_of(setups: Sequence[Setup], seeds: Sequence[int]) -> tuple[Job, ...]:
    """Every trial to run once, seed by seed; `hindsight` as its whole grid."""
    wide = [inner for setup in setups for inner in (grid(setup) if setup.policy == HINDSIGHT else (setup,))]
    return tuple((setup, seed) for seed in seeds for setup in dict.fromkeys(wide))


def run_jobs(
    jobs: Sequence[Job],
    house: House,
    workload: Callable[[int], Workload],
    processes: int,
    warm_start: int = 0,
) -> Iterator[Trial]:
    """Trials as they end, each after `warm_start` rated requests of another seed that are not counted.

    Leaving early (Ctrl-C too) stops the rest at once. Raises BadInput (field `warm_start`) before the first trial
    when there are too few queries for it, CalmError when a process is killed from outside.
    """
    loads = {seed: load_of(workload, seed, warm_start) for seed in dict.fromkeys(seed for _, seed in jobs)}
    if processes <= 1 or len(jobs) <= 1:
        own = with_changed(house, minilm=remembering(house.minilm))
        for setup, seed in jobs:
            counted, warm = loads[seed]
            yield run_trial(own, counted, setup, warm)
        return
    yield from _pooled(jobs, house, loads, min(processes, len(jobs)))


def load_of(workload: Callable[[int], Workload], seed: int, warm_start: int) -> Load:
    """Raises BadInput as `warm_up` does."""
    counted = workload(seed)
    return counted, warm_up(workload, counted, warm_start) if warm_start else None


def _pooled(jobs: Sequence[Job], house: House, loads: Mapping[int, Load], processes: int) -> Iterator[Trial]:
    others = frozenset(active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(house,)
    )
    todo: set[Future[Trial]] = set()
    try:
        todo = {pool.submit(_work, loads[seed], setup) for setup, seed in jobs}
        while todo:
            done, todo = wait(todo, return_when=FIRST_COMPLETED)
            yield from (trial.result() for trial in done)
    except BrokenProcessPool:
        raise CalmError(
            "a process that ran trials was ended from outside, perhaps for want of memory; give fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if todo:  # a trial takes minutes: whoever leaves early must not have to wait for those under way
            for worker in set(active_children()) - others:
                worker.terminate()


_house: list[House] = []
"""Of a worker process: set once when it starts, so that the fleet and its embeddings are not sent with each job."""


def _start_worker(house: House) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _house[:] = [with_changed(house, minilm=remembering(house.minilm))]


def _work(load: Load, setup: Setup) -> Trial:
    counted, warm = load
    return run_trial(_house[0], counted, setup, warm)


# --- weights in hindsight ---------------------------------------------------------------------------


def grid(setup: Setup) -> tuple[Setup, ...]:
    """The static weights that `hindsight` tries, each as a setup of its own."""
    steps = range(GRID_STEPS + 1)
    points = [(a, b, GRID_STEPS - a - b) for a in steps for b in steps if a + b <= GRID_STEPS]
    return tuple(
        replace(
            setup, goal=f"latency={a / GRID_STEPS:g},energy={b / GRID_STEPS:g},quality={c / GRID_STEPS:g}"
        )
        for a, b, c in points
    )


def best_in_hindsight(trials: Sequence[Trial], wanted: Weights) -> tuple[Trial, ...]:
    """Of the grid's trials those of the weights with the least observed QoS loss over all seeds."""
    by_goal: dict[str | None, list[Trial]] = {}
    for trial in trials:
        by_goal.setdefault(trial.setup.goal, []).append(trial)
    if not by_goal:
        return ()
    best = min(by_goal, key=lambda goal: fmean(qos_loss(trial, wanted) for trial in by_goal[goal]))
    return tuple(by_goal[best])


def qos_loss(trial: Trial, weights: Weights) -> float:
    """The score of plan.score on what came out: quality lost, octaves of seconds and of joules over 4."""
    served = [row for row in trial.rows if row.status == "ok"]
    if not served:
        return math.inf
    lost = 1.0 - sum(row.quality or 0.0 for row in served) / len(trial.rows)
    seconds = fmean(math.log2(max(row.total_s, 0.01)) for row in served) / 4
    joules = [math.log2(max(row.energy_j, 0.01)) / 4 for row in served if row.energy_j is not None]
    spent = fmean(joules) if joules else 0.0
    return weights.quality * lost + weights.latency * seconds + weights.energy * spent


def chosen(setups: Sequence[Setup], trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials of a study in the order asked for, each `hindsight` reduced to its best weights."""
    found: list[Trial] = []
    for setup in setups:
        if setup.policy == HINDSIGHT:
            points = frozenset(grid(setup))
            wanted = goal_book.read_aim(setup.goal).wanted
            found += best_in_hindsight([t for t in trials if t.setup in points], wanted)
        else:
            found += [t for t in trials if t.setup == setup]
    return tuple(found)
