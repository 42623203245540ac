"""The registry: every mistake named with file, field and reason; good cards serve on."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput, UnknownModel
from calm.registry import (
    CardProblem,
    Fleet,
    FleetLoad,
    card_schema,
    diff,
    keep_previous,
    load_fleet,
    parse_reference,
    read_card,
    remove_card,
    write_card,
)
from calm.registry.reference import HfReference, NpmReference, PypiReference, leaf_name
from calm.registry.schema import schema_text
from calm.registry.validate import check, is_loopback

ROOT = Path(__file__).parents[2]
SHA = "a" * 64
SOURCE = {"parts": ["file:/m.gguf"], "sha256": SHA}


def card(**changes: object) -> dict[str, object]:
    return {"name": "tiny", "description": "a small model", "source": SOURCE, **changes}


def problems(data: dict[str, object], stem: str = "tiny") -> list[CardProblem]:
    return check(data, f"{stem}.toml", stem)[1]


def only(data: dict[str, object], stem: str = "tiny") -> CardProblem:
    found = problems(data, stem)
    assert len(found) == 1, found
    return found[0]


def write(directory: Path, name: str, text: str = "", **changes: str) -> Path:
    file = directory / f"{name}.toml"
    body = text or f'name = "{name}"\ndescription = "d"\n[source]\nparts = ["file:/m"]\nsha256 = "{SHA}"\n'
    file.write_text(body)
    return file


def test_a_minimal_card_is_good() -> None:
    found, wrong = check(card(), "tiny.toml", "tiny")
    assert wrong == []
    assert found is not None
    assert found.placement == "local"


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"name": "Tiny"}, "name", "must match"),
        ({"name": "../tiny"}, "name", "must match"),
        ({"name": "tiny\n"}, "name", "must match"),
        ({"name": "calm"}, "name", "reserved"),
        ({"name": "other"}, "name", "differs from the file's name"),
        ({"description": "  "}, "description", "must not be empty"),
        ({"context": 0}, "context", "at least 1"),
        ({"context": "2048"}, "context", "expected `int`, got `str`"),
        ({"capabilities": []}, "capabilities", "must not be empty"),
        ({"capabilities": ["chats"]}, "capabilities[0]", "nvalid enum value"),
        ({"placement": "remote"}, "placement", "runs on this machine"),
        ({"domains": ["law", " "]}, "domains", "empty domain"),
        ({"max_in_flight": 0}, "max_in_flight", "at least 1"),
        ({"source": None}, "source", "needs weights"),
        ({"source": {"parts": [], "sha256": SHA}}, "source.parts", "must not be empty"),
        ({"source": {"parts": ["file:/m"], "sha256": "abc"}}, "source.sha256", "must match"),
        ({"source": {"parts": ["ftp:/m"], "sha256": SHA}}, "source.parts[0]", "no known scheme"),
        ({"source": {"parts": ["file:/m"]}}, "source.sha256", "missing"),
        ({"source": {**SOURCE, "filename": "../m"}}, "source.filename", "must match"),
        ({"engine": {"slots": 0}}, "engine.slots", "at least 1"),
        ({"engine": {"slots": True}}, "engine.slots", "expected `int`"),
        ({"engine": {"kind": "vllm"}}, "engine.kind", "nvalid enum value"),
        ({"engine": {"health": "health"}}, "engine.health", "must match"),
        ({"engine": {"start_timeout_s": float("inf")}}, "engine.start_timeout_s", "finite"),
        ({"engine": {"start_timeout_s": float("nan")}}, "engine.start_timeout_s", "finite"),
        ({"engine": {"url": "http://h/v1"}}, "engine.url", "not read by kind"),
        ({"priors": {"quality": {"law": 1.5}}}, "priors.quality.law", "between 0 and 1"),
        ({"priors": {"quality": {"law": float("nan")}}}, "priors.quality.law", "between 0 and 1"),
        ({"priors": {"decode_tps": 0}}, "priors.decode_tps", "greater than 0"),
        ({"price": {"input_usd_per_mtok": -1}}, "price.input_usd_per_mtok", "at least 0"),
        ({"sandbox": {"nice": 20}}, "sandbox.nice", "at most 19"),
        ({"chat": {"stop": ["x", ""]}}, "chat.stop", "empty string"),
        ({"chat": {"answer_tokens": 0}}, "chat.answer_tokens", "at least 1"),
        ({"chat": {"answer_tokens": 1.5}}, "chat.answer_tokens", "expected `int"),
    ],
)
def test_each_mistake_names_its_field(changes: dict[str, object], field: str, reason: str) -> None:
    found = only(card(**changes))
    assert found.field == field
    assert reason in found.reason
    assert found.file == "tiny.toml"


def test_a_missing_field_is_named() -> None:
    found = only({"name": "tiny", "source": SOURCE})
    assert (found.field, found.reason) == ("description", "missing; every card needs it")


def test_unknown_fields_get_a_suggestion_at_any_depth_and_all_at_once() -> None:
    found = problems(card(contxt=1, engine={"slot": 2, "kind": "llamacpp"}, description=3))
    assert {(p.field, p.hint) for p in found if p.reason == "unknown field"} == {
        ("contxt", "did you mean `context`?"),
        ("engine.slot", "did you mean `slots`?"),
    }
    assert any(p.field == "description" and "expected `str`" in p.reason for p in found)


def test_an_unknown_field_far_from_any_lists_the_known_ones() -> None:
    assert "default" not in (only(card(zzz=1)).hint or "")
    assert "description" in (only(card(zzz=1)).hint or "")


def test_free_tables_take_any_key() -> None:
    engine = {"options": {"n_ubatch": 256}, "env": {"A": "b"}}
    assert problems(card(engine=engine, priors={"quality": {"my domain": 0.5}})) == []


# --- engines ------------------------------------------------------------------------------------


def engine(**fields: object) -> dict[str, object]:
    return {"name": "tiny", "description": "d", "engine": fields}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"kind": "command"}, "engine.cmd", "needs its command"),
        ({"kind": "command", "cmd": "s --port {prot}"}, "engine.cmd", "neither {port} nor {socket}"),
        ({"kind": "command", "cmd": "s {port} {pth}"}, "engine.cmd", "unknown placeholder {pth}"),
        ({"kind": "command", "cmd": "s {port} {0}"}, "engine.cmd", "unknown placeholder {0}"),
        ({"kind": "command", "cmd": "s {port"}, "engine.cmd", "no template"),
        ({"kind": "command", "cmd": "s -m {path} {port}"}, "source", "weights are needed"),
        ({"kind": "openai"}, "engine.url", "needs its base URL"),
        ({"kind": "openai", "url": "localhost:11434"}, "engine.url", "must match"),
        ({"kind": "openai", "url": "http://u:p@h/v1"}, "engine.url", "credentials"),
    ],
)
def test_an_engine_needs_what_its_kind_reads(fields: dict[str, object], field: str, words: str) -> None:
    found = problems(engine(**fields))
    assert any(p.field == field and words in p.reason for p in found), found


def test_a_placeholder_gets_a_suggestion_and_literal_braces_are_fine() -> None:
    found = problems(engine(kind="command", cmd="s {prot} {socket}"))
    assert [p.hint for p in found] == ["did you mean `port`?"]
    assert problems(engine(kind="command", cmd='s --port {port} --json {{"a":1}}')) == []


def test_a_literal_key_is_refused_and_never_repeated() -> None:
    found = only(engine(kind="openai", url="http://127.0.0.1:1/v1", api_key_env="sk-abcdef"))
    assert found.field == "engine.api_key_env"
    assert "sk-abcdef" not in str(found)


@pytest.mark.parametrize(
    ("url", "written", "placement"),
    [
        ("http://127.0.0.1:11434/v1", None, "local"),
        ("http://localhost:11434", None, "local"),
        ("http://[::1]:8000/v1", None, "local"),
        ("https://api.example.com/v1", None, "remote"),
        ("http://10.0.0.7:8000/v1", None, "remote"),
        ("http://10.0.0.7:8000/v1", "local", "local"),
        ("http://127.0.0.1:4000/v1", "remote", "remote"),
        ("http://localhost.evil.example/v1", None, "remote"),
    ],
)
def test_a_server_elsewhere_is_remote_unless_vouched_for(
    url: str, written: str | None, placement: str
) -> None:
    data = engine(kind="openai", url=url) | ({"placement": written} if written else {})
    found, wrong = check(data, "tiny.toml", "tiny")
    assert found is not None, wrong
    assert found.placement == placement


def test_loopback_is_decided_by_the_host_alone() -> None:
    assert is_loopback("http://127.8.9.1/x")
    assert not is_loopback("http://127.0.0.1.example.com/x")
    assert not is_loopback("http://[bad")


# --- references ---------------------------------------------------------------------------------


def test_references_are_parsed() -> None:
    assert parse_reference("pypi:a-b==1.0/c/d.gguf") == PypiReference("a-b", "1.0", "c/d.gguf")
    assert parse_reference("npm:@s/p@1.2.3/m.part") == NpmReference("@s/p", "1.2.3", "m.part")
    assert parse_reference("hf:o/r/sub/f.gguf@v1") == HfReference("o/r", "sub/f.gguf", "v1")
    assert leaf_name(parse_reference("https://h/a/b%20c.gguf?x=1")) == "b%20c.gguf"
    assert leaf_name(parse_reference("file:///abs/m.gguf")) == "m.gguf"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model.gguf", "no known scheme"),
        ("hf:o/r/f.gguf", "pinned revision"),
        ("hf:o/r/f.gguf@main", "moves"),
        ("hf:o/f.gguf@v1", "is written hf:"),
        ("pypi:a>=1/f", "is written pypi:"),
        ("pypi:a==1.*/f", "exact version"),
        ("pypi:a==1/../f", "not a path"),
        ("npm:a@latest/f", "exact version"),
        ("npm:a@1.0.0", "is written npm:"),
        ("https://host", "host and a path"),
        ("https://u:secret@host/f", "password"),
        ("file:", "needs a path"),
        ("file://host/f", "names no host"),
    ],
)
def test_a_bad_reference_says_what_is_right(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_reference(text)
    assert "secret" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_a_value_error(text: str) -> None:
    for scheme in ("", "hf:", "pypi:", "npm:", "https:", "file:"):
        with contextlib.suppress(ValueError):  # any other error fails the test
            assert leaf_name(parse_reference(scheme + text)) is not None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["name", "description", "engine", "source", "chat", "x"]), _JSON))
def test_any_data_is_a_card_or_problems(data: dict[str, object]) -> None:
    found, wrong = check(data, "f.toml", "f")
    assert (found is None) == bool(wrong)


# --- directories --------------------------------------------------------------------------------


def test_a_bad_file_is_named_while_the_others_load(tmp_path: Path) -> None:
    write(tmp_path, "b")
    write(tmp_path, "a")
    write(tmp_path, "broken", "name = [unclosed")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    (tmp_path / "dir.toml").mkdir()
    (tmp_path / ".hidden.toml").write_text("nonsense")
    (tmp_path / "notes.txt").write_text("nonsense")
    load = load_fleet(tmp_path)
    assert list(load.fleet) == ["a", "b"]
    reasons = {Path(p.file).name: p.reason for p in load.problems}
    assert reasons["broken.toml"].startswith("not valid TOML")
    assert "line 1" in reasons["broken.toml"]
    assert reasons["latin.toml"].startswith("not UTF-8")
    assert reasons["dir.toml"] == "cannot be read: not a file"
    assert len(load.problems) == 3


def test_a_huge_file_is_no_card(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_bytes(b"#" * (2 << 20))
    assert "no metadata file" in load_fleet(tmp_path).problems[0].reason


def test_a_missing_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--fleet"):
        load_fleet(tmp_path / "none")


def test_two_files_cannot_claim_one_name(tmp_path: Path) -> None:
    write(tmp_path, "b")
    (tmp_path / "a.toml").write_text((tmp_path / "b.toml").read_text())
    load = load_fleet(tmp_path)
    assert list(load.fleet) == ["b"]
    assert load.problems[0].field == "name"


def test_revision_follows_content_and_diff_names_changes(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b")
    old = load_fleet(tmp_path).fleet
    assert load_fleet(tmp_path).fleet.revision == old.revision
    (tmp_path / "a.toml").write_text((tmp_path / "a.toml").read_text().replace('"d"', '"e"'))
    (tmp_path / "b.toml").unlink()
    write(tmp_path, "c")
    new = load_fleet(tmp_path).fleet
    assert new.revision != old.revision
    assert new != old
    change = diff(old, new)
    assert (change.added, change.changed, change.removed) == (("c",), ("a",), ("b",))
    assert change
    assert not diff(new, new)


def test_a_file_that_turned_bad_keeps_its_last_good_card(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b")
    before = load_fleet(tmp_path).fleet
    write(tmp_path, "a", "name = ")
    (tmp_path / "b.toml").unlink()
    write(tmp_path, "new", "name = ")
    after = keep_previous(before, load_fleet(tmp_path))
    assert list(after.fleet) == ["a"]
    assert after.fleet["a"] == before["a"]
    assert len(after.problems) == 2


def test_keep_previous_leaves_a_good_load_alone() -> None:
    load = FleetLoad(Fleet())
    assert keep_previous(Fleet(), load) is load


# --- add and remove -----------------------------------------------------------------------------


def test_write_card_copies_under_the_name_inside(tmp_path: Path) -> None:
    source = write(tmp_path, "x").rename(tmp_path / "download.txt")
    fleet = tmp_path / "fleet"
    assert write_card(fleet, source).name == "x"
    assert (fleet / "x.toml").read_text() == source.read_text()
    assert [file.name for file in fleet.iterdir()] == ["x.toml"]
    with pytest.raises(BadInput, match="--replace"):
        write_card(fleet, source)
    source.write_text(source.read_text().replace('"d"', '"newer"'))
    assert write_card(fleet, source, replace=True).description == "newer"
    assert [file.name for file in fleet.iterdir()] == ["x.toml"]


def test_write_card_refuses_a_bad_card_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path, "x", 'name = "x"\n')
    with pytest.raises(BadInput, match="description") as caught:
        write_card(tmp_path / "fleet", source)
    assert caught.value.field == "description"
    assert not (tmp_path / "fleet").exists()


def test_write_card_refuses_a_path_that_would_point_elsewhere(tmp_path: Path) -> None:
    source = write(tmp_path, "x")
    source.write_text(source.read_text().replace("file:/m", "file:m"))
    with pytest.raises(BadInput, match="absolute path"):
        write_card(tmp_path / "fleet", source)


def test_remove_card_removes_only_cards_of_the_fleet(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    outside = write(tmp_path, "outside")
    kept, gone = write(fleet, "smol"), write(fleet, "gone")
    assert remove_card(fleet, "gone") == gone
    with pytest.raises(UnknownModel, match="did you mean `smol`"):
        remove_card(fleet, "smoll")
    with pytest.raises(UnknownModel):
        remove_card(fleet, "../outside")
    assert kept.exists()
    assert outside.exists()


# --- what is published --------------------------------------------------------------------------


def test_the_default_fleet_is_good() -> None:
    load = load_fleet(ROOT / "fleet")
    assert load.problems == ()
    assert {"gemma-3-270m", "smollm2-135m", "tinyllama-1.1b"} <= set(load.fleet)
    assert all(found.source and found.source.licence for found in load.fleet.values())


def test_the_published_schema_is_up_to_date() -> None:
    published = (ROOT / "docs" / "schema" / "model-card.schema.json").read_text()
    assert published == schema_text(), "run: python -m calm.registry > docs/schema/model-card.schema.json"


def test_the_schema_carries_docs_and_limits_and_offers_no_null() -> None:
    definitions = card_schema()["$defs"]
    assert isinstance(definitions, dict)
    slots = definitions["EngineSpec"]["properties"]["slots"]
    assert slots["minimum"] == 1
    assert "continuous batching" in slots["description"]
    assert definitions["ModelCard"]["properties"]["source"]["$ref"] == "#/$defs/SourceSpec"
    assert "null" not in json.dumps(card_schema())


def test_every_field_of_a_card_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "model-card.md").read_text()
    definitions = card_schema()["$defs"]
    assert isinstance(definitions, dict)
    fields = {field for struct in definitions.values() for field in struct["properties"]}
    assert [field for field in sorted(fields) if f"`{field}`" not in page] == []


@pytest.mark.parametrize("example", ["ollama", "command"])
def test_the_howto_cards_are_good(example: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto" / "add-a-model.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```toml\n")[1:]]
    chosen = [block for block in blocks if f"# {example}.toml" in block]
    file = tmp_path / f"{example}.toml"
    file.write_text(chosen[0])
    found, wrong = read_card(file)
    assert found is not None, wrong


# --- adapters -------------------------------------------------------------------------------------

ADAPTER = {"adapter_of": "base"}


def put(directory: Path, name: str, more: str = "", tables: str = "") -> Path:
    file = directory / f"{name}.toml"
    source = f'[source]\nparts = ["file:/{name}.gguf"]\nsha256 = "{SHA}"\n'
    file.write_text(f'name = "{name}"\ndescription = "d"\n{more}\n{source}{tables}')
    return file


@pytest.mark.parametrize(
    ("stated", "field"),
    [
        ({"context": 4096}, "context"),
        ({"placement": "local"}, "placement"),
        ({"max_in_flight": 2}, "max_in_flight"),
        ({"sandbox": {"nice": 5}}, "sandbox"),
        ({"engine": {"kind": "llamacpp"}}, "engine.kind"),
        ({"engine": {"slots": 2}}, "engine.slots"),
        ({"chat": {"template": "x"}}, "chat.template"),
        (
            {"source": {**SOURCE, "convert": {"to": "Q4_0", "sha256": SHA}}},
            "source.convert",
        ),
    ],
)
def test_an_adapter_does_not_state_what_is_its_bases(stated: dict[str, object], field: str) -> None:
    problem = only(card(**ADAPTER, **stated))
    assert problem.field == field


def test_what_an_adapter_may_state() -> None:
    own = {
        "engine": {"upstream_model": "Finance-LoRA"},
        "chat": {"stop": ["\n"], "trim": True, "answer_tokens": 16},
        "memory_hint_bytes": 9_000_000,
        "priors": {"quality": {"finance": 0.9}},
        "price": {"input_usd_per_mtok": 0.1},
    }
    assert problems(card(**ADAPTER, **own)) == []


def test_an_adapter_of_itself_is_none() -> None:
    assert only(card(adapter_of="tiny")).field == "adapter_of"


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"kind": "openai", "url": "http://127.0.0.1:1"}, "is not read by kind"),
        ({"kind": "command", "cmd": "x {port}"}, "is not read by kind"),
        ({"kind": "onnx"}, "is not read by kind"),
    ],
)
def test_only_the_built_in_engine_converts(engine: dict[str, object], reason: str) -> None:
    source = {**SOURCE, "convert": {"to": "Q8_0", "sha256": SHA}}
    found = [p for p in problems(card(source=source, engine=engine)) if p.field == "source.convert"]
    assert [reason in p.reason for p in found] == [True]


def test_only_a_gguf_is_converted_and_its_digest_is_checked() -> None:
    convert = {"to": "Q8_0", "sha256": SHA}
    assert problems(card(source={**SOURCE, "parts": ["file:/m.gguf"], "convert": convert})) == []
    assert (
        only(card(source={**SOURCE, "parts": ["file:/m.onnx"], "convert": convert})).field == "source.convert"
    )
    wrong = {"to": "Q8_0", "sha256": "short"}
    assert only(card(source={**SOURCE, "convert": wrong})).field == "source.convert.sha256"


def test_an_onnx_engine_needs_weights() -> None:
    assert only({k: v for k, v in card(engine={"kind": "onnx"}).items() if k != "source"}).field == "source"
    assert problems(card(engine={"kind": "onnx"})) == []


def test_an_adapter_is_completed_from_its_base(tmp_path: Path) -> None:
    tables = '[engine]\nslots = 2\nthreads = 3\n[chat]\nstop = ["</s>"]\n[priors]\ndecode_tps = 40.0\nload_s = 1.5\n'
    put(tmp_path, "base", "context = 512\nmax_in_flight = 1", tables)
    put(
        tmp_path,
        "finance",
        'adapter_of = "base"\nmemory_hint_bytes = 7',
        '[engine]\nupstream_model = "fin"\n[priors]\ndecode_tps = 30.0\n[priors.quality]\nfinance = 0.9\n',
    )
    load = load_fleet(tmp_path)
    assert load.problems == ()
    finance, base = load.fleet["finance"], load.fleet["base"]
    assert (finance.host, base.host) == ("base", "base")
    assert (finance.context, finance.concurrency, finance.engine.slots) == (512, 1, 2)
    assert (finance.engine.upstream_model, base.engine.upstream_model) == ("fin", None)
    assert finance.chat.stop == ("</s>",)
    assert (finance.priors.decode_tps, finance.priors.load_s) == (30.0, 1.5)
    assert (finance.memory_hint_bytes, base.priors.quality) == (7, {})


def test_how_long_an_adapter_may_talk_is_not_its_bases_to_say(tmp_path: Path) -> None:
    put(tmp_path, "base", "", "[chat]\nanswer_tokens = 100\n")
    put(tmp_path, "terse", 'adapter_of = "base"', "[chat]\nanswer_tokens = 16\n")
    put(tmp_path, "free", 'adapter_of = "base"')
    fleet = load_fleet(tmp_path).fleet
    limits = {name: card.chat.answer_tokens for name, card in fleet.items()}
    assert limits == {"base": 100, "terse": 16, "free": None}


def test_adapters_of_a_remote_base_are_remote_and_need_no_file(tmp_path: Path) -> None:
    (tmp_path / "far.toml").write_text(
        'name = "far"\ndescription = "d"\n[engine]\nkind = "openai"\nurl = "https://far.example/v1"\n'
    )
    (tmp_path / "finance.toml").write_text('name = "finance"\ndescription = "d"\nadapter_of = "far"\n')
    finance = load_fleet(tmp_path).fleet["finance"]
    assert finance.remote
    assert finance.placement == "remote"


@pytest.mark.parametrize(
    ("base", "field", "reason"),
    [
        ("", "adapter_of", "no good card of `base`"),
        ('adapter_of = "other"', "adapter_of", "is itself an adapter"),
        ("context = 0", "adapter_of", "no good card of `base`"),
    ],
)
def test_an_adapter_without_a_base_is_a_problem_of_its_own(
    tmp_path: Path, base: str, field: str, reason: str
) -> None:
    put(tmp_path, "other")
    if base:
        put(tmp_path, "base", base)
    put(tmp_path, "finance", 'adapter_of = "base"')
    load = load_fleet(tmp_path)
    [problem] = [p for p in load.problems if Path(p.file).stem == "finance"]
    assert problem.field == field
    assert reason in problem.reason
    assert "other" in load.fleet
    assert "finance" not in load.fleet


def test_an_onnx_base_carries_no_adapters_and_a_built_in_one_needs_the_file(tmp_path: Path) -> None:
    put(tmp_path, "needle", "", '[engine]\nkind = "onnx"\n')
    put(tmp_path, "base")
    put(tmp_path, "finance", 'adapter_of = "needle"')
    (tmp_path / "medical.toml").write_text('name = "medical"\ndescription = "d"\nadapter_of = "base"\n')
    found = {Path(p.file).stem: (p.field, p.reason) for p in load_fleet(tmp_path).problems}
    assert found["finance"] == (
        "adapter_of",
        "`needle` runs on an engine of kind `onnx`, which carries no adapters",
    )
    assert found["medical"] == ("source", "an adapter on a llamacpp engine needs its weights")


def test_an_adapter_joins_when_its_base_appears_and_leaves_with_it(tmp_path: Path) -> None:
    put(tmp_path, "finance", 'adapter_of = "base"')
    before = load_fleet(tmp_path)
    assert list(before.fleet) == []
    file = put(tmp_path, "base")
    both = keep_previous(before.fleet, load_fleet(tmp_path))
    assert list(both.fleet) == ["base", "finance"]
    file.unlink()
    after = keep_previous(both.fleet, load_fleet(tmp_path))
    assert list(after.fleet) == []
    assert [Path(p.file).stem for p in after.problems] == ["finance"]


def test_a_base_that_turns_bad_keeps_its_adapters_serving(tmp_path: Path) -> None:
    put(tmp_path, "base")
    put(tmp_path, "finance", 'adapter_of = "base"')
    before = load_fleet(tmp_path)
    put(tmp_path, "base", "context = 0")
    after = keep_previous(before.fleet, load_fleet(tmp_path))
    assert list(after.fleet) == ["base", "finance"]
    assert after.fleet == before.fleet


def test_an_adapter_that_turns_bad_serves_on_with_its_bases_new_card(tmp_path: Path) -> None:
    put(tmp_path, "base")
    put(tmp_path, "finance", 'adapter_of = "base"')
    before = load_fleet(tmp_path)
    put(tmp_path, "base", "context = 4096")
    put(tmp_path, "finance", 'adapter_of = "base"\ncontext = 1')
    after = keep_previous(before.fleet, load_fleet(tmp_path))
    assert after.fleet["finance"].context == 4096
