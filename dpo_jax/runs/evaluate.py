"""`evaluate`: a run or a model folder, from Python."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import evaluation, losses
from dpo_jax.config.commands import EvalConfig
from dpo_jax.data.prompt_text import PromptText
from dpo_jax.data.sources.base import Item, prompt_key
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.evaluation import EvalModel
from dpo_jax.paths import is_run, written
from dpo_jax.records import Chat, Comparison
from dpo_jax.rewards.registry import get_reward, keep_reward
from dpo_jax.runs.settings import config_of_path, data_section, section
from dpo_jax.runs.suites.run import check_suite_keys, evaluate_suites, merged_metrics
from dpo_jax.sampling import PLAIN
from dpo_jax.training.checks import check_length
from dpo_jax.training.completions import prompts_with_room
from dpo_jax.training.restore import eval_model, load_initial, restore_state
from dpo_jax.training.run_folder import run_config, warn_of_changes
from dpo_jax.training.tables import (
    decode_texts,
    held_out_comparisons,
    load_table,
    responses_per_prompt,
)

log = logging.getLogger(__name__)
Intervals = dict[str, dict[str, float]]  # metric -> mean, low, high (95%), n


class Evaluation(NamedTuple):
    """Metrics of a policy on held-out data, and its completions beside the reference's.

    Attributes:
      metrics: name -> mean, low and high (95% interval) and n.
      completions: (prompt, then a completion of each model).
      models: the names of the models, policy first.
      step: updates of the policy; 0 for a model folder.
    """

    metrics: Intervals
    completions: list[tuple[str, ...]]
    models: list[str]
    step: int


def evaluate(
    path: str | Path,
    *,
    data: Any = None,
    **keys: Any,
) -> Intervals:
    """Evaluates the policy of a run, or a model folder, on held-out comparisons.

    Args:
      path: a run folder, a model folder or a hub id.
      data: held-out examples in memory, the path of a file, or keys of the section `data`, in place of the run's.
      **keys: keys of `dpo-jax eval` (`checkpoint="best"`, `reward="happy"`, `prompts=64`, `reference={"path": ...}`),
        as for `train`. The reward may be a function `(prompts, completions) -> one number each`. `suite="ifeval"` runs
        standard evaluations in place of the held-out data.

    Returns:
      Metric -> {mean, low, high, n}: accuracy, margins, loss, KL and reward with 95% intervals. Of suites
      `SUITE/METRIC` -> the same, without low and high where the suite has no interval.

    Raises:
      UserError: no checkpoint, no reference, or data that the loss cannot use.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"evaluate: {type(path).__name__}: give the folder of a run or a model, as in result.folder")
    given = section(keys)
    if callable(keys.get("reward")):
        given["reward"] = keep_reward(keys["reward"])
    if data is not None:
        given["data"] = data_section(data, default=run_config(path).data.name if is_run(path) else "files")
        given["data"].setdefault("eval_path", given["data"].get("path", []))
    settings = config_of_path(str(path), given, EvalConfig, "dpo_jax.evaluate")
    if settings.name:
        raise UserError(f"evaluate: name={settings.name!r}: this function stores nothing; remove it")
    if settings.suite:
        return merged_metrics(dict(evaluate_suites(str(path), settings)))
    return evaluate_path(str(path), settings).metrics


