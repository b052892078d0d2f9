"""What each command of the command line does: reads its arguments, assembles, calls, prints."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from dpo_jax import admit, assemble, config, evaluate, folders, keys, loading, losses, optim, plan, report, rewards
from dpo_jax.config import Config
from dpo_jax.data_commands import data_command, leading, say, settings_of
from dpo_jax.frontier_command import frontier_command
from dpo_jax.losses_command import losses_command
from dpo_jax.models import described, hf
from dpo_jax.models.kernels import CHUNKS
from dpo_jax.pairs_command import pairs_command
from dpo_jax.records import TrainState, UserError
from dpo_jax.stages import joined, trained
from dpo_jax.step import init_state
from dpo_jax.sweep_command import sweep_command
from dpo_jax.winrate_command import winrate_command

__all__ = [
    "data_command",
    "frontier_command",
    "losses_command",
    "pairs_command",
    "sweep_command",
    "winrate_command",
]  # elsewhere


def train_command(argv: list[str]) -> None:
    """`dpo-jax train CONFIG.yaml [--key.path value ...] [--distributed auto|HOST:PORT,PROCESSES,INDEX]`."""
    (file,), rest = leading(argv, "train", "CONFIG.yaml")
    rest = joined(rest)
    folder = trained(file, rest)
    say(f"the model: {folder / 'model'}   the report: {folder / 'report.html'}")


@dataclass(frozen=True)
class Evaluation(Config):
    """A run's config, and what to measure beside its held-out comparisons."""

    reward: str = ""
    """A reward of completions: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER,
    classifier:FOLDER#LABEL or module:function."""
    prompts: int = 256
    """Held-out prompts from which both models are sampled, for KL and reward (0: none)."""
    show: int = 3
    """Prompts printed with both models' completions."""
    per_token: str = ""
    """A .jsonl to write the log-probs of every token of the held-out responses to, by position."""


def _state(path: str, settings: Config, loaded: loading.Loaded, loss: losses.Loss, which: str = "newest") -> TrainState:
    """Returns the state of one of a run's checkpoints, or that of a model folder's parameters before any step."""
    moves = assemble.sync_of(settings, loss) is not None
    trained = loaded.params if loaded.lora is None else loaded.adapters

    def start(params: Any) -> TrainState:
        return init_state(params, optim.build(**settings.optim), loss.terms, params if moves else ())

    if not folders.is_run(path):
        return TrainState(0, hf.whole(trained), (), np.zeros(loss.terms, np.float32), ())
    return folders.saved_state(Path(path), jax.eval_shape(start, trained), which)


def _models(path: str, settings: Config, loaded: loading.Loaded, state: TrainState) -> dict[str, Any]:
    """Returns the policy and, if there is one, the reference as it stands."""
    models = {"policy": loaded.policy(state.params)}
    uses = folders.is_run(path) and losses.build(settings.loss).uses_reference
    if state.reference:
        models["reference"] = state.reference
    elif settings.reference.path or uses:
        models["reference"] = hf.whole(assemble.frozen_of(settings, loaded)[0])
    return models


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
    _, rows = assemble.comparisons(settings.data, assemble.responses_of(settings, loss))
    held_out = assemble.table_of(settings, loss, tokenizer, rows, "held-out", say)
    state = _state(path, settings, loaded, loss)
    models = _models(path, settings, loaded, state)
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
    _print_samples(shown, list(models))
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
    loss = losses.build(settings.loss)
    if loss.rewards:
        raise UserError(f"{path}: a reward model, which writes nothing; name a language model")
    tokenizer = loading.tokenizer_of(settings.model)
    loaded = loading.load_model(settings.model, tokenizer, settings.seed, settings.lora)
    models = _models(path, settings, loaded, _state(path, settings, loaded, loss))
    prompts = assemble.prompt_ids(settings.prompt, tokenizer, settings.data)
    complete = assemble.completer(settings, loaded.model, tokenizer, prompts)
    _print_samples(list(zip(settings.prompt, *(complete(p) for p in models.values()), strict=True)), list(models))


