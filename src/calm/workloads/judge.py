"""An answer and what was right -> quality 0..1, by the type of the answer.

The answer is looked for where models put it: where they say so ("the answer is B"), else at the beginning, else
wherever a single one stands. The rules follow those in use, so that figures can be compared:

    choice          MMLU-Pro's order of patterns (Wang et al. 2024, arXiv 2406.01574), then the option's text
    number          GSM8K: after `####`, else the last number (Cobbe et al. 2021, arXiv 2110.14168)
    span            SQuAD v1.1: F1 of words after its normalisation (Rajpurkar et al. 2016, arXiv 1606.05250)
    sql             Spider's exact set match (Yu et al. 2018, arXiv 1809.08887), with values (sql.py)
    label           exact, or the only label the reply contains
    yes/no/maybe    the first of the three words

Any text can be judged: empty, huge, of control characters. docs/reference/workloads.md has the rules in words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from string import ascii_uppercase, punctuation

from calm.workloads.records import AnswerType, Query
from calm.workloads.sql import same_query

MAX_CHARS = 20_000
"""Of a longer answer the rest is not read."""
TOLERANCE = 1e-6
"""Relative above 1, else absolute."""


def judge(query: Query, answer: str) -> float | None:
    """Quality of `answer`, 0..1; None where it cannot be judged: a program, or nothing known to be right.

    Raises BadInput only when SQL is to be judged and the `bench` extra is not installed.
    """
    if query.answer is None or query.answer_type is None:
        return None
    rule = _RULES.get(query.answer_type)
    return rule(query, query.answer, readable(answer)) if rule is not None else None


def readable(answer: str) -> str:
    """What a reader sees of it: no thinking aloud, no control characters, at most MAX_CHARS characters."""
    text = answer[:MAX_CHARS].rpartition("</think>")[2]
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in text
    )


# --- choice -----------------------------------------------------------------------------------------

_SAID = r"\banswer(?:\s+is|\s*:)"
"""`the answer is`, `Answer:`."""


def _choice(query: Query, right: str, answer: str) -> float:
    return float(chosen_letter(answer, query.choices) == right.strip().upper())


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that the answer picks, None where it picks none."""
    letters = ascii_uppercase[: len(options) or len(ascii_uppercase)]
    return (
        _option_quoted(answer, options)
        or _stated_letter(answer, letters)
        or _option_named(answer, options)
        or _lone_letter(answer, letters)
    )


def _option_quoted(answer: str, options: Sequence[str]) -> str | None:
    """The option whose text is the whole first line; a single letter there is meant as the letter."""
    line, texts = _spelled(first_line(answer)), [_spelled(option) for option in options]
    return ascii_uppercase[texts.index(line)] if len(line) > 1 and line in texts else None


def _spelled(text: str) -> str:
    """With its signs, which `plain` drops: `charge of -3` and `charge of +3` are two options."""
    return " ".join(text.casefold().split()).rstrip(".")


def _stated_letter(answer: str, letters: str) -> str | None:
    """Where the answer says so (the last time), at its beginning, or as `(B)` or `option B`.

    A small letter, and A and I before further words, may be words of the language: they count only when a
    full stop, bracket, comma or the end of the line follows.
    """
    either = letters + letters.lower()
    never_words = letters.replace("A", "").replace("I", "") or letters
    one = rf"(?:([{either}])(?=\s*(?:[.):,;*\]}}\"'`]|\n|$))|([{never_words}])\b)"
    if said := re.findall(rf"(?i:{_SAID}\W{{0,8}}(?:option\s+)?){one}", answer):
        return "".join(said[-1]).upper()
    found = (
        re.match(rf"\W*(?i:(?:option|choice)\s+)?{one}", answer)
        or re.search(rf"(?:(?<!\w)\(([{either}])\)|\b(?i:option|choice|choose|pick)\s+\W?([{letters}])\b)", answer)
    )  # fmt: skip
    return (found[1] or found[2]).upper() if found else None


def _option_named(answer: str, options: Sequence[str]) -> str | None:
    """The only option whose words the first line, or else the answer, contains."""
    texts = [plain(option) for option in options]
    found = only_one_in(answer, texts)
    return ascii_uppercase[texts.index(found)] if found is not None else None


def _lone_letter(answer: str, letters: str) -> str | None:
    """The first capital standing alone; not the article, nor the pronoun."""
    found = re.search(rf"(?<![\w'])(?!(?:A|I)\s)([{letters}])(?![\w'])", answer)
    return found[1] if found else None


# --- label, yes/no/maybe ----------------------------------------------------------------------------


def _label(query: Query, right: str, answer: str) -> float:
    labels = [plain(label) for label in query.choices or (right,)]
    return float((sentence_alone(answer, labels) or only_one_in(answer, labels)) == plain(right))


