"""Configs: files and command lines are parsed alike, and every mistake is one line."""

import re
from pathlib import Path

import pytest

from dpo_jax.config.commands import EvalConfig, FrontierConfig, PairsConfig, SampleConfig, WinrateConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, SamplesConfig
from dpo_jax.config.yaml import difference, dump
from dpo_jax.errors import UserError
from dpo_jax.training.run_folder import claim_folder

ROOT = Path(__file__).parent.parent


def parse(tmp_path, text="", *argv):
    file = tmp_path / "one.yaml"
    file.write_text(text or "{}")
    return parse_config(Config, str(file), argv, prog="dpo-jax train")


OF_EVERY_TERM = {
    "weight": 1.0, "reference_free": False, "divergence": "reverse_kl", "divergence_alpha": 0.5, "ld_alpha": 1.0,
    "rejected_weight": 1.0, "rejected_mixture": 1.0, "wpo": False,
}  # fmt: skip


def test_defaults_are_the_papers(tmp_path):
    c = parse(tmp_path)
    assert c.loss == {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0} | OF_EVERY_TERM
    assert c.optim == {
        "name": "rmsprop",
        "learning_rate": 1e-6,
        "schedule": "constant",
        "warmup_steps": -1,  # 150, but at most a tenth of the run
        "warmup_ratio": -1.0,
        "min_ratio": 0.1,
        "decay_ratio": 0.1,
        "total_steps": 0,  # of the run
        "max_grad_norm": 10.0,
        "decay": 0.99,
        "eps": 1e-8,
    }
    assert (c.batch_size, c.data.max_length, c.data.max_prompt_length) == (64, 512, None)


def test_the_command_line_wins_over_the_file(tmp_path):
    text = "loss: {name: dpo, beta: 0.5}\ndata: {path: [a, b], eval_examples: null}\nmax_steps: 5\n"
    c = parse(tmp_path, text, "--loss.beta", "0.3", "--data.path", "c", "--max-steps", "7", "--batch_size=8")
    assert (c.loss["beta"], c.data.path, c.max_steps, c.batch_size) == (0.3, ("c",), 7, 8)
    assert c.data.eval_examples is None


def test_numbers_as_yaml_reads_them(tmp_path):
    """5e-7 is a string to YAML; the option's type decides."""
    assert parse(tmp_path, "optim: {learning_rate: 5e-7}").optim["learning_rate"] == 5e-7


def test_another_variant_on_the_command_line_drops_the_files_options_of_the_old_one(tmp_path):
    c = parse(tmp_path, "loss: {name: dpo, beta: 0.5}", "--loss.name", "sft")
    assert c.loss == {"name": "sft", "reduction": "sum"} | OF_EVERY_TERM


LIST = "loss: [{name: dpo, beta: 0.5, weight: 0.8}, {name: sft, reduction: mean}]\nmax_steps: 3\n"


def test_a_list_of_losses(tmp_path):
    c = parse(tmp_path, LIST, "--loss.0.label_smoothing", "0.1", "--loss.1.weight", "2")
    dpo = {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1} | OF_EVERY_TERM | {"weight": 0.8}
    assert c.loss == (dpo, {"name": "sft", "reduction": "mean"} | OF_EVERY_TERM | {"weight": 2.0})
    file = tmp_path / "dumped.yaml"
    file.write_text(dump(c))
    again = parse_config(Config, str(file), [], prog="x")
    assert again == c
    other = parse_config(Config, str(file), ["--loss.1.reduction", "sum"], prog="x")
    assert difference(c, other, []) == ["loss.1.reduction: mean -> sum"]


def test_a_list_on_the_command_line_alone(tmp_path):
    c = parse(tmp_path, "", "--loss.0.name", "dpo", "--loss.1.name", "sft", "--loss.1.reduction", "mean")
    assert [term["name"] for term in c.loss] == ["dpo", "sft"]
    assert c.loss[1]["reduction"] == "mean"


def test_elements_may_be_counted_over_a_file_with_one_loss(tmp_path):
    c = parse(tmp_path, "loss: {name: dpo, beta: 0.2}", "--loss.0.label_smoothing", "0.1", "--loss.1.name", "sft")
    assert [(term["name"], term.get("beta"), term.get("label_smoothing")) for term in c.loss] == [
        ("dpo", 0.2, 0.1),
        ("sft", None, None),
    ]


