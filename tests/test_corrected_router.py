"""Dense layers before mixtures whose router has a correction: routes, untrained parameters, files, devices.

Parity with transformers is in test_models.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from known_models import KNOWN
from safetensors.numpy import load_file, save_file
from test_routing import one_step, table_of
from tiny import folders_of, for_milestones, largest_difference, torch_model

from dpo_jax import losses, optim
from dpo_jax.data import pack
from dpo_jax.errors import UserError
from dpo_jax.models import groups, qlora
from dpo_jax.models.architecture import Mixture
from dpo_jax.models.experts import route
from dpo_jax.models.families.registry import architecture_of, family
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.init import map_layers
from dpo_jax.models.model import build_model
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.roofline import matmul_weights
from dpo_jax.training.router import with_router_loss

KINDS = ("glm4_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, made when first asked for; not to be written to."""
    return folders_of({kind: (kind, {}) for kind in KINDS}, tmp_path_factory.mktemp)


PROBS = np.array([[0.9, 0.1, 0.6, 0.5, 0.8, 0.05]], np.float32)  # three groups of two
PLAIN = Mixture(6, 2, False, sigmoid=True, groups=3, chosen_groups=3)


@pytest.mark.parametrize(
    ("change", "correction", "expert", "weight"),
    [
        ({}, [0.0] * 6, [0, 4], [0.9, 0.8]),
        ({"chosen_groups": 1}, [0.0] * 6, [2, 3], [0.6, 0.5]),  # of sums 1, 1.1 and 0.85
        ({"chosen_groups": 1}, [0.0] * 5 + [1.0], [5, 4], [0.05, 0.8]),
        ({"chosen_groups": 2}, [-0.5] + [0.0] * 5, [4, 2], [0.8, 0.6]),
        ({"renormalized": True, "factor": 2.5}, [0.0] * 6, [0, 4], [2.5 * 0.9 / 1.7, 2.5 * 0.8 / 1.7]),
        ({"factor": 2.5}, [0.0, 0.9, 0.0, 0.0, 0.0, 0.0], [1, 0], [0.25, 2.25]),
    ],
)
def test_routes_by_hand(change, correction, expert, weight):
    """A correction decides who is chosen, and is no part of the weights."""
    logits = jnp.log(PROBS) - jnp.log1p(-PROBS)
    found = route(logits, dataclasses.replace(PLAIN, **change), jnp.asarray(correction))
    assert found.expert.tolist() == [expert]
    np.testing.assert_allclose(found.weight, [weight], rtol=1e-5)
    np.testing.assert_allclose(found.probs, PROBS, rtol=1e-5)


def test_dense_layers_and_mixtures_are_a_scan_each():
    dense, full = ("dense",), ("mixture",)
    assert groups.sections(dense * 3 + full * 89) == [(0, 3), (3, 92)]
    assert groups.sections(full * 4) == [(0, 4)]
    assert groups.sections(("delta", "attention") * 3) == [(0, 6)]
    assert groups.sections(("delta",) * 3 + ("attention",)) == [(0, 3), (3, 4)]
    stacks = {"q": np.arange(4), "up": np.arange(1), "expert_up": np.arange(3), "router": np.arange(3)}
    assert groups.layer_of(dense + full * 3, stacks, 0) == {"q": 0, "up": 0}
    assert groups.layer_of(dense + full * 3, stacks, 2) == {"q": 2, "expert_up": 1, "router": 1}


