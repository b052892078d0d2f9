"""The model section of a config -> a tokenizer, and a model with its weights."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpo_jax import distributed
from dpo_jax.config.schema import Config, LoraConfig, ModelConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.models import lora, qlora, reward_head
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.registry import architecture_of, family
from dpo_jax.models.huggingface.folder import (
    adapter_folder,
    load_tokenizer,
    model_folder,
    open_folder,
    read_config,
    read_generation,
    save_folder,
)
from dpo_jax.models.huggingface.lazy import load_into_memory, narrow_dtypes
from dpo_jax.models.init import init_params, map_layers
from dpo_jax.models.lora import Lora
from dpo_jax.models.model import Model, build_model


class LoadedModel(NamedTuple):
    """A model with its weights.

    Attributes:
      model: pure functions.
      params: host arrays, or stored ones; in few bits where the config says so.
      hf_config: the contents of its config.json.
      generation: the contents of its generation_config.json.
      name: its folder, or its name on the hub.
      adapters: host arrays, if only adapters of it are trained.
      lora: what they are, likewise.
      note: what is to be said of it, if anything.
    """

    model: Model
    params: Any
    hf_config: dict[str, Any]
    generation: dict[str, Any]
    name: str = ""

    adapters: Any = None
    lora: Lora | None = None
    note: str = ""

    def policy(self, trained: Any) -> Any:
        """Returns the policy's parameters, in the host's memory, from what is trained."""
        if self.lora is None:
            return trained
        return lora.attach_adapters(self.model.architecture, load_into_memory(self.params), trained, self.lora)

    def save(self, trained: Any, out: Path, tokenizer: Any) -> None:
        """Writes the policy as a Hugging Face folder, adapters merged; of several processes all call it."""
        write = partial(save_folder, out, hf_config=self.hf_config, tokenizer=tokenizer, generation=self.generation)
        if self.lora is None:
            write(trained, fetch=distributed.fetch, writes=distributed.is_primary())
            return
        adapters = distributed.fetch(trained)
        if distributed.is_primary():
            write(lora.merge_adapters(self.model.architecture, qlora.as_floats(self.params), adapters, self.lora))

    def export(self, trained: Any, out: Path, tokenizer: Any) -> None:
        """Writes the policy as `save` does and, where adapters are trained, these beside it, as PEFT has them."""
        self.save(trained, out, tokenizer)
        adapters = None if self.lora is None else distributed.fetch(trained)
        if self.lora is not None and distributed.is_primary():
            base = str(Path(self.name).resolve()) if Path(self.name).exists() else self.name
            lora.save_adapters(out.with_name("adapter"), adapters, self.lora, self.model.architecture, base)


def load_run_tokenizer(options: ModelConfig) -> Any:
    """Returns a tokenizer: that named (a folder's, a hub id's, or that of the synthetic world), or the model's own."""
    name = options.tokenizer
    if name == "synthetic":
        return synthetic.synthetic_tokenizer()
    if not name and not options.path:
        raise UserError("model.tokenizer: name one; a config.json has none of its own")
    local = not name or Path(name).is_dir()
    return load_tokenizer(model_folder(name or options.path) if local else name)


