"""Packed rows with a shared prompt against transformers' torch models on real text."""

from functools import partial

import jax
import numpy as np
import originals
import pytest
import torch
from transformers import AutoTokenizer

from dpo_jax.data import pack
from dpo_jax.data.encode import encode
from dpo_jax.data.sources.base import load_comparisons
from dpo_jax.data.table import Table
from dpo_jax.logprobs import batch_logps, token_logps
from dpo_jax.microbatches import map_microbatches
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens

COUNT = 6


@pytest.fixture(scope="module")
def table(shared):
    """Six real comparisons of Anthropic HH, longest prompts and shortest, with ids folded into a small vocabulary."""
    rows = load_comparisons("hh", (str(shared / "data/hh/harmless-base/test.jsonl.gz"),), "test", 2)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    full, _ = encode(
        rows[:40], tokenizer, max_length=192, max_prompt_length=96, truncation="paper_keep_end", degenerate="drop",
        add_bos=False,
    )  # fmt: skip
    order = np.argsort(full.lengths())
    chosen = [full[int(i)] for i in [*order[:3], *order[-3:]]]
    return Table.of(Tokens(t.prompt % 997, tuple(r % 997 for r in t.responses), t.weight) for t in chosen)


@pytest.fixture(scope="module", params=list(originals.FAMILIES))
def pair(request, tmp_path_factory):
    """The same small random model in torch and here."""
    folder = tmp_path_factory.mktemp(request.param)
    originals.save_random(request.param, folder, 997)
    architecture, _, params = load_folder(folder)
    return originals.load(folder), build_model(architecture), params


def packed(model, params, table, indices, shape):
    batch, count, places = pack.build_batch(table, indices, shape)

    @jax.jit
    def run(params, batch, count):
        return map_microbatches(
            lambda m: batch_logps(model, params, m, chunk=64).policy.reshape(m.scores.shape), batch, count
        )

    return pack.unpack_batch(run(params, batch, count), places)


def test_packed_log_probs_are_those_of_separate_sequences(pair, table):
    reference, model, params = pair
    with torch.no_grad():
        expected = torch.stack([originals.sequence_logps(reference, table[i]) for i in range(COUNT)]).numpy()
    assert np.abs(expected).max() > 100  # far from trivial
    shape = pack.choose_layout(table, max_length=192, batch_size=COUNT, rows=2)
    indices = np.array([5, 0, 3, 1, 4, 2])
    np.testing.assert_allclose(packed(model, params, table, indices, shape), expected[indices], rtol=2e-6, atol=1e-4)


def test_shared_parts_and_confidence_are_those_of_separate_sequences(pair, table):
    """LD-DPO's log-probs of the first tokens, WPO's mean of log pi(y_t) - log sum_v pi(v)^2, against whole tables."""
    reference, model, params = pair
    batch, count, places = pack.build_batch(
        table, np.arange(COUNT), pack.choose_layout(table, max_length=192, batch_size=COUNT)
    )
    found = jax.jit(
        lambda b: map_microbatches(partial(batch_logps, model, params, confidence=True, chunk=64), b, count)
    )
    lp = jax.tree.map(np.asarray, found(batch))
    at = lambda x: pack.unpack_batch(x.reshape(*batch.scores.shape), places)  # noqa: E731 - shortest here
    for i in range(COUNT):
        short = min(len(r) for r in table[i].responses)
        for p, ids in enumerate(table[i].responses):
            own = originals.token_tables(reference, table[i].prompt, ids)
            picked = own[np.arange(len(ids)), ids]
            np.testing.assert_allclose(at(lp.policy_shared)[i, p], picked[:short].sum(), rtol=2e-6, atol=1e-4)
            expected = (picked - np.log(np.exp(2 * own).sum(-1))).mean()
            np.testing.assert_allclose(at(lp.confidence)[i, p], expected, rtol=1e-4)
    assert len({tuple(len(r) for r in table[i].responses) for i in range(COUNT)}) == COUNT


def test_confidence_is_nan_unless_asked_for(pair, table):
    _, model, params = pair
    batch, _, _ = pack.build_batch(table, np.arange(COUNT), pack.choose_layout(table, max_length=192, batch_size=COUNT))
    lp = batch_logps(model, params, jax.tree.map(lambda x: x[0], batch))
    assert np.isnan(lp.confidence).all()


def test_the_rounding_of_log_probs_is_four_units_in_the_last_place_of_what_is_summed(pair, table):
    _, model, params = pair
    batch, _, _ = pack.build_batch(table, np.arange(COUNT), pack.choose_layout(table, max_length=192, batch_size=COUNT))
    batch = jax.tree.map(lambda x: x[0], batch)
    lp = batch_logps(model, params, batch._replace(ref_logps=np.full_like(batch.ref_logps, -50.0)))
    there = np.asarray(lp.present)
    assert (np.asarray(lp.policy)[there] < -10).all()
    np.testing.assert_allclose(lp.rounding, 2.0**-21 * (abs(lp.policy) + np.where(there, 50.0, 0.0)), rtol=1e-6)


