"""Options of every term of an objective: transforms of its log-probs, weights of its values."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.nn import log_sigmoid

from dpo_jax.errors import UserError
from dpo_jax.losses.parts import chi_squared_score, log_ratios, power
from dpo_jax.losses.registry import Entry
from dpo_jax.records import Array, Logps, Missing

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha", "chi2_kl"]


def diverge(lp: Logps, name: Divergence, alpha: float = 0.5) -> Logps:
    """Replaces log-ratios by the scores s of an f-divergence (f-DPO, arXiv 2309.16240): `policy` = s, `reference` = 0.

    A policy that maximises reward - beta D_f(pi, ref) has rewards beta f'(pi / ref) up to a constant; with the reverse
    KL they are beta log(pi / ref). With t = pi / ref and x = log t the scores are

        reverse_kl   f'(t) = log t                              s = x
        forward_kl   f'(t) = 1 - 1/t                            s = 1 - e^-x
        js           f'(t) = log(2 t / (1 + t))                 s = log 2 + log sigmoid(x)
        alpha        f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)  s = (e^((alpha - 1) x) - 1) / (alpha - 1)
        chi2_kl      f'(t) = t - 1 + log t                      s = e^x - 1 + x

    all with s(0) = 0, so that they can be divided by lengths. alpha -> 1 is the reverse KL, alpha = 0 the forward KL.
    chi2_kl is chi^2 / 2 + reverse KL, of chi-squared preference optimization (arXiv 2407.13399).
    Exponents are clipped at 80, as in TRL; the gradient is 0 beyond.

    Args:
      lp: log-probs of B comparisons, after length desensitisation.
      name: the divergence.
      alpha: of the alpha-divergence (TRL's f_alpha_divergence_coef).

    Returns:
      The record with other `policy` and `reference`, float32[B, P]; unchanged for reverse_kl.

    Raises:
      UserError: an unknown divergence.
    """
    if name == "reverse_kl":
        return lp
    if name not in DIVERGENCES:
        raise UserError(f"loss.divergence: {name!r} is none; known: reverse_kl, {', '.join(DIVERGENCES)}")
    x = log_ratios(lp)
    return lp._replace(policy=DIVERGENCES[name](x, alpha), reference=jnp.zeros_like(x))


DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "forward_kl": lambda x, _: power(x, -1.0),
    "js": lambda x, _: math.log(2) + log_sigmoid(x),
    "alpha": lambda x, alpha: power(x, alpha - 1.0),
    "chi2_kl": lambda x, _: chi_squared_score(x),
}
Values = Callable[[Logps], Array]


def transformed(
    lp: Logps,
    *,
    reference_free: bool = False,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha", "chi2_kl"] = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float = 1.0,
) -> Logps:
    """Returns the log-probs that the loss of a term reads.

    Args:
      lp: log-probs of B comparisons.
      reference_free: Set log pi_ref to 0, as the original code's option.
      divergence: The f-divergence from the reference (Wang et al. 2023, arXiv 2309.16240).
      divergence_alpha: alpha of the alpha-divergence.
      ld_alpha: Weight of the tokens beyond the length of the shorter response (LD-DPO, arXiv 2409.06411).
    """
    if isinstance(ld_alpha, Tracer) or ld_alpha != 1.0:
        less = 1.0 - ld_alpha
        lp = lp._replace(
            policy=lp.policy - less * (lp.policy - lp.policy_shared),
            reference=lp.reference - less * (lp.reference - lp.reference_shared),
        )
    if reference_free:
        lp = lp._replace(reference=jnp.zeros_like(lp.reference))
    return diverge(lp, divergence, divergence_alpha)


def rejected_part(lp: Logps, *, rejected_weight: float = 1.0, rejected_mixture: float = 1.0) -> Logps:
    """Returns log-probs whose rejected response counts less; with a soft label, the one that is taken for rejected.

        r -> f r                             DPO-Shift, f = rejected_weight
        r -> log(lambda e^r + 1 - lambda)    BDPO, lambda = rejected_mixture

    Args:
      lp: log-probs of B pairs.
      rejected_weight: Factor of the rejected response's log-probs (DPO-Shift, arXiv 2502.07599).
      rejected_mixture: The policy's share in a mixture with the reference for the rejected response (BDPO, arXiv
        2506.12725).
    """
    policy, reference = lp.policy, lp.reference
    if policy.shape[1] != 2:  # other losses have the defaults, which change nothing
        return lp
    if isinstance(rejected_mixture, Tracer) or rejected_mixture != 1.0:
        mixed = jnp.asarray(rejected_mixture) < 1.0  # of a whole policy the reference may be missing
        r = jnp.where(mixed, log_ratios(lp)[:, 1], 0.0)
        lift = jnp.logaddexp(jnp.log(rejected_mixture), jnp.log1p(-jnp.asarray(rejected_mixture)) - r)
        policy = policy + jnp.stack([jnp.zeros_like(lift), lift], axis=1)
    if isinstance(rejected_weight, Tracer) or rejected_weight != 1.0:
        factor = jnp.stack([jnp.ones(()), rejected_weight])
        policy = factor * policy
        reference = reference if isinstance(reference, Missing) else factor * reference
    return lp._replace(policy=policy, reference=reference)


def weighted(value: Array, lp: Logps, *, weight: float = 1.0, wpo: bool = False) -> Array:
    """Returns the contribution of a term to the objective, float32[B].

    Args:
      value: the loss, float32[B].
      lp: its log-probs.
      weight: Factor of this loss among several terms.
      wpo: Weight pairs by their probability under the policy (WPO, arXiv 2406.11827, eq. 2).
    """
    return weight * value * (wpo_weight(lp) if wpo else 1.0)


def wpo_weight(lp: Logps) -> Array:
    """Returns WPO's weight of a pair, float32[B], without gradient (arXiv 2406.11827, section 3).

    It is the probability of both responses per token, relative to responses sampled from the policy.
    """
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(lp.confidence, axis=1)))


def soft_label(lp: Logps, values: Values) -> Array:
    """Returns the expected pairwise loss, float32[B], if the label is right with probability `lp.preference`."""
    swapped = map_responses(lp, lambda x: x[:, ::-1])
    return lp.preference * values(lp) + (1.0 - lp.preference) * values(swapped)


PER_RESPONSE = tuple(name for name in Logps._fields if name not in ("weights", "preference", "running", "routing"))


def first_responses(lp: Logps, responses: int) -> Logps:
    """Returns the log-probs of the first responses only."""
    return map_responses(lp, lambda x: x[:, :responses])


def map_responses(lp: Logps, function: Callable[[Array], Array]) -> Logps:
    """Returns the record with a function of each field [B, P] that is there."""
    given = {name: getattr(lp, name) for name in PER_RESPONSE}
    return lp._replace(**{name: function(x) for name, x in given.items() if not isinstance(x, Missing | tuple)})


def example_logps(comparisons: int, responses: int) -> Logps:
    """Returns the abstract log-probs of a batch without token weights."""
    row = jax.ShapeDtypeStruct((comparisons, responses), jnp.float32)
    number = jax.ShapeDtypeStruct((comparisons,), jnp.float32)
    rest = {"present": jax.ShapeDtypeStruct(row.shape, jnp.bool_), "running": jax.ShapeDtypeStruct((), jnp.float32)}
    return Logps(**dict.fromkeys(PER_RESPONSE, row) | {"weights": number, "preference": number, "mass": ()} | rest)


def check_term(name: str, entry: Entry, options: dict) -> None:
    """Rejects options that have no effect on a loss, or no meaning for it.

    Raises:
      UserError: with the reason.
    """
    pair = entry.responses == 2 and not entry.whole_batch and not entry.rewards
    if any(isinstance(value, Tracer) for value in options.values()):
        return  # traced values were checked before tracing
    reasons = {
        "weight": not options["weight"] > 0 and "set a weight above 0",
        "reference_free": options["reference_free"] and _against_no_reference(entry),
        "divergence": options["divergence"] != "reverse_kl" and _against_divergence(entry, options),
        "divergence_alpha": options["divergence"] != "alpha"
        and options["divergence_alpha"] != (transformed.__kwdefaults__ or {})["divergence_alpha"]
        and "only divergence alpha has one",
        "ld_alpha": _against_ld(entry, options["ld_alpha"]),
        "wpo": options["wpo"] and not pair and "it weights single pairs, and this loss has none",
        "rejected_weight": _against_rejected(entry, options, "rejected_weight"),
        "rejected_mixture": _against_rejected(entry, options, "rejected_mixture"),
    }
    for key, reason in reasons.items():
        if reason:
            raise UserError(f"loss {name}: {key} {options[key]} cannot be used: {reason}")


def _against_no_reference(entry: Entry) -> str | bool:
    if not entry.uses_reference:
        return "it has no reference anyway"
    return entry.needs_reference and "with these options its value depends on the order of the reference's margins"


def _against_divergence(entry: Entry, options: dict) -> str | bool:
    if options["reference_free"]:
        return "without a reference there is nothing to diverge from"
    if not entry.uses_reference:
        return "it has no reference to diverge from"
    return not entry.divergences and "the loss is defined for the reverse KL only"


def _against_ld(entry: Entry, ld_alpha: float) -> str | bool:
    if ld_alpha == 1 or (0 <= ld_alpha < 1 and entry.responses != 1 and not entry.mismatched and not entry.rewards):
        return False
    return "it is from 0 to 1, for losses that compare log-probs of responses"


def _against_rejected(entry: Entry, options: dict, key: str) -> str | bool:
    if options[key] == 1.0:
        return False
    if not 0 < options[key] < 1 or entry.responses != 2 or entry.whole_batch or entry.rewards:
        return "it is above 0 and at most 1, for losses of single pairs"
    other = not entry.uses_reference or options["reference_free"] or options["divergence"] != "reverse_kl"
    return key == "rejected_mixture" and other and "it mixes the policy with the reference, whose KL is the reverse one"
