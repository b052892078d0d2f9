"""Mistakes of the first hour: each message names the key to use, and never lists all of them."""

import dataclasses
import re

import pytest

from dpo_jax.config.commands import EvalConfig, FrontierConfig, SampleConfig
from dpo_jax.config.elsewhere import HINTS, MOST, key_hint
from dpo_jax.config.parse import _keys, parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError

# What was typed -> what the message must say.
MISTAKES = {
    "--per_device_train_batch_size 4": "set batch_size: comparisons per step, over all devices",
    "--per-device-train-batch-size 4": "set batch_size: comparisons per step, over all devices",
    "--gradient_accumulation_steps 4": "set batch_size: comparisons per step, over all devices",
    "--num_train_epochs 3": "set epochs",
    "--output_dir out": "set run",
    "--model_name_or_path gpt2": "set model.path",
    "--dataset_name trl-lib/x": "set data.path",
    "--loss_type ipo": "set loss.name",
    "--bf16 true": "set model.compute: bfloat16",
    "--report_to wandb": "set track: tensorboard, wandb, mlflow or trackio",
    "--lr_scheduler_type cosine": "set optim.schedule",
    "--warmup_ratio 0.1": "set optim.warmup_ratio",
    "--use_peft true": "set lora.rank: 16; 0 trains all parameters",
    "--gradient_checkpointing true": "set model.remat: full",
    "--optim.lr 1e-6": "set optim.learning_rate",
    "--learning_rate 1e-6": "set optim.learning_rate",
    "--lora.dropout 0.1": "remove it: there is no dropout",
    "--lora.r 8": "set lora.rank: 16; 0 trains all parameters",
    "--optim adamw": "set optim.name",
    "--loss dpo": "set loss.name",
    "--beta 0.1": "set loss.beta",
    "--loss.betta 0.1": "did you mean 'loss.beta'?",
    "--model gpt2": "it is a section; set model.path or model.config, indented below model: in a YAML",
    "--data x.jsonl": "it is a section; set data.name or data.path, indented below data: in a YAML",
    "--path x.jsonl": "did you mean 'data.path', 'model.path', 'lora.path' or 'reference.path'?",
    "--batch_sizes 8": "did you mean 'batch_size'?",
    "--eval_steps 100": "set eval_every: training comparisons between evaluations",
    "--save_total_limit 2": "set keep",
    "--push_to_hub true": "remove it: dpo-jax export RUN OUT --push owner/name uploads the model",
    "--deepspeed ds.json": "set mesh.data, mesh.fsdp and mesh.tensor",
    "--max_seq_length 1024": "set data.max_length",
    "--data.eval_file e.jsonl": "set data.eval_path",
    "--optim.weight_decay 0.1": "it is an option of optim.name: adamw",
    "--gamma_beta_ratio 0.3": "set loss.name: simpo, and loss.gamma to the ratio times loss.beta",
    "--cpo_alpha 0.5": "set loss.name: cpo, and loss.nll_weight",
    "--use_dora true": "remove it: DoRA is not supported",
    "--enable_jit_checkpoint true": "remove it: SIGTERM always saves a checkpoint before the run ends",
    "--hub_revision dev": "remove it: dpo-jax export RUN OUT --push owner/name uploads to the branch main",
    "--optim_target_modules q": "remove it: it is an option of GaLore and APOLLO, which are not supported",
    "--zzz 1": "dpo-jax COMMAND --help-all lists the keys",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_on_the_command_line_names_the_key_to_use(typed):
    with pytest.raises(UserError) as caught:
        parse_config(Config, None, typed.split(), prog="dpo-jax train")
    key = typed.split()[0].removeprefix("--").replace("-", "_")
    assert str(caught.value) == f"unknown key {key!r}; {MISTAKES[typed]}"


def test_a_section_that_is_not_indented_is_told_where_its_keys_belong(tmp_path):
    file = tmp_path / "c.yaml"
    for text, said in (
        ("loss:\nbeta: 0.5\n", "this section is empty; indent its keys below it"),
        ("beta: 0.5\n", "set loss.beta"),
        ("rank: 4\n", "did you mean 'lora.rank'?"),
        ("data: {path: [x]}\nprompts: 4\n", "did you mean 'samples.prompts'?"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: unknown key '\w+'; {re.escape(said)}$"):
            parse_config(Config, str(file), [], prog="dpo-jax train")


KNOWN = _keys(Config)
OF_A_CHOICE = ("loss.", "optim.")  # whose keys depend on the name


def test_every_hint_names_a_key_that_exists():
    for name, hint in HINTS.items():
        for key in re.findall(r"\b(?:model|data|lora|reference|samples|mesh)\.[\w.]+[a-z]", hint):
            assert key in KNOWN or key.endswith((".jsonl",)), (name, key)
        if hint.startswith("set ") and not hint.startswith(tuple(f"set {part}" for part in OF_A_CHOICE)):
            assert hint.split()[1].rstrip(":,;") in KNOWN, (name, hint)


def test_every_field_of_trls_config_is_a_key_or_has_a_hint():
    from trl import DPOConfig

    fields = [field.name for field in dataclasses.fields(DPOConfig)]
    assert len(fields) > 130
    for name in fields:
        assert name in KNOWN or name in HINTS, name


def test_no_hint_lists_all_keys_and_each_fits_its_command():
    for kind in (Config, EvalConfig, SampleConfig, FrontierConfig):
        known = [*_keys(kind), "loss.name", "optim.name"]
        for key in (*HINTS, "x", "path", "data.pth", "prompts", "mesh", "strength", "seeds"):
            if key in known:
                continue
            hint = key_hint(key, known)
            assert len(re.findall(r"'[\w.]+'", hint)) <= MOST
            if hint.startswith("set ") and not hint.startswith(tuple(f"set {part}" for part in OF_A_CHOICE)):
                assert hint.split()[1].rstrip(":,;") in known, (kind, key, hint)
