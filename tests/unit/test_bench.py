"""`calm bench` without a server: the order of trials, what a row is made of, what is refused."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from calm.bench import progress
from calm.bench.campaign import Campaign, Job, Terms, interleaved, still_missing
from calm.bench.client import Answer, chat_body, rating, take
from calm.bench.progress import Board, in_short, in_words, remaining_s
from calm.bench.server import as_toml, environment, settings_for
from calm.bench.trials import (
    Ledger,
    duration_s,
    hit,
    loads,
    residency_at,
    row_of,
    timeline,
    with_adapters,
)
from calm.cli.bench import HINDSIGHT, bench
from calm.cli.group import RootGroup
from calm.errors import BadInput
from calm.records import (
    Belief,
    Candidate,
    Decision,
    Estimate,
    Features,
    Outcome,
    OutcomeStatus,
    Reading,
    StoredRequest,
    Weights,
)
from calm.report.records import Move, Setup, Trial
from calm.settings import PolicySettings, Settings, load_settings
from calm.workloads.records import Query, Workload
from calm.workloads.workload import rated, warm_up

CALM, LRU, RANDOM = (
    Setup(policy=p, cache=c) for p, c in (("calm", "calm"), ("calm", "lru"), ("random", "calm"))
)


# --- the order of trials ----------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_setup_meets_every_seed_once_and_seeds_are_blocks(setups: int, seeds: int) -> None:
    given_setups = [Setup(policy=f"fixed:m{n}", cache="calm") for n in range(setups)]
    jobs = interleaved(given_setups, range(seeds))
    assert Counter(jobs) == Counter(Job(s, seed) for s in given_setups for seed in range(seeds))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


def test_the_order_within_a_seed_is_drawn_and_repeatable() -> None:
    setups = [Setup(policy=f"fixed:m{n}", cache="calm") for n in range(6)]
    jobs = interleaved(setups, (0, 1))
    orders = [[job.setup.policy for job in jobs if job.seed == seed] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert interleaved(setups, (0, 1)) == jobs


def test_finished_trials_are_not_run_again() -> None:
    jobs = interleaved((CALM, LRU), (0, 1))
    done = [trial(jobs[0].setup, jobs[0].seed), trial(jobs[3].setup, jobs[3].seed)]
    assert still_missing(jobs, done) == jobs[1:3]
    assert still_missing(jobs, []) == jobs


def trial(setup: Setup, seed: int, **fields: object) -> Trial:
    base = {
        "workload": "w",
        "engine": "real",
        "rows": (),
        "duration_s": 1.0,
        "budget_bytes": 1,
        "peak_bytes": 0,
    }
    return Trial(setup=setup, seed=seed, **{**base, "loads": 0, **fields})  # type: ignore[arg-type]


# --- warming up -------------------------------------------------------------------------------------


def workload(names: Sequence[str], seed: int = 0) -> Workload:
    queries = tuple(Query(id=name, dataset="d", domain="math", prompt=f"{name}?") for name in names)
    return Workload(
        name="w", seed=seed, arrivals_s=tuple(float(i) for i in range(len(names))), queries=queries
    )


def test_a_warm_start_asks_nothing_that_is_counted_and_keeps_the_rhythm() -> None:
    others = {True: workload(["a", "b", "x"]), False: workload(["y", "c", "z"])}
    seeds: list[int] = []

    def of(seed: int) -> Workload:
        seeds.append(seed)
        return others[len(seeds) == 1]

    warm = warm_up(of, workload(["a", "b", "c"]), 3)
    assert [query.id for query in warm.queries] == ["x", "y", "z"]
    assert list(warm.arrivals_s) == sorted(warm.arrivals_s)
    assert len(set(seeds)) == 2
    assert 0 not in seeds


def test_a_warm_start_beyond_the_set_is_refused() -> None:
    with pytest.raises(BadInput, match="too few queries"):
        warm_up(lambda seed: workload(["a", "b"]), workload(["a", "b"]), 1)


# --- the server's settings ----------------------------------------------------------------------------


def settings(setup: Setup, base: Settings | None = None) -> Settings:
    return settings_for(
        base or Settings(), setup, seed=3, fleet=Path("/fleet"), budget_bytes=1000, deadline_s=9.0
    )


@pytest.mark.parametrize("cache", ["calm", "calm:2", "lru", "lru:3", "fifo", "none"])
def test_a_trials_configuration_file_says_what_the_setup_says(cache: str, tmp_path: Path) -> None:
    setup = Setup(policy="random", cache=cache, queue="stcf", goal="energy")
    file = tmp_path / "calm.toml"
    file.write_text(as_toml(settings(setup)))
    read = load_settings(file, environ={})
    assert read == settings(setup)
    assert (read.policy.name, read.policy.goal, read.policy.seed) == ("random", "energy", 3)
    assert (read.memory.budget, read.memory.preload) == ("1000", cache.startswith("calm"))
    assert read.memory.eviction == ("calm" if cache == "none" else cache)
    assert (read.scheduling.queue, read.server.deadline_s, read.server.port) == ("stcf", 9.0, 0)


def test_the_machines_own_settings_stay_and_the_users_own_knowledge_is_not_touched() -> None:
    base = load_settings(
        None,
        environ={
            "CALM_ENERGY__WATTS_PER_CORE": "7",
            "CALM_SCHEDULING__CORES": "1",
            "CALM_KNOWLEDGE__PATH": "/home/me/knowledge.sqlite3",
            "CALM_POLICY__GOAL": "quality",
        },
    )
    made = settings(CALM, base)
    assert (made.energy.watts_per_core, made.scheduling.cores) == (7.0, 1)
    assert (made.knowledge.path, made.policy.goal) == (None, "balanced")


@pytest.mark.parametrize(
    ("goal", "name", "weights", "floor"),
    [
        (None, "balanced", None, None),
        ("energy", "energy", None, None),
        ("night", "night", None, None),
        ("latency=1, quality=2", "balanced", Weights(latency=1, energy=0, quality=2), None),
        ("quality>=0.7", "balanced", None, 0.7),
        ("energy,quality>=0.7", "energy", None, 0.7),
        ("latency=1,quality>=0.7", "balanced", Weights(latency=1, energy=0, quality=0), 0.7),
    ],
)
def test_a_goal_is_a_name_weights_a_floor_or_both(
    goal: str | None, name: str, weights: Weights | None, floor: float | None, tmp_path: Path
) -> None:
    mine = Settings(goals={"night": Weights()}, policy=PolicySettings(quality_floor=0.2))
    file = tmp_path / "calm.toml"
    file.write_text(as_toml(settings(Setup(policy="calm", cache="calm", goal=goal), mine)))
    policy = load_settings(file, environ={}).policy
    assert (policy.goal, policy.weights, policy.quality_floor) == (name, weights, floor)


@pytest.mark.parametrize("wrong", ["latency=much", "latency=-1", "speed=1", "speed", "quality>=7"])
def test_a_goal_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(BadInput):
        settings(Setup(policy="calm", cache="calm", goal=wrong))


def test_the_servers_environment_has_no_setting_of_ours() -> None:
    made = environment({"CALM_POLICY__NAME": "x", "PATH": "/bin"}, Path("/r"), Path("/weights"))
    assert made["PATH"] == "/bin"
    assert "CALM_POLICY__NAME" not in made
    assert made["CALM_CACHE_DIR"] == "/weights"
    assert all(made[name].startswith("/r/") for name in ("CALM_CONFIG", "CALM_STATE_DIR", "XDG_RUNTIME_DIR"))


# --- the clients' side ------------------------------------------------------------------------------


def chunk(content: str) -> bytes:
    return json.dumps({"choices": [{"delta": {"content": content}}]}).encode()


def test_a_stream_is_read_to_its_end() -> None:
    answer = Answer()
    for payload in (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', chunk("4"), chunk("2")):
        assert not take(answer, payload, due_s=0.0)
        assert (answer.ttft_s is None) == (answer.text == "")
    assert take(answer, b"[DONE]", due_s=0.0)
    assert (answer.status, answer.text) == ("ok", "42")


@pytest.mark.parametrize(
    ("code", "status"),
    [("deadline_exceeded", "timeout"), ("queue_full", "rejected"), ("engine_lost", "error"), (None, "error")],
)
def test_a_failure_in_the_stream_is_never_a_success(code: str | None, status: str) -> None:
    answer = Answer()
    assert take(answer, json.dumps({"error": {"message": "no", "code": code}}).encode(), due_s=0.0)
    assert (answer.status, answer.error) == (status, "no")


def test_the_request_is_greedy_streamed_and_limited() -> None:
    body = chat_body("Why?", 16, 30.0)
    assert (body["temperature"], body["stream"], body["max_tokens"], body["model"]) == (0, True, 16, "calm")
    assert body["calm"] == {"deadline_s": 30.0}
    assert "max_tokens" not in chat_body("Why?", None, 30.0)


@given(st.floats(0, 1))
def test_ratings_are_one_to_five(quality: float) -> None:
    assert 1 <= rating(quality) <= 5
    assert (rating(0), rating(1)) == (1, 5)


def test_which_requests_are_rated_depends_on_the_seed_only() -> None:
    assert rated(0, 50, 0.5) == rated(0, 50, 0.5) != rated(1, 50, 0.5)
    assert set(rated(0, 50, 1.0)) == {True}
    assert set(rated(0, 50, 0.0)) == {False}
    more, fewer = rated(0, 50, 0.8), rated(0, 50, 0.2)
    assert all(a or not b for a, b in zip(more, fewer, strict=True))


# --- rows -------------------------------------------------------------------------------------------


def estimate(model: str) -> Estimate:
    belief = Belief(mean=1.0, sd=0.1)
    return Estimate(
        model=model, prompt_tokens=1, cached_tokens=0, output_tokens=belief, queue_s=belief, load_s=belief,
        prefill_s=belief, decode_s=belief, ttft_s=belief, total_s=belief, energy_j=None, quality=belief,
    )  # fmt: skip


def stored(chosen: str | None = "smol", wall_s: float = 100.0, **outcome: object) -> StoredRequest:
    ranked = (Candidate(model=chosen, score=0.0, terms=()),) if chosen else ()
    seen = {"model": chosen, "status": "ok", "wall_s": wall_s, "request_id": "r1"}
    return StoredRequest(
        request_id="r1", wall_s=wall_s, kind="chat", tenant=None, pinned=None, stream=True, query=None,
        features=Features(
            prompt_chars=1, prompt_tokens=1, language="en", embedding=None, embedder=None, turns=1,
            max_tokens=None, samples=1, conversation=None, wants_json=False, wants_tools=False,
        ),
        decision=Decision(
            request_id="r1", policy="calm", goal=None, weights=Weights(), ranked=ranked, refused=(),
            estimates={chosen: estimate(chosen)} if chosen else {}, snapshot_revision=1,
            decision_s=0.002 if chosen else 0.0, wall_s=wall_s,
        ),
        outcome=Outcome(**{**seen, **outcome}),  # type: ignore[arg-type]
        feedback=(),
    )  # fmt: skip


def moved(at_s: float, model: str, old: str, new: str) -> Move:
    return Move(at_s=at_s, model=model, old=old, new=new)  # type: ignore[arg-type]


LOADED = (moved(98.0, "smol", "cold", "loading"), moved(99.0, "smol", "loading", "ready"))
QUERY = Query(id="q1", dataset="d", domain="math", prompt="?")


def answered(
    status: OutcomeStatus = "ok", request_id: str | None = "r1", quality: float | None = 0.5
) -> Answer:
    return Answer(request_id=request_id, status=status, total_s=2.0, ttft_s=0.5, quality=quality)


def test_a_row_has_the_clients_times_and_the_servers_reasons() -> None:
    record = stored(
        total_s=1.9, ttft_s=0.4, queue_s=0.1, load_s=0.2, prompt_tokens=7, completion_tokens=3,
        energy=Reading(joules=5.0, meter="cpu-time", kind="modelled"),
    )  # fmt: skip
    row = row_of(QUERY, 1.5, answered(), Ledger(requests={"r1": record}, moves=LOADED), ())
    assert (row.query_id, row.domain, row.arrived_s) == ("q1", "math", 1.5)
    assert (row.total_s, row.ttft_s, row.status, row.quality) == (2.0, 0.5, "ok", 0.5)
    assert (row.model, row.queue_s, row.load_s, row.energy_j) == ("smol", 0.1, 0.2, 5.0)
    assert (row.prompt_tokens, row.completion_tokens, row.decision_s, row.hit) == (7, 3, 0.002, True)


def test_a_request_that_never_reached_the_server_has_a_row_of_unknowns() -> None:
    row = row_of(QUERY, 0.0, answered("error", None, None), Ledger(requests={}, moves=()), ())
    assert (row.model, row.hit, row.energy_j, row.decision_s, row.quality) == (None,) * 5
    assert (row.status, row.total_s) == ("error", 2.0)


def test_a_refused_request_was_nobodys_hit_and_had_no_decision_time() -> None:
    record = stored(None, status="rejected")
    row = row_of(
        QUERY, 0.0, answered("rejected", quality=None), Ledger(requests={"r1": record}, moves=()), ()
    )
    assert (row.model, row.hit, row.decision_s, row.status) == (None, None, None, "rejected")


def test_after_failover_the_row_names_who_served_and_the_hit_is_the_first_choices() -> None:
    record = stored("big", model="smol")
    row = row_of(QUERY, 0.0, answered(), Ledger(requests={"r1": record}, moves=LOADED), ())
    assert (row.model, row.hit) == ("smol", False)


@pytest.mark.parametrize(("wall_s", "expected"), [(97.0, False), (98.5, False), (99.5, True), (101.0, False)])
def test_a_hit_is_a_model_that_was_ready_when_it_was_chosen(wall_s: float, expected: bool) -> None:
    moves = (*LOADED, moved(100.0, "smol", "ready", "unloading"), moved(100.1, "big", "loading", "ready"))
    assert hit(stored("smol", wall_s), moves, ()) is expected


def test_a_remote_model_is_always_there() -> None:
    assert hit(stored("cloud"), (), {"cloud"}) is True
    assert residency_at((), "cloud", 0.0) == "cold"


def test_the_timeline_starts_with_what_was_warm_and_counts_loads_that_were_running() -> None:
    moves = (
        *LOADED,
        moved(98.0, "gone", "cold", "loading"),
        moved(98.5, "gone", "loading", "cold"),
        moved(99.5, "tiny", "cold", "loading"),
        moved(101.0, "tiny", "loading", "ready"),
        moved(102.0, "big", "cold", "loading"),
    )
    found = timeline((*moves, moved(110.0, "big", "loading", "unloading")), 100.0, 105.0)
    assert [(m.at_s, m.model, m.old, m.new) for m in found] == [
        (0.0, "smol", "cold", "ready"),
        (0.0, "tiny", "cold", "loading"),
        (1.0, "tiny", "loading", "ready"),
        (2.0, "big", "cold", "loading"),
    ]
    assert loads(found) == 2


def test_a_trial_lasts_from_the_first_arrival_to_the_last_byte() -> None:
    load = Workload(name="w", seed=0, arrivals_s=(1.0, 4.0), queries=(QUERY, QUERY))
    assert duration_s(load, [Answer(total_s=9.0), Answer(total_s=2.0)]) == 9.0
    assert duration_s(Workload(name="w", seed=0, arrivals_s=(), queries=()), []) == 0.0


# --- progress ---------------------------------------------------------------------------------------


def test_what_remains_is_the_workloads_to_come_and_their_overhead() -> None:
    assert remaining_s([10, 10], [], 0.0) == 20 + 2 * progress.OVERHEAD_S
    assert remaining_s([10, 10], [12.0], 3.0) == 10 + 2 - 3
    assert remaining_s([10, 10], [12.0, 12.0], 50.0) == 0
    assert remaining_s([10, 10], [12.0], 50.0) == 0


@given(st.lists(st.floats(0, 1e4), max_size=5), st.floats(0, 1e5))
def test_the_estimate_is_never_negative(planned: list[float], running_s: float) -> None:
    assert remaining_s(planned, planned[:2], running_s) >= 0


def test_time_left_is_said_as_a_person_would() -> None:
    assert [in_words(s) for s in (42.3, 700, 7500)] == [
        "about 42 s left",
        "about 12 min left",
        "about 2 h 05 min left",
    ]


def test_into_a_pipe_goes_one_line_for_each_trial() -> None:
    out = io.StringIO()
    with Board([1.0, 1.0], Console(file=out, width=200)) as board:
        board.begin("calm / calm, seed 0", 2)
        board.request_ended()
        board.end("calm / calm, seed 0", "2 of 2 answered")
        board.begin("calm / lru, seed 0", 2)
        board.end("calm / lru, seed 0", "failed: [red]boom")
    assert out.getvalue().splitlines() == [
        "1/2  calm / calm, seed 0: 2 of 2 answered",
        "2/2  calm / lru, seed 0: failed: [red]boom",
    ]


def test_a_trial_in_a_few_figures() -> None:
    load = Ledger(requests={"r1": stored()}, moves=LOADED)
    rows = (row_of(QUERY, 0.0, answered(), load, ()), row_of(QUERY, 1.0, answered("timeout", None), load, ()))
    assert in_short(trial(CALM, 0, rows=rows, energy_j=12.4, loads=3)) == (
        "1 of 2 answered, mean 2.00 s, quality 0.50, 12 J, 3 loads"
    )
    assert in_short(trial(CALM, 0)) == "0 of 0 answered, 0 loads"


# --- what is refused --------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two local models whose weights are here, and one small domain set."""
    for name in ("CALM_CONFIG", "CALM_DATA"):
        monkeypatch.delenv(name, raising=False)
    for variable in ("CALM_STATE_DIR", "CALM_CACHE_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet").mkdir()
    for name, memory_bytes in (("smol", 200_000_000), ("big", 900_000_000)):
        write_card(tmp_path / "fleet" / f"{name}.toml", memory_bytes)
    write_set(tmp_path / "data" / "domain" / "tiny.jsonl.gz")
    return tmp_path


