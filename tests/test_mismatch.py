"""Mismatched responses: responses to other prompts, from which KTO estimates the KL divergence."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data.noise import add_mismatched, next_with_another_prompt
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Tokens

A, B = np.array([1, 2]), np.array([3])
ROWS = [
    Tokens(A, (np.array([10, 11]), np.array([12])), 1.0, 7, 1.0, (2.0, 1.0)),
    Tokens(A, (np.array([20]), np.array([21])), 1.0, 7),
    Tokens(B, (np.array([], int), np.array([31, 32, 33])), 0.5, 8),
]


def answered(max_length):
    counts = Counter()
    return Table.of(add_mismatched(Table.of(ROWS), max_length, counts)), counts["cut"]


def test_the_next_comparison_with_another_prompt_gives_its_first_present_response():
    table, cut = answered(99)
    assert cut == 0
    assert [table[i].responses[2].tolist() for i in range(3)] == [[31, 32, 33], [31, 32, 33], [10, 11]]
    for i in range(3):
        assert [r.tolist() for r in table[i].responses[:2]] == [r.tolist() for r in ROWS[i].responses]
    assert (table.weights.tolist(), table.scores[0].tolist()) == ([1.0, 1.0, 0.5], [2.0, 1.0, 0.0])


def test_a_mismatched_response_is_truncated_to_max_length():
    table, cut = answered(3)
    assert cut == 2
    assert [table[i].responses[2].tolist() for i in range(3)] == [[31], [31], [10, 11]]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda x: len(set(x)) > 1))
def test_the_next_prompt_that_differs_is_found_around_the_end(prompts):
    count = len(prompts)
    expected = [next(j % count for j in range(i, i + count) if prompts[j % count] != prompts[i]) for i in range(count)]
    assert list(next_with_another_prompt(np.array(prompts, np.uint64))) == expected


def test_equal_prompts_alone_are_refused():
    with pytest.raises(UserError, match="all prompts are the same"):
        list(add_mismatched(Table.of(ROWS[:2]), 9, Counter()))


def test_a_mismatched_response_that_truncation_leaves_no_weight_is_dropped_and_counted():
    """With at most two tokens there is room for one, beside either prompt."""
    light = np.array([0, 5], np.float32), np.ones(1, np.float32)
    rows = [ROWS[0]._replace(token_weights=light), Tokens(B, (np.array([30, 31]), np.array([32])), 1.0, 8)]
    counts = Counter()
    (only,) = add_mismatched(Table.of(rows), 2, counts)
    assert [r.tolist() for r in only.responses] == [[10, 11], [12], [30]]
    assert counts == {"cut": 1, "unweighted": 1}
    rows[1] = rows[1]._replace(token_weights=light)
    with pytest.raises(UserError, match="max_length leaves no response to another prompt a token with a weight"):
        list(add_mismatched(Table.of(rows), 2, Counter()))
    assert len(list(add_mismatched(Table.of(rows), 4, Counter()))) == 2
