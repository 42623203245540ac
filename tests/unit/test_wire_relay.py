"""Towards the engine and back: names, stop strings, usage, the held-back end, the receipt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest

from calm.errors import EngineLost
from calm.gateway.fake import CHAT, CHAT_CHUNKS, EMBEDDINGS, TEXT_CHUNKS, ScriptedService, card_named
from calm.gateway.limits import Limits
from calm.gateway.relay import Receipt, Relay, encode_for, merge_stops, receipt
from calm.gateway.wire import PARSERS
from calm.records import Ask, ChatSpec, Endpoint, EngineSpec, Kind, ModelCard

ENDPOINT = Endpoint(base_url="http://x", model="upstream-name")
RECEIPT = Receipt(
    request_id="r1",
    model="small",
    policy="calm",
    goal=None,
    energy_j=2.0,
    energy_meter="rapl",
    energy_kind="attributed",
    queue_s=0.0,
    load_s=None,
    ttft_s=None,
    total_s=None,
    decision_ms=0.1,
    attempts=1,
)


def ask_for(kind: str = "chat", **fields: object) -> Ask:
    prompt = {"chat": {"messages": [{"role": "user", "content": "hi"}]}}.get(
        kind, {"prompt": "x", "input": "x"}
    )
    body = msgspec.json.encode({**prompt, **fields})
    return PARSERS[kind](body, {}, limits=Limits(), request_id="r1", now_s=0.0)


def run(ask: Ask, chunks: Sequence[bytes]) -> tuple[list[list[dict[str, object]]], list[dict[str, object]]]:
    """Payloads released by each chunk, and at the end."""
    relay = Relay(ask, "small")
    released = [[msgspec.json.decode(out) for out in relay.chunk(chunk)] for chunk in chunks]
    return released, [msgspec.json.decode(out) for out in relay.last(RECEIPT)]


# --- to the engine ------------------------------------------------------------------------------------


def test_the_engine_hears_its_own_name_and_everything_else_unchanged() -> None:
    ask = ask_for(model="calm", temperature=0.25, calm={"goal": "x"}, weird={"a": [1, 2.5, None]})
    plain = {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "upstream-name",
        "temperature": 0.25,
        "weird": {"a": [1, 2.5, None]},
    }
    server = msgspec.structs.replace(
        card_named("m"), engine=EngineSpec(kind="openai", url="http://localhost")
    )
    assert msgspec.json.decode(encode_for(ask, server, ENDPOINT)) == plain
    # llama.cpp notices a client that left only on a stream, so it is always asked for one
    streamed = {**plain, "stream": True, "stream_options": {"include_usage": True}}
    assert msgspec.json.decode(encode_for(ask, card_named("m"), ENDPOINT)) == streamed


def test_a_stream_always_asks_for_usage_and_keeps_other_options() -> None:
    ask = ask_for(stream=True, stream_options={"include_usage": False, "x": 1})
    body = msgspec.json.decode(encode_for(ask, card_named("m"), ENDPOINT))
    assert body["stream_options"] == {"include_usage": True, "x": 1}
    assert ask.body["stream_options"] == {"include_usage": False, "x": 1}


def test_the_adapter_is_the_fleets_to_choose() -> None:
    """A caller who names one of his own would be answered by a model that nobody decided for."""
    card = ModelCard(name="finance", description="d", adapter_of="base")
    ask = ask_for(lora=[{"id": 5, "scale": 9.0}])
    specialist = Endpoint(base_url="http://x", model="base", adapter=2)
    assert msgspec.json.decode(encode_for(ask, card, specialist))["lora"] == [{"id": 2, "scale": 1.0}]
    assert "lora" not in msgspec.json.decode(encode_for(ask, card, ENDPOINT))


def test_the_cards_stop_strings_join_the_callers() -> None:
    card = ModelCard(name="m", description="", chat=ChatSpec(stop=("</s>", "User:")))
    body = msgspec.json.decode(encode_for(ask_for(stop="\n"), card, ENDPOINT))
    assert body["stop"] == ["\n", "</s>", "User:"]
    assert "stop" not in msgspec.json.decode(encode_for(ask_for("embeddings"), card, ENDPOINT))
    assert merge_stops(None, ("a",)) == ["a"]
    assert merge_stops(["a", "b"], ("b", "c")) == ["a", "b", "c"]


SHORT = ModelCard(name="m", description="", chat=ChatSpec(answer_tokens=16))
LENGTHS = ("max_tokens", "max_completion_tokens", "n_predict")


def lengths(card: ModelCard, kind: Kind = "chat", **body: object) -> dict[str, object]:
    """What the engine is told of an answer's length."""
    sent = msgspec.json.decode(encode_for(ask_for(kind, **body), card, ENDPOINT))
    return {name: sent[name] for name in LENGTHS if name in sent}


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, {"max_tokens": 16}),
        ({"max_tokens": None}, {"max_tokens": 16}),
        ({"max_tokens": 500}, {"max_tokens": 16}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 500}, {"max_tokens": 16, "max_completion_tokens": 16}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 500}, {"max_tokens": 5, "max_completion_tokens": 5}),
        ({"n_predict": 500}, {"max_tokens": 16, "n_predict": 16}),
        ({"n_predict": 5.0}, {"max_tokens": 5, "n_predict": 5}),
        ({"n_predict": 0}, {"max_tokens": 0, "n_predict": 0}),
        ({"n_predict": -1}, {"max_tokens": 16, "n_predict": 16}),
        ({"n_predict": "many"}, {"max_tokens": 16, "n_predict": 16}),
    ],
)
def test_an_answer_is_no_longer_than_the_card_and_the_caller_allow(
    kind: Kind, asked: dict[str, object], told: dict[str, object]
) -> None:
    assert lengths(SHORT, kind, **asked) == told


