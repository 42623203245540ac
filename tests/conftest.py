"""For all tests: the same examples on every run, so that a failure is a change and not the dice.

`HYPOTHESIS_PROFILE=explore pytest …` draws new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
