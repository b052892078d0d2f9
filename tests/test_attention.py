"""Packed and cached attention against a dense reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import attention
from dpo_jax.models.attention import CacheMask, RowMask, Scoring, cached_attention, packed_attention

R, T, H, K, D = 2, 75, 6, 2, 8
PLAIN = Scoring(D**-0.5)


def layout(window=None):
    """Two rows of comparisons of different shapes, one with padding; both segments of a row use the same branch ids."""
    parts = [[(1, 0, 9), (1, 1, 14), (1, 2, 6), (2, 0, 20), (2, 1, 8), (2, 2, 11), (0, 0, 7)], [(1, 0, 40), (1, 1, 35)]]
    segments = [[g for g, _, n in row for _ in range(n)] for row in parts]
    branches = [[b for _, b, n in row for _ in range(n)] for row in parts]
    # Positions continue from the prompt's end in every response.
    lengths = [{(g, b): n for g, b, n in row} for row in parts]
    positions = [
        [i + (known[g, 0] if b else 0) for g, b, n in row for i in range(n)]
        for row, known in zip(parts, lengths, strict=True)
    ]
    rows = jnp.asarray(segments), jnp.asarray(branches)
    return RowMask.of(*rows) if window is None else RowMask.of(*rows, jnp.asarray(positions), jnp.int32(window))


def visible(rows):
    """The mask, entry by entry."""
    _, segment, branch, positions = rows.queries
    segment, branch = np.asarray(segment), np.asarray(branch)
    out = np.zeros((*segment.shape, segment.shape[1]), bool)
    for r in range(segment.shape[0]):
        for i in range(segment.shape[1]):
            for j in range(i + 1):
                out[r, i, j] = segment[r, i] == segment[r, j] and branch[r, j] in (0, branch[r, i])
                if rows.window is not None:
                    out[r, i, j] &= int(positions[r, i]) - int(positions[r, j]) < rows.window
    return out


def dense(q, k, v, seen, scoring=PLAIN):
    """Textbook attention with repeated key-value heads."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k) * scoring.scale
    if scoring.cap:
        scores = scoring.cap * jnp.tanh(scores / scoring.cap)
    p = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("rhqk,rkhd->rqhd", p, v)


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((R, T, H, D), (R, T, K, D), (R, T, K, D), (R, T, H, D))
    return [2 * jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradient(function, q, k, v, g):
    """Returns function(q, k, v) and its gradients for the cotangent g, in one program."""

    def run(q, k, v, g):
        out, back = jax.vjp(function, q, k, v)
        return out, *back(g)

    return jax.jit(run)(q, k, v, g)


@pytest.mark.parametrize(
    ("chunk", "window", "scoring"),
    [(32, None, PLAIN), (128, None, PLAIN), (32, 9, PLAIN), (32, None, Scoring(0.5, 2.0)), (128, 2, Scoring(1.0, 5.0))],
)
def test_equals_dense_attention_and_its_gradient(chunk, window, scoring):
    rows = layout(window)
    seen = visible(rows)
    ours = with_gradient(lambda *x: packed_attention(*x, rows, scoring, chunk=chunk), *inputs())
    theirs = with_gradient(lambda *x: dense(*x, seen, scoring), *inputs())
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_the_chunks_of_very_long_rows_are_larger(monkeypatch):
    monkeypatch.setattr(attention, "MAX_CHUNKS", 2)
    q, k, v, _ = inputs()
    rows = layout()
    run = jax.jit(lambda *x: packed_attention(*x, rows, PLAIN, chunk=1))
    np.testing.assert_allclose(run(q, k, v), dense(q, k, v, visible(rows)), atol=1e-5)
    assert run.lower(q, k, v).as_text().count("stablehlo.exponential") == 2


def test_bfloat16_is_close_and_keeps_the_dtypes():
    rows = layout()
    narrow = inputs(jnp.bfloat16)
    ours = with_gradient(lambda *x: packed_attention(*x, rows, PLAIN), *narrow)
    seen = visible(rows)
    theirs = with_gradient(lambda *x: dense(*x, seen), *(x.astype(jnp.float32) for x in narrow))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def test_padding_is_finite_and_changes_no_other_token():
    q, k, v, _ = inputs()
    rows = layout()
    pad = (rows.queries.segment_ids == 0)[..., None, None]
    changed = [jnp.where(pad, 100.0, x) for x in (q, k, v)]
    run = jax.jit(lambda *x: packed_attention(*x, rows, PLAIN))
    before, after = run(q, k, v), run(*changed)
    assert jnp.isfinite(after).all()
    assert jnp.array_equal(jnp.where(pad, 0.0, before), jnp.where(pad, 0.0, after))


def test_large_scores_do_not_overflow():
    q, k, v, g = inputs()
    rows = layout()
    for out in with_gradient(lambda *x: packed_attention(*x, rows, PLAIN), 1e4 * q, k, v, g):
        assert jnp.isfinite(out).all()


def test_the_backward_pass_saves_no_scores():
    q, k, v, _ = inputs()
    rows = layout()
    back = jax.eval_shape(lambda *x: jax.vjp(lambda *y: packed_attention(*y, rows, PLAIN), *x)[1], q, k, v)
    assert max(leaf.size for leaf in jax.tree.leaves(back)) == q.size


@pytest.mark.parametrize("window", [None, 4, 12])
def test_cached_attention_is_the_last_row_of_packed_attention(window):
    """Two prompts of T - 8 tokens, one with left padding; each is continued by two sequences of 7 tokens and a new one:
    its own continuation and that of the other prompt."""
    q, k, v, _ = inputs()
    segments, prompt = jnp.asarray([[0] * 5 + [1] * (T - 5), [1] * T]), T - 8

    def sequences(x):
        """Returns each prompt with its own continuation, and with that of the other prompt."""
        own, other = x[:, prompt:], x[::-1, prompt:]
        rows = [jnp.concatenate([x[i, :prompt], y[i]])[None] for i in (0, 1) for y in (own, other)]
        return jnp.concatenate(rows)

    rows, scoring = [sequences(x) for x in (q, k, v)], Scoring(0.7, 3.0)
    repeated = jnp.repeat(segments, 2, axis=0)
    positions = None if window is None else jnp.maximum(jnp.cumsum(repeated, axis=1) - 1, 0)
    seen = RowMask.of(repeated, jnp.zeros_like(repeated), positions, window)
    full = jax.jit(partial(packed_attention, scoring=scoring))(*rows, seen)
    spare = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 9), (0, 0)), constant_values=7.0)  # noqa: E731
    prompts = [x[:, :prompt].swapaxes(1, 2) for x in (k, v)]
    own = [spare(x[:, prompt:-1].swapaxes(1, 2)) for x in rows[1:]]
    new = [x[:, -1:] for x in rows]
    cached = jax.jit(partial(cached_attention, scoring=scoring))
    last, cache = cached(*new, (*prompts, *own), CacheMask(segments[:, :prompt] == 1, jnp.int32(7), window))
    np.testing.assert_allclose(last, full[:, -1:], atol=5e-6)
    for kept, old, x in zip(cache, (*prompts, *own), (k, v, *rows[1:]), strict=True):
        with_new = old if len(old) == 2 else old.at[:, :, 7].set(x[:, -1])
        np.testing.assert_array_equal(kept, with_new)
