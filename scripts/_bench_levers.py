"""dpo_jax with one of its savings taken away, so that scripts/bench --levers can say what each is worth.

Every lever leaves the losses as they are: only the work to get them changes.
"""

from functools import partial
from typing import Any

import numpy as np

from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.records import Batch

# name -> what is done without it
LEVERS = {
    "shared prefix": "each response behind a prompt of its own",
    "packing": "one comparison a row",
    "shared prefix and packing": "one comparison a row, each response behind a prompt of its own",
    "scored-only head": "logits of every position",
    "chunked head": "the logits of a microbatch at once",
    "causal chunks": "attention scores of whole rows",
    "kept activations": "remat: full",
    "short rows": "rows of 2048 tokens, two a microbatch",
}


def shape_of(lever: str, table: Table, max_length: int, batch_size: int) -> pack.Layout:
    """Returns the layout with a lever off."""
    if lever == "short rows":
        return pack.choose_layout(table, max_length=max_length, batch_size=batch_size, length=2048, rows=2)
    shape = pack.choose_layout(table, max_length=max_length, batch_size=batch_size)
    if lever in ("shared prefix", "shared prefix and packing"):
        longest = int((table.lengths() + table.prompt_lengths).max())
        length = max(shape.length, -(-longest // 128) * 128)
        scored = max(shape.scored, -(-int(table.scored_lengths.max()) // 64) * 64)
        shape = shape._replace(length=length, scored=scored, microbatches=-(-batch_size // shape.rows))
    if lever in ("packing", "shared prefix and packing"):
        shape = shape._replace(segments=1, microbatches=-(-batch_size // shape.rows))
    return shape


def build(lever: str, table: Table, rows: np.ndarray, shape: pack.Layout) -> tuple[Batch, int]:
    """Returns a step's batch with a lever off, and its number of microbatches."""
    if lever in ("shared prefix", "shared prefix and packing"):
        return _separate(table, rows, shape)
    batch, count, _ = pack.build_batch(table, rows, shape)
    return (_everywhere(batch) if lever == "scored-only head" else batch), count


def logps_of(lever: str, model: Any) -> Any:
    """Returns `(params, microbatch) -> Logps` with a lever off."""
    from dpo_jax.logprobs import batch_logps
    from dpo_jax.models.attention import packed_attention

    if lever == "causal chunks":  # the size of a chunk is no option of a model, since no other is faster
        packed_attention.__kwdefaults__ = {"chunk": 1 << 20}
    return partial(batch_logps, model, chunk=1 << 20) if lever == "chunked head" else partial(batch_logps, model)


def _separate(table: Table, rows: np.ndarray, shape: pack.Layout) -> tuple[Batch, int]:
    """Lays out [prompt | chosen] [prompt | rejected] for every comparison: the slots are those of the shared layout."""
    lengths = (table.lengths() + table.prompt_lengths)[rows]
    plan = pack.plan_rows(lengths, table.scored_lengths[rows], shape)
    ints = [np.zeros((shape.microbatches, shape.rows, n), np.int32) for n in (shape.length,) * 4 + (shape.scored,) * 3]
    tokens, positions, group, branch, source, target, slot = ints
    slot -= 1
    weights = np.zeros((shape.microbatches, shape.rows, shape.segments), np.float32)
    for number, members in enumerate(plan):
        at, token, score = divmod(number, shape.rows), 0, 0
        for place, member in enumerate(members):
            one = table[int(rows[member])]
            weights[at][place] = one.weight
            for p, response in enumerate(one.responses):
                ids = np.concatenate([one.prompt, response[:-1]])
                row, out = slice(token, token + len(ids)), slice(score, score + len(response))
                tokens[at][row], positions[at][row], group[at][row] = ids, np.arange(len(ids)), 2 * place + p + 1
                source[at][out] = token + np.arange(len(one.prompt) - 1, len(ids))
                target[at][out], slot[at][out] = response, 2 * place + p
                token, score = row.stop, out.stop
    hard, scores = (weights > 0).astype(np.float32), np.zeros((*weights.shape, 2), np.float32)
    ref_logps = np.full((*scores.shape, 2), np.nan, np.float32)
    batch = Batch(tokens, positions, group, branch, source, target, slot, weights, hard, scores, ref_logps)
    return batch, -(-len(plan) // shape.rows)


def _everywhere(batch: Batch) -> Batch:
    """Has as many logits computed as a row has tokens: those that nothing scores go to a place that is thrown away."""
    places = batch.weights.shape[-1] * batch.scores.shape[-1]
    extra = max(0, batch.tokens.shape[-1] - batch.slot.shape[-1])
    widen = partial(np.pad, pad_width=[(0, 0), (0, 0), (0, extra)])
    slot = widen(batch.slot, constant_values=-1)
    return batch._replace(
        source=widen(batch.source), target=widen(batch.target), slot=np.where(slot < 0, places, slot).astype(np.int32)
    )
