"""Every loss function by values and gradients worked by hand, at extremes, and by what must not change it."""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_table import ROWS as FIRST
from loss_table import batch_of
from loss_table_more import MORE

from dpo_jax import losses
from dpo_jax.errors import UserError
from dpo_jax.losses import REGISTRY

ROWS = [*FIRST, *MORE]
NAMES = sorted(REGISTRY)
SMOOTHED = sorted(
    {n for n, e in REGISTRY.items() if "label_smoothing" in inspect.signature(e.function).parameters}
    - {"robust", "exo_pair"}  # which have a smoothing of their own
)
every_loss = pytest.mark.parametrize("name", NAMES)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def example(name, n=6, seed=0, **fields):
    """Random log-probs of n comparisons with as many responses as a loss needs, the best rated highest.

    Where a response may be absent, the first comparison lacks its second, and the last its first.
    """
    p, draw = REGISTRY[name].responses or 4, np.random.default_rng(seed)
    reference = draw.normal(-20, 4, (n, p))
    given = {
        "policy": reference + draw.normal(0, 1, (n, p)),
        "reference": reference,
        "lengths": draw.integers(1, 9, (n, p)),
        "scores": -np.sort(-draw.normal(0, 2, (n, p))),
        "present": np.ones((n, p), bool),
    }
    if REGISTRY[name].unpaired:
        given["present"][[0, -1], [1, 0]] = False
        given |= {k: given[k] * given["present"] for k in ("policy", "reference", "lengths")}
    return batch_of(**given | {"running": 0.3} | fields)


def pulled(name, lp, hyper=None):
    """Values of a loss and the gradient of their sum by the policy's log-probs."""
    return compiled(name, tuple((hyper or {}).items()))(lp)


@functools.cache
def compiled(name, hyper):
    def values(policy, lp):
        value = REGISTRY[name].function(lp._replace(policy=policy), **dict(hyper))
        return value.sum(), value

    def both(lp):
        gradient, value = jax.grad(values, has_aux=True)(lp.policy, lp)
        return value, gradient

    return jax.jit(both)


@every_row
def test_value(row):
    np.testing.assert_allclose(pulled(row.name, row.lp, row.hyper)[0], row.value, rtol=2e-6, atol=1e-6)


@every_row
def test_gradient(row):
    np.testing.assert_allclose(pulled(row.name, row.lp, row.hyper)[1], row.gradient, rtol=2e-6, atol=1e-6)


def test_every_loss_has_a_row():
    assert {row.name for row in ROWS} == set(REGISTRY)


def test_every_hyper_parameter_is_in_a_row():
    for name in NAMES:
        given = set().union(*(row.hyper for row in ROWS if row.name == name))
        assert given == set(inspect.signature(REGISTRY[name].function).parameters) - {"lp"}, name


@every_loss
def test_extremes_are_finite(name):
    """At margins of +-1e4, where either response moved, with and without tokens, and the responses changing places."""
    p = REGISTRY[name].responses or 4
    policy = (
        -1e4 * np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]])[:, :p]
    )
    scores = np.tile(np.arange(p, 0.0, -1), (6, 1))
    for length in (5.0, 1.0, 0.0):
        lp = batch_of(policy, lengths=np.full_like(policy, length), scores=scores)
        for x in (lp, lp._replace(policy=policy[:, ::-1]), lp._replace(reference=policy, policy=0 * policy)):
            value, gradient = pulled(name, x)
            assert np.isfinite(value).all()
            assert np.isfinite(gradient).all()


@every_loss
def test_values_are_float32_of_float32_differences(name):
    """bfloat16 log-probs are taken as they are, and nothing is rounded to bfloat16 after that."""
    lp = example(name)
    lp = lp._replace(reference=lp.reference / 37)  # so that differences have more digits than bfloat16
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 and x.ndim == 2 else x, lp)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, halves)
    value, gradient = pulled(name, halves)
    assert value.dtype == jnp.float32
    assert value.shape == (6,)
    np.testing.assert_allclose(value, pulled(name, exact)[0], rtol=1e-6, atol=1e-6)
    plain = REGISTRY[name].function(halves)  # what is compiled may skip a rounding that is asked for
    np.testing.assert_allclose(plain, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), pulled(name, exact)[1], rtol=0.02, atol=1e-3)


@every_loss
def test_a_permutation_of_the_batch_permutes_values_and_gradients(name):
    lp, order = example(name), np.array([2, 0, 5, 1, 4, 3])
    shuffled = jax.tree.map(lambda x: x[order] if x.ndim else x, lp)
    for found, whole in zip(pulled(name, shuffled), pulled(name, lp), strict=True):
        np.testing.assert_allclose(found, whole[order], rtol=1e-5, atol=1e-6)


