"""The time of a step at the rates of data sheets: its matmuls, its memory traffic and its links.

The step is one of full rows: each token is scored, and attends to all before it in its row and window. A step of packed
comparisons has less attention and a shorter head, of which a plan knows nothing; its kernels reach less than the peak.
So these times are neither the least nor the most that a run takes.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dpo_jax.data.pack import Layout
from dpo_jax.models.architecture import OWNERS, Architecture
from dpo_jax.training.program import Collective
from dpo_jax.training.targets import Chip


class Work(NamedTuple):
    """What a step computes.

    Attributes:
      tokens: of its packed rows.
      useful: floating-point operations that the gradient needs, over all devices: two for each weight of a matmul and
        token, attention, and the head; the backward pass costs two forward.
      executed: the useful ones, those of what the backward pass computes again, and of other forward passes.
      traffic: bytes that pass between memory and chip on each device: state, gradients and weights, and each matmul's
        input and output.
    """

    tokens: int
    useful: float
    executed: float
    traffic: float


class Roofline(NamedTuple):
    """Seconds of a step of full rows on each device.

    Attributes:
      matmul: of the executed operations at the peak of bfloat16.
      memory: of the traffic.
      overlapped: of links, by collectives that run beside computation.
      exposed: of links, by collectives that the computation waits for.
      tokens_per_second: of all devices.
      mfu: useful operations over what the devices could do in that time. A pass of the reference is not useful in it.
    """

    matmul: float
    memory: float
    overlapped: float
    exposed: float
    tokens_per_second: float
    mfu: float

    @property
    def seconds(self) -> float:
        """Of a step: the longest of what runs at once, then what does not."""
        return max(self.matmul, self.memory, self.overlapped) + self.exposed


def matmul_weights(a: Architecture, experts: int | None = None) -> int:
    """Returns how many weights of the layers multiply a token; of a mixture with so many experts, or its chosen."""
    attention = attention_layers(a) * latent_weights(a) or a.width * (heads_numbers(a) - shared_numbers(a))
    rates = 2 * a.delta.value_heads if a.delta else 0
    linear = a.width * (delta_channels(a) + rates)
    mixing = attention + (a.layers - attention_layers(a)) * linear + 3 * a.width * a.layers * (a.layer_embedding or 0)
    return mixing + router_weights(a) + (3 if a.gated else 2) * a.width * inner_widths(a, experts)


def heads_numbers(a: Architecture) -> int:
    """Returns the numbers of a token that go in and out of attention in all layers, but latent attention: queries,
    output and gate, and keys and values of the layers that have their own."""
    kinds = [kind for kind in a.layer_kinds if kind != "delta"]
    queries = sum((2 + a.gated_attention) * a.heads * a.heads_in(kind).head_dim for kind in kinds)
    own = [a.heads_in(kind) for kind in kinds if kind not in OWNERS]
    return queries + sum(2 * heads.kv_heads * heads.head_dim for heads in own)


def shared_numbers(a: Architecture) -> int:
    """Returns how many numbers of values are those of a projection of keys, in all layers."""
    own = [a.heads_in(kind) for kind in a.layer_kinds if kind not in OWNERS]
    return sum(heads.kv_heads * heads.head_dim for heads in own if heads.keys_as_values)


def latent_weights(a: Architecture) -> int:
    """Returns how many weights of a layer's latent attention multiply a token; 0 without it."""
    if a.latent is None or a.rope is None:
        return 0
    rotated, keys, queries = a.rope.dims, a.latent.keys, a.latent.queries
    of_queries = a.width * queries + queries * a.heads * a.head_dim if queries else a.width * a.heads * a.head_dim
    of_keys = a.width * (keys + rotated) + keys * a.heads * (a.head_dim - rotated + a.value_dim)
    return of_queries + of_keys + a.heads * a.value_dim * a.width


def router_weights(a: Architecture) -> int:
    """Returns how many weights of routers, and of the gates of shared experts, multiply a token."""
    m = a.mixture
    return 0 if m is None else mixture_layers(a) * (m.experts + (m.shared is not None and m.gated_shared)) * a.width


def inner_widths(a: Architecture, experts: int | None = None) -> int:
    """Returns the inner widths of a token's MLPs in all layers; of a mixture that of so many experts, or its chosen."""
    if a.mixture is None:
        readers = sum(kind in OWNERS for kind in a.kinds)
        return (a.layers - readers) * a.mlp + readers * (a.reader_mlp or 0)
    width = a.mlp * (a.mixture.chosen if experts is None else experts) + (a.mixture.shared or 0)
    return mixture_layers(a) * width + (a.layers - mixture_layers(a)) * a.dense


def mixture_layers(a: Architecture) -> int:
    """Returns how many layers have a mixture."""
    return 0 if a.mixture is None else a.layers - a.kinds.count("dense")


def token_copies(a: Architecture, devices: int) -> int:
    """Returns how many rows of a mixture a device processes for each of its tokens; 0 without a mixture.

    Devices that shard the experts process the rows of all their tokens, whichever experts these chose.
    """
    return a.mixture.chosen * devices if a.mixture else 0


def attention_layers(a: Architecture) -> int:
    """Returns how many layers have attention; the others have linear attention."""
    return a.layers - a.kinds.count("delta")


