"""Run folders: their config, their lock, and checks before anything is written to them."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax import distributed, optim
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, MeshConfig
from dpo_jax.config.yaml import difference, dump, flatten, read_yaml
from dpo_jax.errors import UserError
from dpo_jax.losses.registry import find_entry
from dpo_jax.models.huggingface.replace import check_replaceable
from dpo_jax.named import fingerprint, import_function
from dpo_jax.paths import DRAFT, LOCK_FILE, is_run, load_json, refuse_links, remove_drafts, written
from dpo_jax.training import interrupts
from dpo_jax.training.run import total_steps

# Keys that may change on resuming, because they change results by rounding at most.
log = logging.getLogger(__name__)
FREE = ("run", "max_steps", "epochs", "save_every", "keep", "log_every", "max_nonfinite", "model.remat")
FREE += ("keep_best", "patience", "hang_seconds", "data.rows", "data.row_length", "track")
FREE += tuple(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig) if field.name != "reduce_dtype")
INPUTS = "inputs.json"
PROMPTS, CHATS, TEXTS = "the kind of prompts", "conversations", "texts"  # an entry of inputs.json and its values
# Passwords in URLs; tokens of Hugging Face, GitHub, Weights & Biases, OpenAI, AWS; fields that are named as one.
SECRET = re.compile(
    r"://[^/@\s]*:[^/@\s]*@|\bhf_\w{20}|\bgh[pousr]_\w{30}|\bgithub_pat_|\bsk-[\w-]{20}|\bAKIA[A-Z0-9]{16}\b|\bwandb_v1_"
    r"|(?i:api[-_]?key|(?:access|auth)[-_]?token|authorization|password|secret)\W*[=:]"
)


def run_config(
    run: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), kind: type = Config, prog: str = "dpo-jax"
) -> Any:
    """Returns the config of a run folder, with overrides (arguments or nested values)."""
    return parse_config(kind, str(Path(run) / "config.yaml"), overrides, prog=prog)


def claim_folder(config: Config, inputs: Mapping[str, str]) -> tuple[Path, contextlib.AbstractContextManager]:
    """Creates the run folder, or reopens it to resume the same run; returns it and its lock.

    Args:
      config: the config of the run.
      inputs: name -> hash of the data, weights and tokenizer, whose content the config does not hold.

    Raises:
      UserError: the folder belongs to another config (the message lists the differences), to other inputs or to another
        version of the user's functions; it holds other files; or another process is writing it.
    """
    folder = Path(config.run)
    inputs = dict(inputs) | function_hashes(config)
    lock = _claim(folder, config, inputs) if distributed.is_primary() else contextlib.nullcontext()
    distributed.barrier("the run folder")
    if not is_run(folder):
        raise UserError(f"{folder}: process 0 created it, but this process does not see it; set run to a shared folder")
    return folder, lock


def with_schedule(config: Config, examples: int) -> Config:
    """Returns a config whose optimizer knows the updates of the run; a run that goes on keeps those of its start.

    Raises:
      UserError: the run goes on beyond the end of its schedule.
    """
    steps, folder = total_steps(config, examples), Path(config.run)
    config = _as_begun(config, folder)
    begun = run_config(folder).optim.get("total_steps", 0) if is_run(folder) else steps
    section = optim.with_total_steps(config.optim, begun) if begun else config.optim  # 0: one's own, or an older run
    if section.get("schedule", "constant") != "constant" and steps > section.get("total_steps", steps):
        raise UserError(
            f"optim.schedule: {section['schedule']} ends after {section['total_steps']} updates (optim.total_steps), "
            f"and this run has {steps}; set another --run, or fewer steps"
        )
    if note := optim.warmup_note(section, steps):
        log.warning(note)
    return dataclasses.replace(config, optim=section)


def _as_begun(config: Config, folder: Path) -> Config:
    """Returns a config with the recorded values where a run of an earlier version had other defaults."""
    if not is_run(folder) or "text_prompts" in read_yaml(str(folder / "config.yaml")).get("data", {}):
        return config
    before, data, section = run_config(folder), config.data, dict(config.optim)
    limit = before.data.max_prompt_length if data.max_prompt_length is None else data.max_prompt_length
    if section.get("warmup_steps", 0) == -1:
        section["warmup_steps"] = before.optim.get("warmup_steps", -1)
    data = dataclasses.replace(data, max_prompt_length=limit, text_prompts=before.data.text_prompts)
    return dataclasses.replace(config, data=data, optim=section)


def function_hashes(config: Config) -> dict[str, str]:
    """Returns a hash of each function of the user that a config names, by key."""
    return {name: fingerprint(function) for name, function in _functions(config).items()}


def _functions(config: Config) -> dict[str, Callable]:
    """Returns the functions of the user that a config names, by key."""
    terms = [config.loss] if isinstance(config.loss, Mapping) else config.loss
    found = {f"loss {term['name']}": find_entry(term["name"]).function for term in terms}
    found[f"optimizer {config.optim['name']}"] = optim.optimizer_function(config.optim["name"])
    if ":" in config.data.name:
        found[f"data source {config.data.name}"] = import_function(config.data.name, "data.name")
    if config.model.family:
        found[f"model family {config.model.family}"] = import_function(config.model.family, "model.family")
    return {name: f for name, f in found.items() if ":" in name or name.endswith(optim.IN_MEMORY)}


def warn_of_changes(folder: Path, config: Config) -> None:
    """Warns of losses of the user that changed since a run began: an evaluation takes the new ones."""
    path = folder / INPUTS
    before = load_json(path, dict) if path.exists() else {}
    hashes = {name: fingerprint(f) for name, f in _functions(config).items() if name.startswith("loss ")}
    for name in (name for name, value in hashes.items() if before.get(name, value) != value):
        log.warning(f"{folder}: {name} changed since this run began; its values are those of the new version")


def recorded_prompts(folder: Path) -> str:
    """Returns `CHATS` or `TEXTS`, what a run was trained on; "" for a run of an earlier version."""
    path = folder / INPUTS
    return load_json(path, dict).get(PROMPTS, "") if path.exists() else ""


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns a hash of a tokenizer's vocabulary, special tokens and chat template."""
    special = [getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
    content = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(content).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _claim(folder: Path, config: Config, inputs: Mapping[str, str]) -> contextlib.AbstractContextManager:
    if folder.is_dir() and not is_run(folder) and not all(_is_begun(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder}: holds other files than a run's; set another --run")
    refuse_links(folder)
    changed = difference(run_config(folder), config, FREE) if is_run(folder) else []
    if changed:
        raise UserError(f"{folder} belongs to another config ({'; '.join(changed)}); set another --run")
    _check_inputs(folder / INPUTS, inputs)
    check_replaceable(folder / "model")  # before the training, after which it is replaced
    lock = interrupts.lock_folder(folder)
    remove_drafts(folder, age=0)
    with written(folder / "config.yaml") as f:
        f.write(dump(config))
    with written(folder / INPUTS) as f:
        json.dump(inputs, f, indent=1)
    return lock


def _is_begun(name: str) -> bool:
    """Returns whether a file is one that is left if a process was killed while it claimed a folder."""
    return name == LOCK_FILE or name.startswith(DRAFT)


def _check_inputs(path: Path, inputs: Mapping[str, str]) -> None:
    """Refuses to resume with other inputs than those of the file, which the config does not show."""
    before = load_json(path, dict) if path.exists() else {}
    changed = [name for name, value in inputs.items() if before.get(name, value) != value]
    if changed:
        raise UserError(
            f"{path.parent}: {' and '.join(changed)} changed since this run began; set another --run, or remove "
            f"{path.name} there to go on with the new version"
        )


def check_secrets(config: Any) -> None:
    """Refuses passwords and tokens in a config, because the run folder and its report would show them."""
    for key, values in flatten(dataclasses.asdict(config)):
        if any(SECRET.search(value) for value in values):
            raise UserError(f"{key}: holds a password or token; set it in the environment (HF_TOKEN) or a login file")
