"""Does the engine compute what the trainer trained? Checked after every export, before anybody relies on it.

The engine answers held-out rows greedily with the adapter; the trainer then reads the same answers and says which token
it holds for the likeliest at each place. bf16 here and 4-bit products there differ where two tokens are almost
equally likely, so a few differences are arithmetic; a wrong layout, template or scale is a landslide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm.specialise.batches import Tokens, pieces
from calm.specialise.model import Decoder
from calm.specialise.train import logits_at_once, read_answers

ENOUGH = 0.9
"""Share of agreeing tokens below which something is wrong."""


@torch.no_grad()
def agreement(model: Decoder, answered: Sequence[Tokens], piece_tokens: int) -> float | None:
    """Share of the engine's answer tokens that are the trainer's likeliest too; None when it gave none."""
    same = total = 0
    for piece in pieces([row for row in answered if row.answer], piece_tokens):
        hidden, wanted = read_answers(model, piece)
        size = logits_at_once(model)
        for part, tokens in zip(hidden.split(size), wanted.split(size), strict=True):
            same += int((model.logits(part).argmax(-1) == tokens).sum())
            total += len(tokens)
    return same / total if total else None
