"""Runs from Python, and one's own code by name in the commands."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import datasets
import jax
import numpy as np
import optax
import pytest
import yaml
from launched import ROOT, make_world
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax import UserError, cli, losses, optim
from dpo_jax.data.sources import memory
from dpo_jax.runs.settings import call_settings
from dpo_jax.runs.sweep import group_runs
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.train_step import hparams


def squared(lp, *, beta: float = 0.1, target: float = 1.0):
    """A loss of one's own."""
    margin = beta * ((lp.policy - lp.reference)[:, 0] - (lp.policy - lp.reference)[:, 1])
    return (margin - target) ** 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs, a run of a small random model, and a module of own functions."""
    with pytest.MonkeyPatch.context() as patch:
        folder = make_world(tmp_path_factory.mktemp("api"))
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        (folder / "own.py").write_text(OWN)
        cli.run_command(["train", "dpo.yaml", "--max-steps", "2", "--run", "runs/start", "--samples.prompts", "0"])
        yield folder
    for known in (losses.REGISTRY, optim.OPTIMIZERS):  # functions that only these tests name
        for name in [n for n in known if ":" in n or n == "in_memory"]:
            del known[name]


OWN = '''
from __future__ import annotations
import json
from pathlib import Path
import optax

def squared(lp, *, beta: float = 0.1, target: float = 1.0):
    """A loss of one's own.

    Args:
      lp: log-probs.
      beta: Strength.
      target: The margin to reach.
    """
    ratios = lp.policy - lp.reference
    return (beta * (ratios[:, 0] - ratios[:, 1]) - target) ** 2

def lion(*, learning_rate: float = 1e-4):
    """Lion.

    Args:
      learning_rate: Constant.
    """
    return optax.lion(learning_rate)

def short(path, split, *, most: int = 1000):
    for line in Path(path[0]).read_text().splitlines()[:most]:
        yield json.loads(line)
'''


def rows(world, count=None):
    return [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()][:count]


# Level 3: runs.

RUN = {"samples": {"prompts": 0}, "batch_size": 8, "max_steps": 3, "eval_every": 0}
RUN |= {"data": {"max_length": 96, "max_prompt_length": 32}}
RUN |= {"model": {"config": "tiny.json", "tokenizer": "synthetic"}, "optim": {"learning_rate": 1e-3}}


def test_train_on_rows_with_an_own_loss_and_callbacks(world):
    """A run folder as the command's; the callbacks see every step and evaluation, and may stop the run."""
    seen = []

    def stop(step, metrics, state):
        seen.append((step, "loss" in metrics, "eval_loss" in metrics, int(state.step)))
        return np.bool_(step == 2 and "loss" in metrics)  # as a comparison of arrays is

    config, answers = RUN | {"max_steps": 5, "run": "runs/rows"}, [stop, lambda step, *_: jax.random.key(step)]
    result = dpo_jax.train(config, data=rows(world), eval_data=rows(world, 20), loss=squared, callbacks=answers)
    assert seen == [(1, True, False, 1), (2, True, False, 2), (2, False, True, 2)]
    assert [r["step"] for r in read_metrics(result.folder / "metrics.jsonl") if "loss" in r] == [1, 2]
    assert result.metrics["eval_loss"] == read_metrics(result.folder / "metrics.jsonl")[-1]["eval_loss"]
    assert (result.folder / "report.html").is_file()
    assert (result.folder / "checkpoints" / "2").is_dir()  # where the next run goes on
    exported = load_file(result.folder / "model" / "model.safetensors")
    assert sum(x.size for x in exported.values()) == sum(x.size for x in jax.tree.leaves(result.params))
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["loss"]["name"] == "test_api_runs:squared"
    again = dpo_jax.train(config, data=rows(world), eval_data=rows(world, 20), loss=squared)  # it resumes
    assert [r["step"] for r in read_metrics(again.folder / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="belongs to another config"):
        dpo_jax.train(config, data=rows(world, 30), eval_data=rows(world, 20), loss=squared)


@pytest.mark.slow
def test_train_equals_the_command(world):
    """The same config from a YAML with keys over it, and from the command line."""
    options = {"max_steps": 3, "samples": {"prompts": 0}, "loss": {"name": "ipo", "beta": 0.3}}
    result = dpo_jax.train("dpo.yaml", run="runs/python", **options)
    argv = ["--max-steps", "3", "--samples.prompts", "0", "--loss.name", "ipo", "--loss.beta", "0.3"]
    cli.run_command(["train", "dpo.yaml", "--run", "runs/command", *argv])
    ours, theirs = (load_file(world / f"runs/{n}/model/model.safetensors") for n in ("python", "command"))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])
    assert json.loads((result.folder / "eval.json").read_text())["step"] == 3


