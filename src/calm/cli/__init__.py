"""The `calm` command: what an operator and a caller type.

`calm --help` is read many times a day, so nothing heavy is imported before a command runs: modules of this
package import click and the standard library only, everything else stands inside the functions that need it.
"""

from __future__ import annotations

import os
import signal

TERMINATED = 128 + signal.SIGTERM
"""As shells have it."""


def main() -> None:
    """Entry point of the installed command. Exits 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: the cores are the engines'
    signal.signal(signal.SIGTERM, _leave)

    from calm.cli.app import calm

    calm(prog_name="calm")


def _leave(*_: object) -> None:
    """SIGTERM unwinds like Ctrl-C, so that what a command started (engines, trial servers) ends with it."""
    raise SystemExit(TERMINATED)
