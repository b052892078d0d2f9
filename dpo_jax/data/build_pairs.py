"""Builds preference pairs from existing answers: corrected, corrupted, of another prompt, or paired from labels."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import chat
from dpo_jax.data.noise import next_with_another_prompt
from dpo_jax.data.sources.base import Note, prompt_key
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

WORDS_PER_EDIT = 5  # of `corrupt_answer`


class CorrectionRule(NamedTuple):
    """A pattern and its replacement, as `re.sub` takes them."""

    pattern: re.Pattern
    replacement: str


def correction_rules(path: str, rules: Mapping[Any, Any]) -> list[CorrectionRule]:
    """Returns correction rules, in order.

    Args:
      path: the file that they were read from, for error messages.
      rules: pattern -> replacement.

    Raises:
      UserError: a rule that `re.sub` does not take.
    """
    found = []
    for pattern, replacement in rules.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise UserError(f"{path}: {pattern!r}: {replacement!r}: both must be text; quote them ('' removes a match)")
        try:
            found.append(CorrectionRule(re.compile(pattern), replacement))
            found[-1].pattern.sub(found[-1].replacement, "")  # fails if the replacement names an unknown group
        except (re.error, IndexError, OverflowError, RecursionError) as e:
            raise UserError(f"{path}: {pattern!r}: {replacement!r}: no pattern and replacement of re.sub ({e})") from e
    return found


def correct_answer(text: str, rules: Iterable[CorrectionRule]) -> str:
    """Returns a text with all matches of each rule replaced, one rule after another."""
    for rule in rules:
        text = rule.pattern.sub(rule.replacement, text)
    return text


def corrupt_answer(text: str, rng: np.random.Generator) -> str | None:
    """Returns a text after one random edit per five words (at least one): a word dropped, doubled or swapped.

    None if the text is the same afterwards, or has no words.
    """
    words, end = re.findall(r"\s*\S+", text), text[len(text.rstrip()) :]
    for _ in range(-(-len(words) // WORDS_PER_EDIT)):
        at = int(rng.integers(len(words)))
        edit = rng.integers(3) if len(words) > 1 else 1
        if edit == 0:
            del words[at]
        elif edit == 1:
            words.insert(at, words[at])
        else:
            words[at], words[at - 1] = words[at - 1], words[at]
    corrupted = "".join(words) + end
    return corrupted if corrupted != text else None


def other_answers(comparisons: Iterable[Comparison]) -> Iterator[Any]:
    """Yields, for each comparison, the first response of the next one with another prompt; the end wraps around.

    Args:
      comparisons: re-iterable, since they are read up to three times.

    Raises:
      UserError: all prompts are the same.
    """
    prompts = np.fromiter((prompt_key(comparison.prompt) for comparison in comparisons), np.uint64)
    ahead, read, response = iter(comparisons), 0, None
    for place in next_with_another_prompt(prompts):
        if place < read - 1:  # the end has wrapped around
            ahead, read = iter(comparisons), 0
        if read <= place:
            comparison, read = next(islice(ahead, place - read, None)), place + 1
            response = comparison.responses[0]
        yield response


def single_responses(pair: Comparison) -> Iterator[dict[str, Any]]:
    """Yields each response of a pair as the columns of an unpaired example: `label` is true for the preferred one.

    Raises:
      UserError: the preference is soft, which a label cannot express.
    """
    if pair.preference != 1:
        raise UserError(f"{pair.where}: preference {pair.preference:g}: a row alone is wanted or not; remove the row")
    for response, label in zip(pair.responses, (True, False), strict=True):
        if response is not None:
            yield pair_columns(pair) | {"completion": as_column(response), "label": label}


def pair_columns(comparison: Comparison) -> dict[str, Any]:
    """Returns the prompt of a comparison, and its weight unless it is 1, as columns."""
    weight = {"weight": comparison.weight} if comparison.weight != 1 else {}
    return chat.as_columns(comparison.prompt) | weight


def pair_up(examples: Iterable[Comparison]) -> Iterator[Comparison | Note]:
    """Yields every wanted response of a prompt against every unwanted one, prompts in the order of first appearance.

    A response that is both gives a note instead.

    Args:
      examples: unpaired examples: (response, None) if wanted, (None, response) if not.

    Raises:
      UserError: an example has a weight, which has no meaning for a pair of two examples.
    """
    found: dict[int, tuple[Comparison, list, list]] = {}
    for example in examples:
        if example.weight != 1:
            raise UserError(
                f"{example.where}: weight {example.weight:g}: a pair is made of two rows; remove the column"
            )
        _, *sides = found.setdefault(prompt_key(example.prompt), (example, [], []))
        for response, side in zip(example.responses, sides, strict=True):
            if response is not None and response not in side:
                side.append(response)
    for first, wanted, unwanted in found.values():
        for chosen in wanted:
            for rejected in unwanted:
                same = chosen == rejected
                yield Note("responses both wanted and not") if same else first._replace(responses=(chosen, rejected))


def as_column(response: Any) -> Any:
    """Returns a response as a column from which the source `files` reads it back."""
    return [response] if isinstance(response, dict) else response
