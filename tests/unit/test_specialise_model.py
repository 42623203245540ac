"""The forward pass and the training loop on tiny weights; against the real engine in tests/system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="calm specialise needs PyTorch: pip install torch==2.13.0")

from calm.errors import BadInput
from calm.specialise import train as training
from calm.specialise.agreement import agreement
from calm.specialise.batches import Tokens
from calm.specialise.lora import LoraLinear
from calm.specialise.model import Decoder, Rows, Shape
from calm.specialise.recipe import Recipe
from calm.specialise.train import Progress, Trainer, rate

LLAMA = Shape(
    architecture="llama", layers=2, width=16, heads=4, kv_heads=2, head_width=4, epsilon=1e-5, rope_base=1e4,
    interleaved=True,
)  # fmt: skip
GEMMA = replace(
    LLAMA, architecture="gemma3", interleaved=False, local_rope_base=1e3, window=4, global_every=2, gelu=True,
    embedding_scale=4.0,
)  # fmt: skip
torch.set_num_threads(1)  # these matrices are tiny: threads would only wait for each other
VOCABULARY, HIDDEN = 23, 32
CPU = torch.device("cpu")


def weights_of(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    own, shared = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    found = {
        "token_embd.weight": drawn(VOCABULARY, shape.width),
        "output_norm.weight": torch.ones(shape.width),
    }
    for layer in range(shape.layers):
        sizes = {
            "attn_q": (own, shape.width), "attn_k": (shared, shape.width), "attn_v": (shared, shape.width),
            "attn_output": (shape.width, own), "ffn_gate": (HIDDEN, shape.width), "ffn_up": (HIDDEN, shape.width),
            "ffn_down": (shape.width, HIDDEN),
        }  # fmt: skip
        norms = {"attn_norm": shape.width, "ffn_norm": shape.width}
        if shape.architecture == "gemma3":
            norms |= {"attn_q_norm": shape.head_width, "attn_k_norm": shape.head_width}
            norms |= {"post_attention_norm": shape.width, "post_ffw_norm": shape.width}
        found |= {f"blk.{layer}.{name}.weight": drawn(*size) for name, size in sizes.items()}
        found |= {f"blk.{layer}.{name}.weight": 1 + drawn(size) for name, size in norms.items()}
    return found


def decoder(shape: Shape = LLAMA, *, rank: int = 4, trained: bool = False) -> Decoder:
    model = Decoder(shape, weights_of(shape), rank, 2.0 * rank, seed=1)
    if trained:
        for pair in model.pairs.values():
            torch.nn.init.normal_(pair.b, std=0.3, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("shape", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_rows_laid_end_to_end_are_read_as_if_alone(shape: Shape) -> None:
    model, rows = decoder(shape, trained=True), [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9]]
    together = model(Rows.of(rows, CPU)).split([len(row) for row in rows])
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, model(Rows.of([row], CPU)), rtol=1e-4, atol=1e-5)


def test_a_token_sees_what_is_before_it_and_nothing_after() -> None:
    model, row = decoder(trained=True), [3, 1, 4, 1, 5]
    whole, beginning = model(Rows.of([row], CPU)), model(Rows.of([row[:3]], CPU))
    torch.testing.assert_close(whole[:3], beginning, rtol=1e-4, atol=1e-5)


def test_a_local_layer_looks_back_over_its_window_only() -> None:
    local = replace(GEMMA, layers=1, window=3)
    model = decoder(local)
    last = [model(Rows.of([[first, 1, 4, 1, 5]], CPU))[-1] for first in (3, 7)]
    torch.testing.assert_close(last[0], last[1])
    wider = Decoder(replace(local, window=5), model.weights, 4, 8.0, 1)
    far = [wider(Rows.of([[first, 1, 4, 1, 5]], CPU))[-1] for first in (3, 7)]
    assert not torch.allclose(far[0], far[1])


def test_an_untrained_adapter_changes_nothing() -> None:
    rows = Rows.of([[1, 2, 3]], CPU)
    torch.testing.assert_close(decoder(rank=2)(rows), decoder(rank=8)(rows))


def test_gradients_of_the_projection_are_those_of_the_formula() -> None:
    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    x, a, b, weight = drawn(5, 6), drawn(2, 6), drawn(3, 2), drawn(3, 6).detach()
    assert torch.autograd.gradcheck(lambda x, a, b: LoraLinear.apply(x, weight, a, b, 1.5), (x, a, b))


# --- training -----------------------------------------------------------------------------------------

ROWS = [Tokens((1 + i % 5, 2, 7), (10 + i % 5, 0)) for i in range(40)]
RECIPE = Recipe(rank=4, alpha=8.0, epochs=12, rows_per_step=8, learning_rate=2e-2, patience=50)


def trained(
    home: Path | None = None, recipe: Recipe = RECIPE, watch: training.Watch = lambda progress, steps: None
) -> tuple[Trainer, dict[str, torch.Tensor]]:
    trainer = Trainer(decoder(), recipe, ROWS, ROWS[:10], home)
    return trainer, trainer.run(watch)


def test_it_learns_what_it_is_shown() -> None:
    trainer, best = trained()
    progress = trainer.progress
    assert progress.best is not None
    assert progress.best.exact == 1.0
    assert progress.checks[0].loss > 4 * progress.best.loss
    assert progress.tokens == sum(map(len, ROWS)) * 12
    model = decoder()
    model.pairs.load_state_dict(best)
    assert agreement(model, ROWS, 64) == 1.0


def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, expected = trained()

    def interrupt(progress: Progress, steps: int) -> None:
        if progress.step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, watch=interrupt)
    seen: list[int] = []
    again, found = trained(tmp_path, watch=lambda progress, steps: seen.append(progress.step))
    assert seen[0] == 18
    assert again.progress.checks == whole.progress.checks
    for name, value in expected.items():
        assert torch.equal(value, found[name])


def test_it_stops_when_nothing_gets_better() -> None:
    trainer, _ = trained(recipe=replace(RECIPE, epochs=500, patience=3))
    assert trainer.progress.stale == 3
    assert trainer.progress.step < trainer.steps / 2


@pytest.mark.parametrize("shape", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_how_much_is_computed_at_once_changes_nothing(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(piece_tokens: int, logits: int) -> torch.Tensor:
        monkeypatch.setattr(training, "LOGITS", logits)
        model = decoder(shape, trained=True)
        trainer = Trainer(model, replace(RECIPE, piece_tokens=piece_tokens), ROWS, ROWS, None)
        for piece in training.pieces(ROWS, piece_tokens):
            trainer._learn(piece, 80)
        return model.pairs["0_attn_q"].a.grad.clone()

    torch.testing.assert_close(gradient(4096, 1 << 20), gradient(20, 40), rtol=1e-3, atol=1e-5)


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("train", "held_out"), [([], ROWS), (ROWS, [])])
def test_both_sides_need_rows(train: list[Tokens], held_out: list[Tokens]) -> None:
    with pytest.raises(BadInput, match="rows to learn and rows held out"):
        Trainer(decoder(), RECIPE, train, held_out, None)


# --- the file -------------------------------------------------------------------------------------------


def test_the_adapter_is_laid_out_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from calm.specialise.export import write_adapter

    pairs = {name: value.detach() for name, value in decoder(trained=True).pairs.state_dict().items()}
    for name in ("one", "two"):
        write_adapter(tmp_path / f"{name}.gguf", "llama", pairs, 8.0, {"name": "tiny", "license": "MIT"})
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "one.gguf")
    stated = {
        key: reader.get_field(key).contents() for key in ("general.type", "adapter.type", "general.license")
    }
    assert stated == {"general.type": "adapter", "adapter.type": "lora", "general.license": "MIT"}
    assert reader.get_field("adapter.lora.alpha").contents() == 8.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7
    assert list(tensors["blk.1.ffn_down.weight.lora_a"].shape) == [HIDDEN, 4]
    assert list(tensors["blk.1.ffn_down.weight.lora_b"].shape) == [4, LLAMA.width]
    found = torch.from_numpy(tensors["blk.0.attn_k.weight.lora_b"].data.copy()).float()
    torch.testing.assert_close(found, pairs["0_attn_k.b"], rtol=1e-3, atol=1e-3)
