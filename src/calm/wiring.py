"""The composition root: builds every object once, starts them in order, stops them in reverse.

Nothing else in CALM constructs an adapter. `run_server` is what `calm serve` calls.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from msgspec.structs import replace

from calm import settings as configuration
from calm.analyze.analyzer import Analyzer
from calm.backends.command import CommandBackend
from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.onnx import OnnxBackend
from calm.backends.remote import RemoteBackend
from calm.backends.upstream import HttpUpstream
from calm.clock import SystemClock
from calm.control import Control
from calm.errors import SourceError
from calm.execute.dispatch import Dispatcher
from calm.execute.events import Limits as ResidencyLimits
from calm.execute.executor import Executor
from calm.gateway.app import build_app
from calm.gateway.auth import Guard, Keys
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.relay import encode_for
from calm.gateway.server import check_bind, start
from calm.intake import Intake
from calm.journal import Journal
from calm.loop import Orchestrator, Parts, Steering
from calm.meters.choose import MeterSettings, probe
from calm.meters.cpu_time import CpuTimeMeter
from calm.meters.ledger import EnergyLedger
from calm.monitor.embed import MiniLmEmbedder, StaticEmbedder
from calm.monitor.language import LanguageDetector
from calm.monitor.resources import Resources
from calm.monitor.window import Workload
from calm.plan import goals as goal_book
from calm.plan.floor import keeper, tuning_for
from calm.plan.policies import make_policy
from calm.ports import Embedder, Policy
from calm.records import ModelCard, ModelState, Residency
from calm.settings import Settings
from calm.sources.assets import cached_minilm
from calm.stores.sqlite import SqliteStore

log = logging.getLogger(__name__)

ADAPT_S = 1.0
"""Period of the adaptation loop."""


async def run_server(settings: Settings, *, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Calls `on_ready(url)` when requests are taken."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        house = await build(settings, stack)
        gc.collect()
        gc.freeze()  # what is built lives as long as the server: no pause to look through it again and again
        on_ready(house.url)
        await stop.wait()
        log.info("closing: running answers get %g s to finish", settings.server.shutdown_grace_s)


@dataclass(frozen=True)
class House:
    """A running CALM."""

    url: str
    control: Control
    loop: Orchestrator
    executor: Executor


async def build(settings: Settings, stack: AsyncExitStack) -> House:
    """Build and start everything; leaving `stack` stops it in reverse order. Raises CalmError."""
    clock, cache = SystemClock(), configuration.cache_dir()
    keys = Keys(configuration.keys_path())
    loopback = check_bind(settings.server.host, keys, insecure=settings.server.insecure)
    store = open_store(settings, clock)
    stack.callback(store.close)
    meter = probe(MeterSettings(meter=settings.energy.meter, watts_per_core=settings.energy.watts_per_core))
    watts = meter.chosen.watts_per_core if isinstance(meter.chosen, CpuTimeMeter) else None
    ledger = EnergyLedger(meter.chosen, clock)
    run_dir = stack.enter_context(runtime_directory())
    upstream = await stack.enter_async_context(HttpUpstream(configuration.secret))
    metrics = Metrics(lambda name: name in orchestrator.fleet)
    embedder = make_embedder(settings.policy.embedder, cache)
    resources = Resources()

    intake = Intake(
        configuration.fleet_dir(settings),
        cache,
        fetch=settings.fleet.fetch,
        on_fleet=lambda fleet, missing: orchestrator.use_fleet(completed(fleet, settings, watts), missing),
    )
    executor = Executor(
        {},
        {
            "llamacpp": LlamaCppBackend(run_dir),
            "onnx": OnnxBackend(run_dir),
            "command": CommandBackend(run_dir),
            "openai": RemoteBackend(configuration.secret),
        },
        intake.weights,
        clock,
        residency_limits(settings, resources.cores()),
        queue=settings.scheduling.queue,
        eviction=settings.memory.eviction,
    )
    stack.push_async_callback(executor.close, settings.server.shutdown_grace_s)

    def policy(spec: str, quality_floor: float | None = None) -> Policy:
        return make_policy(
            spec,
            embedder=lambda: load_minilm(cache),
            seed=settings.policy.seed,
            models=list(intake.cards) or None,
            tuning=tuning_for(quality_floor),
        )

    orchestrator = Orchestrator(
        Parts(
            clock=clock,
            executor=executor,
            dispatcher=Dispatcher(
                executor=executor,
                upstream=upstream,
                ledger=ledger,
                clock=clock,
                encode=encode_for,
                attempts=settings.policy.attempts,
            ),
            analyzer=Analyzer(embedder),
            workload=Workload(),
            resources=resources,
            ledger=ledger,
            store=store,
            embedder=embedder,
            language=LanguageDetector(),
            deadline_s=settings.server.deadline_s,
            on_outcome=lambda ask, decision, outcome: metrics.observe(outcome, decision),
        ),
        Steering(policy=policy("least-loaded"), preload=settings.memory.preload),
    )
    steer(orchestrator.steering, settings)
    journal = Journal(clock, store, [orchestrator.moved, counted(metrics, executor.snapshot_models)])
    executor.subscribe(journal.moved)
    await intake.start()
    orchestrator.steering.policy = policy(settings.policy.name, settings.policy.quality_floor)
    orchestrator.recall()
    await orchestrator.adapt()  # warming begins before the first request
    stack.callback(orchestrator.checkpoint)

    control = Control(
        loop=orchestrator,
        executor=executor,
        intake=intake,
        journal=journal,
        recall=store,
        events=store,
        make_policy=policy,
        spec=settings.policy.name,
    )
    for work in (
        intake.follow(),
        every(ADAPT_S, orchestrator.adapt),
        every(settings.knowledge.checkpoint_s, saving(orchestrator, store, metrics)),
    ):
        stack.push_async_callback(cancelled, asyncio.ensure_future(work))
    app = build_app(control, guard(settings, keys, loopback), door_limits(settings), metrics, clock)
    server = await start(app, settings.server.host, settings.server.port)
    stack.push_async_callback(server.stop, settings.server.shutdown_grace_s)
    return House(url=server.url, control=control, loop=orchestrator, executor=executor)


# --- parts ------------------------------------------------------------------------------------------


def open_store(settings: Settings, clock: SystemClock) -> SqliteStore:
    path = configuration.knowledge_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    return SqliteStore(
        path,
        store_prompts=settings.knowledge.store_prompts,
        retention_days=settings.knowledge.retention_days,
        max_requests=settings.knowledge.max_requests,
        clock=clock,
    )


def residency_limits(settings: Settings, available_cores: int) -> ResidencyLimits:
    return ResidencyLimits(
        cores=settings.scheduling.cores or available_cores,
        budget_bytes=configuration.budget_bytes(settings),
        max_queue=settings.server.max_queue,
        bypass_s=settings.scheduling.bypass_s,
        idle_unload_s=settings.memory.idle_unload_s,
    )


def door_limits(settings: Settings) -> Limits:
    return Limits(max_body_bytes=settings.server.max_body_bytes, ping_s=settings.server.ping_s)


def guard(settings: Settings, keys: Keys, loopback: bool) -> Guard:
    return Guard(
        keys,
        loopback=loopback,
        insecure=settings.server.insecure,
        allowed_hosts=settings.server.allowed_hosts,
        allowed_origins=settings.server.cors_origins,
    )


def steer(steering: Steering, settings: Settings) -> None:
    """The operator's goals, weights and floor under quality. Raises BadInput when the goal is unknown."""
    steering.goals.update(settings.goals)
    goal_book.named(settings.policy.goal, field="policy.goal", goals=steering.goals)
    steering.goal, steering.weights = settings.policy.goal, settings.policy.weights
    steering.floor = keeper(settings.policy.quality_floor)


