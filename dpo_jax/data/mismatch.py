"""Responses to other prompts: what KTO estimates its KL from."""

from collections import Counter
from collections.abc import Iterator, Sequence

from dpo_jax.data.table import Table
from dpo_jax.records import Array, Tokens, UserError


def mismatched(table: Table, max_length: int, counts: Counter[str]) -> Iterator[Tokens]:
    """Yields comparisons with one response more to each prompt: the first that is there of the next comparison,
    counted round the table, that has another prompt. It is `cut`, and counted so, where prompt and response would not
    keep to `max_length` tokens.

    Raises:
      UserError: all prompts are the same.
    """
    for index, donor in enumerate(next_with_another_prompt(table.prompts)):
        tokens = table[index]
        answer = next(response for response in table[donor].responses if len(response))
        room = max(1, max_length - len(tokens.prompt))
        counts["cut"] += len(answer) > room
        yield tokens._replace(responses=(*tokens.responses, answer[:room]), scores=(*tokens.scores, 0.0))


def next_with_another_prompt(prompts: Array | Sequence[int]) -> Iterator[int]:
    """Yields, for each element of `prompts`, the place of the next one that differs, counted round."""
    count, place = len(prompts), 0
    for index in range(count):
        place = max(place, index + 1)
        while prompts[place % count] == prompts[index]:
            place += 1
            if place == index + count:
                raise UserError("data: all prompts are the same, so that no response belongs to another one")
        yield place % count
