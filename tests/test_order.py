"""The comparisons of each step: the seeded order, and exactly that of the paper's code."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax import losses
from dpo_jax.config.schema import Config, DataConfig
from dpo_jax.data import order
from dpo_jax.data.encode import encode
from dpo_jax.data.sources import synthetic
from dpo_jax.data.sources.base import load_comparisons
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison
from dpo_jax.training.tables import load_table


def seeded(rows, seed=0):
    return order.bind_order("seeded", np.zeros(rows, np.uint64), seed)


@given(rows=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(-5, 2**70), epoch=st.integers(0, 3))
def test_an_epoch_repeats_nothing_and_a_batch_depends_only_on_its_step(rows, batch, seed, epoch):
    if rows < batch:
        with pytest.raises(UserError, match=f"batch_size {batch} is more than the {rows} comparisons"):
            order.example_indices(0, seeded(rows, seed), rows=rows, batch_size=batch)
        return
    steps = order.steps_per_epoch(rows, batch)
    assert steps == rows // batch
    numbers = range(epoch * steps, (epoch + 1) * steps)
    batches = {
        step: order.example_indices(step, seeded(rows, seed), rows=rows, batch_size=batch) for step in reversed(numbers)
    }
    taken = np.concatenate(list(batches.values()))
    assert taken.dtype == np.int64
    assert len(set(taken.tolist())) == steps * batch
    assert set(taken.tolist()) <= set(range(rows))
    again = order.example_indices(numbers[0], seeded(rows, seed), rows=rows, batch_size=batch)
    np.testing.assert_array_equal(again, batches[numbers[0]])


def test_each_epoch_and_seed_has_a_pinned_order():
    def indices_of(step, seed=0):
        return order.example_indices(step, seeded(10, seed), rows=10, batch_size=10).tolist()

    assert indices_of(0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert indices_of(1) == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert indices_of(0, seed=1) == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    kept = seeded(10)
    order.example_indices(0, kept, rows=10, batch_size=10)[:] = 0  # the caller's own copy
    assert kept(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        order.steps_per_epoch(10, 0)
    with pytest.raises(ValueError, match="step -1 is negative"):
        indices_of(-1)


def test_the_seeds_and_first_shuffle_of_the_original_are_pinned():
    assert order.original_seeds(4) == [2357136044, 2546248239, 3071714933, 3626093760]
    assert order.bind_order("original", np.arange(10, dtype=np.uint64), 7)(0).tolist() == [8, 7, 2, 4, 1, 5, 3, 9, 0, 6]


def originals_batches(flat_data, batch_size, epochs):
    """Yields batches as `get_batch_iterator` of the paper's code does: flat_data is a list of (prompt, pairs)."""
    state = np.random.get_state()
    np.random.seed(0)
    seeds = iter(np.random.randint(0, 2**32, size=1_000_000))
    np.random.set_state(state)
    flat_data = list(flat_data)
    for _ in range(epochs):
        own = random.getstate()
        random.seed(int(next(seeds)))
        random.shuffle(flat_data)
        random.setstate(own)
        batch = []
        for _, pairs in flat_data:
            for pair in pairs:
                batch.append(pair)
                if len(batch) == batch_size:
                    yield batch
                    batch = []


@given(prompts=st.lists(st.integers(0, 9), min_size=1, max_size=40), batch=st.integers(1, 9))
def test_original_gives_the_batches_of_the_papers_code(prompts, batch):
    pairs_of = {}
    for row, prompt in enumerate(prompts):
        pairs_of.setdefault(prompt, []).append(row)
    expected = list(originals_batches(pairs_of.items(), batch, epochs=3))
    bound = order.bind_order("original", np.array(prompts, np.uint64), seed=5)
    steps = 3 * (len(prompts) // batch)
    found = [order.example_indices(s, bound, rows=len(prompts), batch_size=batch).tolist() for s in range(steps)]
    assert found == expected


def test_real_dialogues_come_in_the_order_of_the_papers_code(shared):
    """Prompts are compared before truncation, and comparisons of the same prompt stay together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    rows = load_comparisons("hh", (str(shared / "data" / "hh" / "harmless-base"),), "test", 2)
    limits = {"max_length": 64, "max_prompt_length": 4, "truncation": "paper_keep_end"}
    table, _ = encode(rows, tokenizer, **limits, degenerate="keep", add_bos=False)
    assert len({table[i].prompt.tobytes() for i in range(len(table))}) < len(np.unique(table.prompts)) == 2310
    pairs_of = {}
    for number, row in enumerate(rows):
        pairs_of.setdefault(row.prompt, []).append(number)
    expected = list(originals_batches(pairs_of.items(), 64, epochs=2))
    bound = order.bind_order("original", table.prompts, seed=0)
    found = [order.example_indices(s, bound, rows=len(rows), batch_size=64).tolist() for s in range(2 * (2312 // 64))]
    assert found == expected


def test_a_warning_tells_when_the_batches_of_the_papers_code_are_not_met():
    """A comparison that is dropped moves all that come after it."""
    rows = [Comparison(f"p{i}", ("a", "b" if i else ""), where="f:1") for i in range(4)]
    tokenizer = synthetic.synthetic_tokenizer()
    for degenerate, name, expected in (("drop", "original", 1), ("keep", "original", 0), ("drop", "seeded", 0)):
        options = dataclasses.replace(DataConfig(), degenerate=degenerate, order=name)
        notes = []
        load_table(Config(data=options), losses.build({"name": "dpo"}), tokenizer, rows, "training", notes)
        warned = [line for line in notes if "1 fewer comparisons than in the original code" in line]
        assert len(warned) == expected
