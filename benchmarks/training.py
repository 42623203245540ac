"""Tokens a second that `calm specialise` learns, by length of rows and threads; beside transformers and peft.

    python -m benchmarks.training [--base smollm2-135m] [--threads 1 2] [--rounds 5]

A step is 2,048 tokens of random rows with four answer tokens each, forward, backward and update, rank 8 on all seven
projections of the base as served. Ours and theirs take turns in a random order. Theirs is left out, saying so,
unless installed (pip install transformers accelerate peft): bf16 base, LoRA on all linear layers, logits of the
answer tokens only. Medians of the rounds, with the slowest and the fastest.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from benchmarks.studies import table

STEP_TOKENS = 2048
ANSWER = 4
LENGTHS = (32, 128, 512)
RANK, ALPHA, RATE = 8, 16.0, 1e-4

Step = Callable[[list[list[int]]], None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--fleet", type=Path, default=Path("fleet"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    weights = weights_of(given.fleet, given.base)
    steps = {"ours": ours(weights)}
    if all(find_spec(name) for name in ("transformers", "accelerate", "peft")):
        steps["transformers + peft"] = theirs(weights)
    else:
        print("transformers, accelerate or peft is not installed: only ours", file=sys.stderr)
    print(report(measure(steps, given.threads, given.rounds, given.seed)))
    return 0


def weights_of(fleet: Path, base: str) -> Path:
    from calm.registry import load_fleet
    from calm.settings import cache_dir
    from calm.sources.fetch import cached_path

    card = load_fleet(fleet).fleet[base]
    path = cached_path(card.source, cache_dir(), fleet) if card.source else None
    if path is None:
        sys.exit(f"{base}: its weights are not here; run `make weights`")
    return path


def ours(weights: Path) -> Step:
    import torch

    from calm.specialise.batches import Tokens
    from calm.specialise.model import Decoder
    from calm.specialise.recipe import Recipe
    from calm.specialise.train import Trainer
    from calm.specialise.weights import read_base

    model = Decoder(*read_base(weights, torch.bfloat16), RANK, ALPHA, seed=0)

    def step(rows: list[list[int]]) -> None:
        tokens = [Tokens(tuple(row[:-ANSWER]), tuple(row[-ANSWER:])) for row in rows]
        recipe = Recipe(rank=RANK, alpha=ALPHA, rows_per_step=len(rows), piece_tokens=STEP_TOKENS)
        Trainer(model, recipe, tokens, tokens[:1], None).one_step()

    return step


def theirs(weights: Path) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        str(weights.parent), gguf_file=weights.name, dtype=torch.bfloat16
    )
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear"))
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), RATE)
    inner = model.base_model.model

    def step(rows: list[list[int]]) -> None:
        tokens = torch.tensor(rows)
        hidden = inner.model(input_ids=tokens).last_hidden_state[:, -ANSWER - 1 : -1]
        logits = inner.lm_head(hidden).float().flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, -ANSWER:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def measure(
    steps: dict[str, Step], threads: list[int], rounds: int, seed: int
) -> dict[tuple[str, int, int], list[float]]:
    """Tokens per second by trainer, length and threads; one round more than asked warms up and does not count."""
    import torch

    draw = random.Random(seed)
    found: dict[tuple[str, int, int], list[float]] = {}
    for number in range(rounds + 1):
        for count in threads:
            torch.set_num_threads(count)
            for name, length in draw.sample(
                [(n, length) for n in steps for length in LENGTHS], len(steps) * 3
            ):
                rows = [draw.choices(range(100, 40_000), k=length) for _ in range(STEP_TOKENS // length)]
                began = time.perf_counter()
                steps[name](rows)
                if number:
                    rate = STEP_TOKENS / (time.perf_counter() - began)
                    found.setdefault((name, length, count), []).append(rate)
    return found


def report(found: dict[tuple[str, int, int], list[float]]) -> str:
    """Markdown."""
    return table(
        ("trainer", "tokens a row", "threads", "tokens/s (slowest to fastest)"),
        [
            (name, str(length), str(count), f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})")
            for (name, length, count), rates in sorted(found.items())
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
