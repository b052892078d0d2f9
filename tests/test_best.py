"""The best checkpoint: which one each command takes, patience, and model/ with its card."""

import json
import logging
import shutil
from pathlib import Path

import launched
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.numpy import load_file
from test_push import hub  # noqa: F401 (a fixture)

import dpo_jax
from dpo_jax import cli, losses
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.training.checks import evaluated_metrics
from dpo_jax.training.export import save_policy
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.setup import check_config

ROOT = Path(__file__).parent.parent
METRIC = "eval_loss"
GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
LICENSE = "Use it for anything.\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base model that has a card and a license, pairs, and the messages of a run that ends early."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        rows = [r for r, _ in zip(synthetic.read((), "train", 2), range(48), strict=False)]
        pairs = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows]
        Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        config = json.loads((ROOT / "configs/models/synthetic.json").read_text())
        Path("tiny.json").write_text(json.dumps(config | {"hidden_size": 16, "intermediate_size": 16}))
        start = {"model": {"config": "tiny.json", "tokenizer": "synthetic"}, "loss": {"name": "sft"}, "run": "base"}
        data = {"path": ["pairs.jsonl"], "max_length": 96, "eval_fraction": 0.3}
        dpo_jax.train({"data": data, "batch_size": 8, "max_steps": 1, "samples": {"prompts": 0}} | start)
        Path("base/model").rename("named")  # a base with a license of its own, not an export
        Path("named/dpo_jax.json").unlink()
        Path("named/README.md").write_text("---\nlicense: openrail\nbase_model: someone/else\n---\n# Base\n")
        Path("named/LICENSE").write_text(LICENSE)
        (folder / "log").write_text("\n".join(train(folder, "runs/a").messages))
    return folder


