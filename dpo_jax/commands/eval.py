"""`dpo-jax eval`: what can be measured of a policy on held-out data, with confidence intervals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import evaluation, losses
from dpo_jax.commands.common import command_config, leading_arguments, log_line, print_samples
from dpo_jax.config.commands import EvalConfig
from dpo_jax.errors import UserError
from dpo_jax.pages.run import write_report
from dpo_jax.paths import is_run, written
from dpo_jax.rewards.registry import get_reward
from dpo_jax.training import setup
from dpo_jax.training.attention_check import with_attention
from dpo_jax.training.load import load_policy, load_run_tokenizer
from dpo_jax.training.restore import restore_models, restore_state
from dpo_jax.training.tables import comparison_streams, decode_texts, load_table, responses_per_prompt, reward_encoding


def eval_command(argv: list[str]) -> None:
    """`dpo-jax eval RUN_OR_MODEL [--reward NAME] [--data.path ...] [--reference.path ...]`."""
    (path,), rest = leading_arguments(argv, "eval", "RUN_OR_MODEL")
    settings = command_config(path, rest, EvalConfig, "eval")
    loss = losses.build(settings.loss)
    if loss.uses_reference and not is_run(path) and not settings.reference.path:
        raise UserError(f"{path}: a model folder has no reference of its own; give --reference.path (or a run folder)")
    if loss.rewards and (settings.reward or settings.per_token):
        raise UserError("--reward, --per-token: a reward model writes nothing, and has no log-probs of tokens")
    tokenizer = load_run_tokenizer(settings.model)
    rewarded = reward_encoding(settings, loss)
    loaded = load_policy(settings.model, tokenizer, settings.seed, settings.lora, rewarded)
    setup.check_length(settings, loaded.model)
    _, rows = comparison_streams(settings.data, responses_per_prompt(settings, loss))
    held_out = load_table(settings, loss, tokenizer, rows, "held-out", log_line)
    state = restore_state(path, settings, loaded, loss)
    models = restore_models(path, settings, loaded, state)
    model, note = with_attention(loaded.model, settings.model)
    if note:
        log_line(note)
    judge = evaluation.EvalModel(model, loss, models, state.running, settings.batch_size, settings.data.max_length)
    found = evaluation.summarize(evaluation.evaluate_model(judge, held_out), held_out.weights)
    if settings.per_token:
        _write_per_token(settings.per_token, judge, held_out, tokenizer)
    shown: list[tuple[str, ...]] = []
    if settings.prompts and not loss.rewards:
        more, shown = _sampled(settings, judge, tokenizer, held_out)
        found |= more
    _print_metrics(found)
    print_samples(shown, list(models))
    if is_run(path):
        (Path(path) / "eval.json").write_text(json.dumps({"metrics": found}, indent=1))
        write_report([Path(path)], Path(path) / "report.html")
        log_line(f"the model: {Path(path) / 'model'}   the report: {Path(path) / 'report.html'}")


def _sampled(settings: EvalConfig, judge: evaluation.EvalModel, tokenizer: Any, table: Any) -> tuple[dict, list]:
    """Returns KL and true rewards from samples of both models on held-out prompts, and some of the samples."""
    prompts = evaluation.distinct_prompts(table, settings.prompts)
    options = dataclasses.asdict(settings.samples)
    del options["prompts"]
    completions = evaluation.complete_prompts(
        judge, prompts, eos_id=tokenizer.eos_token_id, seed=settings.seed, **options
    )
    texts = decode_texts(tokenizer, prompts)
    written = {k: decode_texts(tokenizer, c) for k, c in completions.items()}
    found = {}
    if "reference" in completions:
        found["kl(policy || reference)"] = evaluation.mean_with_interval(
            evaluation.policy_kl(judge, prompts, completions["policy"])
        )
    if settings.reward:
        score = get_reward(settings.reward)
        for name, answers in written.items():
            found[f"true reward of the {name}"] = evaluation.mean_with_interval(score(texts, answers))
    return found, list(zip(texts, *written.values(), strict=True))[: settings.show]


def _write_per_token(path: str, judge: evaluation.EvalModel, table: Any, tokenizer: Any) -> None:
    """Writes a line for each comparison: the prompt, and of each response its tokens and their log-probs by model."""
    with written(path) as f:
        for tokens, logps in evaluation.token_logps_per_example(judge, table):
            responses = [
                {"tokens": tokenizer.convert_ids_to_tokens(ids.tolist())}
                | {who: [round(float(x), 5) for x in values[p]] for who, values in logps.items()}
                for p, ids in enumerate(tokens.responses)
            ]
            f.write(json.dumps({"prompt": tokenizer.decode(tokens.prompt), "responses": responses}) + "\n")
    log_line(f"wrote {path}: the log-probs of {len(table):,} comparisons, token by token")


def _print_metrics(found: dict[str, dict[str, float]]) -> None:
    grid = Grid("on held-out data", "mean", "95% interval", "n")
    for name, entry in found.items():
        interval = f"{entry['low']:.4f} .. {entry['high']:.4f}"
        grid.add_row(name.removeprefix("eval_"), f"{entry['mean']:.4f}", interval, str(entry["n"]))
    Console().print(grid)
