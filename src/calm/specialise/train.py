"""The training loop: steps, held-out checks, the best state kept, and everything needed to go on tomorrow.

The loss is the cross-entropy of the answer's tokens given the prompt; logits are computed for those alone. After every
`check_every` rows the held-out part is read; the adapter of the best check is what comes out. Best is by exact
answers where answers are short (labels, letters, numbers: the share whose every token is the likeliest one), else by
loss. Training stops early when `patience` checks brought nothing better.
"""

from __future__ import annotations

import copy
import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from calm.errors import BadInput
from calm.specialise.batches import Tokens, epoch, pieces, spread
from calm.specialise.model import Decoder, Rows
from calm.specialise.recipe import Check, Recipe

SHORT_ANSWER = 16
"""Mean tokens of an answer up to which exact answers decide, not the loss."""
SAVE_EVERY_S = 60.0
TRIM_EVERY = 16
"""Steps between two returns of freed memory to the system."""
CHECK_COST = 4
"""Tokens learned at least for each token read at a check (which costs half as much, having no gradient)."""
LOGITS = 1 << 25
"""Logits held at once, 128 MiB of them."""


@dataclass
class Progress:
    """Where training stands; owner of everything that is saved, beside the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Of the last steps, smoothed."""
    best: Check | None = None
    stale: int = 0
    """Checks since the best one."""
    checks: list[Check] = field(default_factory=list)


Watch = Callable[[Progress, int], None]
"""Called after each step with the number of steps there will be at most."""


