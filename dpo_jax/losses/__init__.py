"""Losses by name, as pure functions of log-probs, and objectives made of them.

A loss is a pure function `(Logps, *, hyper-parameters) -> float32[B]`, unreduced, written as its equation. Its
keyword-only parameters are its options in a config, beside those of every term (`term_options`); their help is its
docstring. A loss rejects values without a meaning with `parts.require`, and takes means over tokens with `per_token`,
which divides by the sum of their weights (`Logps.mass`), not by `Logps.lengths`. To add one, write the function under
`@register` in a file of this folder and give it a row in tests/loss_table.py; the tests fail until it has one.
"""

# isort: off
# Losses are listed in this order (`dpo-jax losses`).
from dpo_jax.losses.pairwise import (
    chi_po, discopop, dpo, dpop, exo_pair, hinge, hypo, ipo, ipo_sum, odpo, r_dpo, robust, sigmoid_norm,
)  # fmt: skip
from dpo_jax.losses.anchored import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from dpo_jax.losses.scored import rpo_bwd, rpo_fwd, rpo_sq
from dpo_jax.losses.batchwise import alpha_dpo, aot, aot_unpaired, beta_dpo
from dpo_jax.losses.unpaired import apo_zero_unpaired, bco, kto
from dpo_jax.losses.ranked import exo_rw, lipo, nca, plackett_luce
from dpo_jax.losses.reference_free import alphapo, asft, cpo, orpo, simper, simpo, slic
from dpo_jax.losses.triples import tpo, tpo_l
from dpo_jax.losses.axes import axes
from dpo_jax.losses.likelihood import bradley_terry, sft, unlikelihood
from dpo_jax.losses.objective import Loss, build, of, option_functions
from dpo_jax.losses.metrics import length_bias, weighted_means
from dpo_jax.losses.parts import per_token
from dpo_jax.losses.registry import REGISTRY, register
from dpo_jax.records import Logps

# isort: on

__all__ = [
    "REGISTRY", "Logps", "Loss", "alpha_dpo", "alphapo", "aot", "aot_unpaired", "apo_down", "apo_zero",
    "apo_zero_unpaired", "asft", "axes", "bco", "bco_pair", "beta_dpo", "bradley_terry", "build", "chi_po", "cpo",
    "discopop", "dpo", "dpop", "exo_pair", "exo_rw", "hinge", "hypo", "ipo", "ipo_sum", "kto", "length_bias",
    "lipo", "nca", "nca_pair", "odpo", "of", "option_functions", "orpo", "per_token", "plackett_luce", "r_dpo",
    "register", "robust", "rpo_bwd", "rpo_fwd", "rpo_sq", "sft", "sigmoid_norm", "simper", "simpo", "slic", "sppo_hard",
    "tpo", "tpo_l", "unlikelihood", "weighted_means",
]  # fmt: skip
