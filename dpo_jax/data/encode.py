"""Text to token ids: comparisons are rendered, tokenized, checked, truncated and counted, a chunk at a time.

Memory stays that of one chunk: every stage is a generator over the one before it.
"""

from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dpo_jax.data.chat import Rendered, plain_text, render_comparison
from dpo_jax.data.report import EncodeReport, EncodeTally, NothingLeftError
from dpo_jax.data.sources.base import Item, Note, or_error, prompt_key, unknown_choice
from dpo_jax.data.special_tokens import SpecialTokens, check_special_ids
from dpo_jax.data.spelling import token_offsets
from dpo_jax.data.table import Table
from dpo_jax.data.template import Template
from dpo_jax.data.token_weights import aligned, as_given, truncated_weights
from dpo_jax.data.truncate import TRUNCATIONS, Ids, Limits
from dpo_jax.data.turns import as_turns, common_size, scored_tokens
from dpo_jax.data.word_ids import WordIds
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison, Tokens

CHUNK = 1024  # comparisons that the tokenizer gets in one call, which it spreads over its threads
DEGENERATE = ("drop", "refuse", "keep")
BOUNDARIES = ("auto", "separate", "joint")
T = TypeVar("T")


class EncodeOptions(NamedTuple):
    """Options of `encode`. The table and its cache key depend on all of them.

    Attributes:
      max_length: most tokens of a prompt with any one of its responses.
      max_prompt_length: tokens to which the paper's truncation modes cut a prompt; other modes ignore it.
      truncation: a name in `TRUNCATIONS`.
      degenerate: what to do with empty, identical or misplaced responses: `drop`, `refuse` or `keep`.
      add_bos: whether to put BOS before every prompt that does not begin with it. BOS is never cut off. None: if the
        tokenizer does so by itself; a conversation then has what its template writes.
      boundary: `separate` tokenizes prompt and responses separately, as the paper's code does. `joint` tokenizes them
        together, as TRL does: a token that spans the end of the prompt belongs to the response. `auto` is joint for
        conversations, whose templates may end a prompt with a space or newline, and separate for texts.
      template: how conversations become text.
      skip_bad_rows: most bad examples to skip and count before one is an error.
    """

    max_length: int
    max_prompt_length: int
    truncation: str
    degenerate: str
    add_bos: bool | None
    boundary: str = "auto"
    template: Template = Template()
    skip_bad_rows: int = 0


