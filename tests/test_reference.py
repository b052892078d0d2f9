"""Cached reference log-probs: what their key depends on, damaged files, and references that follow the policy."""

import numpy as np
import pytest

from dpo_jax import losses, reference
from dpo_jax.config.schema import Config, LoraConfig, ReferenceConfig
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Sync, Tokens
from dpo_jax.training import setup
from dpo_jax.training.checks import make_sync


def table(token=3, weight=1.0):
    return Table.of([Tokens(np.array([1, 2]), (np.array([token, 0]), np.array([4, 0])), weight)])


def test_the_key_depends_on_tokens_weights_and_dtype_only():
    key = reference.ref_logps_key(table(), "weights", "float32")
    assert key == reference.ref_logps_key(
        table(weight=0.5), "weights", "float32"
    )  # a comparison's weight does not change log-probs
    assert key != reference.ref_logps_key(table(token=5), "weights", "float32")
    assert key != reference.ref_logps_key(table(), "other", "float32")
    assert key != reference.ref_logps_key(table(), "weights", "bfloat16")


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "other shape", "not finite"])
def test_ref_logps_are_computed_once_and_again_when_damaged(tmp_path, content, caplog):
    calls = []

    def compute():
        calls.append(1)
        return np.full((3, 2), -7.0, np.float32)

    values, hit = reference.cached_array(tmp_path / "made", "key", compute, (3, 2))
    assert not hit
    np.testing.assert_array_equal(values, -7.0)
    assert reference.cached_array(tmp_path / "made", "key", compute, (3, 2))[1]
    assert len(calls) == 1
    file = tmp_path / "made/key.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is None:
        file.write_bytes(file.read_bytes()[:-3])
    else:
        np.save(file, np.full((2, 2), 1.0) if content == "other shape" else np.full((3, 2), np.nan))
    values, hit = reference.cached_array(tmp_path / "made", "key", compute, (3, 2))
    assert (hit, len(calls)) == (False, 2)
    assert "damaged; computing it again" in caplog.text
    np.testing.assert_array_equal(values, -7.0)


@pytest.mark.parametrize(
    ("reference", "rest", "message"),
    [
        ({"sync_alpha": 0.3}, {}, "^reference.sync_alpha has no effect without reference.sync_every; set that too$"),
        ({"sync_every": -1}, {}, r"sync_every must be >= 0 and sync_alpha in \(0, 1\], got -1 and 0.6"),
        ({"sync_every": 2, "sync_alpha": 0.0}, {}, r"sync_alpha in \(0, 1\], got 2 and 0.0"),
        ({"sync_every": 2, "sync_alpha": 1.5}, {}, r"sync_alpha in \(0, 1\], got 2 and 1.5"),
        ({"sync_every": 2}, {"loss": {"name": "simpo"}}, "reference.sync_every: this loss has no reference; remove it"),
        (
            {"sync_every": 2},
            {"lora": LoraConfig(rank=4)},
            "the model without adapters, which is fixed; remove it",
        ),
        ({"sync_every": 2}, {}, "a moving reference cannot be cached; set reference.mode: online"),
    ],
)
def test_references_that_cannot_follow_the_policy_are_refused(reference, rest, message):
    with pytest.raises(UserError, match=message):
        setup.check_config(Config(reference=ReferenceConfig(**reference), **rest))


def test_a_reference_follows_by_its_options():
    """Soft updates every 512 steps as TR-DPO, hard updates, and an exponential moving average."""
    for every, alpha in ((512, 0.6), (64, 1.0), (1, 0.01)):
        settings = Config(reference=ReferenceConfig(mode="online", sync_every=every, sync_alpha=alpha))
        assert make_sync(settings, losses.build(settings.loss)) == Sync(every, alpha)
