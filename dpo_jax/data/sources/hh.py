"""Anthropic's helpful and harmless dialogues (Bai et al. 2022), read as the paper's code does."""

from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.data.sources.base import Item, Note, convert_examples
from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.spool import PromptGroups
from dpo_jax.data.sources.values import text_column
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COLUMNS = "chosen, rejected"
HUB_ID = "Anthropic/hh-rlhf"
TURN = "\n\nAssistant:"


class HhPair(NamedTuple):
    """One example: a dialogue up to its last assistant turn, and two such turns.

    Attributes:
      prompt: the chosen transcript up to and including its last `TURN`.
      chosen: the rest of the chosen transcript, with its leading space.
      rejected: the rejected transcript from the same character on.
      same_prompt: whether the rejected transcript starts with the prompt; if not, `rejected` is an arbitrary piece.
      where: `file:line` for error messages.
    """

    prompt: str
    chosen: str
    rejected: str
    same_prompt: bool
    where: str


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields the dialogues as comparisons, grouped by prompt in the order of each prompt's first example.

    With one response per prompt, that is the chosen turn of the prompt's last example (`sft_target` in the paper's
    code). If the rejected transcript does not start with the prompt (7 of the 8,552 test examples), the paper's code
    cuts it at an arbitrary character. Such a comparison is `misplaced`, and data.degenerate drops it by default.

    Args:
      path: hub ids, folders in the hub's layout (`*/<split>.jsonl.gz`), or files; () for `Anthropic/hh-rlhf`.
      split: `train` or `test`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be read, or another number of responses is asked for.
    """
    if responses not in (0, 1, 2):
        raise UserError(
            f"data source 'hh' has at most 2 responses per prompt, not {responses}; choose another loss or source"
        )
    pairs, prompts = PromptGroups(), 0
    for pair in hh_pairs(path, split):
        if isinstance(pair, UserError):
            yield pair
        else:
            pairs.add(pair.prompt, pair[1:])
    for prompt, values in pairs.groups():
        prompts += 1
        group = [HhPair(prompt, *value) for value in values]
        if responses < 2:
            yield Comparison(prompt, (group[-1].chosen,)[:responses], where=group[-1].where)
        else:
            yield from map(_comparison, group)
    if responses == 1 and prompts < len(pairs):
        yield Note("examples left out: a later one has the same prompt", len(pairs) - prompts)


def hh_pairs(path: tuple[str, ...], split: str) -> Iterator[HhPair | UserError]:
    """Yields every example in the order of the files; arguments and errors as in `read`."""
    return convert_examples(rows(path or (HUB_ID,), split), _pair)


def _comparison(pair: HhPair) -> Comparison:
    return Comparison(pair.prompt, (pair.chosen, pair.rejected), where=pair.where, misplaced=not pair.same_prompt)


def _pair(where: str, example: dict) -> HhPair:
    return split_transcripts(where, text_column(where, example, "chosen"), text_column(where, example, "rejected"))


def split_transcripts(where: str, chosen: str, rejected: str) -> HhPair:
    """Splits both transcripts at the character where the last assistant turn of the chosen one begins.

    Raises:
      UserError: the chosen transcript has no assistant turn.
    """
    turn = chosen.rfind(TURN)
    if turn < 0:
        raise UserError(f"{where}: 'chosen' has no {TURN!r}; it is not a dialogue of Anthropic HH; use data.name files")
    end = turn + len(TURN)
    prompt = chosen[:end]
    return HhPair(prompt, chosen[end:], rejected[end:], rejected.startswith(prompt), where)
