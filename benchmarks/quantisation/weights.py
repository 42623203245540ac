"""The files compared: a base in each type, all made from its authors' file, so that nothing else differs between them.

Here because making them needs ggml's own quantiser and a GGUF writer, and measuring needs neither.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calm.errors import BadInput
from calm.gguf import read_header
from calm.records import Record
from calm.sources.requantise import requantise

AS_IS = "as-is"
TYPES = (AS_IS, "Q4_0", "Q8_0", "Q4_K")

Rows = NDArray[np.float32]


class Subject(Record, frozen=True, kw_only=True):
    """One file of one base."""

    base: str
    type: str
    path: Path
    file_bytes: int
    mix: str
    """Types of the blocks' matrices, with their number."""

    @property
    def name(self) -> str:
        return f"{self.base}-{self.type.lower()}"


def subject(base: str, type_name: str, original: Path, directory: Path) -> Subject:
    """The base in a type; converted once into `directory`. Raises BadInput for a type nobody can make."""
    path = original
    if type_name != AS_IS:
        path = directory / f"{base}-{type_name}.gguf"
        if not path.exists():
            partial = path.with_suffix(".part")
            convert(original, partial, type_name)
            partial.rename(path)
    return Subject(base=base, type=type_name, path=path, file_bytes=path.stat().st_size, mix=mix(path))


def convert(source: Path, target: Path, type_name: str) -> None:
    if type_name == "Q4_K":
        with_ggml(source, target)
    else:
        requantise(source, target, type_name, lambda _: None)


def mix(path: Path) -> str:
    """`Q5_0 x 180, Q4_K x 30`."""
    tensors = read_header(path).tensors.values()
    counts = Counter(
        tensor.type_name for tensor in tensors if tensor.name.startswith("blk.") and tensor.quantised
    )
    return ", ".join(f"{name} x {count}" for name, count in counts.most_common())


def with_ggml(source: Path, target: Path) -> None:
    """Q4_K where rows divide into its blocks of 256, else Q5_0."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
    from gguf.constants import GGUFValueType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key == "general.file_type":
            writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_S)
        elif not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or tensor.tensor_type in plain:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weights = dequantize(tensor.data, tensor.tensor_type)
        if weights.shape[-1] % 256:
            writer.add_tensor(
                tensor.name,
                quantize(weights, GGMLQuantizationType.Q5_0),
                raw_dtype=GGMLQuantizationType.Q5_0,
            )
        else:
            writer.add_tensor(tensor.name, q4_k(weights), raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_k(weights: Rows) -> NDArray[np.uint8]:
    """By ggml's own quantiser: the gguf library has none for K-quants. Raises BadInput when it is not to be had."""
    number, block, block_bytes = 12, 256, 144
    rows, width = weights.shape
    contiguous = np.ascontiguousarray(weights, dtype=np.float32)
    made = np.zeros((rows, width // block * block_bytes), dtype=np.uint8)
    written = ggml_quantiser()(
        number,
        contiguous.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        made.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        width,
        None,
    )
    if written != made.nbytes:
        raise BadInput(f"ggml wrote {written} bytes of Q4_K, {made.nbytes} expected", field="types")
    return made


def ggml_quantiser() -> Callable[..., int]:
    """`ggml_quantize_chunk` of the llama.cpp that serves. Raises BadInput."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise BadInput("Q4_K needs xllamacpp (pip install xllamacpp)", field="types")
    try:
        found = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    except (OSError, AttributeError):
        raise BadInput(
            "this xllamacpp exports no ggml_quantize_chunk: leave out Q4_K", field="types"
        ) from None
    pointer = ctypes.POINTER(ctypes.c_float)
    found.argtypes = [
        ctypes.c_int, pointer, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer,
    ]  # fmt: skip
    found.restype = ctypes.c_size_t
    quantiser: Callable[..., int] = found
    return quantiser
