"""Preference data: a module for each source, then encode (text to ids), order (step to rows), pack (rows to batches).

A source is a module of this package with one function,

    read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Comparison]

which yields comparisons in a fixed order, each with exactly `responses` texts (2: a preference pair, best first;
1: a supervised fine-tuning example; 0: a prompt alone, to sample from) and a `where` for error messages. A response
starts where the prompt ends: the two share no character, and `prompt + response` is the text that a model sees. A
source raises `UserError` for what it cannot read, and logs the number of whatever it merges or leaves out. Heavy
libraries are imported inside it.
"""

import difflib
import hashlib
import importlib
import pkgutil
from collections.abc import Iterable, Sequence

from dpo_jax.records import Comparison, UserError


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the closest one that is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"unknown {kind} {name!r}; {hint}known: {', '.join(names)}")


def sources() -> list[str]:
    """Names of the modules that fulfil the contract of a source, sorted."""
    names = (info.name for info in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "read"))


def load(name: str, path: tuple[str, ...], split: str, responses: int) -> list[Comparison]:
    """Reads all comparisons of a split from the source `name`.

    Args:
      name: a module of this package.
      path: files, folders or hub ids, as the source understands them.
      split: `train`, `test` and so on.
      responses: texts for each prompt; 2 for preference pairs, 1 for supervised fine-tuning, 0 for prompts alone.

    Raises:
      UserError: the source is unknown, cannot read its data, or has none.
    """
    known = {info.name for info in pkgutil.iter_modules(__path__)}
    module = importlib.import_module(f"{__name__}.{name}") if name in known else None
    if module is None or not hasattr(module, "read"):
        raise unknown("data source (data.name)", name, sources())
    comparisons = list(module.read(tuple(path), split, responses))
    if not comparisons:
        raise UserError(f"data source {name!r} has no comparisons in split {split!r} of {list(path)}; check data.path")
    return comparisons


def prompt_key(prompt: str) -> int:
    """A number below 2**64 that depends on the text alone, equal for equal prompts: blake2b to 64 bits."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def prompt_hash(prompt: str) -> float:
    """The same number as a fraction, in [0, 1)."""
    return prompt_key(prompt) / 2**64


def holdout(comparisons: Sequence[Comparison], fraction: float) -> tuple[list[Comparison], list[Comparison]]:
    """Splits into (train, eval) by prompt, so that equal prompts are always on one side.

    Args:
      comparisons: any number of them; their order is kept on both sides.
      fraction: the expected share of prompts held out, in [0, 1). The side of a prompt does not depend on the rest.

    Raises:
      UserError: the fraction is out of range, or leaves a side empty.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.eval_fraction must be at least 0 and below 1, not {fraction}")
    train, held = [], []
    for comparison in comparisons:
        (held if prompt_hash(comparison.prompt) < fraction else train).append(comparison)
    if fraction and not (train and held):
        raise UserError(
            f"data.eval_fraction {fraction} leaves {len(train)} of {len(comparisons)} comparisons to train on and "
            f"{len(held)} to evaluate; give more data, another fraction, or data.eval_split or data.eval_path"
        )
    return train, held
