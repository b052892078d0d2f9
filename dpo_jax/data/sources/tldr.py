"""TL;DR: summaries of Reddit posts with human preferences (Stiennon et al. 2020), the paper's second experiment."""

from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources.base import Item, expand_examples
from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.values import binary_label, text_column
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COLUMNS = "info, summaries, choice"
HUB_ID = "openai/summarize_from_feedback:comparisons"


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields comparisons of two summaries of a post, or of a news article if the example has one instead.

    A prompt ends in `TL;DR:`, and a summary begins with one space. With one response per prompt, that is the chosen
    summary.

    Args:
      path: hub ids, folders or files with the columns info (post, title and subreddit, or article), summaries (two
        objects with text) and choice (0 or 1); () for `openai/summarize_from_feedback:comparisons`.
      split: `train` or `validation`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be read, or another number of responses is asked for.
    """
    if responses not in (0, 1, 2):
        raise UserError(
            f"data source 'tldr' has at most 2 responses per prompt, not {responses}; choose another loss or source"
        )
    return expand_examples(
        rows(path or (HUB_ID,), split), lambda where, example: [_comparison(where, example, responses)]
    )


def _comparison(where: str, example: dict[str, Any], responses: int) -> Comparison:
    summaries = example.get("summaries")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(one, dict) for one in summaries):
        raise UserError(f"{where}: 'summaries' must be a list of two objects with text")
    first, second = (f" {text_column(where, summary, 'text').strip()}" for summary in summaries)
    ordered = (second, first) if binary_label(where, "choice", example.get("choice")) else (first, second)
    return Comparison(_prompt(where, example.get("info")), ordered[:responses], where=where)


def _prompt(where: str, info: Any) -> str:
    if not isinstance(info, dict):
        raise UserError(f"{where}: 'info' must be an object with post, title and subreddit, or article")
    if info.get("post") is None:
        return f"ARTICLE: {text_column(where, info, 'article').strip()}\n\nTL;DR:"
    subreddit, title, post = (text_column(where, info, key).strip() for key in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
