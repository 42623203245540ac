"""What can be read off a request before anyone has answered it.

One pure function, `extract`: Ask in, Features out. The token count is model-independent and script-aware,
because an English token covers about four characters and a Chinese one about one; `analyze.tokens` then
corrects it for each model from the engine's own `usage.prompt_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from calm.monitor.form import form_of
from calm.ports import Embedder
from calm.records import Ask, Features

# Characters per token of byte-pair vocabularies of 32k to 128k entries, by script.
LATIN_CHARS_PER_TOKEN = 4.0
CJK_CHARS_PER_TOKEN = 1.1
OTHER_CHARS_PER_TOKEN = 2.3
SYMBOL_CHARS_PER_TOKEN = 1.6

_SAMPLE_CHARS = 2048
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002ffff]")
_OTHER = re.compile("[\u0370-\u1fff\u2c00-\u2dff\ua000-\uabff]")
_SYMBOLS = b"0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\n\t"


def tokens_per_char(sample: str) -> float:
    """Expected tokens for each character of text like `sample`; Latin's figure for an empty sample."""
    sample = sample[:_SAMPLE_CHARS]
    if not sample:
        return 1.0 / LATIN_CHARS_PER_TOKEN
    cjk = 0 if sample.isascii() else len(_CJK.findall(sample))
    other = 0 if sample.isascii() else len(_OTHER.findall(sample))
    raw = sample.encode("utf-8", "surrogatepass")  # bytes above 127 are never symbols
    symbols = len(raw) - len(raw.translate(None, _SYMBOLS))
    latin = len(sample) - cjk - other - symbols
    tokens = (
        cjk / CJK_CHARS_PER_TOKEN
        + other / OTHER_CHARS_PER_TOKEN
        + symbols / SYMBOL_CHARS_PER_TOKEN
        + latin / LATIN_CHARS_PER_TOKEN
    )
    return tokens / len(sample)


def estimate_tokens(prompt_chars: int, sample: str) -> float:
    """Tokens of a prompt of `prompt_chars` characters whose script is that of `sample`; at least 1."""
    return max(1.0, prompt_chars * tokens_per_char(sample))


def wants_json(ask: Ask) -> bool:
    """True when the answer has to be JSON: by capability, or by OpenAI's `response_format`."""
    wanted = ask.body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    return "json" in ask.requires or kind in ("json_object", "json_schema")


def extract(ask: Ask, embedder: Embedder | None, language: Callable[[str], str]) -> Features:
    """Everything the predictors need, in one pass. Costs one embedding; without an embedder, microseconds."""
    return Features(
        prompt_chars=ask.prompt_chars,
        prompt_tokens=estimate_tokens(max(ask.prompt_chars, len(ask.query)), ask.query),
        language=language(ask.query),
        embedding=None if embedder is None else embedder.embed(ask.query),
        embedder=None if embedder is None else embedder.name,
        turns=ask.turns,
        max_tokens=ask.max_tokens,
        samples=ask.samples,
        conversation=ask.conversation,
        wants_json=wants_json(ask),
        wants_tools="tools" in ask.requires,
        form=None if embedder is None else form_of(ask.query),
    )
