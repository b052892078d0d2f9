"""Text to token ids: tokenised, checked, cut to length, counted, and kept in a cache on disk."""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data import prompt_key, unknown
from dpo_jax.data.table import Lengths, Report, Table, offsets_of, report
from dpo_jax.records import Array, Comparison, UserError

CACHE_FORMAT = 2
CHUNK = 1024
DEGENERATE = ("drop", "refuse", "keep")

Ids = list[int]

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """Lengths in tokens: prompt and longest response, prompt alone when cut, and BOS at the front (0 or 1)."""

    whole: int
    prompt: int
    bos: int


def encode(
    comparisons: Sequence[Comparison],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: str,
    degenerate: str,
    add_bos: bool,
) -> tuple[Table, Report]:
    """Tokenises prompts and responses apart, ends every response with EOS, and cuts to length.

    Args:
      comparisons: all with the same number of responses.
      tokenizer: a fast Hugging Face tokenizer with an EOS token.
      max_length: tokens of a prompt with any one of its responses.
      max_prompt_length: what the paper's modes cut prompts to; the other modes do not look at it.
      truncation: a name in `TRUNCATIONS`.
      degenerate: what to do with empty or identical responses: `drop`, `refuse` or `keep`.
      add_bos: put BOS before every prompt; it counts as part of the prompt and is never cut off.

    Raises:
      UserError: an option is wrong, or a comparison cannot be encoded; it names the comparison's `where`.
    """
    cut = _truncation(truncation, max_length, max_prompt_length, add_bos)
    _check_tokenizer(tokenizer, add_bos)
    counts: Counter[str] = Counter(read=len(comparisons))
    screened = _screen(comparisons, degenerate, counts)
    parts: list[Array] = []
    sizes: list[list[int]] = []
    weights: list[float] = []
    prompts: list[int] = []
    for comparison, prompt, responses in _tokenised(screened, tokenizer, add_bos):
        result = cut(prompt, responses, comparison.where)
        if result is None:
            counts["prompt_too_long_dropped"] += 1
            continue
        _count_cuts(counts, (prompt, responses), result)
        parts.append(np.fromiter(chain(result[0], *result[1]), np.int32))
        sizes.append([len(result[0]), *map(len, result[1])])
        weights.append(comparison.weight)
        prompts.append(prompt_key(comparison.prompt))
    if not sizes:
        raise UserError(f"none of {len(comparisons)} comparisons is left to encode; counted: {dict(counts)}")
    table = Table(np.concatenate(parts), offsets_of(sizes), np.array(weights, np.float32), np.array(prompts, np.uint64))
    return table, report(table, counts)


def cached_encode(
    comparisons: Sequence[Comparison], tokenizer: Any, cache_dir: Path, **options: Any
) -> tuple[Table, Report]:
    """`encode`, done once for the same content and opened from disk (memory-mapped) after that.

    An entry is a folder `tokens-<key>` in `cache_dir`, and appears whole or not at all. What it depends on is every
    text and weight (not `where`), the tokenizer, and the options, which are the keyword arguments of `encode`.

    Raises:
      UserError: as `encode`; or the cache folder cannot be written.
    """
    entry = cache_dir / f"tokens-{_key(comparisons, tokenizer, options)}"
    if entry.exists():
        try:
            return _open_entry(entry)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            log.warning("cache entry %s is damaged (%s) and is made again", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
    table, result = encode(comparisons, tokenizer, **options)
    try:
        _write_entry(entry, table, result)
    except OSError as error:
        raise UserError(f"{cache_dir}: the cache cannot be written ({error}); choose another folder") from error
    return _open_entry(entry)


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


def _truncation(name: str, max_length: int, max_prompt_length: int, add_bos: bool) -> Callable[..., Any]:
    if name not in TRUNCATIONS:
        raise unknown("truncation (data.truncation)", name, TRUNCATIONS)
    least = 1 + add_bos
    if max_length <= least:
        raise UserError(f"data.max_length {max_length} leaves no room for a prompt and a response")
    if name.startswith("paper") and not least <= max_prompt_length < max_length:
        raise UserError(
            f"data.max_prompt_length {max_prompt_length} must lie between {least} and data.max_length {max_length}"
        )
    limits = Limits(max_length, max_prompt_length, int(add_bos))
    return lambda prompt, responses, where: TRUNCATIONS[name](prompt, responses, limits, where)


def _check_tokenizer(tokenizer: Any, add_bos: bool) -> None:
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, with which every response must end; set its eos_token")
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("data.add_bos is set but the tokenizer has no BOS token; unset it")


def _screen(comparisons: Sequence[Comparison], degenerate: str, counts: Counter[str]) -> list[Comparison]:
    """The comparisons without empty or identical responses, or with them if they are to be kept."""
    if degenerate not in DEGENERATE:
        raise unknown("choice for data.degenerate", degenerate, DEGENERATE)
    screened = []
    for comparison in comparisons:
        if len(comparison.responses) != len(comparisons[0].responses):
            numbers = (
                f"{len(comparison.responses)} responses where the first comparison has {len(comparisons[0].responses)}"
            )
            raise UserError(f"{comparison.where}: {numbers}; give all the same number")
        if fault := _fault(comparison.responses):
            if degenerate == "refuse":
                raise UserError(f"{comparison.where}: {fault} response; remove the row or set data.degenerate to drop")
            counts[f"{fault}_{'dropped' if degenerate == 'drop' else 'kept'}"] += 1
        if not fault or degenerate == "keep":
            screened.append(comparison)
    return screened


def _fault(responses: tuple[str, ...]) -> str:
    if not all(map(str.strip, responses)):
        return "empty"
    return "identical" if len(set(responses)) < len(responses) else ""


def _tokenised(
    comparisons: list[Comparison], tokenizer: Any, add_bos: bool
) -> Iterator[tuple[Comparison, Ids, list[Ids]]]:
    """Each comparison with the ids of its prompt, and of its responses with EOS."""
    head = [tokenizer.bos_token_id] if add_bos else []
    for start in range(0, len(comparisons), CHUNK):
        chunk = comparisons[start : start + CHUNK]
        texts = [text for comparison in chunk for text in (comparison.prompt, *comparison.responses)]
        ids = iter(_ids(texts, tokenizer))
        for comparison in chunk:
            prompt, *responses = (next(ids) for _ in range(1 + len(comparison.responses)))
            _check_ids(comparison, prompt, responses, tokenizer, add_bos)
            yield comparison, head + prompt, [[*response, tokenizer.eos_token_id] for response in responses]


def _ids(texts: list[str], tokenizer: Any) -> list[Ids]:
    # Some tokenizer.json files switch on padding and truncation of their own, so both are switched off by name.
    options = {"add_special_tokens": False, "padding": False, "truncation": False}
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]


