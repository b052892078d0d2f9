"""Rows whose tokens are split over devices: the attention, the layout, and trajectories against whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import D, H, K, R, dense, inputs, layout, visible, with_gradient

from dpo_jax import losses, optim, reference, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.models.attention import RowMask, Scoring
from dpo_jax.models.blocks import block_attention, blocks_seen
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Sync, Tokens
from dpo_jax.step import init_state, make_eval_step, make_train_step
from dpo_jax.training.shard import gather_on_use

PLAIN = Scoring(D**-0.5)


# Attention of some queries.


@pytest.mark.parametrize(
    ("window", "scoring", "block"), [(None, PLAIN, 25), (9, PLAIN, 15), (None, Scoring(0.5, 2.0), 5), (2, PLAIN, 512)]
)
def test_blocks_equal_dense_attention_and_its_gradient(window, scoring, block):
    """Of 30 queries in any order, over keys in another order."""
    rows, rng = layout(window), np.random.default_rng(0)
    queries, keys = rng.permutation(75)[:30], rng.permutation(75)
    q, k, v, g = inputs()
    seen = visible(rows)[:, queries][:, :, keys]
    mask = RowMask(*(jax.tree.map(lambda x, at=at: x[:, at], rows.queries) for at in (queries, keys)), rows.window)
    given = q[:, queries], k[:, keys], v[:, keys], g[:, queries]
    ours = with_gradient(lambda *x: block_attention(*x, mask, scoring, block=block), *given)
    theirs = with_gradient(lambda *x: dense(*x, seen, scoring), *given)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))
