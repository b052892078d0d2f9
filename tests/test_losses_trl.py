"""Golden parity with the loss functions of TRL 1.16, run as they are, and with those of DPO's original code.

TRL's trainers get stand-ins for what surrounds the loss: a model that answers with given log-probs, a tensor whose
gradient is looked at, and the attributes that their constructors set. Nothing of their code is replaced.
"""

import functools
import re
from collections import defaultdict
from types import SimpleNamespace

import jax
import numpy as np
import originals
import pytest
import torch
from loss_table import batch_of

from dpo_jax import losses
from dpo_jax.losses import REGISTRY
from dpo_jax.losses.term_options import diverge

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

COLLISIONS = -0.7  # log sum_v pi(v)^2 of every token
TIGHT = {"rtol": 1e-5, "atol": 1e-6}
# TRL's name -> ours, and whether TRL's has label smoothing; sft is apart, since its value is one of a whole batch.
NAMES = {
    "sigmoid": ("dpo", False),
    "hinge": ("hinge", False),
    "ipo": ("ipo", False),
    "exo_pair": ("exo_pair", True),
    "nca_pair": ("nca_pair", False),
    "robust": ("robust", True),
    "bco_pair": ("bco_pair", False),
    "sppo_hard": ("sppo_hard", False),
    "aot": ("aot", True),
    "aot_unpaired": ("aot_unpaired", True),
    "apo_zero": ("apo_zero", False),
    "apo_down": ("apo_down", False),
    "discopop": ("discopop", False),
    "sigmoid_norm": ("sigmoid_norm", False),
}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js": "js_divergence",
    "alpha": "alpha_divergence",
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield


def pairs(n=5, seed=0, p=2, equal_lengths=False):
    """Random log-probs of n comparisons, as far from the reference as training goes."""
    draw = np.random.default_rng(seed)
    lengths = np.full((n, p), 4) if equal_lengths else draw.integers(1, 9, (n, p))
    reference = -lengths * draw.uniform(0.5, 3.0, (n, p))
    return batch_of(reference + draw.normal(0, 3, (n, p)), reference=reference, lengths=lengths)


def masks(lengths, prompt=3):
    """int64[n, S], 1 where a token of the response stands behind `prompt` others."""
    places = torch.arange(prompt + int(lengths.max()))
    return ((places >= prompt) & (places < prompt + torch.tensor(lengths)[:, None])).long()


def answer(sums, mask):
    """What TRL's fused head returns for sequences with the given sums of log-probs, spread evenly over tokens."""
    tokens = mask[:, 1:].float()
    per_token = sums[:, None] * tokens / tokens.sum(1, keepdim=True)
    rest = {name: torch.zeros_like(tokens) for name in ("entropy", "mean_logits")}
    collisions = torch.full_like(tokens, COLLISIONS)
    is_top1 = torch.zeros_like(tokens, dtype=torch.bool)
    return SimpleNamespace(log_probs=per_token, log_sum_sq_probs=collisions, is_top1=is_top1, **rest)


