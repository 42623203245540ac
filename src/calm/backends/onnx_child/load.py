"""From the one file of weights to a model that answers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from .network import OnnxNetwork
from .plan import Plan
from .service import Service
from .writer import Writer

BLOCK_BYTES = 1 << 20


def load(plan: Plan) -> Service:
    """The three files out of the one, each gone from the disk again once it was read."""
    from sentencepiece import SentencePieceProcessor

    encoder, decoder = (Path(plan.home, name) for name in ("encoder.onnx", "decoder.onnx"))
    try:
        rest = split(Path(plan.weights), plan.sizes, (encoder, decoder))
        tokenizer = SentencePieceProcessor(model_proto=rest)
        network = OnnxNetwork(encoder, decoder, plan.threads)
    finally:
        for path in (encoder, decoder):
            path.unlink(missing_ok=True)
    pieces = [tokenizer.id_to_piece(index) for index in range(tokenizer.vocab_size())]
    writer = Writer(network, tokenizer, pieces, plan.context)
    give_memory_back()
    return Service(writer, plan.model, plan.slots, give_memory_back)


def split(weights: Path, sizes: Sequence[int], targets: Sequence[Path]) -> bytes:
    """Write the first parts of `weights` to `targets`; the rest is returned."""
    with weights.open("rb") as source:
        for size, target in zip(sizes, targets, strict=True):
            with target.open("wb") as sink:
                while size > 0 and (block := source.read(min(size, BLOCK_BYTES))):
                    sink.write(block)
                    size -= len(block)
        return source.read()


def give_memory_back() -> None:
    """Free pages to the system, where the C library is glibc: else the peak of an answer stays resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
