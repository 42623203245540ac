"""A GGUF's tensors and shape, dequantised as the engine sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calm.errors import BadInput
from calm.specialise.model import Shape

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES = ("llama", "gemma3")


def read_base(path: Path, dtype: torch.dtype) -> tuple[Shape, dict[str, Tensor]]:
    """Shape and weights of a base model. Raises BadInput (field `base`) for an architecture it does not know."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return shape_of(reader), tensors_of(reader, dtype)


def tensors_of(reader: GGUFReader, dtype: torch.dtype) -> dict[str, Tensor]:
    """By GGUF name, (out, in) for projections."""
    from gguf.quants import dequantize

    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)
        for tensor in reader.tensors
    }


def shape_of(reader: GGUFReader) -> Shape:
    architecture = _text(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"architecture {architecture} cannot be trained here (it can be: {', '.join(ARCHITECTURES)})",
            field="base",
        )

    def number(key: str, default: float | None = None) -> float:
        return _number(reader, f"{architecture}.{key}", default)

    width, heads = int(number("embedding_length")), int(number("attention.head_count"))
    gemma = architecture == "gemma3"
    return Shape(
        architecture=architecture,
        layers=int(number("block_count")),
        width=width,
        heads=heads,
        kv_heads=int(number("attention.head_count_kv", heads)),
        head_width=int(number("attention.key_length", width // heads)),
        epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_base=number("rope.freq_base", 10_000.0),
        interleaved=not gemma,
        local_rope_base=10_000.0 if gemma else None,
        window=int(number("attention.sliding_window")) if gemma else None,
        global_every=6 if gemma else None,
        gelu=gemma,
        embedding_scale=width**0.5 if gemma else 1.0,
    )


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field is not None else "unknown"


def _number(reader: GGUFReader, key: str, default: float | None) -> float:
    field = reader.get_field(key)
    if field is not None:
        return float(field.contents())
    if default is None:
        raise BadInput(f"the GGUF does not say {key}", field="base")
    return default