@every_loss
def test_a_value_depends_on_the_others_of_its_step_only_where_it_says_so(name):
    lp = example(name)
    others = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]) if a.ndim else a, lp, example(name, seed=1))
    found, expected = pulled(name, others)[0][0], pulled(name, lp)[0][0]
    assert bool(np.allclose(found, expected, rtol=1e-5)) != REGISTRY[name].whole_batch


@every_loss
def test_absent_comparisons_change_nothing(name):
    """Whatever stands in their place: padding holds zeros, or NaN where a reference was never filled in."""
    lp, entry = example(name), REGISTRY[name]
    garbage = example(name, n=9, seed=1, weights=np.zeros(9))
    garbage.policy[0] = 0.0
    nothing = {k: 0 * getattr(garbage, k) for k in ("lengths", "scores", "present")}
    garbage = garbage._replace(**nothing | {"present": nothing["present"].astype(bool)})
    padded = jax.tree.map(lambda a, b: np.concatenate([a[:2], b, a[2:]]) if a.ndim else a, lp, garbage)
    kept = np.r_[0:2, 11:15]
    for found, expected in zip(pulled(name, padded), pulled(name, lp), strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[kept], expected, rtol=1e-5, atol=1e-6)
    if entry.statistic:
        np.testing.assert_allclose(entry.statistic(padded), entry.statistic(lp), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sft", "simper"}))
def test_numbers_may_be_traced(name):
    """A sweep maps over hyper-parameters: every one that is a number may be an array's element."""
    lp, f = example(name), REGISTRY[name].function
    numbers = {k: p.default for k, p in inspect.signature(f).parameters.items() if p.annotation is float}
    swept = {k: jnp.array([v, 0.9 * v + 0.01]) for k, v in numbers.items()}
    values = jax.jit(jax.vmap(lambda hyper: f(lp, **hyper)))(swept)
    for i in range(2):
        np.testing.assert_allclose(values[i], f(lp, **{k: float(v[i]) for k, v in swept.items()}), rtol=2e-5, atol=1e-6)


def test_who_may_be_combined_with_what():
    """TRL 1.16 allows other divergences in seven of the losses here; nothing that sees a batch takes soft labels."""
    scored = {"odpo", "rpo_sq", "rpo_bwd", "rpo_fwd"}
    trl = {"dpo", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
    ours = {"ipo_sum", "dpop", "r_dpo", "plackett_luce", "lipo", "exo_rw", "axes"}
    assert {n for n, e in REGISTRY.items() if e.divergences} == trl | ours | scored
    assert {n for n, e in REGISTRY.items() if e.scores} == scored | {"lipo", "exo_rw", "nca"}
    whole = {"aot", "aot_unpaired", "alpha_dpo", "beta_dpo", "kto", "bco"}
    assert {n for n, e in REGISTRY.items() if e.whole_batch} == whole
    assert {n for n, e in REGISTRY.items() if e.statistic} == {"alpha_dpo", "beta_dpo", "bco"}
    assert {n for n, e in REGISTRY.items() if e.unpaired} == {"kto", "bco", "apo_zero_unpaired"}
    assert {n for n, e in REGISTRY.items() if e.mismatched} == {"kto"}
    assert {n for n, e in REGISTRY.items() if e.rewards} == {"bradley_terry"}
    free = {"sft", "unlikelihood", "simpo", "alphapo", "cpo", "orpo", "slic", "bradley_terry"}
    free |= {"simper", "asft", "tpo", "tpo_l"}
    assert {n for n, e in REGISTRY.items() if not e.uses_reference} == free
    pairs = {n for n, e in REGISTRY.items() if e.responses == 2 and not e.whole_batch and not e.unpaired}
    assert {n for n, e in REGISTRY.items() if e.soft_labels} == pairs - scored


@every_loss
def test_a_loss_without_a_reference_does_not_look_at_it(name):
    lp = example(name)
    blind = np.isfinite(REGISTRY[name].function(lp._replace(reference=np.full_like(lp.policy, np.nan)))).all()
    assert blind == (not REGISTRY[name].uses_reference)


@every_loss
def test_the_documentation_names_paper_formula_and_every_hyper_parameter(name):
    doc = inspect.getdoc(REGISTRY[name].function)
    assert re.search(r"\([^()]+ (19|20)\d\d, arXiv \d{4}\.\d{5}", doc.splitlines()[0])
    assert doc.splitlines()[2].startswith("    ")
    for hyper in inspect.signature(REGISTRY[name].function).parameters:
        assert f"\n  {hyper}: " in doc


def test_two_responses_ranked_are_dpo():
    lp = example("dpo")
    for found, expected in zip(pulled("plackett_luce", lp), pulled("dpo", lp), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_ranking_is_the_choice_of_the_best_again_and_again():
    """Plackett-Luce over K is the first choice among K, and then Plackett-Luce over the rest."""
    lp = example("plackett_luce")
    first = -jax.nn.log_softmax(0.1 * (lp.policy - lp.reference))[:, 0]
    rest = lp._replace(policy=lp.policy[:, 1:], reference=lp.reference[:, 1:])
    f = REGISTRY["plackett_luce"].function
    np.testing.assert_allclose(f(lp), first + f(rest), rtol=1e-5)


def test_zero_smoothing_of_robust_is_dpo_and_its_mean_over_flips_is_dpo_on_clean_labels():
    lp, eps = example("dpo"), 0.2
    robust, dpo = (functools.partial(REGISTRY[n].function, beta=0.1) for n in ("robust", "dpo"))
    np.testing.assert_allclose(robust(lp, label_smoothing=0.0), dpo(lp), rtol=1e-6)
    swapped = lp._replace(policy=lp.policy[:, ::-1], reference=lp.reference[:, ::-1])
    mean = (1 - eps) * robust(lp, label_smoothing=eps) + eps * robust(swapped, label_smoothing=eps)
    np.testing.assert_allclose(mean, dpo(lp), rtol=1e-5, atol=1e-6)


def test_a_longer_chosen_response_is_held_back_by_r_dpo():
    """Its optimum is a lower margin of rewards than dpo's for the same preference, and its push is weaker."""
    lengths = np.array([[9.0, 3.0]])
    lp = batch_of([[1.0, 0.0]], lengths=lengths)
    assert abs(pulled("r_dpo", lp, {"alpha": 0.1})[1][0, 0]) < abs(pulled("dpo", lp)[1][0, 0])
    shorter = lp._replace(lengths=lengths[:, ::-1])
    assert abs(pulled("r_dpo", shorter, {"alpha": 0.1})[1][0, 0]) > abs(pulled("dpo", lp)[1][0, 0])


def test_the_least_of_exo_is_where_its_classifier_has_the_labels_probability():
    z = math.log(0.9 / 0.1)
    value, gradient = pulled("exo_pair", batch_of([[z, 0.0]]), {"beta": 1.0, "label_smoothing": 0.1})
    np.testing.assert_allclose([float(value[0]), float(gradient[0, 0])], [0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing 0.0 cannot be used: it must be above 0 and below 0.5"),
        ("robust", {"label_smoothing": 0.5}, "at least 0 and below 0.5"),
        *((name, {"label_smoothing": eps}, "at least 0 and below 0.5") for name in SMOOTHED for eps in (-0.1, 0.5)),
        ("odpo", {"alpha": -1.0}, "at least 0"),
        ("dpop", {"penalty": -1.0}, "at least 0"),
        ("cpo", {"nll_weight": -1.0}, "at least 0"),
        ("slic", {"nll_weight": -1.0}, "at least 0"),
        ("bradley_terry", {"center": -1.0}, "at least 0"),
        ("unlikelihood", {"alpha": 1.5}, "alpha 1.5 cannot be used: it must be within 0 and 1"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight -1.0 cannot be used"),
        ("apo_zero_unpaired", {"undesirable_weight": -1.0}, "undesirable_weight -1.0 cannot be used"),
        ("bco", {"decay": 1.0}, "at least 0 and below 1"),
        ("beta_dpo", {"decay": -0.5}, "at least 0 and below 1"),
        ("ipo", {"beta": 0.0}, "beta 0.0 cannot be used: it must be above 0"),
        ("ipo_sum", {"beta": 0.0}, "above 0"),
        ("sppo_hard", {"beta": -1.0}, "above 0"),
        ("discopop", {"tau": 1.0}, "above 0 and below 1"),
        ("beta_dpo", {"left_out": 1.0}, "left_out 1.0 cannot be used: it must be at least 0 and below 1"),
        ("alpha_dpo", {"decay": 1.0}, "at least 0 and below 1"),
        ("chi_po", {"reward_range": 0.0}, "reward_range 0.0 cannot be used: it must be above 0"),
        ("tpo", {"nll_weight": -1.0}, "at least 0"),
        ("tpo_l", {"nll_weight": -1.0}, "at least 0"),
        *((name, {"eta": 0.0}, "eta 0.0 cannot be used: it must be") for name in ("rpo_sq", "rpo_bwd", "rpo_fwd")),
        *((name, {"temperature": 0.0}, "temperature 0.0 cannot be used") for name in ("exo_rw", "nca")),
    ],
)
def test_hyper_parameters_without_a_meaning_are_refused(name, hyper, message):
    with pytest.raises(UserError, match=message):
        REGISTRY[name].function(example(name), **hyper)
    with pytest.raises(UserError, match=rf"loss {name}: .*({message}|above 0)"):  # before anything is compiled
        losses.build({"name": name, **hyper})


@pytest.mark.parametrize("name", [n for n, e in REGISTRY.items() if e.scores])
def test_losses_of_scores_are_nan_without_an_order_of_scores(name):
    """So that the step is refused, where a value of 0 would train nothing and say nothing."""
    lp = example(name)
    lp.scores[1], lp.scores[3] = 0.0, lp.scores[3, ::-1].copy()
    value = REGISTRY[name].function(lp)
    assert np.isnan(value).tolist() == [False, True, False, True, False, False]
    assert np.isfinite(REGISTRY[name].function(lp._replace(weights=np.array([1.0, 0, 1, 0, 1, 1])))).all()


def test_the_kl_of_kto_is_a_constant_never_negative_and_by_weight():
    f = REGISTRY["kto"].function
    ratios = np.array([[0.0, 0.0, 3.0], [0.0, 0.0, -1.0], [0.0, 0.0, 50.0]])
    lp = batch_of(ratios, present=[[True, True, True], [True, True, True], [True, True, False]])
    np.testing.assert_allclose(f(lp, beta=1.0)[0], (1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(1))) / 2, rtol=1e-6)
    weighted = batch_of([[1.0, 0.0, 3.0], *ratios[1:]], present=lp.present, weights=[3.0, 1.0, 1.0])  # KL 2
    expected = (1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(2))) / 2
    np.testing.assert_allclose(f(weighted, beta=1.0)[0], expected, rtol=1e-6)
    negative = batch_of(-ratios, present=[[True, False, True], [False, True, True], [True, False, False]])  # mean -1
    np.testing.assert_allclose(f(negative, beta=1.0), 0.5)
    assert not np.any(pulled("kto", lp)[1][:, 2])


def test_responses_one_by_one_have_the_mean_of_pairs():
    """For losses without a batch's statistic: n pairs, or their 2 n responses each alone."""
    pairs = example("apo_zero")
    single = jax.tree.map(lambda x: np.concatenate([x, x]) if x.ndim else x, pairs)
    alone = single._replace(present=np.repeat(np.eye(2, dtype=bool), 6, axis=0))
    f = REGISTRY["apo_zero_unpaired"].function
    np.testing.assert_allclose(f(alone).mean(), f(pairs).mean(), rtol=1e-6)
    both = REGISTRY["apo_zero"].function(pairs)
    np.testing.assert_allclose(f(pairs), both / 2, rtol=1e-6)


def test_the_shift_of_bco_is_the_mean_reward_of_what_is_there():
    entry = REGISTRY["bco"]
    lp = batch_of([[2.0, 40.0], [0.0, -1.0]], present=[[True, False], [True, True]], weights=[2.0, 1.0], running=1.0)
    # rewards 2 (weight 2), 0 and -1 (weight 1): mean 3/4; a first step of a policy equal to its reference has 0
    assert float(entry.statistic(lp, beta=1.0, decay=0.6)) == pytest.approx(0.6 + 0.4 * 0.75)
    assert float(entry.statistic(batch_of([[0.0, 0.0]]), beta=1.0, decay=0.6)) == 0.0


def test_the_usual_margin_of_beta_dpo_is_a_running_mean_by_weight():
    entry = REGISTRY["beta_dpo"]
    lp = batch_of([[4.0, 0.0], [0.0, 2.0]], weights=[3.0, 1.0], running=2.0)
    found = entry.statistic(lp, beta=0.1, alpha=0.6, decay=0.9)  # margins 4 and -2 have the mean 5/2
    assert float(found) == pytest.approx(0.9 * 2 + 0.1 * 2.5)


def test_weights_multiply_values_of_aot_and_leave_ranks_alone():
    lp = example("aot")
    doubled = lp._replace(weights=np.array([2.0, 1, 1, 0.5, 1, 1]))
    for name in ("aot", "aot_unpaired"):
        f = REGISTRY[name].function
        np.testing.assert_array_equal(f(doubled), f(lp))


def test_an_own_loss_takes_means_by_the_weights_of_tokens():
    def mean(lp, *, beta=1.0):
        return -beta * losses.per_token(lp.policy, lp)[:, 0]

    objective = losses.of(mean, uses_reference=False)
    policy, lengths = [[-2.0, -6.0], [-2.0, 0.0]], [[4, 3], [4, 0]]
    lp = losses.Logps.of(policy, lengths=lengths, mass=[[0.5, 2.0], [4.0, 0.0]])
    np.testing.assert_allclose(objective.values(lp), [4.0, 0.5])
    np.testing.assert_allclose(losses.per_token(lp.policy, lp), [[-4, -3], [-0.5, 0]])
    np.testing.assert_allclose(objective.values(losses.Logps.of(policy, lengths=lengths)), [0.5, 0.5])