def test_an_optax_object_and_several_terms(world):
    terms = [{"name": "dpo", "beta": 0.3}, {"name": "sft", "weight": 0.1}]
    config = {key: value for key, value in RUN.items() if key != "optim"}
    result = dpo_jax.train(config, data=rows(world), loss=terms, optimizer=optax.lion(1e-4), run="runs/lion")
    lines = [r for r in read_metrics(result.folder / "metrics.jsonl") if "loss" in r]
    assert lines[-1]["loss/sft"] > 0
    assert "learning_rate" not in lines[-1]  # unknown, so not logged
    del optim.OPTIMIZERS["in_memory"]  # as in another process, which needs the optimizer to train only
    found = dpo_jax.evaluate(result.folder, data=rows(world, 8), reward=lambda prompts, texts: [7.0] * len(texts),
                             prompts=2, samples={"max_new_tokens": 2})  # fmt: skip
    assert found["true reward of the policy"]["mean"] == 7.0
    assert found["eval_loss/sft"]["n"] == 8
    with pytest.raises(UserError, match="an optax object was given in Python"):
        dpo_jax.train(config, data=rows(world), loss=terms, run="runs/lion", optim={"name": "in_memory"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_sise": 1}, "unknown key 'batch_sise'; did you mean 'batch_size'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"loss": 3}, "loss: 3: give a name, a function, or a dict"),
        ({"optimizer": 3}, "optimizer: 3: give an optax transformation"),
        (
            {"data": "t.jsonl", "eval_data": [{}]},
            "eval_data: give data and eval_data both as paths, or both as examples",
        ),
        ({"data": [{}], "eval_data": "e.jsonl"}, "eval_data: give data and eval_data both as paths"),
        ({"data": "t.jsonl", "eval_data": {"path": "e"}}, "eval_data: give examples or a path; keys of the section"),
        ({"data": lambda: []}, "data: a function; give dicts of columns"),
        ({"loss": []}, "loss: an empty list"),
        ({"callbacks": None}, r"callbacks: give a list of functions, as in callbacks=\[f\]"),
        ({"data": datasets.DatasetDict({"train": datasets.Dataset.from_list([])})}, "a dataset with splits train"),
        ({"data": ["text"]}, "data: element 0 is a str; give dicts of columns"),
        ({"callbacks": print}, r"callbacks: give a list of functions, as in callbacks=\[f\]"),
        ({"optim": {"name": "optax:adam"}}, "optim.name: optax:adam takes learning_rate by position; name a function"),
        ({"model": (1, 2)}, r"model: a tuple; give a path, or keys such as \{'path': ...\}"),
        ({"model": {}}, "model: name one: model.path"),
        ({"optimizer": optax.adam}, r"optimizer: adam takes learning_rate by position; call it, as in adam\(1e-6\)"),
    ],
)
def test_calls_that_cannot_train_are_one_line(world, keys, message):
    with pytest.raises(UserError, match=message):
        dpo_jax.train(**{"run": "runs/none", "model": "runs/start"} | keys)
    assert not (world / "runs/none").exists()
    with pytest.raises(UserError, match="run: name the folder"):
        dpo_jax.train(model="runs/start")


