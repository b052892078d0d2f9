"""What the compiled step keeps on a device: narrow gathers, no whole embedding or head, one trajectory all the same."""

import os
import runpy
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilers import by_cuda
from jax.sharding import AxisType, Mesh
from tiny import _ARGUMENTS as ARGUMENTS
from tiny import for_milestones

from dpo_jax import losses, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.logprobs import log_collisions
from dpo_jax.models.attention import capped
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.models.split_head import SplitHead, split_log_collisions, split_token_logps, words_per_block
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.shard import gather_on_use

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "_collectives.py"))
CONFIG, collectives = SCRIPT["CONFIG"], SCRIPT["collectives"]
VOCAB = 160  # no other size of the model
TOP = {"f32[160,32]", "bf16[160,32]"}
# An optimizer whose state is the last gradient.
ZEROS: Any = partial(jax.tree.map, jnp.zeros_like)
LAST: Any = lambda grads, state, params: (ZEROS(grads), grads)  # noqa: E731 - typed, as a function would not be
KEPT = optax.GradientTransformation(ZEROS, LAST)


class Step:
    """The train step of a small model: microbatches of `size` rows, a head in blocks of `block` numbers."""

    def __init__(
        self, sizes, devices, compute="float32", block=700, reduce_dtype="float32", remat="none", size=12, wpo=False,
        kind="llama", nudge=0.0, **config,
    ):  # fmt: skip
        rng = np.random.default_rng(0)
        draw = partial(rng.integers, 1, 128, dtype=np.int32)
        table = Table.of(Tokens(draw(rng.integers(2, 12)), (draw(20), draw(15))) for _ in range(32))
        given = CONFIG if kind == "llama" else {"initializer_range": 0.05, **ARGUMENTS[kind]}
        architecture = family(kind).architecture({**given, "vocab_size": VOCAB, **config})
        model = build_model(architecture, compute=compute, remat=remat)
        loss, tx = losses.build({"name": "dpo", "beta": 0.5, "wpo": wpo}), KEPT
        data, fsdp, tensor, *sequence = sizes
        devices = np.array(devices).reshape(data, fsdp, 1, *(sequence or [1]), tensor)
        mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))

        def nudged(x):
            return x * (1 + nudge * jax.random.rademacher(jax.random.key(1), x.shape, x.dtype)) if nudge else x

        self.start = lambda: init_state(jax.tree.map(nudged, model.init(jax.random.key(0))), tx, loss)
        shapes = jax.eval_shape(self.start)
        params = sharding.param_shardings(mesh, model.axes, shapes.params)
        self.where = sharding.state_shardings_like(mesh, params, shapes)
        rows = sharding.batch_sharding(mesh)
        shape = pack.choose_layout(table, max_length=32, batch_size=32, rows=size, length=128)
        batch = pack.build_batch(table, np.arange(32), shape)[0]
        self.batch, self.count = batch._replace(ref_logps=np.nan_to_num(batch.ref_logps, nan=-60)), shape.microbatches
        shared = sharding.mesh_collectives(mesh, (params, None), reduce_dtype)
        step = make_train_step(gather_on_use(model, shared, params, block), loss, tx, collectives=shared)
        self.step = jax.jit(step, out_shardings=(self.where, sharding.replicated(mesh)))
        like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, self.where)
        self.like = like, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)

    def text(self):
        """The compiled program."""
        return self.step.lower(*self.like, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text() or ""

    def gradient(self):
        """The gradient of the batch, on the host."""
        state = jax.device_put(jax.jit(self.start)(), self.where)
        return jax.device_get(self.step(state, self.batch, np.int32(self.count))[0].opt_state)


@pytest.fixture(scope="module")
def gradient():
    """Options of a step -> its gradient, made once."""
    return cache(lambda sizes, *options: Step(sizes, jax.devices()[: np.prod(sizes)], **dict(options)).gradient())


def relative(ours, theirs):
    """The largest difference of any array, relative to the array's largest value."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


CASES = {
    "fsdp": ((1, 4, 1), ()),
    "data and fsdp": ((2, 2, 1), ()),
    "one embedding and head": ((1, 4, 1), (("tie_word_embeddings", True),)),
    "a last block with padding": ((1, 4, 1), (("vocab_size", 163),)),
    "full remat": ((1, 4, 1), (("remat", "full"),)),
    "pairs weighted by their probability": ((1, 4, 1), (("wpo", True),)),
    "a head in one block": ((1, 4, 1), (("block", 2**20),)),
    "tensor too": ((1, 2, 2), ()),
    "rows split over devices": ((1, 2, 1, 2), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parts_give_the_gradient_of_one_device(gradient, case):
    sizes, options = CASES[case]
    of_model = [option for option in options if option[0] in ("vocab_size", "tie_word_embeddings", "wpo")]
    assert relative(gradient(sizes, *options), gradient((1, 1, 1), *of_model)) < 2e-5


# Larger weights and fewer layers than elsewhere: a norm after a short vector multiplies its rounding.
GEMMA_4 = (("kind", "gemma4_text"), ("vocab_size_per_layer_input", VOCAB), ("initializer_range", 0.2))
GEMMA_4 += (("num_hidden_layers", 4), ("layer_types", ("sliding_attention", "full_attention") * 2))
OTHERS = {
    "heads of two sizes, shared keys": ((1, 2, 2), GEMMA_4),
    "shared keys, rows split over devices": ((1, 2, 1, 2), GEMMA_4),
    "slopes of heads": ((1, 1, 2, 2), (("kind", "bloom"),)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", for_milestones(OTHERS, "shared keys, rows split over devices"))
def test_parts_give_the_gradient_of_one_device_for_other_models(gradient, case):
    """To twice what the last bit of every parameter changes on one device."""
    sizes, options = OTHERS[case]
    exact, nudged = (jax.tree.leaves(gradient((1, 1, 1), *options, ("nudge", size))) for size in (0.0, 2.0**-23))
    found = jax.tree.leaves(gradient(sizes, *options))
    rounding = 1e-6 * max(np.abs(y).max() for y in exact)
    # A bias of keys changes no softmax, and the constant of a layer is not trained.
    (still,) = (i for i, y in enumerate(exact) if np.abs(y).max() < rounding)
    assert np.abs(found[still]).max() < rounding
    exact, nudged, found = (leaves[:still] + leaves[still + 1 :] for leaves in (exact, nudged, found))
    assert relative(nudged, exact) < 5e-5
    assert relative(found, exact) < max(2e-5, 2 * relative(nudged, exact))


@pytest.mark.slow
def test_gradients_in_bfloat16_differ_by_its_rounding_only(gradient):
    """Each of four devices' parts is rounded, and so are their sums: a few times 2 ** -9 of the largest."""
    exact, rounded = gradient((1, 4, 1)), gradient((1, 4, 1), ("reduce_dtype", "bfloat16"))
    assert 1e-4 < relative(rounded, exact) < 4 * 2.0**-8


def test_bfloat16_sums_are_for_fsdp_alone():
    with pytest.raises(UserError, match=r"mesh.reduce_dtype: .* set mesh.tensor to 1"):
        sharding.mesh_collectives(sharding.make_mesh(1, 2, 2), {}, "bfloat16")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.slow
def test_neither_embedding_nor_head_is_ever_whole(compute):
    """Of 160 words a device has whole rows of 20 at a time; in one block the head would be an array of 160 x 32."""
    found = Step((1, 4, 1), jax.devices(), compute, wpo=True).text()
    assert not [name for name in TOP if name in found]
    assert "[20,32]" in found
    whole = Step((1, 4, 1), jax.devices(), compute, block=2**20).text()
    assert [name for name in TOP if name in whole]


@pytest.mark.parametrize(("cap", "bias"), [(None, False), (3.0, True)])
def test_collisions_by_blocks_are_those_of_the_whole_head(cap, bias):
    """Blocks of 21 words, the last one padded; of four chunks of columns one is not computed and stays 0."""
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 12, 8), (163, 8)))
    column = jnp.asarray(rng.standard_normal(163), jnp.float32) if bias else None
    hidden = jnp.concatenate([hidden, jnp.ones((2, 12, 1))], -1) if bias else hidden
    whole = weight if column is None else jnp.concatenate([weight, column[:, None]], axis=1)
    head = SplitHead(weight, column, lambda part: part, 21)
    found = jax.jit(lambda h: split_log_collisions(h, head, jnp.int32(3), 3, cap))(hidden)
    expected = log_collisions(hidden, whole, jnp.int32(3), 3, cap)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    p = jax.nn.softmax(capped(hidden @ whole.T, cap), axis=-1)
    np.testing.assert_allclose(found[:, :9], jnp.log(jnp.square(p).sum(-1))[:, :9], atol=3e-6)
    assert not found[:, 9:].any()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_padded_block_leaves_value_and_gradient_alone(cap):
    """Of 40 words in blocks of 21 the last two are padding, whose logits are masked and no values of `capped`."""
    weight, hidden = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (40, 8)), (1, (2, 12, 8))))
    target = jax.random.randint(jax.random.key(2), (2, 12), 0, 40)

    def split(weight, hidden):
        head = SplitHead(weight, None, lambda part: part, 21)
        return jnp.sin(split_token_logps(hidden, head, target, jnp.int32(4), 3, cap)).sum()

    def whole(weight, hidden):
        logps = jax.nn.log_softmax(capped(hidden @ weight.T, cap), axis=-1)
        return jnp.sin(jnp.take_along_axis(logps, target[..., None], axis=-1)).sum()

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(weight, hidden) for f in (split, whole))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_blocks_are_equal():
    assert words_per_block(160, 32, 700) == 20
    assert words_per_block(163, 32, 700) == 21  # eight, with five words of padding
    assert words_per_block(128, 32) == 128
    assert words_per_block(131, 32) == 131  # one block, whatever its factors