def prompt_limit(max_length: int) -> int:
    """Returns the default of `max_prompt_length`: the paper's 256, or half of `max_length` if that is less."""
    return min(256, max_length // 2)


def encode(items: Iterable[Item], tokenizer: Any, **options: Any) -> tuple[Table, EncodeReport]:
    """Returns items as a table in memory, and the report on them.

    Args:
      items: comparisons that all have the same number of responses, errors and notes.
      tokenizer: a fast Hugging Face tokenizer with an EOS token.
      options: the fields of `EncodeOptions`.

    Raises:
      UserError: an option is wrong; a comparison cannot be encoded (the message begins with its `where`); nothing is
        left.
    """
    tally = EncodeTally()
    table = Table.of(encode_stream(items, tokenizer, EncodeOptions(**options), tally))
    return table, tally.report()


def encode_stream(
    items: Iterable[Item], tokenizer: Any, options: EncodeOptions, tally: EncodeTally
) -> Iterator[Tokens]:
    """Yields comparisons as token ids and counts them in `tally`. A response ends with EOS unless it was truncated.

    Raises:
      UserError: as `encode`, while iterating.
    """
    check_encode_options(tokenizer, options)
    word_ids = WordIds(tokenizer)
    finish = partial(_finish, SpecialTokens.of(tokenizer), tokenizer, options, tally)
    rendered = _rendered(_screened(items, options, tally), tokenizer, options, tally)
    for chunk in _batched(_without_faults(rendered, options, tally), CHUNK):
        tokenized = _tokenized(chunk, word_ids, tokenizer, options.boundary)
        for (comparison, texts), ids in zip(chunk, tokenized, strict=True):
            result = or_error(finish, comparison, texts, *ids)
            if isinstance(result, UserError):
                tally.bad(result, options.skip_bad_rows)
            elif result is not None:
                yield result
    if not tally.counts["kept"]:
        raise NothingLeftError(
            f"none of {tally.counts['read']} comparisons is left to encode; counted: {tally.found()}"
        )


def check_encode_options(tokenizer: Any, options: EncodeOptions) -> None:
    """Checks the options, and that the tokenizer can serve.

    Raises:
      UserError: an unknown name, a length without room, or a tokenizer that is slow or lacks EOS or BOS.
    """
    for kind, name, known in (
        ("truncation (data.truncation)", options.truncation, TRUNCATIONS),
        ("choice for data.degenerate", options.degenerate, DEGENERATE),
        ("choice for data.boundary", options.boundary, BOUNDARIES),
    ):
        if name not in known:
            raise unknown_choice(kind, name, known)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, which must end every response; set its eos_token")
    if options.add_bos and tokenizer.bos_token_id is None:
        raise UserError("data.add_bos is set but the tokenizer has no BOS token; unset data.add_bos")
    least = 1 + SpecialTokens.of(tokenizer).bos_before("", options.add_bos)
    if options.max_length <= least:
        raise UserError(f"data.max_length {options.max_length} leaves no room for a prompt and a response; raise it")
    if options.truncation.startswith("paper") and not least <= options.max_prompt_length < options.max_length:
        raise UserError(
            f"data.max_prompt_length {options.max_prompt_length} must lie between {least} and data.max_length "
            f"{options.max_length}"
        )


def _screened(items: Iterable[Item], options: EncodeOptions, tally: EncodeTally) -> Iterator[Comparison]:
    """Yields the comparisons among items; counts notes and bad examples."""
    size = None
    for item in items:
        if isinstance(item, Note):
            tally.notes[item.text] += item.number
            continue
        tally.counts["read"] += 1
        if isinstance(item, UserError):
            tally.bad(item, options.skip_bad_rows)
            continue
        size = len(item.responses) if size is None else size
        if len(item.responses) != size:
            numbers = f"{len(item.responses)} responses where the first comparison has {size}"
            raise UserError(f"{item.where}: {numbers}; give every comparison the same number")
        yield item


def _without_faults(
    pairs: Iterator[tuple[Comparison, Rendered]], options: EncodeOptions, tally: EncodeTally
) -> Iterator[tuple[Comparison, Rendered]]:
    """Yields rendered comparisons; counts degenerate ones."""
    for comparison, rendered in pairs:
        if fault := _fault(comparison, rendered):
            if options.degenerate == "refuse":
                message = f"{comparison.where}: {fault} response; remove the example or set data.degenerate to drop"
                tally.bad(UserError(message), options.skip_bad_rows)
                continue
            tally.counts[f"{fault}_{'dropped' if options.degenerate == 'drop' else 'kept'}"] += 1
        if not fault or options.degenerate == "keep":
            yield comparison, rendered


def _fault(comparison: Comparison, rendered: Rendered) -> str:
    """Returns `empty`, `identical` or `misplaced` for a degenerate comparison, else ''.

    Responses are compared as rendered, because a template may drop content. A response without text is empty even if
    the template writes tokens around it.
    """
    texts = [text for text in rendered.responses if text is not None]
    given = [plain_text(response) for response in comparison.responses if response is not None]
    if rendered.emptied or not all(map(str.strip, [*texts, *given])):
        return "empty"
    if len(set(texts)) < len(texts):
        return "identical"
    return "misplaced" if comparison.misplaced else ""


def _rendered(
    comparisons: Iterator[Comparison], tokenizer: Any, options: EncodeOptions, tally: EncodeTally
) -> Iterator[tuple[Comparison, Rendered]]:
    for comparison in comparisons:
        rendered = or_error(render_comparison, comparison, tokenizer, options.template)
        if isinstance(rendered, UserError):
            tally.bad(rendered, options.skip_bad_rows)
        else:
            tally.notes.update(rendered.notes)
            yield comparison, rendered


def _batched(values: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(values, size)):
        yield batch


def _tokenized(
    chunk: list[tuple[Comparison, Rendered]], word_ids: WordIds, tokenizer: Any, boundary: str
) -> Iterator[tuple[Ids, list[Ids], list[list[bool]], int, int]]:
    """Yields prompt ids, ids of each response, which of them are scored, prompt tokens moved to the responses, and
    whether the responses were tokenized behind the prompt (1) or alone (0).

    An absent response has no ids. All tokens are scored if a response has no list.
    """
    joint = [boundary == "joint" or (boundary == "auto" and isinstance(c.prompt, Chat)) for c, _ in chunk]
    texts = [r.prompt for _, r in chunk]
    for j, (_, rendered) in zip(joint, chunk, strict=True):
        texts += [rendered.prompt * j + text for text in rendered.responses if text is not None]
    ids = word_ids(texts)
    following = iter(ids[len(chunk) :])
    for (_, rendered), j, prompt in zip(chunk, joint, ids, strict=False):
        responses = [array("i") if text is None else next(following) for text in rendered.responses]
        size = len(prompt)
        if j:
            # All responses share one prompt, so it ends where the first of them departs from the prompt's own tokens.
            size = min((common_size(prompt, response) for response in responses if response), default=size)
        scored = [_scored(rendered, place, j, tokenizer) for place in range(len(responses))]
        start = size if j else 0
        moved = len(prompt) - size
        yield prompt[:size], [r[start:] for r in responses], [s[start:] for s in scored], moved, int(j)


def _scored(rendered: Rendered, place: int, joint: bool, tokenizer: Any) -> list[bool]:
    """Returns which tokens of a response the assistant wrote; [] for all."""
    if not rendered.spans or not rendered.spans[place]:
        return []
    before, text = rendered.prompt * joint, rendered.responses[place] or ""
    return scored_tokens(rendered.spans[place], token_offsets(before + text, tokenizer), len(before))


def _finish(
    special: SpecialTokens,
    tokenizer: Any,
    options: EncodeOptions,
    tally: EncodeTally,
    comparison: Comparison,
    rendered: Rendered,
    prompt: Ids,
    responses: list[Ids],
    scored: list[list[bool]],
    moved: int,
    joint: int,
) -> Tokens | None:
    """Checks ids, adds BOS and EOS, truncates and counts; None if no room or no weight is left for a response."""
    where, bos = comparison.where, special.bos_before(comparison.prompt, options.add_bos)
    if bos and special.bos in prompt[:1]:
        bos = False
        tally.notes["prompts that begin with BOS already; no second one was added"] += 1
    weights, some_scored = _weights(comparison, rendered, joint, prompt, responses, tokenizer), any(scored)
    check_special_ids(where, prompt, responses, special, bos, rendered.templated, some_scored)
    begun = array("i", [special.bos]) + prompt if bos and special.bos is not None else prompt
    end = array("i", [special.eos])
    ended = [ids + end if text is not None else ids for ids, text in zip(responses, rendered.responses, strict=True)]
    limits = Limits(options.max_length, options.max_prompt_length, int(special.bos in begun[:1]))
    result = TRUNCATIONS[options.truncation](begun, ended, limits, where)
    if result is None:
        tally.counts["prompt_too_long_dropped"] += 1
        return None
    token_weights = truncated_weights(weights, list(map(len, result[1])))
    if any(len(one) and not one.any() for one in token_weights):
        tally.counts["unweighted_dropped"] += 1
        return None
    tally.counts["boundary_moved"] += moved > 0
    if special.unk is not None:
        tally.counts["unknown_tokens"] += sum(ids.count(special.unk) for ids in (prompt, *responses))
    tally.counts["eos_added"] += not rendered.ends
    tally.count_truncated((begun, ended), result)
    ids, *truncated = [np.array(part, np.int32) for part in (result[0], *result[1])]
    masks = tuple(_mask(mask, len(part)) for mask, part in zip(scored, truncated, strict=True)) if some_scored else ()
    if any((one == 0).any() for one in token_weights):
        masks = tuple(one > 0 for one in token_weights)
    tally.keep(*result, unscored=sum(int((~mask).sum()) for mask in masks), token_weights=token_weights)
    fields = comparison.weight, prompt_key(comparison.prompt), comparison.preference, comparison.scores
    return Tokens(ids, tuple(truncated), *fields, masks, token_weights)


def _weights(
    comparison: Comparison, rendered: Rendered, joint: int, prompt: Ids, responses: list[Ids], tokenizer: Any
) -> list[list[float]]:
    """Returns the weight of each token of each response, without EOS or with it; [] where all have 1."""
    if not comparison.token_weights:
        return [[] for _ in responses]
    if any(rendered.spans):
        raise UserError(f"{comparison.where}: 'token_weights' are for responses of one turn; remove them")
    before, start, found = rendered.prompt * joint, len(prompt) * joint, []
    parts = comparison.token_weights, comparison.responses, responses, rendered.responses
    for weights, given, ids, text in zip(*parts, strict=True):
        offsets, size = list[tuple[int, int]](), len(text or "")
        if weights and isinstance(weights[0], tuple):
            places = token_offsets(before + (text or ""), tokenizer)[start:]
            offsets = [(a - len(before), b - len(before)) for a, b in places]
            if isinstance(comparison.prompt, Chat):
                content = as_turns(given)[0].get("content") or ""
                offsets, size = as_given(comparison.where, offsets, text or "", content, tokenizer)
            elif isinstance(given, str) and len(given) > size:
                offsets, size = [*offsets, (size, len(given))], len(given)  # of EOS, taken off and added again
        found.append(aligned(comparison.where, weights, len(ids), offsets, size))
    return found


def _mask(scored: list[bool], size: int) -> np.ndarray:
    """Returns which tokens of a truncated response are scored; EOS is, and all are where nothing says otherwise."""
    return np.array([*scored, *[True] * size][:size], bool)
