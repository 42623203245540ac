"""One row to ask, after the formats of domain sets and routing tables were brought to one."""

from __future__ import annotations

from collections.abc import Mapping

from calm.records import Record
from calm.workloads.records import AnswerType


class Row(Record, frozen=True, kw_only=True):
    """What a line of a set says."""

    id: str
    dataset: str
    """Name of the file, or the table's task."""
    domain: str
    """CALM's name of the subject."""
    split: str | None
    """train or test."""
    question: str
    context: str | None = None
    choices: tuple[str, ...] = ()
    """Labels or option texts, in order."""
    lettered: bool = False
    """The options are called A, B, ... and the answer is a letter."""
    answer: str | None = None
    answer_type: AnswerType | None = None
    scores: Mapping[str, float] = {}
    """Quality 0..1 by the table's name of a model."""


_SUBJECTS = {
    "math": "math", "gsm8k": "math", "svamp": "math", "mgsm": "math", "agentverse_mgsm": "math",
    "code": "code", "mbpp": "code", "human_eval": "code", "humaneval": "code",
    "sql": "sql", "spider_dev": "sql",
    "medical": "medical", "medqa": "medical", "pubmedqa": "medical",
    "finance": "finance", "headlines_finance": "finance",
    "banking_intent": "banking", "banking77": "banking",
    "assistant_intent": "assistant", "clinc150": "assistant",
    "science": "science", "arc": "science", "arc_challenge": "science", "openbook_qa": "science",
    "gpqa": "science",
    "commonsense": "commonsense", "commonsenseqa": "commonsense", "commonsense_qa": "commonsense",
    "winogrande": "commonsense", "hellaswag": "commonsense", "agentverse_logicgrid": "commonsense",
    "reading": "reading", "squad_dev": "reading",
    "mmlu": "general", "cmmlu": "general",
    "natural_qa": "general", "trivia_qa": "general",
    "commongen": "creative_writing",
}  # fmt: skip
"""Names of others -> CALM's domains (calm.analyze.domains): what cards and profiles use as keys."""


def subject(name: str) -> str:
    """CALM's domain of a set's domain or a table's task; a name it does not know stays as it is, in one spelling.

    >>> subject("banking_intent"), subject("GSM8K"), subject("veterinary medicine")
    ('banking', 'math', 'veterinary_medicine')
    """
    spelled = "_".join(name.strip().lower().replace("-", " ").split())
    return _SUBJECTS.get(spelled, spelled)
