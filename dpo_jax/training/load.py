"""Loads the tokenizer and the policy of a config."""

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
from dpo_jax.models.families.registry import architecture_of, family_of
from dpo_jax.models.huggingface import peft_folder
from dpo_jax.models.huggingface.folder import (
    adapter_folder,
    end_ids,
    load_tokenizer,
    model_folder,
    open_folder,
    read_config,
    read_generation,
    save_folder,
)
from dpo_jax.models.huggingface.lazy import load_into_memory, narrow_dtypes
from dpo_jax.models.huggingface.safetensors import read_json, weights_hash
from dpo_jax.models.huggingface.whole import WHOLE, is_part
from dpo_jax.models.init import init_params, map_layers
from dpo_jax.models.interface import Model
from dpo_jax.models.lora import Lora
from dpo_jax.models.model import build_model
from dpo_jax.models.vocabulary import grow_vocabulary, ids_to_embed, size_settings
from dpo_jax.paths import is_run
from dpo_jax.training.router import with_router_loss


class LoadedModel(NamedTuple):
    """A model with its weights.

    Attributes:
      model: pure functions of the architecture.
      params: host or lazy arrays; projections are quantized with `lora.base`.
      hf_config: contents of config.json.
      generation: contents of generation_config.json.
      name: model folder or hub id; "" for random weights.
      adapters: host arrays of the initial adapters; None if the full model is trained.
      lora: options of the adapters; None likewise.
      note: log message about the model; "" for none.
    """

    model: Model
    params: Any
    hf_config: dict[str, Any]
    generation: dict[str, Any]
    name: str = ""
    adapters: Any = None
    lora: Lora | None = None
    note: str = ""

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Returns the ids that end a sampled text: the tokenizer's EOS and those of generation_config.json."""
        return end_ids(tokenizer, self.generation, self.hf_config)

    def policy(self, trained: Any) -> Any:
        """Returns the policy's parameters in host memory, given the trained ones (all, or adapters)."""
        if self.lora is None:
            return trained
        return load_into_memory(self.attached(trained))

    def attached(self, trained: Any) -> Any:
        """Returns the policy's parameters as `policy` does, but those below adapters host or lazy, as they are."""
        if self.lora is None:
            return trained
        return lora.attach_adapters(self.model.architecture, self.params, trained, self.lora)

    def language_model(self) -> "LoadedModel":
        """Returns the model as one that is written alone, if it is a part of a model that reads images too.

        Raises:
          UserError: it is no part of one.
        """
        if not is_part(self.hf_config):
            raise UserError("--language-model: has no effect, the model reads no images; remove it")
        return self._replace(hf_config={key: value for key, value in self.hf_config.items() if key != WHOLE})

    def save(self, trained: Any, out: Path, tokenizer: Any, **options: Any) -> None:
        """Writes the policy as a Hugging Face folder, with adapters merged. Call it from all processes.

        Args:
          trained: the trained parameters: all, or adapters.
          out: the folder.
          tokenizer: of the policy.
          **options: `dtype`, `template` and `files` of `save_folder`.
        """
        write = partial(
            save_folder, out, hf_config=self.hf_config, tokenizer=tokenizer, generation=self.generation, **options
        )
        if self.lora is None:
            write(trained, fetch=distributed.fetch, writes=distributed.is_primary())
            return
        adapters = distributed.fetch(trained)
        if distributed.is_primary():
            write(lora.merge_adapters(self.model.architecture, qlora.as_floats(self.params), adapters, self.lora))

    def save_adapters(self, trained: Any, out: Path, files: Mapping[str, str]) -> None:
        """Writes trained adapters, if any, to `adapter` beside the folder `out`, in PEFT's format.

        `files` has further texts by name. Call it from all processes.
        """
        adapters = None if self.lora is None else distributed.fetch(trained)
        if self.lora is not None and distributed.is_primary():
            # PEFT loads the base from a model folder, which is a part of a run's.
            base = str(model_folder(self.name).resolve()) if Path(self.name).exists() else self.name
            within = is_part(self.hf_config)
            folder = out.with_name("adapter")
            peft_folder.save_adapters(folder, adapters, self.lora, self.model.architecture, base, within)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")


def load_run_tokenizer(options: ModelConfig) -> Any:
    """Returns the tokenizer of a config: `model.tokenizer` (folder, hub id or `synthetic`), or that of the model.

    Raises:
      UserError: no tokenizer is named or found.
    """
    name = options.tokenizer
    if name == "synthetic":
        return synthetic.synthetic_tokenizer()
    if not (name or options.path or options.config):
        raise UserError("model: name one: model.path (weights) or model.config (a config.json, for random weights)")
    if not name and not options.path:
        raise UserError("model.tokenizer: missing, and a config.json has no tokenizer; set model.tokenizer")
    local = not name or Path(name).is_dir()
    return load_tokenizer(model_folder(name or options.path) if local else name)


