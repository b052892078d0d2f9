"""`dpo-jax eval`: what can be measured of a policy on held-out data, with confidence intervals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import admit, assemble, evaluate, folders, loading, losses, policies, report, rewards
from dpo_jax.records import UserError
from dpo_jax.settings import Evaluation
from dpo_jax.terminal import leading, print_samples, say, settings_of


def eval_command(argv: list[str]) -> None:
    """`dpo-jax eval RUN_OR_MODEL [--reward NAME] [--data.path ...] [--reference.path ...]`."""
    (path,), rest = leading(argv, "eval", "RUN_OR_MODEL")
    settings = settings_of(path, rest, Evaluation, "eval")
    loss = losses.build(settings.loss)
    if loss.uses_reference and not folders.is_run(path) and not settings.reference.path:
        raise UserError(f"{path}: a model folder has no reference of its own; give --reference.path (or a run folder)")
    if loss.rewards and (settings.reward or settings.per_token):
        raise UserError("--reward, --per-token: a reward model writes nothing, and has no log-probs of tokens")
    tokenizer = loading.tokenizer_of(settings.model)
    rewarded = assemble.reward_encoding(settings, loss)
    loaded = loading.load_model(settings.model, tokenizer, settings.seed, settings.lora, rewarded)
    assemble.check_length(settings, loaded.model)
    _, rows = assemble.comparisons(settings.data, assemble.responses_of(settings, loss))
    held_out = assemble.table_of(settings, loss, tokenizer, rows, "held-out", say)
    state = policies.state(path, settings, loaded, loss)
    models = policies.models(path, settings, loaded, state)
    model, note = admit.with_attention(loaded.model, settings.model)
    if note:
        say(note)
    judge = evaluate.Judge(model, loss, models, state.running, settings.batch_size, settings.data.max_length)
    found = evaluate.summary(evaluate.held_out(judge, held_out))
    if settings.per_token:
        _write_per_token(settings.per_token, judge, held_out, tokenizer)
    shown: list[tuple[str, ...]] = []
    if settings.prompts and not loss.rewards:
        more, shown = _sampled(settings, judge, tokenizer, held_out)
        found |= more
    _print_metrics(found)
    print_samples(shown, list(models))
    if folders.is_run(path):
        (Path(path) / "eval.json").write_text(json.dumps({"metrics": found}, indent=1))
        report.write([Path(path)], Path(path) / "report.html")
        say(f"the model: {Path(path) / 'model'}   the report: {Path(path) / 'report.html'}")


def _sampled(settings: Evaluation, judge: evaluate.Judge, tokenizer: Any, table: Any) -> tuple[dict, list]:
    """Returns KL and true rewards from samples of both models on held-out prompts, and some of the samples."""
    prompts = evaluate.distinct_prompts(table, settings.prompts)
    options = dataclasses.asdict(settings.samples)
    del options["prompts"]
    completions = evaluate.complete(judge, prompts, eos_id=tokenizer.eos_token_id, seed=settings.seed, **options)
    texts = assemble.decoded(tokenizer, prompts)
    written = {k: assemble.decoded(tokenizer, c) for k, c in completions.items()}
    found = {}
    if "reference" in completions:
        found["kl(policy || reference)"] = evaluate.interval(evaluate.kl(judge, prompts, completions["policy"]))
    if settings.reward:
        score = rewards.get(settings.reward)
        for name, answers in written.items():
            found[f"true reward of the {name}"] = evaluate.interval(score(texts, answers))
    return found, list(zip(texts, *written.values(), strict=True))[: settings.show]


def _write_per_token(path: str, judge: evaluate.Judge, table: Any, tokenizer: Any) -> None:
    """Writes a line for each comparison: the prompt, and of each response its tokens and their log-probs by model."""
    with folders.written(path) as f:
        for tokens, logps in evaluate.per_token(judge, table):
            responses = [
                {"tokens": tokenizer.convert_ids_to_tokens(ids.tolist())}
                | {who: [round(float(x), 5) for x in values[p]] for who, values in logps.items()}
                for p, ids in enumerate(tokens.responses)
            ]
            f.write(json.dumps({"prompt": tokenizer.decode(tokens.prompt), "responses": responses}) + "\n")
    say(f"wrote {path}: the log-probs of {len(table):,} comparisons, token by token")


def _print_metrics(found: dict[str, dict[str, float]]) -> None:
    grid = Grid("on held-out data", "mean", "95% interval", "n")
    for name, entry in found.items():
        interval = f"{entry['low']:.4f} .. {entry['high']:.4f}"
        grid.add_row(name.removeprefix("eval_"), f"{entry['mean']:.4f}", interval, str(entry["n"]))
    Console().print(grid)
