"""What the llama.cpp child is told, and what it refuses before any weights are read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.unit.gguf_files import numbers, write_base, write_lora

from calm.backends import llamacpp, sandbox
from calm.backends.llamacpp import LlamaCppBackend, base_among, blame, child_plan, http_threads, sort_adapters
from calm.errors import LoadFailed
from calm.records import AdapterFile, Capability, ChatSpec, Endpoint, ModelCard, SandboxSpec

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


# --- adapters --------------------------------------------------------------------------------------

LORA_WORDS = """model smol: the engine ended while starting, exit code 3; its last output:
0.01 E llama_adapter_lora_init_from_file_ptr: failed to apply lora adapter: model arch and LoRA arch mismatch
0.02 E cmn  common_init_: failed to load lora adapter '/a/finance.gguf'
0.03 E cmn  common_init_: failed to create context with model '/w/m.gguf'"""
FILES = {"finance": Path("/a/finance.gguf"), "twin": Path("/b/finance.gguf")}


def adapter(name: str, weights: Path | None) -> AdapterFile:
    return AdapterFile(card=card(name=name, adapter_of="smol"), weights=weights)


def test_misfits_are_sorted_out_before_the_start(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    wrong = {"blk.7.attn_q.weight.lora_a": numbers(4, 64), "blk.7.attn_q.weight.lora_b": numbers(64, 4)}
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    fitting, refused = sort_adapters(
        base,
        [
            adapter("good", write_lora(tmp_path / "good.gguf")),
            adapter("wrong", write_lora(tmp_path / "wrong.gguf", wrong)),
            adapter("broken", tmp_path / "broken.gguf"),
            adapter("absent", None),
        ],
    )
    assert fitting == {"good": tmp_path / "good.gguf"}
    assert refused["wrong"] == "the base has no tensor blk.7.attn_q.weight"
    assert refused["broken"].startswith("broken.gguf: ")
    assert "no source" in refused["absent"]


def test_a_base_that_cannot_be_read_is_left_to_the_engine(tmp_path: Path) -> None:
    good = write_lora(tmp_path / "good.gguf")
    assert sort_adapters(tmp_path / "gone.gguf", [adapter("good", good)]) == ({"good": good}, {})


def test_adapters_are_handed_to_the_child_in_order() -> None:
    plan = child_plan(card(), WEIGHTS, 1, SOCKET, LIBRARY, tuple(FILES.values()))
    assert plan["adapters"] == ["/a/finance.gguf", "/b/finance.gguf"]


async def test_adapters_are_no_option(tmp_path: Path) -> None:
    wrong = card(engine={"options": {"lora_adapters": "x"}})
    with pytest.raises(LoadFailed, match="is decided by adapter_of in the adapter's card"):
        await LlamaCppBackend(tmp_path).start(wrong, WEIGHTS, 1)


def test_the_base_among_adapters_has_a_number_of_its_own() -> None:
    endpoint = Endpoint(base_url="http://localhost", model="smol")
    assert base_among(endpoint, 0).adapter is None
    assert base_among(endpoint, 3).adapter == 3


@pytest.mark.parametrize(
    ("message", "blamed"),
    [
        (LORA_WORDS, ["finance"]),
        ("failed to load lora adapter", ["finance", "twin"]),
        ("the engine ended while starting, killed by SIGABRT", ["finance", "twin"]),
        ("failed to load model '/w/m.gguf'", []),
        ("no healthy answer; lora for 'blk.0' cannot use buft 'CPU_REPACK', fallback to CPU", []),
    ],
)
def test_who_is_to_blame_for_a_failed_start(message: str, blamed: list[str]) -> None:
    assert blame(message, FILES) == blamed


class Started:
    """Stands in for a ChildEngine."""

    endpoint = Endpoint(base_url="http://localhost", model="smol")

    def carry(self, *found: object) -> tuple[object, ...]:
        return found


async def test_a_failure_on_an_adapter_costs_that_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    async def start(self: LlamaCppBackend, *given: object) -> Started:
        adapters = given[3]
        assert isinstance(adapters, dict)
        tried.append(list(adapters))
        if "finance" in adapters:
            raise LoadFailed(LORA_WORDS)
        return Started()

    monkeypatch.setattr(LlamaCppBackend, "_start_in_home", start)
    monkeypatch.setattr(llamacpp, "sort_adapters", lambda weights, adapters: (dict(FILES), {}))
    found = await LlamaCppBackend(tmp_path).start(card(), WEIGHTS, 1)
    assert isinstance(found, tuple)
    adapters, refused, base = found
    assert tried == [["finance", "twin"], ["twin"]]
    assert (adapters["twin"].model, adapters["twin"].adapter, base.adapter) == ("twin", 0, 1)
    assert refused == {"finance": "llama.cpp refused it: model arch and LoRA arch mismatch"}


async def test_a_failure_of_the_base_is_told_without_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(self: LlamaCppBackend, *given: object) -> Started:
        raise LoadFailed("failed to load model '/w/m.gguf'")

    monkeypatch.setattr(LlamaCppBackend, "_start_in_home", start)
    monkeypatch.setattr(llamacpp, "sort_adapters", lambda weights, adapters: (dict(FILES), {}))
    with pytest.raises(LoadFailed, match=r"'m\.gguf'"):
        await LlamaCppBackend(tmp_path).start(card(), WEIGHTS, 1)
