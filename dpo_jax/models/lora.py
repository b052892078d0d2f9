"""LoRA (arXiv 2106.09685): a pytree of low-rank additions to projections, in PEFT's folders in and out.

A module W gets W + alpha / rank * A B; its adapter has leaves `lora_a` [L, *inputs, r] and `lora_b` [L, r, *outputs],
with outputs in the file's order. Where a file has several projections fused in one module they share A, as with PEFT.
The model without adapters is the base, untouched: it serves as the reference.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.registry import family
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, sides
from dpo_jax.models.huggingface.safetensors import read_json, write_json
from dpo_jax.records import Array

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL = "all-linear"
# PEFT's settings that are read, or that change nothing in what the adapters compute; any other that is set is refused.
KNOWN = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "init_lora_weights"}
KNOWN |= {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "peft_version"}
KNOWN |= {"eva_config", "megatron_core", "qalora_group_size", "revision", "task_type"}
UNSET = (None, False, "none", [], {})
STARTS = (True, False, None, "eva", "gaussian", "orthogonal")  # other ways to begin change the weights of the base


class Lora(NamedTuple):
    """Which projections are adapted, and how.

    Attributes:
      rank: r.
      alpha: additions are multiplied by alpha / r.
      targets: names of modules as transformers has them, `q_proj` or `attn.c_attn` for example, or `all-linear`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