def export_command(argv: list[str]) -> None:
    """`dpo-jax export RUN OUT [--checkpoint newest|best|STEP]`."""
    (path, out), rest = leading(argv, "export", "RUN", "OUT")
    given = keys.arguments(rest)
    if any(key != "checkpoint" or len(values) != 1 for key, values in given):
        raise UserError("dpo-jax export takes RUN, OUT and perhaps --checkpoint newest, best or a step; nothing else")
    which = given[-1][1][0] if given else "newest"
    if not folders.is_run(path):
        raise UserError(f"{path}: not the folder of a run (it holds no config.yaml)")
    settings = folders.config_of(path)
    tokenizer = loading.tokenizer_of(settings.model)
    loss = losses.build(settings.loss)
    rewarded = assemble.reward_encoding(settings, loss)
    loaded = loading.load_model(settings.model, tokenizer, settings.seed, settings.lora, rewarded)
    state = _state(path, settings, loaded, loss, which)
    loaded.save(state.params, Path(out), tokenizer)
    for line in loading.notes(settings, loaded):
        say(line)
    say(f"wrote {out}, which transformers loads with from_pretrained")


@dataclass(frozen=True)
class Planning(Config):
    """A run's config, and the devices that it is planned for."""

    devices: int = 0
    """How many devices (0: those that are here)."""
    memory: float = 80.0
    """GB of memory that each has."""


def plan_command(argv: list[str]) -> None:
    """`dpo-jax plan CONFIG.yaml [--devices N] [--memory GB] [--key.path value ...]`."""
    (file,), rest = leading(argv, "plan", "CONFIG.yaml")
    settings = config.parse(Planning, file or None, rest, prog="dpo-jax plan CONFIG.yaml", variants=folders.VARIANTS)
    if settings.devices:  # processors stand for them: the compiler needs no more than their number
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices)
    made = plan.of(plan.resolved(settings))
    grid = Grid("on each device", "GB")
    for name, value in (*made.memory._asdict().items(), ("together", made.memory.total)):
        grid.add_row(name, f"{value / plan.GB:.2f}")
    Console().print(grid)
    say(
        f"{made.parameters:,} parameters, {made.trained:,} of them trained; {jax.device_count()} device(s); up to "
        f"{made.shape.microbatches} microbatches of {made.shape.rows} rows x {made.shape.length} tokens"
    )
    if settings.model.attention not in ("auto", CHUNKS):
        say(f"model.attention: {settings.model.attention} cannot be planned with; the memory is that of {CHUNKS}")
    lines = plan.advice(made, int(settings.memory * plan.GB))
    share = made.memory.total / (settings.memory * plan.GB)
    say(f"{share:.0%} of {settings.memory:g} GB" + (": it does not fit; what would help:" if lines else ": it fits"))
    for line in lines:
        say(f"  {line}")


def models_command(argv: list[str]) -> None:
    """`dpo-jax models`."""
    leading(argv, "models")
    grid = Grid("model_type", "class in transformers", "what it is")
    for row in described():
        grid.add_row(*row)
    Console().print(grid)
    say(
        "Every one of them is trained, evaluated, sampled with a cache, laid out over devices and exported.\n"
        "Rotary positions: default, linear, llama3. What else a config.json asks for is refused by its key.\n"
        "To add one: a file dpo_jax/models/<model_type>.py with architecture(config) and tensors(architecture), and a\n"
        "row in tests/tiny.py, from which the tests compare it with transformers."
    )


def report_command(argv: list[str]) -> None:
    """`dpo-jax report RUN ... [--out FILE.html]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    runs, options = [Path(a) for a in argv[:first]], keys.arguments(argv[first:])
    if any(key != "out" or len(values) != 1 for key, values in options) or not runs:
        raise UserError("dpo-jax report takes the folders of runs, then --out FILE.html; nothing else")
    out = Path(options[-1][1][0]) if options else runs[0] / "report.html"
    say(f"wrote {report.write(runs, out)}")
