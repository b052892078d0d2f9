"""The package from Python: losses and functions, as a stranger would use them."""

import dataclasses
import functools
import json
import logging

import chex
import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from launched import make_world
from transformers import AutoModelForCausalLM

import dpo_jax
from dpo_jax import Logps, UserError, cli, losses
from dpo_jax.records import Missing

POLICY, REFERENCE = [[-8.0, -12.0], [-11.0, -11.0]], [[-10.0, -12.0], [-10.0, -12.0]]


def softplus(x):
    return np.log1p(np.exp(x))


# Level 1: losses on plain arrays.


def test_a_loss_on_plain_lists_is_its_equation():
    value = losses.dpo(Logps.of(POLICY, REFERENCE), beta=0.5)
    np.testing.assert_allclose(value, [softplus(-1.0), softplus(1.0)], rtol=1e-6)


def test_every_loss_takes_a_record_of_the_fields_that_it_reads():
    """Those of lengths, scores and single responses too; under jit and grad."""
    given = {"lengths": [[4, 5], [3, 3]], "scores": [[2.0, 1.0], [3.0, 0.0]]}
    for name, entry in losses.REGISTRY.items():
        pad = [[-9.0]] * 2 if entry.responses == 3 else [[]] * 2
        policy, reference = (np.hstack([x, pad]).astype(np.float32) for x in (POLICY, REFERENCE))
        fields = {k: np.hstack([v, pad]).astype(np.float32) for k, v in given.items()}
        lp = Logps.of(policy, reference, **fields)
        value, grad = jax.jit(jax.value_and_grad(lambda x, f=entry.function, lp=lp: f(lp._replace(policy=x)).sum()))(
            jnp.asarray(policy)
        )
        assert np.isfinite(value), name
        assert np.isfinite(grad).all(), name


def test_a_missing_field_is_named_by_whoever_reads_it():
    lp = Logps.of(POLICY)
    with pytest.raises(UserError, match=r"Logps.reference is missing and this loss reads it; give Logps.of\(..., refe"):
        losses.dpo(lp)
    with pytest.raises(UserError, match=r"Logps.lengths is missing"):
        losses.simpo(lp)
    with pytest.raises(UserError, match=r"Logps.lengths is missing"):
        jax.jit(losses.simpo)(lp)
    with pytest.raises(UserError, match=r"Logps.scores is missing"):
        losses.odpo(Logps.of(POLICY, REFERENCE))
    assert isinstance(jax.tree.map(lambda x: x, lp).lengths, Missing)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Logps.of(POLICY, REFERENCE, length=[1]), r"no field 'length'; did you mean 'lengths'\?"),
        (lambda: Logps.of([-1.0, -2.0]), r"Logps.policy: shape \(2,\); give \[B, P\]"),
        (lambda: Logps.of(POLICY, [[-1.0]]), r"Logps.reference: shape \(1, 1\), expected \(2, 2\)"),
        (lambda: Logps.of(POLICY, weights=[[1.0, 1.0]]), r"Logps.weights: shape \(1, 2\), expected \(2,\)"),
        (lambda: Logps.of(None), r"Logps.policy is None; give the log-probs"),
    ],
)
def test_records_of_the_wrong_shape_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def squared(lp, *, beta: float = 0.1, target: float = 1.0):
    """A loss of one's own."""
    margin = beta * ((lp.policy - lp.reference)[:, 0] - (lp.policy - lp.reference)[:, 1])
    return (margin - target) ** 2


def test_an_own_function_is_an_objective():
    loss = losses.of(squared, beta=0.5, weight=2.0)
    lp = Logps.of(POLICY, REFERENCE, lengths=[[1, 1], [1, 1]])
    np.testing.assert_allclose(loss.values(lp), [0.0, 8.0])
    metrics = loss.metrics(lp)
    np.testing.assert_allclose(metrics["rewards/margins"], [1.0, -1.0])
    assert (loss.responses, loss.uses_reference, loss.carried) == (2, True, 1)
    part = losses.of(functools.partial(squared, beta=0.5), weight=2.0)
    np.testing.assert_array_equal(part.values(lp), loss.values(lp))
    jitted = losses.of(jax.jit(squared), beta=0.5, weight=2.0)
    np.testing.assert_allclose(jitted.values(lp), loss.values(lp), rtol=1e-6)


