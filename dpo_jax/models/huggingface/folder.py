"""Reads and writes Hugging Face model folders: config.json, safetensors (never a pickle) and the tokenizer."""

import logging
import os
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import __version__
from dpo_jax.errors import UserError
from dpo_jax.models import reward_head
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.hf_config import HfConfig
from dpo_jax.models.families.registry import OWN, architecture_of, family_of
from dpo_jax.models.families.wrappers import WRAPPERS, language_model_config
from dpo_jax.models.huggingface.hub import fetch_model, is_hub_name
from dpo_jax.models.huggingface.lazy import lazy_params, load_into_memory
from dpo_jax.models.huggingface.mxfp4 import is_mxfp4
from dpo_jax.models.huggingface.older import with_older_keys
from dpo_jax.models.huggingface.replace import check_replaceable, replace_folder, write_listing
from dpo_jax.models.huggingface.safetensors import (
    DTYPES,
    Fetch,
    entries_of,
    read_json,
    tensors_of,
    weight_files,
    write_json,
    write_tensors,
)
from dpo_jax.models.huggingface.tokenizer import read_tokenizer
from dpo_jax.models.huggingface.tokenizer_files import save_tokenizer
from dpo_jax.models.huggingface.whole import WHOLE, Whole, whole_model
from dpo_jax.paths import expand_home, is_run

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9
# Keys of the number of heads for further tokens in layers after the model's, of which no export has any.
FURTHER_HEADS = ("num_nextn_predict_layers", "num_mtp_layers")


def model_folder(path: str) -> Path:
    """Returns a local Hugging Face model folder.

    Args:
      path: a model folder, a run folder (its exported model is returned), or `owner/name` of the hub (it is fetched).

    Raises:
      UserError: there is no such folder or model of the hub, or the run has not finished.
    """
    if is_hub_name(path):
        return fetch_model(path)
    if not Path(path).is_dir():
        kinds = "a Hugging Face model folder, the folder of a run, or owner/name of the hub"
        raise UserError(f"{path}: no such folder; give {kinds}")
    if not is_run(path):
        return Path(path)
    if not (Path(path) / "model").is_dir():
        raise UserError(f"{path}: this run has exported no model yet; finish it with dpo-jax train")
    return Path(path) / "model"


def adapter_folder(path: str) -> Path:
    """Returns a local PEFT adapter folder.

    Args:
      path: an adapter folder, a run folder (its exported adapters are returned), or `owner/name` of the hub (it is
        fetched).

    Raises:
      UserError: there is no such model of the hub.
    """
    if is_hub_name(path):
        return fetch_model(path)
    return Path(path) / "adapter" if is_run(path) else Path(path)


def read_config(path: str | Path, own: str = "") -> dict[str, Any]:
    """Returns the contents of a config.json; of a model that reads images too, those of its language model.

    Args:
      path: the file or its folder.
      own: `model.family`, a family of the user, which is noted in it; "" for the one that it names.

    Raises:
      UserError: the file is missing, or has no `model_type`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such model folder; give a local folder with a config.json")
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        what = "this is not a Hugging Face model folder"
        if (path / "adapter_config.json").exists():
            what = "these are adapters: give them as lora.path, and the model that they are for as model.path"
        raise UserError(f"{path}: config.json is missing; {what}")
    config = read_json(file)
    if "model_type" not in config:
        raise UserError(f"{file}: model_type is missing; give the family, llama for example")
    if own:
        return {**config, OWN: own}
    try:
        found = language_model_config(config)
    except UserError as error:
        raise UserError(f"{file.parent}: {error}") from None
    if found is not config:
        kinds = f"a {config['model_type']}, which reads images; its language model, a {found['model_type']}, is used"
        log.info(f"{file.parent}: {kinds}")
    return dict(found)


def read_generation(folder: str | Path) -> dict[str, Any]:
    """Returns the contents of a model folder's generation_config.json, {} if it has none."""
    file = Path(folder) / "generation_config.json"
    return read_json(file) if file.exists() else {}


