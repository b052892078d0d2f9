"""The tokenizer's files of an exported folder: those of the folder it came from, byte for byte.

transformers 5 writes forms that transformers 4, vLLM and llama.cpp cannot read. It only writes a tokenizer that was
made in memory, or changed since it was loaded.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.safetensors import read_json
from dpo_jax.models.huggingface.tokenizer import read_tokenizer

NEW_CLASS = "TokenizersBackend"  # PreTrainedTokenizerFast before transformers 5
CONFIG, TEMPLATE, TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt")
FILES += ("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", TEMPLATE, "chat_template.json")


def save_tokenizer(folder: Path, tokenizer: Any, template: str = "") -> None:
    """Writes the files of a tokenizer into an existing folder.

    Args:
      folder: the folder.
      tokenizer: a transformers tokenizer; its `name_or_path` is the folder it was loaded from, if any.
      template: a chat template to write in place of the tokenizer's; "" keeps that.
    """
    source = _source(str(tokenizer.name_or_path or ""))
    if source is not None and _unchanged(tokenizer, source):
        _copy(source, folder)
    else:
        tokenizer.save_pretrained(folder)
    _name_class(folder)
    if template:
        _write_template(folder, template)


def _source(name: str) -> Path | None:
    """Returns the folder that a tokenizer was loaded from, perhaps in the hub's cache; None if it is unknown."""
    from transformers.utils.hub import cached_file  # imported late: it takes seconds to import

    if Path(name).is_dir():
        return Path(name) if name else None
    try:
        found = cached_file(name, CONFIG, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _copy(source: Path, folder: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATES).is_dir():
        (folder / TEMPLATES).mkdir()
        for file in sorted((source / TEMPLATES).glob("*.jinja")):
            shutil.copyfile(file, folder / TEMPLATES / file.name)


def _unchanged(tokenizer: Any, source: Path) -> bool:
    """Returns whether a tokenizer is that of its folder still: vocabulary, rules, special tokens and chat template."""
    try:
        fresh = read_tokenizer(str(source), source, "", "this folder")
    except UserError:
        return False
    return _state(tokenizer) == _state(fresh)


def _state(tokenizer: Any) -> list[Any]:
    """Returns everything of a tokenizer that its files hold and that changes ids or texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    usage = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}  # set by each call
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")]
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, usage, added, special, flags, tokenizer.chat_template]


def _name_class(folder: Path) -> None:
    """Names the class of a tokenizer as transformers 4 does too, where version 5 has renamed it."""
    if (folder / CONFIG).is_file() and (config := read_json(folder / CONFIG)).get("tokenizer_class") == NEW_CLASS:
        _write_config(folder, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_template(folder: Path, template: str) -> None:
    """Makes a template the only one: as its own file, and in tokenizer_config.json for programs that read it there."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    if (folder / CONFIG).is_file():
        _write_config(folder, {**read_json(folder / CONFIG), "chat_template": template})


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