def test_an_own_function_may_use_all_that_arrays_of_jax_have():
    lp = Logps.of(POLICY, REFERENCE, lengths=[[1, 1], [1, 1]])
    loss = losses.of(lambda lp: lp.policy.at[:, 0].set(0.0).sum(axis=1))
    np.testing.assert_array_equal(jax.jit(loss.values)(lp), np.asarray(POLICY, np.float32)[:, 1])


def test_metrics_of_absent_comparisons_are_nan():
    lp = Logps.of(POLICY, REFERENCE, lengths=[[1, 1], [1, 1]])
    lp = lp._replace(present=np.array([[True, True], [False, False]]), weights=np.array([1.0, 0.0], np.float32))
    found = losses.build(["dpo", "sft"]).metrics(lp)
    for name in ("loss", "loss/dpo", "loss/sft", "rewards/margins"):
        assert np.isnan(found[name]).tolist() == [False, True], name


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (squared, {"bta": 1.0}, r"loss squared: unknown parameter 'bta'"),
        (lambda lp, beta: lp.policy[:, 0], {}, r"define it as <lambda>\(lp, \*, option=default, ...\)"),
        (lambda lp: lp.policy, {}, r"returns float32\[3, 2\] for 3 comparisons; return float32\[B\]"),
        (lambda lp: lp.policy.sum(), {}, r"returns float32\[\] for 3 comparisons"),
        (lambda lp: lp.policy[:, 0] > 0, {}, r"returns bool\[3\] for 3 comparisons"),
        (lambda lp: jnp.argmax(lp.policy, 1), {}, r"returns int32\[3\] for 3 comparisons"),
        (lambda lp: None, {}, r"returns NoneType for 3 comparisons"),
        (lambda lp: lp.policy[:, 0].mean(keepdims=True), {}, r"returns float32\[1\] for 3 comparisons"),
        (lambda lp: lp.policy[:, 0] / lp.policy.std(), {}, r"depends on the others of its batch; set whole_batch=True"),
        ("dpo", {}, r"losses.of: 'dpo' is no function; losses.build takes names"),
        (squared, {"beta": np.float32(-1.0)}, r"beta .*-1.0.* is not a finite number above 0"),
        (squared, {"beta": "0.1"}, r"beta '0.1' is not a finite number above 0"),
        (squared, {"target": None}, r"target None is not a finite number"),
        (squared, {"beta": -1.0}, r"beta -1.0 is not a finite number above 0"),
    ],
)
def test_functions_that_are_no_loss_are_refused(function, options, message):
    with pytest.raises(UserError, match=message):
        losses.of(function, **options)


@pytest.mark.parametrize("field", ["policy", "reference", "lengths", "weights", "preference", "scores", "present"])
def test_a_loss_that_looks_across_comparisons_must_say_so(field):
    def across(lp):
        return lp.policy[:, 0] + jnp.asarray(getattr(lp, field), jnp.float32).mean()

    with pytest.raises(UserError, match=r"depends on the others of its batch; set whole_batch=True"):
        losses.of(across)

    def alone(lp):
        return lp.policy[:, 0] + getattr(lp, field).reshape(len(lp.policy), -1)[:, 0].astype(jnp.float32)

    losses.of(alone)


def test_an_objective_keeps_what_its_function_was_registered_with():
    assert losses.of(losses.aot).whole_batch
    assert losses.of(losses.kto, beta=0.2).unpaired
    assert losses.of(squared, whole_batch=True, scores=True)[6:12] == (True, False, False, False, False, True)
    assert losses.of(losses.dpo, beta=0.3).values(Logps.of(POLICY, REFERENCE, lengths=[[1, 1]] * 2)) == pytest.approx(
        losses.build({"name": "dpo", "beta": 0.3}).values(Logps.of(POLICY, REFERENCE, lengths=[[1, 1]] * 2))
    )


