"""Special tokens that a message merely spells, such as HTML's <s> or a forged end of turn: they are text.

A tokenizer takes every spelling of a special token for the token. Before a conversation is rendered, each spelling is
replaced by one character of a private plane, so that special tokens in the result are the template's. `token_ids` puts
the spellings back and tokenizes them as text.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

FIRST = 0xF0000  # of a plane for private use; character FIRST + k stands for special token k
HIDDEN = re.compile(f"[{chr(FIRST)}-{chr(FIRST + 0xFFFD)}]")


def hide_special_tokens(comparison: Comparison, tokenizer: Any) -> Comparison:
    """Returns a conversation in which special tokens that its messages spell are hidden."""
    tokens = _special_tokens(tokenizer)
    pattern, places = _pattern(tokens), {token: k for k, token in enumerate(tokens)}

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            refuse_private(comparison.where, value)
            return pattern.sub(lambda match: chr(FIRST + places[match.group()]), value)
        if isinstance(value, dict):
            return {name: hidden(part) for name, part in value.items()}
        return [hidden(part) for part in value] if isinstance(value, list | tuple) else value

    chat: Any = comparison.prompt
    chat = chat._replace(messages=tuple(hidden(chat.messages)), tools=tuple(hidden(chat.tools)))
    return comparison._replace(prompt=chat, responses=tuple(hidden(comparison.responses)))


def refuse_private(where: str, text: Any) -> None:
    """Refuses a text of the data with a character that would stand for a special token."""
    if isinstance(text, str) and not text.isascii() and HIDDEN.search(text):
        raise UserError(f"{where}: a character for private use (U+F0000 to U+FFFFD); remove it")


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Returns the ids of plain or rendered texts without BOS or EOS, padding and truncation; hidden tokens are text.

    Equal texts are tokenized once, and share their list. The tokenizer spreads a call over its threads.

    Args:
      texts: the texts.
      tokenizer: a fast Hugging Face tokenizer.
    """
    # Some tokenizer.json files switch padding and truncation on, so both are switched off by name.
    options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
    distinct, found = list(dict.fromkeys(texts)), list[Any]()
    if replaces_encoding(type(tokenizer)):
        found = tokenizer(distinct, return_attention_mask=False, **options)["input_ids"]
    else:
        tokenizer("", **options)  # sets them in the Rust tokenizer, whose own call computes ids alone
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
    by_text = {
        text: _ids(text, tokenizer) if not text.isascii() and HIDDEN.search(text) else ids
        for text, ids in zip(distinct, found, strict=True)
    }
    return [by_text[text] for text in texts]


@functools.cache
def replaces_encoding(kind: type) -> bool:
    """Returns whether a class of tokenizers has its own way to encode texts, as that of CodeLlama has."""
    from transformers import PreTrainedTokenizerFast

    own = [name for base in kind.mro() if base not in PreTrainedTokenizerFast.mro() for name in vars(base)]
    return bool({"__call__", "_encode_plus", "_batch_encode_plus"} & set(own))


def reveal(text: str, tokenizer: Any) -> str:
    """Returns a rendered text with its hidden tokens as their spelling."""
    return HIDDEN.sub(lambda match: _spelled(match, tokenizer), text)


def token_offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Returns the (first, end) characters of each token of a rendered text; a hidden token is one character."""
    if not HIDDEN.search(text):
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [(first, end) for _, first, end in _pieces(text, tokenizer)]


def check_hidden(where: str, text: str | None, tokenizer: Any) -> None:
    """Refuses a rendered text with hidden tokens if the tokenizer cannot tokenize its parts one by one.

    Raises:
      UserError: parts joined differ from the whole, for the same text without the hidden tokens.
    """
    if text is None or not (match := HIDDEN.search(text)):
        return
    bare = HIDDEN.sub("x", text)
    if _ids(bare, tokenizer) != tokenizer(bare, add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"{where}: a message spells the special token {_spelled(match, tokenizer)!r}, which this tokenizer cannot "
            "take as text; remove it from the text"
        )


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Returns the ids of a rendered text, see `_pieces`."""
    return [token for token, _, _ in _pieces(text, tokenizer)]


def _pieces(text: str, tokenizer: Any) -> Iterator[tuple[int, int, int]]:
    """Yields (id, first, end) of each token of a rendered text: special tokens by name, the rest part by part."""
    special, start = _special_tokens(tokenizer), 0
    for part in re.split(f"({_pattern(special).pattern})", text):
        if part in special:
            yield tokenizer.convert_tokens_to_ids(part), start, start + len(part)
        elif part:
            # Of each character of the part as it is spelled, its place in the text.
            sizes = [len(reveal(character, tokenizer)) for character in part]
            places = [start + i for i, size in enumerate(sizes) for _ in range(size)]
            options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
            found = tokenizer(reveal(part, tokenizer), **options)
            for token, (first, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
                begin, stop = (places[first], places[end - 1] + 1) if end > first else (start, start)
                yield token, begin, stop
        start += len(part)


def _spelled(match: re.Match, tokenizer: Any) -> str:
    return _special_tokens(tokenizer)[ord(match.group()) - FIRST]


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | {tokenizer.eos_token}, key=lambda token: (-len(token), token)))


@functools.lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))
