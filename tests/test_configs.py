"""The paper's configs at the paper's size: traced to their first step, with nothing allocated."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import losses, optim, sharding
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data import pack
from dpo_jax.data.chat import render_comparison
from dpo_jax.data.sources.synthetic import synthetic_tokenizer
from dpo_jax.data.template import Template
from dpo_jax.experiments import frontier, setup
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.models.reward_head import as_reward_architecture
from dpo_jax.records import Batch, Chat, Comparison
from dpo_jax.rewards import registry
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.fit import GB, GPU_SHARE, SHARE
from dpo_jax.training.load import compute_dtype, recomputed
from dpo_jax.training.plan import plan_run
from dpo_jax.training.setup import check_config
from dpo_jax.training.tables import template_file_text

ROOT = Path(__file__).parent.parent
PYTHIA_28B = {
    "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rotary_pct": 0.25, "max_position_embeddings": 2048,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "tie_word_embeddings": False,
}  # fmt: skip
GPT2_LARGE = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
GPTJ_6B = {
    "model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048,
    "rotary_dim": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_8B = MISTRAL_7B | {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
del LLAMA3_8B["sliding_window"]
TULU3_8B = LLAMA3_8B | {"vocab_size": 128264}  # with a padding token
OLMO2_7B = LLAMA3_8B | {
    "model_type": "olmo2", "vocab_size": 100352, "intermediate_size": 11008, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip
# As their model cards and files say.
SIZES = {
    "pythia": (PYTHIA_28B, 2_775_208_960),
    "gpt2": (GPT2_LARGE, 774_030_080),
    "gptj": (GPTJ_6B, 6_050_882_784),
    "mistral": (MISTRAL_7B, 7_241_732_096),
    "llama3": (LLAMA3_8B, 8_030_261_248),
    "tulu3": (TULU3_8B, 8_030_326_784),
    "olmo2": (OLMO2_7B, 7_298_617_344),
}
COSINE, LINEAR = ({"schedule": name, "warmup_ratio": 0.1, "max_grad_norm": 1.0} for name in ("cosine", "linear"))
# Of each recipe its model, loss, optimizer, pairs a step and tokens, as its source has them.
RECIPES = {
    "zephyr_dpo": ("mistral", {"name": "dpo", "beta": 0.01}, ("adamw", 5e-7, COSINE), 128, 1024),
    "zephyr_qlora": ("", {"name": "dpo", "beta": 0.01}, ("adamw", 5e-6, COSINE), 32, 1024),
    "simpo_mistral_base": ("mistral", {"name": "simpo", "beta": 2.0, "gamma": 1.6}, ("adamw", 3e-7, COSINE), 128, 1024),
    "simpo_llama3_instruct": (
        "llama3", {"name": "simpo", "beta": 10.0, "gamma": 3.0}, ("adamw", 1e-6, COSINE), 128, 2048,
    ),
    "tulu3_8b_dpo": ("tulu3", {"name": "sigmoid_norm", "beta": 5.0}, ("adamw", 5e-7, LINEAR), 128, 2048),
    "olmo2_7b_dpo": ("olmo2", {"name": "sigmoid_norm", "beta": 5.0}, ("adamw", 5e-7, LINEAR), 128, 2048),
    "llama3_8b_dpo": ("llama3", {"name": "dpo", "beta": 0.1}, ("rmsprop", 5e-7, {"warmup_steps": 150}), 64, 1024),
    "kto_llama3_8b": ("llama3", {"name": "kto", "beta": 0.1}, ("adamw", 5e-6, {"warmup_steps": 150}), 16, 2048),
    "orpo_mistral_7b": (
        "mistral", {"name": "orpo", "beta": 0.1},
        ("adamw", 5e-6, {"schedule": "inverse_sqrt", "warmup_steps": 200}), 32, 2048,
    ),
}  # fmt: skip
# Of each config its model, loss, what makes the loss, and the learning rate: appendix B, C.1 and the original code.
DPO, SFT = {"name": "dpo"}, {"name": "sft"}
CONFIGS = {
    "hh_pythia28_sft": ("pythia", SFT, 5e-7),
    "hh_pythia28_dpo": ("pythia", DPO | {"beta": 0.1}, 5e-7),
    "paper/hh_sft": ("pythia", SFT, 1e-6),
    "paper/hh_dpo": ("pythia", DPO | {"beta": 0.1}, 1e-6),
    "paper/tldr_sft": ("gptj", SFT, 1e-6),
    "paper/tldr_dpo": ("gptj", DPO | {"beta": 0.5}, 1e-6),
    "paper/sentiment_sft": ("gpt2", SFT, 1e-6),
    "paper/sentiment_dpo": ("gpt2", DPO | {"beta": 0.1}, 1e-6),
    "paper/sentiment_preferred_ft": ("gpt2", SFT | {"reduction": "sum"}, 1e-6),
    "paper/sentiment_unlikelihood": ("gpt2", {"name": "unlikelihood", "alpha": 0.5}, 1e-6),
    "paper/sentiment_reward": ("gpt2", {"name": "bradley_terry"}, 1e-6),
}


def abstract_batch(shape, responses):
    lead = (shape.microbatches, shape.rows)
    ints, floats = (partial(jax.ShapeDtypeStruct, dtype=d) for d in (jnp.int32, jnp.float32))
    row, scored, places = (*lead, shape.length), (*lead, shape.scored), (*lead, shape.segments)
    return Batch(
        *(ints(row),) * 4,
        *(ints(scored),) * 3,
        floats(places),
        floats(places),
        *(floats((*places, responses, *two)) for two in ((), (2,))),
    )


def read(name, kind=Config):
    return parse_config(kind, str(ROOT / f"configs/{name}.yaml"), [], prog="x")


def traced(c, name):
    """Traces one step at the size of a model; returns it with its parameters and the state's shardings on a mesh."""
    hf_config, size = SIZES[name]
    loss, tx = losses.build(c.loss), optim.build(**optim.with_total_steps(c.optim, 1000))
    architecture = family(hf_config["model_type"]).architecture(hf_config)
    if loss.rewards:
        architecture, size = as_reward_architecture(architecture), size + architecture.width
    model = build_model(architecture, compute=compute_dtype(c.model), remat=recomputed(c.model))
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    assert sum(x.size for x in jax.tree.leaves(params)) == size
    state = jax.eval_shape(partial(init_state, tx=tx, loss=loss), params)
    shape = pack.Layout(microbatches=16, rows=4, length=2 * c.data.max_length, segments=10, scored=896)
    step = make_train_step(model, loss, tx)
    new, metrics = jax.eval_shape(step, state, abstract_batch(shape, loss.responses), jnp.int32(3))
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(str(a)), new, state)
    assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}
    mesh = sharding.make_mesh(1, 4, 1)
    return sharding.state_shardings_like(mesh, sharding.param_shardings(mesh, model.axes, params), state)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_papers_size_traces_to_the_first_step(name):
    c, (model, loss, rate) = read(name), CONFIGS[name]
    laid = traced(c, model)
    split = [s.spec for s in jax.tree.leaves(laid.opt_state) if any(s.spec)]
    assert len(split) == len([s for s in jax.tree.leaves(laid.params) if any(s.spec)])  # RMSprop keeps one array each
    assert c.loss.items() >= loss.items()
    paper = {"warmup_steps": 150, "max_grad_norm": 10.0, "decay": 0.99, "eps": 1e-8, "schedule": "constant"}
    assert c.optim.items() >= {"name": "rmsprop", "learning_rate": rate, **paper}.items()
    assert c.batch_size == 64
    assert (c.data.max_length, c.data.max_prompt_length) == (512, 256)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_source(name):
    c, (_, loss, (optimizer, rate, rest), pairs, tokens) = read(f"recipes/{name}"), RECIPES[name]
    check_config(c)
    assert c.loss.items() >= loss.items()
    assert c.optim.items() >= {"name": optimizer, "learning_rate": rate, **rest}.items()
    assert (c.batch_size, c.data.max_length) == (pairs, tokens)


