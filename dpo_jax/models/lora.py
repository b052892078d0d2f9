"""LoRA (arXiv 2106.09685): a pytree of low-rank additions to projections.

A module's weight W becomes W + alpha / rank * A B. Its adapter has leaves `lora_a` [L, *inputs, r] and `lora_b`
[L, r, *outputs], with outputs in the order of the checkpoint. Projections that a checkpoint fuses into one module share
A, as in PEFT. All experts of a mixture are one module, each with an A and a B of its own: `lora_a` [L, E, *inputs, r],
`lora_b` [L, E, r, *outputs]; PEFT's `target_parameters`. The base model is not modified, and is the reference.

Targets that name the embedding or the head are trained in full (PEFT's `modules_to_save`): beside `layers`, the pytree
has an `embedding` or a `head` that takes the place of the base's.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.models.architecture import Architecture
from dpo_jax.models.families.registry import family
from dpo_jax.models.families.tensor_map import Tensor, TensorPart, is_layered, module_axes
from dpo_jax.records import Array

ALL = "all-linear"


class Lora(NamedTuple):
    """Options of adapters.

    Attributes:
      rank: r.
      alpha: additions are multiplied by alpha / r.
      targets: names of modules in transformers, e.g. `q_proj`, `attn.c_attn`, `experts.down_proj` or `lm_head`; or
        `all-linear`: all projections of layers, but those of experts and of MLPs beside them, which PEFT confuses.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


def projections(architecture: Architecture) -> dict[str, Tensor]:
    """Returns all projections of the layers, by transformers' name, with `{i}` or `{i:kind}` for the layer."""
    module = family(architecture.family)
    table = (module.fused_tensors if architecture.mixture else module.tensors)(architecture)
    kernels = {name: t for name, t in table.items() if is_layered(name) and t.parts[0].path[-1] == "kernel"}
    return {name.removesuffix(".weight"): tensor for name, tensor in kernels.items()}