def test_nested_values_are_a_source_and_overrides(tmp_path):
    source = {"loss": {"name": "dpo", "beta": 0.5}, "data": {"path": ["a", "b"]}}
    c = parse_config(Config, source, {"loss": {"beta": 0.3}, "batch_size": 8, "data": {"eval_examples": None}})
    assert (c.loss["beta"], c.data.path, c.batch_size, c.data.eval_examples) == (0.3, ("a", "b"), 8, None)
    with pytest.raises(UserError, match=r"^unknown key .loss.betta.; did you mean .loss.beta."):
        parse_config(Config, source, {"loss": {"betta": 0.3}})


def test_a_lists_other_elements_keep_their_options_where_one_is_renamed(tmp_path):
    text = "loss: [{name: dpo, beta: 0.2}, {name: sft, reduction: mean}]"
    first, second = parse(tmp_path, text, "--loss.0.name", "simpo").loss
    assert first["name"] == "simpo"
    assert (second["name"], second["reduction"]) == ("sft", "mean")  # by default sum
    with pytest.raises(UserError, match=r"loss\.1\.redction"):  # and a mistake in them is no option of the old loss
        parse(tmp_path, text.replace("reduction", "redction"), "--loss.0.name", "simpo")


def test_a_lists_element_may_be_renamed(tmp_path):
    c = parse(tmp_path, LIST, "--loss.0.name", "sft", "--loss.1.name", "dpo")
    assert [term["name"] for term in c.loss] == ["sft", "dpo"]
    assert "beta" not in c.loss[0]
    assert c.loss[0]["weight"] == 0.8


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        (LIST, ["--loss.beta", "1"], r"unknown key 'loss.beta'; did you mean 'loss.0.beta'"),
        (LIST, ["--loss.2.beta", "1"], r"loss.2: give loss.2.name; elements of a list count from 0"),
        (LIST, ["--loss.3.name", "dpo"], r"loss.3: give loss.2.name; elements of a list count from 0"),
        (LIST.replace("sft", "sftt"), [], r"loss.1.name: unknown loss 'sftt'; did you mean 'sft'"),
        (LIST.replace("beta", "betta"), [], r"one.yaml: unknown key 'loss.0.betta'; did you mean 'loss.0.beta'"),
        (LIST.replace("0.5", "x"), [], r"one.yaml: .*loss.0.beta.*x"),
        ("loss: []", [], r"unknown key 'loss'"),
    ],
)
def test_invalid_lists_are_refused(tmp_path, text, argv, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, text, *argv)


def test_dump_reads_back(tmp_path):
    c = parse(tmp_path, "data: {path: [a b, c]}\nsamples: {top_k: 3}\nrun: runs/x")
    file = tmp_path / "dumped.yaml"
    file.write_text(dump(c))
    assert parse_config(Config, str(file), [], prog="x") == c


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("optim: {lerning_rate: 1}", [], r"one.yaml: unknown key 'optim.lerning_rate'; .* 'optim.learning_rate'"),
        ("", ["--loss.betta", "1"], r"^unknown key 'loss.betta'; did you mean 'loss.beta'"),
        ("", ["--score", "odds"], "^unknown key 'score'; it is an option of the loss axes; set loss.score, and"),
        ("", ["--loss.score", "odds"], r"^invalid choice 'odds' .*'chi_squared'\)\.; did you mean 'log_odds'\?$"),
        ("batch_size: many", [], r"one.yaml: .*batch_size.*'many'"),
        ("", ["--data.truncation", "keep"], r"invalid choice 'keep' .*truncation.*keep_start"),
        ("", ["--max-steps", "1.5"], r"max_steps.*1\.5"),
        ("loss: {name: dpoo}", [], r"loss.name: unknown loss 'dpoo'; did you mean 'dpo'"),
        ("", ["--optim.name", "rms"], r"optim.name: unknown optimizer 'rms'; did you mean 'rmsprop'"),
        ("seed: 1\nseed: 2", [], r"one.yaml:2: key 'seed' is given twice"),
        ("- 1", [], r"one.yaml: not a mapping; write"),
        ("a: [", [], r"one.yaml: not YAML: "),
        ("", ["stray"], r"argument 'stray' belongs to no option"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(tmp_path, text, *argv)
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)"):
        parse_config(Config, "nowhere.yaml", [], prog="x")