def test_the_template_of_a_recipe_is_chatml_and_is_found_from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    tokenizer, (good, bad) = synthetic_tokenizer(), ({"role": "assistant", "content": x} for x in ("good", "bad"))
    chat = Chat(({"role": "system", "content": "be brief"}, {"role": "user", "content": "I saw"}))
    template = Template(template_file_text(read("recipes/orpo_mistral_7b").data))
    found = render_comparison(Comparison(chat, (good, bad)), tokenizer, template)
    turns = "<bos><|im_start|>system\nbe brief<eos>\n<|im_start|>user\nI saw<eos>\n<|im_start|>assistant\n"
    assert (found.prompt, found.responses, found.ends) == (turns, ("good", "bad"), True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (model, *_) in RECIPES.items() if model])
def test_a_recipe_traces_to_the_first_step_at_its_size(name):
    laid = traced(read(f"recipes/{name}"), RECIPES[name][0])
    assert any(any(s.spec) for s in jax.tree.leaves(laid.params))
    assert any(any(s.spec) for s in jax.tree.leaves(laid.opt_state))


def qlora_recipe(tmp_path):
    """Returns the recipe over a Mistral 7B in bfloat16, of which there is the config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B | {"dtype": "bfloat16"}))
    c = read("recipes/zephyr_qlora")
    return dataclasses.replace(c, model=dataclasses.replace(c.model, path=str(tmp_path)))


# Of Mistral 7B: projections of a layer, and the inputs and outputs of each of them.
PROJECTED = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
ENDS = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
# 4 bits each, a float32 scale for every 64; embedding, head and 65 norms in bfloat16.
FROZEN = 32 * PROJECTED * (1 / 2 + 4 / 64) + 2 * (2 * 32000 * 4096 + 65 * 4096)
ADAPTERS = 32 * 16 * ENDS


@pytest.mark.slow
def test_the_recipe_for_one_gpu_fits_in_24_gb(tmp_path):
    """The claim in its head is an upper bound, and leaves a tenth of what JAX takes of the GPU free."""
    claimed = re.search(r"Planned memory: ([\d.]+) GB of 24 ", (ROOT / "configs/recipes/zephyr_qlora.yaml").read_text())
    found = plan_run(qlora_recipe(tmp_path))
    memory = found.memory
    assert (found.parameters, found.trained) == (SIZES["mistral"][1], ADAPTERS)
    assert (memory.frozen, memory.trained, memory.gradients) == (FROZEN, 4 * ADAPTERS, 4 * ADAPTERS)
    assert memory.optimizer == 8 * ADAPTERS + 8  # two numbers of Adam each, and its count and that of the schedule
    kept = 2 * found.shape.length * (found.shape.rows // len(jax.devices())) * 32 * 4096  # inputs of layers, bfloat16
    assert kept < memory.activations
    assert memory.total <= float(claimed[1]) * GB < SHARE * GPU_SHARE * 24 * GB


def test_every_recipe_is_traced_and_names_its_source():
    files = sorted((ROOT / "configs/recipes").glob("*.yaml"))
    assert [f.stem for f in files] == sorted(RECIPES)
    for file in files:
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        text = "\n".join(head)
        assert f"dpo-jax train configs/recipes/{file.name}" in text
        assert "\n# Source: " in text
        assert "\n# Result and hours: not run here" in text
        assert max(map(len, head)) <= 120


def test_every_config_of_the_paper_is_traced_and_has_a_complete_header():
    files = sorted((ROOT / "configs/paper").glob("*.yaml"))
    assert [f"paper/{f.stem}" for f in files] == sorted({n for n in CONFIGS if "/" in n} | {"paper/frontier"})
    for file in files:
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        text = "\n".join(head)
        assert f"configs/paper/{file.name}" in text
        assert "\n# Expected" in text
        assert "# Hardware and hours:" in text
        assert "not measured" in text
        assert max(map(len, head)) <= 120


@pytest.mark.slow
def test_the_papers_frontier_is_22_runs_each_of_which_traces(monkeypatch):
    asked = []  # in the place of a model of the hub
    monkeypatch.setattr(registry, "classifier", asked.append)
    settings = read("paper/frontier", FrontierConfig)
    setup.check_frontier(settings)
    assert asked == ["siebert/sentiment-roberta-large-english#POSITIVE"]
    jobs = frontier.frontier_jobs(settings)
    assert len(jobs) == 22
    assert {j.method for j in jobs} == {"dpo", "ppo", "ppo_gt", "unlikelihood", "preferred_ft"}
    assert {j.strength for j in jobs if j.method == "ppo"} == {3, 6, 9, 12}
    assert jobs[0].steps[:2] == (100, 200)
    for method in ("dpo", "unlikelihood", "preferred_ft"):
        c = frontier.job_config(settings, method, 0.5)
        assert c.optim["learning_rate"] == 1e-6
        traced(c, "gpt2")


def test_frontiers_are_read():
    for file in (ROOT / "configs").glob("frontier*.yaml"):
        settings = read(file.stem, FrontierConfig)
        assert len(frontier.frontier_jobs(settings)) == 22
        assert settings.data.max_prompt_length + settings.max_new_tokens < settings.data.max_length
