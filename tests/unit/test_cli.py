"""The commands that speak to a server, against the real gateway with a scripted service behind it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from calm.cli.app import calm
from calm.cli.client import NoServer, connect, hint_for, said, sse_payloads
from calm.clock import SystemClock
from calm.errors import BadInput, CalmError, EngineLost, QueueFull, UnknownRequest
from calm.gateway.app import build_app
from calm.gateway.auth import Guard, Keys
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.server import start
from calm.gateway.service import Readiness, Steering
from calm.records import (
    Ask,
    Belief,
    Candidate,
    Decision,
    Estimate,
    Features,
    Feedback,
    ModelCard,
    ModelState,
    Outcome,
    Reading,
    Refusal,
    Snapshot,
    SourceSpec,
    StoredRequest,
    Term,
    Weights,
)
from calm.registry import CardProblem

WORDS = ("The sky ", "scatters \x1b[31mblue", " light.")


# --- a scripted house -----------------------------------------------------------------------------


def belief(mean: float) -> Belief:
    return Belief(mean=mean, sd=mean / 10)


def estimate(model: str, total_s: float) -> Estimate:
    return Estimate(
        model=model,
        prompt_tokens=12.0,
        cached_tokens=0.0,
        output_tokens=belief(40.0),
        queue_s=belief(0.0),
        load_s=belief(0.0),
        prefill_s=belief(0.1),
        decode_s=belief(total_s - 0.1),
        ttft_s=belief(0.1),
        total_s=belief(total_s),
        energy_j=belief(2.5),
        quality=belief(0.6),
    )


def candidate(model: str, score: float, latency: Term, quality: Term) -> Candidate:
    return Candidate(model=model, score=score, terms=(latency, quality))


def term(name: str, value: float | None, regret: float, weight: float) -> Term:
    return Term(name=name, value=value, regret=regret, weight=weight)


def decision(request_id: str) -> Decision:
    return Decision(
        request_id=request_id,
        policy="calm",
        goal="balanced",
        weights=Weights(),
        ranked=(
            candidate("smol", 0.02, term("latency", 0.42, 0.0, 0.3), term("quality", 0.61, 0.03, 0.5)),
            candidate("tiny", 0.06, term("latency", 0.756, 0.2, 0.3), term("quality", 0.64, 0.0, 0.5)),
        ),
        refused=(
            Refusal(model="gemma", constraint="context", reason="the prompt has 9000 tokens, 2048 fit"),
        ),
        estimates={"smol": estimate("smol", 0.42), "tiny": estimate("tiny", 0.756)},
        snapshot_revision=7,
        decision_s=0.0008,
        wall_s=1_760_000_000.0,
    )


def outcome(request_id: str) -> Outcome:
    return Outcome(
        request_id=request_id,
        model="smol",
        status="ok",
        wall_s=1_760_000_001.0,
        ttft_s=0.08,
        total_s=0.61,
        prompt_tokens=11,
        completion_tokens=38,
        energy=Reading(joules=3.1, meter="cpu-time", kind="modelled"),
        finish_reason="stop",
    )


class ScriptedReply:
    def __init__(self, ask: Ask, broken: bool) -> None:
        self.request_id = ask.request_id
        self.model: str | None = "smol"
        self.decision = decision(ask.request_id)
        self.queued_s = 0.0
        self.outcome: Outcome | None = None
        self._broken = broken

    async def body(self) -> bytes:
        self.outcome = outcome(self.request_id)
        message = {"role": "assistant", "content": "".join(WORDS)}
        return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()

    async def events(self) -> AsyncIterator[bytes]:
        for word in WORDS:
            yield json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}).encode()
        if self._broken:
            raise EngineLost("the engine died")
        yield json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}).encode()
        self.outcome = outcome(self.request_id)


class House:
    """Implements gateway.service.Service; remembers what it was told."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.told: list[tuple[str, object]] = []
        self.error: CalmError | None = None
        self.broken = False
        self.stored: dict[str, StoredRequest] = {}
        self.steering: dict[str, object] = {"policy": "calm", "goal": "balanced"}

    @asynccontextmanager
    async def serve(self, ask: Ask) -> AsyncIterator[ScriptedReply]:
        self.asks.append(ask)
        if self.error is not None:
            raise self.error
        self.remember(ask)
        yield ScriptedReply(ask, self.broken)

    def remember(self, ask: Ask) -> None:
        self.stored[ask.request_id] = StoredRequest(
            request_id=ask.request_id,
            wall_s=1_760_000_000.0,
            kind=ask.kind,
            tenant=ask.tenant,
            pinned=ask.model,
            stream=ask.stream,
            query=ask.query,
            features=FEATURES,
            decision=decision(ask.request_id),
            outcome=outcome(ask.request_id),
            feedback=(
                Feedback(request_id=ask.request_id, rating=4, source="user", wall_s=1.0, comment="good"),
            ),
        )

    def readiness(self) -> Readiness:
        return Readiness(ready=True)

    def cards(self) -> Mapping[str, ModelCard]:
        source = SourceSpec(parts=("file:/w/smol.gguf",), sha256="0" * 64)
        return {"smol": ModelCard(name="smol", description="small", source=source)}

    def bad_cards(self) -> Sequence[CardProblem]:
        return [CardProblem(file="bad.toml", field="engine.slots", reason="must be at least 1")]

    def snapshot(self) -> Snapshot:
        return Snapshot(
            revision=1, at_s=0.0, models={"smol": STATE}, budget_bytes=2_000_000_000, used_bytes=211_000_000,
            cores=2, threads_in_use=1, queue_length=3, in_flight=1,
        )  # fmt: skip

    async def load(self, model: str) -> None:
        self.told.append(("load", model))

    async def unload(self, model: str) -> None:
        self.told.append(("unload", model))

    async def pin(self, model: str, pinned: bool) -> None:
        self.told.append(("pin" if pinned else "unpin", model))

    async def explain(self, request_id: str) -> StoredRequest | None:
        return self.stored.get(request_id)

    async def recent(self, limit: int, *, model: str | None, status: str | None) -> Sequence[StoredRequest]:
        return list(reversed(self.stored.values()))[:limit]

    async def feedback(self, feedback: Feedback, *, tenant: str | None = None) -> None:
        if feedback.request_id not in self.stored:
            raise UnknownRequest(f"no request {feedback.request_id}")
        self.told.append(("feedback", feedback))

    async def knowledge(self) -> Mapping[str, object]:
        return {}

    async def events(self, since: int, limit: int) -> Sequence[Feedback]:
        return []

    def goals(self) -> Mapping[str, Weights]:
        return {"balanced": Weights()}

    async def set_goals(self, goals: Mapping[str, Weights]) -> None: ...

    def policy(self) -> Mapping[str, object]:
        return {**self.steering, "weights": Weights(), "available": ["calm", "fixed:NAME"]}

    async def steer(self, change: Steering) -> None:
        if change.goal == "zzz":
            raise BadInput("goal: no goal 'zzz'; choose one of balanced", field="goal")
        self.told.append(("steer", change))
        self.steering.update(
            {k: v for k, v in msgspec.structs.asdict(change).items() if v not in (None, msgspec.UNSET)}
        )