class Heard(logging.Handler):
    """Keeps the messages of the package."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def train(folder, run, **keys):
    """Trains until patience is out: a rate at which the loss on held-out pairs soon rises."""
    heard, log = Heard(), logging.getLogger("dpo_jax")
    log.addHandler(heard)
    level, _ = log.level, log.setLevel(logging.INFO)
    config = {"data": {"path": ["pairs.jsonl"], "max_length": 96, "eval_fraction": 0.3}, "model": {"path": "named"}}
    config |= {"batch_size": 8, "epochs": 9, "max_steps": 30, "eval_every": "2 steps", "samples": {"prompts": 0}}
    config |= {"optim": {"name": "adamw", "learning_rate": 0.1, "warmup_steps": 0}}
    config |= {"keep_best": METRIC, "patience": 2, "keep": 2}
    try:
        heard.result = dpo_jax.train(config | keys, run=run)
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
    return heard


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("DPO_JAX_CACHE", str(world / "cache"))
    return world


def evaluations(run):
    """Returns step -> value of the evaluations after the first update."""
    return {r["step"]: r[METRIC] for r in read_metrics(Path(run) / "metrics.jsonl") if METRIC in r and r["step"]}


def best_and_last(run):
    values = evaluations(run)
    return min(values, key=values.get), max(values)


def weights(folder):
    return {name: array.tobytes() for name, array in load_file(Path(folder) / "model.safetensors").items()}


def test_a_run_ends_after_two_evaluations_without_a_better_one(inside):
    values = evaluations("runs/a")
    best, last = best_and_last("runs/a")
    after = [value for step, value in values.items() if step > best]
    assert len(after) == 2
    assert all(value >= values[best] for value in after)
    assert last < 30
    why = "eval_loss was no better in the last 2 evaluations (patience 2)"
    assert f"stopped at step {last} of 30: {why}" in log_lines()
    assert f"model/ is the policy of step {best}, the best by eval_loss" in log_lines()


def log_lines():
    return Path("log").read_text().splitlines()


def test_a_metric_that_no_evaluation_has_is_refused_at_once(inside):
    config = parse_config(Config, None, ["--keep_best", "evalloss", "--data.path", "pairs.jsonl"], prog="dpo-jax train")
    with pytest.raises(UserError, match=r"keep_best: no evaluation has 'evalloss'; did you mean 'eval_loss'\?$"):
        check_config(config)
    known = evaluated_metrics(config, losses.build(config.loss))
    assert set(json.loads(Path("runs/a/eval.json").read_text())["metrics"]) <= known


def test_model_and_evaluation_are_those_of_the_best_step(inside):
    best, last = best_and_last("runs/a")
    assert best != last
    export("runs/a", "out_best", "--checkpoint", str(best))
    export("runs/a", "out_last", "--checkpoint", "last")
    assert weights("runs/a/model") == weights("out_best") != weights("out_last")
    found = json.loads(Path("runs/a/eval.json").read_text())
    assert found["step"] == best
    assert found["metrics"][METRIC]["mean"] == evaluations("runs/a")[best]
    assert found["metrics"][METRIC]["low"] < found["metrics"][METRIC]["high"]


def export(*argv):
    cli.run_command(["export", *map(str, argv)])


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_at_the_same_step_with_the_same_model(inside):
    train(inside, "runs/cut", max_steps=2)
    again = train(inside, "runs/cut")
    _, last = best_and_last("runs/a")
    assert "resuming at step 2 of 30" in again.messages
    assert evaluations("runs/cut") == evaluations("runs/a")
    assert weights("runs/cut/model") == weights("runs/a/model")
    over = train(inside, "runs/cut")  # it has ended
    assert any(line.startswith(f"stopped at step {last} of 30") for line in over.messages)
    assert evaluations("runs/cut") == evaluations("runs/a")
    assert over.result.metrics[METRIC] == min(evaluations("runs/a").values())
    train(inside, "runs/cut", patience=9, max_steps=last + 1)
    assert best_and_last("runs/cut")[1] == last + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [("--mesh.fsdp", "2"), pytest.param(("--mesh.data", "2"), marks=pytest.mark.milestone)]
)
def test_processes_that_share_a_run_agree_on_its_best_step_and_end(tmp_path, mesh):
    folder = launched.make_world(tmp_path)
    options = ["--keep_best", METRIC, "--patience", "2", "--eval_every", "2 steps", "--keep", "2"]
    options += ["--optim.name", "adamw", "--optim.learning_rate", "0.02", "--optim.warmup_steps", "0"]
    launched.finish(launched.start(folder, "one", *options))
    out, _ = launched.finish(launched.start(folder, "two", *options, *mesh, launch=launched.launch_local(2, 1)))
    best, last = best_and_last(folder / "runs/one")
    assert best < last < launched.STEPS
    assert best_and_last(folder / "runs/two") == (best, last)
    assert out.count(f"model/ is the policy of step {best}, the best by {METRIC}") == 1
    ours, theirs = (load_file(folder / f"runs/{name}/model/model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=2e-3)
    assert json.loads((folder / "runs/two/eval.json").read_text())["step"] == best


def test_a_damaged_best_checkpoint_is_replaced_by_the_next_best(inside):
    shutil.copytree("runs/a", "runs/hurt")
    values = evaluations("runs/hurt")
    best, last = best_and_last("runs/hurt")
    next((Path("runs/hurt/checkpoints") / str(best)).rglob("d/*")).write_bytes(b"?")
    with pytest.raises(UserError, match=rf"checkpoint {best} is damaged; name another: --checkpoint last, or a step$"):
        dpo_jax.sample("runs/hurt", ["I saw"], samples=GREEDY)
    second = min((step for step in values if step != best), key=values.get)
    said = train(inside, "runs/hurt").messages
    assert f"model/ is the policy of step {second}, the best by eval_loss" in said
    assert json.loads(Path("runs/hurt/eval.json").read_text())["step"] == second
    assert last in values


@pytest.mark.parametrize("which", ["", "best", "last", "step"])
def test_evaluate_takes_the_checkpoint(inside, which):
    best, last = best_and_last("runs/a")
    middle = next(step for step in evaluations("runs/a") if best < step < last)
    step = {"": best, "best": best, "last": last, "step": middle}[which]
    found = dpo_jax.evaluate("runs/a", prompts=0, checkpoint=middle if which == "step" else which)
    assert found[METRIC]["mean"] == pytest.approx(evaluations("runs/a")[step], rel=1e-5)


def test_eval_writes_the_step_and_whose_data(inside, capsys):
    best, last = best_and_last("runs/a")
    shutil.copytree("runs/a", "runs/seen")
    cli.run_command(["eval", "runs/seen", "--checkpoint", "last", "--prompts", "0"])
    assert f"runs/seen: the checkpoint of step {last}" in capsys.readouterr().out
    found = json.loads(Path("runs/seen/eval.json").read_text())
    assert (found["step"], found.get("data")) == (last, None)
    cli.run_command(["eval", "runs/seen", "--prompts", "0", "--data.eval_path", "pairs.jsonl"])
    found = json.loads(Path("runs/seen/eval.json").read_text())
    assert (found["step"], found.get("data")) == (best, ["pairs.jsonl"])
    export("runs/seen", "out_seen")  # whose card has the run's own evaluation
    card = ModelCard.load("out_seen/README.md")
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}[METRIC] == evaluations("runs/a")[best]


def test_eval_stores_other_data_under_their_name(inside, capsys):
    """The run's own evaluation stays; its report shows how far the policy is from the reference on the other data."""
    shutil.copytree("runs/a", "runs/named")
    own = Path("runs/named/eval.json").read_bytes()
    options = ["--prompts", "3", "--samples.max_new_tokens", "4", "--data.eval_path", "pairs.jsonl", "--name", "other"]
    cli.run_command(["eval", "runs/named", *options])
    assert Path("runs/named/eval.json").read_bytes() == own
    found = json.loads(Path("runs/named/eval_other.json").read_text())
    assert found["data"] == ["pairs.jsonl"]
    shown = Path("runs/named/report.html").read_text()
    value = found["metrics"]["eval_logratios/chosen"]["mean"]
    assert "KL from the reference, other" in shown
    assert "other/eval_logratios/chosen" in shown
    assert f"{value:.4g}" in shown
    refused = {
        ("runs/named", "--name", "../x"): "give letters, digits, _ and -",
        ("runs/named", "--name", "ifeval"): "not the name of a suite",
        ("runs/named", "--name", "x", "--suite", "ifeval"): "name: has no effect with suite; remove it",
        ("runs/named/model", "--name", "x"): "runs/named/model is no run folder, so nothing is stored; remove it",
    }
    for argv, message in refused.items():
        with pytest.raises(UserError, match=message):
            cli.run_command(["eval", *argv])
    with pytest.raises(UserError, match="name='x': this function stores nothing; remove it"):
        dpo_jax.evaluate("runs/named", name="x")


