"""The child process around llama.cpp's own server; run as a script with one argument, its parameter file.

It imports xllamacpp and the standard library, nothing of CALM: a start costs what the load costs. It is run
with `-I -S`, so the parameter file also says where xllamacpp lies. The file is JSON:

    {"library": DIR, "threads": N, "adapters": [PATH, ...], "set": {NAME: VALUE, ...}, "options": {NAME: VALUE, ...}}

`set` and `options` name attributes of xllamacpp.CommonParams, dotted for nested ones (sampling.temp). The
former are ours, the latter the operator's: a wrong one ends the child with a line that names it. Enumerations
are given by their last word, `mean` for LLAMA_POOLING_TYPE_MEAN. LoRA adapters are loaded at scale 0, in this
order: a request that does not name one by its number gets the base.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

# Batches this small cost no prefill speed on CPUs, while cancelling and the other streams wait for one batch.
CPU_BATCH = 64
MISTAKE, CANNOT_LOAD = 2, 3
# llama.cpp logs from a thread of its own, with the reason of a failed load last: it must have its turn first.
LOG_DRAIN_S = 0.25


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        plan = json.load(file)
    sys.path.insert(0, plan["library"])
    import xllamacpp

    params = xllamacpp.CommonParams()
    if not _has_gpu(xllamacpp):
        params.n_batch = params.n_ubatch = CPU_BATCH
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = plan["threads"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in plan["adapters"]]
    for name, value in {**plan["set"], **plan["options"]}.items():
        _assign(params, name, value)
    _serve(xllamacpp, params)


def _serve(xllamacpp: Any, params: Any) -> None:
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        time.sleep(LOG_DRAIN_S)
        _fail(str(error), CANNOT_LOAD)
    # A server deleted before its loop runs hangs for ever; one request makes sure that it runs.
    server.handle_metrics()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        signal.pause()


def _has_gpu(xllamacpp: Any) -> bool:
    try:
        return any("GPU" in str(device.get("type", "")) for device in xllamacpp.get_device_info())
    except Exception:
        return False


def _assign(params: Any, name: str, value: object) -> None:
    *parents, last = name.split(".")
    target = params
    for parent in parents:
        target = getattr(target, parent, None)
    if target is None or last.startswith("_") or not hasattr(target, last):
        _fail(f"engine.options: llama.cpp has no parameter {name!r}", MISTAKE)
    current = getattr(target, last)
    try:
        setattr(target, last, _fitting(current, value))
    except (TypeError, ValueError, OverflowError) as error:
        _fail(f"engine.options: {name} = {value!r} does not fit: {error}", MISTAKE)


def _fitting(current: Any, value: Any) -> Any:
    """`value` as the parameter wants it: members of enumerations by name, sets and lists from one value."""
    members = getattr(type(current), "__members__", None)
    if members and isinstance(value, str):
        return _member(members, value)
    if isinstance(current, set):
        return {value}
    if isinstance(current, list) and not isinstance(value, list):
        return [value]
    if isinstance(current, bool) and not isinstance(value, bool):
        raise TypeError("true or false is wanted")
    return value


def _member(members: Any, word: str) -> Any:
    for name, member in members.items():
        if name.lower() == word.lower() or name.lower().endswith("_" + word.lower()):
            return member
    known = ", ".join(sorted(members))
    raise ValueError(f"it is one of {known}")


def _fail(message: str, code: int) -> Any:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
