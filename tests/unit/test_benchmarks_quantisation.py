"""The benchmarks of quantisation and of switching: files they make, what they compare, and what they show."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput
from calm.gguf import fits, read_header
from calm.records import ModelCard, SourceSpec
from calm.registry.adapters import join
from calm.workloads.records import Query

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import switching  # noqa: E402
from benchmarks.quantisation import figures, quality, weights  # noqa: E402
from benchmarks.quantisation.__main__ import parse  # noqa: E402
from benchmarks.quantisation.measuring import Lines, Round, Scored, round_plan  # noqa: E402
from benchmarks.quantisation.weights import AS_IS, TYPES, Subject  # noqa: E402
from benchmarks.real_engine import Stock  # noqa: E402

BASE = "smol"
NARROW, WIDE = 64, 512
"""Rows that Q4_K cannot hold, and rows that it can."""


def base_file(path: Path) -> Path:
    """Two matrices of a block in Q8_0, an embedding in Q8_0 and a norm."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("made up")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(7)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, shape in {
        "token_embd.weight": (8, NARROW),
        "blk.0.attn_q.weight": (NARROW, NARROW),
        "blk.0.ffn_down.weight": (NARROW, WIDE),
    }.items():
        weights = draw.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weights, q8), raw_dtype=q8)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(NARROW, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(path: Path, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    found = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return np.asarray(gguf.quants.dequantize(found.data, found.tensor_type), dtype=np.float32)


# --- files ------------------------------------------------------------------------------------------


def test_q4_k_falls_back_to_q5_0_for_rows_that_do_not_divide(tmp_path: Path) -> None:
    source = base_file(tmp_path / "base.gguf")
    made = weights.subject(BASE, "Q4_K", source, tmp_path)
    types = {name: tensor.type_name for name, tensor in read_header(made.path).tensors.items()}
    assert types == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q5_0",
        "blk.0.ffn_down.weight": "Q4_K",
        "blk.0.attn_norm.weight": "F32",
    }
    assert made.mix == "Q5_0 x 1, Q4_K x 1"
    assert read_header(made.path).metadata["general.name"] == "made up"
    for name, most in (("blk.0.attn_q.weight", 0.1), ("blk.0.ffn_down.weight", 0.2)):
        assert np.abs(values(made.path, name) - values(source, name)).mean() < most


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0"])
def test_other_types_are_made_by_the_products_own_converter(tmp_path: Path, type_name: str) -> None:
    source = base_file(tmp_path / "base.gguf")
    made = weights.subject(BASE, type_name, source, tmp_path)
    assert made.mix == f"{type_name} x 2"
    assert weights.subject(BASE, AS_IS, source, tmp_path).path == source


def test_a_file_is_converted_once_and_half_a_file_is_never_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base_file(tmp_path / "base.gguf")

    def broken(source: Path, target: Path, type_name: str) -> None:
        target.write_bytes(b"half")
        raise BadInput("no room")

    monkeypatch.setattr(weights, "convert", broken)
    with pytest.raises(BadInput):
        weights.subject(BASE, "Q8_0", source, tmp_path)
    monkeypatch.undo()
    first = weights.subject(BASE, "Q8_0", source, tmp_path)
    monkeypatch.setattr(weights, "convert", broken)
    assert weights.subject(BASE, "Q8_0", source, tmp_path) == first


# --- speed ------------------------------------------------------------------------------------------


def subject(type_name: str) -> Subject:
    return Subject(base=BASE, type=type_name, path=Path("/w"), file_bytes=10, mix="Q8_0 x 2")


def test_every_round_has_every_type_on_every_thread_count_once() -> None:
    subjects = [subject(name) for name in TYPES]
    planned = round_plan(subjects, [1, 2], 5)
    for number in range(5):
        of_round = planned[8 * number : 8 * number + 8]
        assert {(of.type, threads) for of, threads, _ in of_round} == {
            (name, threads) for name in TYPES for threads in (1, 2)
        }
        assert {n for *_, n in of_round} == {number}
    assert len({tuple(of.type for of, *_ in planned[8 * n : 8 * n + 8]) for n in range(5)}) > 1


def timed(type_name: str, number: int, seconds: float) -> Round:
    return Round(
        base=BASE, type=type_name, threads=1, number=number, load_s=1.0, resident_bytes=100,
        prefill_tps=200 / seconds, decode_tps=50.0, query_s=seconds, query_j=2 * seconds,
    )  # fmt: skip


def test_types_are_compared_with_the_rounds_they_share_with_the_authors_file() -> None:
    drifting = [1.0, 2.0, 4.0]
    rounds = [timed(AS_IS, n, s) for n, s in enumerate(drifting)]
    rounds += [timed("Q4_0", n, s / 2) for n, s in enumerate(drifting)]
    as_is, q4 = figures.speeds(rounds, [subject(AS_IS), subject("Q4_0")], [1])
    assert as_is.latency_ratio is None
    assert q4.latency_ratio is not None
    assert (q4.latency_ratio.value, q4.latency_ratio.low, q4.latency_ratio.high) == pytest.approx(
        (0.5, 0.5, 0.5)
    )
    assert q4.query_s == (1.0, 0.5, 2.0)
    assert "Q8_0 x 2" in figures.report([as_is, q4], [])


# --- quality ----------------------------------------------------------------------------------------


def query(
    answer: str, kind: str = "label", choices: tuple[str, ...] = ("up", "down", "neutral", "none")
) -> Query:
    return Query(
        id="1", dataset="d", domain="d", prompt="?", answer=answer, answer_type=kind, choices=choices  # type: ignore[arg-type]
    )  # fmt: skip


def test_options_are_letters_words_or_few_labels() -> None:
    assert quality.options_of(query("B", "choice", ("x", "y", "z"))) == ("A", "B", "C")
    assert quality.options_of(query("yes", "yes/no/maybe", ())) == ("yes", "no", "maybe")
    assert quality.options_of(query("up")) == ("up", "down", "neutral", "none")
    assert quality.options_of(query("1", "label", tuple(map(str, range(21))))) == ()
    assert quality.options_of(query("7", "number", ())) == ()


def test_a_token_speaks_for_the_only_option_it_begins() -> None:
    forced, loss = quality.forced_choice(query("neutral"), {" neut": 0.3, "Up": 0.1, "n": 0.6})
    assert forced == 1.0
    assert loss == pytest.approx(-math.log(0.75), abs=1e-3)
    forced, loss = quality.forced_choice(query("down"), {" neut": 0.3, "Up": 0.1})
    assert forced == 0.0
    assert loss > 10


@given(st.dictionaries(st.text(max_size=8), st.floats(0, 1), max_size=20), st.sampled_from(["up", "none"]))
def test_the_log_loss_is_a_surprise_whatever_the_tokens(first: dict[str, float], right: str) -> None:
    forced, loss = quality.forced_choice(query(right), first)
    assert forced in (0.0, 1.0)
    assert loss >= 0.0
    assert math.isfinite(loss)


def scored(type_name: str, number: int, loss: float) -> Scored:
    return Scored(
        base=BASE, type=type_name, model=BASE, weights="w", dataset="d", query_id=str(number), quality=0.5,
        log_loss=loss,
    )  # fmt: skip


def test_quality_is_compared_row_by_row_and_only_of_the_same_weights() -> None:
    rows = [scored(AS_IS, n, float(n)) for n in range(4)] + [scored("Q4_0", n, n + 0.25) for n in range(3)]
    ids = [str(n) for n in range(4)]
    found = figures.quality(
        subject("Q4_0"), BASE, "d",
        figures.rows_of(rows, (BASE, "Q4_0", BASE, "w"), ids),
        figures.rows_of(rows, (BASE, AS_IS, BASE, "w"), ids),
    )  # fmt: skip
    assert found.log_loss_change is not None
    assert (found.log_loss_change.value, found.log_loss_change.n) == (0.25, 3)
    assert figures.rows_of(rows, (BASE, AS_IS, BASE, "other"), ids) == {}


def test_lines_are_kept_and_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out" / "rounds.jsonl"
    Lines(path).add(timed("Q4_0", 0, 1.0))
    path.write_bytes(path.read_bytes() + b'{"base": "sm')
    lines = Lines(path)
    lines.add(timed("Q4_0", 1, 1.0))
    assert [row.number for row in lines.read(Round)] == [0, 1]


def test_the_authors_file_is_always_among_the_types() -> None:
    assert parse(["--types", "Q4_K"]).types == [AS_IS, "Q4_K"]


# --- switching --------------------------------------------------------------------------------------


def at_hand(path: Path) -> Stock:
    cards, _ = join(
        [ModelCard(name=BASE, description="a base", source=SourceSpec(parts=("file:/b",), sha256="0" * 64))]
    )
    return Stock({card.name: card for card in cards}, Path(), {BASE: path})


def test_made_up_adapters_fit_their_base(tmp_path: Path) -> None:
    source = base_file(tmp_path / "base.gguf")
    adapter = switching.random_adapter(source, tmp_path / "a.gguf", seed=1, rank=4)
    header = read_header(adapter)
    assert header.is_lora
    assert fits(read_header(source), header) is None
    assert len(header.tensors) == 4  # a pair for each of the two matrices
    assert (
        switching.random_adapter(source, tmp_path / "b.gguf", seed=2, rank=4).read_bytes()
        != adapter.read_bytes()
    )


def test_missing_specialists_are_made_up_and_counted(tmp_path: Path) -> None:
    stock = at_hand(base_file(tmp_path / "base.gguf"))
    whole, names, made_up = switching.specialists(stock, BASE, 3, tmp_path)
    assert (len(names), made_up) == (3, 3)
    assert all(whole.cards[name].host == BASE and whole.weights(whole.cards[name]) for name in names)
    with pytest.raises(BadInput, match="no such model"):
        switching.specialists(stock, "other", 3, tmp_path)


def test_full_copies_are_files_of_their_own(tmp_path: Path) -> None:
    stock = at_hand(base_file(tmp_path / "base.gguf"))
    copies = switching.full_copies(stock, BASE, 3, tmp_path)
    assert len({path.stat().st_ino for path in copies.given.values()}) == 3
    assert all(copies.cards[name].adapter_of is None for name in copies.given)


@pytest.mark.parametrize("number", range(3))
def test_prompts_share_a_prefix_only_where_they_are_to(number: int) -> None:
    before, then = switching.prompts("shared prefix", number)
    prefix = before.split("\n\n")[0]
    assert then.startswith(prefix)
    assert before != then
    assert not switching.prompts("shared prefix", number + 1)[0].startswith(prefix)
    before, then = switching.prompts("short", number)
    assert before != then


def test_the_report_says_what_was_made_up_and_how_much_copies_take() -> None:
    found = switching.Found(
        base=BASE,
        threads=1,
        context=2048,
        memory=switching.Memory(
            base_bytes=100, adapters_bytes=200, copies_bytes=600, adapter_files_bytes=6, copy_files_bytes=60,
            specialists=6,
        ),
        switches=(
            switching.Switch(
                slots=1, kind="short", stay_s=(0.1, 0.2), switch_s=(0.11, 0.21), stay_cached=0, switch_cached=0,
                prompt_tokens=40,
            ),
        ),
        loads=(switching.Loading(what="a full copy", ready_s=(1.0,), first_token_s=(1.5,)),),
        made_up=2,
    )  # fmt: skip
    text = switching.report(found)
    assert "Full copies take 3.00 times the memory" in text
    assert "2 of them made up" in text
    assert "10.0 (10.0 to 10.0)" in text