def test_sample_pairs_and_winrate_take_the_checkpoint(inside):
    """They answer as the exported model of that checkpoint does, which differs from the one in model/."""
    for checkpoint in ("best", "last"):
        export("runs/a", f"at_{checkpoint}", "--checkpoint", checkpoint)
    options = ["--data.path", "pairs.jsonl", "--prompts", "3", "--temperature", "0", "--max_new_tokens", "6"]
    judged = ["--judge", "happy", "--temperatures", "0", "--prompts", "3", "--samples.max_new_tokens", "6"]
    judged += ["--data.path", "pairs.jsonl", "--data.eval_path", "pairs.jsonl"]
    answers = {}
    for name, path, choice in (
        ("", "runs/a", []),
        ("last", "runs/a", ["--checkpoint", "last"]),
        ("export", "at_last", []),
        ("export of the best", "at_best", []),
    ):
        given = {"checkpoint": choice[1]} if choice else {}
        sampled = dpo_jax.sample(path, ["I saw the film"], samples=GREEDY, **given)["policy"]
        cli.run_command(["pairs", path, "p.jsonl", "--by", "self", "--completions", "1", *options, *choice])
        rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
        assert [row["provenance"].get("checkpoint") for row in rows] == [given.get("checkpoint")] * 3
        cli.run_command(["winrate", path, "--out", "w", *judged, *choice])
        lines = [json.loads(line) for line in Path("w/judgements.jsonl").read_text().splitlines()]
        answers[name] = sampled, [row["rejected"] for row in rows], [line["response"] for line in lines]
    assert answers["last"] == answers["export"]
    assert answers[""] == answers["export of the best"]
    for ours, theirs in zip(answers["last"], answers[""], strict=True):
        assert ours != theirs


WRONG = {
    "eval": (["eval", "runs/a", "--checkpoint", "5"], r"5: not found; name best, last or one of the steps {}$"),
    "newest": (["sample", "runs/a", "--prompt", "a", "--checkpoint", "newest"], r"newest: not found; name best, last"),
    "sample": (["sample", "named", "--prompt", "a", "--checkpoint", "last"], r"named is a model folder, which has no"),
    "pairs": (["pairs", "named", "p.jsonl", "--by", "self", "--data.path", "pairs.jsonl", "--checkpoint", "best"],
              r"named is a model folder, which has none; remove it, or name a run folder$"),
    "data alone": (["pairs", "p.jsonl", "--by", "others", "--data.path", "pairs.jsonl", "--checkpoint", "best"],
                   r"--checkpoint has no effect with --by others; remove it$"),
    "winrate": (["winrate", "named", "--judge", "happy", "--checkpoint", "best"],
                r"--checkpoint: no run folder is named, and a model folder has no checkpoints; remove it$"),
    "no metric": (["export", "base", "x", "--checkpoint", "best"],
                  r"checkpoint best: keep_best of the run names no metric; name last or one of the steps 1$"),
    "dtype": (["export", "runs/a", "x", "--dtype", "int8"], r"--dtype.*bfloat16"),
    "public": (["export", "runs/a", "x", "--public", "True"], r"--public: has no effect without --push; remove it"),
    "push": (["export", "runs/a", "x", "--push", "name"], r"--push name: no repository of the hub; write owner/name$"),
    "key": (["export", "runs/a", "x", "--checkpiont", "best"], r"unknown key 'checkpiont'; did you mean 'checkpoint'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_choice_is_one_line(inside, case):
    argv, message = WRONG[case]
    steps = ", ".join(map(str, sorted(map(int, (path.name for path in Path("runs/a/checkpoints").iterdir())))))
    with pytest.raises(UserError, match=message.format(steps)):
        cli.run_command(argv)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patience": -1}, r"patience must be at least 0 \(0: never stop early\), got -1"),
        ({"patience": 2}, r"patience: needs the metric of keep_best; set keep_best: eval_loss"),
        ({"patience": 2, "keep_best": METRIC, "eval_every": 0}, r"patience: has no effect without evaluations during"),
    ],
)
def test_patience_needs_a_metric_and_evaluations(keys, message):
    with pytest.raises(UserError, match=message):
        check_config(parse_config(Config, {"model": {"path": "x"}, "data": {"path": ["y"]}} | keys))


