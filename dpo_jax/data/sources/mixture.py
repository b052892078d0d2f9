"""A mixture of sources, each with a share."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dpo_jax.data.sources.base import Item, prompt_key, source_names
from dpo_jax.data.sources.functions import Part, open_source, takes_columns
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COLUMNS = "those of its parts"
PART = re.compile(r"(?:([^*:]*)\*)?(\w+)(?::(.+))?")
OWN_PART = re.compile(r"(?:([^*:]*)\*)?([\w.]+:[^\W\d]\w*)(?::(.+))?")  # of a source of one's own


class MixturePart(NamedTuple):
    """One source of a mixture.

    Attributes:
      share: how often each of its comparisons occurs in an epoch, on average.
      source: its name, as `data.name`.
      path: what it reads; () for its own data set.
    """

    share: float
    source: str
    path: tuple[str, ...]


def read(
    path: tuple[str, ...], split: str, responses: int, text_prompts: str = "auto", beside: Sequence[Part] = ()
) -> Iterator[Item]:
    """Yields the comparisons of every part, one part after another.

    Args:
      path: parts, each `source:path` or `share*source:path`, such as `0.5*hh:Anthropic/hh-rlhf` or
        `files:pairs.jsonl`. A source with its own data set needs no path; one's own is `module:function:path`. A share
        of 0.5 takes half of the prompts, always the same ones, each with all of its comparisons; 2 takes everything
        twice; 1 is the default.
      split: the split of every part.
      responses: responses per comparison, of every part.
      text_prompts: `data.text_prompts`, of the parts that have it.
      beside: (path, split) of other mixtures; a part is read as those of the same source, see `open_source`.

    Raises:
      UserError: a part is not written like this, or cannot be read.
    """
    if not path:
        raise UserError("data.path is empty; set it to the parts of the mixture, such as 0.5*files:pairs.jsonl")
    others = [(parse_part(text), their_split) for texts, their_split in beside for text in texts]
    for part in [parse_part(text) for text in path]:
        same = [(other.path, their_split) for other, their_split in others if other.source == part.source]
        options = {"text_prompts": text_prompts, "beside": same} if takes_columns(part.source) else {}
        for item in open_source(part.source, part.path, split, responses, **options):
            times = _times(item, part.share) if isinstance(item, Comparison) else 1
            yield from (item for _ in range(times))


def parse_part(text: str) -> MixturePart:
    """Returns a part of a mixture from its text in `data.path`.

    Raises:
      UserError: it is not `share*source:path`, or the share is not in (0, 1000].
    """
    match = PART.fullmatch(text)
    if match is None or not difflib.get_close_matches(match[2], source_names()):  # else a misspelt source
        match = OWN_PART.fullmatch(text) or match
    if match is None or match[2] == "mixture":
        raise UserError(
            f"data.path: {text!r} is no part of a mixture; write share*source:path, such as 0.5*files:a.jsonl"
        )
    try:
        share = 1.0 if match[1] is None else float(match[1])
    except ValueError:
        share = -1.0
    if not 0 < share <= 1000:
        raise UserError(f"data.path: the share of {text!r} must be a number above 0 and at most 1000")
    return MixturePart(share, match[2], (match[3],) if match[3] else ())


def _times(item: Comparison, share: float) -> int:
    """Returns how often a comparison is taken: the integer part of its share, and once more by a hash of its prompt."""
    # `holdout` splits by the high bits of the key. The low bits decide here, so that both choices are independent.
    fraction = (prompt_key(item.prompt) % 2**32) / 2**32
    return int(share) + (fraction < share % 1)
