"""Records that pass between the layers. They are the architecture; the rest of the package maps one to the next.

Axis letters: R rows, T tokens in a row, G comparisons in a row, P responses to a prompt, S scored tokens in a row,
B = R * G comparisons, D model width, H heads, K key-value heads, V vocabulary, L layers, M microbatches.

A record holds numpy arrays on the host and jax.Arrays on devices; tests/test_records.py checks the annotated shapes.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from dpo_jax.errors import UserError, closest

Array = Any  # an array whose shape the docstring gives; numpy on the host, jax.Array on a device
PerToken = Int32[Any, "*M R T"]
PerScored = Int32[Any, "*M R S"]
PerComparison = Float32[Any, " B"]
PerResponse = Float32[Any, "B P"]

# Two programs that compute the same float32 sum of token log-probs differ by a few units in its last place.
FLOAT32_ROUNDING = 4 * 2.0**-23


class Chat(NamedTuple):
    """A conversation before the assistant's turn; the tokenizer's chat template renders it as text.

    Attributes:
      messages: objects with `role`, `content` and other fields of the template, oldest first.
      tools: descriptions of the functions that the model may call.
      options: further arguments of the template.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})


class Comparison(NamedTuple):
    """One prompt and its responses, best first.

    Attributes:
      prompt: the text before every response, or a conversation.
      responses: P responses, best first; P = 1 is supervised fine-tuning, P = 2 a preference pair. Each is a text, an
        assistant message after a conversation or a list of turns, or None for an absent response.
      weight: multiplies the loss of this comparison.
      where: `file:line` (or the like) for error messages.
      preference: the probability that the first response is the better one.
      scores: ratings of the responses by the data's authors; () without ratings.
      misplaced: True if a response continues some other dialogue instead of this prompt.
      token_weights: of each response, numbers for its tokens or spans, as `data.token_weights` has them; () for all 1.
    """

    prompt: str | Chat
    responses: tuple[Any, ...]
    weight: float = 1.0
    where: str = ""
    preference: float = 1.0
    scores: tuple[float, ...] = ()
    misplaced: bool = False
    token_weights: tuple[tuple[Any, ...], ...] = ()


class Tokens(NamedTuple):
    """One comparison as token ids, cut to length.

    Attributes:
      prompt: int32[n], n >= 1.
      responses: P arrays int32[n_p]; the last id is EOS unless the response was cut; an absent response has no ids,
        and at most P - 1 are absent.
      weight: multiplies the loss of this comparison.
      prompt_key: uint64, equal for equal prompts before truncation.
      preference: the probability that the first response is the better one.
      scores: ratings of the responses; () without ratings.
      scored: P arrays bool[n_p], whether a token of the response is scored; () if all are.
      token_weights: P arrays float32[n_p], factors of their log-probs; () if all are 1.
    """

    prompt: Int32[Any, " n"]
    responses: tuple[Int32[Any, " _"], ...]
    weight: float = 1.0
    prompt_key: int = 0
    preference: float = 1.0
    scores: tuple[float, ...] = ()
    scored: tuple[Bool[Any, " _"], ...] = ()
    token_weights: tuple[Float32[Any, " _"], ...] = ()

    def mask(self, p: int) -> Bool[Any, " _"]:
        """Returns bool[n_p], whether each token of response p is scored."""
        return self.scored[p] if self.scored else np.ones(len(self.responses[p]), bool)

    def weights_of(self, p: int) -> Float32[Any, " _"]:
        """Returns the weight of each token of response p."""
        return self.token_weights[p] if self.token_weights else np.ones(len(self.responses[p]), np.float32)


class Batch(NamedTuple):
    """Comparisons packed in rows as [prompt | response 1 | ... | response P], several to a row.

    A response's last token is not in the row: its hidden state predicts nothing that is scored. Every field may carry a
    leading axis M of microbatches.

    Attributes:
      tokens: int32[R, T], input ids; 0 where `segment_ids` is 0.
      positions: int32[R, T], continuing from the prompt's end in every response.
      segment_ids: int32[R, T], 1 + the comparison's place in the row; 0 is padding.
      branch_ids: int32[R, T], 0 for the prompt, 1 + p for response p.
      source: int32[R, S], the position in the row whose hidden state predicts a scored token.
      target: int32[R, S], the id of that scored token.
      slot: int32[R, S], g * P + p for response p of comparison g; -1 is padding.
      weights: float32[R, G], 0 for absent comparisons.
      preference: float32[R, G], the probability that the first response is the better one.
      scores: float32[R, G, P], ratings of the responses; 0 without ratings.
      ref_logps: float32[R, G, P, 2], log pi_ref(y | x) summed over the response and over its shared part (see `Logps`);
        NaN until filled in.
      token_weights: float32[R, S], factors of the log-probs of scored tokens; () in data without them.
    """

    tokens: PerToken
    positions: PerToken
    segment_ids: PerToken
    branch_ids: PerToken
    source: PerScored
    target: PerScored
    slot: PerScored
    weights: Float32[Any, "*M R G"]
    preference: Float32[Any, "*M R G"]
    scores: Float32[Any, "*M R G P"]
    ref_logps: Float32[Any, "*M R G P 2"]
    token_weights: Float32[Any, "*M R S"] | tuple[()] = ()


