"""Needle's two graphs: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.float32]


class Network(Protocol):
    """Encoder and decoder."""

    def read(self, tokens: Sequence[int]) -> object: ...

    def score(self, hidden: object, tokens: Sequence[int], last: int) -> Rows:
        """Logits after each of the `last` last tokens: (last, vocabulary)."""
        ...


class Session(Protocol):
    """The part of onnxruntime.InferenceSession that is used."""

    def run(self, names: None, inputs: Mapping[str, object]) -> Sequence[NDArray[np.float16]]: ...


class OnnxNetwork:
    """In onnxruntime, on the CPU."""

    def __init__(self, encoder: Path, decoder: Path, threads: int) -> None:
        """Raises ValueError for graphs with other inputs."""
        self._encoder = _session(encoder, threads, ("encoder_input_ids",))
        self._decoder = _session(decoder, threads, ("decoder_input_ids", "encoder_hidden_states"))

    def read(self, tokens: Sequence[int]) -> object:
        return self._encoder.run(None, {"encoder_input_ids": _row(tokens)})[0]

    def score(self, hidden: object, tokens: Sequence[int], last: int) -> Rows:
        inputs = {"decoder_input_ids": _row(tokens), "encoder_hidden_states": hidden}
        rows: Rows = self._decoder.run(None, inputs)[0][0, -last:].astype("float32")
        return rows


def _row(tokens: Sequence[int]) -> NDArray[np.int32]:
    import numpy as np

    return np.asarray([tokens], np.int32)


def _session(path: Path, threads: int, inputs: tuple[str, ...]) -> Session:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # thousands of warnings about half-precision constants otherwise
    options.enable_cpu_mem_arena = False  # 20 MB less and no slower
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = tuple(wanted.name for wanted in session.get_inputs())
    if found != inputs:
        raise ValueError(
            f"a graph with the inputs {', '.join(inputs)} is wanted, this one has {', '.join(found)}"
        )
    loaded: Session = session
    return loaded
