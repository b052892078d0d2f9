"""Text to token ids: rendered, tokenised, checked, cut to length and counted, a chunk of comparisons at a time."""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dpo_jax.data.chat import Rendered, Template, plain_text, render_comparison
from dpo_jax.data.sources.base import Item, Note, or_error, prompt_key, unknown_name
from dpo_jax.data.table import EncodeReport, EncodeTally, Table
from dpo_jax.data.truncate import TRUNCATIONS, Ids, Limits
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison, Tokens

CHUNK = 1024
DEGENERATE = ("drop", "refuse", "keep")
BOUNDARIES = ("separate", "joint")
T = TypeVar("T")


class EncodeOptions(NamedTuple):
    """How text becomes tokens.

    Attributes:
      max_length: tokens of a prompt with any one of its responses.
      max_prompt_length: what the paper's modes cut prompts to; the other modes do not look at it.
      truncation: a name in `TRUNCATIONS`.
      degenerate: what to do with empty, identical or misplaced responses: `drop`, `refuse` or `keep`.
      add_bos: put BOS before every prompt (None: if the tokenizer does so itself; a conversation has what its template
        writes); it counts as part of the prompt and is never cut off.
      boundary: `separate` tokenises prompt and responses apart, as the paper's code does; `joint` together, as TRL
        does: the prompt is then the tokens with which it begins alone and before every response, and a token that
        spans its end goes with each response.
      template: how conversations are written.
      skip_bad_rows: how many rows that cannot be used are counted instead of raised.
    """

    max_length: int
    max_prompt_length: int
    truncation: str
    degenerate: str
    add_bos: bool | None
    boundary: str = "separate"
    template: Template = Template()
    skip_bad_rows: int = 0


