"""Text to a unit vector: the query's meaning, for routing and for learning quality from ratings.

Two embedders behind one port. `StaticEmbedder` looks 256-d token vectors up in a table and averages them
(WordLlama, MIT: 20 us a query); `MiniLmEmbedder` runs the paper's sentence encoder (2 ms a query and more
with length). Both see at most the head and the tail of a text, so that a prompt of 100,000 characters costs
what a page costs, and both remember their last few hundred texts, since retries and agents repeat themselves.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from calm.records import Vector

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEAD_CHARS = 800
TAIL_CHARS = 300
CACHED_TEXTS = 256
MINILM_TOKENS = 256


def head_and_tail(text: str) -> str:
    """The text, or its two ends where it is long: the instruction stands at one of them."""
    if len(text) <= HEAD_CHARS + TAIL_CHARS:
        return text
    return f"{text[:HEAD_CHARS]} {text[-TAIL_CHARS:]}"


def unit(vector: NDArray[np.float32]) -> Vector:
    """Scaled to length 1; a zero or non-finite vector becomes all zeros. Read-only, for it is shared."""
    square = float(vector.dot(vector))
    safe = 1e-24 < square < math.inf
    out = (vector / math.sqrt(square) if safe else np.zeros_like(vector)).astype(np.float32, copy=False)
    out.flags.writeable = False
    return out


class RecentTexts:
    """A bounded least-recently-used map from a text to its vector."""

    def __init__(self, compute: Callable[[str], Vector], size: int = CACHED_TEXTS) -> None:
        self._compute = compute
        self._size = size
        self._vectors: OrderedDict[str, Vector] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, text: str) -> Vector:
        known = self._vectors.get(text)
        if known is not None:
            self._vectors.move_to_end(text)
            return known
        vector = self._compute(text)
        self._vectors[text] = vector
        if len(self._vectors) > self._size:
            self._vectors.popitem(last=False)
        return vector


class StaticEmbedder:
    """Mean of static token vectors. The table stays on disk and is mapped: only rows in use are resident."""

    name = "wordllama-256"

    def __init__(self, weights: Path | None = None, tokenizer: Path | None = None) -> None:
        """Without arguments: the files inside the installed wordllama wheel. Never touches the network."""
        table, vocabulary = (weights, tokenizer) if weights and tokenizer else bundled_static()
        self._table = np.asarray(map_safetensors(table))  # a plain view: a memmap's own indexing is slow
        self._tokenizer = load_tokenizer(vocabulary)
        self._recent = RecentTexts(self._compute)

    @property
    def dimensions(self) -> int:
        return int(self._table.shape[1])

    def embed(self, text: str) -> Vector:
        return self._recent.get(head_and_tail(text))

    def _compute(self, text: str) -> Vector:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids if text.strip() else []
        if not ids:
            return unit(np.zeros(self.dimensions, np.float32))
        rows = self._table.take(ids, axis=0, mode="clip")
        return unit(np.add.reduce(rows, axis=0, dtype=np.float32) / np.float32(len(ids)))


class MiniLmEmbedder:
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084) in ONNX, one thread, mean pooling."""

    name = "minilm-l6-v2"

    def __init__(self, onnx_path: Path, tokenizer_path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        self._run = ort.InferenceSession(str(onnx_path), options, providers=["CPUExecutionProvider"]).run
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._tokenizer.enable_truncation(max_length=MINILM_TOKENS)
        self._recent = RecentTexts(self._compute)
        self._dimensions = len(self.embed("dimensions"))

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def embed(self, text: str) -> Vector:
        return self._recent.get(head_and_tail(text))

    def _compute(self, text: str) -> Vector:
        if not text.strip():
            return unit(np.zeros(self._dimensions, np.float32))
        encoded = self._tokenizer.encode(text)
        ids = np.asarray([encoded.ids], np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        hidden = cast("NDArray[np.float32]", self._run(None, inputs)[0])
        return unit(hidden[0].mean(axis=0))


def load_tokenizer(path: Path) -> Tokenizer:
    """A Hugging Face tokenizer.json without padding or truncation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def map_safetensors(path: Path) -> NDArray[np.floating]:
    """The only tensor of a safetensors file, memory-mapped: (rows, columns), F16 or F32.

    Layout: 8 bytes little-endian header length, a JSON header, then the data. Raises ValueError on others.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 1_000_000:
            raise ValueError(f"{path}: not a safetensors file")
        header = json.loads(file.read(length))
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    if len(tensors) != 1 or len(tensors[0]["shape"]) != 2 or tensors[0]["dtype"] not in ("F16", "F32"):
        raise ValueError(f"{path}: expected one F16 or F32 matrix, found {sorted(header)}")
    (entry,) = tensors
    start = 8 + length + int(entry["data_offsets"][0])
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    if entry["dtype"] == "F16":
        return np.memmap(path, dtype=np.float16, mode="r", offset=start, shape=shape)
    return np.memmap(path, dtype=np.float32, mode="r", offset=start, shape=shape)


def bundled_static() -> tuple[Path, Path]:
    """Table and tokenizer inside the wordllama wheel, found without importing it.

    Its own loader looks for the tokenizer beside the project or in a cache directory, not in the wheel, and
    would then download it; importing it costs 40 MB more. Raises FileNotFoundError.
    """
    spec = find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no static embedding: install wordllama>=0.4, or run without an embedder")
    root = Path(spec.origin).parent
    table = root / "weights" / "l2_supercat_256.safetensors"
    tokenizer = root / "tokenizers" / "l2_supercat_tokenizer_config.json"
    for path in (table, tokenizer):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: reinstall wordllama 0.4, or run without an embedder")
    return table, tokenizer