FEATURES = Features(
    prompt_chars=20, prompt_tokens=5.0, language="en", embedding=None, embedder=None, turns=1,
    max_tokens=None, samples=1, conversation=None, wants_json=False, wants_tools=False,
)  # fmt: skip
STATE = ModelState(
    model="smol", residency="ready", pinned=True, in_flight=1, waiting=0, slots=4, threads=1,
    footprint_bytes=211_000_000, footprint_measured=True, load_s=0.42, last_used_s=None, failures=0,
)  # fmt: skip


class Running:
    """The real gateway over a scripted house, in a thread with a loop of its own."""

    def __init__(self, house: House, keys: Path) -> None:
        self.house = house
        self.url = ""
        self._keys = keys
        self._up = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = build_app(self.house, Guard(Keys(self._keys)), Limits(), Metrics(lambda _: True), SystemClock())
        server = await start(app, "127.0.0.1", 0)
        self.url = server.url
        self._up.set()
        await self._stop.wait()
        await server.stop(0.1)

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    for name in ("CALM_URL", "CALM_API_KEY", "CALM_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CALM_STATE_DIR", str(tmp_path / "state"))
    with Running(House(), tmp_path / "state" / "keys.toml") as running:
        monkeypatch.setenv("CALM_URL", running.url)
        yield running


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(calm, args, input=stdin, prog_name="calm")


