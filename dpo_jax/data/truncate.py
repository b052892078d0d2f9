"""Truncation of comparisons that are too long: one function for each value of `data.truncation`.

Each takes (prompt ids, ids of each response with EOS, limits, where) and returns (prompt, responses), or None if the
comparison is to be dropped.
"""

from array import array
from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.errors import UserError

Ids = array  # of kind i, int32


class Limits(NamedTuple):
    """Limits in tokens.

    Attributes:
      total: prompt with its longest response (max_length).
      prompt: a prompt once it is cut (max_prompt_length).
      bos: 1 if the prompt begins with BOS, which a template may have written, else 0.
    """

    total: int
    prompt: int
    bos: int


def paper_keep_start(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]]:
    """Truncates as the paper's code does, keeping the start of a prompt; see `_paper`."""
    return _paper(prompt, responses, limits, prompt[: limits.prompt])


def paper_keep_end(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]]:
    """Truncates as the paper's code does for HH, keeping BOS and the end of a prompt; see `_paper`."""
    kept = min(limits.prompt, len(prompt)) - limits.bos
    return _paper(prompt, responses, limits, prompt[: limits.bos] + prompt[len(prompt) - kept :])


def keep_start(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]] | None:
    """Truncates as TRL does: cuts prompt + response at max_length; None if the prompt alone fills it."""
    room = limits.total - len(prompt)
    return (prompt, [response[:room] for response in responses]) if room > 0 else None


def refuse(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]]:
    """Truncates nothing.

    Raises:
      UserError: the prompt with its longest response exceeds max_length.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest > limits.total:
        raise UserError(
            f"{where}: prompt of {len(prompt)} tokens and response of {longest} exceed data.max_length {limits.total}; "
            "raise it or choose a data.truncation"
        )
    return prompt, responses


TRUNCATIONS: dict[str, Callable[[Ids, list[Ids], Limits, str], tuple[Ids, list[Ids]] | None]] = {
    function.__name__: function for function in (paper_keep_end, paper_keep_start, keep_start, refuse)
}


def _paper(prompt: Ids, responses: list[Ids], limits: Limits, short: Ids) -> tuple[Ids, list[Ids]]:
    """Truncates as `tokenize_batch_element` of the paper's code does. The longest response decides for all.

    A comparison that is too long by one token has its prompt cut to max_prompt_length at once. If it is still too long,
    every response is cut to max_length - max_prompt_length and loses its EOS, even where the prompt is shorter than
    max_prompt_length and would leave more room.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest > limits.total:
        prompt = short
    if len(prompt) + longest > limits.total:
        responses = [response[: limits.total - limits.prompt] for response in responses]
    return prompt, responses
