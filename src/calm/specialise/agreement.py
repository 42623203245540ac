"""Does the engine compute what the trainer trained? Checked after every export, before anybody relies on it.

The engine answers held-out rows greedily with the adapter; the trainer then reads the same answers and says how likely
it holds each token. Logits around 20 are rounded to eighths in bf16, and the engine multiplies 8-bit numbers: of two
letters that are a toss-up it may write the other one. So a token agrees when the trainer finds none clearly likelier;
a wrong layout, template or scale is a landslide all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm.specialise.batches import Tokens, pieces
from calm.specialise.model import Decoder
from calm.specialise.train import logits_at_once, read_answers

ENOUGH = 0.9
"""Share of agreeing tokens below which something is wrong."""
TIE = 0.5
"""Nats by which another token may be likelier: two to three roundings of either side."""


@torch.no_grad()
def agreement(model: Decoder, answered: Sequence[Tokens], piece_tokens: int) -> float | None:
    """Share of the engine's answer tokens that are the trainer's likeliest too, or tie with it; None without any."""
    same = total = 0
    for piece in pieces([row for row in answered if row.answer], piece_tokens):
        hidden, wanted = read_answers(model, piece)
        size = logits_at_once(model)
        for part, tokens in zip(hidden.split(size), wanted.split(size), strict=True):
            logits = model.logits(part)
            behind = logits.max(-1).values - logits.gather(-1, tokens[:, None]).squeeze(-1)
            same += int((behind <= TIE).sum())
            total += len(tokens)
    return same / total if total else None
