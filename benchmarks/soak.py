"""Ten times what this machine can serve, clients that hang up, an engine killed: does CALM keep its word?

Starts `calm serve` on the default fleet with a memory budget that holds only two of its three models, so that
residency is under pressure too. First a closed loop (as many clients as the engines have slots) finds how
many requests per second the machine sustains with this mix of prompts. Then requests arrive at ten times
that rate (Poisson, seeded), all streamed, each with a deadline; some clients leave at a random moment, and at
half of the arrivals a busy engine gets SIGKILL. Afterwards the clients' view, 100 ms samples of the server's
state, its records and its processes are compared: one line per claim, exit code 1 when one does not hold.

    make bench-soak                                    # 1,000 requests
    python benchmarks/soak.py --requests 200           # a quick look
    python benchmarks/soak.py --budget 60% --seed 7    # all models in memory, other arrivals
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gateway import free_port, wait_ready
from benchmarks.soak_claims import (
    Kill,
    Sample,
    Seen,
    Verdict,
    figures,
    judge,
    percentile,
    read_records,
)
from benchmarks.soak_client import Call, Clients, Ending, calls

REPOSITORY = Path(__file__).parents[1]
SAMPLE_S = 0.1
MEMORY_EVERY = 5
"""Processes and their memory are read at every fifth sample: the kernel walks page tables for it."""
WARM_UP_S = 8.0
PATIENT_S = 120.0
"""Deadline of the requests that only find the capacity."""
READY_S = 900.0
"""At most, from start to ready: a machine without the weights has to fetch them."""
STOP_S = 30.0
KILL_WITHIN_S = 10.0


# --- the server under test ------------------------------------------------------------------------


class Server:
    """One `calm serve` and everything it ever started."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, root: Path) -> None:
        self.process = process
        self.url = url
        self.root = root
        self._family: dict[int, psutil.Process] = {}

    @property
    def database(self) -> Path:
        return self.root / "state" / "knowledge.sqlite3"

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def note_children(self) -> None:
        """Remember who lives below the server now, to look for them when it is gone."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._family.setdefault(child.pid, child)

    def engines(self) -> dict[str, psutil.Process]:
        """Model -> its engine's process, by the parameter file each is started with."""
        found: dict[str, psutil.Process] = {}
        for child in self._family.values():
            with suppress(psutil.Error, OSError, ValueError, KeyError, IndexError):
                arguments = child.cmdline()
                if arguments[-2].endswith("llamacpp_child.py"):
                    found[json.loads(Path(arguments[-1]).read_text())["set"]["model_alias"]] = child
        return found

    def engines_bytes(self) -> int:
        """Proportional set size of all engines, where the system tells it."""
        self.note_children()
        total = 0
        for engine in self.engines().values():
            with suppress(psutil.Error):
                memory = engine.memory_full_info()
                total += int(getattr(memory, "pss", memory.rss))
        return total

    def stop(self, seen: Seen) -> None:
        """SIGTERM, and what is left afterwards."""
        self.note_children()
        started_s = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            seen.exit_code = self.process.wait(STOP_S)
        seen.exit_s = time.perf_counter() - started_s
        _, alive = psutil.wait_procs(list(self._family.values()), timeout=1.0)
        seen.left_behind = [f"process {one.pid}" for one in alive]
        seen.left_behind += [str(path.name) for path in (self.root / "run").glob("*")]


@contextmanager
def server(args: argparse.Namespace, root: Path) -> Iterator[Server]:
    """A server with a state, a run directory and settings of its own; killed if the run breaks off."""
    for name in ("state", "run"):
        (root / name).mkdir(parents=True, exist_ok=True)
    config = root / "calm.toml"
    config.write_text(f'[server]\nmax_queue = {args.queue}\n\n[memory]\nbudget = "{args.budget}"\n')
    port = free_port()
    command = [str(Path(sys.executable).with_name("calm")), "serve", "--config", str(config)]
    command += ["--fleet", str(args.fleet), "--port", str(port)]
    with (root / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(os.environ, root), stdout=log, stderr=log)
        try:
            try:
                wait_ready(f"http://127.0.0.1:{port}/readyz", process, READY_S)
            except SystemExit as error:
                raise SystemExit(f"{last_lines(root / 'server.log')}\n{error}") from None
            yield Server(process, f"http://127.0.0.1:{port}", root)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def environment(ours: Mapping[str, str], root: Path) -> dict[str, str]:
    """Ours, less the settings in it; the weights' cache stays where it is."""
    kept = {k: v for k, v in ours.items() if not re.fullmatch(r"CALM_[A-Z]+__\w+|CALM_CONFIG", k)}
    return {**kept, "CALM_STATE_DIR": str(root / "state"), "XDG_RUNTIME_DIR": str(root / "run")}