def adapted_modules(architecture: Architecture, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the adapted modules: name, with `{i}` for the layer -> its weight's tensor; no MLP beside experts.

    Raises:
      UserError: a target matches no projection.
    """
    a, every = architecture, projections(architecture)
    known = {n: t for n, t in every.items() if a.mixture is None or t.parts[0].lead or ".mlp." not in n}
    linear = [name for name, tensor in known.items() if not tensor.parts[0].lead]
    matched = {t: linear if t == ALL else [n for n in known if f".{n}".endswith(f".{t}")] for t in targets}
    for target, names in matched.items():
        if not names and not whole_modules(architecture, (target,)):
            listed = ", ".join(sorted({name.rpartition(".")[2] for name in [*known, *whole_names(architecture)]}))
            beside = any(f".{name}".endswith(f".{target}") for name in every) * " with adapters, as MLPs beside experts"
            raise UserError(f"lora.targets: {target!r} is no projection of a {a.family}{beside}; it has {listed}")
    return {name: tensor for name, tensor in known.items() if any(name in names for names in matched.values())}


def whole_names(architecture: Architecture) -> dict[str, str]:
    """Returns the modules that can be trained in full: name -> key of the parameter. A tied head is the embedding."""
    table = family(architecture.family).tensors(architecture)
    embedding = next(name for name, tensor in table.items() if tensor.parts[0].path == ("embedding",))
    # The head of every model in transformers, GPT-NeoX's too, whose files have another name.
    return {embedding.removesuffix(".weight"): "embedding", "lm_head": "embedding" if architecture.tied else "head"}


def whole_modules(architecture: Architecture, targets: tuple[str, ...]) -> dict[str, str]:
    """Returns the modules that targets train in full: name -> key of the parameter, `embedding` or `head`."""
    every = whole_names(architecture)
    keys = {key for name, key in every.items() for target in targets if f".{name}".endswith(f".{target}")}
    return {name: key for name, key in every.items() if key in keys}


def init_adapters(architecture: Architecture, lora: Lora, seed: int, base: Any = None) -> dict[str, Any]:
    """Returns new adapters as host arrays: A uniform up to 1 / sqrt(inputs) as in PEFT, B zero, so nothing changes.

    Modules that are trained in full begin as those of the base, which is needed for them only.

    Raises:
      UserError: the rank is below 1, there is no target, or a target matches no projection.
    """
    if lora.rank < 1 or not lora.targets:
        raise UserError("lora: rank must be at least 1, and targets must name a module")
    rng, adapters = np.random.default_rng(seed), {}
    for tensor in adapted_modules(architecture, lora.targets).values():
        inputs, outputs = module_axes(tensor)
        stack = (len(tensor.layers_of(architecture)), *lead_sizes(tensor))
        a = (rng.random((*stack, *inputs, lora.rank), np.float32) * 2 - 1) / math.sqrt(math.prod(inputs))
        b = np.zeros((*stack, lora.rank, *outputs), np.float32)
        adapters[adapter_name(tensor)] = {"lora_a": a.astype(np.float32), "lora_b": b}
    wholes = {key: np.asarray(base[key], np.float32) for key in _whole_keys(architecture, lora)}
    return {"layers": adapters, **wholes}


def _whole_keys(architecture: Architecture, lora: Lora) -> list[str]:
    return sorted(set(whole_modules(architecture, lora.targets).values()))


def adapter_name(tensor: Tensor) -> str:
    """Returns the key of a module's adapter in the pytree: the names of its projections, joined by `_`."""
    return "_".join(part.path[1] for part in tensor.parts)


def _output_index(tensor: Tensor, part: TensorPart) -> tuple[Any, ...]:
    """Returns the index that selects one projection's outputs from `lora_b` [L, r, *outputs] of its module."""
    before = 0 if part.inputs else len(tensor.split[part.lead])  # the input axes, where they come first
    own = part.take[part.lead + before :]
    return (*[slice(None)] * (2 + part.lead), *own)


def lead_sizes(tensor: Tensor) -> tuple[int, ...]:
    """Returns (E,) of a module of experts, () of another."""
    return tensor.split_shape[: tensor.parts[0].lead]


def attach_adapters(architecture: Architecture, base: Any, adapters: Any, lora: Lora) -> Any:
    """Returns the parameters of the adapted model: those of the base, not copied, plus its adapters.

    Each projection gets `lora_a` and its own outputs of `lora_b`, scaled by alpha / r.
    """
    layers, scale = dict(base["layers"]), lora.alpha / lora.rank
    for tensor in adapted_modules(architecture, lora.targets).values():
        a, b = (adapters["layers"][adapter_name(tensor)][key] for key in ("lora_a", "lora_b"))
        for part in tensor.parts:
            name = part.path[1]
            layers[name] = {**layers[name], "lora_a": a, "lora_b": b[_output_index(tensor, part)] * scale}
    return {**base, "layers": layers, **{key: adapters[key] for key in _whole_keys(architecture, lora)}}


def adapter_axes(architecture: Architecture, model_axes: Any, lora: Lora) -> Any:
    """Returns the logical axis names of adapters, from those of the model."""
    found = {}
    for tensor in adapted_modules(architecture, lora.targets).values():
        a, b = _part_axes(tensor, tensor.parts[0], model_axes)
        # Its outputs belong to several projections.
        fused = (*b[: 2 + tensor.parts[0].lead], *(None for _ in module_axes(tensor)[1]))
        found[adapter_name(tensor)] = {"lora_a": a, "lora_b": b if len(tensor.parts) == 1 else fused}
    return {"layers": found, **{key: model_axes[key] for key in _whole_keys(architecture, lora)}}


def _part_axes(tensor: Tensor, part: TensorPart, model_axes: Any) -> tuple[tuple[str | None, ...], ...]:
    """Returns the axis names of A and B for one projection; latents are whole in B, as in a kernel that makes them."""
    kernel, stack = model_axes["layers"][part.path[1]]["kernel"], 1 + part.lead  # layers, and perhaps experts
    count = stack + len(module_axes(tensor)[0])
    return (*kernel[:count], "rank"), (*kernel[:stack], "rank", *(n if n != "latent" else None for n in kernel[count:]))


def attached_axes(architecture: Architecture, model_axes: Any, base_axes: Any, lora: Lora) -> Any:
    """Returns the logical axis names of the result of `attach_adapters`, from those of the model and of its base."""
    layers = dict(base_axes["layers"])
    for tensor in adapted_modules(architecture, lora.targets).values():
        for part in tensor.parts:
            named = dict(zip(("lora_a", "lora_b"), _part_axes(tensor, part, model_axes), strict=True))
            layers[part.path[1]] = {**layers[part.path[1]], **named}
    return {**base_axes, "layers": layers}


class _MergedKernel:
    """A kernel plus its low-rank addition, computed for one layer, or one expert of it, when that is indexed.

    `lead` is 1 for a kernel of experts, else 0.
    """

    def __init__(self, kernel: Array, a: Array, b: Array, lead: int):
        self.leaves, self.lead = (kernel, a, b), lead

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        kernel, a, b = (np.asarray(x[place], np.float32) for x in self.leaves)
        if len(place) > self.lead:
            return kernel + np.tensordot(a, b, 1)
        return kernel + np.stack([np.tensordot(*pair, 1) for pair in zip(a, b, strict=True)])  # all experts of a layer


def merge_adapters(architecture: Architecture, base: Any, adapters: Any, lora: Lora) -> Any:
    """Returns the parameters of the plain model that equals the adapted one, for `save_folder`.

    Layers are merged when they are accessed, so that one merged layer is in memory at a time.
    """
    params = attach_adapters(architecture, base, adapters, lora)
    chosen = adapted_modules(architecture, lora.targets).values()
    leads = {part.path[1]: part.lead for tensor in chosen for part in tensor.parts}

    def one(name: str, leaves: Any) -> Any:
        if "lora_a" not in leaves:
            return leaves
        kernel, a, b = (leaves[key] for key in ("kernel", "lora_a", "lora_b"))
        rest = {key: value for key, value in leaves.items() if key not in ("lora_a", "lora_b")}
        return {**rest, "kernel": _MergedKernel(kernel, a, b, leads[name])}

    return {**params, "layers": {name: one(name, leaves) for name, leaves in params["layers"].items()}}
