"""What is cut from comparisons that are too long: each function is a value of `data.truncation`."""

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.errors import UserError

Ids = list[int]


class Limits(NamedTuple):
    """Lengths in tokens: prompt and longest response, prompt alone when cut, and BOS at the front (0 or 1)."""

    whole: int
    prompt: int
    bos: int


def paper_keep_start(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]]:
    """The original's cut, keeping the prompt's start; see `_paper`."""
    return _paper(prompt, responses, limits, prompt[: limits.prompt])


def paper_keep_end(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]]:
    """The original's cut, keeping the prompt's end (and BOS, where there is one), as it does for HH; see `_paper`."""
    room = limits.prompt - limits.bos
    return _paper(prompt, responses, limits, prompt[: limits.bos] + prompt[limits.bos :][-room:])


def keep_start(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]] | None:
    """TRL's cut: prompt and response together end at max_length; nothing is left where the prompt alone fills it."""
    room = limits.whole - len(prompt)
    return (prompt, [response[:room] for response in responses]) if room > 0 else None


def refuse(prompt: Ids, responses: list[Ids], limits: Limits, where: str) -> tuple[Ids, list[Ids]]:
    """Cuts nothing: `UserError` for what is too long."""
    longest = max(map(len, responses))
    if len(prompt) + longest > limits.whole:
        raise UserError(
            f"{where}: prompt of {len(prompt)} tokens and response of {longest} exceed data.max_length {limits.whole}; "
            "raise it or choose a data.truncation"
        )
    return prompt, responses


TRUNCATIONS: dict[str, Callable[[Ids, list[Ids], Limits, str], tuple[Ids, list[Ids]] | None]] = {
    function.__name__: function for function in (paper_keep_end, paper_keep_start, keep_start, refuse)
}


def _paper(prompt: Ids, responses: list[Ids], limits: Limits, short: Ids) -> tuple[Ids, list[Ids]]:
    """Steps 4 and 5 of the original's `tokenize_batch_element`: the longest response decides for all of them.

    One token too many cuts the prompt all the way to max_prompt_length. If that is not enough, every response is cut
    to max_length - max_prompt_length, even where the prompt is shorter than it might be; EOS goes with the rest.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest > limits.whole:
        prompt = short
    if len(prompt) + longest > limits.whole:
        responses = [response[: limits.whole - limits.prompt] for response in responses]
    return prompt, responses