class Trainer:
    """One training; `run` returns the best adapter's state."""

    def __init__(
        self,
        model: Decoder,
        recipe: Recipe,
        train: Sequence[Tokens],
        held_out: Sequence[Tokens],
        home: Path | None,
    ) -> None:
        """`home` is where it is saved, None for nowhere. Raises BadInput without rows on both sides."""
        if not train or not held_out:
            raise BadInput("training needs rows to learn and rows held out", field="data")
        self.model, self.recipe = model, recipe
        self.train, self.held_out = train, spread(held_out, recipe.held_out_rows)
        self.progress = Progress()
        self._home = home
        self._epoch: tuple[int, list[list[int]]] | None = None
        """Number and steps of the epoch under way."""
        self._optimiser = torch.optim.AdamW(
            model.pairs.parameters(), lr=recipe.learning_rate, weight_decay=0.0
        )
        self._best = self._state()
        self._saved_at = time.monotonic()
        self._short = sum(len(row.answer) for row in self.held_out) <= SHORT_ANSWER * len(self.held_out)

    @property
    def steps(self) -> int:
        return max(1, round(self.steps_per_epoch * self.recipe.epochs))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.recipe.rows_per_step)

    def run(self, watch: Watch) -> dict[str, Tensor]:
        """Train to the end or until nothing improves. Saves at SAVE_EVERY_S and when interrupted."""
        self._resume()
        try:
            while self.progress.step < self.steps and self.progress.stale < self.recipe.patience:
                self.one_step()
                if self.progress.step % self._check_steps == 0 or self.progress.step == self.steps:
                    self._check()
                watch(self.progress, self.steps)
                if self.progress.step % TRIM_EVERY == 0:
                    give_memory_back()
                if time.monotonic() - self._saved_at > SAVE_EVERY_S:
                    self._save()
        finally:
            self._save()
        return self._best

    @property
    def _check_steps(self) -> int:
        """A share of an epoch, but no more often than that checking costs a small part of learning."""
        learned = sum(map(len, self.train)) / self.steps_per_epoch
        checked = CHECK_COST * sum(map(len, self.held_out))
        return max(1, round(self.recipe.check_every * self.steps_per_epoch), math.ceil(checked / learned))

    # --- a step ---

    def one_step(self) -> None:
        """Learn the next rows."""
        began = time.monotonic()
        number, place = divmod(self.progress.step, self.steps_per_epoch)
        torch.manual_seed(self.recipe.seed + self.progress.step)  # dropout, the same after an interruption
        self.model.train()
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = number, epoch(self.train, self.recipe.rows_per_step, self.recipe.seed, number)
        chosen = [self.train[i] for i in self._epoch[1][place]]
        answers = sum(len(row.answer) for row in chosen)
        total = sum(self._learn(piece, answers) for piece in pieces(chosen, self.recipe.piece_tokens))
        torch.nn.utils.clip_grad_norm_(self.model.pairs.parameters(), self.recipe.clip)
        for group in self._optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate * rate(self.progress.step, self.steps, self.recipe.warmup)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._account(total, sum(map(len, chosen)), time.monotonic() - began)

    def _account(self, loss: float, tokens: int, seconds: float) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        progress.loss = loss if math.isnan(progress.loss) else 0.95 * progress.loss + 0.05 * loss
        if not math.isfinite(loss):
            raise BadInput("the loss is not finite any more: lower the learning rate", field="learning_rate")

    def _learn(self, rows: Sequence[Tokens], answers: int) -> float:
        """Add a piece's share of the step's gradient; its share of the loss."""
        hidden, wanted = self._read(rows)
        leaf = hidden.detach().requires_grad_()
        total = 0.0
        for part, tokens in zip(leaf.split(self._at_once), wanted.split(self._at_once), strict=True):
            loss = functional.cross_entropy(self.model.logits(part), tokens, reduction="sum") / answers
            loss.backward()
            total += loss.item()
        hidden.backward(leaf.grad)
        return total

    def _read(self, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Hidden states (n, width) where an answer token is predicted, and those tokens (n,)."""
        return read_answers(self.model, rows)

    @property
    def _at_once(self) -> int:
        return logits_at_once(self.model)

    # --- checks ---

    def _check(self) -> None:
        check = self.measure(self.held_out)
        progress = self.progress
        progress.checks.append(check)
        if progress.best is None or self._better(check, progress.best):
            progress.best, progress.stale, self._best = check, 0, self._state()
        else:
            progress.stale += 1

    def _better(self, check: Check, best: Check) -> bool:
        if self._short:
            return (check.exact, -check.loss) > (best.exact, -best.loss)
        return check.loss < best.loss

    @torch.no_grad()
    def measure(self, rows: Sequence[Tokens]) -> Check:
        """Loss per answer token and share of exact answers, teacher-forced."""
        self.model.eval()
        loss, exact = 0.0, 0
        for piece in pieces(sorted(rows, key=len), self.recipe.piece_tokens):
            hidden, wanted = self._read(piece)
            right = []
            for part, tokens in zip(hidden.split(self._at_once), wanted.split(self._at_once), strict=True):
                logits = self.model.logits(part)
                loss += functional.cross_entropy(logits, tokens, reduction="sum").item()
                right.append(logits.argmax(-1) == tokens)
            each = torch.cat(right).split([len(row.answer) for row in piece])
            exact += sum(bool(row.all()) for row in each)
        return Check(self.progress.step, loss / sum(len(row.answer) for row in rows), exact / len(rows))

    # --- saving ---

    def _state(self) -> dict[str, Tensor]:
        return {
            name: value.detach().float().cpu().clone()
            for name, value in self.model.pairs.state_dict().items()
        }

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self._home is None:
            return
        self._home.mkdir(parents=True, exist_ok=True)
        partial = self._home / "state.partial"
        torch.save(
            {
                "pairs": self._state(), "best": self._best, "optimiser": self._optimiser.state_dict(),
                "progress": asdict(self.progress),
            },
            partial,
        )  # fmt: skip
        partial.replace(self._home / "state.pt")

    def _resume(self) -> None:
        """Go on where an interrupted run with the same recipe, base and rows stopped."""
        if self._home is None or not (self._home / "state.pt").exists():
            return
        saved = torch.load(self._home / "state.pt", weights_only=True)
        self.model.pairs.load_state_dict(saved["pairs"])
        self._optimiser.load_state_dict(copy.deepcopy(saved["optimiser"]))
        self._best = saved["best"]
        stated = saved["progress"]
        checks = [Check(**check) for check in stated.pop("checks")]
        best = stated.pop("best")
        self.progress = Progress(**stated, best=Check(**best) if best else None, checks=checks)


def read_answers(model: Decoder, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Hidden states (n, width) where the rows' answer tokens are predicted, and those tokens (n,)."""
    packed = Rows.of([[*row.prompt, *row.answer] for row in rows], model.device)
    places: list[int] = []
    start = 0
    for row in rows:
        places += range(start + len(row.prompt) - 1, start + len(row) - 1)
        start += len(row)
    wanted = torch.tensor([token for row in rows for token in row.answer], device=model.device)
    return model(packed)[torch.tensor(places, device=model.device)], wanted


def logits_at_once(model: Decoder) -> int:
    """Answer tokens whose logits are held at once, so that a large vocabulary does not fill memory."""
    return max(1, LOGITS // model.weights["token_embd.weight"].shape[0])


def give_memory_back() -> None:
    """Free pages to the system, where the C library is glibc: pieces of ever other sizes leave holes in its heap,
    and without this the resident size grew from 2 to 5 GB in ten minutes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    along = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * along))