def end_ids(tokenizer: Any, generation: HfConfig, hf_config: HfConfig) -> tuple[int, ...]:
    """Returns the ids of all tokens that end a text: the tokenizer's EOS first, then those of generation_config.json.

    As in transformers, `eos_token_id` is one id or a list, and config.json's counts if generation_config.json has none.

    Raises:
      UserError: `eos_token_id` is neither.
    """
    known = hf_config.get("eos_token_id") if generation.get("eos_token_id") is None else generation["eos_token_id"]
    ends = [] if tokenizer is None else [tokenizer.eos_token_id]
    ends += known if isinstance(known, list) else [] if known is None else [known]
    for end in ends:
        if type(end) is not int or end < 0:
            file = "config.json" if generation.get("eos_token_id") is None else "generation_config.json"
            raise UserError(f"{file}: eos_token_id has {end!r}; give a token id, or a list of them")
    return tuple(dict.fromkeys(ends))


def load_folder(folder: str | Path, own: str = "") -> tuple[Architecture, dict[str, Any], dict[str, Any]]:
    """Reads a model folder as `open_folder` does, with parameters in memory as numpy float32."""
    architecture, config, params = open_folder(folder, own)
    return architecture, config, load_into_memory(params)


def open_folder(folder: str | Path, own: str = "") -> tuple[Architecture, dict[str, Any], dict[str, Any]]:
    """Opens a model folder: reads its config and the headers of its weights, but no weights.

    Weights are model.safetensors or the shards of its index, in float64, float32, float16 or bfloat16. Buffers are
    ignored; a tensor that is missing, unknown or of another shape is an error. `own` is that of `read_config`.

    Returns:
      The architecture; config.json with `dtype` set to that of the weights (of a model that reads images too, that of
      its language model, which names its folder); and lazy parameters, which are read block
      by block when they are put on devices.

    Raises:
      UserError: a file or setting is missing, damaged or not supported.
    """
    folder = Path(folder)
    config = read_config(folder, own)
    try:
        module = family_of(config)
        quantized = config.pop("quantization_config", None)
        if quantized and not (is_mxfp4(quantized) and hasattr(module, "mxfp4_tensors")):
            raise UserError("config.json: quantization_config is not supported; use the model before quantization")
        architecture = architecture_of(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if "auto_map" in config:
        log.warning(
            f"{folder}: its auto_map names code, which is never run; it is read as the {module.CLASS} it claims to be"
        )
    within = not own and read_json(folder / "config.json")["model_type"] in WRAPPERS
    params, dtype = lazy_params(weight_files(folder), module, architecture, within)
    whole = {WHOLE: str(folder.resolve())} if within else {}
    return architecture, {**config, "dtype": dtype, **whole}, params


def save_folder(
    folder: str | Path,
    params: Mapping[str, Any],
    hf_config: HfConfig,
    tokenizer: Any = None,
    dtype: str | None = None,
    generation: HfConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fetch: Fetch = np.asarray,
    writes: bool = True,
    template: str = "",
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder that transformers loads.

    Its class is AutoModelForCausalLM, or AutoModelForSequenceClassification if `hf_config` is that of a reward model.
    The language model of a model that reads images too is written as a part of it; the other tensors are copied.
    The model is written to a temporary folder, which is then renamed, so that `folder` is always a complete model. Call
    it from every process if several hold the parameters.

    Args:
      folder: the new folder; an earlier export there is replaced.
      params: parameters as numpy arrays, on devices, or lazy.
      hf_config: config.json of the model it came from.
      tokenizer: a transformers tokenizer to save with the model, or None.
      dtype: dtype of the file: "float32", "bfloat16" or "float16"; None for that of `hf_config`.
      generation: generation_config.json of the model it came from, or None.
      max_shard_bytes: size above which the weights are split into several files with an index.
      fetch: copies an array to this host's memory; called for one tensor after another.
      template: a chat template to write in place of the tokenizer's; "" for that.
      files: name -> text of further files: the model card, licenses.
      writes: whether this process writes the files. Other processes only call `fetch`, which may communicate.

    Raises:
      UserError: the dtype is unknown, or the folder holds other files.
    """
    folder, dtype = Path(folder).absolute(), _file_dtype(dtype, hf_config)
    module, architecture = family_of(hf_config), architecture_of(hf_config)
    tensors = tensors_of(params, module, architecture, dtype, fetch)
    if not writes:
        deque(tensors, maxlen=0)
        return
    config = {**hf_config, "architectures": [_class_name(module.CLASS, hf_config)], "dtype": dtype}
    entries, whole = entries_of(module, architecture, dtype), whole_model(hf_config, module.PREFIX)
    if whole is not None:
        entries, tensors = whole.around(entries, tensors, module.PREFIX)
    check_replaceable(folder)
    temporary = _new_folder_beside(folder)
    try:
        write_tensors(temporary, tensors, entries, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(temporary, tokenizer, template)
        _write_configs(temporary, config, tokenizer, dict(generation or {}), whole)
        for file, text in (files or {}).items():
            (temporary / file).write_text(text, encoding="utf-8")
        write_listing(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_folder_beside(folder: Path) -> Path:
    """Creates an empty folder, to be renamed to a folder of the same place."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def _class_name(name: str, hf_config: HfConfig) -> str:
    """Returns the class in transformers, given that of the family's language model."""
    return reward_head.reward_class(name) if reward_head.is_reward_config(hf_config) else name


def _file_dtype(dtype: str | None, hf_config: HfConfig) -> str:
    """Returns the dtype of a folder's weights: the given one, or that of `hf_config`."""
    dtype = dtype or hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return dtype


def load_tokenizer(folder: str | Path) -> Any:
    """Returns the tokenizer of a model folder or of a model on the Hugging Face hub. Runs no remote code.

    Args:
      folder: a local folder, a tokenizer's json file in one (read as it is, with the folder's special tokens), or
        `name` or `owner/name` on the hub, optionally with `@revision`.

    Raises:
      UserError: there is no tokenizer, or it has no end-of-sequence token.
    """
    if Path(folder).suffix == ".json" and Path(folder).is_file():
        return _tokenizer_file(Path(folder))
    name = str(folder)
    local = expand_home(name)
    looks_local = name.startswith(("./", "../", "/", "~")) or name.count("/") > 1
    if looks_local and not local.exists():
        raise UserError(f"{name}: there is no such folder to read a tokenizer from")
    found, revision = (local, "") if local.exists() else name.partition("@")[::2]
    source = "this folder" if local.exists() else "the Hugging Face hub (and there is no such folder)"
    tokenizer = read_tokenizer(name, found, revision, source)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    return tokenizer


def _tokenizer_file(file: Path) -> Any:
    """Returns the tokenizer of a json file, unchanged: the folder's own tokenizer class may rebuild it differently."""
    from transformers import PreTrainedTokenizerFast

    base = load_tokenizer(file.parent)
    names = {f"{k}_token": getattr(base, f"{k}_token") for k in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **{k: v for k, v in names.items() if v is not None})


def _write_configs(
    folder: Path, hf_config: HfConfig, tokenizer: Any, generation: dict[str, Any], whole: Whole | None
) -> None:
    """Writes config.json and generation_config.json; generation ends at any EOS that tokenizer or configs name."""
    dropped = ("torch_dtype", "transformers_version", "_name_or_path", WHOLE, OWN)
    without = {key: 0 for key in FURTHER_HEADS if hf_config.get(key)}
    config = with_older_keys({key: value for key, value in hf_config.items() if key not in dropped} | without)
    if whole is not None:
        config = whole.config_with(hf_config)
        whole.copy_processors(folder)
    ends = list(end_ids(tokenizer, generation, hf_config))
    ids = {key: hf_config[key] for key in ("bos_token_id", "pad_token_id") if hf_config.get(key) is not None}
    generation = {**ids, **generation}
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {**generation, "dpo_jax_version": __version__})