def make_embedder(kind: str, cache: Path) -> Embedder | None:
    if kind == "none":
        return None
    return make_minilm(cache) if kind == "minilm" else StaticEmbedder()


def make_minilm(cache: Path) -> Embedder:
    """Raises SourceError when its weights are not in the cache."""
    try:
        return load_minilm(cache)
    except FileNotFoundError as error:
        raise SourceError(f"policy.embedder: {error}; `calm models pull --assets` fetches it") from None


def load_minilm(cache: Path) -> Embedder:
    found = cached_minilm(cache)
    if found is None:
        raise FileNotFoundError("MiniLM is not in the cache")
    return MiniLmEmbedder(*found)


def completed(
    fleet: Mapping[str, ModelCard], settings: Settings, watts_per_core: float | None
) -> Mapping[str, ModelCard]:
    """The cards with what they leave open and this machine knows: threads, and joules per token."""
    return {
        name: with_energy(with_threads(card, settings.scheduling.threads), watts_per_core)
        for name, card in fleet.items()
    }


def with_threads(card: ModelCard, threads: int | None) -> ModelCard:
    """The operator's thread count for a card that names none."""
    if threads is None or card.engine.threads is not None or card.remote:
        return card
    return replace(card, engine=replace(card.engine, threads=threads))


def with_energy(card: ModelCard, watts_per_core: float | None) -> ModelCard:
    """Where the meter is the CPU-time model, a stated decode rate already says what a token takes."""
    priors = card.priors
    if watts_per_core is None or card.remote or priors.energy_j_per_token or not priors.decode_tps:
        return card
    joules = watts_per_core * (card.engine.threads or 1) / priors.decode_tps
    return replace(card, priors=replace(priors, energy_j_per_token=joules))


def counted(
    metrics: Metrics, states: Callable[[], Mapping[str, ModelState]]
) -> Callable[[str, Residency, Residency], None]:
    """Residency changes that metrics count; `states` tells how long a load took."""

    def moved(model: str, old: Residency, new: Residency) -> None:
        if old == "loading" and new in ("ready", "failed"):
            state = states().get(model) if new == "ready" else None
            metrics.loaded(model, state.load_s if state else None)
        if new == "unloading" and old in ("ready", "draining"):
            metrics.evicted(model)

    return moved


def saving(orchestrator: Orchestrator, store: SqliteStore, metrics: Metrics) -> Callable[[], Awaitable[None]]:
    """Checkpoint the learned state, and tell metrics what the writer had to drop."""
    told = 0

    async def save() -> None:
        nonlocal told
        orchestrator.checkpoint()
        metrics.drop(store.dropped - told)
        told = store.dropped

    return save


async def every(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    """Repeat until cancelled; an adaptation that fails is logged and must not stop the serving."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await action()
        except Exception:
            log.exception("adaptation failed; serving goes on")


async def cancelled(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """A private directory for sockets, gone afterwards; those of dead processes are swept."""
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    parent = parent if parent.is_dir() and os.access(parent, os.W_OK) else Path(tempfile.gettempdir())
    for stale in parent.glob("calm-run-*"):
        owner = stale.name.split("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"calm-run-{os.getpid()}-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
