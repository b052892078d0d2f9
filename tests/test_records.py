"""Records have the shapes and dtypes that their annotations name; records with missing fields are pytrees."""

import copy
import operator
import pickle
import subprocess
import sys
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from beartype.door import is_bearable
from jaxtyping import jaxtyped
from launched import ROOT, own_environment

import dpo_jax
from dpo_jax import losses
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface.folder import read_config
from dpo_jax.models.model import build_model
from dpo_jax.records import FLOAT32_ROUNDING, Batch, Logps, Missing, Tokens, TrainState
from dpo_jax.step import init_state

POLICY = np.array([[-8.0, -12.0], [-11.0, -11.0], [-9.0, -7.0]], np.float32)
REFERENCE = np.array([[-10.0, -12.0], [-10.0, -12.0], [-9.0, -8.0]], np.float32)


def wrong_fields(record):
    """Returns the names of the fields that contradict their annotations.

    An axis letter has one size in a whole record, so fields are checked together, in their order. Missing fields and
    the items of a tuple, of which beartype checks one, are left to the caller.
    """
    hints = typing.get_type_hints(type(record))
    given = {name: value for name, value in record._asdict().items() if not isinstance(value, Missing)}
    with jaxtyped("context"):
        return [name for name, value in given.items() if not is_bearable(value, hints[name])]


def changed(record, changes):
    """Returns a record with functions of some of its fields in their place."""
    return record._replace(**{name: change(getattr(record, name)) for name, change in changes.items()})


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(1, 50, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 8), (ids(2, 12), ids(2, 12))) for _ in range(12))


@pytest.fixture(scope="module")
def model():
    config = read_config(ROOT / "configs/models/synthetic.json")
    return build_model(architecture_of(config | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}))


@pytest.fixture(scope="module")
def batch(table):
    return dpo_jax.collate(table, np.arange(len(table)))[0]


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def logps(model, params, batch):
    return jax.jit(partial(batch_logps, model))(params, one_microbatch(batch))


def one_microbatch(batch):
    return jax.tree.map(lambda x: x[0], batch)


def test_a_packed_batch_is_as_annotated_on_the_host_and_on_devices(batch):
    assert batch.tokens.ndim == 3
    for found in (batch, one_microbatch(batch), jax.device_put(batch)):
        assert wrong_fields(found) == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"tokens": lambda x: x.astype(np.int64)}, ["tokens"]),
        ({"weights": lambda x: x.astype(np.float64)}, ["weights"]),
        ({"segment_ids": lambda x: x > 0}, ["segment_ids"]),
        ({"positions": lambda x: x[..., :-1]}, ["positions"]),  # T
        ({"target": lambda x: x[..., :-1]}, ["target"]),  # S
        ({"slot": lambda x: x[:, :-1]}, ["slot"]),  # R
        ({"branch_ids": lambda x: x[0]}, ["branch_ids"]),  # M in all fields or in none
        ({"preference": lambda x: x[..., :-1]}, ["preference"]),  # G
        ({"scores": lambda x: x[..., :1]}, ["ref_logps"]),  # P, first seen in `scores`
        ({"ref_logps": lambda x: x[..., :1]}, ["ref_logps"]),
    ],
)
def test_a_batch_of_another_dtype_or_axis_is_not(batch, changes, wrong):
    assert wrong_fields(changed(batch, changes)) == wrong


def test_log_probs_of_a_batch_are_as_annotated(logps, batch):
    assert wrong_fields(logps) == []
    rows, most, responses, _ = one_microbatch(batch).ref_logps.shape
    assert logps.policy.shape == (rows * most, responses)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"policy": lambda x: x.astype(jnp.bfloat16)}, ["policy"]),
        ({"present": lambda x: x.astype(np.float32)}, ["present"]),
        ({"reference": lambda x: x[:, :1]}, ["reference"]),  # P
        ({"lengths": lambda x: x[:-1]}, ["lengths"]),  # B
        ({"weights": lambda x: x[:-1]}, ["weights"]),  # B, of an array of one axis
        ({"preference": lambda x: x[:, None]}, ["preference"]),
        ({"running": lambda x: x.astype(np.int32)}, ["running"]),
    ],
)
def test_log_probs_of_another_dtype_or_axis_are_not(logps, changes, wrong):
    assert wrong_fields(changed(logps, changes)) == wrong


def test_log_probs_of_plain_arrays_are_as_annotated():
    lengths = np.array([[4, 5], [3, 3], [2, 0]], np.float32)
    for found in (
        Logps.of(POLICY),
        Logps.of(POLICY, REFERENCE),
        Logps.of(jnp.asarray(POLICY), jnp.asarray(REFERENCE), lengths=jnp.asarray(lengths)),
        Logps.of(POLICY, REFERENCE, **dict.fromkeys(("policy_shared", "reference_shared", "scores"), lengths)),
    ):
        assert wrong_fields(found) == []


def test_log_probs_of_lists_are_as_annotated():
    assert wrong_fields(Logps.of(POLICY.tolist(), REFERENCE.tolist(), lengths=[[4, 5], [3, 3], [2, 1]])) == []


