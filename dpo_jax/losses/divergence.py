"""f-DPO (Wang et al. 2023, arXiv 2309.16240): another divergence from the reference than the reverse KL."""

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax.nn import log_sigmoid

from dpo_jax.losses.parts import log_ratios, power
from dpo_jax.records import Array, Logps, UserError

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def transform(lp: Logps, name: Divergence, alpha: float = 0.5) -> Logps:
    """Puts the scores of an f-divergence where a loss looks for log-ratios: `policy` is s and `reference` is 0.

    A policy that maximises reward less beta times D_f(pi, ref) has rewards beta f'(pi / ref), up to a constant, where
    with the reverse KL they are beta log(pi / ref). With t = pi / ref and x = log t the scores are

        reverse_kl   f'(t) = log t                              s = x
        forward_kl   f'(t) = 1 - 1/t                            s = 1 - e^-x
        js           f'(t) = log(2 t / (1 + t))                 s = log 2 + log sigmoid(x)
        alpha        f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)  s = (e^((alpha - 1) x) - 1) / (alpha - 1)

    all with s(0) = 0, so that they may be divided by lengths. alpha -> 1 is the reverse KL and alpha = 0 the forward
    one. Exponents are held at 80, as in TRL, beyond which the gradient is 0.

    Args:
      lp: log-probabilities of B comparisons; any length desensitising comes before.
      name: the divergence.
      alpha: of the alpha-divergence (TRL's f_alpha_divergence_coef).

    Returns:
      The same record with other `policy` and `reference`, float32[B, P]; with reverse_kl the record itself.

    Raises:
      UserError: no such divergence.
    """
    if name == "reverse_kl":
        return lp
    if name not in SCORES:
        raise UserError(f"loss.divergence: {name!r} is none; known: reverse_kl, {', '.join(SCORES)}")
    x = log_ratios(lp)
    return lp._replace(policy=SCORES[name](x, alpha), reference=jnp.zeros_like(x))


SCORES: dict[str, Callable[[Array, float], Array]] = {
    "forward_kl": lambda x, _: power(x, -1.0),
    "js": lambda x, _: math.log(2) + log_sigmoid(x),
    "alpha": lambda x, alpha: power(x, alpha - 1.0),
}