def adapted_modules(architecture: Architecture, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the modules that are adapted, `{i}` standing for the layer, each with the tensor of its weight.

    Raises:
      UserError: a target that names no projection.
    """
    table = family(architecture.family).tensors(architecture)
    known = {
        name.removesuffix(".weight"): tensor
        for name, tensor in table.items()
        if "{i}" in name and tensor.parts[0].path[-1] == "kernel"
    }
    matched = {target: [n for n in known if target == ALL or f".{n}".endswith(f".{target}")] for target in targets}
    for target, names in matched.items():
        if not names:
            listed = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            raise UserError(f"lora.targets: {target!r} is no projection of a {architecture.family}; it has {listed}")
    return {name: tensor for name, tensor in known.items() if any(name in names for names in matched.values())}


def init_adapters(architecture: Architecture, lora: Lora, seed: int) -> dict[str, Any]:
    """Returns adapters as host arrays, A drawn as PEFT does (uniform up to 1 / sqrt(inputs)), B zero: nothing changes.

    Raises:
      UserError: a rank below 1, no target, or a target that names no projection.
    """
    if lora.rank < 1 or not lora.targets:
        raise UserError("lora: rank must be at least 1, and targets must name a module")
    rng, adapters = np.random.default_rng(seed), {}
    for tensor in adapted_modules(architecture, lora.targets).values():
        inputs, outputs = sides(tensor)
        size = (architecture.layers, *inputs, lora.rank)
        a = (rng.random(size, np.float32) * 2 - 1) / math.sqrt(math.prod(inputs))
        b = np.zeros((architecture.layers, lora.rank, *outputs), np.float32)
        adapters[_name(tensor)] = {"lora_a": a.astype(np.float32), "lora_b": b}
    return {"layers": adapters}


def _name(tensor: Tensor) -> str:
    """Returns the name of a module's adapter with us: those of its projections."""
    return "_".join(part.path[1] for part in tensor.parts)


def _outputs(tensor: Tensor, part: TensorPart) -> tuple[Any, ...]:
    """Returns which of a module's outputs a projection has, to index arrays [L, r, *outputs] with."""
    own = part.take if part.inputs else part.take[len(tensor.split[0]) :]
    return (slice(None), slice(None), *own)


def attach_adapters(architecture: Architecture, base: Any, adapters: Any, lora: Lora) -> Any:
    """Returns the parameters of the adapted model: those of the base, which are not copied, and its adapters."""
    layers, scale = dict(base["layers"]), lora.alpha / lora.rank
    for tensor in adapted_modules(architecture, lora.targets).values():
        a, b = (adapters["layers"][_name(tensor)][key] for key in ("lora_a", "lora_b"))
        for part in tensor.parts:
            name = part.path[1]
            layers[name] = {**layers[name], "lora_a": a, "lora_b": b[_outputs(tensor, part)] * scale}
    return {**base, "layers": layers}


def adapter_axes(architecture: Architecture, of_model: Any, lora: Lora) -> Any:
    """Returns the logical names of the axes of adapters, from those of the model."""
    found = {}
    for tensor in adapted_modules(architecture, lora.targets).values():
        a, b = _axes_of(tensor, tensor.parts[0], of_model)
        fused = (*b[:2], *(None for _ in sides(tensor)[1]))  # several projections lie along these
        found[_name(tensor)] = {"lora_a": a, "lora_b": b if len(tensor.parts) == 1 else fused}
    return {"layers": found}


def _axes_of(tensor: Tensor, part: TensorPart, of_model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the axes of A and B in one projection."""
    kernel, count = of_model["layers"][part.path[1]]["kernel"], 1 + len(sides(tensor)[0])  # with layers
    return (*kernel[:count], "rank"), (kernel[0], "rank", *kernel[count:])


def attached_axes(architecture: Architecture, of_model: Any, of_base: Any, lora: Lora) -> Any:
    """Returns the logical names of the axes of what `joined` returns, from those of the model and of its base."""
    layers = dict(of_base["layers"])
    for tensor in adapted_modules(architecture, lora.targets).values():
        for part in tensor.parts:
            named = dict(zip(("lora_a", "lora_b"), _axes_of(tensor, part, of_model), strict=True))
            layers[part.path[1]] = {**layers[part.path[1]], **named}
    return {**of_base, "layers": layers}


class _Merged:
    """A kernel with its addition, made a layer at a time."""

    def __init__(self, kernel: Array, a: Array, b: Array):
        self.leaves = kernel, a, b

    def __getitem__(self, layer: int) -> np.ndarray:
        kernel, a, b = (np.asarray(x[layer], np.float32) for x in self.leaves)
        return kernel + np.tensordot(a, b, 1)


def merge_adapters(architecture: Architecture, base: Any, adapters: Any, lora: Lora) -> Any:
    """Returns the parameters of a plain model that equals the adapted one, for a folder; layers are made one by one."""
    params = attach_adapters(architecture, base, adapters, lora)

    def one(leaves: Any) -> Any:
        if "lora_a" not in leaves:
            return leaves
        kernel, a, b = (leaves[key] for key in ("kernel", "lora_a", "lora_b"))
        rest = {key: value for key, value in leaves.items() if key not in ("lora_a", "lora_b")}
        return {**rest, "kernel": _Merged(kernel, a, b)}

    return {**params, "layers": {name: one(leaves) for name, leaves in params["layers"].items()}}


def save_adapters(folder: Path, adapters: Any, lora: Lora, architecture: Architecture, base: str) -> None:
    """Writes adapters as PEFT does.

    Args:
      folder: where; made if need be.
      adapters: host arrays or on devices.
      lora: what they are.
      architecture: of the base.
      base: the folder or name of the base.
    """
    tensors, chosen = {}, adapted_modules(architecture, lora.targets)
    for name, tensor in chosen.items():
        a, b = (np.asarray(adapters["layers"][_name(tensor)][key]) for key in ("lora_a", "lora_b"))
        for i in range(architecture.layers):
            tensors[f"{_key(name, i)}A.weight"] = np.ascontiguousarray(a[i].reshape(-1, lora.rank).T)
            tensors[f"{_key(name, i)}B.weight"] = np.ascontiguousarray(b[i].reshape(lora.rank, -1).T)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none"},
        "target_modules": sorted({name.rpartition("{i}.")[2] for name in chosen}),
        "fan_in_fan_out": any(not tensor.parts[0].inputs for tensor in chosen.values()),
    }
    write_json(folder / SETTINGS, settings)


def load_adapters(folder: Path, architecture: Architecture) -> tuple[dict[str, Any], Lora]:
    """Returns the adapters in a PEFT folder as host arrays, and what they are.

    Raises:
      UserError: it holds no LoRA, one that does not fit the model, or a setting that is not supported.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder}: holds no LoRA; {SETTINGS} with peft_type LORA is needed")
    for key, value in settings.items():
        if (key not in KNOWN and value not in UNSET) or (key == "init_lora_weights" and value not in STARTS):
            raise UserError(f"{folder / SETTINGS}: {key} = {value!r} is not supported")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); only safetensors are") from None
    targets = _targets(settings.get("target_modules") or (), tensors, architecture)
    lora = Lora(int(settings["r"]), float(settings["lora_alpha"]), targets)
    adapters = {"layers": dict(_read(folder, tensors, settings, lora, architecture))}
    if tensors:
        raise UserError(
            f"{folder / WEIGHTS}: tensor {min(tensors)} is not part of the adapter of a {architecture.family}"
        )
    return adapters, lora