def test_an_objective_is_built_from_a_name_a_term_or_several():
    lp = Logps.of(POLICY, REFERENCE, lengths=[[1, 1], [1, 1]])
    both = losses.build(["dpo", {"name": "ipo", "beta": 0.2}]).values(lp)
    assert both == pytest.approx(losses.dpo(lp) + losses.ipo(lp, beta=0.2))
    assert losses.build("dpo").values(lp) == pytest.approx(losses.dpo(lp))
    for wrong, message in (
        ({"beta": 0.1}, r"loss: \{'beta': 0.1\} has no name; give one"),
        (["dpo", squared], "give a name, or a dict with name and options; losses.of takes a function"),
        (squared, "give a name, a dict with name and options, or a list of them"),
    ):
        with pytest.raises(UserError, match=message):
            losses.build(wrong)


@pytest.mark.parametrize("use", [lambda m: m & True, lambda m: m @ m, lambda m: 1 // m, lambda m: ~m, lambda m: m % 2])
def test_a_missing_field_is_refused_by_every_operator(use):
    with pytest.raises(UserError, match=r"Logps.lengths is missing"):
        use(Logps.of(POLICY).lengths)


def test_registering_a_name_again_replaces_it_with_a_warning():
    def mine(lp, *, beta: float = 0.1):
        return lp.policy[:, 0] * beta

    losses.register(responses=2, uses_reference=False)(mine)
    try:
        with pytest.warns(UserWarning, match="loss 'mine' replaces the one registered before"):
            losses.register()(mine)
        assert losses.REGISTRY["mine"].uses_reference
    finally:
        del losses.REGISTRY["mine"]


# Level 2: functions.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs, a run of a small random model, and a module of own functions."""
    with pytest.MonkeyPatch.context() as patch:
        folder = make_world(tmp_path_factory.mktemp("api"))
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        cli.run_command(["train", "dpo.yaml", "--max-steps", "2", "--run", "runs/start", "--samples.prompts", "0"])
        yield folder


def rows(world, count=None):
    return [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()][:count]


@pytest.mark.slow
def test_twelve_lines_train_with_an_own_loss(world):
    """The example of the README; the step compiles once, and the loss falls."""
    model, params, tokenizer = dpo_jax.load_model("runs/start")
    table = dpo_jax.tokenize(rows(world, 40), tokenizer, max_length=96)
    loss, tx = losses.of(squared, beta=0.5), optax.adamw(1e-3)
    step = jax.jit(chex.assert_max_traces(dpo_jax.make_train_step(model, loss, tx), n=1))
    state, history = dpo_jax.init_state(params, tx, loss), []
    for i in range(6):
        batch, count = dpo_jax.collate(table, np.arange(8 * (i % 4), 8 * (i % 4) + 8))
        batch = dpo_jax.with_reference(model, params, batch, count)
        state, metrics = step(state, batch, count)
        history.append(float(metrics["loss"]))
    lp = dpo_jax.sequence_logps(model, state.params, batch)
    rounding = float(np.spacing(np.float32(np.abs(lp.policy).max())))  # of a log-prob, by two compiled programs
    assert history[0] == pytest.approx(1.0, abs=rounding)  # the policy is its reference, whose margin is 0
    assert history[-1] < 0.8
    expected = loss.metrics(lp)
    found = dpo_jax.make_eval_step(model, loss)(state.params, batch, count)
    there = np.asarray(lp.weights) > 0
    assert there.sum() == 8
    np.testing.assert_allclose(np.ravel(found["loss"])[there], expected["loss"][there], rtol=1e-5)


def test_a_state_of_another_loss_is_an_error_and_not_a_retrace(world):
    model, params, tokenizer = dpo_jax.load_model("runs/start")
    table = dpo_jax.tokenize(rows(world, 8), tokenizer, max_length=96)
    two, tx = losses.build([{"name": "dpo"}, {"name": "sft"}]), optax.sgd(1e-3)
    state = dpo_jax.init_state(params, tx, losses.build({"name": "dpo"}))
    batch, count = dpo_jax.collate(table, range(8))
    with pytest.raises(AssertionError, match=r"expected \(2.*make the state with init_state of this loss"):
        jax.jit(dpo_jax.make_train_step(model, two, tx))(state, batch, count)


def test_sequence_logps_are_the_models_own(world):
    """Against log-softmax of the logits of each prompt and response by itself."""
    model, params, tokenizer = dpo_jax.load_model("runs/start")
    table = dpo_jax.tokenize(rows(world, 3), tokenizer, max_length=96)
    lp = dpo_jax.sequence_logps(model, params, dpo_jax.collate(table, range(3))[0])
    found = np.asarray(lp.policy)[np.asarray(lp.weights) > 0]
    expected = []
    for tokens in (table[i] for i in range(3)):
        for response in tokens.responses:
            ids = np.concatenate([tokens.prompt, response])[None]
            one, zero = np.ones_like(ids), np.zeros_like(ids)
            hidden = model.hidden(params, ids, np.arange(ids.shape[1])[None], one, zero)
            logits = jnp.einsum("rtd,vd->rtv", hidden, model.head(params))
            each = jax.nn.log_softmax(logits)[0, len(tokens.prompt) - 1 : -1]
            expected.append(float(each[np.arange(len(response)), response].sum()))
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(expected), rtol=1e-5)
    ordered = dpo_jax.unpack(lp, table, range(3))
    np.testing.assert_allclose(ordered.policy, np.reshape(expected, (3, 2)), rtol=1e-5)
    weights = dpo_jax.unpack(dpo_jax.collate(table, [2, 0])[0].weights, table, [2, 0])
    np.testing.assert_array_equal(weights, [1.0, 1.0])


def test_tokenize_takes_lists_generators_and_datasets_alike(world, caplog):
    _, _, tokenizer = dpo_jax.load_model("runs/start")
    examples = [*rows(world, 5), {"prompt": "I saw", "chosen": " it", "rejected": " it"}]
    with caplog.at_level(logging.WARNING, logger="dpo_jax"):
        first = dpo_jax.tokenize(examples, tokenizer)
    assert len(first) == 5
    assert "identical" in caplog.text  # what is dropped is a warning
    others = [(r for r in examples), datasets.Dataset.from_list(examples)]
    assert {dpo_jax.tokenize(other, tokenizer).digest for other in others} == {first.digest}
    with pytest.raises(UserError, match=r"data\[1\]"):
        dpo_jax.tokenize([examples[0], {"prompt": "no response"}], tokenizer)
    with pytest.raises(UserError, match=r"data: element 0 is a str; give dicts"):
        dpo_jax.tokenize(["text"], tokenizer)
    with pytest.raises(UserError, match=r"responses: 0 per prompt; give 1 for fine-tuning, 2 for pairs"):
        dpo_jax.tokenize(examples, tokenizer, responses=0)
    with pytest.raises(UserError, match=r"data: no example; give at least one"):
        dpo_jax.tokenize([], tokenizer)
    of_numpy = [example | {"weight": np.float32(0.5), "preference": np.float64(0.9)} for example in examples[:5]]
    table = dpo_jax.tokenize(of_numpy, tokenizer)
    assert table.weights.tolist() == [0.5] * 5
    assert table.preferences.tolist() == pytest.approx([0.9] * 5)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([], "give one or more"), ([5], "index 5 is outside the table of 5"), ([-1, 2], "index -1 is outside the table")],
)
def test_collate_refuses_indices_outside_the_table(world, indices, message):
    _, _, tokenizer = dpo_jax.load_model("runs/start")
    table = dpo_jax.tokenize(rows(world, 5), tokenizer)
    with pytest.raises(UserError, match=message):
        dpo_jax.collate(table, indices)


