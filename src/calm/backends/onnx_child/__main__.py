"""Where the child process starts: `python -I -S .../onnx_child/__main__.py PLAN`.

Isolated Python finds neither CALM nor this file's neighbours, so their directory is made importable here as a
package of its own; as calm.backends.onnx_child it would first run what CALM runs when it is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def main(plan: str) -> None:
    sys.path.append(str(PACKAGE.parent))  # at the end: CALM's modules beside the package must hide nothing
    process = import_module(f"{PACKAGE.name}.process")
    sys.path.pop()
    process.run(plan)


if __name__ == "__main__":
    main(sys.argv[1])
