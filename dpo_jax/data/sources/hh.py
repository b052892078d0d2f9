"""Anthropic's helpful and harmless dialogues (Bai et al. 2022), split and merged as the original DPO code does it."""

from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.data.sources.base import Item, Note, convert_examples
from dpo_jax.data.sources.columns import text_column
from dpo_jax.data.sources.files import file_rows
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

HUB_ID = "Anthropic/hh-rlhf"
TURN = "\n\nAssistant:"


class HhPair(NamedTuple):
    """One row: a dialogue up to the last assistant turn, and the two turns.

    Attributes:
      prompt: the chosen transcript up to and including its last `TURN`.
      chosen: the rest of it, with its leading space.
      rejected: the rejected transcript from the same character on.
      same_prompt: whether the rejected transcript starts with the prompt; if not, the cut falls somewhere else in it.
      where: for error messages.
    """

    prompt: str
    chosen: str
    rejected: str
    same_prompt: bool
    where: str


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields the dialogues as comparisons, those with equal prompts next to one another.

    A prompt stands where it first appears. With one response there is one example for each prompt, with the chosen
    turn of its last row (the original's `sft_target`); with none, only the prompt. Where the rejected transcript does
    not start with the prompt (7 of the 8,552 test rows), the original's cut falls anywhere in it, inside of a word too:
    its comparison is `misplaced`, and dropped unless data.degenerate says otherwise.

    Args:
      path: hub ids, folders in the hub's layout (`*/<split>.jsonl.gz`), or files; nothing is `Anthropic/hh-rlhf`.
      split: `train` or `test`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be found, or a transcript has no assistant turn.
    """
    if responses not in (0, 1, 2):
        raise UserError(f"data source 'hh' has at most 2 responses to a prompt, not {responses}")
    prompts: dict[str, list[HhPair]] = {}
    for pair in hh_pairs(path, split):
        if isinstance(pair, UserError):
            yield pair
        else:
            prompts.setdefault(pair.prompt, []).append(pair)
    for prompt, group in prompts.items():
        if responses < 2:
            yield Comparison(prompt, (group[-1].chosen,)[:responses], where=group[-1].where)
        else:
            yield from map(_comparison, group)
    count = sum(map(len, prompts.values()))
    if responses == 1 and len(prompts) < count:
        yield Note("rows left out, since a later one has the same prompt", count - len(prompts))


def hh_pairs(path: tuple[str, ...], split: str) -> Iterator[HhPair | UserError]:
    """Every row in the order of the files; arguments and errors as in `read`."""
    return convert_examples(file_rows(path or (HUB_ID,), split), _pair)


def _comparison(pair: HhPair) -> Comparison:
    return Comparison(pair.prompt, (pair.chosen, pair.rejected), where=pair.where, misplaced=not pair.same_prompt)


def _pair(where: str, row: dict) -> HhPair:
    return split_row(where, text_column(where, row, "chosen"), text_column(where, row, "rejected"))


def split_row(where: str, chosen: str, rejected: str) -> HhPair:
    """Cuts both transcripts where the chosen one's last assistant turn begins; `UserError` where it has none."""
    turn = chosen.rfind(TURN)
    if turn < 0:
        raise UserError(f"{where}: 'chosen' has no {TURN!r}; this is not a dialogue of Anthropic HH")
    end = turn + len(TURN)
    prompt = chosen[:end]
    return HhPair(prompt, chosen[end:], rejected[end:], rejected.startswith(prompt), where)