def compute_dtype(options: ModelConfig, platform: str = "") -> str:
    """Returns the dtype of activations and matmuls: by default bfloat16 on a GPU or TPU, float32 on a CPU."""
    by_device = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return by_device if options.compute == "auto" else options.compute


def recomputed(options: ModelConfig) -> str:
    """Returns what the backward pass recomputes: nothing if that is left to the device, which a run asks before."""
    return "none" if options.remat == "auto" else options.remat


def load_policy(
    options: ModelConfig,
    tokenizer: Any,
    seed: int,
    lora_options: LoraConfig | None = None,
    encoding: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Returns the initial policy: weights of a folder, or random weights of a config.json; with adapters if any.

    Args:
      options: the model section of the config.
      tokenizer: the policy's tokenizer.
      seed: of random weights, adapters and a new reward head.
      lora_options: the adapters; None trains the full model.
      encoding: tokenization options of a reward model (`tables.reward_encoding`), whose head replaces a language
        model's; None for a language model.

    Raises:
      UserError: neither or both of model.path and model.config; a tokenizer of another model; a reward model where a
        language model is needed; adapters for a reward model.
    """
    if bool(options.path) == bool(options.config):
        raise UserError("model: set either model.path (weights) or model.config (a config.json, for random weights)")
    params, generation, note = None, {}, ""
    if options.path:
        folder = model_folder(options.path)
        architecture, hf_config, params = open_folder(folder, options.family)
        generation = read_generation(folder)
        end_ids(tokenizer, generation, hf_config)  # a damaged value fails now, not after training
    else:
        ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        hf_config = read_config(options.config, options.family) | ids | {"dtype": "float32"}  # dtype of its files
        architecture = architecture_of(hf_config)
    grown = _grown_vocabulary(tokenizer, architecture.vocab, options.path or options.config)
    if grown > architecture.vocab:
        note = _growth_note(tokenizer, architecture.vocab, grown, lora_options)
        architecture, params = grow_vocabulary(architecture, params, grown)
        hf_config = {**hf_config, **size_settings(architecture)}
    if encoding is None and architecture.score:
        raise UserError(f"{options.path}: a reward model generates no text; name a language model")
    if encoding is not None:
        reward = _as_reward_model(architecture, hf_config, params, tokenizer, encoding, seed)
        architecture, hf_config, params, new = reward
        note = "; ".join(filter(None, (note, new)))
        if lora_options and (lora_options.rank or lora_options.path):
            raise UserError("lora: adapters cannot train the head of a reward model; remove lora.rank and lora.path")
    model = build_model(architecture, compute=compute_dtype(options), remat=recomputed(options))
    model = with_router_loss(model, options.router_loss, hf_config)
    if params is None:
        params = init_params(model, seed)
    adapters, kind = initial_adapters(lora_options or LoraConfig(), architecture, seed, params)
    if kind is not None and (wholes := lora.whole_modules(architecture, kind.targets)):
        whole = f"{' and '.join(sorted(wholes))}: trained in full, not by adapters (PEFT's modules_to_save)"
        note = "; ".join(filter(None, (note, whole)))
    if kind is not None and jax.default_backend() != "cpu":  # on a CPU, XLA would add a float32 copy
        params = narrow_dtypes(params)
    if lora_options and lora_options.base:
        params = qlora.quantize_base(params, architecture, lora_options.base, map_layers)
    return LoadedModel(model, params, hf_config, generation, options.path, adapters, kind, note)


def _grown_vocabulary(tokenizer: Any, vocab: int, where: str) -> int:
    """Returns the rows that the embedding needs: V, or more if tokens were added to the tokenizer.

    Special tokens for other uses than text need none: the tokenizer of Gemma 3, for example, names an image token that
    the text-only models have no embedding for.

    Raises:
      UserError: the tokenizer is that of another model: it has ids beyond V that are no added tokens.
    """
    beyond = {i for i in tokenizer.get_vocab().values() if i >= vocab}
    if not beyond:
        return vocab
    if beyond - set(tokenizer.added_tokens_decoder):
        raise UserError(
            f"{where}: vocab_size {vocab} is too small for the tokenizer's ids up to {max(beyond)}; set another "
            "model.tokenizer"
        )
    return max(beyond & ids_to_embed(tokenizer), default=vocab - 1) + 1


def _growth_note(tokenizer: Any, vocab: int, needed: int, adapters: LoraConfig | None) -> str:
    """Returns a log message on tokens without an embedding, which get one."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab, needed)))
    shown = ", ".join(repr(token) for token in tokens[:5]) + (", ..." if len(tokens) > 5 else "")
    rows = f"its {vocab:,} rows grow by new ones, each the mean of the others"
    if adapters and (adapters.rank or adapters.path):
        rows += "; adapter/ fits the base without them, so use model/, which has the adapters merged"
    return f"the embedding has no row for {len(tokens)} tokens of the tokenizer ({shown}): {rows}"


def _as_reward_model(
    architecture: Architecture, hf_config: Any, params: Any, tokenizer: Any, encoding: Mapping[str, Any], seed: int
) -> tuple[Architecture, dict[str, Any], Any, str]:
    """Returns architecture, config.json and params of a reward model, and a log message ("" if it was one already)."""
    name = family_of(hf_config).CLASS
    hf_config = reward_head.as_reward_config(hf_config, name, pad_token_id(tokenizer), encoding)
    new = architecture_of(hf_config)
    if architecture.score or params is None:
        return new, hf_config, params, ""
    target = reward_head.reward_class(name)
    note = f"{name} becomes {target}, with a new head sampled from normal(0, {new.score_std:.4f})"
    return new, hf_config, reward_head.with_new_head(params, new, seed), note


def pad_token_id(tokenizer: Any) -> int:
    """Returns the id of the tokenizer's padding token, or of its EOS if it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def initial_adapters(
    options: LoraConfig, architecture: Architecture, seed: int, base: Any = None
) -> tuple[Any, Lora | None]:
    """Returns the initial adapters as host arrays, and their options; (None, None) if the full model is trained.

    `base` has the parameters of the model, for modules that are trained in full beside adapters.

    Raises:
      UserError: adapters that do not fit the model, or options without effect.
    """
    given = [key for key in ("rank", "alpha", "targets") if getattr(options, key) != getattr(LoraConfig(), key)]
    if options.path:
        if given:
            raise UserError(f"lora.{given[0]}: fixed by the adapters at lora.path; remove it")
        return peft_folder.load_adapters(adapter_folder(options.path), architecture)
    if options.rank:
        kind = Lora(options.rank, options.alpha, options.targets)
        return lora.init_adapters(architecture, kind, seed, base), kind
    if options.base:
        raise UserError(f"lora.base: a {options.base} base can only be trained through adapters; set lora.rank")
    if given:
        raise UserError(f"lora.{given[0]}: has no effect without adapters; set lora.rank too")
    return None, None


def check_unmerged(adapters: str, model: str) -> None:
    """Refuses adapters (`lora.path`) beside a model folder that was written with them merged."""
    if not (adapters and Path(model).is_dir()):
        return
    folder, merged = adapter_folder(adapters), model_folder(model)
    if is_run(str(merged.parent)) and merged.with_name("adapter").resolve() == folder.resolve():
        base = read_json(folder / peft_folder.SETTINGS).get("base_model_name_or_path")
        raise UserError(
            f"model.path {model} has the adapters of lora.path {adapters} merged already; set model.path to their base "
            f"{base}, or remove lora.path"
        )


def export_notes(config: Config, loaded: LoadedModel, dtype: str = "") -> list[str]:
    """Returns log messages about rounding in the exported policy. `dtype` is "" for that of the initial model."""
    lines, whose = [], "" if dtype else ", the dtype of the initial model"
    if (dtype := dtype or loaded.hf_config.get("dtype", "float32")) != "float32":
        lines.append(f"the policy is exported in {dtype}{whose}: trained weights are rounded")
    if config.lora.base:
        base = f"the {config.lora.base} base, dequantized"
        lines.append(f"the policy is exported with its adapters merged into {base}; adapter/ holds the adapters alone")
    return lines


def reference_weights(config: Config, policy: LoadedModel, known: str = "") -> tuple[Any, str]:
    """Returns the reference's parameters (host or lazy arrays) and their hash; by default those of the initial policy,
    whose hash may be `known`.

    The reference of new adapters is their base, which is the initial policy too. That of adapters that are trained
    already (`lora.path`) is the model with them: the adapters are returned, to be attached to the base.

    Raises:
      UserError: the architecture of the reference differs from that of the policy.
    """
    params, architecture = policy.params, policy.model.architecture
    if config.lora.path and not config.reference.path:
        return policy.adapters, weights_hash(policy.attached(policy.adapters), architecture)
    if config.reference.path not in ("", config.model.path):
        architecture, _, params = open_folder(model_folder(config.reference.path), config.model.family)
        if architecture.vocab < (rows := policy.model.architecture.vocab):  # it has grown, for tokens that were added
            architecture, params = grow_vocabulary(architecture, params, rows)
        if architecture != policy.model.architecture:
            raise UserError(
                f"reference.path: {config.reference.path} is of another architecture than the policy; change it"
            )
    if params is policy.params and known:
        return params, known
    return params, weights_hash(params, architecture)