def test_an_absent_response_changes_nothing_for_the_others(pair, table):
    _, model, params = pair
    whole = [table[i] for i in range(COUNT)]
    without = [t._replace(responses=(t.responses[0], t.responses[1][:0])) if i % 2 else t for i, t in enumerate(whole)]
    less = Table.of(without)
    shape = pack.choose_layout(less, max_length=192, batch_size=COUNT, rows=2)
    batch, count, places = pack.build_batch(less, np.arange(COUNT), shape)
    lp = jax.jit(lambda b: map_microbatches(partial(batch_logps, model, params, chunk=64), b, count))(batch)
    at = lambda x: pack.unpack_batch(np.asarray(x).reshape(*batch.scores.shape), places)  # noqa: E731 - shortest here
    usual = pack.choose_layout(table, max_length=192, batch_size=COUNT, rows=2)
    expected = packed(model, params, table, np.arange(COUNT), usual)
    expected[1::2, 1] = 0
    np.testing.assert_allclose(at(lp.policy), expected, rtol=2e-6)
    np.testing.assert_array_equal(at(lp.present), [[True, True], [True, False]] * (COUNT // 2))
    np.testing.assert_allclose(at(lp.policy_shared)[1::2], expected[1::2], rtol=2e-6)  # alone, it is its own shortest


def test_any_layout_gives_the_same_log_probs(pair, table):
    _, model, params = pair
    indices = np.arange(COUNT)
    first = packed(model, params, table, indices, pack.choose_layout(table, max_length=192, batch_size=COUNT, rows=1))
    alone = pack.choose_layout(table, max_length=192, batch_size=COUNT, rows=3)._replace(segments=1, microbatches=2)
    np.testing.assert_allclose(packed(model, params, table, indices, alone), first, rtol=2e-6)


def test_gradients_are_those_of_separate_sequences(pair, table, tmp_path):
    """Of a weighted sum of all log-probs, compared tensor by tensor under Hugging Face's names."""
    reference, model, params = pair
    weights = np.array([[1.0, -0.5]] * COUNT, np.float32)
    total = sum((originals.sequence_logps(reference, table[i]) * torch.tensor(weights[i])).sum() for i in range(COUNT))
    reference.zero_grad()
    total.backward()
    shape = pack.choose_layout(table, max_length=192, batch_size=COUNT, rows=4)
    batch, count, places = pack.build_batch(table, np.arange(COUNT), shape)
    factor = np.zeros((shape.microbatches, shape.rows, shape.segments, 2), np.float32)
    factor[tuple(places.T)] = weights

    @jax.jit
    @jax.grad
    def grad(params):
        lp = [batch_logps(model, params, jax.tree.map(lambda x, m=m: x[m], batch), chunk=64) for m in range(count)]
        return sum((p.policy.reshape(factor[m].shape) * factor[m]).sum() for m, p in enumerate(lp))

    ours = grad(params)
    # Loading torch's gradients as if they were weights maps their names and layouts to ours.
    for parameter in reference.parameters():
        parameter.data = parameter.grad
    reference.save_pretrained(tmp_path)
    _, _, theirs = load_folder(tmp_path)
    largest = max(np.abs(b).max() for b in jax.tree.leaves(theirs))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        # The gradient of a key's bias is 0 in exact arithmetic; such a tensor is judged by the size of the others.
        scale = max(np.abs(b).max(), 1e-3 * largest)
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("chunks", "cap"), [(1, None), (3, None), (3, 2.5)])
def test_chunked_head_is_log_softmax(chunks, cap):
    """Values and both gradients; columns beyond the chunks in use stay zero."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 12, 8)).astype(np.float32), rng.normal(size=(29, 8)).astype(np.float32)
    target, g = rng.integers(29, size=(2, 12)), rng.normal(size=(2, 12)).astype(np.float32)
    used = np.arange(12) < 4 * chunks

    def dense(hidden, head):
        logits = hidden @ head.T
        logits = jax.nn.log_softmax(cap * jax.numpy.tanh(logits / cap) if cap else logits)
        return np.where(used, 1.0, 0.0) * jax.numpy.take_along_axis(logits, target[..., None], -1)[..., 0]

    def ours(hidden, head):
        return token_logps(hidden, head, target.astype(np.int32), np.int32(chunks), 4, cap)

    expected, pull = jax.vjp(dense, hidden, head)
    value, ours_pull = jax.vjp(ours, hidden, head)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for a, b in zip(ours_pull(g), pull(g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_logits_of_a_batch_never_exist(pair, table):
    """No array of the compiled gradient holds vocabulary x scored tokens of the batch; chunks bound it."""
    _, model, params = pair
    shape = pack.choose_layout(table, max_length=192, batch_size=COUNT, rows=2)
    batch = jax.tree.map(lambda x: x[0], pack.build_batch(table, np.arange(COUNT), shape)[0])
    program = jax.jit(jax.grad(lambda p: batch_logps(model, p, batch, chunk=32).policy.sum()))
    jaxpr = str(jax.make_jaxpr(program)(params))
    assert "32" in jaxpr
    assert f"[{shape.rows},{shape.scored},997]" not in jaxpr
    assert f"[{shape.rows},16,997]" in jaxpr
