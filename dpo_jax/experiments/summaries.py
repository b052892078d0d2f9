"""Summaries in small, a stand-in for the paper's TL;DR experiment: film reviews, and a reward that a rule computes.

A good summary has many of the review's words in few words of its own. People's preferences are about more than that.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.imdb import LINE_BREAK
from dpo_jax.data.sources.values import text_column
from dpo_jax.errors import UserError

BEGIN, END = "Review: ", "\n\nSum up this review in one short sentence."
SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
WORD = re.compile(r"[a-z]+")
LONG_WORD = 5  # letters of a word that says what a review is about
ROOM = 20  # words of a summary that cost nothing
WORTH, COST = 10.0, 0.25  # of all words of the review; of a word beyond `ROOM`


def reviews(path: tuple[str, ...], split: str, *, words: int = 60) -> Iterator[dict[str, Any]]:
    """Yields a prompt for each review, with its first sentence as the summary to compare with.

    Args:
      path: files or folders with a column `text`, such as those of the source `imdb`.
      split: of a folder or hub id.
      words: beginning of a review that is to be summed up.

    Raises:
      UserError: the data cannot be read.
    """
    for row in rows(path, split):
        if isinstance(row, UserError):
            raise row
        where, example = row
        text = " ".join(LINE_BREAK.sub(" ", text_column(where, example, "text")).split()[:words])
        lead = SENTENCE.match(text)
        yield {"prompt": f"{BEGIN}{text}{END}", "completion": (lead[0] if lead else text).strip()}


def coverage(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Returns 10 times the share of a review's long words that are in its summary, less 0.25 for each word beyond 20.

    Long words have five letters or more; each counts once.
    """
    return [_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    review = prompt.partition(BEGIN)[2].rpartition(END)[0]
    wanted = {word for word in WORD.findall(review.lower()) if len(word) >= LONG_WORD}
    said = WORD.findall(completion.lower())
    return WORTH * len(wanted.intersection(said)) / max(1, len(wanted)) - COST * max(0, len(said) - ROOM)