def test_a_resumed_run_notices_other_functions_and_data(world):
    """Its config names them only; what is new is refused until the user says so."""
    config = {key: value for key, value in RUN.items() if key != "optim"} | {"run": "runs/noticed", "max_steps": 1}
    given = {"data": rows(world), "loss": squared, "optimizer": optax.sgd(1e-3)}
    dpo_jax.train(config, **given)

    def changed(lp, *, beta: float = 0.1, target: float = 1.0):
        return squared(lp, beta=beta, target=2 * target)

    changed.__module__, changed.__qualname__ = squared.__module__, squared.__qualname__
    with pytest.warns(UserWarning, match="replaces another function"), pytest.raises(UserError) as error:
        dpo_jax.train(config, **given | {"loss": changed})
    assert str(error.value) == (
        "runs/noticed: loss test_api_runs:squared changed since this run began; set another --run, or remove "
        "inputs.json there to go on with the new version"
    )
    with pytest.warns(UserWarning, match="replaces another function"):
        assert dpo_jax.train(config, **given).folder.name == "noticed"
    with pytest.raises(UserError, match="optimizer in_memory changed since this run began"):
        dpo_jax.train(config, **given | {"optimizer": optax.sgd(2e-3)})
    (world / "runs/noticed/inputs.json").unlink()
    assert dpo_jax.train(config | {"max_steps": 2}, **given | {"optimizer": optax.sgd(2e-3)}).metrics


