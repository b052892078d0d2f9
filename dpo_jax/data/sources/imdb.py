"""IMDb film reviews (Maas et al. 2011): the paper's first experiment uses their beginnings as prompts."""

import re
from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, Note, expand_examples, prompt_hash
from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.values import text_column
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COLUMNS = "text"
HUB_ID = "stanfordnlp/imdb"
LEAST, MOST = 2, 8  # words in a prompt
WORD = re.compile(r"\s*\S+")
LINE_BREAK = re.compile(r"\s*(?:<br\s*/?>\s*)+")


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields the reviews, split after two to eight words: the prompt, and the rest as its one response.

    The number of words is uniform and a hash of the review. The paper counts tokens instead, but a source does not
    know the tokenizer. Line breaks in HTML become spaces. The data has no preferences: sample and score continuations
    with `dpo-jax pairs`.

    Args:
      path: hub ids, folders or files with a column `text`; () for `stanfordnlp/imdb`.
      split: `train`, `test` or `unsupervised`.
      responses: 0 or 1.

    Raises:
      UserError: the data cannot be read, or pairs are asked for.
    """
    if responses not in (0, 1):
        raise UserError("data source 'imdb' has reviews, no preferences; make pairs from a model with dpo-jax pairs")
    return expand_examples(rows(path or (HUB_ID,), split), lambda where, example: [_review(where, example, responses)])


def _review(where: str, example: dict[str, Any], responses: int) -> Item:
    review = LINE_BREAK.sub(" ", text_column(where, example, "text")).strip()
    words = WORD.findall(review)
    size = LEAST + int((MOST - LEAST + 1) * prompt_hash(review))
    if len(words) <= size:
        return Note("reviews left out: no longer than their prompt")
    prompt = "".join(words[:size])
    return Comparison(prompt, (review[len(prompt) :],)[:responses], where=where)