# --- watching -------------------------------------------------------------------------------------


def to_sample(at_s: float, snapshot: Mapping[str, object]) -> Sample:
    number: Callable[[str], int] = lambda key: int(str(snapshot[key]))  # noqa: E731
    return Sample(
        at_s=at_s,
        budget_bytes=number("budget_bytes"),
        used_bytes=number("used_bytes"),
        cores=number("cores"),
        threads_in_use=number("threads_in_use"),
        queue_length=number("queue_length"),
        in_flight=number("in_flight"),
    )


@asynccontextmanager
async def watching(house: Server, clients: Clients, seen: Seen) -> AsyncIterator[None]:
    """Sample the server's state until the block ends."""

    async def watch() -> None:
        started_s, number = time.perf_counter(), 0
        while True:
            with suppress(aiohttp.ClientError):
                seen.samples.append(to_sample(time.perf_counter() - started_s, await clients.snapshot()))
            if number % MEMORY_EVERY == 0:
                now_bytes = await asyncio.to_thread(house.engines_bytes)
                seen.engines_peak_bytes = max(seen.engines_peak_bytes, now_bytes)
            number += 1
            await asyncio.sleep(SAMPLE_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def models_of(clients: Clients) -> dict[str, dict[str, object]]:
    snapshot = await clients.snapshot()
    models = snapshot["models"]
    assert isinstance(models, dict)
    return models


# --- the phases -----------------------------------------------------------------------------------


async def calibrate(url: str, args: argparse.Namespace, progress: Progress) -> float:
    """Requests per second that complete in a closed loop of as many clients as there are slots."""
    async with Clients(url, PATIENT_S, hung_after_s=PATIENT_S) as clients:
        first = await ask_each(clients, ["calm"])
        if first["calm"] != "complete":
            raise SystemExit(f"the first request ended as {first['calm']!r}: nothing to measure here")
        return await closed_loop(clients, args, progress)


async def closed_loop(clients: Clients, args: argparse.Namespace, progress: Progress) -> float:
    models = await models_of(clients)
    slots = sum(int(str(state["slots"])) for state in models.values())
    supply = iter(
        calls(100_000, list(models), 1.0, seed=args.seed + 1, leavers=0.0, patience_s=1.0, name="calibrate")
    )
    finished_s: list[float] = []
    started_s = time.perf_counter()
    bar = progress.add_task("calibrating", total=int(WARM_UP_S + args.calibrate))

    async def customer() -> None:
        while time.perf_counter() - started_s < WARM_UP_S + args.calibrate:
            ending = await clients.ask(next(supply))
            if ending.how == "complete":
                finished_s.append(time.perf_counter() - started_s)
            progress.update(bar, completed=min(time.perf_counter() - started_s, WARM_UP_S + args.calibrate))

    await asyncio.gather(*(customer() for _ in range(slots)))
    counted: int = sum(WARM_UP_S <= at_s < WARM_UP_S + args.calibrate for at_s in finished_s)
    if not counted:
        raise SystemExit("no request completed during calibration: see the server's log (--keep DIR)")
    return counted / float(args.calibrate)


async def offer(
    house: Server, clients: Clients, plan: list[Call], seen: Seen, progress: Progress
) -> list[Ending]:
    """Send every call at its time, whatever the server does; kill an engine at half of them."""
    bar = progress.add_task("offering", total=len(plan))
    started_s, lags_s = time.perf_counter(), []
    running: list[asyncio.Task[Ending]] = []

    async def client(call: Call) -> Ending:
        sent_s = time.perf_counter() - started_s
        lags_s.append(sent_s - call.at_s)
        ending = replace(await clients.ask(call), at_s=sent_s)
        progress.advance(bar)
        return ending

    killing: asyncio.Task[None] | None = None
    for number, call in enumerate(plan):
        await asyncio.sleep(max(0.0, started_s + call.at_s - time.perf_counter()))
        if number == len(plan) // 2:
            killing = asyncio.create_task(kill_a_busy_engine(house, clients, seen, started_s))
        running.append(asyncio.create_task(client(call)))
    seen.offered_rps = len(plan) / (time.perf_counter() - started_s)
    endings = list(await asyncio.gather(*running))
    seen.lag_p99_s = percentile(lags_s, 0.99)
    if killing is not None:
        await killing
    return endings


async def kill_a_busy_engine(house: Server, clients: Clients, seen: Seen, started_s: float) -> None:
    """SIGKILL to the engine with the most requests in flight."""
    give_up_s = time.perf_counter() + KILL_WITHIN_S
    while seen.kill is None and time.perf_counter() < give_up_s:
        house.note_children()
        models, engines = await models_of(clients), house.engines()
        busy = {name: int(str(state["in_flight"])) for name, state in models.items() if name in engines}
        model = max(busy, key=lambda name: busy[name], default=None)
        if model is not None and busy[model]:
            engines[model].send_signal(signal.SIGKILL)
            at_s = time.perf_counter() - started_s
            seen.kill = Kill(model=model, pid=engines[model].pid, at_s=at_s, in_flight=busy[model])
            return
        await asyncio.sleep(0.05)


async def quiet(clients: Clients, within_s: float = 5.0) -> Sample:
    """The server's state once nothing is held any more, or as it is when time is up."""
    give_up_s = time.perf_counter() + within_s
    while True:
        last = to_sample(0.0, await clients.snapshot())
        if (
            not (last.queue_length or last.in_flight or last.threads_in_use)
            or time.perf_counter() > give_up_s
        ):
            return last
        await asyncio.sleep(SAMPLE_S)


async def ask_each(clients: Clients, models: list[str]) -> dict[str, str]:
    """One more request to every model: who was killed or evicted has to come back."""
    found: dict[str, str] = {}
    for name in models:
        ending = await clients.ask(
            Call(tag=f"after-{name}", at_s=0.0, model=name, prompt="Say hello.", max_tokens=8)
        )
        found[name] = " ".join(filter(None, (ending.how, ending.code)))
    return found


def dropped_records(metrics: str) -> float | None:
    found = re.search(r"^calm_records_dropped_total ([0-9.e+-]+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


async def soak(house: Server, args: argparse.Namespace, progress: Progress) -> Seen:
    seen = Seen(deadline_s=args.deadline, max_queue=args.queue)
    async with Clients(house.url, args.deadline, hung_after_s=args.deadline + 15.0) as clients:
        models = list(await models_of(clients))
        async with watching(house, clients, seen):
            seen.capacity_rps = args.capacity or await calibrate(house.url, args, progress)
            await quiet(clients)
            seen.rss_before_bytes = house.rss_bytes()
            seen.wanted_rps = seen.capacity_rps * args.overload
            plan = calls(
                args.requests,
                models,
                seen.wanted_rps,
                seed=args.seed,
                leavers=args.leavers,
                patience_s=args.deadline / 2,
                name="soak",
            )
            seen.wanted_rps = len(plan) / plan[-1].at_s  # what this draw of arrivals comes to
            seen.endings = await offer(house, clients, plan, seen, progress)
            seen.drained = await quiet(clients)
            seen.answers_after = await ask_each(clients, models)
            seen.dropped = dropped_records(await clients.text("/metrics"))
        seen.rss_after_bytes = house.rss_bytes()
    return seen


# --- the report -----------------------------------------------------------------------------------


def report(seen: Seen, verdicts: list[Verdict]) -> str:
    found = figures(seen)
    lines = [
        f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        f"capacity {seen.capacity_rps:.2f} requests/s, offered {seen.offered_rps:.1f}, "
        f"completed {found['completed_rps']:.2f}/s; "
        f"deadline {seen.deadline_s:g} s, queue limit {seen.max_queue}\n",
    ]
    lines += [f"  {count:5}  {how}" for how, count in pairs(found["endings"])]
    lines += [f"\n{'seconds':26} {'p50':>8} {'p99':>8} {'max':>8}"]
    for name in ("accepted_ttft_s", "accepted_total_s", "complete_total_s", "refusal_s"):
        row = found[name]
        if isinstance(row, dict):
            cells = " ".join(f"{row[key]:8.3f}" for key in ("p50", "p99", "max"))
            lines.append(f"{name.removesuffix('_s').replace('_', ' '):26} {cells}")
    lines += [
        f"\ncompleted by model: {', '.join(f'{model} {count}' for model, count in pairs(found['models']))}",
        f"records: {found['records']} ({', '.join(f'{s} {n}' for s, n in pairs(found['statuses']))}), "
        f"{found['failed_over']} answered by a second choice",
        f"killed: {killed(seen)}",
        f"memory of models: peak {mb(found['used_peak_bytes'])} of {mb(found['budget_bytes'])} "
        f"by CALM's account, {mb(found['engines_peak_bytes'])} (PSS) from outside",
        f"threads: peak {found['threads_peak']} of {found['cores']}; queue: peak {found['queue_peak']}",
        f"server's own memory: {mb(seen.rss_before_bytes)} before, {mb(seen.rss_after_bytes)} after; "
        f"shut down in {seen.exit_s:.2f} s; {found['samples']} samples; "
        f"the clients' own lag p99 {1000 * seen.lag_p99_s:.0f} ms\n",
    ]
    lines += [
        f"{'PASS' if v.holds else 'FAIL'}  {v.claim}{': ' if v.detail else ''}{v.detail}" for v in verdicts
    ]
    return "\n".join(lines)


def killed(seen: Seen) -> str:
    if seen.kill is None:
        return "none"
    return f"{seen.kill.model} with {seen.kill.in_flight} in flight, {seen.kill.at_s:.1f} s after the start"


def pairs(counts: object) -> list[tuple[str, int]]:
    assert isinstance(counts, dict)
    return list(counts.items())


def mb(size_bytes: object) -> str:
    return f"{int(str(size_bytes)) / 1e6:.0f} MB"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000, help="requests offered (default 1000)")
    parser.add_argument("--overload", type=float, default=10.0, help="times the capacity (default 10)")
    parser.add_argument(
        "--capacity", type=float, help="requests/s to take as the capacity instead of measuring it"
    )
    parser.add_argument("--calibrate", type=float, default=45.0, help="seconds of calibration (default 45)")
    parser.add_argument(
        "--leavers", type=float, default=0.1, help="share of clients that hang up (default 0.1)"
    )
    parser.add_argument(
        "--deadline", type=float, default=20.0, help="seconds each request allows (default 20)"
    )
    parser.add_argument("--queue", type=int, default=16, help="server.max_queue (default 16)")
    parser.add_argument(
        "--budget", default="1000MB", help="memory.budget (default 1000MB: two of the three default models)"
    )
    parser.add_argument("--fleet", type=Path, default=REPOSITORY / "fleet", help="directory of cards")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, prompts and disconnects")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the server's log and records here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args(given)
    if args.requests < 2 or args.overload <= 0 or not 0 <= args.leavers <= 1 or args.deadline <= 0:
        parser.error("--requests at least 2, --overload and --deadline above 0, --leavers from 0 to 1")
    return args


def run(args: argparse.Namespace, root: Path) -> int:
    import uvloop

    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with server(args, root) as house, Progress(*columns, console=Console(stderr=True)) as progress:
        seen = uvloop.run(soak(house, args, progress))
        house.stop(seen)
    seen.stored = read_records(house.database, "soak-")
    verdicts = judge(seen)
    print(report(seen, verdicts))
    if args.json:
        claims = [{"claim": v.claim, "holds": v.holds, "detail": v.detail} for v in verdicts]
        args.json.write_text(json.dumps({"figures": figures(seen), "claims": claims}, indent=2))
    failed = not all(v.holds for v in verdicts)
    if failed:
        print(f"\nthe server's last words:\n{last_lines(root / 'server.log')}", file=sys.stderr)
    return int(failed)


def last_lines(log: Path, count: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="calm-soak-") as scratch:
        root = args.keep.resolve() if args.keep else Path(scratch)
        raise SystemExit(run(args, root))


if __name__ == "__main__":
    main()