def delta_channels(a: Architecture) -> int:
    """Returns the numbers of a token that go in and out of linear attention, with its gate."""
    d = a.delta
    return 0 if d is None else 2 * d.key_channels + 3 * d.value_channels


class Passes(NamedTuple):
    """How often a step runs the model.

    Attributes:
      adapters: the weights of the matmuls are frozen, and need no gradient.
      remat: what the backward pass computes again: none, dots or full.
      extra: forward passes beside that of the gradient: an online reference, a loss across comparisons or of routers.
    """

    adapters: bool
    remat: str
    extra: int


def step_work(
    a: Architecture,
    shape: Layout,
    passes: Passes,
    *,
    state: int,
    gradients: int,
    itemsize: int,
    devices: int,
    split: int,
    experts: int = 1,
) -> Work:
    """Returns the work of a train step.

    Args:
      a: the model.
      shape: of a batch; its rows are counted as full.
      passes: of the model.
      state: bytes of parameters and optimizer state on a device.
      gradients: bytes of the gradients on a device.
      itemsize: bytes of a number in the compute dtype.
      devices: that share the work.
      split: that share the heads, the MLP and the vocabulary of a row.
      experts: devices that shard the experts of a mixture; as many tokens are taken to choose each.
    """
    rows = shape.microbatches * shape.rows
    tokens, scored = rows * shape.length, rows * shape.scored
    layers = 2 * matmul_weights(a) * tokens
    attention = rows * score_work(a, shape.length) + state_work(a) * tokens
    head = 2 * a.width * (1 if a.score else a.vocab) * scored
    backward = 1 if passes.adapters else 2
    useful = (1 + backward) * (layers + head) + 3 * attention
    full = passes.remat == "full"
    again = head + attention / 2 + full * (layers + attention)  # logits by chunks, scores, the layers
    other = passes.extra * (layers + attention + head)
    many = 1 + backward + passes.extra + full
    held = a.mixture.experts // experts if a.mixture else None
    weights = itemsize * (matmul_weights(a, held) + 2 * a.vocab * a.width) * shape.microbatches * many / split
    copies = token_copies(a, experts)
    inner = (4 if a.gated else 2) * inner_widths(a, copies) + 4 * a.width * copies * mixture_layers(a)
    numbers = 4 * a.width * a.layers + inner + mixed_numbers(a) + embedding_numbers(a)
    activations = itemsize * numbers * tokens * many / devices
    update = 2 * (state + gradients) + 2 * gradients * shape.microbatches  # read and written; summed
    return Work(tokens, useful, useful + again + other, update + weights + activations)


def mixed_numbers(a: Architecture) -> int:
    """Returns the numbers of a token that go in and out of attention, or of linear attention, in all layers."""
    count = attention_layers(a)
    if a.latent is None or a.rope is None:
        mixed = heads_numbers(a)
    else:
        mixed = count * (2 * a.heads * (a.head_dim + a.value_dim) - (a.heads - 1) * a.rope.dims)
    return mixed + (a.layers - count) * delta_channels(a)


def embedding_numbers(a: Architecture) -> int:
    """Returns the numbers of a token that the matmuls of layers' embeddings read and write.

    The input of the projection of all layers, read once, is not counted.
    """
    return a.layers * (2 * a.width + 3 * a.layer_embedding) if a.layer_embedding else 0


def score_work(a: Architecture, length: int) -> int:
    """Returns the operations of attention on a row, in all layers: each query with the keys before it in its window."""
    windows = a.windows or (0,) * a.layers
    seen = [min(w or length, length) for w, kind in zip(windows, a.layer_kinds, strict=True) if kind != "delta"]
    pairs = [n * (n + 1) // 2 + (length - n) * n for n in seen]
    return 2 * a.heads * sum(dim * count for dim, count in zip(score_dims(a), pairs, strict=True))


def score_dims(a: Architecture) -> list[int]:
    """Returns the dimensions of a key and a value together, of each layer with attention."""
    if a.latent is not None:
        return [a.head_dim + a.value_dim] * attention_layers(a)
    return [2 * a.heads_in(kind).head_dim for kind in a.layer_kinds if kind != "delta"]


def state_work(a: Architecture) -> float:
    """Returns the operations on a token's states of linear attention: two reads and a write in each head and layer."""
    d = a.delta
    return 0 if d is None else 6 * (a.layers - attention_layers(a)) * d.key_dim * d.value_channels


def roofline(work: Work, found: Iterable[Collective], chip: Chip, groups: Sequence[int]) -> Roofline:
    """Returns the times of a step.

    Args:
      work: of the step.
      found: collectives of its program.
      chip: the share of one device.
      groups: of fast links, for each device in the order of the program.
    """
    links = {True: 0.0, False: 0.0}
    for c in found:
        links[c.overlapped] += c.sent * c.times / (chip.network if leaves(c, groups) else chip.link)
    matmul, memory = work.executed / len(groups) / chip.peak, work.traffic / chip.bandwidth
    seconds = max(matmul, memory, links[True]) + links[False]
    mfu = work.useful / len(groups) / chip.peak / seconds
    return Roofline(matmul, memory, links[True], links[False], work.tokens / seconds, mfu)


def leaves(collective: Collective, groups: Sequence[int]) -> bool:
    """Returns whether a collective goes over the network, that is between groups of fast links."""
    return any(len({groups[device] for device in group}) > 1 for group in collective.groups)