@pytest.mark.slow
def test_the_program_does_not_grow_with_the_layers():
    def length(layers):
        model = build_model(architecture_of({"model_type": "glm4_moe", **SMALL | {"num_hidden_layers": layers}}))
        row = jax.ShapeDtypeStruct((1, 32), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
        lowered = jax.jit(jax.grad(lambda p, *rows: model.hidden(p, *rows).sum())).lower(shapes, *[row] * 4)
        return lowered.as_text().count("\n")

    assert length(24) == length(6)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SMALL |= {"intermediate_size": 24, "num_hidden_layers": 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", for_milestones(["adamw", "muon", "added"], "muon", "added"))
def test_no_optimizer_moves_the_correction(folders, kind, name):
    """Not by weight decay either, nor by an update that does not depend on the gradient."""
    architecture, _, start = load_folder(folders(kind))
    added = optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))
    options = {"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.5}
    tx = added if name == "added" else optim.build(name, **options)
    shape = pack.choose_layout(table_of(), max_length=60, batch_size=8)
    batch, count, _ = pack.build_batch(table_of(), np.arange(8), shape)
    batch = batch._replace(ref_logps=np.zeros_like(batch.ref_logps))
    loss = losses.build("dpo")
    step = jax.jit(make_train_step(build_model(architecture), loss, tx))
    state = init_state(start, tx, loss)
    for _ in range(2):
        state, _ = step(state, batch, np.int32(count))
    before, after = start["layers"]["router"], jax.device_get(state.params["layers"]["router"])
    assert np.array_equal(before["correction"], after["correction"])
    assert np.abs(before["correction"]).min() > 0
    assert not np.array_equal(before["weight"], after["weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_of_a_file_are_read(folders, kind, tmp_path):
    """The first layer has no experts by which to tell them."""
    torch_model(kind).save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    fused, separate = load_folder(tmp_path)[2], load_folder(folders(kind))[2]
    assert jax.tree.all(jax.tree.map(np.array_equal, fused, separate))


@pytest.mark.parametrize("kind", KINDS)
def test_routers_stay_wide_in_a_short_file(folders, kind, tmp_path):
    """As in transformers: a rounded correction would choose other experts."""
    _, config, params = load_folder(folders(kind))
    save_folder(tmp_path, params, config, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    wide = {name for name, x in stored.items() if x.dtype == np.float32}
    leaves = ("weight", "e_score_correction_bias")
    assert wide == {f"model.layers.{i}.mlp.gate.{leaf}" for i in (1, 2) for leaf in leaves}
    assert {x.dtype for name, x in stored.items() if name not in wide} == {np.dtype(ml_dtypes.bfloat16)}
    assert open_folder(tmp_path)[1]["dtype"] == "bfloat16"
    ours, theirs = load_folder(tmp_path)[2]["layers"]["router"], params["layers"]["router"]
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def with_tensors(folder, to, more):
    """Writes a model folder with further tensors."""
    _, config, params = load_folder(folder)
    save_folder(to, params, config)
    tensors = load_file(to / "model.safetensors")
    save_file(tensors | {name: np.zeros(3, np.float32) for name in more}, to / "model.safetensors", {"format": "pt"})
    return to


def test_heads_for_further_tokens_are_counted_and_left(folders, tmp_path, caplog):
    """They are layers after the model's with an `eh_proj`; the exported config has none, any other layer is refused."""
    caplog.set_level("INFO")
    names = [f"model.layers.3.{name}.weight" for name in ("eh_proj", "enorm", "self_attn.q_proj")]
    folder = with_tensors(folders("glm4_moe"), tmp_path / "heads", names)
    _, config, params = load_folder(folder)
    assert "3 tensors of heads for further tokens (layers.3) are neither read nor exported" in caplog.text
    assert jax.tree.all(jax.tree.map(np.array_equal, params, load_folder(folders("glm4_moe"))[2]))
    save_folder(tmp_path / "out", params, config | {"num_nextn_predict_layers": 1})
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0
    other = with_tensors(folders("glm4_moe"), tmp_path / "other", names[1:])
    with pytest.raises(UserError, match=r"layers.3.enorm.weight, .* are not part of a Glm4MoeForCausalLM"):
        open_folder(other)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_8_bits_are_refused(folders, kind, tmp_path):
    _, config, params = load_folder(folders(kind))
    save_folder(tmp_path, params, config)
    written = json.loads((tmp_path / "config.json").read_text())
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(written | {"quantization_config": quantized}))
    with pytest.raises(UserError, match="quantization_config is not supported; use the model before quantization"):
        open_folder(tmp_path)


def test_the_router_loss_is_for_softmaxes():
    model = build_model(family("glm4_moe").architecture(SMALL))
    assert with_router_loss(model, None, {"output_router_logits": True}).router_loss == 0
    why = r"model.router_loss: 0.1, but a glm4_moe balances its experts by the correction of its router"
    with pytest.raises(UserError, match=why):
        with_router_loss(model, 0.1, {})


def test_both_kinds_of_layers_are_quantized(folders):
    pytest.importorskip("qwix")
    architecture, _, params = load_folder(folders("glm4_moe"))
    layers = qlora.quantize_base(params, architecture, "nf4", map_layers)["layers"]
    shapes = {"up": (1, 32, 24), "down": (1, 48, 16), "shared_up": (2, 32, 20), "expert_down": (2, 8, 20, 16)}
    assert {name: layers[name]["quantized"].shape for name in shapes} == shapes
    assert layers["router"].keys() == {"weight", "correction"}


def test_the_work_of_a_step_counts_both_kinds_of_layers():
    """GLM-4.5-Air, with all experts: all parameters but norms, biases, corrections and the embedding."""
    config, count = KNOWN["GLM-4.5-Air"]
    a = architecture_of(config)
    norms = (2 * 46 + 1) * 4096 + 46 * (96 + 2 * 8) * 128 + 45 * 128
    assert matmul_weights(a, a.mixture.experts) + 2 * a.vocab * a.width + norms == count
    assert matmul_weights(a, 128) - matmul_weights(a) == 45 * 120 * 3 * 4096 * 1408


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 4), (1, 2, 2, 1, 1), (1, 1, 1, 2, 2)])
@pytest.mark.parametrize("kind", for_milestones(KINDS, KINDS[0]))
def test_a_step_is_the_same_on_several_devices(folders, kind, sizes):
    metrics, grads, _ = one_step(folders(kind), weight=0.0)
    found, other, _ = one_step(folders(kind), sizes=sizes, rows=4, weight=0.0)
    assert found["loss"] == pytest.approx(metrics["loss"], rel=2e-6)
    assert largest_difference(other, grads) < 1e-5
    assert not np.abs(other["layers"]["router"]["correction"]).any()
