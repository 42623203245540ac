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
from numpy.typing import NDArray

from calm.analyze.maths import Array, N, Rows

Packed = tuple[float, ...]


def dot(a: Sequence[N], b: Sequence[N | float]) -> N:
    """Sum of the products. The usual lengths are spelt out, here and in `form`: they cost a third."""
    size = len(a)
    if size == 3:
        return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    if size == 2:
        return a[0] * b[0] + a[1] * b[1]
    return cast(N, sum(map(mul, a, b)))


def form(doubled: Sequence[N], z: Sequence[N | float]) -> N:
    """z' S z of a packed matrix whose off-diagonal entries are doubled."""
    size = len(z)
    if size == 3:
        x, y, w = z
        a, b, c, d, e, f = doubled
        return x * (a * x + b * y + c * w) + y * (d * y + e * w) + f * w * w
    if size == 2:
        x, y = z
        return x * (doubled[0] * x + doubled[1] * y) + doubled[2] * y * y
    return dot(doubled, outer(z)) if size != 5 else _form_5(doubled, z)


def _form_5(doubled: Sequence[N], z: Sequence[N | float]) -> N:
    v, w, x, y, u = z
    a, b, c, d, e, f, g, h, i, j, k, m, n, o, p = doubled
    return (
        v * (a * v + b * w + c * x + d * y + e * u)
        + w * (f * w + g * x + h * y + i * u)
        + x * (j * x + k * y + m * u)
        + y * (n * y + o * u)
        + p * u * u
    )


def outer(z: Sequence[N | float]) -> list[N]:
    """z z', packed."""
    return list(starmap(mul, combinations_with_replacement(z, 2)))


def diagonal(values: Sequence[float]) -> Packed:
    """The packed matrix with these numbers on its diagonal."""
    return packed(np.diag(values))


def packed(matrix: NDArray[np.floating]) -> Packed:
    """The upper triangle."""
    return tuple(matrix.take(_upper(len(matrix))).tolist())


def full(symmetric: Sequence[float] | Array, d: int) -> Array:
    """The whole (d, d) matrix of a packed one."""
    return np.asarray(symmetric, np.float64).take(_square(d))


def solved(symmetric: Sequence[float], z: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """(S^-1 z, S^-1) of a positive definite S, packed: by cofactors up to three rows, else by LAPACK."""
    found: Packed | None = None
    if len(z) == 3:
        found = _inverse_3(*symmetric)
        if found is not None:
            a, b, c, e, f, g = found
            x, y, w = z
            return (a * x + b * y + c * w, b * x + e * y + f * w, c * x + f * y + g * w), found
    elif len(z) == 2:
        found = _inverse_2(*symmetric)
        if found is not None:
            a, b, c = found
            return (a * z[0] + b * z[1], b * z[0] + c * z[1]), found
    elif len(z) == 1:
        return (z[0] / symmetric[0],), (1.0 / symmetric[0],)
    matrix = _inverse(full(symmetric, len(z)))
    return matrix.dot(z).tolist(), packed(matrix)


def _inverse(matrix: Array) -> Array:
    """The pseudo-inverse where rounding has made it singular: a service goes on with what it knows."""
    try:
        return np.asarray(np.linalg.inv(matrix), np.float64)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.pinv(matrix, hermitian=True), np.float64)


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
def off_diagonal_twice(d: int) -> Packed:
    """What to multiply a packed matrix with for `form`."""
    return packed(2.0 - np.eye(d))
