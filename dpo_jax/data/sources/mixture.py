"""Several sources in one, each with its share."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from dpo_jax.data.sources.base import Item, open_stream, prompt_key
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

PART = re.compile(r"(?:([^*:]*)\*)?(\w+)(?::(.+))?")


class MixturePart(NamedTuple):
    """One source of a mixture: how often each of its comparisons comes in an epoch, on average; and what it reads."""

    share: float
    source: str
    path: tuple[str, ...]


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields the comparisons of every part, one part after another.

    Args:
      path: parts, each `source:path` or `share*source:path`, as in `0.5*hh:Anthropic/hh-rlhf` or `files:pairs.jsonl`;
        the path may be left out where the source has one of its own. A share of 0.5 takes half of the prompts, with all
        of their comparisons, always the same ones; 2 takes everything twice; 1 is the default.
      split: of every part.
      responses: as for the parts.

    Raises:
      UserError: a part is not written so, or cannot be read.
    """
    if not path:
        raise UserError("data.path names no part of the mixture; give it parts such as 0.5*files:pairs.jsonl")
    for part in [parse_part(text) for text in path]:
        for item in open_stream(part.source, part.path, split, responses):
            times = _times(item, part.share) if isinstance(item, Comparison) else 1
            yield from (item for _ in range(times))


def parse_part(text: str) -> MixturePart:
    """A part as it is written in `data.path`."""
    match = PART.fullmatch(text)
    if match is None or match[2] == "mixture":
        raise UserError(f"data.path: {text!r} is no part of a mixture; write share*source:path, as 0.5*files:a.jsonl")
    try:
        share = 1.0 if match[1] is None else float(match[1])
    except ValueError:
        share = -1.0
    if not 0 < share <= 1000:
        raise UserError(f"data.path: the share of {text!r} must be a number above 0 and at most 1000")
    return MixturePart(share, match[2], (match[3],) if match[3] else ())


def _times(item: Comparison, share: float) -> int:
    """How often a comparison is taken: the whole part of its share, and once more by a draw that its prompt decides."""
    # The key's low half: its high half decides what is held out, of which a share must be a share too.
    draw = (prompt_key(item.prompt) % 2**32) / 2**32
    return int(share) + (draw < share % 1)
