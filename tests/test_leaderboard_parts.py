"""`dpo-jax leaderboard` that is interrupted: losses that are done are kept, and no others are taken for them."""

import math
from functools import partial

import jax
import numpy as np
import pytest

from dpo_jax.experiments import kept_paths, leaderboard
from dpo_jax.experiments.leaderboard import LossPaths
from dpo_jax.experiments.table_world import make_world
from dpo_jax.losses.registry import REGISTRY, Entry

WORLD = make_world(5)


@pytest.fixture
def runs(monkeypatch):
    """Losses that were trained: stand-ins with the numbers of their name and strengths; hinge is interrupted once."""
    trained, interrupted = [], []

    def run_loss(term, betas, worlds, steps):
        trained.append(term["name"])
        if term["name"] == "hinge" and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        values = np.random.default_rng(len(trained)).normal(size=(len(betas), 8, len(worlds), len(steps)))
        return LossPaths((math.nan,), steps, values, values + 1, values / 3, values[..., 0] * math.nan)

    monkeypatch.setattr(kept_paths, "run_loss", run_loss)
    monkeypatch.setattr(leaderboard, "AT_ONCE", 1)
    return trained


def kept_run(folder, names=("dpo", "hinge", "ipo"), betas=(0.1, 1 / 3), worlds=(WORLD,), steps=30):
    terms = {name: {"name": name} for name in names}
    return leaderboard.run_leaderboard(terms, betas, worlds, steps, run=partial(kept_paths.run_kept, folder))


def kept_key(term=None, betas=(0.1,), worlds=(WORLD,), steps=(5, 10)):
    return kept_paths.part_name(term or {"name": "dpo"}, betas, worlds, np.array(steps))


def test_a_part_is_of_the_options_of_its_term():
    terms = [{}, {"weight": 2.0}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2}, {"reference_free": True}]
    assert len({kept_key({"name": "dpo", **options}) for options in terms}) == len(terms)
    assert kept_key({"name": "dpo", "weight": 2.0, "ld_alpha": 0.5}) == kept_key(
        {"name": "dpo", "ld_alpha": 0.5, "weight": 2.0}
    )


def test_a_part_is_of_the_statistic_of_a_users_loss(monkeypatch):
    """And of all else that it is registered with."""

    def own(lp, *, beta=0.1):
        return beta * lp.policy[:, 0] - lp.running

    def mean(lp, **_):
        return lp.policy.mean()

    def largest(lp, **_):
        return lp.policy.max()

    entries = [
        Entry(own, 2, True),
        Entry(own, 2, True, statistic=mean),
        Entry(own, 2, True, statistic=largest),
        Entry(own, 2, False, implicit_reward=mean),
        Entry(own, 2, True, of_options=lambda **_: {"scores": True}),
        Entry(own, 2, True, of_options=lambda **_: {"scores": False}),
        Entry(own, 2, True, whole_batch=True),
    ]
    keys = []
    for entry in entries:
        monkeypatch.setitem(REGISTRY, "own", entry)
        keys.append(kept_key({"name": "own"}))
    assert len(set(keys)) == len(entries)


def test_a_part_is_of_the_shapes_and_dtypes_of_its_worlds():
    """Equal bytes are not equal arrays."""
    bits = WORLD.lengths.view(np.int32)
    turned = WORLD.reward.reshape(WORLD.reward.shape[::-1])
    worlds = [WORLD, WORLD._replace(lengths=bits), WORLD._replace(reward=turned)]
    assert bits.tobytes() == WORLD.lengths.tobytes()
    assert len({kept_key(worlds=(world,)) for world in worlds}) == 3


def test_a_part_is_of_the_settings_of_the_arithmetic(monkeypatch):
    keys = [kept_key()]
    with jax.default_matmul_precision("bfloat16"):
        keys.append(kept_key())
    with jax.enable_x64(True):
        keys.append(kept_key())
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    keys.append(kept_key())
    assert len(set(keys)) == 4


def assert_same_bits(one, other):
    for name, a, b in zip(LossPaths._fields, one, other, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def test_an_interrupted_leaderboard_goes_on_with_the_missing_losses(tmp_path, runs):
    with pytest.raises(KeyboardInterrupt):
        kept_run(tmp_path)
    first = kept_run(tmp_path)
    assert runs == ["dpo", "hinge", "hinge", "ipo"]
    again = kept_run(tmp_path, ("ipo", "dpo"))
    assert list(again) == ["ipo", "dpo"]
    assert len(runs) == 4
    for name, paths in again.items():
        assert_same_bits(paths, first[name])


def test_a_part_is_of_its_strengths_worlds_and_steps_and_intact(tmp_path, runs, caplog):
    kept_run(tmp_path, ("dpo",))
    others = ({"betas": (0.1,)}, {"worlds": (make_world(6),)}, {"worlds": (WORLD, make_world(6))}, {"steps": 31})
    for count, other in enumerate(others, 2):
        kept_run(tmp_path, ("dpo",), **other)
        assert len(runs) == count
    files = list(tmp_path.glob("dpo-*.npz"))
    assert len(files) == 5
    for file in files:
        file.write_bytes(file.read_bytes()[:100] + b"x" + file.read_bytes()[101:])
    kept_run(tmp_path, ("dpo",))
    assert len(runs) == 6
    assert "damaged; computing it again" in caplog.text