class SpecialTokens(NamedTuple):
    """What a tokenizer has of its own, looked up once for all rows, since transformers takes long to find it.

    Attributes:
      eos, bos: their ids.
      unk: the id of what cannot be written; None where that is EOS too.
      eos_token, bos_token: as text.
      begins: whether the tokenizer puts BOS before a text by itself.
    """

    eos: int
    bos: int | None
    unk: int | None
    eos_token: str
    bos_token: str
    begins: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Looks it up."""
        eos, bos, unk = (getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "bos", "unk"))
        begins = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        return cls(eos, bos, None if unk == eos else unk, tokenizer.eos_token, tokenizer.bos_token, begins)

    def bos_before(self, prompt: Any, options: EncodeOptions) -> bool:
        """Whether BOS is put before a prompt."""
        if options.add_bos is not None:
            return options.add_bos
        return self.begins and not isinstance(prompt, Chat)


def encode(items: Iterable[Item], tokenizer: Any, **options: Any) -> tuple[Table, EncodeReport]:
    """`encoded`, as a table in memory.

    Args:
      items: with comparisons that all have the same number of responses.
      tokenizer: a fast Hugging Face tokenizer with an EOS token.
      options: the fields of `Options`.

    Raises:
      UserError: an option is wrong, or a comparison cannot be encoded; it names the comparison's `where`.
    """
    tally = EncodeTally()
    table = Table.of(encode_one(items, tokenizer, EncodeOptions(**options), tally))
    return table, tally.report()


def encode_one(items: Iterable[Item], tokenizer: Any, options: EncodeOptions, tally: EncodeTally) -> Iterator[Tokens]:
    """Yields comparisons as tokens, every response ended with EOS unless it is cut, and counts what became of them.

    Raises:
      UserError: as `encode`; at the end, if nothing was left.
    """
    check_encode_options(tokenizer, options)
    finish = partial(_finish, SpecialTokens.of(tokenizer), options, tally)
    for chunk in _batched(_rendered(_screened(items, options, tally), tokenizer, options, tally), CHUNK):
        for (comparison, rendered), ids in zip(chunk, _tokenised(chunk, tokenizer, options.boundary), strict=True):
            result = or_error(finish, comparison, rendered, *ids)
            if isinstance(result, UserError):
                tally.bad(result, options.skip_bad_rows)
            elif result is not None:
                yield result
    if not tally.counts["kept"]:
        raise UserError(f"none of {tally.counts['read']} comparisons is left to encode; counted: {tally.found()}")


def check_encode_options(tokenizer: Any, options: EncodeOptions) -> None:
    """Refuses options that are wrong, and tokenizers that cannot serve."""
    for kind, name, known in (
        ("truncation (data.truncation)", options.truncation, TRUNCATIONS),
        ("choice for data.degenerate", options.degenerate, DEGENERATE),
        ("choice for data.boundary", options.boundary, BOUNDARIES),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, with which every response must end; set its eos_token")
    if options.add_bos and tokenizer.bos_token_id is None:
        raise UserError("data.add_bos is set but the tokenizer has no BOS token; unset it")
    least = 1 + SpecialTokens.of(tokenizer).bos_before("", options)
    if options.max_length <= least:
        raise UserError(f"data.max_length {options.max_length} leaves no room for a prompt and a response")
    if options.truncation.startswith("paper") and not least <= options.max_prompt_length < options.max_length:
        raise UserError(
            f"data.max_prompt_length {options.max_prompt_length} must lie between {least} and data.max_length "
            f"{options.max_length}"
        )


def _screened(items: Iterable[Item], options: EncodeOptions, tally: EncodeTally) -> Iterator[Comparison]:
    """The comparisons among items, without those with empty, identical or misplaced responses, unless these are to be
    kept."""
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
            raise UserError(f"{item.where}: {numbers}; give all the same number")
        if fault := _fault(item):
            if options.degenerate == "refuse":
                message = f"{item.where}: {fault} response; remove the row or set data.degenerate to drop"
                tally.bad(UserError(message), options.skip_bad_rows)
                continue
            tally.counts[f"{fault}_{'dropped' if options.degenerate == 'drop' else 'kept'}"] += 1
        if not fault or options.degenerate == "keep":
            yield item


def _fault(comparison: Comparison) -> str:
    said = [plain_text(response) for response in comparison.responses if response is not None]
    if not all(map(str.strip, said)):
        return "empty"
    if len(set(said)) < len(said):
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
            yield comparison, rendered


def _batched(values: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(values, size)):
        yield batch


def _tokenised(
    chunk: list[tuple[Comparison, Rendered]], tokenizer: Any, boundary: str
) -> Iterator[tuple[Ids, list[Ids], int]]:
    """For each comparison the ids of its prompt and of its responses, and how many of the prompt's the boundary moved.

    An absent response has no ids.
    """
    joint = boundary == "joint"
    texts = [r.prompt for _, r in chunk]
    texts += [r.prompt * joint + text for _, r in chunk for text in r.responses if text is not None]
    ids = _ids(texts, tokenizer)
    following = iter(ids[len(chunk) :])
    for (_, rendered), prompt in zip(chunk, ids, strict=False):
        responses = [[] if text is None else next(following) for text in rendered.responses]
        if joint:
            size = min((_common(prompt, response) for response in responses if response), default=len(prompt))
            yield prompt[:size], [response[size:] for response in responses], len(prompt) - size
        else:
            yield prompt, responses, 0


def _ids(texts: list[str], tokenizer: Any) -> list[Ids]:
    # Some tokenizer.json files switch on padding and truncation of their own, so both are switched off by name.
    options = {"add_special_tokens": False, "padding": False, "truncation": False}
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]


def _common(first: Ids, second: Ids) -> int:
    """How many ids two lists begin with in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _finish(
    special: SpecialTokens,
    options: EncodeOptions,
    tally: EncodeTally,
    comparison: Comparison,
    rendered: Rendered,
    prompt: Ids,
    responses: list[Ids],
    moved: int,
) -> Tokens | None:
    """Ids checked, with BOS and EOS, cut and counted; None where the prompt leaves no room."""
    chat, bos = isinstance(comparison.prompt, Chat), special.bos_before(comparison.prompt, options)
    _check_ids(comparison.where, prompt, responses, special, bos, chat)
    head = [special.bos] if bos and special.bos is not None else []
    ended = [
        [*ids, special.eos] if text is not None else [] for ids, text in zip(responses, rendered.responses, strict=True)
    ]
    limits = Limits(options.max_length, options.max_prompt_length, int(bos))
    result = TRUNCATIONS[options.truncation](head + prompt, ended, limits, comparison.where)
    if result is None:
        tally.counts["prompt_too_long_dropped"] += 1
        return None
    tally.counts["boundary_moved"] += moved > 0
    if special.unk is not None:
        tally.counts["unknown_tokens"] += sum(ids.count(special.unk) for ids in (prompt, *responses))
    tally.counts["eos_added"] += not rendered.ends
    _count_cuts(tally.counts, (head + prompt, ended), result)
    tally.keep(*result)
    ids, *cut = (np.array(part, np.int32) for part in chain([result[0]], result[1]))
    key = prompt_key(comparison.prompt)
    return Tokens(ids, tuple(cut), comparison.weight, key, comparison.preference, comparison.scores)


def _check_ids(where: str, prompt: Ids, responses: list[Ids], special: SpecialTokens, bos: bool, chat: bool) -> None:
    for number, ids in enumerate([prompt, *responses]):
        part = f"response {number}" if number else "the prompt"
        # A chat template ends the turns of a prompt with EOS; in text it can only be there by mistake.
        if (number or not chat) and special.eos in ids:
            raise UserError(f"{where}: {part} contains the EOS token {special.eos_token!r}; remove it from the text")
        if number and special.bos in ids:
            raise UserError(f"{where}: {part} contains the BOS token {special.bos_token!r}; remove it from the text")
    if bos and prompt[:1] == [special.bos]:
        raise UserError(f"{where}: the prompt starts with the BOS token already; unset data.add_bos")
    if not prompt and not bos:
        raise UserError(f"{where}: the prompt has no tokens, so nothing predicts a response's first; set data.add_bos")


def _count_cuts(counts: Counter[str], whole: tuple[Ids, list[Ids]], cut: tuple[Ids, list[Ids]]) -> None:
    shorter = [len(after) < len(before) for before, after in zip(whole[1], cut[1], strict=True)]
    present = [tuple(response) for response in cut[1] if response]
    counts["prompts_truncated"] += len(cut[0]) < len(whole[0])
    counts["responses_truncated"] += sum(shorter)
    counts["identical_after_truncation"] += any(shorter) and len(set(present)) < len(present)
