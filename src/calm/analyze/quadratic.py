"""The little linear algebra of small regressions, in plain arithmetic, for one model or columns of models.

A symmetric matrix is packed: its upper triangle by rows, (S00, S01, .., S11, S12, ..). For one to five
features this is several times faster than numpy's calls on matrices as small as that, and the same line
serves a column of a thousand models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations_with_replacement, starmap
from operator import mul
from typing import cast

import numpy as np

from calm.analyze.maths import Array, N, Rows

Packed = tuple[float, ...]


def dot(a: Sequence[N], b: Sequence[N | float]) -> N:
    """Sum of the products."""
    if len(a) == 3:
        return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return cast(N, sum(map(mul, a, b)))


def form(doubled: Sequence[N], z: Sequence[N | float]) -> N:
    """z' S z of a packed matrix whose off-diagonal entries are doubled."""
    if len(z) == 3:
        x, y, w = z
        a, b, c, d, e, f = doubled
        return x * (a * x + b * y + c * w) + y * (d * y + e * w) + f * w * w
    return dot(doubled, outer(z))


def outer(z: Sequence[N | float]) -> list[N]:
    """z z', packed."""
    return list(starmap(mul, combinations_with_replacement(z, 2)))


def twice_off_diagonal(symmetric: Sequence[float], d: int) -> Packed:
    """As `form` wants it."""
    return tuple(map(mul, symmetric, _weights(d)))


def diagonal(values: Sequence[float]) -> Packed:
    """The packed matrix with these numbers on its diagonal."""
    return packed(np.diag(np.asarray(values, np.float64)))


def packed(matrix: Array) -> Packed:
    return tuple(matrix.take(_upper(len(matrix))).tolist())


def full(symmetric: Sequence[float] | Array, d: int) -> Array:
    return np.asarray(symmetric, np.float64).take(_square(d))


def times(symmetric: Sequence[float], z: Sequence[float]) -> tuple[float, ...]:
    """S z."""
    if len(z) == 3:
        a, b, c, e, f, g = symmetric
        x, y, w = z
        return a * x + b * y + c * w, b * x + e * y + f * w, c * x + f * y + g * w
    if len(z) == 2:
        a, b, c = symmetric
        return a * z[0] + b * z[1], b * z[0] + c * z[1]
    return tuple(full(symmetric, len(z)).dot(z).tolist())


def inverse(symmetric: Sequence[float], d: int) -> Packed:
    """Of a packed positive definite matrix: by cofactors up to three rows, else by LAPACK."""
    if d == 1:
        return (1.0 / symmetric[0],)
    found = _inverse_2(*symmetric) if d == 2 else _inverse_3(*symmetric) if d == 3 else None
    return packed(np.linalg.inv(full(symmetric, d))) if found is None else found


def _inverse_2(a: float, b: float, c: float) -> Packed | None:
    """None where rounding has eaten the determinant."""
    det = a * c - b * b
    return (c / det, -b / det, a / det) if det > 0.0 else None


def _inverse_3(a: float, b: float, c: float, d: float, e: float, f: float) -> Packed | None:
    aa, ab, ac = d * f - e * e, c * e - b * f, b * e - c * d
    det = a * aa + b * ab + c * ac
    if not det > 0.0:
        return None
    p = 1.0 / det
    return aa * p, ab * p, ac * p, (a * f - c * c) * p, (b * c - a * e) * p, (a * d - b * b) * p


@cache
def _upper(d: int) -> Rows:
    """Where the entries of a packed matrix stand in the flattened full one."""
    rows, columns = np.triu_indices(d)
    return rows * d + columns


@cache
def _square(d: int) -> Rows:
    """Where each entry of a full matrix stands in the packed one, (d, d)."""
    where = np.zeros((d, d), np.intp)
    where[np.triu_indices(d)] = np.arange(d * (d + 1) // 2)
    return np.maximum(where, where.T)


@cache
def _weights(d: int) -> Packed:
    return packed(2.0 - np.eye(d, dtype=np.float64))
