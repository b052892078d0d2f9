"""UltraFeedback (Cui et al. 2023): four models' answers to an instruction, scored; or the pairs made from them."""

from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, Note, expand_examples
from dpo_jax.data.sources.columns import Rated, comparisons_from_columns, number_column, ranked, text_column
from dpo_jax.data.sources.files import file_rows
from dpo_jax.errors import UserError
from dpo_jax.records import Chat

HUB_ID = "HuggingFaceH4/ultrafeedback_binarized"


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields pairs as they were binarised, or comparisons from all scored answers, as conversations.

    Binarised rows whose scores are equal prefer neither answer and are left out. Of scored rows two responses are every
    pair of answers with unequal scores, four the ranking, one the best answer.

    Args:
      path: hub ids, folders or files, either binarised (chosen and rejected conversations, score_chosen,
        score_rejected) or scored as in `openbmb/UltraFeedback` (instruction, completions with response and
        overall_score); nothing is `HuggingFaceH4/ultrafeedback_binarized`.
      split: of the binarised data `train_prefs` or `test_prefs` (here also `train` and `test`), of the scored `train`.
      responses: 0, 1, 2, or 4 of scored rows.

    Raises:
      UserError: the data cannot be found.
    """
    names = {"train": "train_prefs", "test": "test_prefs"}
    where = split if path else names.get(split, split)
    return expand_examples(file_rows(path or (HUB_ID,), where), lambda where, row: _items(where, row, responses))


def _items(where: str, row: dict[str, Any], responses: int) -> list[Item]:
    if "completions" in row:
        return _scored(where, row, responses)
    keys = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    pair = {key: row[key] for key in keys if row.get(key) is not None}
    if responses == 2 and "score_chosen" in pair and pair["score_chosen"] == pair.get("score_rejected"):
        return [Note("pairs of equal scores left out")]
    return comparisons_from_columns(where, pair, responses)


def _scored(where: str, row: dict[str, Any], responses: int) -> list[Item]:
    answers = row["completions"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"{where}: 'completions' must be a list of objects with response and overall_score")
    prompt = Chat(({"role": "user", "content": text_column(where, row, "instruction")},))
    said = [{"role": "assistant", "content": text_column(where, answer, "response")} for answer in answers]
    scores = [number_column(where, "overall_score", answer.get("overall_score")) for answer in answers]
    return ranked(where, Rated(prompt, said, scores), responses)