def write_card(file: Path, memory_bytes: int, rest: str | None = None) -> None:
    """A card; without a `rest` of its own over weights that lie beside it."""
    weights = file.parent / "weights.gguf"
    weights.write_bytes(b"GGUF")
    here = f'[source]\nparts = ["file:{weights}"]\nsha256 = "{sha256(b"GGUF").hexdigest()}"\nbytes = 4'
    memory = f"memory_hint_bytes = {memory_bytes}" if memory_bytes else ""
    file.write_text(f'name = "{file.stem}"\ndescription = "A model."\n{memory}\n{rest or here}\n')


ELSEWHERE = '[source]\nparts = ["pypi:nothing==1/model.gguf"]\nsha256 = "{}"\nbytes = 10'.format("0" * 64)


def write_set(file: Path) -> None:
    file.parent.mkdir(parents=True)
    rows = [
        {
            "id": f"t{n}", "domain": "math", "split": "test", "question": f"What is {n} + 1?",
            "context": None, "choices": None, "answer": str(n + 1), "answer_type": "number",
        }
        for n in range(8)
    ]  # fmt: skip
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@click.group(cls=RootGroup)
def root() -> None:
    """Stands for `calm`."""


root.add_command(bench)


def run(*arguments: str) -> Result:
    flags = ("--data", "data", "--queries", "domains:tiny", "--requests", "2", "--rate", "1")
    return CliRunner().invoke(root, ["bench", *flags, "--budget", "1GB", *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "clam"), "no policy 'clam'; choose one of calm"),
        (("--policy", "fixed:nobody"), "no such model; known: big, smol"),
        (("--policy", "paper:sideways"), "sideways"),
        (("--cache", "mru"), "eviction 'mru' is not known"),
        (("--goal", "speed"), "no goal 'speed'; choose one of"),
        (("--goal", "latency=fast"), "holds no number"),
        (("--goal", "quality>=70"), "above 0 and below 1"),
        (("--fleet", "nowhere"), "cannot read the fleet directory"),
        (("--queries", "domains:nothing"), 'no domain set "nothing"'),
        (("--queries", "table:routerdc7"), "give domains:NAME"),
        (("--data", "nowhere"), "no such directory"),
        (("--budget", "500MB"), "a budget of 500.0 MB cannot hold big (900.0 MB)"),
        (("--budget", "lots"), "is no size"),
        (
            ("--cache", "none"),
            "--cache none keeps all models in memory, about 1.1 GB, and the budget is 1.0 GB",
        ),
        (("--duration", "9"), "give two of --requests, --duration and --rate"),
        (("--policy", "paper"), "calm models pull --assets"),
        (("--requests", "8", "--warm-start", "1"), "too few queries"),
    ],
)
def test_what_cannot_be_run_is_refused_with_one_line(
    machine: Path, arguments: tuple[str, ...], says: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert says in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        result.stderr.splitlines()[-1]
    ]


