"""What is drawn from the reference once, and kept: preference pairs to train on, and rewards for the optimum."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_jax import assemble, data, metrics
from dpo_jax.data.table import Table
from dpo_jax.experiments.measure import Column, World, draw, score, shape_of
from dpo_jax.folders import written
from dpo_jax.records import Array, Tokens, UserError
from dpo_jax.rewards import label

ENUMERABLE = 4096  # responses that are rather listed than sampled


def pairs(path: Path, world: World, prompts: Sequence[Array], copies: int, how: str, seed: int) -> Table:
    """Returns pairs of completions of the reference, labelled by the true reward, from a file, which is made if need
    be: a line for each pair, with texts as `dpo-jax pairs` writes them and the ids that were drawn.

    Training takes the ids, for the text of a completion may have other ids, and one that was cut has no end.

    Raises:
      UserError: no two completions differ.
    """
    if not path.is_file():
        found = draw(world, world.reference, prompts, copies, seed)
        rows = [row for i, p in enumerate(prompts) for row in _labelled(world, p, found[i * copies :][:copies], how)]
        if not rows:
            raise UserError(f"{path}: no two of {copies} completions of a prompt differ, so there is nothing to prefer")
        with written(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Table.of(_tokens(row) for row in metrics.read(path))


def _labelled(world: World, prompt: Array, completions: Sequence[Array], how: str) -> list[dict]:
    """Returns the pairs of one prompt's completions, as rows."""
    (text,), texts = assemble.decoded(world.tokenizer, [prompt]), assemble.decoded(world.tokenizer, completions)
    ids = dict(zip(texts, completions, strict=True))
    scores = world.reward([text] * len(texts), texts)
    return [
        {"prompt": text, "chosen": c, "rejected": r, "ids": [x.tolist() for x in (np.asarray(prompt), ids[c], ids[r])]}
        for c, r in label(text, texts, scores, how, world.seed)
    ]


def _tokens(row: dict) -> Tokens:
    prompt, *responses = (np.array(ids, np.int32) for ids in row["ids"])
    return Tokens(prompt, tuple(responses), prompt_key=data.prompt_key(row["prompt"]))


def rewards(path: Path, world: World, prompts: Sequence[Array], copies: int) -> Array:
    """Returns the true rewards of completions of each prompt by the reference, float64[prompts, copies], from a file,
    which is made if need be."""
    if path.is_file():
        return np.load(path, allow_pickle=False)
    found = draw(world, world.reference, prompts, copies, seed=2)
    values = score(world, world.reward, [p for p in prompts for _ in range(copies)], found).reshape(-1, copies)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path)
    return values


def responses(vocab: int, end: int, longest: int) -> list[tuple[int, ...]]:
    """Returns every response: tokens up to the first end-of-sequence token, or `longest` of them without one."""
    others = [token for token in range(vocab) if token != end]
    ended = [(*r, end) for n in range(longest) for r in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=longest))


def listed(world: World, prompts: Sequence[Array], column: Column) -> tuple[Array, Array] | None:
    """Returns the true reward and the reference's log-probability of every response to each prompt,
    float64[prompts, K]; None where there are too many."""
    vocab = world.model.architecture.vocab
    if vocab**world.max_new_tokens > ENUMERABLE:
        return None
    every = [np.array(r, np.int32) for r in responses(vocab, world.tokenizer.eos_token_id, world.max_new_tokens)]
    table = Table.of(Tokens(p, (r,)) for p in prompts for r in every)
    logps = column(world.reference, table, shape_of(world, table))[:, 0, 0]
    values = score(world, world.reward, [p for p in prompts for _ in every], every * len(prompts))
    return values.reshape(len(prompts), -1), logps.astype(np.float64).reshape(len(prompts), -1)