def test_fields_that_are_not_given_have_defaults():
    lp = Logps.of(POLICY, REFERENCE, lengths=np.array([[4, 5], [3, 3], [2, 0]], np.float32))
    np.testing.assert_array_equal(lp.weights, [1, 1, 1])
    np.testing.assert_array_equal(lp.preference, [1, 1, 1])
    np.testing.assert_array_equal(lp.present, [[True, True], [True, True], [True, False]])  # a length of 0 is absent
    np.testing.assert_allclose(lp.rounding, FLOAT32_ROUNDING * np.array([[18, 24], [21, 23], [18, 15]]))
    assert lp.running == 0
    missing = {name for name, value in lp._asdict().items() if isinstance(value, Missing)}
    assert missing == {"policy_shared", "reference_shared", "scores", "confidence"}
    alone = Logps.of(POLICY, weights=np.array([0.5, 1, 2], np.float32))
    assert isinstance(alone.reference, Missing)
    assert isinstance(alone.lengths, Missing)
    assert alone.present.all()
    np.testing.assert_array_equal(alone.weights, [0.5, 1, 2])  # what is given wins
    np.testing.assert_allclose(alone.rounding, FLOAT32_ROUNDING * -POLICY)


def test_tokens_of_a_table_are_as_annotated(table):
    response = typing.get_args(typing.get_type_hints(Tokens)["responses"])[0]
    for tokens in (table[i] for i in range(len(table))):
        assert wrong_fields(tokens) == []
        assert all(isinstance(ids, response) for ids in tokens.responses)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"prompt": lambda x: x.astype(np.int64)}, ["prompt"]),
        ({"prompt": lambda x: x[None]}, ["prompt"]),
        ({"responses": lambda x: (x[0].tolist(),)}, ["responses"]),
        ({"scores": list}, ["scores"]),
    ],
)
def test_tokens_of_another_kind_are_not(table, changes, wrong):
    assert wrong_fields(changed(table[0], changes)) == wrong


def test_a_training_state_is_as_annotated(model, params, batch):
    loss = losses.build([{"name": "dpo"}, {"name": "sft"}])
    tx = optax.sgd(1e-3)
    state = init_state(params, tx, loss)
    filled = dpo_jax.with_reference(model, params, batch, len(batch.tokens))
    after, _ = jax.jit(dpo_jax.make_train_step(model, loss, tx))(state, filled, len(batch.tokens))
    for found in (state, after):
        assert wrong_fields(found) == []
        assert found.running.shape == (2,)
    assert wrong_fields(state._replace(step=state.step[None])) == ["step"]
    assert wrong_fields(state._replace(step=np.int64(0))) == ["step"]
    assert wrong_fields(state._replace(running=state.running[None])) == ["running"]


def test_every_field_of_a_record_that_holds_an_array_is_checked():
    """So that a new field of type Any is noticed; those of `TrainState` hold pytrees."""
    unchecked = {
        kind.__name__: {name for name, hint in typing.get_type_hints(kind).items() if hint is typing.Any}
        for kind in (Tokens, Batch, Logps, TrainState)
    }
    assert {name: fields for name, fields in unchecked.items() if fields} == {
        "TrainState": {"params", "opt_state", "reference"}
    }


def test_missing_fields_pass_through_trees_jit_and_copies():
    lp = Logps.of(POLICY, REFERENCE)
    copies = [
        jax.tree.map(lambda x: x, lp),
        jax.jit(lambda lp: lp)(lp),
        jax.device_put(lp),
        jax.tree.unflatten(*reversed(jax.tree.flatten(lp))),
        copy.deepcopy(lp),
        pickle.loads(pickle.dumps(lp)),
    ]
    for found in copies:
        for name, value in lp._asdict().items():
            assert isinstance(value, Missing) == isinstance(getattr(found, name), Missing)
        assert found.confidence.name == "confidence"
        np.testing.assert_array_equal(found.policy, POLICY)
    assert len(jax.tree.leaves(lp)) == 7  # policy, reference and the five derived fields
    slope = jax.grad(lambda lp: losses.dpo(lp, beta=1.0).sum(), allow_int=True)(lp)
    assert isinstance(slope.lengths, Missing)
    np.testing.assert_allclose(slope.policy[:, 0], [-1 / (1 + np.exp(m)) for m in (2, -2, -1)], rtol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        *(partial(operation, 2.0) for operation in (operator.add, operator.sub, operator.mul, operator.truediv)),
        *(lambda x, f=f: f(x, 2.0) for f in (operator.add, operator.sub, operator.mul, operator.truediv)),
        *(lambda x, f=f: f(x, 2.0) for f in (operator.gt, operator.lt, operator.ge, operator.le)),
        *(lambda x, f=f: f(np.ones(2), x) for f in (operator.add, operator.sub, operator.mul, operator.gt)),
        *(lambda x, f=f: f(jnp.ones(2), x) for f in (operator.add, operator.sub, operator.mul, operator.gt)),
        *(operator.neg, len, float, bool, list, np.asarray, jnp.sum, np.sum, jnp.exp, jax.nn.log_sigmoid),
        *(lambda x: x[:, 0], lambda x: x.shape, lambda x: x.sum(), lambda x: jnp.where(x, 1.0, 0.0)),
    ],
)
def test_using_a_missing_field_names_it(use):
    with pytest.raises(UserError, match=r"^Logps.scores is missing .*; give Logps.of\(..., scores=...\)"):
        use(Logps.of(POLICY).scores)


@pytest.mark.parametrize("use", [lambda x: x == 0, lambda x: x != 0, abs, lambda x: x**2])  # fmt: skip
def test_comparing_a_missing_field_names_it(use):
    with pytest.raises(UserError, match=r"^Logps.scores is missing"):
        use(Logps.of(POLICY).scores)


def test_missing_fields_pass_through_jit_before_any_loss_is_imported():
    code = "import jax; from dpo_jax import Logps; print(jax.jit(lambda lp: lp.policy.sum())(Logps.of([[-1.0, -2.0]])))"
    env = own_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["-3.0"], done.stderr