@pytest.mark.parametrize("name", sorted(HINDSIGHT))
@pytest.mark.parametrize("flag", ["--policy", "--cache"])
def test_hindsight_is_for_replay(machine: Path, name: str, flag: str) -> None:
    result = run(flag, name)
    assert result.exit_code == 1
    assert "only replay can know the future" in result.stderr


def test_missing_weights_are_named_and_not_fetched(machine: Path) -> None:
    write_card(machine / "fleet" / "absent.toml", 1_000_000, ELSEWHERE)
    result = run()
    assert result.exit_code == 1
    assert "no weights of absent here; run `calm models pull`" in result.stderr


def test_help_is_quick_to_ask_for() -> None:
    result = CliRunner().invoke(root, ["bench", "--help"])
    assert result.exit_code == 0
    assert "--warm-start" in result.output
    assert "Example:" in result.output


def test_terms_tell_which_models_need_memory(machine: Path) -> None:
    from calm.registry import load_fleet

    write_card(machine / "fleet" / "cloud.toml", 0, '[engine]\nkind = "openai"\nurl = "http://127.0.0.1:9"')
    cards = load_fleet(machine / "fleet").fleet
    terms = Terms(
        base=Settings(), fleet=machine / "fleet", cards=cards, budget_bytes=1, deadline_s=1.0, max_tokens=None,
        feedback=1.0,
    )  # fmt: skip
    assert terms.remote == {"cloud"}
    assert set(terms.local) == {"big", "smol"}


