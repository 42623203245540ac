"""Every row once an epoch, like lengths together, pieces within their bound."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from calm.specialise.batches import Tokens, epoch, pieces

ROWS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=120).map(
    lambda sizes: [Tokens((1,) * prompt, (2,) * answer) for prompt, answer in sizes]
)


@settings(derandomize=True, deadline=None)
@given(ROWS, st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_the_fewest_steps(
    rows: list[Tokens], per_step: int, seed: int, number: int
) -> None:
    steps = epoch(rows, per_step, seed, number)
    assert sorted(i for step in steps for i in step) == list(range(len(rows)))
    assert len(steps) == -(-len(rows) // per_step)
    assert all(0 < len(step) <= per_step for step in steps)
    assert steps == epoch(rows, per_step, seed, number)


@settings(derandomize=True, deadline=None)
@given(ROWS, st.integers(1, 200))
def test_pieces_keep_order_and_bound(rows: list[Tokens], most: int) -> None:
    cut = list(pieces(rows, most))
    assert [row for piece in cut for row in piece] == rows
    for piece in cut:
        assert len(piece) == 1 or len(piece) * max(map(len, piece)) <= most


def test_epochs_differ_and_rows_of_a_step_are_alike() -> None:
    rows = [Tokens((1,) * n, (2,)) for n in range(1, 193)]
    first, second = epoch(rows, 16, 0, 0), epoch(rows, 16, 0, 1)
    assert first != second
    assert max(max(step) - min(step) for step in first) == 15
