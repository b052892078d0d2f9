"""Adapter folders of PEFT, read and written: `adapter_config.json` and `adapter_model.safetensors`."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.tensor_map import Tensor, in_layer, module_axes, within_layer
from dpo_jax.models.huggingface.safetensors import read_json, write_json
from dpo_jax.models.lora import ALL, Lora, adapted_modules, adapter_name, lead_sizes, whole_modules, whole_names

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Prefix in PEFT of a model's tensors, and of those of a language model in a model that reads images too.
PLAIN, WITHIN = "base_model.model.model.", "base_model.model.model.language_model."
# PEFT's settings that are read, or that do not change what adapters compute. Any other setting is an error.
KNOWN = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "init_lora_weights"}
KNOWN |= {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "peft_version"}
KNOWN |= {"eva_config", "megatron_core", "qalora_group_size", "revision", "task_type", "modules_to_save", "use_rslora"}
KNOWN |= {"target_parameters"}
UNSET = (None, False, "none", [], {})
STARTS = (True, False, None, "eva", "gaussian", "orthogonal")  # initializations that leave the base's weights alone


def save_adapters(
    folder: Path, adapters: Any, lora: Lora, architecture: Architecture, base: str, within: bool = False
) -> None:
    """Writes an adapter folder that PEFT loads.

    Args:
      folder: created if it is missing.
      adapters: adapters on the host or on devices.
      lora: their options.
      architecture: architecture of the base.
      base: folder or hub id of the base.
      within: the base is a model that reads images too, of which the adapters' is the language model.
    """
    tensors, chosen, ranks = {}, adapted_modules(architecture, lora.targets), dict[str, int]()
    for name, tensor in chosen.items():
        a, b = (np.asarray(adapters["layers"][adapter_name(tensor)][key]) for key in ("lora_a", "lora_b"))
        rank = ranks[within_layer(name)] = a.shape[-1]  # a module of a PEFT folder may have one of its own
        count = math.prod(lead_sizes(tensor))  # of experts: rows of A are (expert, rank), columns of B (rank, expert)
        for place, i in enumerate(tensor.layers_of(architecture)):
            prefix = _peft_prefix(_peft_module(name, chosen), i)
            rows = a[place].reshape(count, -1, rank).swapaxes(1, 2).reshape(count * rank, -1)
            columns = b[place].reshape(count, rank, -1).transpose(2, 1, 0).reshape(-1, rank * count)
            tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = map(np.ascontiguousarray, (rows, columns))
    wholes = whole_modules(architecture, lora.targets)
    for name, key in wholes.items():
        tensors[f"base_model.model.{name}.weight"] = np.array(adapters[key])  # tied ones twice: each is a copy in PEFT
    if within:
        tensors = {name.replace(PLAIN, WITHIN, 1): tensor for name, tensor in tensors.items()}
    modules = sorted({within_layer(name) for name, tensor in chosen.items() if not tensor.parts[0].lead})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none"},
        "target_modules": _targets_within(modules) if within else modules,
        "fan_in_fan_out": any(not (t.parts[0].inputs or t.parts[0].lead) for t in chosen.values()),
    }
    if parameters := sorted({within_layer(n) for n, tensor in chosen.items() if tensor.parts[0].lead}):
        settings["target_parameters"] = parameters
    if wholes:
        settings["modules_to_save"] = sorted(name.rpartition(".")[2] for name in wholes)
    if own := {module: rank for module, rank in ranks.items() if rank != lora.rank}:
        alphas = {module: lora.alpha * rank / lora.rank for module, rank in own.items()}
        settings |= {"rank_pattern": own, "alpha_pattern": alphas}
    write_json(folder / SETTINGS, settings)


def load_adapters(folder: Path, architecture: Architecture) -> tuple[dict[str, Any], Lora]:
    """Returns the adapters in a PEFT folder as host arrays, and their options.

    Raises:
      UserError: the folder holds no LoRA, one that does not fit the model, or an unsupported setting.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder}: holds no LoRA; {SETTINGS} with peft_type LORA is needed")
    for key, value in settings.items():
        if (key not in KNOWN and value not in UNSET) or (key == "init_lora_weights" and value not in STARTS):
            raise UserError(f"{folder / SETTINGS}: {key} = {value!r} is not supported")
    try:
        tensors = {name.replace(WITHIN, PLAIN, 1): x for name, x in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); only safetensors are supported") from None
    targets = _read_targets(settings.get("target_modules") or (), tensors, architecture)
    targets += tuple(settings.get("target_parameters") or ())
    rank, wholes = int(settings["r"]), tuple(settings.get("modules_to_save") or ())
    lora = Lora(rank, float(settings["lora_alpha"]) * rank / _divisor(settings, rank), targets + wholes)
    adapters: dict[str, Any] = dict(_read_wholes(folder, tensors, wholes, architecture))
    adapters["layers"] = dict(_read_adapters(folder, tensors, settings, lora, architecture))
    if tensors:
        raise UserError(
            f"{folder / WEIGHTS}: tensor {min(tensors)} is not part of the adapter of a {architecture.family}"
        )
    return adapters, lora


