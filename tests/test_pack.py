"""Packing comparisons in rows: an example by hand, then properties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Tokens

HAND = Table.of(
    [
        Tokens([11, 12, 13], ([21, 22], [31]), 0.5, 0, 0.75, (4.0, 2.5)),  # 3 + 1 + 0 tokens in a row, 3 scored
        Tokens([41], ([51, 52, 53], [61, 62]), 2.0),  # 1 + 2 + 1 tokens in a row, 5 scored
    ]
)
IN_ONE_ROW = {
    "tokens": [11, 12, 13, 21, 41, 51, 52, 61, 0, 0],
    "positions": [0, 1, 2, 3, 0, 1, 2, 1, 0, 0],
    "segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
    "branch_ids": [0, 0, 0, 1, 0, 1, 1, 2, 0, 0],
    "source": [2, 3, 2, 4, 5, 6, 4, 7, 0, 0],
    "target": [21, 22, 31, 51, 52, 53, 61, 62, 0, 0],
    "slot": [0, 0, 1, 2, 2, 2, 3, 3, -1, -1],
    "weights": [0.5, 2.0, 0.0],
    "preference": [0.75, 1.0, 0.0],
    "scores": [[4.0, 2.5], [0.0, 0.0], [0.0, 0.0]],
}


def test_two_comparisons_in_a_row_by_hand():
    batch, count, places = pack.build_batch(HAND, [0, 1], pack.Layout(2, 1, 10, 3, 10))
    for name, expected in IN_ONE_ROW.items():
        field = getattr(batch, name)
        assert field.dtype == (np.float32 if name in ("weights", "preference", "scores") else np.int32)
        assert field[0, 0].tolist() == expected, name
        assert not (field[1] + (name == "slot")).any(), f"{name} of the microbatch that is not used"
    assert np.isnan(batch.ref_logps).all()
    assert batch.ref_logps.shape == (2, 1, 3, 2, 2)
    assert count == 1
    assert places.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_rows_fill_microbatches_in_order_and_unpacking_restores_values():
    layout = pack.Layout(2, 2, 4, 1, 6)
    column = np.array([[[1, 10], [2, 20]], [[3, 30], [4, 40]]], np.float32)
    batch, count, places = pack.build_batch(HAND, np.array([1, 0, 1]), layout, column)
    assert (count, places.tolist()) == (2, [[0, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert batch.tokens.tolist() == [[[41, 51, 52, 61], [11, 12, 13, 21]], [[41, 51, 52, 61], [0, 0, 0, 0]]]
    assert batch.weights[:, :, 0].tolist() == [[2.0, 0.5], [2.0, 0.0]]
    np.testing.assert_array_equal(
        batch.ref_logps[:, :, 0], [[column[1], column[0]], [column[1], np.full((2, 2), np.nan)]]
    )
    np.testing.assert_array_equal(pack.unpack_batch(batch.ref_logps, places), column[[1, 0, 1]])
    with pytest.raises(ValueError, match="5 comparisons take 5 rows, more than"):
        pack.build_batch(HAND, [0, 1, 0, 1, 0], layout)


def test_first_fit_decreasing_by_hand():
    layout = pack.Layout(9, 1, 10, 3, 100)
    scored = np.ones(7, int)
    assert pack.plan_rows(np.array([3, 7, 3, 5, 5, 2, 3]), scored, layout) == [[1, 0], [3, 4], [2, 6, 5]]
    assert pack.plan_rows(np.array([2, 2, 2, 2]), scored[:4], layout) == [
        [0, 1, 2],
        [3],
    ]  # three comparisons a row at most
    assert pack.plan_rows(np.array([2, 2, 2]), np.array([60, 50, 40]), layout) == [[0, 2], [1]]  # 100 scored at most
    assert pack.plan_rows(np.array([], int), np.array([], int), layout) == []


def test_a_comparison_that_fits_no_row_is_refused():
    layout = pack.Layout(9, 1, 10, 3, 20)
    for lengths, scored in (([11], [1]), ([10], [21])):
        with pytest.raises(UserError, match=r"does not fit rows of 10 \(20 scored\); raise data.row_length"):
            pack.plan_rows(np.array(lengths), np.array(scored), layout)


@st.composite
def tables(draw):
    responses = draw(st.integers(1, 3))
    size = st.integers(1, 9)
    sizes = draw(st.lists(st.tuples(size, *[size] * responses), min_size=1, max_size=12))
    numbers = iter(range(1, 10_000))
    return Table.of(Tokens(*_take(numbers, sizes_of)) for sizes_of in sizes)


def _take(numbers, sizes):
    prompt, *responses = ([next(numbers) for _ in range(size)] for size in sizes)
    return prompt, tuple(responses), float(next(numbers))


def draw_layout(draw, table):
    longest, scored = int(table.lengths().max()), int(table.scored_lengths.max())
    rows = draw(st.integers(1, 4))
    length, scored = longest + draw(st.integers(0, 30)), scored + draw(st.integers(0, 20))
    return pack.Layout(-(-len(table) // rows), rows, length, draw(st.integers(1, 4)), scored)


@settings(deadline=None)
@given(st.data())
def test_every_scored_token_has_its_predictor_once(given_data):
    table = given_data.draw(tables())
    layout = draw_layout(given_data.draw, table)
    indices = given_data.draw(st.permutations(range(len(table))))
    batch, count, places = pack.build_batch(table, indices, layout)
    assert len({tuple(place) for place in places.tolist()}) == len(indices)
    assert count == places[:, 0].max() + 1
    assert (batch.slot >= 0).sum() == table.scored_lengths.sum()
    assert (batch.segment_ids > 0).sum() == table.lengths().sum()
    assert not batch.tokens[batch.segment_ids == 0].any()
    for index, (m, r, g) in zip(indices, places.tolist(), strict=True):
        check_one(table[index], type(batch)(*(field[m, r] for field in batch if len(field))), g)


def check_one(tokens, row, g):
    """Checks that a segment has the tokens of its comparison and no others, and scores each response token once."""
    prompt = (row.segment_ids == g + 1) & (row.branch_ids == 0)
    assert row.tokens[prompt].tolist() == tokens.prompt.tolist()
    assert row.positions[prompt].tolist() == list(range(len(tokens.prompt)))
    assert row.weights[g] == tokens.weight
    for p, response in enumerate(tokens.responses):
        mine = (row.segment_ids == g + 1) & (row.branch_ids == p + 1)
        assert row.tokens[mine].tolist() == response[:-1].tolist()
        scored = row.slot == g * len(tokens.responses) + p
        assert row.target[scored].tolist() == response.tolist()
        source = row.source[scored]
        assert prompt[source[0]]
        assert row.positions[source].tolist() == [len(tokens.prompt) - 1 + j for j in range(len(response))]
        assert source[1:].tolist() == np.flatnonzero(mine).tolist()


@settings(deadline=None)
@given(st.data())
def test_a_plan_is_a_permutation_inside_its_budgets(given_data):
    table = given_data.draw(tables())
    layout = draw_layout(given_data.draw, table)
    lengths, scored = table.lengths(), table.scored_lengths
    rows = pack.plan_rows(lengths, scored, layout)
    assert sorted(member for row in rows for member in row) == list(range(len(table)))
    for row in rows:
        assert lengths[row].sum() <= layout.length
        assert scored[row].sum() <= layout.scored
        assert len(row) <= layout.segments
    for earlier, row in itertools.pairwise(rows):  # first fit: what opens a row had no room before
        free = (
            layout.length - lengths[earlier].sum(),
            layout.scored - scored[earlier].sum(),
            layout.segments - len(earlier),
        )
        assert lengths[row[-1]] > free[0] or scored[row[-1]] > free[1] or free[2] < 1


def table_of(*sizes):
    return Table.of(Tokens([1] * prompt, tuple([2] * n for n in responses)) for prompt, *responses in sizes)


def test_choose_layout_fits_the_data_and_no_more_than_the_batch_needs():
    table = table_of((40, 11, 11), (50, 11, 21))  # 60 and 80 tokens in a row, 22 and 32 scored
    layout = pack.choose_layout(table, max_length=512, batch_size=4)
    assert layout == pack.Layout(4, 1, 384, 4, 192)  # 4 * 80 = 320 tokens at most: one row
    many = pack.choose_layout(table, max_length=512, batch_size=256)
    assert many.rows * many.length <= 4096
    assert many.microbatches == -(-256 // many.rows)
    few = pack.choose_layout(table, max_length=512, batch_size=256, most_tokens=1024)
    assert 1024 // 2 < few.rows * few.length <= 1024
    assert pack.choose_layout(table, max_length=512, batch_size=256, length=100).length == 100
    with pytest.raises(UserError, match=r"data\.row_length 79 is shorter than the longest comparison, 80 tokens"):
        pack.choose_layout(table, max_length=512, batch_size=4, length=79)


@pytest.mark.parametrize(("platform", "most"), [("cpu", 1024), ("gpu", 4096)])
def test_microbatches_of_a_run_on_a_cpu_are_small(monkeypatch, platform, most):
    import jax

    from dpo_jax import sharding
    from dpo_jax.config.schema import Config
    from dpo_jax.training.compile import _layout

    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    mesh = sharding.make_mesh(-1, 1, 1)
    layout = _layout(Config(batch_size=4096), mesh, table_of((40, 11, 11), (50, 11, 21)))
    assert most // 2 < layout.rows // sharding.row_devices(mesh) * layout.length <= most


def test_choose_layout_takes_no_rows_longer_than_a_pair_may_need():
    table = table_of((200, 300, 300), (200, 300, 300))  # 798 tokens
    assert pack.choose_layout(table, max_length=512, batch_size=64).length in (1024,)
    longer = table_of((100, *[400] * 4))  # four responses: 1696 tokens
    layout = pack.choose_layout(longer, max_length=512, batch_size=8)
    assert (layout.length, layout.scored) == (1792, 1984)


def test_choose_layout_shares_rows_among_devices():
    table = table_of(*((20, 10 + n, 30 - n) for n in range(20)))
    for devices in (1, 2, 4, 8):
        layout = pack.choose_layout(table, max_length=64, batch_size=64, multiple_of=devices)
        assert layout.rows % devices == 0
        assert layout.microbatches * layout.rows >= 64
    assert pack.choose_layout(table, max_length=64, batch_size=64, rows=6, multiple_of=2)[:2] == (11, 6)
    with pytest.raises(UserError, match=r"data\.rows 5: 2 devices share the rows of a microbatch; give a multiple"):
        pack.choose_layout(table, max_length=64, batch_size=64, rows=5, multiple_of=2)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_batch_fits_the_chosen_layout(given_data):
    table = given_data.draw(tables())
    size = given_data.draw(st.integers(1, 20))
    layout = pack.choose_layout(table, max_length=64, batch_size=size, multiple_of=given_data.draw(st.integers(1, 3)))
    indices = given_data.draw(st.lists(st.integers(0, len(table) - 1), min_size=size, max_size=size))
    batch, count, places = pack.build_batch(table, indices, layout)
    assert 1 <= count <= layout.microbatches
    np.testing.assert_array_equal(pack.unpack_batch(batch.weights, places), table.weights[indices])


def test_real_dialogues_pack_well(shared):
    from transformers import AutoTokenizer

    from dpo_jax.data import order, pack
    from dpo_jax.data.encode import encode
    from dpo_jax.data.sources.base import load_comparisons

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    rows = load_comparisons("hh", (str(shared / "data" / "hh" / "harmless-base"),), "test", 2)
    options = {"truncation": "paper_keep_end", "degenerate": "drop", "add_bos": False}
    table, _ = encode(rows, tokenizer, max_length=512, max_prompt_length=256, **options)
    layout = pack.choose_layout(table, max_length=512, batch_size=64)
    used = slots = 0
    seeded = order.bind_order("seeded", table.prompts, 0)
    for step in range(20):
        indices = order.example_indices(step, seeded, rows=len(table), batch_size=64)
        _, count, _ = pack.build_batch(table, indices, layout)
        used += table.lengths()[indices].sum()
        slots += count * layout.rows * layout.length
    assert used / slots > 0.88
    assert layout.length in (768, 1024)


def test_the_rows_of_each_process_join_to_the_full_batch():
    """Places are those in the full batch on every process."""
    column = np.array([[1, 2], [3, 4]], np.float32)
    layout, rows = pack.Layout(2, 4, 8, 2, 9), np.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
    full, count, places = pack.build_batch(HAND, rows, layout, column)
    parts = [pack.build_batch(HAND, rows, layout._replace(own=own), column) for own in ((0, 1), (1, 3), (3, 4))]
    assert full.tokens.any(axis=-1).sum() == 5
    for field, *own in zip(full, *(part for part, _, _ in parts), strict=True):
        np.testing.assert_array_equal(field, np.concatenate(own, axis=1) if len(field) else own[0])
    for _, other_count, other_places in parts:
        assert other_count == count
        np.testing.assert_array_equal(other_places, places)
