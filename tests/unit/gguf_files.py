"""Small GGUF files for tests, written with the `gguf` library: a base of two blocks, and adapters for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

WIDTH, HIDDEN, WORDS = 64, 96, 50
Matrix = NDArray[np.float32]

BASE = {
    "token_embd.weight": (WORDS, WIDTH),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (HIDDEN, WIDTH),
    "blk.1.attn_q.weight": (WIDTH, WIDTH),
    "blk.1.ffn_down.weight": (WIDTH, HIDDEN),
}
"""Rows and columns, as numpy has it: ggml's ne the other way round."""


def numbers(*shape: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_base(
    path: Path, kind: str = "Q4_1", architecture: str = "llama", file_type: int | None = 3
) -> Path:
    """Metadata of every sort, a vocabulary, two blocks of `kind`, an embedding of Q8_0, a norm of F32."""
    writer = GGUFWriter(path, architecture)
    writer.add_name("a small base")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_token_list([f"wörd{n}" for n in range(WORDS)])
    writer.add_token_scores([float(n) for n in range(WORDS)])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_chat_template("{{ messages }}")
    for name, shape in BASE.items():
        add(writer, name, numbers(*shape), "Q8_0" if name.startswith("token") else kind)
    writer.add_tensor("blk.0.attn_norm.weight", numbers(WIDTH))
    return finish(writer, path)


def write_lora(
    path: Path,
    tensors: Mapping[str, Matrix] | None = None,
    *,
    architecture: str = "llama",
    type_: str = "adapter",
    alpha: float = 8.0,
    kind: str = "F16",
) -> Path:
    """A LoRA of rank 4 on two weights of the base, or whatever `tensors` says."""
    writer = GGUFWriter(path, architecture)
    writer.add_type(type_)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, data in (good_tensors() if tensors is None else tensors).items():
        add(writer, name, data, kind)
    return finish(writer, path)


def good_tensors() -> dict[str, Matrix]:
    return {
        "blk.0.attn_q.weight.lora_a": numbers(4, WIDTH),
        "blk.0.attn_q.weight.lora_b": numbers(WIDTH, 4),
        "blk.1.ffn_down.weight.lora_a": numbers(4, HIDDEN),
        "blk.1.ffn_down.weight.lora_b": numbers(WIDTH, 4),
    }


def add(writer: GGUFWriter, name: str, data: Matrix, kind: str) -> None:
    if kind == "F32":
        writer.add_tensor(name, data)
    elif kind == "F16":
        writer.add_tensor(name, data.astype(np.float16))
    else:
        type_ = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(data, type_), raw_dtype=type_)


def finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
