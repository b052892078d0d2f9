"""Checkpoints: states are restored bit for bit, damage is noticed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.records import TrainState
from dpo_jax.training import checkpoint
from dpo_jax.training.best import checkpoint_evaluation, evaluations_since_best
from dpo_jax.training.checkpoint import Checkpoints


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
    """Saves of steps 3, 6 and 9; the newest two are kept."""
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


def test_a_loss_that_carries_other_numbers_is_named(saved, like):
    """As bco does with all_steps: two instead of one."""
    two = like._replace(running=jax.ShapeDtypeStruct((2,), np.float32, sharding=like.running.sharding))
    message = (
        r"9: saved from another loss \(.running is float32 \[1\] there, float32 \[2\] in this run\); set another --run"
    )
    with pytest.raises(UserError, match=message):
        restored(saved, two)


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
    "no manifest": (lambda f: (f / checkpoint.MANIFEST).unlink(), "incomplete (no manifest)"),
    "a torn manifest": (lambda f: (f / checkpoint.MANIFEST).write_text('{"a'), "its manifest is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_with_a_message(saved, like, kind, caplog):
    harm, message = DAMAGE[kind]
    harm(saved / "9")
    assert message in checkpoint.checkpoint_problem(saved / "9")
    assert_is(restored(saved, like, read_only=True), 6)
    assert (saved / "9").exists()  # a reader touches nothing
    assert_is(restored(saved, like), 6)
    assert not (saved / "9").exists()
    assert len(list((saved.parent / "damaged").iterdir())) == 1
    assert message in caplog.text


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


def edit_manifest(folder, change):
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    change(manifest)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_every_leaf_is_checked_after_it_is_restored(saved, like, caplog):
    """The files are intact, but the checksum of a restored leaf is wrong."""
    name = ".params['a']"
    edit_manifest(saved / "9", lambda m: m["leaves"][name].__setitem__(2, m["leaves"][name][2] ^ 1))
    assert not checkpoint.checkpoint_problem(saved / "9")
    assert_is(restored(saved, like), 6)
    assert f"checkpoint 9: {name} differs from what was saved; moved to" in caplog.text


def test_checksums_depend_on_every_bit_and_every_index():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7, 3)).astype(np.float32)
    plain = int(checkpoint.checksums(x)[""])
    for bit in range(32):
        flipped = x.copy()
        flipped.view(np.uint32)[3, 2, 1] ^= np.uint32(1 << bit)
        assert int(checkpoint.checksums(flipped)[""]) != plain
    swapped = x.copy()
    swapped[1, 2], swapped[4, 0] = x[4, 0], x[1, 2]
    assert int(checkpoint.checksums(swapped)[""]) != plain
    assert int(checkpoint.checksums(x[:, ::-1])[""]) != plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_checksums_do_not_depend_on_the_sharding(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)) * 9).astype(dtype)
    plain = int(checkpoint.checksums(x)[""])
    for sizes in ((1, 4, 1), (1, 2, 2)):
        mesh = sharding.make_mesh(*sizes)
        axes, shapes = {"x": ("vocab", "embed")}, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        laid = jax.device_put(x, sharding.param_shardings(mesh, axes, shapes)["x"])
        assert int(jax.jit(checkpoint.checksums)(laid)[""]) == plain


def test_another_format_is_refused(saved, like):
    edit_manifest(saved / "9", lambda m: m.update(format=99))
    with pytest.raises(
        UserError, match=r"9: format 99, written with jax .* this version reads format 1: resume with the"
    ):
        restored(saved, like)
    assert (saved / "9").exists()


def test_a_checkpoint_of_another_model_is_set_aside(saved, like, tmp_path, caplog):
    other = TrainState(jnp.int32(12), {"b": jnp.zeros(3)}, (), jnp.zeros(1), ())
    checkpoints = Checkpoints(tmp_path / "other")
    checkpoints.save(other, 12)
    checkpoints.close()
    shutil.move(tmp_path / "other/12", saved / "12")
    assert_is(restored(saved, like), 9)
    message = r"checkpoint 12: saved from another model or optimizer (.params['a'] is absent there, float32 [64, 33] in"
    assert message in caplog.text
    assert not (saved / "12").exists()


def test_if_all_checkpoints_are_of_another_model_none_is_moved(saved, like):
    bigger = like._replace(params={"a": jax.ShapeDtypeStruct((64, 34), np.float32)})
    with pytest.raises(
        UserError, match=r"9: .*\.params\['a'\] is float32 \[64, 33\] there, float32 \[64, 34\] in this"
    ):
        restored(saved, bigger)
    assert {p.name for p in saved.iterdir()} == {"6", "9"}


LOSSES = {3: 0.9, 6: 0.5, 9: 0.7, 12: 0.8, 15: 0.95}


@pytest.mark.parametrize(
    ("metric", "best"),
    [("eval_loss", 6), ("eval_kl", 6), ("eval_logratio", 15), ("eval_rewards/accuracies", 15), ("", None)],
)
def test_the_best_is_kept_beside_the_newest(tmp_path, metric, best):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, best=metric)
    for step, loss in LOSSES.items():
        names = ("eval_loss", "eval_kl", "eval_logratio", "eval_rewards/accuracies")
        checkpoints.save(state(step), step, dict.fromkeys(names, interval(loss)))
    checkpoints.save(state(16), 16)  # no evaluation at this step
    checkpoints.wait()
    assert set(checkpoint.steps_in(tmp_path / "c")) == {15, 16} | ({best} if best else set())
    if best:
        assert checkpoints.step_of("best") == best
    else:
        with pytest.raises(UserError, match="keep_best of the run names no metric"):
            checkpoints.step_of("best")
    assert checkpoints.step_of("last") is None
    assert checkpoints.step_of("") == best  # None is the last
    assert checkpoints.step_of("16") == 16
    kept = r"best, last or one of the steps 6, 15, 16" if best == 6 else r"last or one of the steps 15, 16"
    with pytest.raises(UserError, match=rf"checkpoint 4: not found; name .*{kept}$"):
        checkpoints.step_of("4")
    checkpoints.close()
    assert checkpoint_evaluation(tmp_path / "c/15")["eval_loss"] == interval(0.95)
    assert checkpoint_evaluation(tmp_path / "c/16") == {}


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8}


@pytest.mark.parametrize(
    ("metric", "values", "since"),
    [
        ("eval_loss", [], 0),
        ("eval_loss", [0.7], 0),
        ("eval_loss", [0.7, 0.6, 0.65, 0.61], 2),
        ("eval_loss", [0.7, 0.6, 0.6], 1),  # equal is not better
        ("eval_loss", [0.7, None, float("nan"), 0.5], 0),
        ("eval_loss", [0.7, None, float("nan")], 2),
        ("eval_rewards/accuracies", [0.7, 0.6, 0.65], 2),
        ("eval_rewards/accuracies", [0.5, 0.6, 0.65], 0),
    ],
)
def test_evaluations_since_the_best_one(metric, values, since):
    assert evaluations_since_best(metric, values) == since


def test_a_value_that_is_no_number_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=9, best="eval_loss")
    for step, loss in ((1, float("nan")), (2, 0.5), (3, float("nan"))):
        checkpoints.save(state(step), step, {"eval_loss": interval(loss)})
    checkpoints.close()
    assert checkpoint.best_checkpoint(tmp_path / "c", "eval_loss") == 2


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=17_000))
    with pytest.raises(UserError, match=r"1\.7e-05 GB are free, a checkpoint takes 1\.86e-05 GB; free disk space"):
        checkpoints.save(state(1), 1)  # two arrays of 64 x 33 floats and a step: 16,900 bytes, and a tenth more
    checkpoints.close()
    assert list((tmp_path / "c").iterdir()) == []


def test_the_seconds_of_a_save_are_returned_once(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.taken() == {}
    checkpoints.save(state(1), 1)
    checkpoints.wait()
    taken = checkpoints.taken()
    assert 0 < taken["save_stall_seconds"] <= taken["save_seconds"] < 60
    assert checkpoints.taken() == {}
    checkpoints.close()


def test_orbax_v1_reads_our_checkpoints(saved, like):
    """They are written through orbax v0; the move to its v1 keeps them readable."""
    from orbax.checkpoint.experimental import v1

    newest = max(saved.iterdir(), key=lambda folder: int(folder.name))
    assert v1.is_orbax_checkpoint(newest)
    assert_is(v1.load(newest, like), int(newest.name))
