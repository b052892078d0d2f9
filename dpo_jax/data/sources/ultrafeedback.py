"""UltraFeedback (Cui et al. 2023): scored answers of four models to an instruction, or the pairs made from them."""

from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, Note, expand_examples
from dpo_jax.data.sources.columns import comparisons_from_columns
from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.ratings import Rated, ranked
from dpo_jax.data.sources.values import number_column, text_column
from dpo_jax.errors import UserError
from dpo_jax.records import Chat

COLUMNS = (
    "instruction, completions (response, overall_score); or prompt, chosen, rejected, score_chosen, score_rejected"
)
HUB_ID = "HuggingFaceH4/ultrafeedback_binarized"


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields conversations: the binarized pairs, or comparisons of the scored answers.

    Binarized pairs of equal scores prefer neither answer and are left out. Scored answers give every pair of unequal
    scores for 2 responses per prompt, the best answer for 1, and the ranking for 4.

    Args:
      path: hub ids, folders or files, either binarized (chosen and rejected conversations, score_chosen,
        score_rejected) or scored as in `openbmb/UltraFeedback` (instruction, completions with response and
        overall_score); () for `HuggingFaceH4/ultrafeedback_binarized`.
      split: `train_prefs` or `test_prefs` of the binarized data (without a path also `train` and `test`); `train` of
        the scored answers.
      responses: 0, 1, 2, or with scored answers 4.

    Raises:
      UserError: the data cannot be read.
    """
    names = {"train": "train_prefs", "test": "test_prefs"}
    split = split if path else names.get(split, split)
    return expand_examples(rows(path or (HUB_ID,), split), lambda where, example: _items(where, example, responses))


def _items(where: str, example: dict[str, Any], responses: int) -> list[Item]:
    if "completions" in example:
        return _scored(where, example, responses)
    keys = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    pair = {key: example[key] for key in keys if example.get(key) is not None}
    if responses == 2 and "score_chosen" in pair and pair["score_chosen"] == pair.get("score_rejected"):
        return [Note("pairs of equal scores left out")]
    return comparisons_from_columns(where, pair, responses)


def _scored(where: str, example: dict[str, Any], responses: int) -> list[Item]:
    answers = example["completions"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"{where}: 'completions' must be a list of objects with response and overall_score")
    prompt = Chat(({"role": "user", "content": text_column(where, example, "instruction")},))
    messages = [{"role": "assistant", "content": text_column(where, answer, "response")} for answer in answers]
    scores = [number_column(where, "overall_score", answer.get("overall_score")) for answer in answers]
    return ranked(where, Rated(prompt, messages, scores), responses)
