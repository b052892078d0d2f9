"""A sweep gives what its runs give one by one, whatever trains together, and goes on where it was."""

import json
import shutil

import numpy as np
import pytest
from launched import TIMES, make_world
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.commands import sweep as sweep_of
from dpo_jax.commands.sweep import split_values
from dpo_jax.errors import UserError
from dpo_jax.runs.sweep import group_runs, sweep_configs
from dpo_jax.training.metrics_file import read_metrics

SAME = ("dpo.yaml", "--max-steps", "8", "--eval-every", "64", "--save-every", "3", "--samples.prompts", "0")
BETAS = ("0.05", "0.5")
RATES = ("1e-3", "3e-3")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = make_world(tmp_path_factory.mktemp("sweep"))
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        yield folder


def sweep(*options):
    cli.run_command(["sweep", *SAME, *options])


@pytest.fixture(scope="module")
def swept(world):
    """The folder of four runs that have trained together."""
    sweep("--loss.beta", ",".join(BETAS), "--optim.learning_rate", ",".join(RATES))
    return world / "runs/dpo-sweep"


def assert_same(run, other):
    """Asserts that two runs have the same metrics, samples and policy, to rounding."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, other))
    assert len(ours) == len(theirs) == 8 + 3  # evaluated at the start, at half and at the end
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - TIMES == b.keys() - TIMES
        for name in a.keys() - TIMES:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), name
    a, b = (load_file(folder / "model/model.safetensors") for folder in (run, other))
    for name, value in a.items():
        np.testing.assert_allclose(value, b[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("beta", "rate"), [(BETAS[0], RATES[1]), (BETAS[1], RATES[0])])
@pytest.mark.slow
def test_each_run_of_a_sweep_is_the_run_alone(world, swept, beta, rate):
    name = f"loss.beta={beta},optim.learning_rate={rate}"
    cli.run_command(["train", *SAME, "--loss.beta", beta, "--optim.learning_rate", rate, "--run", f"runs/{name}"])
    assert_same(swept / name, world / "runs" / name)
    assert len(list(swept.glob("loss.beta=*/report.html"))) == 4
    assert all(f"loss.beta={b}" in (swept / "report.html").read_text() for b in BETAS)


@pytest.mark.slow
def test_each_run_of_a_sweep_goes_on_from_its_own_step(world, swept, capsys):
    options = ("--loss.beta", ",".join(BETAS), "--optim.learning_rate", RATES[0], "--run", "runs/again")
    sweep(*options, "--max-steps", "7")
    newest = world / "runs/again/loss.beta=0.5/checkpoints/7"
    shutil.rmtree(newest)  # as if it was killed between the two
    capsys.readouterr()
    sweep(*options)
    out = capsys.readouterr().out
    first, second = out.split("run 2 of 2: loss.beta=0.5\n")
    assert "resuming at step 7 of 8" in first
    assert second.startswith("resuming at step 6 of 8")
    for beta in BETAS:
        run, whole = world / f"runs/again/loss.beta={beta}", swept / f"loss.beta={beta},optim.learning_rate={RATES[0]}"
        lines = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
        assert [r["step"] for r in lines] == list(range(1, 9))
        a, b = (load_file(folder / "model/model.safetensors") for folder in (run, whole))
        assert all((value == b[name]).all() for name, value in a.items())


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_whole_and_a_longer_sweep_them_as_they_are(world, swept, capsys):
    options = ("--loss.beta", BETAS[0], "--run", "runs/sick", "--optim.learning_rate")
    with pytest.raises(UserError, match=r"1e30: step \d: loss or gradient not finite 3 times in a row"):
        sweep(*options, f"{RATES[0]},1e30")
    good = world / f"runs/sick/optim.learning_rate={RATES[0]}"
    assert_same(good, swept / f"loss.beta={BETAS[0]},optim.learning_rate={RATES[0]}")
    before = (good / "metrics.jsonl").read_text()
    assert not (world / "runs/sick/optim.learning_rate=1e30/model").exists()
    shutil.rmtree(world / "runs/sick/optim.learning_rate=1e30")
    sweep(*options, ",".join(RATES))
    assert "resuming at step 8 of 8" in capsys.readouterr().out
    assert (good / "metrics.jsonl").read_text() == before
    name = f"optim.learning_rate={RATES[1]}"
    assert_same(world / "runs/sick" / name, swept / f"loss.beta={BETAS[0]},{name}")


def made_run(folder, **metrics):
    """Makes a run folder with an eval.json: metric -> (mean, low, high)."""
    folder.mkdir(parents=True)
    entries = {k: dict(zip(("mean", "low", "high", "n"), (*values, 9), strict=True)) for k, values in metrics.items()}
    (folder / "eval.json").write_text(json.dumps({"step": 8, "metrics": entries}))
    return folder


def test_the_table_compares_what_losses_and_betas_have_in_common(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    shown = (*sweep_of.SHOWN, "eval_loss")
    both = {"eval_rewards/accuracies": (0.712, 0.65, 0.8), "eval_kl": (2.25, 1.5, 3.0), "eval_logratio": (-4, -5, -3)}
    margins = {"eval_rewards/margins": (7.5, 7, 8), "eval_loss": (0.6, 0.5, 0.7)}
    rewarded = {"true reward of the policy": (6.72, 5.62, 7.82)}
    runs = [made_run(tmp_path / "loss.beta=0.1", **both, **margins, **rewarded)]
    runs += [made_run(tmp_path / "loss.beta=1,seed=2", **both, **margins), made_run(tmp_path / "loss.beta=9")]
    sweep_of._print(runs, shown, {"loss.beta=9"})  # noqa: SLF001 (a sweep takes a minute)
    rows = [line for line in capsys.readouterr().out.splitlines() if line[0] in "│┃"]
    lines = [[cell.strip() for cell in row.strip("│┃").split(row[0])] for row in rows]
    names = ("rewards/accuracies", "kl", "true reward of the policy", "loss")
    accuracy, kl, loss = "0.712 (0.650 .. 0.800)", "2.250 (1.500 .. 3.000)", "0.600 (0.500 .. 0.700)"
    assert lines == [
        ["on held-out data", *(f"{name} (95%)" for name in names)],
        ["loss.beta=0.1", accuracy, kl, "6.720 (5.620 .. 7.820)", loss],
        ["loss.beta=1 seed=2", accuracy, kl, "-", loss],
        ["loss.beta=9 (failed)", "-", "-", "-", "-"],
    ]


@pytest.mark.slow
def test_runs_of_other_programs_train_one_after_another(world, capsys):
    sweep("--loss.name", "dpo,ipo", "--run", "runs/mixed", "--max-steps", "1", "--eval-every", "0")
    assert "2 runs: loss.name=dpo; loss.name=ipo" in capsys.readouterr().out
    first = [read_metrics(world / f"runs/mixed/loss.name={name}/metrics.jsonl")[0] for name in ("dpo", "ipo")]
    # Of a policy that is the reference: log 2, and (0 - 1 / (2 * 0.1))^2.
    assert [row["eval_loss"] for row in first] == pytest.approx([np.log(2), 25], rel=1e-5)


def configs_of(argv):
    over, rest = split_values(argv)
    return sweep_configs("dpo.yaml", "dpo.yaml", over, rest)


def test_only_numbers_of_loss_and_optimizer_share_a_program(world):
    argv = ["--loss.beta", "0.1,0.2", "--optim.warmup_steps", "1,2", "--optim.name", "adamw,rmsprop"]
    configs = configs_of([*argv, "--loss.name", "dpo"])
    found = [[c.loss["beta"] for c in group] for group in group_runs(configs)]
    assert found == [[0.1, 0.2]] * 4
    seeds = configs_of(["--seed", "1,2"])
    assert [len(group) for group in group_runs(seeds)] == [1, 1]
    assert configs[0].run == "runs/dpo-sweep/loss.beta=0.1,optim.warmup_steps=1,optim.name=adamw"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss.beta", "0.1"], "several values"),
        (["--loss.beta", "0.1,"], "different values, none of them empty"),
        (["--loss.beta", "0.1,0.1"], "different values, none of them empty"),
        (["--loss.bta", "0.1,0.2"], "did you mean"),
        (["--batch_size", "1,0", "--model.path", "stage.yaml"], "batch_size must be at least 1, got 0"),
        (["--model.tokenizer", "a/b,a_b"], "give the same folder"),
        (
            ["--loss.beta", "0.1,0.2", "--model.config=", "--model.path", "itself.yaml"],
            "itself.yaml: starts from itself",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(world, argv, message):
    (world / "itself.yaml").write_text("model: {path: itself.yaml}")
    (world / "stage.yaml").write_text((world / "dpo.yaml").read_text())
    with pytest.raises(UserError, match=message):
        cli.run_command(["sweep", "dpo.yaml", *argv])
    assert not (world / "runs" / "dpo-sweep" / "loss.beta=0.1").exists()
    assert not (world / "runs" / "stage").exists()
