"""Is the Analyzer any good, and what does it cost? Prints a table for docs/decisions/0004-prediction.md.

    python benchmarks/prediction.py [--data DIR]

Costs need no data. With DIR, a folder holding domain/*.jsonl.gz and routing/*.jsonl.gz, it also measures
zero-shot domains and learning from ratings; without it, it says what it skips.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np

from calm.analyze.analyzer import FEW, Analyzer
from calm.analyze.domains import DomainSpace
from calm.analyze.fields import FORM_WEIGHT, FieldSpace, encoded
from calm.analyze.fitting import elsewhere, fit, learn_field, logits
from calm.analyze.maths import Array
from calm.analyze.quality import Quality
from calm.monitor.embed import StaticEmbedder
from calm.monitor.features import extract
from calm.monitor.form import form_of
from calm.monitor.language import LanguageDetector
from calm.records import (
    Ask,
    Estimate,
    Features,
    FieldSpec,
    ModelCard,
    ModelState,
    Outcome,
    PriorSpec,
    Reading,
    Snapshot,
)
from calm.specialise.field import sense
from calm.workloads.held_out import Part, split_of
from calm.workloads.prompts import render
from calm.workloads.rows import Row
from calm.workloads.sets import read_set

DOMAIN_OF = {
    "gsm8k": "math",
    "svamp": "math",
    "pubmedqa": "medical",
    "medqa": "medical",
    "humaneval": "code",
    "banking77": "banking",
    "clinc150": "assistant",
    "headlines_finance": "finance",
    "commonsenseqa": "commonsense",
    "arc_challenge": "science",
}
LEARNED = (
    "headlines_finance", "pubmedqa", "medqa", "banking77", "spider_dev", "gsm8k", "svamp", "squad_dev",
)  # fmt: skip
PARTS: tuple[Part, ...] = ("train", "validation", "test")
TEMPERATURES = (1.0, 0.7, 0.5, 0.35)
ENOUGH = 300
"""Rows of a part that is only measured."""
STRANGERS = ("clinc150", "commonsenseqa", "arc_challenge", "humaneval")
"""Sets that no shipped specialist was made for."""
QUESTION = "A patient of 70 kg gets 5 mg per kg twice a day. How many mg is that in a week?"

OUTCOME = Outcome(
    request_id="r",
    model="m0",
    status="ok",
    wall_s=0.0,
    ttft_s=0.2,
    total_s=1.2,
    prompt_tokens=60,
    completion_tokens=100,
    finish_reason="stop",
    energy=Reading(joules=9.0, meter="t", kind="modelled"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with domain/ and routing/")
    data: Path | None = parser.parse_args().data
    embedder = StaticEmbedder()
    costs(embedder)
    if data is None or not data.is_dir():
        print("skipped: domain accuracy and learning from ratings (give --data DIR)")
        return
    domains(embedder, data)
    fields(embedder, data)
    form_weights(embedder, data)
    ratings(embedder, data)


def costs(embedder: StaticEmbedder) -> None:
    language = LanguageDetector()
    question = Ask(
        request_id="r",
        kind="chat",
        query=QUESTION,
        prompt_chars=200,
        body={},
        requires=frozenset(),
        max_tokens=128,
    )
    show("embed, not seen before", timed(lambda: embedder._compute(QUESTION), 300))
    show("language", timed(lambda: language(QUESTION), 300))
    show("features, text seen before", timed(lambda: extract(question, embedder, language), 300))
    questions = [msgspec.structs.replace(question, query=f"{QUESTION} ({number})") for number in range(200)]
    asked = [(one, extract(one, embedder, language)) for one in questions]
    for size in (3, FEW, FEW + 1, 1000):
        fleet_costs(embedder, asked, size)


def fleet_costs(embedder: StaticEmbedder, asked: list[tuple[Ask, Features]], size: int) -> None:
    """Up to FEW models are predicted in floats, one more switches to columns."""
    cards = {f"m{i}": card(f"m{i}") for i in range(size)}
    analyzer, snapshot = Analyzer(embedder), system(cards)
    analyzer.sync(cards)
    repeats = 1000 if size < 100 else 100
    turn = cycle(asked)

    def estimate() -> Mapping[str, Estimate]:
        question, features = next(turn)
        return analyzer.estimate_all(question, features, snapshot, cards)

    show(f"estimate_all, {size} models", timed(estimate, repeats))
    question, features = asked[0]
    for name in cards:
        analyzer.rate(features, name, 4)
    show(f"estimate_all, {size} models, all rated", timed(estimate, repeats))
    predicted = estimate()["m0"]
    show("  learn one outcome", timed(lambda: analyzer.learn(question, features, predicted, OUTCOME), 200))
    show("  learn one rating", timed(lambda: analyzer.rate(features, "m0", 4), 100))
    started = time.perf_counter()
    megabytes = len(analyzer.dump()) / 1e6
    print(f"  checkpoint, all rated: {megabytes:.2f} MB in {1e3 * (time.perf_counter() - started):.1f} ms")


def domains(embedder: StaticEmbedder, data: Path) -> None:
    fleet = sorted(set(DOMAIN_OF.values()))
    space = DomainSpace(embedder, fleet)
    shares = []
    for name, domain in DOMAIN_OF.items():
        questions = [str(row["question"]) for row in rows(data / "domain" / f"{name}.jsonl.gz")]
        random.Random(0).shuffle(questions)
        guesses = [space.names[int(space.posterior(embedder.embed(q)).argmax())] for q in questions[:300]]
        shares.append(sum(guess == domain for guess in guesses) / len(guesses))
        print(f"  {name:18} {domain:12} {shares[-1]:.1%}")
    count = len(space.names)
    print(f"zero-shot domain, {count} to choose from, mean of {len(shares)} sets: {np.mean(shares):.1%}")


def fields(embedder: StaticEmbedder, data: Path) -> None:
    """Fields learned from train parts: where the questions of held-out parts, and of sets nobody learned, land."""
    asked_as = partial(sense, embedder)
    read = {name: read_set(str(data), name) for name in (*LEARNED, *STRANGERS)}
    learned = {
        name: FieldSpec(embedder=embedder.name, weights=encoded(found.line))
        for name in LEARNED
        if (found := learn_field(prompts(read[name], "train"), (), asked_as))
    }
    space = FieldSpace(embedder.name, embedder.dimensions)
    space.learn([learned])
    for name in (*LEARNED, *STRANGERS):
        asked = prompts(read[name], "test" if name in LEARNED else None)
        random.Random(0).shuffle(asked)
        shares = np.mean([space.shares(asked_as(text)) for text in asked[:ENOUGH]], axis=0)
        said = sorted(zip(shares, space.names, strict=True), reverse=True)[:3]
        print(
            f"  field of {name:18} "
            + ", ".join(f"{n} {s:.2f}" for s, n in said)
            + f", none {1 - shares.sum():.2f}"
        )


def form_weights(embedder: StaticEmbedder, data: Path) -> None:
    """Log loss of the right field by the weight of the form (0: the embedding alone) and the temperature."""
    texts = {
        (name, part): prompts(read_set(str(data), name), part)[:ENOUGH if part != "train" else None]
        for name in LEARNED for part in PARTS
    }  # fmt: skip
    texts["stock", "train"] = list(elsewhere())
    meanings = {key: np.array([embedder.embed(text) for text in asked]) for key, asked in texts.items()}
    forms = {key: np.array([form_of(text) for text in asked]) for key, asked in texts.items()}
    for weight in (0.0, 0.1, 0.2, FORM_WEIGHT, 0.45):
        senses = {key: np.concatenate([meanings[key], weight * forms[key]], axis=1) for key in texts}
        lines = [fit(senses[name, "train"], senses["stock", "train"]) for name in LEARNED]
        for part in PARTS[1:]:
            found = [
                np.stack([logits(line, senses[name, part]) for line in lines], axis=1) for name in LEARNED
            ]
            losses = [(t, np.mean([log_loss(z / t, i) for i, z in enumerate(found)])) for t in TEMPERATURES]
            said = ", ".join(f"{loss:.3f} at {t:g}" for t, loss in losses)
            print(f"  log loss of the right field, form weighted {weight:g}, {part} parts: {said}")


def log_loss(logits_of: Array, right: int) -> float:
    """Mean over rows (n, fields), every row of the field `right`."""
    odds = np.exp(np.minimum(logits_of, 30.0))
    share = odds[:, right] / (1.0 + odds.sum(axis=1))
    return float(-np.log(np.maximum(share, 1e-4)).mean())


def prompts(of: Sequence[Row], part: Part | None) -> list[str]:
    return [render(row) for row in of if part is None or split_of(row) == part]


def ratings(embedder: StaticEmbedder, data: Path) -> None:
    """Seven models, one rated answer for each question, of a model drawn at random; then the best by mean."""
    everything = list(rows(data / "routing" / "routerdc7.jsonl.gz"))
    models = sorted(scores(everything[0]))
    train = [row for row in everything if row["split"] == "train"]
    test = [row for row in everything if row["split"] == "test_id"]
    draw = random.Random(0)
    draw.shuffle(train)
    quality = Quality(embedder)
    for row in range(len(models)):
        quality.add(row, ModelCard(name=str(row), description=""))
    ids = np.arange(len(models))
    for seen, example in enumerate(train + train, start=1):
        arm = draw.randrange(len(models))
        quality.learn_one(
            arm, sense(embedder, str(example["question"])), float(scores(example)[models[arm]] > 0)
        )
        if seen in (200, 1000, len(train), 2 * len(train)):
            chosen = [
                int(quality.predict(ids, sense(embedder, str(r["question"])))[0].argmax()) for r in test
            ]
            print(f"  after {seen} ratings: {macro(test, models, chosen):.1%}")
    singles = [macro(test, models, [arm] * len(test)) for arm in range(len(models))]
    oracle = [int(np.argmax([scores(r)[m] for m in models])) for r in test]
    best = macro(test, models, oracle)
    print(f"  random {np.mean(singles):.1%}, best one {max(singles):.1%}, oracle {best:.1%} (mean of tasks)")


def macro(test: list[dict[str, object]], models: list[str], chosen: list[int]) -> float:
    by_task: dict[object, list[float]] = {}
    for row, arm in zip(test, chosen, strict=True):
        by_task.setdefault(row["task"], []).append(float(scores(row)[models[arm]] > 0))
    return float(np.mean([np.mean(right) for right in by_task.values()]))


def scores(row: dict[str, object]) -> dict[str, float]:
    found = row["scores"]
    if not isinstance(found, dict):
        raise ValueError(f"row {row.get('id')}: scores is not an object")
    return found


def rows(path: Path) -> Iterator[dict[str, object]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def card(name: str) -> ModelCard:
    priors = PriorSpec(quality={"math": 0.6, "default": 0.4}, energy_j_per_token=0.5)
    return ModelCard(name=name, description=f"general chat model {name}", domains=("math",), priors=priors)


def system(cards: dict[str, ModelCard]) -> Snapshot:
    states = {
        name: ModelState(
            model=name,
            residency="ready",
            pinned=False,
            in_flight=0,
            waiting=0,
            slots=4,
            threads=1,
            footprint_bytes=10**8,
            footprint_measured=True,
            load_s=1.0,
            last_used_s=0.0,
            failures=0,
        )
        for name in cards
    }
    return Snapshot(
        revision=1,
        at_s=0.0,
        models=states,
        budget_bytes=10**12,
        used_bytes=10**9,
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def timed(call: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """(least, p50, p99) in microseconds. On a shared machine the least says most about the code."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - started))
    return min(taken), float(np.percentile(taken, 50)), float(np.percentile(taken, 99))


def show(what: str, run: tuple[float, float, float]) -> None:
    print(f"{what:44} min {run[0]:8.1f} us   p50 {run[1]:8.1f} us   p99 {run[2]:8.1f} us")


if __name__ == "__main__":
    main()
