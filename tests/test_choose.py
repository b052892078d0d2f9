"""The choice of a token: filters against a sort and transformers, frequencies against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.sampling import choose
from dpo_jax.sampling.choose import choose_tokens, filter_logits

LOGITS = jnp.log(jnp.asarray([[0.4, 0.1, 0.3, 0.15, 0.05]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (2, None, [0, 2]),
        (99, None, [0, 1, 2, 3, 4]),
        (None, 0.3, [0]),
        (None, 0.41, [0, 2]),
        (None, 0.71, [0, 2, 3]),
        (None, 1e-9, [0]),
        (None, 1.0, [0, 1, 2, 3, 4]),
        (2, 0.55, [0]),  # of what top_k leaves, the first has 4/7 = 0.571
        (2, 0.6, [0, 2]),
    ],
)
def test_filters_keep_the_right_tokens(top_k, top_p, kept):
    out = filter_logits(LOGITS, top_k, top_p)
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept
    assert jnp.array_equal(out[0, jnp.asarray(kept)], LOGITS[0, jnp.asarray(kept)])


@pytest.mark.parametrize("settings", [(5, 0.7), (3, 0.9), (40, 0.35), (2, 1.0)])
def test_filters_equal_transformers(settings):
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    top_k, top_p = settings
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2
    theirs = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, torch.tensor(logits)))
    assert np.array_equal(np.isfinite(filter_logits(jnp.asarray(logits), top_k, top_p)), np.isfinite(theirs.numpy()))


def sorted_filter(logits, top_k, top_p):
    """Returns which tokens are kept, by sorting the vocabulary."""
    ranked = np.sort(logits, axis=-1)[:, ::-1]
    least = ranked[:, min(top_k, len(ranked[0])) - 1 :][:, :1] if top_k else -np.inf
    kept = logits >= least
    if top_p:
        p = np.where(ranked >= least, np.exp(ranked - ranked[:, :1], dtype=np.float64), 0)
        p /= p.sum(-1, keepdims=True)
        count = np.maximum((p.cumsum(-1) - p < top_p).sum(-1, keepdims=True), 1)
        kept &= logits >= np.take_along_axis(ranked, count - 1, -1)
    return kept & np.isfinite(logits)


@pytest.mark.parametrize(
    "settings", [(1, None), (50, None), (700, None), (None, 0.1), (None, 0.9), (None, 0.999), (50, 0.8)]
)
@pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
def test_filters_keep_what_a_sort_keeps(settings, shift):
    """Exactly: of steep and flat rows, with equal logits on the border, and tokens without probability."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(12, 701)) * np.geomspace(0.1, 10, 12)[:, None]
    logits = np.concatenate([logits, np.round(logits)]).astype(np.float32) + np.float32(shift)
    logits[:, random.integers(0, 701, 60)] = -np.inf
    found = np.asarray(filter_logits(jnp.asarray(logits), *settings))
    kept = sorted_filter(logits, *settings)
    assert np.array_equal(np.isfinite(found), kept)
    assert np.array_equal(found[kept], logits[kept])


@pytest.mark.parametrize("vocab", [5, choose.BLOCK, 3 * choose.BLOCK, 3 * choose.BLOCK + 40])
def test_the_most_likely_token_is_the_first_of_equals(vocab):
    """As `argmax` has it, among logits of which many are equal and some are -inf."""
    logits = np.random.default_rng(0).integers(-3, 3, (200, vocab)).astype(np.float32)
    logits[logits == -3] = -np.inf
    logits[0], logits[1], logits[2] = -7, -np.inf, np.arange(vocab)
    assert np.array_equal(choose.most_likely_tokens(jnp.asarray(logits)), logits.argmax(-1))
    logits[::2, vocab // 2], logits[3] = np.nan, np.nan  # of a broken model: some token of the vocabulary
    assert (choose.most_likely_tokens(jnp.asarray(logits)) < vocab).all()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_sampled_with_their_probability(temperature, top_k):
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    tokens = choose_tokens(jnp.repeat(LOGITS / temperature, count, axis=0), keys, True, top_k, None)
    p = np.exp(np.asarray(LOGITS[0])) ** (1 / temperature)
    if top_k:
        p[np.argsort(p)[:-top_k]] = 0
    p /= p.sum()
    found = np.bincount(tokens, minlength=5) / count
    assert np.abs(found - p).max() < 4 * np.sqrt(0.25 / count)
    assert (found[p == 0] == 0).all()


@pytest.mark.parametrize("vocab", [choose.BLOCK - 1, choose.BLOCK, 3 * choose.BLOCK + 40])
def test_tokens_of_a_large_vocabulary_are_sampled_with_their_probability(vocab):
    """By a chi-squared statistic over the vocabulary; every third token, also the last one, has probability 0."""
    count, rng = 50_000, np.random.default_rng(0)
    p = rng.random(vocab) * (np.arange(vocab, 0, -1) % 3 != 1)
    p /= p.sum()
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(p) + 7, jnp.float32)
    found = np.bincount(choose.sample_tokens(jnp.tile(logits, (count, 1)), jax.random.split(jax.random.key(1), count)))
    assert len(found) <= vocab
    found = np.pad(found, (0, vocab - len(found)))
    assert (found[p == 0] == 0).all()
    kept = p > 0
    statistic = ((found - count * p)[kept] ** 2 / (count * p[kept])).sum()
    free = kept.sum() - 1
    assert abs(statistic - free) < 5 * np.sqrt(2 * free)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_tokens_without_probability_are_never_sampled(fraction):
    weights = jnp.asarray([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    place = int(choose._sample_index(weights, jnp.asarray([fraction]))[0])  # noqa: SLF001
    assert place == {0.0: 1, 0.5: 3}.get(fraction, 4)