def _divisor(settings: Mapping[str, Any], rank: int) -> float:
    """Returns what alpha is divided by: r, or sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    return math.sqrt(rank) if settings.get("use_rslora") else rank


def _read_wholes(
    folder: Path, tensors: dict[str, Any], names: tuple[str, ...], architecture: Architecture
) -> dict[str, np.ndarray]:
    """Returns the modules trained in full, by key of the parameter, and removes their tensors from `tensors`.

    Raises:
      UserError: a module is neither embedding nor head, has no tensor or one of another shape; or the model ties the
        two and the file does not.
    """
    found: dict[str, np.ndarray] = {}
    for name in names:
        if not whole_modules(architecture, (name,)):
            known = ", ".join(sorted({whole.rpartition(".")[2] for whole in whole_names(architecture)}))
            raise UserError(f"{folder / SETTINGS}: modules_to_save has {name!r}; only {known} are supported")
    for module, key in whole_modules(architecture, names).items():
        tensor = tensors.pop(f"base_model.model.{module}.weight", None)
        if tensor is None:
            why = f"tensor base_model.model.{module}.weight is missing"
            why += "; the model ties embedding and head, so that both are needed" if architecture.tied else ""
            raise UserError(f"{folder / WEIGHTS}: {why}")
        if tensor.shape != (architecture.vocab, architecture.width):
            shape = (architecture.vocab, architecture.width)
            raise UserError(f"{folder / WEIGHTS}: {module} has shape {tensor.shape}, the model's is {shape}")
        tensor = tensor.astype(np.float32)
        if not np.array_equal(found.setdefault(key, tensor), tensor):
            raise UserError(
                f"{folder / WEIGHTS}: embedding and head differ, but config.json ties them; untie them there"
            )
    return found


def _read_targets(names: Any, tensors: Mapping[str, Any], architecture: Architecture) -> tuple[str, ...]:
    """Returns the targets of a PEFT folder; if they are a regular expression, the modules that have tensors."""
    if names == ALL:
        return (ALL,)
    if isinstance(names, str):
        names = [
            name
            for name, tensor in adapted_modules(architecture, (ALL,)).items()
            if f"{_peft_prefix(name, tensor.layers_of(architecture)[0])}A.weight" in tensors
        ]
    # PEFT may name the module of each layer. A module that is not adapted in all layers fails later: missing tensors.
    every = {within_layer(re.sub(r"\.\d+\.", ".{i}.", name)) for name in names}
    return tuple(sorted(every))


def _peft_prefix(name: str, layer: int) -> str:
    """Returns the prefix of a module's tensor names in PEFT."""
    return f"base_model.model.{in_layer(name, layer)}.lora_"


def _targets_within(modules: Sequence[str]) -> str:
    """Returns PEFT's `target_modules` for the language model alone: parts for images have modules of the same names."""
    return rf"model\.language_model\..*\.({'|'.join(map(re.escape, modules))})"


def _peft_module(name: str, chosen: Mapping[str, Tensor]) -> str:
    """Returns a module's name in PEFT. An adapted parameter of all experts is a wrapper around their module, and around
    the wrapper of an earlier one."""
    if not chosen[name].parts[0].lead:
        return name
    module = name.rpartition(".")[0]
    wrappers = [other for other in chosen if other.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(wrappers) - 1 - wrappers.index(name))


def _module_alpha(file: Path, settings: Mapping[str, Any], name: str) -> float:
    """Returns alpha of a module by PEFT's rule: that of the first pattern which its name ends with."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UserError(f"{file}: alpha_pattern has {pattern!r}; only names of modules are supported")
        if f".{name}".endswith(f".{pattern}"):
            return alpha
    return settings["lora_alpha"]


def _read_adapters(
    folder: Path, tensors: dict[str, Any], settings: Mapping[str, Any], lora: Lora, architecture: Architecture
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (key of an adapter, its leaves), and removes the tensors it reads from `tensors`.

    A module's own alpha and rank are folded into B, so that one `Lora` holds for all modules.
    """
    chosen, ranks = adapted_modules(architecture, lora.targets), dict[str, int]()
    for name, tensor in chosen.items():
        numbers = tensor.layers_of(architecture)
        keys = [_peft_prefix(_peft_module(name, chosen), i) for i in numbers]
        several = UserError(f"{folder / WEIGHTS}: the layers of {name} have several ranks; give them one")
        try:
            found = ([tensors.pop(f"{key}{side}.weight") for key in keys] for side in "AB")
            a, b = (np.stack(layers).astype(np.float32) for layers in found)
        except KeyError as error:
            raise UserError(f"{folder / WEIGHTS}: tensor {error.args[0]} is missing") from None
        except ValueError:
            raise several from None
        if ranks.setdefault(within_layer(name), a.shape[1]) != a.shape[1]:  # of layers of another kind
            raise several
        lead, (inputs, outputs) = lead_sizes(tensor), module_axes(tensor)
        layers, count, rank = len(a), math.prod(lead), a.shape[1] // math.prod(lead)
        if a.shape[1:] != (count * rank, math.prod(inputs)) or b.shape[1:] != (math.prod(outputs), rank * count):
            raise UserError(f"{folder / WEIGHTS}: {keys[0]}A and B do not fit the {architecture.family}'s {name}")
        alphas = [_module_alpha(folder / SETTINGS, settings, in_layer(name, i)) for i in numbers]
        b = b * (np.array(alphas, np.float32) / _divisor(settings, rank) / (lora.alpha / lora.rank))[:, None, None]
        a = a.reshape(layers, count, rank, -1).swapaxes(2, 3).reshape(layers, *lead, *inputs, rank)
        b = b.reshape(layers, -1, rank, count).transpose(0, 3, 2, 1).reshape(layers, *lead, rank, *outputs)
        yield adapter_name(tensor), {"lora_a": np.ascontiguousarray(a), "lora_b": np.ascontiguousarray(b)}