def test_a_saved_model_is_the_loaded_one_and_generates_alike(world):
    model, params, tokenizer = dpo_jax.load_model("runs/start")
    folder = dpo_jax.save_model(world / "copy", model, params, tokenizer)
    again, same, _ = dpo_jax.load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    prompts = [np.array(tokenizer("I saw")["input_ids"])]
    texts = [
        dpo_jax.generate(m, p, prompts, max_new_tokens=5, temperature=0.0)[0].tolist()
        for m, p in ((model, params), (again, same))
    ]
    assert texts[0] == texts[1]
    assert model.end_ids == (tokenizer.eos_token_id,)
    with pytest.raises(UserError, match=r"the model has no config.json; load it with load_model or init_model"):
        dpo_jax.save_model(world / "other", model._replace(hf_config=None), params)


def test_a_new_model_has_random_weights_of_a_seed_and_can_be_saved(world, tmp_path):
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (model, params), (_, same), (_, other) = (
        dpo_jax.init_model(config), dpo_jax.init_model(tmp_path / "config.json"), dpo_jax.init_model(config, seed=1)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert params["embedding"].shape == (64, 16)
    assert np.std(params["embedding"]) == pytest.approx(0.02, rel=0.1)  # transformers' initializer_range
    assert not np.array_equal(params["embedding"], other["embedding"])
    assert model.end_ids == (3,)
    found = AutoModelForCausalLM.from_pretrained(dpo_jax.save_model(tmp_path / "saved", model, params))
    np.testing.assert_array_equal(found.get_input_embeddings().weight.detach(), params["embedding"])
    with pytest.raises(UserError, match="init_model: model_type is missing; give the family"):
        dpo_jax.init_model({"hidden_size": 16})


def test_functions_name_what_they_were_given_instead(world):
    model, params, _ = dpo_jax.load_model("runs/start")
    reward_model = model._replace(architecture=dataclasses.replace(model.architecture, score=True, tied=True))
    calls = {
        "is no objective; give losses.build": [
            lambda: dpo_jax.init_state(params, optax.sgd(1.0), squared),
            lambda: dpo_jax.make_train_step(model, losses.dpo, optax.sgd(1.0)),
            lambda: dpo_jax.make_eval_step(model, {"name": "dpo"}),
        ],
        "is no optax transformation; give one, as in": [
            lambda: dpo_jax.init_state(params, 1e-3, losses.build("dpo")),
            lambda: dpo_jax.make_train_step(model, losses.build("dpo"), optax.adam),
        ],
        "bradley_terry trains a reward model and all other losses a language model": [
            lambda: dpo_jax.make_train_step(model, losses.build("bradley_terry"), optax.sgd(1.0)),
            lambda: dpo_jax.make_eval_step(reward_model, losses.build("dpo")),
        ],
        r"prompts: texts; give token ids, as in tokenizer\(texts\)": [
            lambda: dpo_jax.generate(model, params, ["I saw"], max_new_tokens=2, eos_id=0),
            lambda: dpo_jax.generate(model, params, "I saw", max_new_tokens=2, eos_id=0),
        ],
        "prompts: give a list of prompts, each a list of token ids": [lambda: dpo_jax.generate(model, params, [1, 2])],
        "eos_id: the model was not loaded from a folder that names it": [
            lambda: dpo_jax.generate(model._replace(end_ids=()), params, [[1]])
        ],
        "a reward model generates no text": [
            lambda: dpo_jax.generate(reward_model, params, [[1]], max_new_tokens=2, eos_id=0)
        ],
    }
    for message, each in calls.items():
        for call in each:
            with pytest.raises(UserError, match=message):
                call()


def test_sequence_logps_have_a_gradient(world):
    """Levels 1 and 2 together: the loss of a batch, differentiated, is the step's gradient."""
    model, params, tokenizer = dpo_jax.load_model("runs/start")
    table = dpo_jax.tokenize(rows(world, 8), tokenizer, max_length=96)
    batch, count = dpo_jax.collate(table, range(8))
    batch, loss = dpo_jax.with_reference(model, params, batch, count), losses.of(squared, beta=0.5)

    def mean(params):
        lp = dpo_jax.sequence_logps(model, params, batch)
        return (lp.weights * loss.values(lp)).sum() / lp.weights.sum()

    norm = optax.tree.norm(jax.grad(mean)(params))
    state = dpo_jax.init_state(params, optax.sgd(1e-3), loss)
    _, metrics = jax.jit(dpo_jax.make_train_step(model, loss, optax.sgd(1e-3)))(state, batch, count)
    np.testing.assert_allclose(norm, metrics["grad_norm"], rtol=1e-4)