def test_where_the_card_sets_no_limit_the_callers_own_goes_through_as_it_came() -> None:
    asked = {"max_completion_tokens": 500, "n_predict": -1}
    assert lengths(card_named("m"), **asked) == asked
    assert lengths(card_named("m")) == {}


def test_embeddings_have_no_length() -> None:
    assert lengths(SHORT, "embeddings") == {}


def test_a_server_that_is_not_ours_is_told_the_length_of_a_chat_once() -> None:
    """OpenAI's own refuses max_tokens beside max_completion_tokens."""
    cloud = msgspec.structs.replace(SHORT, engine=EngineSpec(kind="openai", url="https://far.example"))
    assert lengths(cloud, max_completion_tokens=500) == {"max_completion_tokens": 16}
    assert lengths(cloud) == {"max_tokens": 16}
    told = {"max_tokens": 16, "max_completion_tokens": 16}
    assert lengths(cloud, "completion", max_completion_tokens=500) == told


# --- back ---------------------------------------------------------------------------------------------


def test_a_whole_answer_gets_id_model_and_receipt_and_keeps_the_rest() -> None:
    answer = msgspec.json.decode(Relay(ask_for(), "small").whole(CHAT, RECEIPT))
    engine = msgspec.json.decode(CHAT)
    assert (answer["id"], answer["model"]) == ("chatcmpl-r1", "small")
    assert answer["calm"]["energy_j"] == 2.0
    assert answer["calm"]["load_s"] is None
    for field in ("choices", "usage", "timings", "created", "object"):
        assert answer[field] == engine[field]


def test_embeddings_have_no_id() -> None:
    answer = msgspec.json.decode(Relay(ask_for("embeddings"), "small").whole(EMBEDDINGS, RECEIPT))
    assert "id" not in answer
    assert answer["data"][0]["embedding"] == [0.6, 0.8]