def evaluate_path(path: str, settings: EvalConfig) -> Evaluation:
    """Evaluates a run or a model folder as `dpo-jax eval` does."""
    check_suite_keys(settings)
    loss = losses.build(settings.loss)
    if loss.uses_reference and not is_run(path) and not settings.reference.path:
        raise UserError(f"{path}: a model folder has no reference; set --reference.path, or give a run folder")
    if loss.rewards and (settings.reward or settings.per_token):
        raise UserError(
            "--reward, --per-token: a reward model generates no text and has no token log-probs; remove them"
        )
    if is_run(path):
        warn_of_changes(Path(path), settings)
    loaded, tokenizer = load_initial(settings, loss)
    check_length(settings, loaded.model)
    rows = held_out_comparisons(settings.data, responses_per_prompt(settings, loss))
    table = load_table(settings, loss, tokenizer, rows, "held-out")
    state = restore_state(path, settings, loaded, loss, settings.checkpoint)
    judge = eval_model(path, settings, loaded, loss, state)
    found = evaluation.summarize(evaluation.evaluate_model(judge, table), table.weights)
    if settings.per_token:
        _write_per_token(settings.per_token, judge, table, tokenizer)
    completions: list[tuple[str, ...]] = []
    if settings.prompts and not loss.rewards:
        prompts = evaluation.distinct_prompts(table, settings.prompts)
        prompts = prompts_with_room(prompts, loaded, settings.samples.max_new_tokens, "samples")
        if not prompts:
            raise UserError("samples.max_new_tokens: no prompt leaves room for so many; lower it, or set --prompts 0")
        texts = decode_texts(tokenizer, prompts)
        if settings.reward.startswith("model:"):
            texts = _with_conversations(texts, prompts, table, rows)
        more, completions = _generated(settings, judge, tokenizer, prompts, texts, loaded.end_ids(tokenizer))
        found |= more
    return Evaluation(found, completions, list(judge.params), int(state.step))


def _with_conversations(texts: list[str], prompts: list[Any], table: Table, rows: Iterable[Item]) -> list[str]:
    """Returns the texts of prompts, each with the conversation it came from if it did, for a reward model."""
    keys: dict[bytes, int] = {}
    for i in range(len(table)):
        keys.setdefault(table[i].prompt.tobytes(), int(table.prompts[i]))
    wanted, found = [keys[np.asarray(prompt).tobytes()] for prompt in prompts], dict[int, Any]()
    for row in rows:
        if isinstance(row, Comparison):
            found.setdefault(prompt_key(row.prompt), row.prompt)
        if found.keys() >= set(wanted):
            break
    sources = [found.get(key) for key in wanted]
    return [PromptText(t, source if isinstance(source, Chat) else t) for t, source in zip(texts, sources, strict=True)]


def _generated(
    settings: EvalConfig, judge: EvalModel, tokenizer: Any, prompts: list[Any], texts: list[str], ends: tuple[int, ...]
) -> tuple[Intervals, list]:
    """Returns KL and rewards of completions of held-out prompts by both models, and some of the completions."""
    options = dataclasses.asdict(settings.samples)
    del options["prompts"], options["kl_prompts"]
    sample = partial(evaluation.complete_prompts, prompts=prompts, eos_id=ends, seed=settings.seed)
    ids = sample(judge, **options)
    completions = {k: decode_texts(tokenizer, c, ends) for k, c in ids.items()}
    found = {}
    if "reference" in ids:
        plain, policy = options | PLAIN, judge._replace(params={"policy": judge.params["policy"]})
        own = ids["policy"] if plain == options else sample(policy, **plain)["policy"]
        found["eval_kl"] = evaluation.mean_with_interval(evaluation.policy_kl(judge, prompts, own))
    if settings.reward:
        score = get_reward(settings.reward)
        for name, answers in completions.items():
            found[f"true reward of the {name}"] = evaluation.mean_with_interval(score(texts, answers))
    return found, list(zip(texts, *completions.values(), strict=True))[: settings.show]


def _write_per_token(path: str, judge: EvalModel, table: Any, tokenizer: Any) -> None:
    """Writes a line per comparison: the prompt, and the tokens of each response with their log-probs by model."""
    with written(path) as f:
        for tokens, logps in evaluation.token_logps_per_example(judge, table):
            responses = [
                {"tokens": tokenizer.convert_ids_to_tokens(ids[tokens.mask(p)].tolist())}
                | {who: [round(float(x), 5) for x in values[p]] for who, values in logps.items()}
                for p, ids in enumerate(tokens.responses)
            ]
            f.write(json.dumps({"prompt": tokenizer.decode(tokens.prompt), "responses": responses}) + "\n")
    log.info(f"wrote {path}: token log-probs of {len(table):,} comparisons")
