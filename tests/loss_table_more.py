"""Values and gradients of further losses, worked by hand, as in loss_table.py."""

import math

import numpy as np
from loss_table import EVEN, LISTED, MOVING, PAIR, SCORED, SHIFTED, Row, batch_of, ds, log, s, slope, smooth, sp

PESSIMIST = batch_of([[-8.0, -13.0]], reference=[[-12.0, -10.0]])  # margins 5 and -2
GOLD = batch_of([[-4.0, -2.0, -5.0]], lengths=[[2.0, 1.0, 5.0]])
GAPS = batch_of([[5.0, 0.0], [15.0, 0.0]], running=[1.0, 2 - math.sqrt(2)])

MORE = [
    Row(
        "odpo",
        {"beta": 1.0, "alpha": 2.0, "offset": "ratio"},
        SCORED,
        [sp(g := 2 * math.log(2.5) - 3)],
        [[-s(g), s(g)]],
    ),
    Row("hypo", {"beta": 0.5}, PAIR, [sp(-1.5)], [[-0.5 * s(-1.5), 0.5 * s(-1.5)]]),  # the reference agrees
    Row("hypo", {"beta": 0.5}, PESSIMIST, [sp(-2.5)], [[-0.5 * s(-2.5), 0.5 * s(-2.5)]]),  # of a margin of 7 only 5
    Row(
        "hypo",
        {"beta": 0.5, "label_smoothing": 0.25},
        PESSIMIST,
        [smooth(2.5)],
        [[0.5 * slope(2.5), -0.5 * slope(2.5)]],
    ),
    Row(  # phi is 2 + log 2 and 1/2 - log 2
        "chi_po",
        {"beta": 1.0},
        batch_of([log(2, 0.5)]),
        [sp(g := -1.5 - 2 * math.log(2))],
        [[-3 * s(g), 1.5 * s(g)]],
    ),
    Row("chi_po", {"beta": 1.0, "reward_range": 0.5}, batch_of([log(2, 0.5)]), [sp(-1)], [[0.0, 0.0]]),
    Row(
        "chi_po",
        {"beta": 1.0, "reward_range": 3.0, "label_smoothing": 0.25},
        batch_of([[0.0, 0.0]]),
        log(2),
        [[2 * slope(0), -2 * slope(0)]],
    ),
    Row("rpo_sq", {"beta": 1.0, "eta": 0.5}, SCORED, [1.5**2], [[3.0, -3.0]]),  # a margin of 3 where 3/2 is due
    Row(
        "rpo_bwd",
        {"beta": 1.0, "eta": 0.5},
        SCORED,
        [s(1.5) * math.log(s(1.5) / s(3)) + s(-1.5) * math.log(s(-1.5) / s(-3))],
        [[s(3) - s(1.5), s(1.5) - s(3)]],
    ),
    Row(
        "rpo_fwd",
        {"beta": 1.0, "eta": 0.5},
        SCORED,
        [s(3) * math.log(s(3) / s(1.5)) + s(-3) * math.log(s(-3) / s(-1.5))],
        [[1.5 * ds(3), -1.5 * ds(3)]],
    ),
    Row("simper", {}, EVEN, [-0.3], [[-0.5, 0.2]]),
    Row("asft", {"beta": 0.5}, EVEN, [1.5 * math.log(2) + 0.5 * math.log(5 / 4)], [[-1.5, 0.5 * 0.25]]),
    Row("tpo", {"beta": 0.5, "nll_weight": 0.25}, GOLD, [sp(-1.5) + 0.5], [[-0.125, -0.5 * s(-1.5), 0.5 * s(-1.5)]]),
    Row(
        "tpo",
        {"beta": 0.5, "nll_weight": 0.0, "label_smoothing": 0.25},
        GOLD,
        [smooth(1.5)],
        [[0.0, 0.5 * slope(1.5), -0.5 * slope(1.5)]],
    ),
    Row(  # means -2 and -1
        "tpo_l",
        {"beta": 0.5, "gamma": 0.25, "nll_weight": 0.25},
        GOLD,
        [sp(0.75) + 0.5],
        [[-0.125, -0.5 * s(0.75), 0.1 * s(0.75)]],
    ),
    Row(
        "tpo_l",
        {"beta": 0.5, "gamma": 0.25, "nll_weight": 0.0, "label_smoothing": 0.25},
        GOLD,
        [smooth(-0.75)],
        [[0.0, 0.5 * slope(-0.75), -0.1 * slope(-0.75)]],
    ),
    Row(  # of labels 0.6, 0.3, 0.1 it has 0.5, 0.25, 0.25
        "exo_rw",
        {"beta": 1.0, "temperature": 2.0},
        LISTED._replace(scores=2 * LISTED.scores),
        [kl := 0.75 * math.log(5 / 6) + 0.25 * math.log(5 / 2)],
        [[0.5 * (math.log(5 / 6) - kl), 0.25 * (math.log(5 / 6) - kl), 0.25 * (math.log(5 / 2) - kl)]],
    ),
    Row(  # sigmoids 3/4, 1/2, 1/4
        "nca",
        {"beta": 0.5, "temperature": 2.0},
        LISTED._replace(policy=np.array([[2 * math.log(3), 0, -2 * math.log(3)]]), scores=2 * LISTED.scores),
        [-(0.6 + 1 / 3) * math.log(3 / 4) - (0.3 + 1 / 3) * math.log(1 / 2) - (0.1 + 1 / 3) * math.log(1 / 4)],
        [[0.5 * (0.25 - 0.6 / 4), 0.5 * (1 / 6 - 0.3 / 2), 0.5 * (1 / 12 - 0.3 / 4)]],
    ),
    Row(  # of margins 1 and 3 the first is nearer to 0.875; beta = 0.1 * (1 + 0.8 * 0.125), and the mean is over one
        "beta_dpo",
        {"beta": 0.1, "alpha": 0.8, "decay": 0.75, "left_out": 0.5},
        MOVING,
        [2 * sp(-0.11), 0.0],
        [[-0.22 * s(-0.11), 0.22 * s(-0.11)], [0.0, 0.0]],
    ),
    Row(  # deviation 0.25 * sqrt(2): the first is more probable by e^18, and so drawn
        "beta_dpo",
        {"beta": 0.1, "alpha": 0.8, "decay": 0.75, "left_out": 0.5, "drawn": True},
        MOVING._replace(running=np.array([0.5, 0.0, 3.0], np.float32)),
        [2 * sp(-0.11), 0.0],
        [[-0.22 * s(-0.11), 0.22 * s(-0.11)], [0.0, 0.0]],
    ),
    Row(  # gaps 1 and 3, of deviation sqrt(2) over n - 1: running mean 0.5 * 1 + 0.5 * 2, running deviation 1
        "alpha_dpo",
        {"beta": 1.0, "gamma": 0.5, "alpha": 0.2, "decay": 0.5},
        GAPS,
        [sp(-0.6), sp(-2.2)],
        [[-0.2 * s(-0.6), 0.2 * s(-0.6)], [-0.2 * s(-2.2), 0.2 * s(-2.2)]],
    ),
    Row(
        "alpha_dpo",
        {"beta": 1.0, "gamma": 0.5, "alpha": 0.2, "decay": 0.5, "label_smoothing": 0.25},
        GAPS,
        [smooth(0.6), smooth(2.2)],
        [[0.2 * slope(0.6), -0.2 * slope(0.6)], [0.2 * slope(2.2), -0.2 * slope(2.2)]],
    ),
    Row(  # rewards 1 and -0.5 against a running mean of 0.7, as of bco
        "axes",
        {"score": "log_ratio", "ranking": "pointwise", "link": "logistic", "target": "moving_mean", "beta": 0.5}
        | {"scale": 1.0, "decay": 0.6, "label_smoothing": 0.25},
        SHIFTED,
        [smooth(0.3) + smooth(1.2)],
        [[0.5 * slope(0.3), -0.5 * slope(1.2)]],
    ),
    Row(  # a mean of 1 over weight 1, then two of mean 0.25: 1/2
        "bco",
        {"beta": 0.5, "all_steps": True},
        SHIFTED._replace(running=np.array([1.0, 1.0], np.float32)),
        [(sp(-0.5) + sp(-1)) / 2],
        [[-0.5 * s(-0.5) / 2, 0.5 * s(-1) / 2]],
    ),
]
