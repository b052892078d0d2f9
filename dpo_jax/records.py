"""The records that pass between the layers: they are the architecture, the rest is functions from one to the next.

Axis letters, everywhere: R rows, T tokens in a row, G comparisons in a row, P responses to a prompt, S scored
tokens in a row, B = R * G comparisons, D model width, H heads, K key-value heads, V vocabulary, L layers,
M microbatches.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax on a device: a record is the same on both sides


class Chat(NamedTuple):
    """A conversation up to the turn that is to be answered; the tokenizer's chat template makes it text.

    Attributes:
      messages: objects with `role`, `content` and what else the template reads, oldest first.
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
        assistant's message where the prompt is a conversation, or None where it is absent.
      weight: multiplies the loss of this comparison.
      where: `file:line` (or the like) for error messages.
      preference: the probability that the first response is the better one.
      scores: a rating of each response by whoever made the data, or nothing.
      misplaced: whether a response is no answer to the prompt but a piece of some other dialogue.
    """

    prompt: str | Chat
    responses: tuple[Any, ...]
    weight: float = 1.0
    where: str = ""
    preference: float = 1.0
    scores: tuple[float, ...] = ()
    misplaced: bool = False


class Tokens(NamedTuple):
    """One comparison as token ids, cut to length.

    Attributes:
      prompt: int32[n], n >= 1.
      responses: P arrays int32[n_p]; the last id is EOS unless the response was cut; an absent one, of which there is
        at most P - 1, has no ids.
      weight: multiplies the loss of this comparison.
      prompt_key: uint64, equal for comparisons of the same prompt, as it was before any cut.
      preference: the probability that the first response is the better one.
      scores: a rating of each response, or nothing.
    """

    prompt: Array
    responses: tuple[Array, ...]
    weight: float = 1.0
    prompt_key: int = 0
    preference: float = 1.0
    scores: tuple[float, ...] = ()


class Batch(NamedTuple):
    """Comparisons laid out in rows as [prompt | response 1 | ... | response P], several to a row.

    A response's last token is not in the row, since its hidden state would predict nothing that is scored.
    Every field may carry a leading axis M of microbatches.

    Attributes:
      tokens: int32[R, T], input ids; 0 where `group` is 0.
      positions: int32[R, T], continuing from the prompt's end in every response.
      group: int32[R, T], 1 + the comparison's place in the row; 0 is padding.
      branch: int32[R, T], 0 for the prompt, 1 + p for response p.
      source: int32[R, S], the place in the row whose hidden state predicts a scored token.
      target: int32[R, S], the id of that scored token.
      slot: int32[R, S], place * P + p, the response to which it belongs; -1 is padding.
      weights: float32[R, G], 0 where there is no comparison.
      preference: float32[R, G], the probability that the first response is the better one.
      scores: float32[R, G, P], ratings of the responses; 0 where there is none.
      ref_logps: float32[R, G, P, 2], log pi_ref(y | x) summed over the response, and over as many of its first tokens
        as the comparison's shortest response has; NaN until it is filled in.
    """

    tokens: Array
    positions: Array
    group: Array
    branch: Array
    source: Array
    target: Array
    slot: Array
    weights: Array
    preference: Array
    scores: Array
    ref_logps: Array


class Logps(NamedTuple):
    """Sequence log-probabilities of B comparisons: all that a loss may look at.

    The shared part of a response is as many of its first tokens as the comparison's shortest response has.

    Attributes:
      policy: float32[B, P], log pi(y | x), summed over the response's tokens; for the loss of a reward model its
        reward r(x, y).
      reference: float32[B, P], the same under the frozen reference.
      policy_shared: float32[B, P], log pi summed over the shared part.
      reference_shared: float32[B, P], the same under the reference.
      lengths: float32[B, P], scored tokens of each response, EOS included; 0 where it is absent.
      present: bool[B, P], false where a response (or the whole comparison) is absent.
      weights: float32[B], 0 for absent comparisons.
      preference: float32[B], the probability that the first response is the better one; 1 for a hard label.
      scores: float32[B, P], ratings of the responses; 0 where there is none.
      confidence: float32[B, P], mean over tokens of log pi(y_t) - log sum_v pi(v)^2; NaN unless it was asked for.
      running: float32[], the statistic that a loss carries from step to step, if it has one.
    """

    policy: Array
    reference: Array
    policy_shared: Array
    reference_shared: Array
    lengths: Array
    present: Array
    weights: Array
    preference: Array
    scores: Array
    confidence: Array
    running: Array


class TrainState(NamedTuple):
    """All that training changes; arrays only.

    Attributes:
      step: int32[], updates done.
      params: pytree of float32 arrays, the policy.
      opt_state: the optimiser's state.
      running: float32[K], what each of the loss's terms carries from step to step.
      reference: pytree like params, a reference that moves; () for one that does not.
    """

    step: Array
    params: Any
    opt_state: Any
    running: Array
    reference: Any