def _check_ids(comparison: Comparison, prompt: Ids, responses: list[Ids], tokenizer: Any, add_bos: bool) -> None:
    where, eos = comparison.where, tokenizer.eos_token_id
    for number, ids in enumerate([prompt, *responses]):
        if eos in ids:
            part = f"response {number}" if number else "the prompt"
            raise UserError(f"{where}: {part} contains the EOS token {tokenizer.eos_token!r}; remove it from the text")
    if add_bos and prompt[:1] == [tokenizer.bos_token_id]:
        raise UserError(f"{where}: the prompt starts with the BOS token already; unset data.add_bos")
    if not prompt and not add_bos:
        raise UserError(f"{where}: the prompt has no tokens, so nothing predicts a response's first; set data.add_bos")


def _count_cuts(counts: Counter[str], whole: tuple[Ids, list[Ids]], cut: tuple[Ids, list[Ids]]) -> None:
    shorter = [len(after) < len(before) for before, after in zip(whole[1], cut[1], strict=True)]
    counts["prompts_truncated"] += len(cut[0]) < len(whole[0])
    counts["responses_truncated"] += sum(shorter)
    counts["identical_after_truncation"] += any(shorter) and len(set(map(tuple, cut[1]))) < len(cut[1])


def _key(comparisons: Sequence[Comparison], tokenizer: Any, options: dict[str, Any]) -> str:
    """Hash of all that the table depends on; every text goes in with its length, so none runs into the next."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        _check_tokenizer(tokenizer, add_bos=False)
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls switch these two on and off in a tokenizer in use, and encode() overrules them.
    model.update(padding=None, truncation=None)
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, bool(getattr(tokenizer, "split_special_tokens", False)))
    head = json.dumps([CACHE_FORMAT, model, special, sorted(options.items())])
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for comparison in comparisons:
        texts = [text.encode("utf-8", "surrogatepass") for text in (comparison.prompt, *comparison.responses)]
        digest.update(f"{[*map(len, texts)]}{float(comparison.weight)!r}".encode())
        digest.update(b"".join(texts))
    return digest.hexdigest()


def _write_entry(entry: Path, table: Table, result: Report) -> None:
    """Makes the entry beside its place and renames it there."""
    draft = entry.with_name(f"{entry.name}.{os.getpid()}-{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    try:
        table.save(draft)
        content = {"digest": table.full_digest, "report": result._asdict()}
        (draft / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        draft.rename(entry)
    except OSError:
        # Another process that was faster with the same content is as good.
        if not entry.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _open_entry(entry: Path) -> tuple[Table, Report]:
    table = Table.open(entry)
    content = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    if content["digest"] != table.full_digest:
        raise ValueError("its arrays are not those that were written")
    fields = content["report"]
    spans = {name: Lengths(*fields[name]) for name in ("prompt", "response", "whole")}
    return table, Report(**{**fields, **spans})
