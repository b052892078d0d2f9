"""The schedule of a run: it ends with the run, is logged as it is used, and stays the same when the run goes on."""

import logging

import numpy as np
import pytest
import yaml
from launched import make_world
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax import UserError
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.run import eval_interval
from dpo_jax.training.run_folder import run_config
from dpo_jax.training.setup import check_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = make_world(tmp_path_factory.mktemp("schedules"))
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        yield folder


LINEAR = {"name": "rmsprop", "schedule": "linear", "learning_rate": 1e-3, "warmup_steps": 1}


def train(run, steps, optim=LINEAR):
    options = {"samples": {"prompts": 0}, "eval_every": 0, "save_every": 1, "batch_size": 8}
    return dpo_jax.train("dpo.yaml", optim=optim, run=run, max_steps=steps, **options)


def rates(run):
    return [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl") if "learning_rate" in line]


def test_a_schedule_ends_with_its_run_and_stays_when_the_run_goes_on(world):
    whole = train("runs/whole", 4).folder
    assert rates(whole) == pytest.approx([5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert run_config(whole).optim["total_steps"] == 4
    parts = train("runs/parts", 2, {**LINEAR, "total_steps": 4}).folder
    assert rates(parts) == pytest.approx(rates(whole)[:2])
    with pytest.raises(UserError, match=r"runs/parts belongs to another config \(optim.schedule"):
        train("runs/parts", 4, {**LINEAR, "schedule": "cosine"})
    train("runs/parts", 4)
    first, second = (load_file(run / "model/model.safetensors") for run in (whole, parts))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    with pytest.raises(UserError, match=r"optim.schedule: linear ends after 4 updates .* and this run has 5; set anot"):
        train("runs/parts", 5)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(world):
    """Its config lacks the newer keys, and has the earlier defaults where the YAML says nothing."""
    before = {"name": "rmsprop", "learning_rate": 1e-3, "warmup_steps": 150}
    given = yaml.safe_load((world / "dpo.yaml").read_text())
    del given["data"]["max_prompt_length"], given["optim"]
    config = given | {"optim": {"learning_rate": 1e-3}, "batch_size": 8, "eval_every": 0, "save_every": 1}
    config |= {"run": "runs/earlier", "samples": {"prompts": 0}, "data": given["data"]}
    folder = dpo_jax.train(config | {"max_steps": 1, "optim": before}).folder
    known = yaml.safe_load((folder / "config.yaml").read_text())
    known["optim"] = before | {"max_grad_norm": 10.0, "decay": 0.99, "eps": 1e-8}
    known["data"] |= {"max_prompt_length": 64}
    del known["data"]["text_prompts"]
    (folder / "config.yaml").write_text(yaml.safe_dump(known))
    dpo_jax.train(config | {"max_steps": 2})
    assert rates(folder) == pytest.approx([1e-3 / 151, 2e-3 / 151])


@pytest.mark.slow
def test_runs_of_a_sweep_with_other_schedules_have_programs_of_their_own(world):
    """The first run began with 4 updates, and keeps the schedule of 4; the others have one of 3."""
    options = {"samples": {"prompts": 0}, "eval_every": 0, "save_every": 1, "batch_size": 8, "run": "runs/sweep"}
    optim = LINEAR | {"warmup_steps": 0}
    dpo_jax.sweep("dpo.yaml", {"loss.beta": [0.1]}, optim=optim, max_steps=4, **options)
    found = dpo_jax.sweep("dpo.yaml", {"loss.beta": [0.1, 0.5]}, optim=optim, max_steps=3, **options)
    alone = train("runs/alone", 3, optim | {"total_steps": 0})
    again = dpo_jax.train(
        "dpo.yaml", optim=optim, loss={"name": "dpo", "beta": 0.5}, max_steps=3, **options | {"run": "runs/half"}
    )
    assert rates(alone.folder) == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    for name, value in load_file(again.folder / "model/model.safetensors").items():
        np.testing.assert_array_equal(value, load_file(found[1].folder / "model/model.safetensors")[name])


@pytest.mark.slow
def test_a_warm_up_longer_than_the_run_is_told(world, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_jax"):
        train("runs/short", 1, {"learning_rate": 1e-3, "warmup_steps": 150})
    assert "the warm-up takes 150 updates (optim.warmup_steps) and the run has 1, so that the learning" in caplog.text
    caplog.clear()
    default = train("runs/default", 1, {"learning_rate": 1e-3, "warmup_steps": -1}).folder
    assert "warm-up" not in caplog.text
    assert rates(default) == pytest.approx([1e-3])


def test_short_rows_need_no_second_limit_and_shares_of_updates_are_no_arguments_of_the_program(world):
    """`data.max_length` alone; `warmup_ratio` decides the number of updates, which a traced number cannot."""
    ratio = {"name": "rmsprop", "learning_rate": 1e-3, "warmup_steps": -1, "warmup_ratio": 0.5, "schedule": "wsd"}
    options = {"samples": {"prompts": 0}, "batch_size": 8, "max_steps": 2, "optim": ratio | {"min_ratio": 0.5}}
    data = {"max_length": 64, "max_prompt_length": None}
    found = dpo_jax.train("dpo.yaml", run="runs/ratio", data=data, **options).folder
    assert rates(found) == pytest.approx([5e-4, 1e-3])


@pytest.mark.parametrize(
    ("every", "steps"),
    [(20, 2), (7, 1), (0, 0), ("20", 2), ("3 steps", 3), ("3steps", 3), ("0.5 epochs", 6), ("2 epochs", 24)],
)
def test_evaluations_come_after_comparisons_steps_or_epochs(every, steps):
    """100 comparisons, 8 a step: 12 steps an epoch."""
    assert eval_interval(Config(eval_every=every, batch_size=8), 100) == steps


@pytest.mark.parametrize("every", ["-1", "100 step", "often", "1e3", ""])
def test_other_intervals_are_refused(every):
    with pytest.raises(UserError, match=rf"^eval_every: '?{every}'?: write comparisons as 20000, or '100 steps'"):
        check_config(parse_config(Config, None, {"eval_every": every, "model": {"path": "m"}}))