def test_difference_names_keys(tmp_path):
    a, b = parse(tmp_path), parse(tmp_path, "", "--loss.beta", "0.2", "--seed", "3", "--max-steps", "9")
    assert difference(a, b, ignore=("max_steps",)) == ["loss.beta: 0.1 -> 0.2", "seed: 0 -> 3"]


RUNS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if not p.stem.startswith("frontier_")]  # of many runs


@pytest.mark.parametrize("file", RUNS, ids=lambda p: p.stem)
def test_every_config_reads(file):
    c = parse_config(Config, str(file), [], prog="x")
    assert bool(c.model.path) != bool(c.model.config)
    assert 0 < c.optim["learning_rate"] < 0.01


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("frontier_*.yaml")), ids=lambda p: p.stem)
def test_every_frontier_reads(file):
    c = parse_config(FrontierConfig, str(file), [], prog="x")
    assert c.model.path.endswith(".yaml")
    assert c.max_steps >= c.eval_every


def test_a_flag_stands_alone_or_takes_true_or_false(tmp_path):
    for argv, on in (([], True), (["false"], False), (["True"], True)):
        assert parse(tmp_path, "", "--data.draw_labels", *argv, "--batch_size", "4").data.draw_labels is on
    assert parse(tmp_path, "data: {draw_labels: true}").data.draw_labels is True
    for argv, said in ((["x"], "'x'"), (["True", "False"], "'True False'"), (["None"], "")):
        with pytest.raises(UserError, match=rf"data\.draw_labels.*{said}"):
            parse(tmp_path, "", "--data.draw_labels", *argv)


def test_options_have_one_name_in_all_commands_that_sample():
    for kind in (SampleConfig, EvalConfig):
        argv = ["--temperature", "0", "--max_new_tokens", "9", "--top-k", "3", "--top_p", "0.5"]
        short = parse_config(kind, None, argv)
        assert short.samples == SamplesConfig(max_new_tokens=9, temperature=0.0, top_k=3, top_p=0.5)
        assert parse_config(kind, {"samples": {"temperature": 0.0}}, {"temperature": 0.5}).samples.temperature == 0.5
    assert parse_config(PairsConfig, None, ["--temperature", "0", "--max_new_tokens", "9"]).max_new_tokens == 9
    assert parse_config(WinrateConfig, None, ["--max_new_tokens", "9"]).samples.max_new_tokens == 9
    for kind, old, new in (
        (WinrateConfig, "temperature", "temperatures"),
        (PairsConfig, "tokenizer", "model.tokenizer"),
        (FrontierConfig, "optimum.samples", "optimum.completions"),
        (PairsConfig, "samples.top_k", "top_k"),
        (PairsConfig, "max_tokens", "max_new_tokens"),
    ):
        with pytest.raises(UserError, match=f"^unknown key '{re.escape(old)}'; did you mean '{re.escape(new)}'"):
            parse_config(kind, None, [f"--{old}", "1"])
    with pytest.raises(UserError, match=r"^unknown key 'max_tokens'; set samples\.max_new_tokens$"):
        parse_config(Config, None, ["--max_tokens", "1"])


def test_a_run_of_bco_goes_on_with_the_mean_that_it_began_with(tmp_path):
    """Over all steps it carries another number, which a checkpoint of the run has not."""

    def bco(*options):
        argv = ["--loss.name", "bco", "--run", str(tmp_path / "run"), *options]
        return parse_config(Config, None, argv, prog="dpo-jax train")

    for _ in ("begun", "resumed"):
        with claim_folder(bco(), {})[1]:
            pass
    message = r"run belongs to another config \(loss.all_steps: False -> True\); set another --run"
    with pytest.raises(UserError, match=message):
        claim_folder(bco("--loss.all_steps", "True"), {})