def load_policy(
    options: ModelConfig,
    tokenizer: Any,
    seed: int,
    adapted: LoraConfig | None = None,
    rewarded: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Returns the policy at the start: a folder's weights, or a random draw from a config.json, and adapters if any.

    `rewarded` says how texts become tokens where a reward model is wanted: a language model then gets a new head.

    Raises:
      UserError: neither or both are named; the tokenizer has more ids than the vocabulary; a model of the other kind.
    """
    if bool(options.path) == bool(options.config):
        raise UserError("model: give model.path (weights) or model.config (a config.json, random weights), one of them")
    params, generation, note = None, {}, ""
    if options.path:
        folder = model_folder(options.path)
        architecture, hf_config, params = open_folder(folder)
        generation = read_generation(folder)
    else:
        ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        hf_config = read_config(options.config) | ids | {"dtype": "float32"}  # what it is trained and written in
        architecture = architecture_of(hf_config)
    if rewarded is None and architecture.score:
        raise UserError(f"{options.path}: a reward model, which writes nothing; name a language model")
    if rewarded is not None:
        architecture, hf_config, params, note = _rewarding(architecture, hf_config, params, tokenizer, rewarded, seed)
        if adapted and (adapted.rank or adapted.path):
            raise UserError("lora: the head of a reward model is trained too, which no adapters are; unset lora.rank")
    model = build_model(architecture, compute=options.compute, remat=options.remat)
    if params is None:
        params = init_params(model, seed)
    _check_ids(tokenizer, architecture.vocab, options.path or options.config)
    adapters, kind = load_adapters_config(adapted or LoraConfig(), architecture, seed)
    if kind is not None and jax.default_backend() != "cpu":  # where XLA would make a wide copy beside it
        params = narrow_dtypes(params)
    if adapted and adapted.base:
        params = qlora.quantize_base(params, architecture, adapted.base, map_layers)
    return LoadedModel(model, params, hf_config, generation, options.path, adapters, kind, note)


def _check_ids(tokenizer: Any, vocab: int, where: str) -> None:
    """Refuses a tokenizer with ids that a model has no embedding for, unless they are special tokens that only some of
    a family's models know: Gemma 3's has one for pictures."""
    beyond = {i for i in tokenizer.get_vocab().values() if i >= vocab}
    if not beyond:
        return
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, pad_token_id(tokenizer)}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in used}
    if beyond - special:
        raise UserError(f"{where}: vocab_size {vocab} is too little for the tokenizer's ids up to {max(beyond)}")


def _rewarding(
    architecture: Architecture, hf_config: Any, params: Any, tokenizer: Any, encoding: Mapping[str, Any], seed: int
) -> tuple[Architecture, dict[str, Any], Any, str]:
    """Returns what a reward model is made of, with a new head if it is none yet, and what is to be said of that."""
    name = family(hf_config["model_type"]).CLASS
    hf_config = reward_head.as_reward_config(hf_config, name, pad_token_id(tokenizer), encoding)
    new = architecture_of(hf_config)
    if architecture.score or params is None:
        return new, hf_config, params, ""
    becomes = reward_head.reward_class(name)
    note = f"a {name} becomes a {becomes}: its new head is drawn from normal(0, {new.score_std:.4f})"
    return new, hf_config, reward_head.with_new_head(params, new, seed), note


def pad_token_id(tokenizer: Any) -> int:
    """Returns the token with which texts are padded: the tokenizer's, or its EOS."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_adapters_config(options: LoraConfig, architecture: Architecture, seed: int) -> tuple[Any, Lora | None]:
    """Returns adapters at the start as host arrays, and what they are; nothing where the whole model is trained.

    Raises:
      UserError: adapters that do not fit the model; settings that belong to none, or to others than a folder's.
    """
    given = [key for key in ("rank", "alpha", "targets") if getattr(options, key) != getattr(LoraConfig(), key)]
    if options.path:
        if given:
            raise UserError(f"lora.{given[0]}: the adapters of lora.path have their own; leave it out")
        return lora.load_adapters(adapter_folder(options.path), architecture)
    if options.rank:
        kind = Lora(options.rank, options.alpha, options.targets)
        return lora.init_adapters(architecture, kind, seed), kind
    if options.base:
        raise UserError(f"lora.base: {options.base} cannot be trained, only adapters over it; set lora.rank")
    if given:
        raise UserError(f"lora.{given[0]}: is of adapters, and there are none; set lora.rank too")
    return None, None


def export_notes(config: Config, loaded: LoadedModel) -> list[str]:
    """Returns what is rounded where the policy is written."""
    lines, dtype = [], loaded.hf_config.get("dtype", "float32")
    if dtype != "float32":
        lines.append(f"the policy is written in {dtype}, as the model it came from: what was trained is rounded to it")
    if config.lora.base:
        what = f"adapters are merged into the {config.lora.base} base that they were trained over"
        lines.append(f"the policy is written as it was trained: {what}, made whole; adapter/ has them alone")
    return lines