@pytest.mark.parametrize(
    ("vocab", "width", "words"),
    [(32_000, 4096, 2000), (128_256, 2048, 4032), (128_256, 4096, 2048), (151_936, 2048, 3999)],
)
def test_blocks_have_no_large_prime_factor(vocab, width, words):
    """7B and 30B-A3B keep 2^4 x 5^3 and 3 x 31 x 43 words; 24 x 167 of 1B and 4 x 509 of 8B are rounded up."""
    assert words_per_block(vocab, width) == words


@pytest.fixture(scope="module")
def v5e():
    """Eight TPU v5e that are not there, for their compiler."""
    topologies = pytest.importorskip("jax.experimental.topologies")
    if "TPU_LIBRARY_PATH" not in os.environ:
        pytest.importorskip("libtpu")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def narrow_text(devices):
    """Returns the step of two layers that compute in bfloat16, for eight devices along fsdp."""
    return Step((1, 8, 1), devices, "bfloat16", remat="full", size=16, num_hidden_layers=2).text()


def check_dtypes(text, gradient):
    """Matrices go as bfloat16, each layer's once forward and once backward; gradients are summed in float32."""
    assert not [name for name in TOP if name in text]
    sent = {s for c in collectives(text, 8) if c.kind == "all-gather" and c.loops for s in c.shapes}
    assert {dtype for dtype, sizes in sent if len([n for n in sizes if n > 1]) > 1 and dtype != "s32"} == {"bf16"}
    summed = {s for c in collectives(text, 8) if c.kind in ("all-reduce", "reduce-scatter") for s in c.shapes}
    assert ("f32", gradient) in summed
    assert {dtype for dtype, _ in summed} == {"f32"}


@pytest.mark.slow
def test_a_tpu_sends_parameters_in_the_compute_dtype(v5e):
    check_dtypes(narrow_text(v5e), (32, 48))


@pytest.mark.slow
def test_a_gpu_sends_parameters_in_the_compute_dtype():
    """It scatters gradients: an eighth of 32 x 48."""
    code = "import test_memory as t\nfrom dpo_jax.training.targets import parse_target, target_devices\n"
    text = by_cuda(code + "print(t.narrow_text(target_devices(parse_target('gpu:h100:1x8'))))")
    check_dtypes(text, (4, 48))
