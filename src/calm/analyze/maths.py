"""One formula for one model and for a thousand: written once, it runs on floats and on columns alike.

A fleet of three pays more for calling numpy on arrays of length three than for the arithmetic itself; a fleet
of a thousand needs numpy. So every formula of this room takes the functions it uses as an argument: `ONE` for
plain floats, `MANY` for arrays with a number for each model. Operators work on both anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Span = Rows | slice
"""Rows to read: a slice where they follow one another, as those of a whole fleet do, so that nothing is copied."""
N = TypeVar("N", float, Array)
"""A number of one model, or a column of them."""


class Maths(NamedTuple, Generic[N]):
    """Elementary functions. `larger` and `smaller` take the column first, the bound second."""

    exp: Callable[[N], N]
    log: Callable[[N], N]
    sqrt: Callable[[N], N]
    tanh: Callable[[N], N]
    expm1: Callable[[N], N]
    larger: Callable[[N, N | float], N]
    smaller: Callable[[N, N | float], N]


ONE: Maths[float] = Maths(math.exp, math.log, math.sqrt, math.tanh, math.expm1, max, min)
MANY: Maths[Array] = Maths(np.exp, np.log, np.sqrt, np.tanh, np.expm1, np.maximum, np.minimum)

Pair = tuple[N, N]
"""Mean and standard deviation."""


def product(m: Maths[N], a: Pair[N], b: Pair[N]) -> Pair[N]:
    """Mean and sd of the product of two independent quantities."""
    (a_mean, a_sd), (b_mean, b_sd) = a, b
    x, y, z = a_mean * b_sd, b_mean * a_sd, a_sd * b_sd
    return a_mean * b_mean, m.sqrt(x * x + y * y + z * z)


def span(rows: list[int]) -> Span:
    """Of rows that are not empty."""
    run = range(rows[0], rows[0] + len(rows))
    return slice(run.start, run.stop) if rows == list(run) else np.asarray(rows, np.intp)