def stand_in(kind, **attributes):
    """An object with the methods of a trainer and what its constructor would have set."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda m: m
    )
    usual = {
        "accelerator": accelerator,
        "model": torch.nn.Identity(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer = kind.__new__(kind)
    for name, value in (usual | attributes).items():
        setattr(trainer, name, value)
    return trainer


def trl_dpo(lp, loss, divergence="reverse_kl", *, weights=(1.0,), ld_alpha=None, wpo=False, **options):
    """Value and gradient, float[n, 2], of DPOTrainer's loss, or of several with their weights."""
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = {"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.5, "tau": 0.05} | options
    trainer = stand_in(
        DPOTrainer,
        loss_types=[loss] if isinstance(loss, str) else loss,
        loss_weights=list(weights),
        ld_alpha=ld_alpha,
        use_weighting=wpo,
        beta=settings["beta"],
        label_smoothing=settings["label_smoothing"],
        f_divergence_type=DIVERGENCES[divergence],
        f_alpha_divergence_coef=settings["alpha"],
        args=SimpleNamespace(discopop_tau=settings["tau"], gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        ref_model=lambda **_: answer(torch.tensor(lp.reference.T.ravel()), mask),
    )
    trainer.model.is_gradient_checkpointing = False
    sums = torch.tensor(lp.policy.T.ravel(), requires_grad=True)
    mask = masks(lp.lengths.T.ravel())
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    value = trainer.compute_loss(lambda **_: answer(sums, mask), inputs)
    value.backward()
    return value.item(), sums.grad.numpy().reshape(2, -1).T


def ours(name, lp, divergence="reverse_kl", f_alpha=0.5, weights=None, **hyper):
    """Mean over comparisons and its gradient by the policy's log-probs."""

    @jax.jit
    @jax.value_and_grad
    def mean(policy):
        values = REGISTRY[name].function(diverge(lp._replace(policy=policy), divergence, f_alpha), **hyper)
        return values.mean() if weights is None else (values * weights).sum() / weights.sum()

    value, gradient = mean(lp.policy)
    return float(value), gradient


def ours_of_tokens(loss, lp):
    """Mean and its gradient of a config's loss, by the sums of log-probs that are spread evenly over tokens."""
    built, share = losses.build(loss), lp.lengths.min(axis=1, keepdims=True) / lp.lengths

    @jax.jit
    @jax.value_and_grad
    def mean(policy):
        shown = lp._replace(
            policy=policy,
            policy_shared=policy * share,
            reference_shared=lp.reference * share,
            confidence=policy / lp.lengths - COLLISIONS,
        )
        return built.values(shown).mean()

    value, gradient = mean(lp.policy)
    return float(value), gradient


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], **TIGHT)
    np.testing.assert_allclose(found[1], expected[1], **TIGHT)


def allowed(loss, divergence):
    return divergence == "reverse_kl" or REGISTRY[NAMES[loss][0]].divergences


# Where TRL looks at label smoothing two of them, else one, to show that it does not.
MATRIX = [(n, d, e) for n in NAMES for d in DIVERGENCES if allowed(n, d) for e in (0.05, 0.3)[not NAMES[n][1] :]]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("loss", "divergence", "smoothing"), MATRIX)
def test_dpo_trainer(loss, divergence, smoothing, beta):
    name, smoothed = NAMES[loss]
    hyper = {"beta": beta} | ({"label_smoothing": smoothing} if smoothed else {})
    lp = pairs()
    assert_same(
        ours(name, lp, divergence, **hyper), trl_dpo(lp, loss, divergence, beta=beta, label_smoothing=smoothing)
    )


@pytest.mark.parametrize("loss", ["robust", "aot", "aot_unpaired"])
def test_dpo_trainer_without_smoothing(loss):
    lp = pairs(seed=1)
    assert_same(ours(NAMES[loss][0], lp, beta=0.1, label_smoothing=0.0), trl_dpo(lp, loss))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm", "robust", "apo_down"])
@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"wpo": True}, {"ld_alpha": 0.6, "wpo": True}])
def test_desensitised_to_length_and_weighted_by_the_policy(loss, options):
    lp, smoothing = pairs(seed=4), {"label_smoothing": 0.05} if NAMES[loss][1] else {}
    assert_same(
        ours_of_tokens({"name": NAMES[loss][0], "beta": 0.2, **smoothing, **options}, lp),
        trl_dpo(lp, loss, beta=0.2, **smoothing, **options),
    )


