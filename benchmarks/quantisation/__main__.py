"""Which quantisation of a base answers fastest and with the fewest joules at equal quality, on the engine we ship.

    python -m benchmarks.quantisation --data DIR [--bases ...] [--types ...] [--adapters NAME@BASE=FILE ...]

    as-is   the authors' file
    Q4_0    every quantised tensor of the blocks re-quantised (calm.sources.requantise: what `[source.convert]` does)
    Q8_0    the same
    Q4_K    the same by ggml's own quantiser, without importance matrix. Rows that are no multiple of 256 cannot be
            Q4_K and become Q5_0, as in llama.cpp's `quantize`: SmolLM2-135M's rows of 576 and Gemma-3-270M's of 640,
            which leaves ffn_down (both) and Gemma's attn_output

Everything starts from the same file, so no type can be better than the authors' own; embeddings, norms and output stay
as they are. Speed: in every round every type on every thread count, in random order, in a fresh engine: load, resident
bytes, queries of 200 words answered in 8 tokens (prefill rate, latency, joules of the process) and one answer of 48
tokens (decode rate). Nothing is cached between queries.

Quality, on rows of the test parts, the same for all types: what the judge says of the base's answers and of the
adapters' on their own sets; and, where the answer is one of few options, a forced choice read off the probabilities of
the first token, whose log loss sees differences that right or wrong does not. All against as-is, paired by row.

Figures are on disk as they come (OUT/*.jsonl); the same command continues.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace as changed

from benchmarks.quantisation.figures import Quality, Speed, qualities, report, speeds
from benchmarks.quantisation.measuring import score_all, time_all
from benchmarks.quantisation.weights import AS_IS, TYPES, subject
from benchmarks.real_engine import Stock, add_options, stock
from benchmarks.specialists import SETS as SPECIALIST_SETS
from benchmarks.specialists import queries_of, sets_for
from calm.errors import BadInput, CalmError

BASES = ("smollm2-135m", "gemma-3-270m")
SETS = ("commonsenseqa", "arc_challenge", "pubmedqa", "headlines_finance")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--data", metavar="DIR", help="directory of the query sets; without it only speed")
    parser.add_argument(
        "--bases", nargs="+", default=list(BASES), metavar="NAME", help=f"default: {' '.join(BASES)}"
    )
    parser.add_argument(
        "--types", nargs="+", default=list(TYPES), choices=TYPES, metavar="TYPE", help="default: all"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of speed; 0: none (default: 7)")
    parser.add_argument(
        "--sets", nargs="+", default=list(SETS), metavar="NAME", help=f"default: {' '.join(SETS)}"
    )
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="rows per set (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/quantisation"), metavar="DIR")
    options = parser.parse_args(arguments)
    if AS_IS not in options.types:
        options.types = [AS_IS, *options.types]
    return options


def original(at_hand: Stock, base: str) -> Path:
    """The authors' file. Raises BadInput."""
    card = at_hand.cards.get(base)
    if card is None or card.source is None:
        raise BadInput(f"no model {base!r} with a source in {at_hand.directory}", field="bases")
    path = at_hand.weights(changed(card, source=changed(card.source, convert=None)))
    if path is None:
        raise BadInput(f"{base}: its weights are not here; run `calm models pull {base}`", field="bases")
    return path


def run(options: argparse.Namespace) -> tuple[list[Speed], list[Quality]]:
    """Raises CalmError."""
    at_hand = stock(options.fleet, options.adapters)
    options.out.mkdir(parents=True, exist_ok=True)
    originals = {base: original(at_hand, base) for base in options.bases}
    subjects = [
        subject(base, type_name, path, options.out)
        for base, path in originals.items()
        for type_name in options.types
    ]
    rounds = asyncio.run(time_all(at_hand, subjects, options)) if options.rounds else []
    times = speeds(rounds, subjects, options.threads) if rounds else []
    if not options.data:
        return times, []
    adapters = [card for card in at_hand.cards.values() if card.adapter_of in options.bases]
    theirs = [name for card in adapters for name in sets_for(card, SPECIALIST_SETS, False)]
    names = dict.fromkeys([*options.sets, *theirs])
    queries = {name: queries_of(options.data, name, options.limit, options.seed) for name in names}
    scored = asyncio.run(score_all(at_hand, subjects, queries, options))
    return times, qualities(at_hand, scored, subjects, queries, options)


def main() -> None:
    options = parse()
    try:
        times, scores = run(options)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command continues from {options.out}") from None
    except CalmError as error:
        raise SystemExit(f"{error.message}; figures so far are in {options.out}") from None
    encoded = msgspec.json.format(msgspec.json.encode({"speed": times, "quality": scores}), indent=2)
    text = report(times, scores)
    (options.out / "table.json").write_bytes(encoded)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write((encoded.decode() if options.json else text) + "\n")


if __name__ == "__main__":
    main()
