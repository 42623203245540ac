"""What the llama.cpp child is told, and what it refuses before any weights are read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from calm.backends import sandbox
from calm.backends.llamacpp import LlamaCppBackend, child_plan, http_threads
from calm.errors import LoadFailed
from calm.records import Capability, ChatSpec, ModelCard, SandboxSpec

WEIGHTS, SOCKET, LIBRARY = Path("/w/m.gguf"), Path("/r/e.sock"), Path("/lib")


def left_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def card(**fields: object) -> ModelCard:
    return msgspec.convert({"name": "smol", "description": "d", **fields}, ModelCard)


def settings(of: ModelCard) -> dict[str, object]:
    return msgspec.convert(child_plan(of, WEIGHTS, 3, SOCKET, LIBRARY)["set"], dict[str, object])


def test_context_is_per_request() -> None:
    told = settings(card(context=1000, engine={"slots": 3}))
    assert (told["n_ctx"], told["n_parallel"], told["kv_unified"]) == (3000, 3, False)


def test_it_listens_on_its_socket_alone_and_is_called_by_its_card() -> None:
    told = settings(card())
    assert told["hostnames"] == "/r/e.sock"
    assert "port" not in told
    assert told["model_alias"] == "smol"


def test_threads_and_options_are_passed_on() -> None:
    plan = child_plan(
        card(engine={"options": {"n_ubatch": 32}}), WEIGHTS, threads=3, socket=SOCKET, library=LIBRARY
    )
    assert plan["threads"] == 3
    assert plan["options"] == {"n_ubatch": 32}


def test_memory_outside_of_the_budget_is_off() -> None:
    told = settings(card())
    assert (told["cache_ram_mib"], told["fit_params"], told["warmup"]) == (0, False, False)


def test_template_override() -> None:
    assert "chat_template" not in settings(card())
    with_template = msgspec.structs.replace(card(), chat=ChatSpec(template="{{ x }}"))
    assert settings(with_template)["chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
    ("capabilities", "pooling"),
    [(("chat", "embeddings"), "mean"), (("embeddings",), None), (("chat",), None)],
)
def test_embeddings(capabilities: tuple[Capability, ...], pooling: str | None) -> None:
    told = settings(card(capabilities=capabilities, context=700))
    assert told.get("pooling_type") == pooling
    assert told.get("embedding", False) is ("embeddings" in capabilities)
    assert told.get("n_ubatch") == (700 if "embeddings" in capabilities else None)


def test_every_request_in_flight_finds_a_thread_of_the_http_server() -> None:
    assert http_threads(card(engine={"slots": 4})) >= 2 * 4
    assert http_threads(card(max_in_flight=9)) >= 2 * 9


@pytest.mark.parametrize(("option", "field"), [("n_ctx", "context"), ("port", "run directory")])
async def test_options_may_not_contradict_the_card(tmp_path: Path, option: str, field: str) -> None:
    backend = LlamaCppBackend(tmp_path)
    wrong = card(engine={"options": {option: 1}})
    with pytest.raises(LoadFailed, match=f"{option} is decided by {field}"):
        await backend.start(wrong, WEIGHTS, 1)


async def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"smol.*no source"):
        await LlamaCppBackend(tmp_path).start(card(), None, 1)


async def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadFailed, match="pip install xllamacpp"):
        await LlamaCppBackend(tmp_path).start(card(), WEIGHTS, 1)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"n_nonsense": 1}, "no parameter 'n_nonsense'"),
        ({"sampling.nonsense": 1}, "no parameter 'sampling.nonsense'"),
        ({"n_ubatch": "many"}, "n_ubatch = 'many' does not fit"),
        ({"use_mmap_typo": True}, "no parameter"),
        ({"swa_full": 3}, "true or false"),
        ({"pooling_type": "average"}, "LLAMA_POOLING_TYPE_MEAN"),
    ],
)
async def test_options_are_checked_by_name_and_type(
    tmp_path: Path, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(LoadFailed, match="smol") as failed:
        await LlamaCppBackend(tmp_path).start(card(engine={"options": options}), WEIGHTS, 1)
    assert complaint in str(failed.value)


async def test_broken_weights_are_named_without_their_directory(tmp_path: Path) -> None:
    broken = tmp_path / "secret-place" / "broken.gguf"
    broken.parent.mkdir()
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    run_dir = tmp_path / "r"
    with pytest.raises(LoadFailed, match=r"broken\.gguf") as failed:
        await LlamaCppBackend(run_dir).start(card(), broken, 1)
    assert "secret-place" not in str(failed.value)
    assert left_in(run_dir) == []


async def test_a_missing_sandbox_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    caged = card(sandbox={"kind": "bubblewrap"})
    with pytest.raises(LoadFailed, match="apt install bubblewrap") as failed:
        await LlamaCppBackend(tmp_path).start(caged, WEIGHTS, 1)
    assert failed.value.field == "sandbox.kind"
    assert left_in(tmp_path) == []


def test_wrappers_stand_in_front() -> None:
    wrapped = msgspec.structs.replace(card(), sandbox=SandboxSpec(wrapper=("ionice", "-c3")))
    assert sandbox.confined(wrapped, ["engine"], Path("/h"), None) == ["ionice", "-c3", "engine"]
