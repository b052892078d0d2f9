"""The command line as a user has it: real processes, real files, killed and resumed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from launched import own_environment
from safetensors.numpy import load_file
from test_track import events
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_jax import cli
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.training import checkpoint, interrupts
from dpo_jax.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
TIMES = (
    "examples_per_second",
    "save_seconds",
    "save_stall_seconds",
)  # all that may differ between two runs of the same config


def command(*args, cwd, cache, flags=None, **kwargs):
    env = {**own_environment(), "DPO_JAX_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    env |= {} if flags is None else {"XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_jax", *map(str, args)],
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def finish(process, timeout=500):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture
def run(world, monkeypatch, capsys):
    """Runs a command in this process, where a process of its own is not the point; returns what it says."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("DPO_JAX_CACHE", str(world / "cache"))

    def run(*args):
        cli.run_command([str(arg) for arg in args])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small model, pairs to learn from, and two configs."""
    folder = tmp_path_factory.mktemp("world")
    rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(120), strict=False)]
    with (folder / "pairs.jsonl").open("w") as f:
        for r in rows:
            f.write(json.dumps({"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]}) + "\n")
    config = json.loads((ROOT / "configs/models/synthetic.json").read_text())
    (folder / "tiny.json").write_text(json.dumps(config | {"hidden_size": 32, "intermediate_size": 64}))
    shared = {
        "data": {"path": ["pairs.jsonl"], "max_length": 96, "max_prompt_length": 32, "eval_fraction": 0.2},
        "samples": {"prompts": 1, "max_new_tokens": 8},
        "batch_size": 8,
    }
    start = {"model": {"config": "tiny.json", "tokenizer": "synthetic"}}
    fast = {"learning_rate": 1e-3, "warmup_steps": 2}
    sft = shared | start | {"loss": {"name": "sft"}, "optim": {"name": "adamw", **fast}, "max_steps": 3}
    dpo = shared | {"model": {"path": "sft.yaml"}, "optim": fast, "max_steps": 12, "save_every": 3, "eval_every": 40}
    dpo["track"] = "tensorboard"
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    (folder / "dpo.yaml").write_text(yaml.safe_dump(dpo))
    code, _, err = finish(command("train", "dpo.yaml", cwd=folder, cache=folder / "cache"))
    assert code == 0, err
    return folder


def lines(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run / "metrics.jsonl")]


def assert_same_run(a, b):
    """Bit-identical parameters and the same metrics."""
    ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert lines(a) == lines(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def assert_same_to_rounding(a, b):
    """The same metrics; where margins are 0 but for rounding, at the start, accuracy is a matter of chance."""
    for ours, theirs in zip(lines(a), lines(b), strict=True):
        names = [k for k in ours if ours["step"] > 1 or "accuracies" not in k]
        expected = {k: theirs[k] for k in names}
        assert {k: ours[k] for k in names} == pytest.approx(expected, rel=2e-3, abs=2e-4), b


def test_a_run_folder_holds_what_it_says(world):
    run = world / "runs/dpo"
    rows = lines(run)
    train, evaluated = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["step"] for r in train] == list(range(1, 13))
    assert [r["step"] for r in evaluated] == [0, 5, 10, 12]
    assert train[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert evaluated[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(evaluated[0]["eval_rewards/margins"]) < 1e-5
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    kinds = ("rewards", "logps", "logratios", "lengths")
    pairs = {f"{kind}/{which}" for kind in kinds for which in ("chosen", "rejected")}
    others = {"rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate", "examples_per_second"}
    others |= {"gradient_weight", "length_bias", "logratio", "nll"}
    assert pairs | others <= set(read_metrics(run / "metrics.jsonl")[3])
    files = {"config.yaml", "metrics.jsonl", "samples.jsonl", "data.json", "eval.json", "report.html"}
    files |= {"inputs.json", "tensorboard"}
    assert {p.name for p in run.iterdir()} == files | {"checkpoints", "model", ".lock"}
    assert "<svg" in (run / "report.html").read_text()
    assert json.loads((run / "inputs.json").read_text())["the kind of prompts"] == "texts"
    samples = read_metrics(run / "samples.jsonl")
    assert samples[0]["policy"] == samples[0]["reference"]  # same parameters, same seed
    logged = events(run / "tensorboard")
    assert "| model.path | sft.yaml |" not in logged[0, "config/text_summary"]  # as resolved
    last = [row.strip("| ").split(" | ") for row in logged[12, "evaluation/text_summary"].splitlines()[2:]]
    half = evaluated[-1].pop("eval_kl/half")  # of the interval, which the report draws
    assert {name: float(mean) for name, mean, *_ in last} == {k: v for k, v in evaluated[-1].items() if "eval" in k}
    stored = json.loads((run / "eval.json").read_text())["metrics"]["eval_kl"]
    assert half == pytest.approx((stored["high"] - stored["low"]) / 2)
    assert evaluated[0]["eval_kl"] == 0 < evaluated[-1]["eval_kl"]


def test_transformers_loads_the_export(world):
    """And gives the log-probs that the run reports for its last evaluation."""
    model = AutoModelForCausalLM.from_pretrained(world / "runs/dpo/model")
    tokenizer = AutoTokenizer.from_pretrained(world / "runs/dpo/model")
    text = " What a charming cast!"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_a_run_compiled_as_a_user_has_it_is_the_same(world):
    args = ("train", "dpo.yaml", "--run", "runs/optimized")
    flags = "--xla_force_host_platform_device_count=4"
    code, _, err = finish(command(*args, cwd=world, cache=world / "optimized", flags=flags))
    assert code == 0, err
    assert_same_to_rounding(world / "runs/optimized", world / "runs/dpo")


@pytest.mark.slow
def test_killed_and_run_again_ends_the_same(world):
    """SIGKILL in the middle, twice, and the same command again: bit for bit the run that was never killed."""
    other = world / "runs/killed"
    for wanted in (4, 8):
        process = command("train", "dpo.yaml", "--run", "runs/killed", cwd=world, cache=world / "cache")
        deadline = time.time() + 200
        while time.time() < deadline and process.poll() is None:
            rows = read_metrics(other / "metrics.jsonl") if (other / "metrics.jsonl").exists() else []
            if rows and rows[-1]["step"] >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    code, out, err = finish(command("train", "dpo.yaml", "--run", "runs/killed", cwd=world, cache=world / "cache"))
    assert code == 0, err
    assert "resuming at step" in out
    assert "from the cache" in out
    assert_same_run(world / "runs/dpo", other)


@pytest.mark.slow
def test_sigterm_saves_and_its_exit_code_says_so(world):
    other = world / "runs/ended"
    process = command("train", "dpo.yaml", "--run", "runs/ended", cwd=world, cache=world / "cache")
    while process.poll() is None and not (other / "metrics.jsonl").exists():
        time.sleep(0.02)  # the line at step 0: training has begun
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == interrupts.EXIT_AGAIN, err
    saved = int(re.search(r"saved at step (\d+)", out)[1])
    assert not checkpoint.checkpoint_problem(other / "checkpoints" / str(saved))
    code, out, err = finish(command("train", "dpo.yaml", "--run", "runs/ended", cwd=world, cache=world / "cache"))
    assert code == 0, err
    assert f"resuming at step {saved}" in out
    assert_same_run(world / "runs/dpo", other)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(world):
    """One flipped byte in the newest; an empty folder that looks newer still."""
    other = world / "runs/damaged"
    args = ("train", "dpo.yaml", "--run", "runs/damaged")
    code, _, err = finish(command(*args, "--max-steps", "9", cwd=world, cache=world / "cache"))
    assert code == 0, err
    victim = max((p for p in (other / "checkpoints/9").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (other / "checkpoints/11").mkdir()
    code, out, err = finish(command(*args, cwd=world, cache=world / "cache"))
    assert code == 0, err
    assert "checkpoint 11: incomplete (no manifest); moved to" in out
    assert re.search(r"checkpoint 9: .* is damaged; moved to", out)
    assert "resuming at step 6" in out
    ours, theirs = (load_file(r / "model/model.safetensors") for r in (world / "runs/dpo", other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_online_reference_gives_the_same_run(world):
    """Just in time or from the cache: the same losses to rounding."""
    args = ("train", "dpo.yaml", "--run", "runs/online", "--reference.mode", "online")
    code, _, err = finish(command(*args, cwd=world, cache=world / "cache"))
    assert code == 0, err
    assert_same_to_rounding(world / "runs/dpo", world / "runs/online")


@pytest.mark.slow
def test_what_moves_beside_the_policy_is_resumed(world):
    """A reference that follows the policy and the running statistic of a loss: stopped half way, or not."""
    moving = ("--reference.mode", "online", "--reference.sync_every", "2", "--loss.0.name", "bco")
    args = ("train", "dpo.yaml", *moving, "--loss.1.name", "dpo", "--run")
    for run, steps in (("runs/at_once", 9), ("runs/twice", 4), ("runs/twice", 9)):
        code, out, err = finish(command(*args, run, "--max_steps", steps, cwd=world, cache=world / "cache"))
        assert code == 0, err
    assert "resuming at step 4 of 9" in out
    a, b = (load_file(world / f"runs/{run}/model/model.safetensors") for run in ("at_once", "twice"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    ours, theirs = (lines(world / f"runs/{run}")[-1] for run in ("at_once", "twice"))
    assert ours == theirs
    code, out, err = finish(command("eval", "runs/twice", "--prompts", "0", cwd=world, cache=world / "cache"))
    assert code == 0, err
    found = json.loads((world / "runs/twice/eval.json").read_text())["metrics"]
    for name in ("eval_loss", "eval_loss/bco", "eval_rewards/margins", "eval_length_bias"):
        assert found[name]["mean"] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_other_runs_hit_the_reference_cache(world):
    """Changing beta, learning rate and run folder does; another compute dtype does not."""
    args = ("train", "dpo.yaml", "--max-steps", "1")
    changed = ("--run", "runs/beta", "--loss.beta", "0.5", "--optim.learning_rate", "1e-5")
    code, out, err = finish(command(*args, *changed, cwd=world, cache=world / "cache"))
    assert code == 0, err
    assert out.count("from the cache") == 2
    bf16 = ("--run", "runs/bf16", "--model.compute", "bfloat16")
    code, out, err = finish(command(*args, *bf16, cwd=world, cache=world / "cache"))
    assert code == 0, err
    assert "from the cache" not in out
    assert lines(world / "runs/bf16")[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.slow
def test_eval_sample_export_report(world, run):
    out = run("eval", "runs/dpo", "--reward", "synthetic", "--prompts", "8", "--per_token", "tokens.jsonl")
    assert "│ kl " in out
    assert "true reward of the policy" in out
    rows = [json.loads(line) for line in (world / "tokens.jsonl").read_text().splitlines()]
    chosen = rows[0]["responses"][0]
    assert len(chosen["tokens"]) == len(chosen["policy"]) == len(chosen["reference"]) > 1
    found = json.loads((world / "runs/dpo/eval.json").read_text())["metrics"]
    last = [r for r in lines(world / "runs/dpo") if "eval_loss" in r][-1]
    assert found["eval_loss"]["mean"] == pytest.approx(last["eval_loss"], rel=1e-5)
    out = run("sample", "runs/dpo", "--prompt", "My cousin")
    assert "policy" in out
    assert "reference" in out
    run("export", "runs/dpo", "out")
    ours, theirs = load_file(world / "out/model.safetensors"), load_file(world / "runs/dpo/model/model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    run("export", "runs/dpo", "out9", "--checkpoint", "9")
    assert any((load_file(world / "out9/model.safetensors")[k] != ours[k]).any() for k in ours)
    run("report", "runs/dpo", "runs/sft", "--out", "both.html")
    assert "runs/sft" in (world / "both.html").read_text()


def test_pairs_are_sampled_scored_and_labelled(world, run):
    args = ("pairs", "runs/sft", "own.jsonl", "--reward", "synthetic", "--label", "best_worst")
    out = run(*args, "--data.path", "pairs.jsonl", "--prompts", "20", "--max-new-tokens", "12")
    rows = read_metrics(world / "own.jsonl")
    assert 0 < len(rows) <= 20
    assert f"{len(rows)} pairs from {len(rows)} of 20 prompts" in out
    for row in rows:
        assert synthetic.synthetic_reward(row["prompt"], row["chosen"]) > synthetic.synthetic_reward(
            row["prompt"], row["rejected"]
        )


MISTAKES = [
    (["train"], r"dpo-jax train takes CONFIG.yaml"),
    (["trian", "dpo.yaml"], r"unknown command 'trian'; did you mean 'train'"),
    (["train", "no.yaml"], r"no.yaml: cannot be read"),
    (["train", "dpo.yaml", "--loss.betta", "1"], r"unknown key 'loss.betta'; did you mean 'loss.beta'"),
    (["train", "dpo.yaml", "--data.path", "no.jsonl", "--run", "r1"], r"no.jsonl: no such file"),
    (["train", "dpo.yaml", "--loss.beta", "0.7"], r"runs/dpo belongs to another config \(loss.beta: 0.1 -> 0.7\)"),
    (["train", "dpo.yaml", "--model.path", "nowhere", "--run", "r2"], r"nowhere: no such folder"),
    (["train", "dpo.yaml", "--batch_size", "1000", "--run", "r3"], r"1000"),
    (["train", "dpo.yaml", "--data.max_length", "4096", "--run", "r4"], r"data.max_length: 4096 exceeds the"),
    (["train", "dpo.yaml", "--optim.learning_rate", "nan", "--run", "r5"], r"optim.learning_rate: nan"),
    # Said before the YAML that it starts from is looked at, which may train for hours.
    (
        ["train", "dpo.yaml", "--model.path", "no.yaml", "--loss.name", "robust", "--loss.label_smoothing", "0.7"],
        r"loss robust: label_smoothing 0.7 cannot be used: it must be at least 0 and below 0.5",
    ),
    (
        ["train", "dpo.yaml", "--model.path", "no.yaml", "--reference.sync_every", "2"],
        r"reference.sync_every: a moving reference cannot be cached; set reference.mode: online",
    ),
    (
        ["train", "dpo.yaml", "--model.path", "no.yaml", "--loss.name", "lipo"],
        r"data.responses: set it \(2 or more\) for a ranking loss",
    ),
    (
        ["sweep", "dpo.yaml", "--loss.name", "exo_pair", "--loss.label_smoothing", "0.1,0"],
        r"loss exo_pair: label_smoothing 0.0 cannot be used",
    ),
    (["train", "dpo.yaml", "--mesh.fsdp", "3", "--run", "r6"], r"mesh: .* does not multiply to"),
    (
        ["train", "dpo.yaml", "--keep", "1", "--run", "r7"],
        r"keep must be at least 2 .*, got 1",
    ),
    (["train", "dpo.yaml", "--hang-seconds", "-1", "--run", "r8"], r"hang_seconds must be >= 0 \(0: never\), got -1.0"),
    (
        ["train", "dpo.yaml", "--mesh.mode", "pmap", "--mesh.fsdp", "2", "--run", "r9"],
        r"mesh.mode pmap: parameters are replicated; set mesh.fsdp, mesh",
    ),
    (
        ["train", "dpo.yaml", "--keep-best", "eval_los", "--run", "r10"],
        r"keep_best: no evaluation has 'eval_los'; did you mean 'eval_loss'\?",
    ),
    (["eval", "runs/dpo/model", "--data.path", "pairs.jsonl"], r"set --reference.path"),
    (["export", "runs", "x"], r"runs: not the folder of a run"),
    (["export", "runs/dpo", "x", "--checkpoint", "7"], r"7: not found; name last or one of the steps 9, 12$"),
    (["export", "runs/dpo", "x", "--checkpoint", "best"], r"checkpoint best: keep_best of the run names no metric"),
    (["train", "dpo.yaml", "--distributed", "here"], r"--distributed here: set auto .* or HOST:PORT"),
    (["report", "cache"], r"cache"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_mistakes_are_one_line_and_exit_code_2(world, argv, message, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("DPO_JAX_CACHE", str(world / "cache"))
    monkeypatch.setattr(sys, "argv", ["dpo-jax", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not Path("r1").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_the_batch(run):
    args = ("train", "dpo.yaml", "--run", "runs/nan", "--optim.learning_rate", "1e30", "--optim.warmup_steps", "0")
    why = r"loss or gradient not finite 2 times in a row, updates skipped; the token ids of its comparisons \["
    with pytest.raises(UserError, match=why):
        run(*args, "--max_nonfinite", "2")


def test_full_disk_is_one_line(world, monkeypatch, capsys):
    """The device that is always full stands for the disk."""

    def full(*_):
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(cli, "run_command", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "runs/x/metrics.jsonl: the disk is full; free space" in capsys.readouterr().err