# --- ask ------------------------------------------------------------------------------------------


def test_ask_streams_the_answer_and_then_says_who_wrote_it_and_why(server: Running) -> None:
    result = run("ask", "Why is the sky blue?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(WORDS) + "\n"
    (request_id,) = server.house.stored
    assert result.stderr.strip() == (
        "smol · 0.42 s predicted, 1.8x faster than tiny, quality 0.61 vs 0.64 · "
        f"0.61 s (first token 0.08 s) · 3.1 J (cpu-time, modelled) · {request_id}"
    )
    assert server.house.asks[0].stream


def test_ask_passes_every_wish(server: Running) -> None:
    flags = (
        "--model",
        "smol",
        "--goal",
        "balanced",
        "--deadline",
        "9",
        "--max-tokens",
        "7",
        "--temperature",
        "0",
    )
    result = run("ask", "-", "--system", "Be brief.", *flags, "--no-stream", stdin="from a pipe")
    assert result.exit_code == 0, result.output
    (ask,) = server.house.asks
    assert (ask.model, ask.wishes.goal, ask.wishes.deadline_s, ask.max_tokens) == ("smol", "balanced", 9.0, 7)
    assert ask.body["temperature"] == 0
    assert ask.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "from a pipe"},
    ]
    assert not ask.stream
    assert " · pinned · " in result.stderr


def test_ask_leaves_out_what_was_not_given(server: Running) -> None:
    run("ask", "hi", "--no-stream")
    assert set(server.house.asks[0].body) == {"model", "messages"}


def test_ask_json_prints_the_whole_answer(server: Running) -> None:
    answer = json.loads(run("ask", "hi", "--json").stdout)
    assert answer["choices"][0]["message"]["content"] == "".join(WORDS)
    assert answer["calm"]["model"] == "smol"


def test_a_broken_stream_is_a_failure_even_after_words(server: Running) -> None:
    server.house.broken = True
    result = run("ask", "hi")
    assert result.exit_code == 1
    assert result.stdout == "".join(WORDS) + "\n"
    assert result.stderr == "error: the engine died\n"


def test_an_error_of_the_server_comes_with_what_to_do(server: Running) -> None:
    server.house.error = QueueFull("256 requests wait already", retry_after_s=7.0)
    result = run("ask", "hi")
    assert (result.exit_code, result.stderr) == (1, "error: 256 requests wait already; try again in 7 s\n")


@pytest.mark.parametrize("stdin", ["", "  \n"])
def test_an_empty_prompt_is_wrong_usage(server: Running, stdin: str) -> None:
    result = run("ask", "-", stdin=stdin)
    assert (result.exit_code, "the prompt is empty" in result.stderr) == (2, True)
    assert not server.house.asks


def test_a_server_with_keys_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_STATE_DIR", str(tmp_path))
    user = run("keys", "create", "alice").stdout.strip()
    admin = run("keys", "create", "root", "--admin").stdout.strip()
    monkeypatch.delenv("CALM_API_KEY", raising=False)
    with Running(House(), tmp_path / "keys.toml") as running:
        monkeypatch.setenv("CALM_URL", running.url)
        refused = run("ask", "hi")
        assert refused.exit_code == 1
        assert "CALM_API_KEY" in refused.stderr
        monkeypatch.setenv("CALM_API_KEY", user)
        assert run("ask", "hi").exit_code == 0
        assert "admin key" in run("models", "load", "smol").stderr
        monkeypatch.setenv("OTHER", admin)
        assert run("models", "load", "smol", "--key-env", "OTHER").exit_code == 0
        assert user not in refused.output