def test_a_file_that_changed_is_noticed_by_a_resumed_run(world):
    (world / "changing.jsonl").write_text((world / "pairs.jsonl").read_text())
    config = RUN | {"run": "runs/changing", "max_steps": 1}
    dpo_jax.train(config, data="changing.jsonl")
    (world / "changing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(world)[2:]))
    with pytest.raises(UserError, match=r"runs/changing: training data .*changed since this run began"):
        dpo_jax.train(config, data="changing.jsonl")
    weighted = [row | {"weight": 2.0} for row in rows(world)]  # the same tokens
    (world / "changing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighted))
    with pytest.raises(UserError, match=r"runs/changing: training data .*changed since this run began"):
        dpo_jax.train(config, data="changing.jsonl")


def test_a_registered_function_is_named_so_that_another_process_finds_it(world):
    losses.register(whole_batch=True)(own_batch)
    for term in (own_batch, "own_batch", {"name": "own_batch", "beta": 0.5}):
        settings, _ = call_settings({"run": "x"}, None, None, term, None, {})
        assert settings.loss["name"] == "test_api_runs:own_batch"
    assert losses.build(settings.loss).whole_batch
    del losses.REGISTRY["own_batch"], losses.REGISTRY["test_api_runs:own_batch"]


def own_batch(lp, *, beta: float = 0.1):
    return beta * (lp.policy[:, 0] - lp.policy.mean())


def test_own_functions_may_branch_on_their_options(world):
    """Their floats are not traced; those of built-in losses are, so that a sweep compiles once."""
    settings, _ = call_settings({"run": "x"}, None, None, branching, None, {})
    assert hparams(settings)["loss"] == [{}]
    assert hparams(settings)["optim"].keys() == {"learning_rate", "min_ratio", "max_grad_norm", "decay", "eps"}
    folder = dpo_jax.train(RUN, data=rows(world), loss=branching, run="runs/branching").folder
    assert (folder / "model").is_dir()
    several = [replace(settings, loss=settings.loss | {"target": t}) for t in (1.0, 2.0)]
    assert len(group_runs(several)) == 2
    assert (
        len(
            group_runs(
                [replace(one, loss={"name": "dpo", "beta": b}) for one, b in zip(several, (1.0, 2.0), strict=True)]
            )
        )
        == 1
    )


def branching(lp, *, target: float = 1.0):
    margin = (lp.policy - lp.reference)[:, 0] - (lp.policy - lp.reference)[:, 1]
    return (margin - math.log(target)) ** 2 if target > 0 else margin


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo_jax.evaluate(dpo_jax.Result(None, {}, {})), "evaluate: Result: give the folder of a run"),
        (lambda: dpo_jax.sample("runs/start", []), "prompts: give a list of one or more texts"),
        (lambda: dpo_jax.sweep("dpo.yaml", {"loss.beta": 0.1}), r"sweep: loss.beta: 0.1; give a list of values"),
        (lambda: dpo_jax.sweep("dpo.yaml", {"loss.name": "dpo"}), r"sweep: loss.name: 'dpo'; give a list of values"),
        (lambda: dpo_jax.sweep("dpo.yaml", {"loss.name": [squared]}), "name functions as module:function"),
    ],
)
def test_other_calls_that_cannot_work_are_one_line(world, call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.slow
def test_a_file_may_replace_examples_in_memory_and_the_reverse(world):
    dpo_jax.train(RUN, data=rows(world), run="runs/memory", max_steps=1)
    found = dpo_jax.evaluate("runs/memory", data="pairs.jsonl", prompts=0)
    assert found["eval_loss"]["n"] == len(rows(world))
    section = {"name": "own:short", "path": ["pairs.jsonl"], "options": ["most=60"], "max_length": 96}
    dpo_jax.train(RUN | {"data": section | {"max_prompt_length": 32, "eval_fraction": 0.2}}, run="runs/own_data")
    assert dpo_jax.evaluate("runs/own_data", data=rows(world, 7), prompts=0)["eval_loss"]["n"] == 7


def test_evaluate_and_sample_a_run(world):
    found = dpo_jax.evaluate("runs/start", prompts=0)
    lines = read_metrics(world / "runs/start/metrics.jsonl")
    assert found["eval_loss"]["mean"] == pytest.approx(lines[-1]["eval_loss"], abs=1e-6)
    assert found["eval_loss"]["low"] < found["eval_loss"]["mean"] < found["eval_loss"]["high"]
    assert dpo_jax.evaluate("runs/start", data=rows(world, 9), prompts=0)["eval_loss"]["n"] == 9
    greedy = {"max_new_tokens": 4, "temperature": 0.0}
    texts = dpo_jax.sample("runs/start", ["I saw", "The film"], samples=greedy)
    assert texts.keys() == {"policy", "reference"}
    assert [len(t) for t in texts.values()] == [2, 2]
    assert dpo_jax.sample("runs/start", (text for text in ["I saw", "The film"]), samples=greedy) == texts
    settings, _ = call_settings("dpo.yaml", None, "pairs.jsonl", None, None, {})
    assert (settings.data.name, settings.data.eval_path) == ("files", ("pairs.jsonl",))
    with pytest.raises(UserError, match="sample: dict: give the folder of a run or a model"):
        dpo_jax.sample({}, ["I saw"])


def test_tokenize_leaves_the_examples_of_a_run_where_they_are(world):
    name = memory.keep_examples(rows(world, 6))
    dpo_jax.tokenize(rows(world, 6), dpo_jax.load_model("runs/start")[2])
    assert name in memory.KEPT
    before = set(memory.KEPT)
    dpo_jax.tokenize(rows(world, 7), dpo_jax.load_model("runs/start")[2])
    assert set(memory.KEPT) == before  # its own are forgotten


@pytest.mark.slow
def test_an_evaluation_says_that_a_loss_changed(world, monkeypatch, caplog):
    (world / "moving.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(world))
    options = {"run": "runs/moving", "max_steps": 1, "loss": {"name": "moving:squared"}, "data": {"eval_examples": 4}}
    dpo_jax.train("dpo.yaml", samples={"prompts": 0}, **options)
    caplog.clear()
    dpo_jax.evaluate("runs/moving", prompts=0)
    assert "changed since this run began" not in caplog.text
    (world / "moving.py").write_text(OWN.replace("- target) ** 2", "- target) ** 4"))
    sys.modules.pop("moving")
    importlib.invalidate_caches()
    dpo_jax.evaluate("runs/moving", prompts=0)
    assert "runs/moving: loss moving:squared changed since this run began; its values are those of the" in caplog.text


@pytest.mark.slow
def test_sweep_gives_what_the_runs_give_one_by_one(world):
    found = dpo_jax.sweep("dpo.yaml", {"loss.beta": [0.1, 0.5]}, run="runs/sweep", max_steps=2, samples={"prompts": 0})
    assert [r.folder.name for r in found] == ["loss.beta=0.1", "loss.beta=0.5"]
    alone = dpo_jax.train("dpo.yaml", run="runs/alone", max_steps=2, samples={"prompts": 0}, loss={"beta": 0.5})
    jax.tree.map(np.testing.assert_array_equal, found[1].params, alone.params)


# One's own code by name, from the command line.

OWN_OPTIONS = ("--loss.name", "own:squared", "--loss.target", "2", "--optim.name", "own:lion")
OWN_OPTIONS += ("--max-steps", "2", "--samples.prompts", "0", "--eval-every", "0", "--data.eval_fraction", "0.2")


def run(world, *argv, code=0):
    """Runs `dpo-jax` in a process of its own, which imports own.py from the working directory."""
    args = [sys.executable, "-P", "-m", "dpo_jax", *argv]
    done = subprocess.run(args, cwd=world, capture_output=True, text=True, env=environment())
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment():
    import os

    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_own_code_by_name_in_every_command(world):
    """Train, resume, eval, sample, sweep and report of a run with an own loss, optimizer and data source."""
    (world / "own.yaml").write_text(
        yaml.safe_dump(
            yaml.safe_load((world / "dpo.yaml").read_text())
            | {
                "data": {
                    "name": "own:short",
                    "path": ["pairs.jsonl"],
                    "options": ["most=100"],
                    **RUN["data"],
                    "eval_fraction": 0.2,
                }
            }
            | {"optim": {"name": "own:lion"}, "loss": {"name": "own:squared"}}
        )
    )
    out = run(world, "train", "own.yaml", *OWN_OPTIONS)
    assert "training data: " in out
    config = yaml.safe_load((world / "runs/own/config.yaml").read_text())
    assert (config["loss"]["name"], config["loss"]["target"], config["optim"]["learning_rate"]) == (
        "own:squared",
        2.0,
        1e-4,
    )
    first = read_metrics(world / "runs/own/metrics.jsonl")[0]
    assert first["eval_loss"] == pytest.approx(4.0, abs=1e-4)  # of a margin of 0, (0 - 2)^2
    assert "resuming at step 2 of 3" in run(world, "train", "own.yaml", *OWN_OPTIONS, "--max-steps", "3")
    assert "│ kl " in run(world, "eval", "runs/own", "--prompts", "4")
    assert "policy" in run(world, "sample", "runs/own", "--prompt", "I saw")
    run(world, "sweep", "own.yaml", *OWN_OPTIONS, "--loss.target", "1,2")
    assert (world / "runs/own-sweep/loss.target=1/model").is_dir()
    assert "comparison.html" in run(world, "report", *(f"runs/own-sweep/loss.target={t}" for t in (1, 2)))
    helped = run(world, "train", "own.yaml", "--help-all")
    assert "--loss.target" in helped
    assert "The margin to reach." in helped
    message = run(world, "train", "own.yaml", "--loss.tarset", "1", code=2)
    assert "unknown key 'loss.tarset'; did you mean 'loss.target'?" in message
    message = run(world, "train", "own.yaml", "--data.options", "moost=3", "--run", "runs/x", code=2)
    assert "unknown key 'data.options.moost'; did you mean 'data.options.most'?" in message
    message = run(world, "train", "own.yaml", "--loss.name", "own:square", code=2)
    assert "loss.name: own has no 'square'; did you mean 'squared'?" in message


def test_a_loss_replaces_the_files_section_and_a_dict_without_a_name_changes_it(world):
    (world / "three.yaml").write_text("loss: [{name: dpo, beta: 0.3}, {name: sft}]\n")
    (world / "one.yaml").write_text("loss: {name: dpo, beta: 0.3}\n")
    replaced, _ = call_settings("three.yaml", None, None, squared, None, {})
    assert (replaced.loss["name"], replaced.loss["beta"]) == ("test_api_runs:squared", 0.1)
    changed, _ = call_settings("one.yaml", None, None, {"label_smoothing": 0.1}, None, {})
    assert (changed.loss["name"], changed.loss["beta"], changed.loss["label_smoothing"]) == ("dpo", 0.3, 0.1)
    with pytest.raises(UserError, match="an objective is bound already"):
        call_settings("one.yaml", None, None, losses.of(squared), None, {})
