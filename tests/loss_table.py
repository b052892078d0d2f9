"""Values and gradients of every loss, worked by hand from its formula."""

import math
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.records import Logps


def batch_of(policy, **fields):
    """Log-probs of B comparisons, float32[B, P]: reference 0, 5 tokens a response, all there, unless given."""
    policy = np.array(policy, np.float32)
    values = {
        "reference": np.zeros_like(policy),
        "policy_shared": policy,
        "reference_shared": np.zeros_like(policy),
        "lengths": np.full_like(policy, 5.0),
        "present": np.ones_like(policy, bool),
        "weights": np.ones(len(policy), np.float32),
        "preference": np.ones(len(policy), np.float32),
        "scores": np.zeros_like(policy),
        "confidence": np.full_like(policy, np.nan),
        "rounding": np.zeros_like(policy),
        "running": np.float32(0.0),
    }
    return Logps(policy, **{k: np.asarray(fields.get(k, v), v.dtype) for k, v in values.items()})


class Row(NamedTuple):
    """A loss, its hyper-parameters, log-probs, and what it is of them: float[B], and d sum / d policy, float[B, P]."""

    name: str
    hyper: dict[str, Any]
    lp: Logps
    value: list[float]
    gradient: list[list[float]]


def sp(x):
    """Softplus: -log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def s(x):
    return 1 / (1 + math.exp(-x))


def ds(x):
    return s(x) * s(-x)


def smooth(z):
    """The logistic loss of labels of which a quarter is wrong."""
    return 0.75 * sp(-z) + 0.25 * sp(z)


def slope(z):
    """Its derivative."""
    return 0.25 * s(z) - 0.75 * s(-z)


def log(*x):
    return [math.log(v) for v in x]


# Log-ratios 2 and -1, margin 3; a token: 1/2 and -1/2, margin 1. Log-probs a token: -2 and -6.5.
PAIR = batch_of([[-8.0, -13.0]], reference=[[-10.0, -12.0]], lengths=[[4.0, 2.0]])
SCORED = PAIR._replace(scores=np.array([[5.0, 2.0]]))
FALLEN = batch_of([[-11.0, -13.0]], reference=[[-10.0, -12.0]])  # both log-ratios -1
EVEN = batch_of([log(0.5, 0.2)], lengths=[[1.0, 1.0]])  # odds 1 and 1/4
# Policy margins 1, 3, 2 against the reference's 0, 2, 5: by rank 1 - 0, 2 - 2, 3 - 5.
THREE = batch_of([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]], reference=[[2.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
# Chosen log-ratios 1, 3, 2 against rejected 5, 0, 2: 1 - 0, 2 - 2, 3 - 5.
CROSSED = batch_of([[1.0, 5.0], [3.0, 0.0], [2.0, 2.0]])
MOVING = batch_of([[1.0, 0.0], [3.0, 0.0]], running=0.5)  # mean margin 2, where 0.5 was usual
BAD = batch_of([[0.0, 100.0]])
TRIPLE = batch_of([[2.0, -1.0, 0.5], [1.0, -3.0, 1.5]])  # KL estimate 1
LONE = batch_of([[2.0, 0.0], [0.0, -1.0]], present=[[True, False], [False, True]])
SHIFTED = batch_of([[2.0, -1.0]], running=1.0)
RANKED = batch_of([[2 * x for x in log(2, 3, 5)]])  # with beta 1/2 strengths 2, 3 and 5
LISTED = batch_of([log(0.5, 0.25, 0.25)], scores=[log(6, 3, 1)])  # labels 0.6, 0.3, 0.1

q = s(3.0)
m = s(3.0)  # discopop at z = 0.15, tau = 0.05
dm = ds(3.0) / 0.05
reward = {k: 0.1 * (1 - math.exp(-0.5 * x)) / 0.5 for k, x in {"c": -2.0, "r": -6.5}.items()}
z_alpha = reward["c"] - reward["r"] - 0.5

ROWS = [
    Row("dpo", {"beta": 0.1}, batch_of([[-10.0, -12.0]], reference=[[-10.0, -12.0]]), log(2), [[-0.05, 0.05]]),
    Row("dpo", {"beta": 1.0}, batch_of([[-2.0, -3.0]], reference=[[-2.5, -3.5]]), log(2), [[-0.5, 0.5]]),
    Row("dpo", {"beta": 1.0}, batch_of([[1.2, 0.0]]), [0.263282], [[-0.231475, 0.231475]]),  # sigmoid(1.2) = 0.768525
    Row("dpo", {"beta": 0.5}, PAIR, [sp(-1.5)], [[-0.5 * s(-1.5), 0.5 * s(-1.5)]]),
    Row(
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.25},
        PAIR,
        [0.75 * sp(-1.5) + 0.25 * sp(1.5)],
        [[0.5 * (0.25 * s(1.5) - 0.75 * s(-1.5)), -0.5 * (0.25 * s(1.5) - 0.75 * s(-1.5))]],
    ),
    Row("sigmoid_norm", {"beta": 2.0}, PAIR, [sp(-2)], [[-2 * s(-2) / 4, 2 * s(-2) / 2]]),
    Row(
        "sigmoid_norm",
        {"beta": 2.0, "label_smoothing": 0.1},
        PAIR,
        [0.9 * sp(-2) + 0.1 * sp(2)],
        [[(0.1 * s(2) - 0.9 * s(-2)) / 2, -(0.1 * s(2) - 0.9 * s(-2))]],
    ),
    Row("ipo", {"beta": 0.25}, PAIR, [1.0], [[-2 / 4, 2 / 2]]),  # (1 - 2)^2
    Row("ipo_sum", {"beta": 0.5}, PAIR, [4.0], [[4.0, -4.0]]),  # (3 - 1)^2
    Row("hinge", {"beta": 0.25}, PAIR, [0.25], [[-0.25, 0.25]]),
    Row("hinge", {"beta": 0.5}, PAIR, [0.0], [[0.0, 0.0]]),
    Row(
        "robust",
        {"beta": 1.0, "label_smoothing": 0.2},
        PAIR,
        [(0.8 * sp(-3) - 0.2 * sp(3)) / 0.6],
        [[-(0.8 * s(-3) + 0.2 * s(3)) / 0.6, (0.8 * s(-3) + 0.2 * s(3)) / 0.6]],
    ),
    Row(
        "exo_pair",
        {"beta": 1.0, "label_smoothing": 0.1},
        PAIR,
        [q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)],
        [[g := ds(3) * (math.log(q / 0.9) - math.log((1 - q) / 0.1)), -g]],
    ),
    Row(
        "discopop",
        {"beta": 0.05, "tau": 0.05},
        PAIR,
        [(1 - m) * sp(-0.15) + m * math.exp(-0.15)],
        [[g := 0.05 * (dm * (math.exp(-0.15) - sp(-0.15)) - (1 - m) * s(-0.15) - m * math.exp(-0.15)), -g]],
    ),
    Row("odpo", {"beta": 1.0, "alpha": 2.0}, SCORED, [sp(g := 2 * math.log(3) - 3)], [[-s(g), s(g)]]),  # scores 3 apart
    Row("odpo", {"beta": 1.0, "alpha": 0.5, "offset": "linear"}, SCORED, [sp(-1.5)], [[-s(-1.5), s(-1.5)]]),
    Row(
        "odpo",
        {"beta": 1.0, "alpha": 0.5, "offset": "linear", "label_smoothing": 0.25},
        SCORED,
        [smooth(1.5)],
        [[slope(1.5), -slope(1.5)]],
    ),
    Row("dpop", {"beta": 0.5}, PAIR, [sp(-1.5)], [[-0.5 * s(-1.5), 0.5 * s(-1.5)]]),  # the chosen one rose
    Row("dpop", {"beta": 0.5, "penalty": 4.0}, FALLEN, [sp(2)], [[-0.5 * 5 * s(2), 0.5 * s(2)]]),
    Row(
        "dpop",
        {"beta": 0.5, "penalty": 4.0, "label_smoothing": 0.25},
        FALLEN,
        [smooth(-2)],
        [[0.5 * 5 * slope(-2), -0.5 * slope(-2)]],
    ),
    Row("r_dpo", {"beta": 1.0, "alpha": 0.25}, PAIR, [sp(-3.5)], [[-s(-3.5), s(-3.5)]]),  # 2 tokens longer
    Row(
        "r_dpo",
        {"beta": 1.0, "alpha": 0.25, "label_smoothing": 0.25},
        PAIR,
        [smooth(3.5)],
        [[slope(3.5), -slope(3.5)]],
    ),
    Row(
        "nca_pair",
        {"beta": 1.0},
        PAIR,
        [sp(-2) + 0.5 * sp(2) + 0.5 * sp(-1)],
        [[0.5 * s(2) - s(-2), 0.5 * s(-1)]],
    ),
    Row("bco_pair", {"beta": 1.0}, PAIR, [sp(-2) + sp(-1)], [[-s(-2), s(-1)]]),
    Row("sppo_hard", {"beta": 1.0}, PAIR, [1.5**2 + 0.5**2], [[3.0, -1.0]]),
    Row("apo_zero", {"beta": 1.0}, PAIR, [1 - s(2) + s(-1)], [[-ds(2), ds(-1)]]),
    Row("apo_down", {"beta": 1.0}, PAIR, [s(2) + 1 - s(3)], [[ds(2) - ds(3), ds(3)]]),
    Row("simpo", {"beta": 0.2, "gamma": 0.5}, PAIR, [sp(-0.4)], [[-0.2 * s(-0.4) / 4, 0.2 * s(-0.4) / 2]]),
    Row(
        "simpo",
        {"beta": 0.2, "gamma": 0.5, "label_smoothing": 0.25},
        PAIR,
        [smooth(0.4)],
        [[0.2 * slope(0.4) / 4, -0.2 * slope(0.4) / 2]],
    ),
    Row(
        "alphapo",
        {"beta": 0.1, "gamma": 0.5, "alpha": 0.5},
        PAIR,
        [sp(-z_alpha)],
        [[-s(-z_alpha) * 0.1 * math.exp(1.0) / 4, s(-z_alpha) * 0.1 * math.exp(3.25) / 2]],
    ),
    Row(
        "alphapo",
        {"beta": 0.2, "gamma": 0.5, "alpha": 0.0},  # simpo
        PAIR,
        [sp(-0.4)],
        [[-0.2 * s(-0.4) / 4, 0.2 * s(-0.4) / 2]],
    ),
    Row(
        "alphapo",
        {"beta": 0.2, "gamma": 0.5, "alpha": 0.0, "label_smoothing": 0.25},
        PAIR,
        [smooth(0.4)],
        [[0.2 * slope(0.4) / 4, -0.2 * slope(0.4) / 2]],
    ),
    Row("cpo", {"beta": 0.1}, PAIR, [sp(-0.5) + 2], [[-0.1 * s(-0.5) - 1 / 4, 0.1 * s(-0.5)]]),
    Row(
        "cpo",
        {"beta": 0.1, "label_smoothing": 0.25, "nll_weight": 0.0},
        PAIR,
        [smooth(0.5)],
        [[0.1 * slope(0.5), -0.1 * slope(0.5)]],
    ),
    Row("orpo", {"beta": 0.5}, EVEN, [math.log(2) + 0.5 * math.log(5 / 4)], [[-1 - 0.5 * 0.2 / 0.5, 0.5 * 0.2 / 0.8]]),
    Row("slic", {}, PAIR, [0.8], [[-0.1, 0.0]]),  # 5 nats apart, where 1 is enough
    Row("slic", {"delta": 7.0, "nll_weight": 0.2}, PAIR, [2 + 1.6], [[-1.2, 1.0]]),
    Row("unlikelihood", {"alpha": 0.25}, PAIR, [8 - 3.25], [[-1.0, 0.25]]),
    Row("bradley_terry", {}, batch_of([[1.5, -0.5]]), [sp(-2)], [[-s(-2), s(-2)]]),
    Row(  # rewards 2 apart that add up to 1
        "bradley_terry",
        {"label_smoothing": 0.25, "center": 0.1},
        batch_of([[1.5, -0.5]]),
        [0.75 * sp(-2) + 0.25 * sp(2) + 0.1],
        [[0.25 * s(2) - 0.75 * s(-2) + 0.2, 0.75 * s(-2) - 0.25 * s(2) + 0.2]],
    ),
    Row("sft", {}, batch_of([[-8.0]]), [8.0], [[-1.0]]),
    Row("sft", {"reduction": "mean"}, PAIR, [2.0], [[-0.25, 0.0]]),  # of the first response
    Row(
        "plackett_luce",
        {"beta": 0.5},
        RANKED,
        [-math.log(2 / 10 * 3 / 8)],
        [[0.5 * (2 / 10 - 1), 0.5 * (3 / 10 + 3 / 8 - 1), 0.5 * (5 / 10 + 5 / 8)]],
    ),
    Row("lipo", {"beta": 1.0}, LISTED, [1.4 * math.log(2)], [[0.5 - 0.6, 0.25 - 0.3, 0.25 - 0.1]]),
    Row("aot", {"beta": 1.0}, THREE, [sp(-1), sp(2), sp(0)], [[-s(-1), s(-1)], [-s(2), s(2)], [-0.5, 0.5]]),
    Row(
        "aot",
        {"beta": 1.0, "label_smoothing": 0.25},
        THREE,
        [smooth(1), smooth(-2), smooth(0)],
        [[slope(1), -slope(1)], [slope(-2), -slope(-2)], [slope(0), -slope(0)]],
    ),
    Row("aot_unpaired", {"beta": 1.0}, CROSSED, [sp(-1), sp(2), sp(0)], [[-s(-1), s(2)], [-s(2), s(-1)], [-0.5, 0.5]]),
    Row(
        "aot_unpaired",
        {"beta": 1.0, "label_smoothing": 0.25},
        CROSSED,
        [smooth(1), smooth(-2), smooth(0)],
        [[slope(1), -slope(-2)], [slope(-2), -slope(1)], [slope(0), -slope(0)]],
    ),
    Row(  # usual margin 0.75 * 0.5 + 0.25 * 2 = 0.875, so beta = 0.1 * (1 + 0.8 * 1.125) = 0.19
        "beta_dpo",
        {"beta": 0.1, "alpha": 0.8, "decay": 0.75},
        MOVING,
        [sp(-0.19), sp(-0.57)],
        [[-0.19 * s(-0.19), 0.19 * s(-0.19)], [-0.19 * s(-0.57), 0.19 * s(-0.57)]],
    ),
    Row(
        "beta_dpo",
        {"beta": 0.1, "alpha": 0.8, "decay": 0.75, "label_smoothing": 0.25},
        MOVING,
        [smooth(0.19), smooth(0.57)],
        [[0.19 * slope(0.19), -0.19 * slope(0.19)], [0.19 * slope(0.57), -0.19 * slope(0.57)]],
    ),
    Row("beta_dpo", {}, BAD, [sp(0.1)], [[-1e-3 * s(0.1), 1e-3 * s(0.1)]]),  # its floor
    Row(
        "kto",
        {"beta": 1.0, "desirable_weight": 2.0, "undesirable_weight": 4.0},
        TRIPLE,
        [1 - s(1) + 2 * (1 - s(2)), 1 - s(0) + 2 * (1 - s(4))],
        [[-ds(1), 2 * ds(2), 0.0], [-ds(0), 2 * ds(4), 0.0]],
    ),
    Row(
        "apo_zero_unpaired",
        {"beta": 1.0, "undesirable_weight": 3.0},
        LONE,
        [1 - s(2), 3 * s(-1)],
        [[-ds(2), 0.0], [0.0, 3 * ds(-1)]],
    ),
    Row(
        "apo_zero_unpaired",
        {"beta": 1.0, "desirable_weight": 4.0},
        PAIR,
        [(4 * (1 - s(2)) + s(-1)) / 2],
        [[-2 * ds(2), ds(-1) / 2]],
    ),
    Row(  # rewards 1 and -0.5 of mean 0.25, so a shift of 0.6 * 1 + 0.4 * 0.25 = 0.7
        "bco",
        {"beta": 0.5, "decay": 0.6},
        SHIFTED,
        [(sp(-0.3) + sp(-1.2)) / 2],
        [[-0.5 * s(-0.3) / 2, 0.5 * s(-1.2) / 2]],
    ),
]
