"""What decides a training's result, and what its checks say. No torch here: cards and commands read it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result, beside base and data. Written into the model card."""

    rank: int = 8
    alpha: float = 16.0
    epochs: float = 3.0
    learning_rate: float = 1e-3
    dropout: float = 0.0
    """Share of each block's output that is left out at a step: for few rows seen many times."""
    warmup: float = 0.05
    """Share of the steps over which the rate grows; then it falls to a tenth along a cosine."""
    rows_per_step: int = 16
    check_every: float = 0.25
    """Epochs between two looks at the held-out part."""
    patience: int = 6
    """Checks without anything better after which training stops."""
    held_out_rows: int = 300
    """At most so many rows are read at a check."""
    seed: int = 0
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    piece_tokens: int = 2048
    """Tokens computed at once: bounds memory, not the result."""


@dataclass(frozen=True)
class Check:
    """What the held-out part said."""

    step: int
    loss: float
    exact: float
    """Share of answers whose every token is the likeliest."""