def test_a_mixture():
    """MPO, of responses of one length, where TRL's sft is the mean over each."""
    lp = pairs(seed=5, equal_lengths=True)
    terms = [{"name": "dpo", "beta": 0.1, "weight": 0.8}, {"name": "bco_pair", "beta": 0.1, "weight": 0.2}]
    terms += [{"name": "sft", "reduction": "mean"}]
    assert_same(ours_of_tokens(terms, lp), trl_dpo(lp, ["sigmoid", "bco_pair", "sft"], weights=(0.8, 0.2, 1.0)))


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0, 1.5])
def test_alpha_divergences(alpha):
    lp = pairs(seed=2)
    assert_same(ours("dpo", lp, "alpha", alpha, beta=0.1), trl_dpo(lp, "sigmoid", "alpha", alpha=alpha))


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_discopop_at_other_temperatures(tau):
    lp = pairs(seed=3)
    assert_same(ours("discopop", lp, beta=0.2, tau=tau), trl_dpo(lp, "discopop", beta=0.2, tau=tau))


def test_dpo_trainer_refuses_other_divergences_where_ours_does(shared, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=16))
    row = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options = {"loss_type": "nca_pair", "f_divergence_type": "forward_kl", "use_cpu": True, "bf16": False}
    config = DPOConfig(output_dir=str(tmp_path), report_to="none", **options)
    with pytest.raises(ValueError, match="only supported for the following loss types") as caught:
        DPOTrainer(model, args=config, train_dataset=row, processing_class=tokenizer)
    supported = set(re.findall(r"'(\w+)'", str(caught.value).partition("loss types: ")[2].partition("]")[0]))
    assert supported == {n for n in NAMES if allowed(n, "forward_kl")} | {"sft"}  # whose value has no divergence in it


def test_sft_of_trl_is_a_mean_over_the_tokens_of_a_batch():
    """So that it weights comparisons by their lengths, which is ours where they are equal."""
    lp = pairs()
    assert_same(ours("sft", lp, reduction="mean", weights=lp.lengths[:, 0]), trl_dpo(lp, "sft"))
    even = pairs(equal_lengths=True)
    assert_same(ours("sft", even, reduction="mean"), trl_dpo(even, "sft"))


def test_trl_ignores_smoothing_in_its_sigmoid_losses_where_ours_is_conservative_dpo():
    lp = pairs()
    for loss, name in (("sigmoid", "dpo"), ("sigmoid_norm", "sigmoid_norm")):
        trl = trl_dpo(lp, loss, label_smoothing=0.3)[0]
        assert trl == trl_dpo(lp, loss)[0]
        swapped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, lp)
        conservative = 0.7 * trl + 0.3 * trl_dpo(swapped, loss)[0]
        assert ours(name, lp, beta=0.1, label_smoothing=0.3)[0] == pytest.approx(conservative, rel=1e-5)


def cpo_trainer(lp, loss, **options):
    """Value and gradient of CPOTrainer's loss, whose log-probs are means for simpo, sums else."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    settings = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, "cpo_alpha": 0.0} | options
    sums = torch.tensor(lp.policy, requires_grad=True)
    chosen, rejected = (sums / torch.tensor(lp.lengths) if loss == "simpo" else sums).T
    nll = -sums[:, 0].sum() / float(lp.lengths[:, 0].sum())
    forward = (chosen, rejected, torch.zeros(1), torch.zeros(1), nll)
    trainer = stand_in(CPOTrainer, loss_type=loss, concatenated_forward=lambda *_: forward, **settings)
    value, _ = trainer.get_batch_loss_metrics(None, {})
    value.backward()
    return value.item(), sums.grad.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing):
    lp = pairs()
    hyper = {"beta": 2.0, "label_smoothing": smoothing}
    assert_same(ours("simpo", lp, gamma=1.2, **hyper), cpo_trainer(lp, "simpo", simpo_gamma=1.2, **hyper))


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.25])
def test_alphapo(alpha):
    lp = pairs()
    hyper = {"beta": 2.0, "alpha": alpha}
    assert_same(ours("alphapo", lp, gamma=0.5, **hyper), cpo_trainer(lp, "simpo", **hyper))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo(smoothing):
    lp = pairs(equal_lengths=True)  # TRL's likelihood term is a mean over the tokens of a batch
    hyper = {"beta": 0.3, "label_smoothing": smoothing}
    assert_same(ours("cpo", lp, nll_weight=0.7, **hyper), cpo_trainer(lp, "sigmoid", cpo_alpha=0.7, **hyper))


def test_orpo():
    """TRL's likelihood term has the prompt's tokens in it too; here there are none."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    lp = pairs(equal_lengths=True)
    lp = lp._replace(policy=np.minimum(lp.policy, -0.01))
    sums = torch.tensor(lp.policy, requires_grad=True)
    means = sums / 4
    forward = (*means.T, torch.zeros(1), torch.zeros(1), -means[:, 0].mean())
    trainer = stand_in(ORPOTrainer, beta=0.3, concatenated_forward=lambda *_: forward)
    value, _ = trainer.get_batch_loss_metrics(None, {})
    value.backward()
    assert_same(ours("orpo", lp, beta=0.3), (value.item(), sums.grad.numpy()))


