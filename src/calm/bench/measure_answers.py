"""Asks every model the same queries, judges what comes back and keeps each answer as it comes.

An answers file has one JSON line of `Recorded` per model and query: ids, figures and a quality, no text of the
query sets. A file that exists is continued: what stands in it is not asked again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from calm.bench.fitting import length_of, rounded
from calm.bench.measure_engine import Laboratory, endpoint_of, running, together
from calm.bench.measure_plan import query_s
from calm.bench.measure_probe import Answered, send
from calm.errors import BadInput, UpstreamRejected
from calm.profile import DEFAULT, Length, ModelProfile
from calm.records import ModelCard
from calm.workloads.records import Query, Recorded
from calm.workloads.workload import draw

SEQUENCES = 2
"""Asked at once of one engine: batching saves time, and more would crawl on a small machine."""
SEED = 0
"""Of the sample: every model, and every continued run, is asked the same queries."""

Judge = Callable[[Query, str], float | None]
Key = tuple[str, str]


@dataclass(frozen=True)
class Asking:
    """What to ask, and how."""

    queries: tuple[Query, ...]
    max_tokens: int
    judge: Judge
    keep_answers: bool = False
    """Also keep the words the models said."""


class AnswerBook:
    """The answers so far, by model and query id; with a path each is on disk before the next is asked for.

    Raises BadInput (field `answers`) when the file holds something else; a last line that an interrupted run
    left half written is cut off.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.rows: dict[Key, Recorded] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, row: Recorded) -> None:
        self.rows[row.model, row.query_id] = row
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")

    def todo(self, model: str, queries: Sequence[Query]) -> list[Query]:
        return [query for query in queries if (model, query.id) not in self.rows]

    def of(self, model: str, queries: Sequence[Query]) -> Iterator[tuple[Query, Recorded]]:
        for query in queries:
            if (row := self.rows.get((model, query.id))) is not None:
                yield query, row

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            path.write_bytes(whole + b"\n" if whole else b"")
        for number, line in enumerate(whole.splitlines(), start=1):
            if line.strip():
                row = _decoded(line, path, number)
                self.rows[row.model, row.query_id] = row


def _decoded(line: bytes, path: Path, number: int) -> Recorded:
    try:
        return msgspec.json.decode(line, type=Recorded)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path}:{number}: {error}; give --answers another file, or delete the line", field="answers"
        ) from None


def sample(queries: Sequence[Query], each: int) -> tuple[Query, ...]:
    """`each` queries of every dataset (all of a smaller one), mixed, the same ones every time."""
    datasets = {query.dataset for query in queries}
    drawn = draw(queries, each * len(datasets), np.random.default_rng(SEED))
    return tuple({query.id: query for query in drawn}.values())


async def ask_model(lab: Laboratory, card: ModelCard, asking: Asking, book: AnswerBook) -> int:
    """Ask what the book does not have yet. The number of queries that gave no judged answer: refused by the
    engine, mostly for being longer than its context, or of a kind that cannot be judged. Raises CalmError."""
    waiting = iter(book.todo(card.name, asking.queries))
    unanswered = 0
    async with running(lab, card) as engine:
        endpoint = endpoint_of(engine, card)

        async def work() -> None:
            nonlocal unanswered
            for query in waiting:
                row = None
                try:
                    said = await send(lab.upstream, endpoint, card, query.prompt, asking.max_tokens)
                    row = recorded(query, card.name, said, asking)
                except UpstreamRejected:
                    pass
                if row is None:
                    unanswered += 1
                else:
                    book.add(row)
                lab.watch.advance(query_s(card, len(query.prompt), asking.max_tokens))

        await together(work() for _ in range(min(SEQUENCES, card.concurrency)))
    return unanswered


def recorded(query: Query, model: str, said: Answered, asking: Asking) -> Recorded | None:
    """None where the judge cannot tell."""
    quality = asking.judge(query, said.text)
    if quality is None:
        return None
    return Recorded(
        query_id=query.id,
        model=model,
        quality=quality,
        prompt_tokens=said.prompt_tokens,
        output_tokens=said.output_tokens,
        answer=said.text if asking.keep_answers else None,
    )


def with_answers(profile: ModelProfile, rows: Sequence[tuple[Query, Recorded]]) -> ModelProfile:
    """The profile with lengths and qualities by domain, and the tokens per character, of these answers."""
    if not rows:
        return profile
    tokens: dict[str, list[int]] = defaultdict(list)
    quality: dict[str, list[float]] = defaultdict(list)
    for query, row in rows:
        for domain in (query.domain, DEFAULT):
            quality[domain].append(row.quality)
            if row.output_tokens is not None:
                tokens[domain].append(row.output_tokens)
    lengths = {domain: short(length_of(counts)) for domain, counts in tokens.items()}
    return replace(
        profile,
        output_tokens={**profile.output_tokens, **lengths},
        quality={domain: rounded(float(np.mean(values))) for domain, values in quality.items()},
        tokens_per_char=rounded(tokens_per_char(profile, rows)),
    )


def short(length: Length) -> Length:
    return Length(mean=rounded(length.mean), sd=rounded(length.sd))


def tokens_per_char(profile: ModelProfile, rows: Sequence[tuple[Query, Recorded]]) -> float:
    """Prompt tokens beyond the template's over characters, of all prompts together."""
    counted = [(len(query.prompt), row.prompt_tokens) for query, row in rows if row.prompt_tokens is not None]
    chars = sum(chars for chars, _ in counted)
    tokens = sum(max(0.0, tokens - profile.template_tokens) for _, tokens in counted)
    return tokens / chars if chars and tokens else profile.tokens_per_char
