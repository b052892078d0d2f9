"""The reference column: what its key sees, and what a damaged file does."""

import numpy as np
import pytest

from dpo_jax import losses, reference
from dpo_jax.config.schema import Config, LoraConfig, ReferenceConfig
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.records import Sync, Tokens
from dpo_jax.training import setup


def table(token=3, weight=1.0):
    return Table.of([Tokens(np.array([1, 2]), (np.array([token, 0]), np.array([4, 0])), weight)])


def test_the_key_sees_tokens_weights_and_dtype_and_nothing_else():
    key = reference.ref_logps_key(table(), "weights", "float32")
    assert key == reference.ref_logps_key(
        table(weight=0.5), "weights", "float32"
    )  # the comparison's weight is not the model's
    assert key != reference.ref_logps_key(table(token=5), "weights", "float32")
    assert key != reference.ref_logps_key(table(), "other", "float32")
    assert key != reference.ref_logps_key(table(), "weights", "bfloat16")


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "other shape", "not finite"])
def test_a_column_is_computed_once_and_again_when_damaged(tmp_path, content, capsys):
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
    assert "damaged, computed again" in capsys.readouterr().out
    np.testing.assert_array_equal(values, -7.0)


@pytest.mark.parametrize(
    ("reference", "rest", "message"),
    [
        ({"sync_alpha": 0.3}, {}, "sync_alpha: 0.3 moves nothing; say with reference.sync_every"),
        ({"sync_every": -1}, {}, "sync_every -1 is less than 0"),
        ({"sync_every": 2, "sync_alpha": 0.0}, {}, r"sync_alpha 0.0 is not in \(0, 1\]"),
        ({"sync_every": 2, "sync_alpha": 1.5}, {}, r"sync_alpha 1.5 is not in \(0, 1\]"),
        ({"sync_every": 2}, {"loss": {"name": "simpo"}}, "the loss has no reference that could follow"),
        ({"sync_every": 2}, {"lora": LoraConfig(rank=4)}, "the reference is the model without adapters, which stays"),
        ({"sync_every": 2}, {}, "a reference that moves cannot be cached; set reference.mode: online"),
    ],
)
def test_what_cannot_move_is_refused(reference, rest, message):
    with pytest.raises(UserError, match=message):
        setup.check_config(Config(reference=ReferenceConfig(**reference), **rest))


def test_a_reference_moves_as_it_is_told():
    """Softly every 512 steps, as TR-DPO; at once; a little after every step, an exponential mean."""
    for every, alpha in ((512, 0.6), (64, 1.0), (1, 0.01)):
        settings = Config(reference=ReferenceConfig(mode="online", sync_every=every, sync_alpha=alpha))
        assert setup.make_sync(settings, losses.build(settings.loss)) == Sync(every, alpha)
