"""Makes the shipped specialists again from the data: every adapter, card and model card of `fleet/`.

    python training/make.py --data DIR                 all of recipes.toml
    python training/make.py --data DIR finance sql     some
    python training/make.py --data DIR --fleet DIR     into another fleet (it needs the bases' cards)

Each is one call of `calm specialise`, printed before it runs; an interrupted one goes on when called again. Those that
stand in the fleet already are left alone unless --again is given. The same machine, thread count and PyTorch give the
same bytes; another processor gives the same figures within their noise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
FLEET = HERE.parent / "fleet"
MADE = HERE / "made"
"""Rows that recipes make beside the data; never committed."""
TUNING = ("rank", "epochs", "learning_rate", "dropout", "rows_per_step", "patience", "seed", "evaluate")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="specialists to make (default: all)")
    parser.add_argument("--data", type=Path, required=True, help="directory with domain/NAME.jsonl.gz")
    parser.add_argument("--fleet", type=Path, default=FLEET, help="where cards and adapters go")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--again", action="store_true", help="make also what is there")
    given = parser.parse_args()
    recipes = tomllib.loads((HERE / "recipes.toml").read_text(encoding="utf-8"))
    if unknown := [name for name in given.names if name not in recipes]:
        parser.error(f"no recipe {unknown[0]}; there are: {', '.join(recipes)}")
    failed = []
    for name in given.names or recipes:
        if (given.fleet / f"{name}.toml").exists() and not given.again:
            print(f"{name}: is there; --again makes it anew", file=sys.stderr)
            continue
        recipe = recipes[name]
        calls = [
            *derived(recipe, given.data),
            list(command(name, recipe, given.data, given.fleet, given.threads)),
        ]
        if not all(succeeds(call) for call in calls):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def succeeds(call: list[str]) -> bool:
    print("+", shlex.join(call), file=sys.stderr, flush=True)
    root = str(HERE.resolve().parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.run(call, check=False, env=os.environ | {"PYTHONPATH": path}).returncode == 0


def derived(recipe: Mapping[str, object], data: Path) -> Iterator[list[str]]:
    """The calls that make rows to learn beside the data: word problems with other numbers, invented databases."""
    for name, wanted in table(recipe, "variants").items():
        source = str(data / "domain" / f"{name}.jsonl.gz")
        yield [
            sys.executable, str(HERE / "word_problems.py"), source, "--variants", str(wanted), "--out", str(MADE)
        ]  # fmt: skip
    for name, wanted in table(recipe, "invented").items():
        yield [
            sys.executable, "-m", "training.sql", "--rows", str(wanted), "--out", str(MADE / f"{name}.jsonl")
        ]  # fmt: skip


def table(recipe: Mapping[str, object], of: str) -> Mapping[str, int]:
    wanted = recipe.get(of, {})
    assert isinstance(wanted, dict)
    return wanted


def command(
    name: str, recipe: Mapping[str, object], data: Path, fleet: Path, threads: int | None
) -> Iterator[str]:
    """The call of `calm specialise` that a table of recipes.toml stands for."""
    yield from (sys.executable, "-m", "calm", "specialise", "--name", name, "--base", str(recipe["base"]))
    sets = recipe["sets"]
    assert isinstance(sets, list)
    for one in sets:
        yield from ("--data", str(data / "domain" / f"{one}.jsonl.gz"))
    for one in (*table(recipe, "variants"), *table(recipe, "invented")):
        yield from ("--data", str(MADE / f"{one}.jsonl"))
    for word in ("description", "data_licence", "limits"):
        yield from (f"--{word.replace('_', '-')}", str(recipe[word]))
    for word in TUNING:
        if word in recipe:
            yield from (f"--{word.replace('_', '-')}", str(recipe[word]))
    if threads is not None:
        yield from ("--threads", str(threads))
    yield from ("--fleet", str(fleet), "--replace")


if __name__ == "__main__":
    sys.exit(main())
