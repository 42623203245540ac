"""The ONNX backend and its child with a toy network that spells a scripted text, one character a token."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.backends import onnx
from calm.backends.engine import make_home
from calm.backends.onnx import NO_ADAPTERS, OnnxBackend, child_plan, part_sizes
from calm.backends.onnx_child import server as child_server
from calm.backends.onnx_child import service as child_service
from calm.backends.onnx_child import writer as child_writer
from calm.backends.onnx_child.answer import read_calls
from calm.backends.onnx_child.grammar import Place
from calm.backends.onnx_child.load import split
from calm.backends.onnx_child.plan import read_plan
from calm.backends.onnx_child.process import CANNOT_LOAD
from calm.backends.onnx_child.prompt_lookup import guessed
from calm.backends.onnx_child.refusal import Left, Refused
from calm.backends.onnx_child.request import read_request
from calm.backends.onnx_child.server import Server
from calm.backends.onnx_child.service import Service
from calm.backends.onnx_child.tokens import EOS, TOOL_CALL, TOOLS, harmless, piece_text
from calm.backends.onnx_child.tools import Parameter, flat_parameters, snake_case
from calm.backends.onnx_child.writer import Writer
from calm.backends.upstream import HttpUpstream
from calm.errors import LoadFailed
from calm.records import AdapterFile, Endpoint, ModelCard

CHAT = "/v1/chat/completions"
CHARACTERS = [chr(code) for code in range(32, 127)]
PIECES = ["<pad>", "</s>", "<s>", "<unk>", "<tool_call>", "<tools>", *CHARACTERS]
FIRST = PIECES.index(" ")
WEATHER = {
    "type": "function",
    "function": {
        "name": "getWeather",
        "description": "Current weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City."},
                "days": {"type": ["integer", "null"]},
                "unit": {"enum": ["celsius", "kelvin"], "description": "Unit."},
            },
            "required": ["city"],
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
OSLO = '[{"name":"get_weather","arguments":{"city":"Oslo"}}]'


class Letters:
    """A tokenizer whose tokens are the printable characters of ASCII."""

    def encode(self, text: str) -> list[int]:
        return [FIRST + CHARACTERS.index(char) for char in text if char in CHARACTERS]

    def decode(self, ids: list[int]) -> str:
        return "".join(PIECES[token] for token in ids)


@dataclass
class Speller:
    """A network that likes the next character of its script best, and then the one after that."""

    script: str
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    runs: int = 0

    def read(self, tokens: Sequence[int]) -> object:
        return None

    def score(
        self, hidden: object, tokens: Sequence[int], last: int
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.runs += 1
        self.entered.set()
        if self.gate:
            self.gate.wait(30)
        return np.stack([self._row(len(tokens) - last + index) for index in range(last)])

    def _row(self, position: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        wanted = [TOOL_CALL, *Letters().encode(self.script), EOS]
        row = np.linspace(0.2, 0.1, len(PIECES), dtype=np.float32)
        row[wanted[min(position, len(wanted) - 1)]] = 1.0
        return row


def writer_of(script: str, context: int = 1024, **more: Any) -> Writer:
    return Writer(Speller(script, **more), Letters(), PIECES, context)


def body(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, STOP], **fields}


def written(script: str, **fields: object) -> str:
    writer = writer_of(script)
    return writer.text(writer.write(read_request(body(**fields)), lambda: True))


# --- reading a request --------------------------------------------------------------------------------


def test_tools_are_flattened_as_the_model_was_trained() -> None:
    (tool, _) = read_request(body()).tools
    assert tool.described() == {
        "name": "get_weather",
        "description": "Current weather.",
        "parameters": {
            "city": {"type": "string", "description": "City.", "required": True},
            "days": {"type": "integer", "description": "", "required": False},
            "unit": {"type": "string", "description": "Unit. One of: celsius, kelvin.", "required": False},
        },
    }


@pytest.mark.parametrize(
    ("name", "plain"),
    [("getWeather", "get_weather"), ("HTTPRequest", "http_request"), ("a.b-c", "a_b_c"), ("set_x", "set_x")],
)
def test_names_in_snake_case(name: str, plain: str) -> None:
    assert snake_case(name) == plain
    assert snake_case(plain) == plain


def test_schemas_of_another_shape_are_no_parameters() -> None:
    for schema in (None, [], "x", {"properties": []}, {"type": "object"}):
        assert flat_parameters(schema) == {}
    assert flat_parameters({"properties": {"a": True}, "required": "a"}) == {"a": Parameter("", "", False)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": None}, "tools"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "--"}}]}, "tools[0].function.name"),
        ({"tools": [STOP, {"type": "function", "function": {"name": "Stop"}}]}, "tools"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["x"]}, "stop"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "rain"}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_it_cannot_do_is_refused_by_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(Refused) as refused:
        read_request(body(**fields))
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.message.startswith(param)


def test_what_changes_nothing_is_taken() -> None:
    asked = read_request(
        body(n=1, temperature=0.7, stop=[], response_format={"type": "text"}, max_tokens=9999, logprobs=False)
    )
    assert (asked.limit, asked.must_call, asked.single) == (256, False, False)


def test_text_parts_are_joined_and_only_the_last_message_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert read_request(body(messages=messages)).question == "a\nb"


# --- what may be written ------------------------------------------------------------------------------

NAMES = st.text("abcdeé_", min_size=1, max_size=6)
VALUES = st.text(max_size=8) | st.integers() | st.booleans() | st.lists(st.text(max_size=3), max_size=2)


def kind_of(value: object) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", list: "array"}
    return kinds[type(value)]


@given(
    st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3),
    st.data(),
)
def test_every_valid_call_may_be_written_in_any_pieces(
    calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    functions = {
        json.dumps(name)[1:-1]: {
            json.dumps(key)[1:-1]: Parameter(kind_of(value), "", False) for key, value in arguments.items()
        }
        for name, arguments in calls
    }
    last_of_name = dict(calls)
    text = json.dumps(
        [{"name": name, "arguments": arguments} for name, arguments in last_of_name.items()],
        separators=(",", ":"),
    )
    place: Place | None = Place(functions)
    while text and place:
        cut = data.draw(st.integers(1, len(text)))
        piece, text = text[:cut], text[cut:]
        place = place.after(piece)
    assert place is not None
    assert not place.inside


FUNCTIONS: Mapping[str, Mapping[str, Parameter]] = {
    "get_weather": read_request(body()).tools[0].parameters,
    "stop": {},
}


@pytest.mark.parametrize(
    "text",
    [
        '[{"name":"get_w"',
        '[{"name":"nobody"',
        '[{"name":"get_weather","arguments":{"town"',
        '[{"name":"get_weather","arguments":{"city":3',
        '[{"name":"get_weather","arguments":{"days":"3"',
        '[{"name":"get_weather","arguments":{"days": "',
        '[{"name":"get_weather","arguments":{"unit":"fahrenheit"',
        '[{"name":"get_weather","arguments":{"unit":"cel"',
        '[{"name":"stop","arguments":{"',
    ],
)
def test_what_the_schemas_do_not_know_may_not(text: str) -> None:
    assert Place(FUNCTIONS).after(text) is None


@pytest.mark.parametrize(
    "text",
    [
        '[{"name":"get_weather","arguments":{"city":"a \\"name\\":\\" {["}},{"name":"stop","arguments":{}}]',
        '{"name":"get_weather","arguments":{"days":-3,"unit":"kelvin"}}',
        ' [{"name" : "stop", "arguments" : { } }]',
        "[]",
    ],
)
def test_what_they_know_may(text: str) -> None:
    place = Place(FUNCTIONS).after(text)
    assert place is not None
    assert not place.inside


def test_a_wish_for_something_unknown_is_turned_into_something_known() -> None:
    assert written('[{"name":"got_weather","arguments":{"cite":"Oslo"}}]') == OSLO


def test_the_end_must_not_come_inside_a_call() -> None:
    assert written('[{"name":"stop"') != '[{"name":"stop"'


def test_a_call_can_be_forced() -> None:
    assert written("[]") == "[]"
    assert json.loads(written(OSLO, tool_choice="required"))[0]["name"] == "get_weather"
    named = {"type": "function", "function": {"name": "stop"}}
    assert written('[{"name":"stop","arguments":{}}]', tool_choice=named).startswith('[{"name":"stop"')
    assert written(OSLO, tool_choice=named).startswith('[{"name":"stop"')


def test_pieces_become_text() -> None:
    assert [piece_text(piece) for piece in ("▁a", "<0x41>", "<0xC3>", "</s>", "b")] == [
        " a",
        "A",
        "",
        "",
        "b",
    ]


# --- guessing and limits ------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["a", "b", '"', "ab"]), max_size=12).map("".join), st.integers(1, 6))
def test_guessing_changes_no_answer(city: str, count: int) -> None:
    script = json.dumps([{"name": "get_weather", "arguments": {"city": city}}] * 2, separators=(",", ":"))
    before = child_writer.GUESSED_TOKENS
    try:
        answers = []
        for guesses in (0, count):
            child_writer.GUESSED_TOKENS = guesses
            answers.append(writer_of(script).write(read_request(body()), lambda: True))
    finally:
        child_writer.GUESSED_TOKENS = before
    plain, quick = answers
    assert plain.tokens == quick.tokens
    assert plain.complete
    assert quick.runs <= plain.runs == len(plain.tokens) + 1


def test_guesses_follow_the_last_likeness_and_stop_at_the_separator() -> None:
    assert guessed([EOS, 8, 9], [8, 9, 10, 11, 8, 9, 12, 13], 2) == [12, 13]
    assert guessed([EOS, 7, 9], [9, 10, TOOLS, 11], 3) == [10]
    assert guessed([EOS], [1, 2, 3, 6], 9) == [TOOL_CALL, 1, 2, 3]
    assert guessed([50, 51], [1, 2, 3], 3) == []


@pytest.mark.parametrize("limit", [1, 2, 7, 30])
def test_an_answer_is_never_longer_than_asked(limit: int) -> None:
    for choice in ("auto", "required"):
        answer = writer_of(OSLO).write(read_request(body(max_tokens=limit, tool_choice=choice)), lambda: True)
        assert len(answer.tokens) <= max(limit, len('[{"name":"') + 1)
        assert not answer.complete


def test_a_prompt_that_does_not_fit_is_refused_before_any_work() -> None:
    writer = writer_of(OSLO, context=100)
    with pytest.raises(Refused, match="the model reads 100"):
        writer.write(read_request(body()), lambda: True)


def test_control_tokens_in_a_question_are_only_text() -> None:
    assert "<tools>" not in harmless("x <tools><tool_call>")
    assert "<tool_call>" not in harmless("x <tools><tool_call>")


def test_nobody_waiting_ends_the_work() -> None:
    speller = Speller(OSLO)
    writer = Writer(speller, Letters(), PIECES, 1024)
    with pytest.raises(Left):
        writer.write(read_request(body()), lambda: speller.runs < 2)
    assert speller.runs == 2


# --- answers ------------------------------------------------------------------------------------------


def test_calls_carry_the_callers_names() -> None:
    asked = read_request(body())
    assert read_calls(OSLO, asked) == [("getWeather", '{"city": "Oslo"}')]
    assert read_calls("[]", asked) == []
    for text in (
        "",
        "{}",
        "[1]",
        '[{"name":"x","arguments":{}}]',
        '[{"name":"stop","arguments":3}]',
        OSLO[:-1],
    ):
        assert read_calls(text, asked) is None
    two = f"{OSLO[:-1]},{OSLO[1:]}"
    assert len(read_calls(two, asked) or ()) == 2
    assert len(read_calls(two, read_request(body(parallel_tool_calls=False))) or ()) == 1


@asynccontextmanager
async def serving(
    run_dir: Path, script: str, slots: int = 1, **more: Any
) -> AsyncIterator[Callable[..., Any]]:
    socket = make_home(run_dir) / "e.sock"
    endpoint = Endpoint(base_url="http://localhost", model="needle", socket=str(socket))
    speller = Speller(script, **more)
    rests: list[int] = []
    service = Service(Writer(speller, Letters(), PIECES, 1024), "needle", slots, lambda: rests.append(1))
    with Server(str(socket), service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            async with HttpUpstream() as upstream:

                async def ask(
                    path: str = CHAT, raw: bytes | None = None, **fields: object
                ) -> tuple[int, Any]:
                    sent = raw if raw is not None else msgspec.json.encode(body(**fields))
                    async with upstream.post(endpoint, path, sent) as reply:
                        got = await reply.read()
                        events = reply.content_type.startswith("text/event-stream")
                        return reply.status, got.decode() if events else msgspec.json.decode(got)

                async def busy() -> int:
                    async with upstream.get(endpoint, "/health") as reply:
                        return int(msgspec.json.decode(await reply.read())["busy"])

                ask.busy, ask.speller, ask.rests = busy, speller, rests  # type: ignore[attr-defined]
                yield ask
        finally:
            await asyncio.to_thread(server.shutdown)
            thread.join()


async def test_a_whole_answer(tmp_path: Path) -> None:
    async with serving(tmp_path, OSLO) as ask:
        status, answer = await ask()
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (status, choice["finish_reason"], choice["message"]["content"]) == (200, "tool_calls", None)
    assert call["function"] == {"name": "getWeather", "arguments": '{"city": "Oslo"}'}
    assert answer["model"] == "needle"
    assert answer["usage"]["completion_tokens"] == len(OSLO) + 1
    assert answer["timings"]["prompt_n"] == answer["usage"]["prompt_tokens"]


async def test_a_stream_carries_the_same(tmp_path: Path) -> None:
    async with serving(tmp_path, OSLO) as ask:
        status, text = await ask(stream=True, stream_options={"include_usage": True})
    *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    first, call, end, usage = map(json.loads, events)
    assert (status, last) == (200, "[DONE]")
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert call["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "getWeather"
    assert end["choices"][0]["finish_reason"] == "tool_calls"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], len(OSLO) + 1)


async def test_no_fitting_tool_is_an_empty_answer(tmp_path: Path) -> None:
    async with serving(tmp_path, "[]") as ask:
        _, answer = await ask()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ""}
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_memory_is_given_back_after_an_answer(tmp_path: Path) -> None:
    async with serving(tmp_path, OSLO) as ask:
        await ask()
        assert ask.rests == [1]


async def test_a_cut_answer_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path, OSLO) as ask:
        _, answer = await ask(max_tokens=9)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == OSLO[:8]


async def test_errors_are_openais(tmp_path: Path) -> None:
    async with serving(tmp_path, OSLO) as ask:
        status, error = await ask(tools=[])
        assert (status, error["error"]["param"]) == (400, "tools")
        assert error["error"]["type"] == "invalid_request_error"
        assert (await ask(path="/v1/embeddings"))[0] == 404
        assert (await ask(raw=b"{"))[0] == 400
        assert (await ask(raw=b"[]"))[0] == 400
        assert (await ask())[0] == 200


async def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_server, "MAX_BODY_BYTES", 100)
    async with serving(tmp_path, OSLO) as ask:
        assert (await ask())[0] == 413


async def test_a_forced_call_that_is_none_is_the_engines_fault(tmp_path: Path) -> None:
    async with serving(tmp_path, '[{"name":"stop"}]') as ask:
        status, error = await ask(tool_choice="required")
    assert (status, error["error"]["type"]) == (500, "server_error")


async def test_a_client_that_leaves_frees_the_slot(tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()
    async with serving(tmp_path, OSLO, gate=gate, entered=entered) as ask:
        try:
            leaving = asyncio.create_task(ask())
            await asyncio.to_thread(entered.wait, 30)
            assert await ask.busy() == 1
            leaving.cancel()
            await asyncio.wait({leaving})
            assert await ask.busy() == 1
        finally:
            gate.set()
        assert (await ask())[0] == 200
        alone = Speller(OSLO)
        Writer(alone, Letters(), PIECES, 1024).write(read_request(body()), lambda: True)
        assert ask.speller.runs == 1 + alone.runs


async def test_one_who_leaves_the_line_is_never_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_service, "POLL_S", 0.005)
    gate, entered = threading.Event(), threading.Event()
    async with serving(tmp_path, OSLO, gate=gate, entered=entered) as ask:
        try:
            first = asyncio.create_task(ask())
            await asyncio.to_thread(entered.wait, 30)
            second = asyncio.create_task(ask())
            await ask.busy()
            second.cancel()
            await asyncio.wait({second})
            assert await ask.busy() == 1
        finally:
            gate.set()
        assert (await first)[0] == 200


async def test_the_line_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_service, "QUEUE", 0)
    gate, entered = threading.Event(), threading.Event()
    async with serving(tmp_path, OSLO, gate=gate, entered=entered) as ask:
        try:
            first = asyncio.create_task(ask())
            await asyncio.to_thread(entered.wait, 30)
            assert (await ask())[0] == 429
        finally:
            gate.set()
        assert (await first)[0] == 200


# --- the backend --------------------------------------------------------------------------------------


def card(**options: object) -> ModelCard:
    engine = {"kind": "onnx", "slots": 1, "options": {"encoder_bytes": 3, "decoder_bytes": 4, **options}}
    fields = {
        "name": "needle",
        "description": "d",
        "context": 512,
        "capabilities": ["tools"],
        "engine": engine,
    }
    return msgspec.convert(fields, ModelCard)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "w.bin"
    file.write_bytes(b"encDECOtok")
    return file


def test_the_child_reads_the_plan_that_the_backend_wrote(weights: Path, tmp_path: Path) -> None:
    plan = child_plan(card(), weights, 2, Path("/h"), (3, 4), [Path("/lib")])
    assert plan.library == ["/lib"]
    assert (plan.sizes, plan.threads, plan.context, plan.slots) == ((3, 4), 2, 512, 1)
    assert (plan.socket, plan.model) == ("/h/e.sock", "needle")
    file = tmp_path / "plan.json"
    file.write_bytes(msgspec.json.encode(plan))
    assert read_plan(str(file)) == replace(plan, sizes=[3, 4])


def test_the_child_starts_without_calm_and_says_what_it_lacks(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(msgspec.json.encode(child_plan(card(), weights, 1, tmp_path, (3, 4), [])))
    command = [sys.executable, "-I", "-S", "-X", "importtime", str(onnx.CHILD), str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    *imported, reason = ended.stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in imported}
    assert (ended.returncode, reason) == (CANNOT_LOAD, "cannot load: No module named 'sentencepiece'")
    assert {"onnx_child.load", "onnx_child.server", "onnx_child.writer"} <= names
    assert not {name for name in names if name.split(".")[0] in ("calm", "numpy", "msgspec", "process")}


def test_the_one_file_is_three(weights: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    rest = split(weights, part_sizes(card(), weights), parts)
    assert [part.read_bytes() for part in parts] == [b"enc", b"DECO"]
    assert rest == b"tok"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"encoder_bytes": 0}, "engine.options.encoder_bytes"),
        ({"decoder_bytes": "4"}, "engine.options.decoder_bytes"),
        ({"encoder_bytes": True}, "engine.options.encoder_bytes"),
        ({"encoder_bytes": 7}, "engine.options"),
        ({"n_ubatch": 1}, "engine.options.n_ubatch"),
    ],
)
async def test_wrong_sizes_are_named(
    options: dict[str, object], field: str, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoadFailed) as failed:
        await OnnxBackend(tmp_path / "run").start(card(**options), weights, 1)
    assert failed.value.field == field
    assert not (tmp_path / "run").exists()


async def test_without_weights_or_their_file_nothing_is_started(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="needs weights"):
        await OnnxBackend(tmp_path / "run").start(card(), None, 1)
    with pytest.raises(LoadFailed, match="cannot be read"):
        await OnnxBackend(tmp_path / "run").start(card(), tmp_path / "none", 1)


async def test_a_missing_package_is_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ("no_such_package",))
    with pytest.raises(LoadFailed, match="pip install no_such_package"):
        await OnnxBackend(tmp_path / "run").start(card(), weights, 1)


async def test_a_child_that_cannot_load_leaves_its_reason_and_nothing_else(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text("import sys; print('cannot load: ' + sys.argv[1]); sys.exit(3)")
    monkeypatch.setattr(onnx, "CHILD", child)
    with pytest.raises(LoadFailed, match="exit code 3") as failed:
        await OnnxBackend(tmp_path / "run").start(card(), weights, 1)
    assert "cannot load" in failed.value.message
    assert str(tmp_path / "run") not in failed.value.message
    assert list((tmp_path / "run").iterdir()) == []


SERVES_HEALTH = """
import json, socketserver, sys
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

with socketserver.UnixStreamServer(json.load(open(sys.argv[1]))["socket"], Handler) as server:
    server.serve_forever()
"""


async def test_adapters_are_refused_with_the_reason_and_the_engine_serves_on(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(SERVES_HEALTH)
    monkeypatch.setattr(onnx, "CHILD", child)
    adapter = AdapterFile(card=msgspec.structs.replace(card(), name="finance"), weights=None)
    engine = await OnnxBackend(tmp_path / "run").start(card(), weights, 1, [adapter])
    try:
        assert engine.adapters() == {}
        assert engine.refused() == {"finance": NO_ADAPTERS}
        assert engine.endpoint.model == "needle"
    finally:
        await engine.stop()
    assert list((tmp_path / "run").iterdir()) == []
