"""Film reviews (Maas et al. 2011), of which the paper's first experiment takes the beginnings as prompts."""

import re
from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, Note, expand_examples, prompt_hash
from dpo_jax.data.sources.columns import text_column
from dpo_jax.data.sources.files import file_rows
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

HUB_ID = "stanfordnlp/imdb"
LEAST, MOST = 2, 8
WORD = re.compile(r"\s*\S+")
LINE_BREAK = re.compile(r"\s*(?:<br\s*/?>\s*)+")


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """The reviews, each cut after two to eight words: the prompt, and the rest as its one response.

    How many words is a draw that depends on the review alone, each number as likely; the paper counts tokens, but the
    data must not depend on a tokenizer. Line breaks written in HTML are spaces. Preferences between two continuations
    are made, not read: sample and score them with `dpo-jax pairs`.

    Args:
      path: hub ids, folders or files with the column text; nothing is `stanfordnlp/imdb`.
      split: `train`, `test` or `unsupervised`.
      responses: 0 or 1.

    Raises:
      UserError: the data cannot be found, or pairs are asked for.
    """
    if responses not in (0, 1):
        raise UserError("data source 'imdb' has reviews, no preferences; make pairs from a model with dpo-jax pairs")
    return expand_examples(file_rows(path or (HUB_ID,), split), lambda where, row: [_review(where, row, responses)])


def _review(where: str, row: dict[str, Any], responses: int) -> Item:
    review = LINE_BREAK.sub(" ", text_column(where, row, "text")).strip()
    words = WORD.findall(review)
    size = LEAST + int((MOST - LEAST + 1) * prompt_hash(review))
    if len(words) <= size:
        return Note("reviews left out, which are no longer than their prompt")
    prompt = "".join(words[:size])
    return Comparison(prompt, (review[len(prompt) :],)[:responses], where=where)