def _targets(names: Any, tensors: Mapping[str, Any], architecture: Architecture) -> tuple[str, ...]:
    """Returns the targets of a PEFT folder; where it has a pattern for them, the modules that have tensors."""
    if names == ALL:
        return (ALL,)
    if isinstance(names, str):
        names = [name for name in adapted_modules(architecture, (ALL,)) if f"{_key(name, 0)}A.weight" in tensors]
    # PEFT may name each layer's module: what is not in all layers will be missed among the tensors.
    every = {re.sub(r"\.\d+\.", ".{i}.", name).rpartition("{i}.")[2] for name in names}
    return tuple(sorted(every))


def _key(name: str, layer: int) -> str:
    """Returns how PEFT's names of a module's tensors begin."""
    return f"base_model.model.{name.replace('{i}', str(layer))}.lora_"


def _alpha(file: Path, settings: Mapping[str, Any], name: str) -> float:
    """Returns alpha of a module by PEFT's rule: that of the first pattern which its name ends in."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UserError(f"{file}: alpha_pattern has {pattern!r}; only names of modules are supported")
        if f".{name}".endswith(f".{pattern}"):
            return alpha
    return settings["lora_alpha"]


def _read(
    folder: Path, tensors: dict[str, Any], settings: Mapping[str, Any], lora: Lora, architecture: Architecture
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (name of an adapter, its leaves), and takes what it reads from `tensors`."""
    for name, tensor in adapted_modules(architecture, lora.targets).items():
        keys = [_key(name, i) for i in range(architecture.layers)]
        try:
            found = ([tensors.pop(f"{key}{side}.weight") for key in keys] for side in "AB")
            a, b = (np.stack(layers).astype(np.float32) for layers in found)
        except KeyError as error:
            raise UserError(f"{folder / WEIGHTS}: tensor {error.args[0]} is missing") from None
        except ValueError:
            raise UserError(f"{folder / WEIGHTS}: the layers of {name} have several ranks; give them one") from None
        rank, (inputs, outputs) = a.shape[1], sides(tensor)
        if a.shape[2:] != (math.prod(inputs),) or b.shape[1:] != (math.prod(outputs), rank):
            raise UserError(f"{folder / WEIGHTS}: {keys[0]}A and B do not fit the {architecture.family}'s {name}")
        alphas = [_alpha(folder / SETTINGS, settings, name.replace("{i}", str(i))) for i in range(len(a))]
        b = b * (np.array(alphas, np.float32) / rank / (lora.alpha / lora.rank))[:, None, None]
        leaves = a.transpose(0, 2, 1).reshape(-1, *inputs, rank), b.transpose(0, 2, 1).reshape(-1, rank, *outputs)
        yield _name(tensor), dict(zip(("lora_a", "lora_b"), map(np.ascontiguousarray, leaves), strict=True))
