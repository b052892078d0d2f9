"""Special tokens that a message merely spells, such as HTML's <s> or a forged end of turn: they are text.

A tokenizer takes every spelling of a special token for the token. Before a conversation is rendered, each spelling is
replaced by one character of a private plane, so that special tokens in the result are the template's. `token_ids` puts
the spellings back and tokenizes them as text.
"""

import functools
import re
from collections.abc import Sequence
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
            if HIDDEN.search(value):
                raise UserError(f"{comparison.where}: a character for private use (U+F0000 to U+FFFFD); remove it")
            return pattern.sub(lambda match: chr(FIRST + places[match.group()]), value)
        if isinstance(value, dict):
            return {name: hidden(part) for name, part in value.items()}
        return [hidden(part) for part in value] if isinstance(value, list | tuple) else value

    chat: Any = comparison.prompt
    chat = chat._replace(messages=tuple(hidden(chat.messages)), tools=tuple(hidden(chat.tools)))
    return comparison._replace(prompt=chat, responses=tuple(hidden(comparison.responses)))


def token_ids(texts: Sequence[str], tokenizer: Any, **options: Any) -> Any:
    """Returns the tokenizer's result for texts without BOS or EOS, padding and truncation; hidden tokens are text.

    Args:
      texts: plain or rendered texts.
      tokenizer: a fast Hugging Face tokenizer.
      options: of the tokenizer's call.
    """
    # Some tokenizer.json files switch padding and truncation on, so both are switched off by name.
    every = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False} | options
    found = tokenizer(list(texts), return_attention_mask=False, **every)["input_ids"]
    return [_ids(text, tokenizer) if HIDDEN.search(text) else ids for text, ids in zip(texts, found, strict=True)]


def reveal(text: str, tokenizer: Any) -> str:
    """Returns a rendered text with its hidden tokens as their spelling."""
    return HIDDEN.sub(lambda match: _spelled(match, tokenizer), text)


def check_hidden(where: str, text: str | None, tokenizer: Any, turns: bool) -> None:
    """Refuses a rendered text with hidden tokens if the tokenizer cannot tokenize its parts one by one.

    Responses of several turns (`turns`) are refused with any: their tokens must be found again in the text.

    Raises:
      UserError: parts joined differ from the whole, for the same text without the hidden tokens.
    """
    if text is None or not (match := HIDDEN.search(text)):
        return
    bare = HIDDEN.sub("x", text)
    if turns or _ids(bare, tokenizer) != tokenizer(bare, add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"{where}: a message spells the special token {_spelled(match, tokenizer)!r}, which this tokenizer cannot "
            "take as text; remove it from the text"
        )


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Returns the ids of a rendered text: its special tokens by name, the text between them part by part."""
    found: list[int] = []
    special = _special_tokens(tokenizer)
    for part in re.split(f"({_pattern(special).pattern})", text):
        if part in special:
            found.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            found += tokenizer(reveal(part, tokenizer), add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
    return found


def _spelled(match: re.Match, tokenizer: Any) -> str:
    return _special_tokens(tokenizer)[ord(match.group()) - FIRST]


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | {tokenizer.eos_token}, key=lambda token: (-len(token), token)))


@functools.lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))
