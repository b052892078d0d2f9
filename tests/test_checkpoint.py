"""Checkpoints: what is saved comes back bit for bit, and what is damaged is noticed."""

import jax
import numpy as np
import pytest

from dpo_jax import checkpoint
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.records import TrainState


def state(step):
    rng = np.random.default_rng(step)
    params = {"a": jax.numpy.asarray(rng.normal(size=(64, 33)).astype(np.float32))}
    return TrainState(
        jax.numpy.int32(step), params, (jax.tree.map(lambda x: x * 2, params), ()), jax.numpy.zeros(1), ()
    )


@pytest.fixture
def like():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


@pytest.fixture
def saved(tmp_path):
    """Steps 3, 6 and 9, of which the newest two are kept."""
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (3, 6, 9):
        checkpoints.save(state(step), step)
    checkpoints.close()
    return tmp_path / "c"


def restored(folder, like, **options):
    checkpoints = Checkpoints(folder, **options)
    found = checkpoints.restore(like)
    checkpoints.close()
    return found


def assert_is(found, step):
    jax.tree.map(np.testing.assert_array_equal, found, state(step))
    assert type(found) is TrainState


def test_comes_back_bit_for_bit(saved, like):
    assert {p.name for p in saved.iterdir()} == {"6", "9"}
    assert_is(restored(saved, like), 9)


def test_nothing_to_restore(tmp_path, like):
    assert restored(tmp_path / "new", like) is None


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    content = bytearray(largest(folder).read_bytes())
    content[len(content) // 2] ^= 1
    largest(folder).write_bytes(content)


DAMAGE = {
    "a flipped byte": (flip, "is damaged"),
    "a missing file": (lambda f: largest(f).unlink(), "is missing"),
    "no manifest": (lambda f: (f / checkpoint.MANIFEST).unlink(), "it was not finished"),
    "a torn manifest": (lambda f: (f / checkpoint.MANIFEST).write_text('{"a'), "its manifest is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_to_the_one_before_and_says_so(saved, like, kind, capsys):
    harm, message = DAMAGE[kind]
    harm(saved / "9")
    assert message in checkpoint.problem(saved / "9")
    assert_is(restored(saved, like, read_only=True), 6)
    assert (saved / "9").exists()  # a reader touches nothing
    assert_is(restored(saved, like), 6)
    assert not (saved / "9").exists()
    assert len(list((saved.parent / "damaged").iterdir())) == 1
    assert message in capsys.readouterr().out


def test_an_empty_folder_is_no_checkpoint(saved, like):
    (saved / "12").mkdir()
    assert_is(restored(saved, like), 9)


def test_a_step_whose_damaged_checkpoint_was_set_aside_can_be_saved_again(saved, like):
    flip(saved / "9")
    checkpoints = Checkpoints(saved)
    assert int(checkpoints.restore(like).step) == 6
    checkpoints.save(state(9), 9)
    checkpoints.close()
    assert_is(restored(saved, like), 9)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path, like):
    checkpoints = Checkpoints(tmp_path / "c")
    current = state(1)
    checkpoints.save(current, 1)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(current))
    checkpoints.close()
    assert_is(restored(tmp_path / "c", like), 1)
