"""Cards come, change, break and go while requests are served, and not one request fails over it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system.conftest import GEMMA, SMOL, Background, Launch, Server, eventually

pytestmark = pytest.mark.models

TWIN = "smollm2-twin"


@pytest.fixture
def busy(launch: Launch) -> Iterator[tuple[Server, Background]]:
    """A server with two models under a stream of pinned and routed requests."""
    server = launch(SMOL, GEMMA)

    def ask() -> str:
        model = (SMOL, "calm")[len(background.results) % 2]
        with server.stream("Who painted the Mona Lisa?", model, max_tokens=6) as response:
            text = response.read().decode()
        assert response.status_code == 200, text
        assert text.rstrip().endswith("data: [DONE]"), text
        return response.headers["x-calm-model"]

    background = Background(ask, threads=2)
    with background:
        background.grows(2)
        yield server, background
        background.grows(2)
    assert not background.errors


def write_twin(server: Server) -> None:
    """The same weights under another name: nothing has to be fetched."""
    text = (server.fleet / f"{SMOL}.toml").read_text(encoding="utf-8")
    text = text.replace(f'name = "{SMOL}"', f'name = "{TWIN}"')
    (server.fleet / f"{TWIN}.toml").write_text(text, encoding="utf-8")


def names(server: Server) -> list[str]:
    return [model["name"] for model in server.get("/calm/v1/fleet")["models"]]


def test_a_new_card_serves_and_a_removed_one_is_unknown(busy: tuple[Server, Background]) -> None:
    server, background = busy
    write_twin(server)
    eventually("the twin in the fleet", lambda: TWIN in names(server))
    answer = server.chat("What is the capital of Japan?", TWIN, max_tokens=12)
    assert answer.status_code == 200, answer.text
    assert "Tokyo" in answer.json()["choices"][0]["message"]["content"]
    assert TWIN in [m["id"] for m in server.get("/v1/models")["data"]]
    background.grows(2)
    (server.fleet / f"{TWIN}.toml").unlink()
    eventually("the twin gone", lambda: TWIN not in names(server))
    assert server.chat("Hi", TWIN).status_code == 404
    eventually("its engine gone", lambda: TWIN not in server.engines())


def test_a_removed_card_lets_its_running_answer_finish(busy: tuple[Server, Background]) -> None:
    server, _ = busy
    write_twin(server)
    eventually("the twin in the fleet", lambda: TWIN in names(server))
    with server.stream("Tell me a story", TWIN, max_tokens=80) as response:
        lines = response.iter_lines()
        next(lines)
        (server.fleet / f"{TWIN}.toml").unlink()
        eventually("the twin gone", lambda: TWIN not in names(server))
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    eventually("its engine gone", lambda: TWIN not in server.engines())


def test_a_new_description_takes_effect_without_a_reload(busy: tuple[Server, Background]) -> None:
    server, background = busy
    engine = server.engine(SMOL)
    card = server.fleet / f"{SMOL}.toml"
    text = card.read_text(encoding="utf-8")
    line = next(line for line in text.split("\n") if line.startswith("description"))
    card.write_text(text.replace(line, 'description = "Painters and paintings."'), encoding="utf-8")
    eventually(
        "the new description",
        lambda: (
            "Painters and paintings."
            in [model["description"] for model in server.get("/calm/v1/fleet")["models"]]
        ),
    )
    background.grows(2)
    assert server.engine(SMOL).pid == engine.pid


def test_a_change_of_the_engine_reloads_it_between_requests(busy: tuple[Server, Background]) -> None:
    server, background = busy
    engine = server.engine(SMOL)
    card = server.fleet / f"{SMOL}.toml"
    text = card.read_text(encoding="utf-8")
    assert "context = 2048" in text
    card.write_text(text.replace("context = 2048", "context = 1024"), encoding="utf-8")
    eventually("an engine of the new card", lambda: server.engine(SMOL).pid != engine.pid)
    background.grows(2)
    assert server.get(f"/calm/v1/models/{SMOL}")["card"]["context"] == 1024


BROKEN = [
    ("slots = 4", 'slots = "many"', "engine.slots"),
    ("context = 2048", "contxt = 2048", "contxt"),
    ('kind = "llamacpp"', 'kind = "magic"', "engine.kind"),
]


def test_a_broken_card_is_refused_by_field_while_the_old_one_serves(busy: tuple[Server, Background]) -> None:
    server, background = busy
    engine = server.engine(SMOL)
    card = server.fleet / f"{SMOL}.toml"
    text = card.read_text(encoding="utf-8")
    for good, bad, field in BROKEN:
        assert good in text
        card.write_text(text.replace(good, bad, 1), encoding="utf-8")
        refused = eventually(f"the refusal of {bad}", lambda: server.get("/calm/v1/fleet")["refused"])
        assert [(Path(r["file"]).name, r["field"]) for r in refused] == [(card.name, field)]
        assert refused[0]["reason"]
        background.grows(2)
        assert SMOL in names(server)
        assert server.engine(SMOL).pid == engine.pid
        card.write_text(text, encoding="utf-8")
        eventually("nothing refused", lambda: not server.get("/calm/v1/fleet")["refused"])
    noise = server.fleet / "noise.toml"
    noise.write_text("this is = = not toml", encoding="utf-8")
    refused = eventually("the refusal of noise", lambda: server.get("/calm/v1/fleet")["refused"])
    assert Path(refused[0]["file"]).name == noise.name
    background.grows(2)
    assert server.engine(SMOL).pid == engine.pid


def test_a_card_whose_weights_are_missing_says_so(launch: Launch) -> None:
    """Not fetching (`fleet.fetch = false`), so that the model stays unavailable and the others serve."""
    server = launch(SMOL)
    text = (server.fleet / f"{SMOL}.toml").read_text(encoding="utf-8")
    text = re.sub('sha256 = "[0-9a-f]{64}"', f'sha256 = "{"0" * 64}"', text)
    text = text.replace(f'name = "{SMOL}"', 'name = "absent"')
    (server.fleet / "absent.toml").write_text(text, encoding="utf-8")
    eventually("the card known", lambda: "absent" in names(server))
    answer = server.chat("Hi", "absent")
    assert answer.status_code == 503
    assert "calm models pull absent" in answer.json()["error"]["message"]
    assert server.chat("Hi", SMOL).status_code == 200
