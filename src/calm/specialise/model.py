"""The forward pass of the architectures we train, on a GGUF's own tensors and in its own layout.

Rows of different length are computed without padding: every projection sees the tokens of all rows in one
matrix, only attention is arranged per row. There are no biases; dropout (Srivastava et al. 2014) falls on what the
two halves of a block add to the stream, and only while training. What differs between the architectures (rotary
layout, norms, activation, sliding windows) stands in `Shape`; a GGUF of another architecture is refused by name.
Checked against llama.cpp token by token (tests, and `agreement` after every training).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from calm.specialise.lora import LoraLinear, Pair

PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Hyperparameters of a decoder, from a GGUF's metadata."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    epsilon: float
    rope_base: float
    interleaved: bool
    """Rotary pairs are neighbours (llama's GGUF layout); else the halves of a head."""
    local_rope_base: float | None = None
    window: int | None = None
    """Tokens a local layer looks back, itself included."""
    global_every: int | None = None
    """Every n-th layer sees all tokens, the others a window."""
    gelu: bool = False
    embedding_scale: float = 1.0

    def is_global(self, layer: int) -> bool:
        return self.global_every is None or (layer + 1) % self.global_every == 0


@dataclass(frozen=True)
class Rows:
    """Rows laid end to end: `tokens` and `positions` (n,), and where each token stands in a (rows, longest) grid."""

    tokens: Tensor
    positions: Tensor
    grid: Tensor
    """Flat index of each token in the padded grid, (n,)."""
    count: int
    longest: int

    @staticmethod
    def of(rows: list[list[int]], device: torch.device) -> Rows:
        longest = max(map(len, rows))
        tokens = torch.tensor([token for row in rows for token in row], device=device)
        positions = torch.cat([torch.arange(len(row)) for row in rows]).to(device)
        first = torch.cat([torch.full((len(row),), i * longest) for i, row in enumerate(rows)]).to(device)
        return Rows(tokens, positions, first + positions, len(rows), longest)


class Decoder(torch.nn.Module):
    """Frozen weights by GGUF name (`blk.0.attn_q.weight`, ...) and trainable pairs beside the projections."""

    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, Tensor],
        rank: int,
        alpha: float,
        seed: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.weights = dict(weights)
        self.scale = alpha / rank
        self.dropout = torch.nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(seed)
        self.pairs = torch.nn.ModuleDict(
            {
                f"{layer}_{name}": _pair(weights[f"blk.{layer}.{name}.weight"], rank, generator)
                for layer in range(shape.layers)
                for name in PROJECTIONS
            }
        )

    def to_device(self, device: torch.device) -> Decoder:
        """Frozen weights and pairs on a device."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        self.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["token_embd.weight"].dtype

    @property
    def device(self) -> torch.device:
        return self.weights["token_embd.weight"].device

    def forward(self, rows: Rows) -> Tensor:
        """Hidden states before the output projection, (tokens, width)."""
        shape = self.shape
        x = functional.embedding(rows.tokens, self.weights["token_embd.weight"])
        if shape.embedding_scale != 1.0:
            x = x * shape.embedding_scale
        turns = {True: self._turns(rows, shape.rope_base)}
        turns[False] = self._turns(rows, shape.local_rope_base) if shape.local_rope_base else turns[True]
        for layer in range(shape.layers):
            x = self._block(layer, x, rows, turns[shape.is_global(layer)])
        return self._norm(x, "output_norm")

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, width) -> (n, vocabulary), float32."""
        output = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return (hidden @ output.t()).float()

    # --- a block ---

    def _block(self, layer: int, x: Tensor, rows: Rows, turns: tuple[Tensor, Tensor]) -> Tensor:
        blk = f"blk.{layer}."
        mixed = self._attention(layer, self._norm(x, blk + "attn_norm"), rows, turns)
        x = x + self.dropout(self._after(mixed, blk + "post_attention_norm"))
        h = self._norm(x, blk + "ffn_norm")
        gate, up = self._project(layer, "ffn_gate", h), self._project(layer, "ffn_up", h)
        gated = (functional.gelu(gate, approximate="tanh") if self.shape.gelu else functional.silu(gate)) * up
        added = self._after(self._project(layer, "ffn_down", gated), blk + "post_ffw_norm")
        return x + self.dropout(added)

    def _attention(self, layer: int, h: Tensor, rows: Rows, turns: tuple[Tensor, Tensor]) -> Tensor:
        shape, blk = self.shape, f"blk.{layer}."
        q = self._project(layer, "attn_q", h).view(-1, shape.heads, shape.head_width)
        k = self._project(layer, "attn_k", h).view(-1, shape.kv_heads, shape.head_width)
        v = self._project(layer, "attn_v", h).view(-1, shape.kv_heads, shape.head_width)
        q = self._turned(self._after(q, blk + "attn_q_norm"), turns)
        k = self._turned(self._after(k, blk + "attn_k_norm"), turns)
        mask = self._mask(rows, None if shape.is_global(layer) else shape.window)
        mixed = _attend(_grid(q, rows), _grid(k, rows), _grid(v, rows), mask)
        return self._project(layer, "attn_output", _flat(mixed, rows))

    def _mask(self, rows: Rows, window: int | None) -> Tensor:
        """What a token may not see is minus infinity: what follows it, and what lies behind its window."""
        place = torch.arange(rows.longest, device=rows.tokens.device)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (window or rows.longest))
        return torch.zeros_like(distance, dtype=self.dtype).masked_fill_(~seen, float("-inf"))

    def _project(self, layer: int, name: str, x: Tensor) -> Tensor:
        pair = self.pairs[f"{layer}_{name}"]
        assert isinstance(pair, Pair)
        a, b = pair.cast(x.dtype)
        result: Tensor = LoraLinear.apply(x, self.weights[f"blk.{layer}.{name}.weight"], a, b, self.scale)
        return result

    # --- norms and positions ---

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name + ".weight"]
        return functional.rms_norm(x, (x.shape[-1],), weight, self.shape.epsilon)

    def _after(self, x: Tensor, name: str) -> Tensor:
        """A norm that only some architectures have."""
        return self._norm(x, name) if name + ".weight" in self.weights else x

    def _turns(self, rows: Rows, base: float) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token's angles, (tokens, 1, head_width / 2)."""
        half = self.shape.head_width // 2
        steps = base ** (-torch.arange(half, device=rows.tokens.device, dtype=torch.float32) / half)
        angles = rows.positions[:, None, None].float() * steps
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _turned(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""
        cos, sin = turns
        if self.shape.interleaved:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


def _pair(weight: Tensor, rank: int, generator: torch.Generator) -> Pair:
    outputs, inputs = weight.shape
    return Pair(inputs, outputs, rank, generator)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention by two batched products; on CPUs twice as fast as the fused kernel, backward included.

    `q` (rows, heads, t, width), `k` and `v` (rows, kv_heads, t, width), `mask` (t, t) -> shape of `q`.
    """
    rows, heads, longest, width = q.shape
    group = heads // k.shape[1]
    grouped = q.reshape(rows, k.shape[1], group * longest, width)
    scores = (grouped @ k.transpose(-1, -2)) * width**-0.5 + mask.repeat(group, 1)
    return (scores.softmax(-1) @ v).view(rows, heads, longest, width)


def _grid(x: Tensor, rows: Rows) -> Tensor:
    """(tokens, heads, width) -> (rows, heads, longest, width), zero behind a row's end."""
    padded = x.new_zeros(rows.count * rows.longest, *x.shape[1:]).index_copy(0, rows.grid, x)
    return padded.view(rows.count, rows.longest, *x.shape[1:]).transpose(1, 2)


def _flat(x: Tensor, rows: Rows) -> Tensor:
    """(rows, heads, longest, width) -> (tokens, heads * width)."""
    return x.transpose(1, 2).reshape(rows.count * rows.longest, -1).index_select(0, rows.grid)
