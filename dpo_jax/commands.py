"""What each command of the command line does: reads its arguments, assembles, calls, prints."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import assemble, config, evaluate, loop, losses, optim, report, rewards
from dpo_jax.config import Config
from dpo_jax.data_commands import data_command, leading, pairs_command, say, settings_of
from dpo_jax.models import hf
from dpo_jax.records import TrainState, UserError
from dpo_jax.step import init_state
from dpo_jax.winrate_command import winrate_command

__all__ = ["data_command", "pairs_command", "winrate_command"]  # those that are elsewhere


def train_command(argv: list[str]) -> None:
    """`dpo-jax train CONFIG.yaml [--key.path value ...]`."""
    (file,), rest = leading(argv, "train", "CONFIG.yaml")
    folder = _train(file, rest)
    say(f"the policy: {folder / 'model'}   the report: {folder / 'report.html'}")


def _train(file: str, argv: Sequence[str]) -> Path:
    """Trains what a YAML says, first training the YAML that it starts from, if it names one; returns the run folder."""
    parsed = config.parse(Config, file or None, argv, prog="dpo-jax train CONFIG.yaml", variants=assemble.VARIANTS)
    settings = assemble.named(parsed, file)
    if settings.model.path.endswith((".yaml", ".yml")):
        say(f"{file} starts from {settings.model.path}")
        stage = _train(settings.model.path, [])
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=str(stage)))
        say(f"now {file}")
    run = assemble.run_of(settings, say)
    loop.train(run, say)
    report.write([run.folder], run.folder / "report.html")
    return run.folder


@dataclass(frozen=True)
class Evaluation(Config):
    """A run's config, and what to measure beside its held-out comparisons."""

    reward: str = ""
    """A true reward of completions: synthetic, happy, vader, words:FILE, logistic:FILE or module:function."""
    prompts: int = 256
    """Held-out prompts from which both models are sampled, for KL and reward (0: none)."""
    show: int = 3
    """Prompts printed with both models' completions."""


def _state(path: str, settings: Config, loaded: assemble.Loaded, loss: losses.Loss) -> TrainState:
    """Returns the state of a run's newest checkpoint, or that of a model folder's parameters before any step."""
    moves = assemble.sync_of(settings, loss) is not None

    def start(params: Any) -> TrainState:
        return init_state(params, optim.build(**settings.optim), loss.terms, params if moves else ())

    if not assemble.is_run(path):
        return TrainState(0, loaded.params, (), np.zeros(loss.terms, np.float32), ())
    return assemble.newest(Path(path), jax.eval_shape(start, loaded.params))


def _models(path: str, settings: Config, loaded: assemble.Loaded, state: TrainState) -> dict[str, Any]:
    """Returns the policy and, if there is one, the reference as it stands."""
    models = {"policy": state.params}
    uses = assemble.is_run(path) and losses.build(settings.loss).uses_reference
    if state.reference:
        models["reference"] = state.reference
    elif settings.reference.path or uses:
        models["reference"] = assemble.frozen_of(settings, loaded)[0]
    return models


def eval_command(argv: list[str]) -> None:
    """`dpo-jax eval RUN_OR_MODEL [--reward NAME] [--data.path ...] [--reference.path ...]`."""
    (path,), rest = leading(argv, "eval", "RUN_OR_MODEL")
    settings = settings_of(path, rest, Evaluation, "eval")
    loss = losses.build(settings.loss)
    if loss.uses_reference and not assemble.is_run(path) and not settings.reference.path:
        raise UserError(f"{path}: a model folder has no reference of its own; give --reference.path (or a run folder)")
    tokenizer = assemble.tokenizer_of(settings.model)
    loaded = assemble.load_model(settings.model, tokenizer, settings.seed)
    _, rows = assemble.comparisons(settings.data, assemble.responses_of(settings, loss))
    held_out = assemble.table_of(settings, loss, tokenizer, rows, "held-out", say)
    state = _state(path, settings, loaded, loss)
    models = _models(path, settings, loaded, state)
    judge = evaluate.Judge(loaded.model, loss, models, state.running, settings.batch_size, settings.data.max_length)
    found = evaluate.summary(evaluate.held_out(judge, held_out))
    shown: list[tuple[str, ...]] = []
    if settings.prompts:
        more, shown = _sampled(settings, judge, tokenizer, held_out)
        found |= more
    _print_metrics(found)
    _print_samples(shown, list(models))
    if assemble.is_run(path):
        (Path(path) / "eval.json").write_text(json.dumps({"metrics": found}, indent=1))
        report.write([Path(path)], Path(path) / "report.html")
        say(f"the policy: {Path(path) / 'model'}   the report: {Path(path) / 'report.html'}")


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


def _print_metrics(found: dict[str, dict[str, float]]) -> None:
    grid = Grid("on held-out data", "mean", "95% interval", "n")
    for name, entry in found.items():
        interval = f"{entry['low']:.4f} .. {entry['high']:.4f}"
        grid.add_row(name.removeprefix("eval_"), f"{entry['mean']:.4f}", interval, str(entry["n"]))
    Console().print(grid)


def _print_samples(shown: list[tuple[str, ...]], names: list[str]) -> None:
    if shown:
        grid = Grid("prompt", *names, show_lines=True)
        for row in shown:
            grid.add_row(*(text.replace("\n", " / ") for text in row))
        Console().print(grid)


@dataclass(frozen=True)
class Sampling(Config):
    """A run's config, and what to complete."""

    prompt: tuple[str, ...] = ()
    """Texts to complete."""


def sample_command(argv: list[str]) -> None:
    """`dpo-jax sample RUN_OR_MODEL --prompt TEXT ... [--samples.temperature 0.7]`."""
    (path,), rest = leading(argv, "sample", "RUN_OR_MODEL")
    settings = settings_of(path, rest, Sampling, "sample")
    if not settings.prompt:
        raise UserError("--prompt: give at least one text to complete")
    tokenizer = assemble.tokenizer_of(settings.model)
    loaded = assemble.load_model(settings.model, tokenizer, settings.seed)
    models = _models(path, settings, loaded, _state(path, settings, loaded, losses.build(settings.loss)))
    prompts = assemble.prompt_ids(settings.prompt, tokenizer, settings.data)
    complete = assemble.completer(settings, loaded.model, tokenizer, prompts)
    _print_samples(list(zip(settings.prompt, *(complete(p) for p in models.values()), strict=True)), list(models))


def export_command(argv: list[str]) -> None:
    """`dpo-jax export RUN OUT`."""
    (path, out), _ = leading(argv, "export", "RUN", "OUT")
    if not assemble.is_run(path):
        raise UserError(f"{path}: not the folder of a run (it holds no config.yaml)")
    settings = assemble.config_of(path)
    tokenizer = assemble.tokenizer_of(settings.model)
    loaded = assemble.load_model(settings.model, tokenizer, settings.seed)
    state = _state(path, settings, loaded, losses.build(settings.loss))
    hf.save(Path(out), state.params, loaded.hf_config, tokenizer)
    say(f"wrote {out}, which transformers loads with from_pretrained")


def report_command(argv: list[str]) -> None:
    """`dpo-jax report RUN ... [--out FILE.html]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    runs, options = [Path(a) for a in argv[:first]], config.arguments(argv[first:])
    if any(key != "out" or len(values) != 1 for key, values in options) or not runs:
        raise UserError("dpo-jax report takes the folders of runs, then --out FILE.html; nothing else")
    out = Path(options[-1][1][0]) if options else runs[0] / "report.html"
    say(f"wrote {report.write(runs, out)}")
