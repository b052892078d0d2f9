"""Linear attention, mixtures, sinks: one trajectory on several devices, over a base of 4 bits too, and exact plans."""

import json
import math

import jax
import launched
import pytest
from tiny import _ARGUMENTS, for_milestones

from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.models import lora
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.model import build_model
from dpo_jax.training import lower
from dpo_jax.training.abstract import count_parameters
from dpo_jax.training.plan import plan_run

# A token whose two best experts are nearly alike goes to either by rounding, and then all numbers part. That is rare,
# and rarer in few steps.
STEPS = 4
BRIEF = ["--max_steps", str(STEPS), "--samples.prompts", "0", "--samples.kl_prompts", "0"]
BASES = {"whole": BRIEF, "nf4": [*BRIEF, "--lora.rank", "4", "--lora.base", "nf4"]}
KINDS = ("gpt_oss", "qwen3_next", "glm4_moe", "deepseek_v3")
LAYOUTS = [
    ("whole", ["--mesh.fsdp", "2", "--mesh.tensor", "2"], 4),
    ("nf4", ["--mesh.fsdp", "2"], 2),
]


def write_config(file, kind):
    config = json.loads((launched.ROOT / "configs/models/synthetic.json").read_text())
    few = {"num_hidden_layers": 2, "initializer_range": 0.05, "vocab_size": config["vocab_size"], "model_type": kind}
    if kind == "deepseek_v3":  # 16 numbers of a kernel or more share a scale of nf4
        few |= {"q_lora_rank": 16, "kv_lora_rank": 16}
    if kind == "gemma4_text":
        few |= {"num_hidden_layers": 4, "layer_types": _ARGUMENTS[kind]["layer_types"][:4]}
        few |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": config["vocab_size"]}
    file.write_text(json.dumps(_ARGUMENTS[kind] | few))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "layout", "devices"), for_milestones(LAYOUTS, LAYOUTS[0]), ids=["fsdp 2 x tensor 2", "fsdp 2 nf4"]
)
@pytest.mark.parametrize("kind", for_milestones(KINDS, "deepseek_v3"))
def test_one_trajectory(tmp_path, monkeypatch, kind, base, layout, devices):
    """Losses, gradients' norms and the exported model are those of one device."""
    folder, options = launched.make_world(tmp_path), BASES[base]
    write_config(folder / "tiny.json", kind)
    launched.export_start(monkeypatch, folder, "start", *options)
    launched.train_here(monkeypatch, folder, "one", *options)
    launched.train_here(monkeypatch, folder, "more", *options, *layout, devices=devices)
    launched.assert_one_trajectory(folder, "more", steps=STEPS, left=None)
    launched.assert_same_weights(folder, "more", "one", "start")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "gemma4_text"])
def test_plans_count_what_a_device_holds(kind, tmp_path, monkeypatch):
    """All parameters without a split, about a quarter on 2x2 devices, and half a byte and scales of a 4-bit base."""
    monkeypatch.setattr(lower, "lower_step", lambda planned: planned)
    monkeypatch.setattr(lower, "compile_program", lambda planned: lower.TooLarge(10**9, False))  # has room for all
    write_config(tmp_path / "config.json", kind)
    architecture = architecture_of(json.loads((tmp_path / "config.json").read_text()))
    shapes = jax.eval_shape(build_model(architecture).init, jax.eval_shape(jax.random.key, 0))
    count = count_parameters(shapes)
    parts = {part.path[1] for tensor in lora.projections(architecture).values() for part in tensor.parts}
    kernels = sum(math.prod(shapes["layers"][name]["kernel"].shape) for name in parts - {"shared_weight"})

    def planned(*options):
        fixed = ["--model.config", str(tmp_path / "config.json"), "--data.max_length", "64", "--batch_size", "8"]
        return plan_run(parse_config(Config, None, [*fixed, *options], prog="x"))

    whole, split = planned(), planned("--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert whole.parameters == whole.trained == split.trained == count
    assert whole.memory.trained == whole.memory.gradients == 4 * count
    assert count <= split.memory.trained < 1.3 * count
    few = planned("--lora.rank", "2", "--lora.base", "nf4")
    rest = 4 * (count - kernels)
    assert rest + kernels / 2 < few.memory.frozen < rest + kernels  # 16 numbers or more share a scale of 4 bytes
    assert few.memory.trained < count