def test_no_server_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("ask", "hi", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: no CALM server at http://127.0.0.1:1; start one with `calm serve`"
    )


# --- explain and feedback -------------------------------------------------------------------------


def test_explain_shows_every_term_and_what_came_of_it(server: Running) -> None:
    run("ask", "Why is the sky blue?")
    (request_id,) = server.house.stored
    result = run("explain", f"chatcmpl-{request_id}")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["1", "smol", "0.02", "latency", "0.42", "s", "0", "0.3", "0"] in rows
    assert ["quality", "0.61", "0.03", "0.5", "0.015"] in rows
    assert ["2", "tiny", "0.06", "latency", "0.76", "s", "0.2", "0.3", "0.06"] in rows
    assert ["gemma", "context", "the", "prompt", "has", "9000", "tokens,", "2048", "fit"] in rows
    assert ["total", "0.42", "s", "±", "0.04", "s", "0.61", "s"] in rows
    assert ["output", "tokens", "40", "±", "4", "38"] in rows
    assert ["energy", "2.5", "J", "±", "0.25", "J", "3.1", "J", "(cpu-time,", "modelled)"] in rows
    assert ["4", "user", "good"] in rows


def test_explain_without_an_id_takes_the_latest(server: Running) -> None:
    assert "no request is stored yet" in run("explain").stderr
    run("ask", "first")
    run("ask", "second")
    latest = list(server.house.stored)[-1]
    assert json.loads(run("explain", "--json").stdout)["request_id"] == latest
    assert latest in run("explain").stdout


def test_explain_an_unknown_id(server: Running) -> None:
    result = run("explain", "../../healthz")
    assert (result.exit_code, "is stored" in result.stderr) == (1, True)


def test_feedback_is_recorded_under_the_bare_id(server: Running) -> None:
    run("ask", "hi")
    (request_id,) = server.house.stored
    result = run("feedback", f"chatcmpl-{request_id}", "5", "--comment", "exactly")
    assert (result.exit_code, result.stdout) == (0, f"rated {request_id}: 5 of 5\n")
    ((_, feedback),) = server.house.told
    assert isinstance(feedback, Feedback)
    assert (feedback.request_id, feedback.rating, feedback.comment) == (request_id, 5.0, "exactly")


def test_feedback_out_of_range_is_wrong_usage_and_unknown_ids_fail(server: Running) -> None:
    assert run("feedback", "x", "6").exit_code == 2
    assert run("feedback", "x", "3").exit_code == 1


# --- models ---------------------------------------------------------------------------------------


def test_models_list_shows_residency_and_refused_cards(server: Running) -> None:
    result = run("models", "list")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["smol", "ready,", "pinned", "211.0", "MB", "1/4", "0", "1", "2048", "chat,", "completion"] in rows
    assert "memory 211.0 MB of 2.0 GB, 1 in flight, 3 waiting" in result.stdout
    assert "warning: bad.toml: engine.slots: must be at least 1" in result.stderr
    assert json.loads(run("models", "list", "--json").stdout)["models"][0]["name"] == "smol"


def test_models_show_from_the_server(server: Running) -> None:
    result = run("models", "show", "smol")
    assert (
        dict(line.split(None, 1) for line in result.stdout.splitlines())["state.footprint_bytes"]
        == "211.0 MB"
    )
    assert 'no model "zz"' in run("models", "show", "zz").stderr


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
def test_actions_reach_the_service(server: Running, verb: str) -> None:
    result = run("models", verb, "smol")
    assert (result.exit_code, server.house.told) == (0, [(verb, "smol")])
    assert result.stdout == "smol: ready, pinned, 211.0 MB, loaded in 0.42 s\n"
    assert run("models", verb, "zz").exit_code == 1


# --- policy and goal ------------------------------------------------------------------------------


