"""A decoder-only language model as pure functions of its parameters: the interface that the package uses."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax.models.architecture import Architecture
from dpo_jax.models.attention import CHUNKS
from dpo_jax.models.cache import Cache
from dpo_jax.records import Array
from dpo_jax.sharding.row_split import RowSplit


class Model(NamedTuple):
    """The pure functions of one architecture. Parameters are a nested dict of float32, layers stacked on axis 0.

    Axis letters: R rows, T tokens, D model width, V vocabulary, P prompts, B = P * copies sequences.

    Attributes:
      architecture: shapes and options of the model.
      init: key -> params, random as Hugging Face initializes them. Jit it: it traces the model on one token.
      hidden: (params, tokens, positions, segment_ids, branch_ids), each int32[R, T] -> hidden states [R, T, D] after
        the final norm. Keyword `gather` all-gathers the parameters of each layer just before use; keyword `exchange`
        looks embeddings up in parts of the table (`Collectives.exchange`); keyword `attend` replaces
        `packed_attention`; keyword `split` returns those of this device's tokens only, [R, T / parts, D]; keyword
        `counted` float32[R, T] also returns the mean over layers of `experts.routing_of` [R, 2, E]; keyword `experts`
        says how devices shard the experts of a mixture (`Collectives.experts`).
      head: params -> float32[V, D]. Logits are hidden @ head.T, then `capped` by the architecture's `logit_cap`. A
        head bias is one more column of the head, multiplied by a column of ones in the hidden states. The head of a
        reward model is float32[1, D], and its product with a hidden state is the reward of the text up to there.
      prefill: (params, tokens, positions, mask, copies, room) -> hidden states [P, T, D] of P prompts, which end at
        the right, and a cache in which `copies` sequences share each prompt, with capacity for `room` generated
        tokens; `mask` int32[P, T] is 1 for real tokens, 0 for left padding. Keywords `gather` and `exchange`, as well
        as those of `decode`, are those of `hidden`.
      unstack: params -> decode-time params: one tree per layer, kernels cast to the compute dtype. A copy, made once
        per generation.
      decode: (params, token [B], position [B], cache, valid, generated) -> hidden states [B, D] and the cache with the
        new tokens; `generated` tokens per sequence precede them. `valid` bool[P, T] is True for real prompt tokens,
        False for left padding.
      axes: tree like params; the leaves are tuples with the logical name of each axis.
      compute: dtype of activations and matmuls.
      split_head: params -> the head in parts, which `split_token_logps` takes, where no device is to hold the whole;
        None where `head` is used.
      attention: name of the attention backend in `hidden`. The other functions always use the built-in one.
      split: how devices share the tokens of a row in `hidden`; None if each has whole rows.
      router_loss: weight of the router loss (`routing.load_balance`) in a step; 0 for none.
      hf_config: contents of the config.json it was loaded from; None if it was built from an architecture.
      end_ids: ids of the tokens that end a text, by the folder it was loaded from; () if it was built.
    """

    architecture: Architecture
    init: Callable[[Array], Any]
    hidden: Callable[..., Array]
    head: Callable[[Any], Array]
    prefill: Callable[[Any, Array, Array, Array, int, int], tuple[Array, Cache]]
    unstack: Callable[[Any], Any]
    decode: Callable[[Any, Array, Array, Cache, Array, Array], tuple[Array, Cache]]
    axes: Any
    compute: str = "float32"
    split_head: Callable[[Any], Any] | None = None
    attention: str = CHUNKS
    split: RowSplit | None = None
    router_loss: float = 0.0
    hf_config: Any = None
    end_ids: tuple[int, ...] = ()
