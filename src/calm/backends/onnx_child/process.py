"""The child's life: its plan, its libraries, its model, then requests until the parent ends it."""

from __future__ import annotations

import os
import sys

from .load import load
from .plan import read_plan
from .server import Server

CANNOT_LOAD = 3


def run(path: str) -> None:
    """Serves for ever. What hinders the load goes to stderr, where the parent reads it."""
    plan = read_plan(path)
    sys.path[:0] = plan.library
    try:
        service = load(plan)
    except Exception as error:
        print(f"cannot load: {error}", file=sys.stderr, flush=True)
        os._exit(CANNOT_LOAD)
    with Server(plan.socket, service) as server:
        server.serve_forever()