# --- how the command ends ---------------------------------------------------------------------------


def stub_campaign(monkeypatch: pytest.MonkeyPatch, keep: int, end: type[BaseException] | None) -> None:
    """A campaign that keeps some trials without a server, then ends as told."""

    async def run_jobs(self: Campaign, jobs: Sequence[Job]) -> None:
        for job in jobs[:keep]:
            row = row_of(QUERY, 0.0, answered(), Ledger(requests={"r1": stored()}, moves=LOADED), ())
            self._keep(trial(job.setup, job.seed, rows=(row,), budget_bytes=1_000_000_000))
        if end is not None:
            raise end
        self.notes += [f"{job.title} is missing: the server ended" for job in jobs[keep:]]

    monkeypatch.setattr(Campaign, "run", run_jobs)
    monkeypatch.setattr("calm.cli.report.draw", lambda study, directory: None)


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_resumes(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--policy", "calm", "--policy", "random", "--seeds", "2", "--out", "study")
    stub_campaign(monkeypatch, 1, KeyboardInterrupt)
    stopped = run(*flags)
    assert stopped.exit_code == 130
    assert (
        "interrupted: 1 of 4 trials are kept in study; the same command again runs the others"
        in stopped.stderr
    )

    stub_campaign(monkeypatch, 3, None)
    done = run(*flags)
    assert done.exit_code == 0, done.output
    assert "4 trials, 1 of them done before" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["calm", "random"]
    assert (machine / "study" / "results.json").is_file()


def test_ctrl_c_without_a_directory_says_what_would_have_helped(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_campaign(monkeypatch, 1, KeyboardInterrupt)
    result = run("--seeds", "2")
    assert result.exit_code == 130
    assert "interrupted after 1 of 2 trials; give --out DIR to be able to resume" in result.stderr


def test_a_missing_trial_is_named_under_the_table(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_campaign(monkeypatch, 1, None)
    result = run("--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "calm / calm, seed 1 is missing: the server ended" in result.stderr


def test_nothing_completed_is_a_failure(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_campaign(monkeypatch, 0, None)
    result = run("--seeds", "2")
    assert result.exit_code == 1
    assert "error: no trial completed; calm / calm, seed 0 is missing: the server ended" in result.stderr


def test_another_load_in_the_same_directory_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_campaign(monkeypatch, 1, None)
    assert run("--seeds", "1", "--out", "study").exit_code == 0
    other = run("--seeds", "1", "--out", "study", "--rate", "2")
    assert other.exit_code == 1
    assert "rate_rps was 1.0, is 2.0" in other.stderr


def test_json_is_all_there_is_on_stdout(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_campaign(monkeypatch, 1, None)
    found = json.loads(run("--seeds", "1", "--json").stdout)
    assert found["title"] == "calm bench"
    assert found["provenance"]["versions"]["python"]
    assert found["summaries"][0]["label"] == "calm / calm"


# --- adapters ---------------------------------------------------------------------------------------


def test_a_specialist_is_a_hit_while_its_base_is_in_memory() -> None:
    hosts = {"smol": "smol", "finance": "smol"}
    assert hit(stored("finance", 100.0), LOADED, (), hosts) is True
    assert hit(stored("finance", 98.5), LOADED, (), hosts) is False


def test_specialists_have_the_lanes_of_their_base_and_no_loads_of_their_own() -> None:
    hosts = {"smol": "smol", "finance": "smol", "other": "other"}
    moves = (*LOADED, moved(99.5, "other", "cold", "loading"))
    shown = with_adapters(moves, hosts)
    assert [(move.model, move.new) for move in shown] == [
        ("smol", "loading"), ("finance", "loading"), ("smol", "ready"), ("finance", "ready"), ("other", "loading"),
    ]  # fmt: skip
    assert loads(moves) == 2
