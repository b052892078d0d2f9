"""Responses to other prompts, as KTO's estimate of the KL needs them."""

import numpy as np
import pytest

from dpo_jax.data.mismatch import mismatched
from dpo_jax.data.table import Table
from dpo_jax.records import Tokens, UserError

A, B = np.array([1, 2]), np.array([3])
ROWS = [
    Tokens(A, (np.array([10, 11]), np.array([12])), 1.0, 7, 1.0, (2.0, 1.0)),
    Tokens(A, (np.array([20]), np.array([21])), 1.0, 7),
    Tokens(B, (np.array([], int), np.array([31, 32, 33])), 0.5, 8),
]


def test_the_next_comparison_with_another_prompt_gives_its_first_response():
    table, cut = mismatched(Table.of(ROWS), max_length=99)
    assert cut == 0
    assert [table[i].responses[2].tolist() for i in range(3)] == [[31, 32, 33], [31, 32, 33], [10, 11]]
    for i in range(3):
        assert [r.tolist() for r in table[i].responses[:2]] == [r.tolist() for r in ROWS[i].responses]
    assert (table.weights.tolist(), table.scores[0].tolist()) == ([1.0, 1.0, 0.5], [2.0, 1.0, 0.0])


def test_it_is_cut_so_that_the_prompt_fits():
    table, cut = mismatched(Table.of(ROWS), max_length=3)
    assert cut == 2
    assert [table[i].responses[2].tolist() for i in range(3)] == [[31], [31], [10, 11]]


def test_prompts_that_are_all_the_same():
    with pytest.raises(UserError, match="all prompts are the same"):
        mismatched(Table.of(ROWS[:2]), max_length=9)
