"""The trained factors as a GGUF adapter, as llama.cpp reads it; byte for byte the same from the same training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

FORMAT = "float16"


def write_adapter(
    path: Path, architecture: str, pairs: Mapping[str, Tensor], alpha: float, about: Mapping[str, str]
) -> None:
    """`pairs` as `Decoder.pairs` names them: `LAYER_PROJECTION.a` (r, in) and `.b` (out, r).

    `about` are general.* keys such as name, description, license. Written beside `path` first, then moved there.
    """
    from gguf import GGUFWriter

    partial = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in sorted(about.items()):
        writer.add_string(f"general.{key}", value)
    for name in sorted(pairs, key=_place):
        stem, factor = name.rsplit(".", 1)
        layer, projection = stem.split("_", 1)
        writer.add_tensor(
            f"blk.{layer}.{projection}.weight.lora_{factor}", pairs[name].numpy().astype(FORMAT)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _place(name: str) -> tuple[int, str]:
    layer, rest = name.split("_", 1)
    return int(layer), rest
