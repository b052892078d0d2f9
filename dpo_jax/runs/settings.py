"""The config of a call from Python: objects are kept in memory and named in the config."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo_jax import optim
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import as_lists, read_yaml
from dpo_jax.data.sources import memory
from dpo_jax.errors import UserError
from dpo_jax.losses.objective import Loss
from dpo_jax.losses.registry import REGISTRY, entry_of
from dpo_jax.models.huggingface.folder import model_folder
from dpo_jax.named import own_name, with_axes
from dpo_jax.paths import is_run
from dpo_jax.training.run_folder import run_config


def call_settings(
    config: Any, data: Any, eval_data: Any, loss: Any, optimizer: Any, keys: Mapping[str, Any]
) -> tuple[Config, str]:
    """Returns the config of a call, and its name; objects are kept in memory and named in the config."""
    given = section(keys)
    if data is not None:
        given["data"] = data_section(data)
    if eval_data is not None:
        given["data"] = given.get("data", {}) | _held_out(eval_data, given.get("data", {}))
    if loss is not None:
        several = isinstance(loss, list | tuple) and not isinstance(loss, Loss)  # which is a tuple too
        terms = [_term(term) for term in (loss if several else [loss])]
        if not terms:
            raise UserError("loss: an empty list; give a name, a function or a list of them")
        given["loss"] = terms if len(terms) > 1 else terms[0]
    if optimizer is not None:
        given["optim"] = _optimizer(optimizer)
    source = str(config) if isinstance(config, str | Path) else plain_config(config)
    name = source if isinstance(source, str) else str(given.get("run") or (source or {}).get("run") or "")
    replaced = [key for key in ("loss", "optim") if _is_whole(given.get(key))]
    if source and replaced:  # a name, a function or a list replaces the section; a dict without a name changes it
        values = read_yaml(source) if isinstance(source, str) else source
        source = {key: value for key, value in values.items() if key not in replaced}
    if not name:
        raise UserError('run: name the folder of this run, as in run="runs/mine"')
    return parse_config(Config, source, given, prog="dpo_jax.train"), name


def plain_config(config: Any) -> Any:
    """Returns a `Config` as nested values; other sources unchanged."""
    return as_lists(dataclasses.asdict(config)) if isinstance(config, Config) else config


def _term(term: Any) -> dict[str, Any]:
    """Returns a term of a loss as the config has it; a function is registered under its name."""
    if isinstance(term, Loss):
        raise UserError("loss: an objective is bound already; give its function or a dict with name and options")
    if isinstance(term, str):
        return {"name": _config_name(REGISTRY[term].function) if term in REGISTRY else term}
    if isinstance(term, Mapping):
        return {**term, **_term(term["name"])} if "name" in term else with_axes(term)
    options, function = {}, term
    if isinstance(term, partial):
        function, options = term.func, term.keywords
    if not callable(function):
        raise UserError(f"loss: {term!r}: give a name, a function, or a dict with name and options")
    return {"name": _config_name(function), **options}


def _config_name(function: Callable[..., Any]) -> str:
    """Returns the name of a loss in a config, from which another process finds it: `module:function` unless built in.

    The function is registered under that name.
    """
    name = own_name(function, "loss")
    if name.startswith("dpo_jax."):
        return function.__name__
    if name in REGISTRY and REGISTRY[name].function is not function:
        warnings.warn(f"loss {name!r} replaces another function of that name", stacklevel=6)
    REGISTRY[name] = entry_of(function)
    return name


def _optimizer(optimizer: Any) -> dict[str, Any]:
    """Returns an optimizer as the config has it; an optax object is kept under a name for this process."""
    if isinstance(optimizer, str):
        return {"name": optimizer}
    if isinstance(optimizer, Mapping):
        return dict(optimizer)
    if callable(optimizer):
        name = own_name(optimizer, "optimizer")
        for p in inspect.signature(optimizer).parameters.values():
            if p.kind is not p.KEYWORD_ONLY:
                bare = optimizer.__name__
                raise UserError(f"optimizer: {bare} takes {p.name} by position; call it, as in {bare}(1e-6)")
        optim.OPTIMIZERS[name] = optimizer
        return {"name": name}
    if not hasattr(optimizer, "update"):
        raise UserError(
            f"optimizer: {optimizer!r}: give an optax transformation, a name, or a dict with name and options"
        )
    optim.OPTIMIZERS[optim.IN_MEMORY] = lambda: optimizer
    return {"name": optim.IN_MEMORY}


def _is_whole(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Mapping) and "name" in value)


def data_section(data: Any, default: str = "files") -> dict[str, Any]:
    """Returns the section `data` for examples in memory, the path of a file, or keys of the section as they are.

    `default` is the source that the config names; a path replaces examples in memory.
    """
    if isinstance(data, str | Path):
        return {"path": [str(data)]} | ({"name": "files"} if default == "memory" else {})
    if isinstance(data, Mapping) and hasattr(data, "column_names"):  # a datasets.DatasetDict
        raise UserError(f"data: a dataset with splits {', '.join(data)}; give one, as in data=dataset['train']")
    if isinstance(data, Mapping):
        return dict(data)
    if callable(data) or not isinstance(data, Iterable):
        raise UserError(f"data: a {type(data).__name__}; give dicts of columns, a datasets.Dataset or a path")
    return {"name": "memory", "path": [memory.keep_examples(data)], "options": []}


def _held_out(eval_data: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `data.eval_path` for held-out data: a path, or examples in memory if the training data are in memory."""
    if isinstance(eval_data, Mapping) and not hasattr(eval_data, "column_names"):
        raise UserError("eval_data: give examples or a path; keys of the section data go into data, as data.eval_path")
    if isinstance(eval_data, str | Path) == (data.get("name") == "memory"):
        raise UserError("eval_data: give data and eval_data both as paths, or both as examples; load the file yourself")
    return {"eval_path": data_section(eval_data)["path"]}


def section(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a call as nested values of a config; a model may be given by its path alone."""
    for key in ("model", "reference"):
        if not isinstance(keys.get(key, {}), str | Path | Mapping):
            raise UserError(f"{key}: a {type(keys[key]).__name__}; give a path, or keys such as {{'path': ...}}")
    return {
        k: {"path": str(v)} if k in ("model", "reference") and isinstance(v, str | Path) else v for k, v in keys.items()
    }


def config_of_path(path: str, given: Sequence[str] | Mapping[str, Any], kind: type, prog: str) -> Any:
    """Returns the config of a run with overrides, or the overrides alone for a model folder or hub id."""
    if is_run(path):
        return run_config(path, given, kind, prog)
    settings = parse_config(kind, None, given, prog=prog)
    return replace(settings, model=replace(settings.model, path=str(model_folder(path))))
