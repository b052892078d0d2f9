"""Token ids of texts by their words: the tokenizer gets each word once, however often it occurs.

A byte-level tokenizer cuts a text into words before it merges bytes. No word goes on across a space after another
character than a blank, so the ids of a text are those of its parts from one such space to the next, one after another.
Looking a part up takes a tenth of the time that the tokenizer takes to make its ids.
"""

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

from dpo_jax.data.spelling import replaces_encoding, token_ids
from dpo_jax.data.truncate import Ids

BORDER = re.compile(r"(?<=\S)(?= )")
INNER = re.compile(r"\S ")
MEMORY = 2**23  # characters of parts to remember, each with the `SIZE` of what else it takes
SIZE = 64
# The expressions by which tokenizers find words: those of Qwen 2 and of Llama 3. GPT-2's has a name instead.
_CONTRACTIONS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}" for digits in (r"\p{N}", r"\p{N}{1,3}")}


class WordIds:
    """The ids of texts as `token_ids` gives them, for a tokenizer that does not change meanwhile.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._by_words = tokenizer, finds_words(tokenizer)
        self._known: dict[str, bytes] = {}
        self._size = 0

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Returns the ids of each text."""
        if not self._by_words:
            return [array("i", ids) for ids in token_ids(texts, self._tokenizer)]
        parts = [BORDER.split(text) for text in texts]
        if self._size > MEMORY:
            self._known, self._size = {}, 0
        new = list(set().union(*parts) - self._known.keys())
        self._size += sum(map(len, new)) + SIZE * len(new)
        for part, ids in zip(new, token_ids(new, self._tokenizer), strict=True):
            self._known[part] = array("i", ids).tobytes()
        return [array("i", b"".join(map(self._known.__getitem__, some))) for some in parts]


def finds_words(tokenizer: Any) -> bool:
    """Returns whether a tokenizer is known to find words within the borders of `BORDER`, and each by itself alone."""
    backend = tokenizer.backend_tokenizer
    if replaces_encoding(type(tokenizer)) or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    tokens = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or INNER.search(token.content) for token in tokens):
        return False
    kinds = [_kind(step) for stage in (backend.normalizer, backend.pre_tokenizer) for step in _steps(stage)]
    if "words" not in kinds or "" in kinds:
        return False
    return "bytes" not in kinds[: kinds.index("words")]  # which would no longer have the spaces of the text


def _steps(stage: Any) -> list[Any]:
    """Returns the steps of a stage of a Rust tokenizer, in order: none, the stage itself, or those of a sequence."""
    if stage is None:
        return []
    return [one for step in stage for one in _steps(step)] if type(stage).__name__ == "Sequence" else [stage]


def _kind(step: Any) -> str:
    """Returns "words" for a step that finds words, "bytes" or "other" if it crosses no border, "" for unknown.

    A step written in Python is unknown; it has no settings.
    """
    stage, kind = type(step).__module__.rpartition(".")[2], type(step).__name__
    if (stage, kind) in (("normalizers", "NFC"), ("pre_tokenizers", "Digits")):
        return "other"
    if stage != "pre_tokenizers" or kind not in ("ByteLevel", "Split"):
        return ""
    settings = json.loads(step.__getstate__())
    if kind == "Split":
        known = settings["behavior"] == "Isolated" and not settings["invert"]
        return "words" if known and settings["pattern"].get("Regex") in WORDS else ""
    return "" if settings["add_prefix_space"] else "words" if settings["use_regex"] else "bytes"
