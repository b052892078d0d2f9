"""Responses to other prompts: what KTO estimates its KL from."""

import numpy as np

from dpo_jax.data.table import Table
from dpo_jax.records import Array, UserError


def mismatched(table: Table, max_length: int) -> tuple[Table, int]:
    """Returns a table with one response more to each prompt: the first that is there of the next comparison, counted
    round the table, that has another prompt; and how many of them were cut so that prompt and response keep to
    `max_length` tokens.

    Raises:
      UserError: all prompts are the same.
    """
    donors = next_with_another_prompt(table.prompts)
    cut, rows = 0, []
    for index, donor in enumerate(donors):
        tokens = table[index]
        answer = next(response for response in table[int(donor)].responses if len(response))
        room = max(1, max_length - len(tokens.prompt))
        cut += len(answer) > room
        rows.append(tokens._replace(responses=(*tokens.responses, answer[:room]), scores=(*tokens.scores, 0.0)))
    return Table.of(rows), cut


def next_with_another_prompt(prompts: Array) -> Array:
    """Returns int64[N], for each element of `prompts` the place of the next one that differs, counted round."""
    count = len(prompts)
    if (prompts == prompts[0]).all():
        raise UserError("data: all prompts are the same, so that no response belongs to another one; kto needs such")
    following = np.empty(2 * count, np.int64)
    following[-1] = 0
    for i in range(2 * count - 2, -1, -1):
        differs = prompts[(i + 1) % count] != prompts[i % count]
        following[i] = i + 1 if differs else following[i + 1]
    return following[:count] % count
