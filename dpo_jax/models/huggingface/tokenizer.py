"""Reads a tokenizer through transformers, which may raise anything on a damaged file."""

import importlib.util
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError


def read_tokenizer(name: str, where: Path | str, revision: str, source: str) -> Any:
    """Returns the tokenizer of a folder or of the hub, which has tokenized a word. Runs no remote code.

    Args:
      name: as the user wrote it, for messages.
      where: the folder, or the name on the hub.
      revision: of the hub, or "".
      source: what `where` is, for messages.

    Raises:
      UserError: there is no tokenizer, or its files are damaged.
    """
    from transformers import AutoTokenizer  # imported late: it takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main", trust_remote_code=False)
        tokenizer("a word", add_special_tokens=False)
        tokenizer.eos_token_id  # noqa: B018 (it fails if the configuration is damaged)
        return tokenizer
    except BaseException as error:  # a panic of tokenizers, which is written in Rust, is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if _needs_sentencepiece(Path(where)):
            reason = "tokenizer.model is of sentencepiece, which is not installed; pip install sentencepiece protobuf"
        raise UserError(f"{name}: no tokenizer could be read from {source}: {reason}") from error


def _needs_sentencepiece(folder: Path) -> bool:
    """Returns whether a folder has a sentencepiece model alone, and the package is absent."""
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    return alone and importlib.util.find_spec("sentencepiece") is None
