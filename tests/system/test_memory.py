"""A budget that holds two of the three models: all can be asked, and the budget is never exceeded."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tests.system.conftest import GEMMA, SMOL, TINY, Background, Json, Launch, Server, eventually

pytestmark = pytest.mark.models

ALL = (SMOL, GEMMA, TINY)
BUDGET_MB = 950


@pytest.fixture
def tight(launch: Launch) -> Iterator[tuple[Server, Background]]:
    """The server, and a thread that samples its snapshots.

    Weights are read and not mapped, because pages that another process maps too count for each of them in
    part, and whether the shared server of the session runs must not decide what fits.
    """
    server = launch(*ALL, environment={"CALM_MEMORY__BUDGET": f"{BUDGET_MB}MB"}, start=False)
    for card in server.fleet.glob("*.toml"):
        text = card.read_text(encoding="utf-8")
        assert 'kind = "llamacpp"' in text
        own = 'options = {load_mode = "none"}\nkind = "llamacpp"'
        card.write_text(text.replace('kind = "llamacpp"', own, 1), encoding="utf-8")
    server.start()
    with Background(server.snapshot) as samples:
        yield server, samples
    over = [s for s in samples.results if s["used_bytes"] > s["budget_bytes"]]
    assert not samples.errors
    assert not over, f"{len(over)} of {len(samples.results)} snapshots are over the budget: {over[0]}"
    assert {s["budget_bytes"] for s in samples.results} == {BUDGET_MB * 10**6}


def resident(snapshot: Json) -> set[str]:
    return {name for name, state in snapshot["models"].items() if state["residency"] == "ready"}


def test_all_three_are_asked_in_turn(tight: tuple[Server, Background]) -> None:
    server, samples = tight
    for model in (*ALL, SMOL):
        answer = server.chat("Who painted the Mona Lisa?", model, max_tokens=3)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-calm-model"] == model
    crowded = [s for s in samples.results if len(resident(s)) > 2]
    assert not crowded, f"the budget holds two: {crowded[0]}"
    footprints = [
        psutil.Process(engine.pid).memory_info().rss
        for model, engine in server.engines().items()
        if model in resident(server.snapshot())
    ]
    assert sum(footprints) < BUDGET_MB * 10**6 * 1.1, "what is reported is what the system says"


def test_all_three_at_once(tight: tuple[Server, Background]) -> None:
    """Requests for what does not fit at the same time wait for each other; none is refused."""
    server, _ = tight
    with ThreadPoolExecutor(3) as callers:
        answers = list(callers.map(lambda model: server.chat("Hi", model, max_tokens=3), ALL * 2))
    assert [answer.status_code for answer in answers] == [200] * 6


def test_a_pinned_model_stays(tight: tuple[Server, Background]) -> None:
    server, samples = tight
    pinned = server.request("POST", f"/calm/v1/models/{TINY}/pin")
    assert pinned.status_code == 200, pinned.text
    assert pinned.json()["state"]["pinned"] is True
    engine = server.engine(TINY)
    before = len(samples.results)
    for model in (SMOL, GEMMA):
        assert server.chat("Hi", model, max_tokens=2).status_code == 200
    assert server.engine(TINY).pid == engine.pid
    assert all(TINY in resident(s) for s in samples.results[before + 1 :])
    unpinned = server.request("POST", f"/calm/v1/models/{TINY}/unpin")
    assert unpinned.json()["state"]["pinned"] is False


def test_what_can_never_fit_fails_with_the_reason(tight: tuple[Server, Background]) -> None:
    server, _ = tight
    text = (server.fleet / f"{SMOL}.toml").read_text(encoding="utf-8")
    text = text.replace(f'name = "{SMOL}"', 'name = "giant"')
    text = "\n".join(
        "memory_hint_bytes = 5_000_000_000" if line.startswith("memory_hint_bytes") else line
        for line in text.split("\n")
    )
    (server.fleet / "giant.toml").write_text(text, encoding="utf-8")
    eventually("giant in the fleet", lambda: server.model("giant"))
    answer = server.chat("Hi", "giant")
    assert answer.status_code in (422, 503)
    assert "memory" in answer.json()["error"]["message"] or "budget" in answer.json()["error"]["message"]
    load = server.request("POST", "/calm/v1/models/giant/load")
    assert load.status_code == 503
    assert load.json()["error"]["code"] == "model_exceeds_budget"
    assert server.chat("Hi", max_tokens=2).status_code == 200, "the others serve"


def test_unloading_gives_the_memory_back(tight: tuple[Server, Background]) -> None:
    server, _ = tight
    server.load(SMOL)
    pid = server.engine(SMOL).pid
    used = server.snapshot()["used_bytes"]
    unloaded = server.request("POST", f"/calm/v1/models/{SMOL}/unload")
    assert unloaded.status_code == 200, unloaded.text
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert unloaded.json()["state"]["residency"] != "ready"
    assert server.snapshot()["used_bytes"] != used or used == 0
