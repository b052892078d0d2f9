"""Devices that shard the experts of a mixture: the exchange of tokens, runs on such meshes, and what is refused."""

import json
import re
import runpy
from collections import Counter
from functools import cache
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from test_routing import one_step
from tiny import EOS, folder_of, largest_difference, tokens_of

from dpo_jax import sharding
from dpo_jax.config.schema import Config, MeshConfig, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.models import lora
from dpo_jax.models.experts import mixture_of_experts
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model
from dpo_jax.sampling import generate, placement
from dpo_jax.training.plan import plan_run
from dpo_jax.training.shard import check_experts

ROOT = Path(__file__).parent.parent
compiled_step = runpy.run_path(str(ROOT / "scripts" / "_collectives.py"))["compiled_step"]


def mesh_of(*sizes):
    """Of data, fsdp, tensor, sequence, expert, on the first devices."""
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


# The exchange.

SIZES = {"num_attention_heads": 4, "hidden_size": 16, "vocab_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 12, "num_key_value_heads": 2}
KINDS = {"qwen3_moe": {"num_experts": 8}, "gpt_oss": {"num_local_experts": 8}}


class Branch(nn.Module):
    """The branch of a mixture alone."""

    kind: str
    split: sharding.ExpertSplit | None = None

    @nn.compact
    def __call__(self, x):
        architecture = family(self.kind).architecture(SIZES | KINDS[self.kind])
        return mixture_of_experts(architecture, x, None, self.split)[0]


def value_and_gradients(kind, params, x, parts=1):
    """Returns the branch of x [R, T, D], and gradients of the parameters and of x, by `parts` devices."""
    mesh = mesh_of(1, 1, 1, 1, parts)
    where = jax.tree.map(lambda _: sharding.replicated(mesh), params)
    for name in params:
        if name.startswith("expert_"):
            where[name] = {leaf: NamedSharding(mesh, P("expert")) for leaf in params[name]}
    shared = sharding.mesh_collectives(mesh, (where, None))
    branch = Branch(kind, shared.experts)

    def loss(params, x):
        y = branch.apply({"params": params}, x)
        return jnp.sin(3 * y.astype(jnp.float32)).sum(), y

    def body(parts, batch, count, known):
        (dparams, dx), y = jax.grad(loss, (0, 1), has_aux=True)(parts[0], batch[0])
        return dparams, (y[None], dx[None])

    run = jax.jit(lambda params, x: shared.reduce(body)((params, None), x[None], 1, ()))
    dparams, (y, dx) = run(jax.device_put(params, where), x)
    return y[0], dparams, dx[0]


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("routed", ["as it comes", "all to two experts"])
@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_the_exchange_is_exact(kind, routed, parts):
    """Value and gradients, also where one device has the experts of all tokens: none is dropped."""
    x = jax.random.normal(jax.random.key(0), (4, 9, 16))
    params = nn.meta.unbox(Branch(kind).init(jax.random.key(1), x))["params"]
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    params = jax.tree.map(lambda p, key: jax.random.normal(key, p.shape) / 2, params, keys)
    if routed != "as it comes":
        x = x.at[..., 0].set(9.0)
        params["router"]["weight"] = params["router"]["weight"].at[4:6, 0].add(9.0)
    expected, found = (value_and_gradients(kind, params, x, n) for n in (1, parts))
    for one, other in zip(found, expected, strict=True):
        assert largest_difference(one, other) < 1e-5 * max(float(jnp.abs(g).max()) for g in jax.tree.leaves(other))
    used = jnp.abs(expected[1]["expert_up"]["kernel"]).max((1, 2)) > 0
    assert used.sum() == (2 if routed != "as it comes" else 8)
    assert jnp.abs(expected[1]["router"]["weight"]).max() > 0.01


def test_sums_over_experts_are_rounded_once():
    """1 + 2^-9, which bfloat16 has not, less 1 is 2^-9; slopes of tokens, which are bfloat16, are added wider."""
    mesh = mesh_of(1, 1, 1, 1, 4)
    split = sharding.mesh_collectives(mesh, {"w": sharding.replicated(mesh)}).experts

    def scattered(part):
        return split.scatter(jnp.full((4, 1), part[0]), "bfloat16")

    def gradient(part):
        return jax.vjp(split.gather, jnp.zeros((1, 1), jnp.bfloat16))[1](jnp.full((4, 1), part[0], jnp.bfloat16))[0]

    parts = jnp.array([1 + 2.0**-9, -1.0, 0.0, 0.0])
    for function in (scattered, gradient):
        run = jax.shard_map(function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
        found = run(parts)
        assert found.dtype == jnp.bfloat16
        assert found.ravel().tolist() == [2.0**-9 if function is scattered else 0.0] * 4
        # A CPU adds bfloat16 in float32 too, so the values do not show it.
        assert re.findall(r":(\w+)\[[\d,]*\] = reduce_scatter", str(jax.make_jaxpr(run)(parts))) == ["f32"]


MIXTURE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DENSE = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DENSE |= {"num_hidden_layers": 3, "max_position_embeddings": 256, "intermediate_size": 48}


@pytest.mark.slow
def test_a_layer_sends_tokens_and_no_expert():
    """Tokens are gathered forward, again backward, and their slopes; sums are scattered; experts stay in place."""
    found, params, _ = compiled_step((1, 1, 1, 1, 4), 12, config=DENSE | MIXTURE)
    layer = Counter((c.kind, *c.shapes[0][1]) for c in found if c.loops == 2)
    tokens = {("all-gather", 1536, 32): 3, ("reduce-scatter", 384, 32): 2}
    routes = {("all-gather", 1536, 2): 4, ("reduce-scatter", 384, 2): 1}
    assert layer == tokens | routes
    assert not [c for c in found if c.loops == 1]
    summed = max((c.shapes for c in found if c.kind == "all-reduce"), key=len)
    rest = params | {"layers": {k: v for k, v in params["layers"].items() if not k.startswith("expert_")}}
    assert sorted(shape for _, shape in summed if shape) == sorted(x.shape for x in jax.tree.leaves(rest))


# Steps.


@pytest.mark.slow
def test_a_step_of_unlike_layers_with_a_shared_expert(tmp_path):
    """Metrics, router loss and gradients are those of one device; each device has the whole shared expert."""
    folder = folder_of("qwen3_next", tmp_path / "model")
    (expected, grads, _), (metrics, found, _) = (
        one_step(folder, sizes, rows=4) for sizes in ((1, 1, 1, 1, 1), (1, 2, 1, 1, 2))
    )
    for key in ("loss", "aux_loss", "grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=2e-6)
    assert largest_difference(found, grads) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("compute", "limit"), [("float32", 5e-7), ("bfloat16", 2e-3)])
def test_policy_and_reference_route_alike_at_the_start(tmp_path, compute, limit):
    metrics, _, _ = one_step(folder_of("qwen3_moe", tmp_path / "model"), (1, 1, 1, 1, 4), 0.0, compute=compute, rows=4)
    assert metrics["loss"] == pytest.approx(np.log(2.0), abs=limit)


# Shardings, and what is refused.


def test_experts_and_their_adapters_are_sharded_over_their_axis():
    mesh, architecture = mesh_of(1, 2, 1, 1, 2), family("qwen3_moe").architecture(DENSE | MIXTURE)
    model, kind = build_model(architecture), lora.Lora(2, 2.0, ("experts.down_proj",))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    laid = sharding.param_shardings(mesh, model.axes, shapes)["layers"]
    assert tuple(laid["expert_up"]["kernel"].spec) == (None, "expert", "fsdp", "tensor")
    assert tuple(laid["router"]["weight"].spec) == (None, None, "fsdp")
    adapters = lora.init_adapters(architecture, kind, 0)
    made = sharding.param_shardings(mesh, lora.adapter_axes(architecture, model.axes, kind), adapters)
    assert [x.spec[1] for x in jax.tree.leaves(made)] == ["expert", "expert"]
    assert (sharding.row_devices(mesh), sharding.expert_devices(mesh), sharding.independent_devices(mesh)) == (4, 2, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DENSE | {"model_type": "llama"}, r"mesh.expert: 4, but a llama has no experts; set it to 1"),
        (DENSE | MIXTURE | {"num_experts": 6}, r"mesh.expert: 4 does not divide 6 experts; set a divisor of 6"),
    ],
)
def test_meshes_without_a_meaning_are_refused(config, message):
    architecture = family(config["model_type"]).architecture(config)
    check_experts(architecture, mesh_of(4))
    with pytest.raises(UserError, match=message):
        check_experts(architecture, mesh_of(1, 1, 1, 1, 4))