def test_policy_and_goal_steer_the_server(server: Running) -> None:
    assert run("policy", "set", "fixed:smol", "--weights", "latency=1,quality=2").exit_code == 0
    assert run("goal", "set", "balanced", "--json").exit_code == 0
    weights = Weights(latency=1, energy=0, quality=2, cost=0)
    assert server.house.told == [
        ("steer", Steering(policy="fixed:smol", weights=weights)),
        ("steer", Steering(goal="balanced")),
    ]
    shown = run("policy", "show").stdout
    assert "fixed:smol" in shown
    assert "calm, fixed:NAME" in shown
    assert run("goal", "list").stdout.splitlines()[1].split() == ["balanced", "0.3", "0.2", "0.5", "0"]


def test_a_floor_is_set_and_taken_away(server: Running) -> None:
    said = run("policy", "set", "calm", "--quality-floor", "0.7").stdout
    assert [line.split() for line in said.splitlines() if line.startswith("quality_floor")] == [
        ["quality_floor", "0.7"]
    ]
    for text in ("none", "0"):
        assert run("policy", "set", "calm", "--quality-floor", text).exit_code == 0
    run("policy", "set", "calm")
    run("goal", "set", "energy")
    gone = ("steer", Steering(policy="calm", quality_floor=None))
    assert server.house.told == [
        ("steer", Steering(policy="calm", quality_floor=0.7)),
        gone,
        gone,
        ("steer", Steering(policy="calm")),
        ("steer", Steering(goal="energy")),
    ]
    for text in ("1", "70", "-0.1", "nan", "much", ""):
        assert run("policy", "set", "calm", "--quality-floor", text).exit_code == 2


def test_wrong_steering_says_what_there_is(server: Running) -> None:
    assert run("goal", "set", "zzz").stderr == "error: goal: no goal 'zzz'; choose one of balanced\n"
    for weights in ("speed=1", "latency=fast", "latency=-1", "latency=inf"):
        assert run("policy", "set", "calm", "--weights", weights).exit_code == 2
    assert run("policy", "set", "calm", "--weights", "cost=1", "--goal", "energy").exit_code == 2
    assert not server.house.told


# --- the client -----------------------------------------------------------------------------------


def test_interrupting_is_130(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("calm.cli.client.Client.call", interrupted)
    assert run("policy", "show").exit_code == 130


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://127.0.0.1:99999", "http://[::1"])
def test_what_is_no_url_is_told(url: str) -> None:
    result = run("policy", "show", "--url", url)
    assert result.exit_code == 1
    assert "is no URL of a server" in result.stderr


def test_urls_are_taken_as_people_write_them() -> None:
    assert connect("127.0.0.1:9/v1/").url == "http://127.0.0.1:9"
    assert connect("http://user:pass@h/base/v1").url == "http://h/base"


def test_a_stranger_on_the_port_is_not_taken_for_calm() -> None:
    error = said(404, b"<html>not here</html>")
    assert "no answer of CALM" in error.message
    assert hint_for(404, None) is None


def test_connection_refused_is_no_server() -> None:
    with pytest.raises(NoServer):
        connect("http://127.0.0.1:1").get("/", dict)


def test_sse_skips_comments_and_joins_lines() -> None:
    lines = [
        b": waiting\n",
        b"\n",
        b"event: x\n",
        b"data: a\r\n",
        b"data:b\n",
        b"\n",
        b"data: [DONE]\n",
        b"\n",
    ]
    assert list(sse_payloads(iter(lines))) == [b"a\nb", b"[DONE]"]


def test_every_command_explains_itself_with_an_example() -> None:
    def leaves(
        command: click.Command, path: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        yield path, command
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                yield from leaves(child, (*path, name))

    found = list(leaves(calm, ()))
    assert len(found) > 25
    for path, _ in found:
        result = run(*path, "--help")
        assert result.exit_code == 0
        assert "Example:" in result.output, path
        assert len(result.output.split("Example:")[0].split("\n\n")[1]) > 60, path