def test_the_card_says_what_the_model_is(inside):
    best, _ = best_and_last("runs/a")
    card = ModelCard.load("runs/a/model/README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "openrail"
    assert card.data.base_model is None  # `named` is no export: its base_model is not ours
    assert card.data.tags == ["dpo_jax", "dpo"]
    found = json.loads(Path("runs/a/eval.json").read_text())["metrics"]
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {k: v["mean"] for k, v in found.items()}
    assert Path("runs/a/model/LICENSE").read_text() == LICENSE
    accuracy = found["eval_rewards/accuracies"]
    cells = f"{accuracy['mean']:.4f} | {accuracy['low']:.4f} .. {accuracy['high']:.4f} | {accuracy['n']}"
    for text in (
        "# a\n",
        "| base model | `named` |",
        "| data | `pairs.jsonl` |",
        f"| weights | those of step {best}, the best by `eval_loss`, in float32 |",
        "| `optim.learning_rate` | `0.1` |",
        "z = beta (c - r)\nloss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)",
        "beta 0.1",
        f"| `eval_rewards/accuracies` | {cells} |",
        "eprint = {2305.18290}",
        "`openrail`. See [LICENSE](LICENSE).",
        "`vllm serve",
    ):
        assert text in card.text, text
    settings = parse_config(Config, "runs/a/model/training_config.yaml")
    assert settings == parse_config(Config, "runs/a/config.yaml")


def test_the_card_of_another_step_has_the_evaluation_of_that_step(inside):
    best, last = best_and_last("runs/a")
    export("runs/a", "mine", "--checkpoint", "last")
    card = ModelCard.load("mine/README.md")
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results[METRIC] == evaluations("runs/a")[last] != evaluations("runs/a")[best]
    assert f"| weights | those of step {last}, in float32 |" in card.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_weights_and_of_the_config(inside, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    export("runs/a", "typed", "--dtype", dtype)
    config = json.loads(Path("typed/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
    kind = getattr(torch, dtype)
    exact = safe_open("runs/a/model/model.safetensors", "pt")
    with exact, safe_open("typed/model.safetensors", "pt") as rounded:
        for name in exact.keys():  # noqa: SIM118 (a file, not a dict)
            assert torch.equal(rounded.get_tensor(name), exact.get_tensor(name).to(kind)), name
    model, info = AutoModelForCausalLM.from_pretrained("typed", dtype="auto", output_loading_info=True)
    assert model.dtype == kind
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert f"in {dtype} |" in ModelCard.load("typed/README.md").text


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's use of httpx
def test_export_uploads_what_it_wrote(inside, hub, capsys):  # noqa: F811
    export("runs/a", "pushed", "--push", "me/films", "--public", "True")
    assert hub.files == {"me/films": {f.name: f.read_bytes() for f in Path("pushed").iterdir()}}
    assert hub.visibility == {"me/films": "public"}
    said = capsys.readouterr().out
    assert "uploaded it to http://127.0.0.1" in said
    card = ModelCard.load("pushed/README.md")
    assert card.data.model_name == "films"
    assert 'from_pretrained("me/films")' in card.text
    assert "`vllm serve me/films`" in card.text


def test_a_config_with_a_password_is_not_exported(inside):
    config = parse_config(Config, "runs/a/config.yaml", {"data.path": "https://me:secret@host/x"})
    with pytest.raises(UserError, match=r"data\.path: holds a password or token"):
        save_policy(None, None, "", config, None, Path("x"), 1, run=Path("runs/a"), title="a")
