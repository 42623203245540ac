"""How often a model calls the right function with the right arguments: any model of a running CALM.

48 questions written by hand (tool_questions.json), each with one to five tools: most ask for one call, some
for two, some for none of the tools. The engine's rule that a value begins as its type does was written after
the first set had been seen; the second set was written afterwards, and nothing was changed after it.

A call counts when it names the right function; it counts in full when its arguments are also exactly those
expected. Texts are compared without regard to case and outer spaces, a number never equals a text, and an
expectation may list several good values (null: the argument may be left out). They are too few to tell
models apart that are close: the intervals say how few.

    python benchmarks/tools.py --model needle-26m
    python benchmarks/tools.py --model calm --url http://127.0.0.1:8420 --verbose
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import aiohttp
import msgspec

QUESTIONS = Path(__file__).with_name("tool_questions.json")
TIMEOUT_S = 300.0

Value = str | int | float | bool | None


class Expected(msgspec.Struct, frozen=True):
    """One call; `arguments` holds the good values of each argument, None among them when it may be absent."""

    name: str
    arguments: Mapping[str, Sequence[Value]]


class Case(msgspec.Struct, frozen=True):
    set: Literal["first", "second"]
    question: str
    tools: tuple[str, ...]
    calls: tuple[Expected, ...]


class Questions(msgspec.Struct, frozen=True):
    tools: Mapping[str, Mapping[str, object]]
    cases: tuple[Case, ...]


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class Call(msgspec.Struct, frozen=True):
    function: Function


class Message(msgspec.Struct, frozen=True):
    tool_calls: tuple[Call, ...] | None = None


class Choice(msgspec.Struct, frozen=True):
    message: Message


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Receipt(msgspec.Struct, frozen=True):
    energy_j: float | None = None


class Reply(msgspec.Struct, frozen=True):
    choices: tuple[Choice, ...]
    usage: Usage = Usage()
    calm: Receipt = Receipt()


@dataclass(frozen=True)
class Result:
    """One answered question: were the functions right, were the arguments right as well."""

    case: Case
    made: tuple[Function, ...]
    names_right: bool
    exact: bool
    latency_s: float
    tokens: int
    energy_j: float | None
    error: str | None = None


def judge(case: Case, made: Sequence[Function]) -> tuple[bool, bool]:
    """(functions right, arguments right as well). Several calls may come in any order."""
    names = sorted(call.name for call in made) == sorted(call.name for call in case.calls)
    return names, names and _paired(list(case.calls), list(made))


def _paired(expected: list[Expected], made: list[Function]) -> bool:
    if not expected:
        return not made
    first, rest = expected[0], expected[1:]
    return any(
        _matches(first, call) and _paired(rest, made[:index] + made[index + 1 :])
        for index, call in enumerate(made)
    )


def _matches(expected: Expected, made: Function) -> bool:
    try:
        given = json.loads(made.arguments)
    except ValueError:
        return False
    if made.name != expected.name or not isinstance(given, dict) or given.keys() - expected.arguments.keys():
        return False
    return all(
        any(_equal(value, given.get(name)) for value in good) for name, good in expected.arguments.items()
    )


def _equal(expected: Value, given: object) -> bool:
    if isinstance(expected, str) and isinstance(given, str):
        return expected.strip().casefold() == given.strip().casefold()
    if isinstance(expected, bool) or isinstance(given, bool):
        return expected is given
    return expected == given


def interval(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(hits, of).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def request_body(model: str, case: Case, tools: Mapping[str, Mapping[str, object]]) -> bytes:
    offered = [{"type": "function", "function": {"name": name, **tools[name]}} for name in case.tools]
    messages = [{"role": "user", "content": case.question}]
    return msgspec.json.encode({"model": model, "messages": messages, "tools": offered, "temperature": 0})


async def ask(session: aiohttp.ClientSession, url: str, case: Case, body: bytes) -> Result:
    started = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=body) as response:
        raw = await response.read()
    latency_s = time.perf_counter() - started
    if response.status != 200:
        return Result(case, (), False, False, latency_s, 0, None, raw.decode("utf-8", "replace")[:200])
    reply = msgspec.json.decode(raw, type=Reply)
    made = tuple(call.function for call in reply.choices[0].message.tool_calls or ())
    right, exact = judge(case, made)
    return Result(case, made, right, exact, latency_s, reply.usage.completion_tokens, reply.calm.energy_j)


async def run(url: str, model: str, questions: Questions) -> list[Result]:
    """One question after the other; the first is asked twice, so that no load is measured."""
    key = os.environ.get("CALM_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        bodies = [request_body(model, case, questions.tools) for case in questions.cases]
        await ask(session, url, questions.cases[0], bodies[0])
        return [
            await ask(session, url, case, body) for case, body in zip(questions.cases, bodies, strict=True)
        ]


def report(results: Sequence[Result]) -> str:
    groups = {
        "one call": [r for r in results if len(r.case.calls) == 1],
        "two calls": [r for r in results if len(r.case.calls) == 2],
        "no tool fits": [r for r in results if not r.case.calls],
        "first set": [r for r in results if r.case.set == "first"],
        "second set": [r for r in results if r.case.set == "second"],
        "all": list(results),
    }
    lines = [f"{'':14}{'questions':>10}{'function':>10}{'exact':>8}   95 % of exact"]
    lines += [_line(name, group) for name, group in groups.items() if group]
    served = [r for r in results if r.error is None]
    if served:
        latency_s = statistics.fmean(r.latency_s for r in served)
        tokens = statistics.fmean(r.tokens for r in served)
        lines.append(
            f"mean latency {latency_s * 1e3:.0f} ms, {tokens:.1f} tokens, {tokens / latency_s:.0f} tokens/s"
        )
    joules = [r.energy_j for r in served if r.energy_j is not None]
    if joules:
        lines.append(f"mean energy {statistics.fmean(joules):.2f} J per question ({len(joules)} known)")
    failed = [r for r in results if r.error is not None]
    if failed:
        lines.append(f"{len(failed)} requests failed, the first with: {failed[0].error}")
    return "\n".join(lines)


def _line(name: str, group: Sequence[Result]) -> str:
    hits, of = sum(r.exact for r in group), len(group)
    low, high = interval(hits, of)
    right = sum(r.names_right for r in group) / of
    return f"{name:14}{of:>10}{right:>10.2f}{hits / of:>8.2f}   {low:.2f} to {high:.2f}"


def misses(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        if not result.exact:
            made = (
                "; ".join(f"{call.name} {call.arguments}" for call in result.made)
                or result.error
                or "no call"
            )
            lines.append(f"  {result.case.question}\n      {made}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8420", help="CALM's address")
    parser.add_argument("--model", default="needle-26m", help="a model's name, or calm to let CALM choose")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--verbose", action="store_true", help="also print what was answered wrongly")
    given = parser.parse_args()
    questions = msgspec.json.decode(given.questions.read_bytes(), type=Questions)
    results = asyncio.run(run(given.url.rstrip("/"), given.model, questions))
    print(f"{given.model} on {len(results)} questions\n{report(results)}")
    if given.verbose:
        print(f"answered otherwise:\n{misses(results)}")


if __name__ == "__main__":
    main()
