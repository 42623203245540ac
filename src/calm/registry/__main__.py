"""`python -m calm.registry` prints the JSON Schema of a model card, for editors."""

from __future__ import annotations

import sys

from calm.registry.schema import schema_text

if __name__ == "__main__":
    sys.stdout.write(schema_text())