def test_the_plan_of_a_dense_model_refuses_the_axis(tmp_path):
    (tmp_path / "dense.json").write_text(json.dumps(DENSE | {"model_type": "llama", "max_position_embeddings": 512}))
    config = Config(model=ModelConfig(config=str(tmp_path / "dense.json")), mesh=MeshConfig(expert=4))
    with pytest.raises(UserError, match=r"mesh.expert: 4, but a llama has no experts"):
        plan_run(config)


def test_pmap_has_all_experts():
    with pytest.raises(UserError, match=r"set mesh.fsdp, mesh.tensor, mesh.sequence and mesh.expert to 1"):
        sharding.pmap_collectives(mesh_of(2, 1, 1, 1, 2))


# Sampling.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "share"),
    [("qwen3_moe", (1, 1, 1, 1, 4), 0.25), ("gpt_oss", (1, 2, 1, 1, 2), 0)],
    ids=["gathered once", "each token gathers every layer"],
)
def test_samples_are_those_of_one_device(tmp_path, monkeypatch, kind, sizes, share):
    architecture, _, params = load_folder(folder_of(kind, tmp_path / "model"))
    model, mesh = build_model(architecture), mesh_of(*sizes)
    options = {"max_new_tokens": 12, "eos_id": EOS, "temperature": 1.0, "seed": 3, "copies": 2, "batch_size": 8}
    prompts = [row[:n] for row, n in zip(tokens_of(5, 30), (7, 30, 9, 20, 3), strict=True)]
    alone = generate(model, jax.device_put(params, sharding.replicated(mesh_of(1))), prompts, **options)
    monkeypatch.setattr(placement, "WHOLE_SHARE", share)
    laid = jax.device_put(params, sharding.param_shardings(mesh, model.axes, params))
    assert placement.Placement.of(architecture, "float32", mesh, laid).by_layer == (share == 0)
    assert [x.tolist() for x in generate(model, laid, prompts, **options)] == [x.tolist() for x in alone]


