"""Reads a tokenizer through transformers, which may raise anything on a damaged file."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.safetensors import read_json


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
    _import_transformers()
    from transformers import AutoTokenizer

    try:
        options = {"revision": revision or "main", "trust_remote_code": False, "config": _config_to_read(Path(where))}
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
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


class _LateTorch(types.ModuleType):
    """Stands for torch in a module that may never use it; imports it at the first look into it."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]
        return getattr(importlib.import_module("torch"), name)


def _import_transformers() -> None:
    """Imports of transformers what tokenizers need.

    The base class of configs imports a module of rotary positions, which tokenizers never call, and with it all of
    torch where that is installed, for a second. That module alone gets a torch that is imported when it is used.
    """
    importlib.import_module("transformers.utils.generic")  # asks, once, which libraries are installed
    if not {"torch", "transformers.modeling_rope_utils"} & set(sys.modules):
        late = sys.modules["torch"] = _LateTorch("torch")
        try:
            importlib.import_module("transformers.modeling_rope_utils")
        finally:
            if sys.modules.get("torch") is late:
                del sys.modules["torch"]


def _config_to_read(folder: Path) -> Any:
    """Returns the config by which transformers chooses the tokenizer's class, or None to let it read config.json.

    Where tokenizer_config.json names the class, of the model's config no more than its type and names is looked at. Its
    own class, which transformers would import, takes 1.5 s where torch is installed.
    """
    from transformers import PreTrainedConfig

    files = [folder / "tokenizer_config.json", folder / "config.json"]
    if not all(file.is_file() for file in files):
        return None
    named, read = (read_json(file) for file in files)
    if not named.get("tokenizer_class") or "auto_map" in named:
        return None
    config = PreTrainedConfig()
    config.name_or_path = str(folder)
    for key in {"model_type", "model_name", "tokenizer_class"} & set(read):
        setattr(config, key, read[key])
    return config


def _needs_sentencepiece(folder: Path) -> bool:
    """Returns whether a folder has a sentencepiece model alone, and the package is absent."""
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    return alone and importlib.util.find_spec("sentencepiece") is None
