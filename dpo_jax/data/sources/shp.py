"""Stanford Human Preferences (Ethayarajh et al. 2022): Reddit answers with votes, read as the paper's code does."""

from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, Note, convert_examples
from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.spool import PromptGroups
from dpo_jax.data.sources.values import binary_label, number_column, text_column
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COLUMNS = "history, human_ref_A, human_ref_B, labels, score_A, score_B"
HUB_ID = "stanfordnlp/SHP"
LEAST_RATIO = 2.0
Rated = tuple[tuple[str, str], tuple[float, float], str]
"""(two answers, best first; their scores; `file:line`)."""


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields comparisons whose scores differ by a factor of at least 2, grouped by prompt.

    Prompts come in the order of their first example. With one response per prompt, that is the answer with the highest
    score, the first of equals (`sft_target` in the paper's code, which gives a repeated answer its first score).

    Args:
      path: hub ids, folders or files with the columns history, human_ref_A, human_ref_B, score_A, score_B, labels;
        () for `stanfordnlp/SHP`.
      split: `train`, `validation` or `test`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be read, or another number of responses is asked for.
    """
    if responses not in (0, 1, 2):
        raise UserError(
            f"data source 'shp' has at most 2 responses per prompt, not {responses}; choose another loss or source"
        )
    prompts, close = PromptGroups(), 0
    for found in convert_examples(rows(path or (HUB_ID,), split), _rated):
        if isinstance(found, UserError):
            yield found
            continue
        prompt, rated = found
        if max(rated[1]) / min(rated[1]) < LEAST_RATIO:
            close += 1
        else:
            prompts.add(prompt, rated)
    for prompt, group in prompts.groups():
        if responses == 2:
            yield from (Comparison(prompt, (*pair,), where=where, scores=(*scores,)) for pair, scores, where in group)
        else:
            yield Comparison(prompt, (_best(group),)[:responses], where=group[0][2])
    if close:
        yield Note(f"examples left out: scores differ by a factor below {LEAST_RATIO:g}", close)


def _rated(where: str, example: dict[str, Any]) -> tuple[str, Rated]:
    """Returns (prompt, its two answers). The label says which one is better, whatever the scores."""
    prompt = f"\n\nHuman: {text_column(where, example, 'history')}\n\nAssistant:"
    answers = tuple(f" {text_column(where, example, f'human_ref_{letter}')}" for letter in "AB")
    scores = tuple(number_column(where, key, example.get(key), least=1) for key in ("score_A", "score_B"))
    if not binary_label(where, "labels", example.get("labels")):
        answers, scores = answers[::-1], scores[::-1]
    return prompt, (answers, scores, where)  # type: ignore


def _best(group: list[Rated]) -> str:
    """Returns the answer with the highest score; of equals the one that comes first in the data."""
    scores: dict[str, float] = {}
    for answers, values, _ in group:
        for answer, score in zip(answers, values, strict=True):
            scores.setdefault(answer, score)
    return max(scores, key=lambda answer: scores[answer])
