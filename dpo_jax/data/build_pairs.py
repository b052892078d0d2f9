"""Preference pairs out of what is there: answers corrected, damaged, of another prompt, or single ones put together."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.config.yaml import read_yaml
from dpo_jax.data import chat
from dpo_jax.data.noise import next_with_another_prompt
from dpo_jax.data.sources.base import Note, prompt_key
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

EDITS = 5  # one edit for so many words


class CorrectionRule(NamedTuple):
    """What is replaced by what, as in `re.sub`."""

    pattern: re.Pattern
    replacement: str


def correction_rules(path: str) -> list[CorrectionRule]:
    """Returns the rules in a YAML file that maps patterns to replacements.

    Raises:
      UserError: it cannot be read, or holds a pattern or a replacement that is none.
    """
    found = []
    for pattern, replacement in read_yaml(path).items():
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise UserError(f"{path}: {pattern!r}: {replacement!r}: both must be text, in quotes; '' takes away")
        try:
            found.append(CorrectionRule(re.compile(pattern), replacement))
            found[-1].pattern.sub(found[-1].replacement, "")  # an error if it names a group that is not there
        except (re.error, IndexError) as e:
            raise UserError(f"{path}: {pattern!r}: {replacement!r}: no pattern and replacement of re.sub ({e})") from e
    return found


def correct_answer(text: str, rules: Iterable[CorrectionRule]) -> str:
    """Returns a text with every match of every rule replaced, in their order."""
    for rule in rules:
        text = rule.pattern.sub(rule.replacement, text)
    return text


def corrupt_answer(text: str, rng: np.random.Generator) -> str | None:
    """Returns a text with a fifth of its words, at least one, left out, doubled or in another's place; None where that
    leaves it as it is, as a text without words."""
    words, end = re.findall(r"\s*\S+", text), text[len(text.rstrip()) :]
    for _ in range(-(-len(words) // EDITS)):
        at = int(rng.integers(len(words)))
        edit = rng.integers(3) if len(words) > 1 else 1
        if edit == 0:
            del words[at]
        elif edit == 1:
            words.insert(at, words[at])
        else:
            words[at], words[at - 1] = words[at - 1], words[at]
    damaged = "".join(words) + end
    return damaged if damaged != text else None


def other_answers(rows: Sequence[Comparison]) -> list[Any]:
    """Returns, for each comparison, the first response of the next one, counted round, that has another prompt.

    Raises:
      UserError: all prompts are the same.
    """
    prompts = [prompt_key(row.prompt) for row in rows]
    return [rows[place].responses[0] for place in next_with_another_prompt(prompts)]


def single_responses(row: Comparison) -> Iterator[dict[str, Any]]:
    """Yields the responses of a pair as rows of their own, with the label that says which is wanted.

    Raises:
      UserError: it is only likely that the first is the better one, which a label cannot say.
    """
    if row.preference != 1:
        raise UserError(f"{row.where}: preference {row.preference:g}: a row alone is wanted or not; remove the row")
    for response, label in zip(row.responses, (True, False), strict=True):
        if response is not None:
            yield pair_columns(row) | {"completion": as_column(response), "label": label}


def pair_columns(row: Comparison) -> dict[str, Any]:
    """The prompt of a row, and its weight if it has one, as columns."""
    return chat.as_columns(row.prompt) | ({"weight": row.weight} if row.weight != 1 else {})


def pair_up(rows: Iterable[Comparison]) -> Iterator[Comparison | Note]:
    """Yields every wanted response of a prompt against every unwanted one, prompts in the order of their first row; a
    note where one is both.

    Raises:
      UserError: a row has a weight, which means nothing for a pair of two rows.
    """
    found: dict[int, tuple[Comparison, list, list]] = {}
    for row in rows:
        if row.weight != 1:
            raise UserError(f"{row.where}: weight {row.weight:g}: a pair is made of two rows; remove the column")
        its = found.setdefault(prompt_key(row.prompt), (row, [], []))
        for response, side in zip(row.responses, its[1:], strict=True):
            if response is not None and response not in side:
                side.append(response)
    for row, wanted, unwanted in found.values():
        for chosen in wanted:
            for rejected in unwanted:
                same = chosen == rejected
                yield Note("responses both wanted and not") if same else row._replace(responses=(chosen, rejected))


def as_column(response: Any) -> Any:
    """Returns a response as the column of a file from which it is read back."""
    return [response] if isinstance(response, dict) else response