class Missing:
    """A field of `Logps` that was not given; using it in any way is a UserError that names it.

    It is a pytree without leaves, so that a record with missing fields passes through jit and grad.
    """

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") and attribute not in ("__jax_array__", "__array__"):
            raise AttributeError(attribute)  # copy and pickle look for hooks that may be absent
        return self._refuse()

    def _refuse(self, *_: Any) -> Any:
        raise UserError(f"Logps.{self.name} is missing and this loss reads it; give Logps.of(..., {self.name}=...)")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __matmul__ = __rmatmul__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _refuse
    __eq__ = __ne__ = __abs__ = __pow__ = __rpow__ = _refuse
    __hash__ = object.__hash__
    __neg__ = __getitem__ = __gt__ = __lt__ = __ge__ = __le__ = __len__ = __float__ = __bool__ = _refuse


class Logps(NamedTuple):
    """Sequence log-probabilities of B comparisons: the only input of a loss.

    The shared part of a response is its first n tokens, where n is the length of the comparison's shortest response.

    Attributes:
      policy: float32[B, P], log pi(y | x), summed over the response's tokens, by their weights if they have any; the
        reward r(x, y) for the loss of a reward model.
      reference: float32[B, P], the same under the frozen reference.
      policy_shared: float32[B, P], log pi summed over the shared part.
      reference_shared: float32[B, P], the same under the reference.
      lengths: float32[B, P], scored tokens of each response, EOS included; 0 for an absent response.
      present: bool[B, P], False for an absent response or comparison.
      weights: float32[B], 0 for absent comparisons.
      preference: float32[B], the probability that the first response is the better one; 1 for a hard label.
      scores: float32[B, P], ratings of the responses; 0 without ratings.
      confidence: float32[B, P], mean over tokens of log pi(y_t) - log sum_v pi(v)^2; NaN unless the loss asks for it.
      rounding: float32[B, P], nats by which rounding may move `policy` or `reference`: smaller log-ratios are noise.
      running: float32[] or float32[n], the statistic that a loss carries from step to step; 0 without one.
      routing: float32[N, 2, E], what the routers of a mixture did with each row (`experts.routing_of`); () if no step
        reads it.
      mass: float32[B, P], the sum of the weights of each response's scored tokens, which means over tokens are divided
        by; () where all weights are 1, so that it is `lengths`.
    """

    policy: PerResponse
    reference: PerResponse
    policy_shared: PerResponse
    reference_shared: PerResponse
    lengths: PerResponse
    present: Bool[Any, "B P"]
    weights: PerComparison
    preference: PerComparison
    scores: PerResponse
    confidence: PerResponse
    rounding: PerResponse
    running: Float32[Any, "..."]
    routing: Float32[Any, "N 2 E"] | tuple[()] = ()
    mass: PerResponse | tuple[()] = ()

    @classmethod
    def of(cls, policy: Any, reference: Any = None, **fields: Any) -> "Logps":
        """Returns the record of plain arrays or nested lists; a field that is not given is `Missing`.

        Args:
          policy: float[B, P], log-probs of P responses per prompt, best first.
          reference: float[B, P], the same under the reference; may be missing for losses without one.
          **fields: any other field of the record; by default `present` is `lengths` > 0, `weights` and `preference`
            are 1, `running` is 0, `rounding` is that of float32, and `mass` is `lengths`.

        Raises:
          UserError: an unknown field, or one of another shape than [B, P] (or [B]).
        """
        given = {"policy": policy, "reference": reference} | fields
        if unknown := sorted(given.keys() - set(cls._fields)):
            raise UserError(f"Logps has no field {unknown[0]!r}; {closest(unknown[0], cls._fields)}")
        if policy is None:
            raise UserError("Logps.policy is None; give the log-probs [B, P] under the policy")
        given = {name: _as_array(name, v) for name, v in given.items() if v is not None}
        both = np.shape(given["policy"])
        if len(both) != 2:
            raise UserError(f"Logps.policy: shape {both}; give [B, P], one row per prompt, e.g. policy[None] for one")
        magnitude = abs(given["policy"]) + (abs(given["reference"]) if "reference" in given else 0.0)
        one, there = np.ones(both[0], np.float32), given["lengths"] > 0 if "lengths" in given else np.ones(both, bool)
        derived = {"present": there, "rounding": FLOAT32_ROUNDING * magnitude, "weights": one, "preference": one}
        given = derived | {"running": np.float32(0.0)} | given
        for name, value in given.items():
            shape = both[:1] if name in ("weights", "preference") else both
            shape = np.shape(value)[:1] if name == "running" else shape
            if np.shape(value) != shape:
                raise UserError(f"Logps.{name}: shape {np.shape(value)}, expected {shape}, as policy has {both}")
        return cls(**{name: Missing(name) for name in cls._fields if name not in cls._field_defaults} | given)


def _as_array(name: str, value: Any) -> Any:
    return value if hasattr(value, "shape") else np.asarray(value, bool if name == "present" else np.float32)


class TrainState(NamedTuple):
    """Everything that training changes; arrays only.

    Attributes:
      step: int32[], updates done.
      params: pytree of float32 arrays, the policy (or its adapters).
      opt_state: the state of the optimizer.
      running: float32[K], the statistics of the terms of the loss, one after another (`Loss.carried`).
      reference: pytree like params for a reference that moves; () for a frozen one.
    """

    step: Int32[Any, ""]
    params: Any
    opt_state: Any
    running: Float32[Any, " K"]
    reference: Any


class Sync(NamedTuple):
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656).

    Every `every` steps it becomes alpha * policy + (1 - alpha) * reference. alpha 1 is the paper's hard update; every 1
    is an exponential average.
    """

    every: int
    alpha: float