def _verdict(query: Query, right: str, answer: str) -> float:
    words = "|".join(re.escape(word) for word in ("yes", "no", "maybe"))
    found = re.search(rf"(?i)\b(?:{words})\b", answer)
    return float(found is not None and found[0].lower() == right.strip().lower())


def sentence_alone(answer: str, labels: Sequence[str]) -> str | None:
    """The plain label that is all of the first line up to its first full stop, colon, semicolon or bracket.

    `up. It will not go down.` says up; a comma goes on with the list: `up, down` says nothing.
    """
    head = plain(re.split(r"[.:;!(]", first_line(answer), maxsplit=1)[0])
    return head if head in labels else None


def only_one_in(answer: str, labels: Sequence[str]) -> str | None:
    """Of plain labels the one that is the first line, else the only one in it, else the only one in the answer.

    A label that is part of a longer one found does not count: `transfer` in `cancel transfer`.
    """
    line = plain(first_line(answer))
    if line in labels:
        return line
    for text in (line, plain(answer)):
        if found := _contained(text, labels):
            return found[0] if len(found) == 1 else None
    return None


def _contained(text: str, labels: Iterable[str]) -> list[str]:
    found: list[str] = []
    for label in sorted({label for label in labels if label}, key=lambda label: (-len(label), label)):
        rest = f" {text} ".replace(f" {label} ", " \0 ")
        if rest != f" {text} ":
            found.append(label)
            text = rest.strip()
    return found


def plain(text: str) -> str:
    """Words in lower case, one space between: `Refund_not-showing up?` -> `refund not showing up`."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold())) or text.strip().casefold()


def first_line(text: str) -> str:
    """The first line that is not blank, without the marks of a code block."""
    lines = (line.strip() for line in text.split("\n"))
    return next((line for line in lines if line and not line.startswith("```")), "")


# --- number -----------------------------------------------------------------------------------------

_NUMBER = r"(?:(?<![\w.)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])-?\.[0-9]+"
_MARKS = (rf"####[^0-9\n.-]{{0,8}}({_NUMBER})", rf"\\boxed\{{[^0-9.-]{{0,8}}({_NUMBER})")


def _number(query: Query, right: str, answer: str) -> float | None:
    wanted = stated_number(right)
    if wanted is None:
        return None
    found = stated_number(answer)
    return float(found is not None and abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted)))


def stated_number(answer: str) -> float | None:
    """The number an answer ends up with: stated as its answer, else alone on the first line, else the last one.

    Thousands separators and currency signs are not part of a number, `26.0` is 26.
    """
    text = re.sub(r"[$€£¥]\s?", "", answer.replace("−", "-"))
    for mark in _MARKS:
        if found := re.findall(mark, text):
            return _value(found[-1])
    if (said := _said_number(text)) is not None:
        return said
    if bare := re.fullmatch(rf"[^\w-]*({_NUMBER})\s*%?\W*", first_line(text)):
        return _value(bare[1])
    numbers = re.findall(_NUMBER, text)
    return _value(numbers[-1]) if numbers else None


def _said_number(text: str) -> float | None:
    """From the last sentence after "answer is" or "answer:" that has a number: after its `=`, or its first."""
    for rest in reversed(re.findall(rf"(?i){_SAID}([^\n]*)", text)):
        sentence = re.split(r"\.\s", rest, maxsplit=1)[0]
        if numbers := re.findall(_NUMBER, sentence.rpartition("=")[2]) or re.findall(_NUMBER, sentence):
            return _value(numbers[0])
    return None


def _value(text: str) -> float | None:
    value = float(re.sub(r"[,\s]", "", text))
    return value if math.isfinite(value) else None


# --- span -------------------------------------------------------------------------------------------


def _span(query: Query, right: str, answer: str) -> float:
    """The best F1 over the accepted answers, one per line of `right`."""
    said = first_line(answer)
    return max((f1(said, accepted) for accepted in right.split("\n")), default=0.0)


def f1(said: str, accepted: str) -> float:
    """Harmonic mean of precision and recall of the words, as in SQuAD's evaluate-v1.1.py."""
    ours, theirs = squad_words(said), squad_words(accepted)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


def squad_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles: SQuAD's normalisation."""
    kept = "".join(c for c in text.lower() if c not in punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


# --- sql --------------------------------------------------------------------------------------------


def _sql(query: Query, right: str, answer: str) -> float:
    return float(same_query(right, answer))


_RULES: dict[AnswerType, Callable[[Query, str, str], float | None]] = {
    "choice": _choice,
    "label": _label,
    "number": _number,
    "yes/no/maybe": _verdict,
    "span": _span,
    "sql": _sql,
}
