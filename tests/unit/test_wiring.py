"""What wiring adds to cards, and that a whole server comes up, answers and goes without a trace."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import msgspec
import pytest

from calm.backends.fake import FakeEngineServer, Script
from calm.errors import BadInput, SourceError
from calm.gateway.metrics import Metrics
from calm.gateway.service import Steering as Change
from calm.plan.floor import EXPLORATION, Price
from calm.plan.policies import CalmPolicy
from calm.plan.score import Tuning
from calm.ports import Policy
from calm.records import EngineSpec, ModelCard, ModelState, PriorSpec
from calm.settings import load_settings
from calm.wiring import build, completed, counted, make_minilm, runtime_directory


def test_cards_are_completed_with_what_the_machine_knows() -> None:
    card = ModelCard(name="a", description="a", priors=PriorSpec(decode_tps=50.0))
    settings = load_settings(environ={"CALM_SCHEDULING__THREADS": "2"})
    made = completed({"a": card}, settings, 5.0)["a"]
    assert made.engine.threads == 2
    assert made.priors.energy_j_per_token == pytest.approx(5.0 * 2 / 50.0)
    stated = ModelCard(
        name="b",
        description="b",
        engine=EngineSpec(threads=1),
        priors=PriorSpec(decode_tps=50.0, energy_j_per_token=0.7),
    )
    assert completed({"b": stated}, settings, 5.0)["b"] == stated
    remote = ModelCard(name="c", description="c", engine=EngineSpec(kind="openai", url="http://localhost"))
    assert completed({"c": remote}, settings, 5.0)["c"] == remote
    assert completed({"a": card}, load_settings(environ={}), None)["a"] == card


def test_metrics_count_every_load_and_eviction() -> None:
    metrics = Metrics(lambda name: name == "a")
    state = ModelState(
        model="a",
        residency="ready",
        pinned=False,
        in_flight=0,
        waiting=0,
        slots=1,
        threads=1,
        footprint_bytes=1,
        footprint_measured=True,
        load_s=0.5,
        last_used_s=None,
        failures=0,
    )
    moved = counted(metrics, lambda: {"a": state})
    for old, new in (
        ("loading", "ready"),
        ("ready", "unloading"),
        ("loading", "failed"),
        ("cold", "loading"),
    ):
        moved("a", old, new)  # type: ignore[arg-type]
    text = metrics.render()[0].decode()
    assert 'calm_model_loads_total{model="a",result="ok"} 1.0' in text
    assert 'calm_model_loads_total{model="a",result="failed"} 1.0' in text
    assert 'calm_model_load_seconds_sum{model="a"} 0.5' in text
    assert 'calm_model_evictions_total{model="a"} 1.0' in text


def test_a_missing_embedder_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="calm models pull --assets"):
        make_minilm(tmp_path)


def test_runtime_directories_of_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    stale = tmp_path / "calm-run-999999999-x"
    stale.mkdir()
    with runtime_directory() as mine:
        assert mine.stat().st_mode & 0o777 == 0o700
        assert not stale.exists()
    assert not mine.exists()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("CALM_STATE_DIR", "CALM_CACHE_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet").mkdir()
    return tmp_path


async def test_a_whole_server_answers_and_remembers(home: Path) -> None:
    async with FakeEngineServer(Script(answer=("Hi", " there"))) as upstream:
        (home / "fleet" / "one.toml").write_text(
            'name = "one"\ndescription = "d"\nplacement = "local"\n'
            f'[engine]\nkind = "openai"\nurl = "{upstream.base_url}"\n'
        )
        settings = load_settings(environ={"CALM_SERVER__PORT": "0", "CALM_ENERGY__METER": "absent"})
        async with AsyncExitStack() as stack:
            house = await build(settings, stack)
            body = {"model": "calm", "messages": [{"role": "user", "content": "hello"}]}
            async with aiohttp.ClientSession() as client:
                async with client.post(f"{house.url}/v1/chat/completions", json=body) as response:
                    assert response.status == 200
                    answer = await response.json()
                    assert "x-calm-energy-j" not in response.headers  # unknown is absent, never 0
                request_id = answer["calm"]["request_id"]
                async with client.get(f"{house.url}/calm/v1/decisions/{request_id}") as response:
                    stored = await response.json()
        assert answer["choices"][0]["message"]["content"] == "Hi there"
        assert stored["outcome"]["status"] == "ok"
        assert stored["decision"]["ranked"][0]["model"] == "one"
        assert stored["query"] is None  # prompts are not stored
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, "nothing runs on after the server is gone"


async def test_a_floor_under_quality_from_the_settings_and_while_running(home: Path) -> None:
    (home / "fleet" / "one.toml").write_text(
        'name = "one"\ndescription = "d"\nplacement = "local"\n'
        '[engine]\nkind = "openai"\nurl = "http://127.0.0.1:9"\n'
    )
    environ = {
        "CALM_SERVER__PORT": "0",
        "CALM_ENERGY__METER": "absent",
        "CALM_POLICY__QUALITY_FLOOR": "0.7",
    }
    async with AsyncExitStack() as stack:
        house = await build(load_settings(environ=environ), stack)
        steering = house.loop.steering

        async def change(**fields: object) -> tuple[object, object]:
            before = steering.policy
            await house.control.steer(msgspec.convert(fields, Change))
            return house.control.policy()["quality_floor"], steering.policy is not before

        assert exploration(steering.policy) == EXPLORATION
        shown = house.control.policy()
        assert (shown["quality_floor"], shown["quality_price"]) == (0.7, None)

        account = steering.floor
        assert account is not None
        account.price, account.debt = Price(1.0, 1.5), -1.0
        assert house.control.policy()["quality_price"] == account.in_force
        assert await change(goal="energy") == (0.7, False)
        assert steering.floor is not account, "what it had seen was weighed otherwise"
        assert await change(quality_floor=0.6) == (0.6, False)

        assert await change(quality_floor=None) == (None, True)
        assert (steering.policy.name, exploration(steering.policy)) == ("calm", Tuning().exploration)
        assert await change(policy="random:7", quality_floor=0.5) == (0.5, True)
        assert await change(policy="calm") == (0.5, True)
        assert exploration(steering.policy) == EXPLORATION

        standing = house.control.policy()
        for wrong in ({"policy": "magic", "quality_floor": 0.9}, {"goal": "fun", "quality_floor": None}):
            with pytest.raises(BadInput):
                await change(**wrong)
        with pytest.raises(BadInput, match="above 0 and below 1"):
            await house.control.steer(Change(quality_floor=1.5))
        assert house.control.policy() == standing


def exploration(policy: Policy) -> float:
    assert isinstance(policy, CalmPolicy)
    return policy._tuning.exploration


@pytest.mark.parametrize(
    ("environ", "field"),
    [
        ({"CALM_POLICY__GOAL": "fun"}, "policy.goal"),
        ({"CALM_POLICY__NAME": "magic"}, "policy"),
        ({"CALM_MEMORY__EVICTION": "magic"}, "eviction"),
        ({"CALM_MEMORY__BUDGET": "lots"}, "memory.budget"),
        ({"CALM_SERVER__HOST": "0.0.0.0"}, "server.host"),
        ({"CALM_ENERGY__METER": "nvml"}, "energy.meter"),
    ],
)
async def test_a_wrong_setting_stops_the_start_with_its_name(
    home: Path, environ: dict[str, str], field: str
) -> None:
    settings = load_settings(environ={"CALM_SERVER__PORT": "0", **environ})
    with pytest.raises(BadInput) as caught:
        async with AsyncExitStack() as stack:
            await build(settings, stack)
    assert caught.value.field == field