def test_tokens_go_out_at_once_and_the_end_waits_for_the_receipt() -> None:
    released, end = run(ask_for(stream=True), CHAT_CHUNKS)
    assert [len(out) for out in released] == [1, 1, 1, 0, 0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in end] == ["stop"]
    assert end[0]["calm"]["request_id"] == "r1"
    assert end[0]["timings"] == {"prompt_ms": 3.5}
    chunks = [*itertools.chain(*released), *end]
    assert all("usage" not in chunk for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-r1"}


def test_the_usage_chunk_comes_last_where_it_was_asked_for() -> None:
    ask = ask_for(stream=True, stream_options={"include_usage": True})
    released, end = run(ask, CHAT_CHUNKS)
    assert [len(out) for out in released] == [1, 1, 1, 0, 1]
    assert released[-1][0]["choices"][0]["finish_reason"] == "stop"
    assert "calm" not in released[-1][0]
    assert end[0]["choices"] == []
    assert end[0]["usage"]["total_tokens"] == 7
    assert end[0]["calm"]["energy_j"] == 2.0


def test_completions_stream_alike() -> None:
    released, end = run(ask_for("completion", stream=True), TEXT_CHUNKS)
    assert [len(out) for out in released] == [1, 0, 0]
    assert end[0]["choices"][0]["text"] == "lo"
    assert end[0]["id"] == "cmpl-r1"


def test_of_several_answers_only_the_last_end_is_held() -> None:
    def choice(index: int, finish: str | None) -> bytes:
        return msgspec.json.encode({"choices": [{"index": index, "delta": {}, "finish_reason": finish}]})

    chunks = [choice(0, None), choice(0, "stop"), choice(1, None), choice(1, "length")]
    released, end = run(ask_for(stream=True, n=2), chunks)
    assert [len(out) for out in released] == [1, 0, 2, 0]
    assert end[0]["choices"][0]["finish_reason"] == "length"
    assert "calm" in end[0]


def test_usage_beside_content_is_hidden_unless_asked_for() -> None:
    chunk = msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": None})
    assert "usage" not in run(ask_for(stream=True), [chunk])[0][0][0]
    asked = ask_for(stream=True, stream_options={"include_usage": True})
    assert run(asked, [chunk])[0][0][0]["usage"] is None


@pytest.mark.parametrize("payload", [b"", b"oops", b"[]", b"3", b'{"a":', b"\xff", b"[" * 100_000])
def test_an_engine_that_sends_no_json_object_is_lost(payload: bytes) -> None:
    with pytest.raises(EngineLost):
        Relay(ask_for(), "small").whole(payload, RECEIPT)
    with pytest.raises(EngineLost):
        Relay(ask_for(stream=True), "small").chunk(payload)


@pytest.mark.parametrize("choices", [b"3", b"null", b'"x"', b'{"finish_reason":1}', b'[{"finish_reason":1}]'])
def test_odd_choices_pass_untouched(choices: bytes) -> None:
    out = Relay(ask_for(stream=True), "small").chunk(b'{"choices":%s}' % choices)
    assert msgspec.json.decode(out[0])["choices"] == msgspec.json.decode(choices)


async def test_unknown_energy_is_null_and_not_zero() -> None:
    async with ScriptedService().serve(ask_for()) as reply:
        early = receipt(reply)
        assert (early.energy_j, early.energy_meter, early.total_s) == (None, None, None)
        await reply.body()
        assert receipt(reply).energy_meter == "scripted"


def test_white_space_before_the_first_word_goes_where_the_card_says_so() -> None:
    relay = Relay(ask_for(stream=True), "small", trim=True)
    deltas = [None, " ", "  Par", " is"]
    out = [
        relay.chunk(msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": text}}]}))
        for text in deltas
    ]
    said = [
        msgspec.json.decode(chunk)["choices"][0]["delta"]["content"] for chunks in out for chunk in chunks
    ]
    assert said == [None, "", "Par", " is"]
    whole = (
        b'{"choices":[{"index":0,"message":{"content":"  Paris "}},{"index":1,"message":{"content":"\\n"}}]}'
    )
    trimmed = msgspec.json.decode(Relay(ask_for(), "small", trim=True).whole(whole, RECEIPT))
    assert [choice["message"]["content"] for choice in trimmed["choices"]] == ["Paris ", ""]
    untouched = msgspec.json.decode(Relay(ask_for(), "small").whole(whole, RECEIPT))
    assert untouched["choices"][0]["message"]["content"] == "  Paris "
    odd = Relay(ask_for(), "small", trim=True).whole(b'{"choices":7}', RECEIPT)
    assert msgspec.json.decode(odd)["choices"] == 7