def kto_trainer(lp, loss, **options):
    """Value and gradient of KTOTrainer's loss of the first two responses, the third being the mismatched one."""
    from trl.trainer.kto_trainer import KTOTrainer

    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | options
    trainer = stand_in(KTOTrainer, loss_type=loss, calculate_KL=loss == "kto", **settings)
    sums, other = torch.tensor(lp.policy, requires_grad=True), torch.tensor(lp.policy[:, -1])
    there = torch.tensor(lp.present[:, :2].T.ravel())
    mask = masks(lp.lengths[:, :2].T.ravel())[there]
    other_mask = masks(lp.lengths[:, -1])
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": 2 * torch.ones_like(other_mask),
        "KL_attention_mask": torch.ones_like(other_mask),
        "KL_completion_mask": other_mask,
        "label": torch.arange(2).repeat_interleave(len(lp.policy))[there] == 0,
        "ref_logps": torch.tensor(lp.reference[:, :2].T.ravel())[there],
        "ref_KL_logps": torch.tensor(lp.reference[:, -1]),
    }

    def model(input_ids, **_):
        return answer(other, other_mask) if input_ids[0, 0] == 2 else answer(sums[:, :2].T.ravel()[there], mask)

    value = trainer.compute_loss(model, batch)
    value.backward()
    return value.item(), sums.grad.numpy()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])  # of which some have a negative KL estimate, which counts as 0
def test_kto(seed):
    lp = pairs(p=3, seed=seed)
    hyper = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    assert_same(ours("kto", lp, **hyper), kto_trainer(lp, "kto", **hyper))


def test_kto_of_single_responses():
    lp = pairs(p=3, n=6, seed=5)
    lp = lp._replace(present=np.array([[i % 3 != 0, i % 3 == 0, True] for i in range(6)]))
    assert_same(ours("kto", lp, beta=0.3), kto_trainer(lp, "kto", beta=0.3))


def test_apo_zero_unpaired():
    lp = pairs()
    hyper = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    assert_same(ours("apo_zero_unpaired", lp, **hyper), kto_trainer(lp, "apo_zero_unpaired", **hyper))


@pytest.mark.parametrize("ipo", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reference_free", [False, True])
def test_the_originals_preference_loss(smoothing, ipo, reference_free):
    lp = pairs()
    policy, reference = torch.tensor(lp.policy, requires_grad=True), torch.tensor(lp.reference)
    f = functools.partial(originals.preference_loss, label_smoothing=smoothing, ipo=ipo, reference_free=reference_free)
    value = f(policy, reference, beta=0.3).mean()
    value.backward()
    if reference_free:
        lp = lp._replace(reference=0 * lp.reference)
    hyper = {} if ipo else {"label_smoothing": smoothing}
    found = ours("ipo_sum" if ipo else "dpo", lp, beta=0.3, **hyper)
    assert_same(found, (value.item(), policy.grad.numpy()))


def test_the_originals_supervised_loss():
    lp = pairs(p=1)
    assert ours("sft", lp)[0] == pytest.approx(-lp.policy.mean(), rel=1e-6)
