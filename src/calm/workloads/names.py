"""Which of somebody else's model names is which of the fleet's."""

from __future__ import annotations

from collections.abc import Collection


def names_in(models: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Fleet model -> the same model's name elsewhere; models that have none there are left out.

    Names are the same when equal, or when the fleet's equals the other's part after the last slash, in any
    case; the whole name counts before the part.

    >>> names_in(["meta-llama-3-8b", "mine"], ["meta-llama/Meta-Llama-3-8B"])
    {'meta-llama-3-8b': 'meta-llama/Meta-Llama-3-8B'}
    """
    whole = {name.casefold(): name for name in sorted(theirs)}
    last = {name.casefold().rpartition("/")[2]: name for name in sorted(theirs)}
    found = {model: whole.get(model.casefold()) or last.get(model.casefold()) for model in models}
    return {model: name for model, name in found.items() if name is not None}
