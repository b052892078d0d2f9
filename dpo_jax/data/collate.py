"""Examples from Python to packed batches: tokenize, collate."""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.data import pack
from dpo_jax.data.cache import cached_encode
from dpo_jax.data.encode import prompt_limit
from dpo_jax.data.sources import memory
from dpo_jax.data.sources.functions import open_source
from dpo_jax.data.table import Table
from dpo_jax.data.template import Template
from dpo_jax.errors import UserError
from dpo_jax.paths import cache_folder
from dpo_jax.records import Array, Batch

log = logging.getLogger(__name__)


def tokenize(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    max_length: int = 512,
    *,
    responses: int = 2,
    max_prompt_length: int | None = None,
    truncation: str = "paper_keep_end",
    degenerate: str = "drop",
    add_bos: bool | None = None,
    boundary: str = "auto",
    text_prompts: str = "auto",
    chat_template: str = "",
    skip_bad_rows: int = 0,
) -> Table:
    """Returns examples as a table of token ids, tokenized once and then read from the cache.

    The options and defaults are those of the config's section `data`. Dropped examples are counted in a warning.

    Args:
      rows: dicts with the columns of data files (`prompt`, `chosen`, `rejected`, ...), or a `datasets.Dataset`.
      tokenizer: a transformers tokenizer.
      max_length: tokens of a prompt and its longest response.
      responses: per prompt: 2 for pairs, 1 for fine-tuning, K for rankings.
      max_prompt_length: tokens of a prompt, for the paper's truncation; None: 256, or half of `max_length` if less.
      truncation: paper_keep_end, paper_keep_start, keep_start or refuse.
      degenerate: what to do with empty or identical responses: drop, refuse or keep.
      add_bos: put BOS before every prompt; None: as the tokenizer does.
      boundary: tokenize prompt and response "separate" or "joint"; "auto": texts separate, conversations joint.
      text_prompts: keep prompts that are "texts", or make each a user's "turns"; "auto": turns if one has a `system`.
      chat_template: a Jinja template for conversations; "" is the tokenizer's.
      skip_bad_rows: invalid examples to skip and count before failing.

    Raises:
      UserError: an invalid example (named `data[INDEX]`), or no example left.
    """
    if responses < 1:
        raise UserError(f"responses: {responses} per prompt; give 1 for fine-tuning, 2 for pairs, or more for rankings")
    held, name = set(memory.KEPT), memory.keep_examples(rows)
    try:
        table, report = cached_encode(
            open_source("memory", (name,), "train", responses, text_prompts=text_prompts),
            tokenizer,
            cache_folder() / "tokens",
            max_length=max_length,
            max_prompt_length=prompt_limit(max_length) if max_prompt_length is None else max_prompt_length,
            truncation=truncation,
            degenerate=degenerate,
            add_bos=add_bos,
            boundary=boundary,
            template=Template(chat_template),
            skip_bad_rows=skip_bad_rows,
        )
    finally:
        if name not in held:  # which a run may need again
            del memory.KEPT[name]
    log.log(logging.WARNING if report.kept < report.read else logging.INFO, "\n".join(report.lines()))
    return table


def collate(table: Table, indices: Sequence[int] | Array, layout: pack.Layout | None = None) -> tuple[Batch, int]:
    """Returns examples of a table as one packed batch, and the number of microbatches that hold any.

    The layout depends on the table and on `len(indices)` only, so that a step compiles once for a batch size.

    Args:
      table: from `tokenize`.
      indices: int[n], examples of the batch.
      layout: sizes of the batch, from `pack.choose_layout`; chosen for the table unless given.

    Returns:
      A Batch with fields [M, R, ...], whose `ref_logps` are NaN (see `with_reference`), and the count for the step.

    Raises:
      UserError: no index, or one outside the table.
    """
    chosen = np.asarray(indices)
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
        raise UserError(f"collate: {chosen.dtype} of shape {chosen.shape}; give one or more integer indices")
    if chosen.min() < 0 or chosen.max() >= len(table):
        worst = chosen.min() if chosen.min() < 0 else chosen.max()
        raise UserError(f"collate: index {worst} is outside the table of {len(table)} examples")
    batch, count, _ = pack.build_batch(table, chosen, layout or default_layout(table, len(chosen)))
    return batch, count


@functools.lru_cache(maxsize=8)
def default_layout(table: Table, size: int) -> pack.Layout:
    """Returns the layout of a batch of `size` examples that `collate` chooses."""
    return pack.choose_layout(table, max_length=int(table.lengths().max()) + 1, batch_size=size)
