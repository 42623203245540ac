"""Needle, an encoder-decoder in ONNX that writes tool calls, in one child process per resident model.

A process of its own for the reasons of llama.cpp's: a crash hurts one model, and only its end returns all
memory. onnxruntime runs the graphs; the protocol around them (prompt, grammar, OpenAI's shapes) is the
child's, see the package onnx_child.

A card's source is one file. The three that make the model up are fetched as three parts, concatenated in the
order encoder, decoder, SentencePiece model, and checked by one digest; `engine.options` says where the first
two end.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from calm.backends.engine import SOCKET_NAME, ChildEngine, absolute, bring_up, make_home, remove_home
from calm.backends.onnx_child.plan import Plan
from calm.backends.process import clean_environment
from calm.backends.sandbox import confined
from calm.errors import LoadFailed
from calm.records import AdapterFile, Endpoint, ModelCard

CHILD = Path(__file__).with_name("onnx_child") / "__main__.py"
PACKAGES = ("onnxruntime", "numpy", "sentencepiece")
SIZES = ("encoder_bytes", "decoder_bytes")
# numpy only looks for the largest of some numbers here; its own threads would be idle memory. And glibc stops
# giving large blocks back after it has seen some: a prompt of 1,000 tokens then leaves a gigabyte behind.
ENGINE_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 20),
}
NO_ADAPTERS = "an onnx engine takes no adapters"


class OnnxBackend:
    """Starts ONNX children. `run_dir` is where their sockets lie, such as XDG_RUNTIME_DIR/calm."""

    def __init__(self, run_dir: Path, *, inherited: Mapping[str, str] = os.environ) -> None:
        self._run_dir = run_dir
        self._inherited = inherited

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> ChildEngine:
        if weights is None:
            raise LoadFailed(f"model {card.name}: engine onnx needs weights, but the card has no source")
        sizes, library = part_sizes(card, weights), find_libraries(card)
        home = make_home(self._run_dir)
        try:
            engine = await self._start(card, absolute(weights), threads, home, sizes, library)
        except LoadFailed as error:
            remove_home(home)
            raise LoadFailed(without_paths(error.message, weights, home), field=error.field) from None
        except BaseException:
            remove_home(home)
            raise
        return engine.carry({}, {adapter.card.name: NO_ADAPTERS for adapter in adapters})

    async def _start(
        self,
        card: ModelCard,
        weights: Path,
        threads: int,
        home: Path,
        sizes: tuple[int, int],
        library: Sequence[Path],
    ) -> ChildEngine:
        plan = home / "plan.json"
        plan.write_bytes(msgspec.json.encode(child_plan(card, weights, threads, home, sizes, library)))
        command = [sys.executable, "-I", "-S", str(CHILD), str(plan)]
        endpoint = Endpoint(base_url="http://localhost", model=card.name, socket=str(home / SOCKET_NAME))
        environment = clean_environment(self._inherited, {**ENGINE_ENVIRONMENT, **card.engine.env})
        return await bring_up(
            card, confined(card, command, home, weights), environment, endpoint, home, "/health"
        )


def child_plan(
    card: ModelCard,
    weights: Path,
    threads: int,
    home: Path,
    sizes: tuple[int, int],
    library: Sequence[Path],
) -> Plan:
    return Plan(
        library=[str(path) for path in library],
        weights=str(weights),
        sizes=sizes,
        socket=str(home / SOCKET_NAME),
        home=str(home),
        model=card.name,
        threads=threads,
        context=card.context,
        slots=card.engine.slots,
    )


def part_sizes(card: ModelCard, weights: Path) -> tuple[int, int]:
    """Lengths of encoder and decoder in the card's file. Raises LoadFailed unless something is left after them."""
    unknown = [name for name in card.engine.options if name not in SIZES]
    if unknown:
        field = f"engine.options.{unknown[0]}"
        raise LoadFailed(
            f"model {card.name}: {field} is not known; an onnx engine has {' and '.join(SIZES)}", field=field
        )
    encoder, decoder = (_size(card, name) for name in SIZES)
    try:
        whole = weights.stat().st_size
    except OSError as error:
        raise LoadFailed(f"model {card.name}: its weights cannot be read: {error.strerror}") from None
    if encoder + decoder >= whole:
        raise LoadFailed(
            f"model {card.name}: engine.options: encoder_bytes and decoder_bytes leave nothing of the "
            f"{whole:,} bytes of the weights for the tokenizer",
            field="engine.options",
        )
    return encoder, decoder


def _size(card: ModelCard, name: str) -> int:
    given, field = card.engine.options.get(name), f"engine.options.{name}"
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise LoadFailed(f"model {card.name}: {field} must be that part's length in bytes", field=field)
    return given


def find_libraries(card: ModelCard) -> tuple[Path, ...]:
    """The directories that hold what the child imports, found without importing it."""
    return tuple(dict.fromkeys(_library(card, name) for name in PACKAGES))


def _library(card: ModelCard, package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise LoadFailed(f"model {card.name}: engine onnx needs {package} (pip install {package})")
    return Path(spec.origin).parent.parent


def without_paths(message: str, weights: Path, home: Path) -> str:
    """Errors reach callers of the API, who need not know the machine's directories."""
    return message.replace(str(absolute(weights)), weights.name).replace(str(home), "")
