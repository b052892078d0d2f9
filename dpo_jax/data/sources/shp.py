"""Stanford Human Preferences (Ethayarajh et al. 2022): Reddit answers by votes, as the original DPO code reads them."""

from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, Note, convert_examples
from dpo_jax.data.sources.columns import binary_label, number_column, text_column
from dpo_jax.data.sources.files import file_rows
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

HUB_ID = "stanfordnlp/SHP"
LEAST_RATIO = 2.0
Rated = tuple[tuple[str, str], tuple[float, float], str]
"""The two answers, best first; their scores; where."""


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields the comparisons whose scores differ by a factor of at least 2, those with equal prompts together.

    A prompt stands where it first appears. With one response there is one example for each prompt, its answer with the
    highest score (the original's `sft_target`: the first of equals, an answer given twice with its first score).

    Args:
      path: hub ids, folders or files with the columns history, human_ref_A, human_ref_B, score_A, score_B, labels;
        nothing is `stanfordnlp/SHP`.
      split: `train`, `validation` or `test`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be found.
    """
    if responses not in (0, 1, 2):
        raise UserError(f"data source 'shp' has at most 2 responses to a prompt, not {responses}")
    prompts: dict[str, list[Rated]] = {}
    close = 0
    for found in convert_examples(file_rows(path or (HUB_ID,), split), _row):
        if isinstance(found, UserError):
            yield found
            continue
        prompt, rated = found
        if max(rated[1]) / min(rated[1]) < LEAST_RATIO:
            close += 1
        else:
            prompts.setdefault(prompt, []).append(rated)
    for prompt, group in prompts.items():
        if responses == 2:
            yield from (Comparison(prompt, pair, where=where, scores=scores) for pair, scores, where in group)
        else:
            yield Comparison(prompt, (_best(group),)[:responses], where=group[0][2])
    if close:
        yield Note(f"rows left out, whose scores differ by a factor below {LEAST_RATIO:g}", close)


def _row(where: str, row: dict[str, Any]) -> tuple[str, Rated]:
    prompt = f"\n\nHuman: {text_column(where, row, 'history')}\n\nAssistant:"
    answers = tuple(f" {text_column(where, row, f'human_ref_{letter}')}" for letter in "AB")
    scores = tuple(number_column(where, key, row.get(key), least=1) for key in ("score_A", "score_B"))
    if not binary_label(where, "labels", row.get("labels")):
        answers, scores = answers[::-1], scores[::-1]
    return prompt, (answers, scores, where)  # type: ignore


def _best(group: list[Rated]) -> str:
    """The answer with the highest score, in the order in which the rows have them."""
    scores: dict[str, float] = {}
    for answers, values, _ in group:
        for answer, score in zip(answers, values, strict=True):
            scores.setdefault(answer, score)
    return max(scores, key=lambda answer: scores[answer])