# The command line.

# As trained weights: a routing that rounding does not tip. Plain descent does not turn it into updates of full size.
CALM = {"initializer_range": 0.1}
MODELS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 40},
}
DESCENT = ["--model.router_loss", "0.01", "--optim.name", "sgd", "--optim.learning_rate", "0.15"]
DESCENT += ["--samples.prompts", "0", "--samples.kl_prompts", "0"]
EXPERTS = ["--lora.targets", "all-linear", "experts.gate_up_proj", "experts.down_proj", "--optim.learning_rate", "0.4"]
CLIPPED = 0.2  # the gradients' norms are larger
FOLLOWED = ["--optim.name", "adamw", "--optim.learning_rate", "1e-3", "--optim.max_grad_norm", str(CLIPPED)]
FOLLOWED += ["--reference.mode", "online", "--reference.sync_every", "2"]
OPTIONS = {
    "all": [],
    "lora": ["--lora.rank", "4", *EXPERTS],
    "qlora": ["--lora.rank", "4", "--lora.base", "nf4", *EXPERTS],
}
MESHES = {
    "expert 2": (2, ["--mesh.expert", "2"]),
    "expert 4": (4, ["--mesh.expert", "4", "--model.remat", "dots"]),
    "fsdp 2 x expert 2": (4, ["--mesh.fsdp", "2", "--mesh.expert", "2", "--model.remat", "full"]),
    "tensor 2 x expert 2": (4, ["--mesh.tensor", "2", "--mesh.expert", "2"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Returns `(model, what is trained) -> (folder, options of such a run)`; the run "one ..." on a device is done."""
    folder = launched.make_world(tmp_path_factory.mktemp("experts"))
    tiny = json.loads((folder / "tiny.json").read_text())

    @cache
    def made(model, trained="all"):
        (folder / f"{model}.json").write_text(json.dumps(tiny | CALM | {"model_type": model} | MODELS[model]))
        options = ["--model.config", f"{model}.json", *DESCENT, *OPTIONS[trained]]
        with pytest.MonkeyPatch.context() as patch:
            launched.train_here(patch, folder, f"one {model} {trained}", *options)
        return folder, options

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "trained", "mesh"),
    [
        pytest.param("qwen3_moe", "all", "expert 2", marks=pytest.mark.milestone),
        pytest.param("mixtral", "all", "fsdp 2 x expert 2", marks=pytest.mark.milestone),
        pytest.param("gpt_oss", "all", "tensor 2 x expert 2", marks=pytest.mark.milestone),
        pytest.param("gpt_oss", "lora", "expert 4", marks=pytest.mark.milestone),
        ("qwen3_moe", "qlora", "fsdp 2 x expert 2"),
    ],
)
def test_one_trajectory(world, monkeypatch, model, trained, mesh):
    """Losses, router losses, gradients' norms and the exported model are those of one device."""
    (folder, options), (devices, more) = world(model, trained), MESHES[mesh]
    name, one = f"{model} {trained} {mesh}", f"one {model} {trained}"
    launched.train_here(monkeypatch, folder, name, *options, *more, devices=devices)
    assert_same_run(folder, name, one, left=0.75 if trained == "all" else 0.92)


def assert_same_run(folder, name, one, left=0.75):
    launched.assert_one_trajectory(folder, name, one, left=left)
    assert_same_router_losses(folder, name, one)
    found, expected = (load_file(folder / "runs" / n / "model/model.safetensors") for n in (name, one))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)


def assert_same_router_losses(folder, name, one):
    for a, b in zip(launched.lines(folder, name), launched.lines(folder, one), strict=True):
        assert a.get("aux_loss") == pytest.approx(b.get("aux_loss"), abs=1e-5)


@pytest.mark.slow
def test_adamw_clips_and_a_reference_follows_as_on_one_device(world, monkeypatch):
    """Few steps, as AdamW turns the rounding of a small gradient into an update of full size."""
    folder, options = world("qwen3_moe")
    options = [*options, "--max-steps", "6", *FOLLOWED]
    launched.export_start(monkeypatch, folder, "start", *options)
    launched.train_here(monkeypatch, folder, "one adamw", *options)
    devices, more = MESHES["expert 4"]
    launched.train_here(monkeypatch, folder, "adamw", *options, *more, devices=devices)
    launched.assert_one_trajectory(folder, "adamw", "one adamw", steps=6, left=None)
    assert_same_router_losses(folder, "adamw", "one adamw")
    launched.assert_same_weights(folder, "adamw", "one adamw", "start")
    norms = [row["grad_norm"] for row in launched.lines(folder, "adamw") if "grad_norm" in row]
    assert min(norms) > CLIPPED


@pytest.mark.slow
def test_two_processes_that_shard_the_experts_train_as_one(world):
    """Each reads its own rows and sends their tokens to the process that has the experts; one of them writes."""
    folder, options = world("qwen3_moe")
    options = [*options, "--mesh.expert", "2"]
    out, _ = launched.finish(launched.start(folder, "two", *options, launch=launched.launch_local(2, 1)))
    assert out.count("20 steps of 16 comparisons") == 1
    assert_same_run(folder, "two", "one qwen3_moe all")


@pytest.mark.slow
def test_a_checkpoint_resumes_on_any_other_layout(world, monkeypatch):
    """Ten steps with sharded experts, five with fsdp too, the rest on two devices with all experts."""
    folder, options = world("qwen3_moe")
    for steps, devices, more in (
        (["--max-steps", "10"], *MESHES["expert 4"]),
        (["--max-steps", "15"], *MESHES["fsdp 2 x expert 2"]),
        ([], 2, []),
    ):
        launched.train_here(monkeypatch, folder, "moved", *options, *more, *steps, devices=devices)
    assert_same_run(folder, "moved", "one qwen3_moe all")
