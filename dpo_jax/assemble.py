"""A config -> everything a run is made of: tokenizer, models, tables, folders."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import admit, data, keys, losses, optim, processes, sharding, track
from dpo_jax import config as configs
from dpo_jax.config import Config
from dpo_jax.data import Item, chat, noise, order
from dpo_jax.data.cache import cached_encode, unnamed
from dpo_jax.data.encode import Options, Special
from dpo_jax.data.ended import ended
from dpo_jax.data.mismatch import mismatched
from dpo_jax.data.table import Table
from dpo_jax.folders import cache_folder, check_secrets, claim_folder
from dpo_jax.loading import Loaded, load_model, notes, padding, tokenizer_of
from dpo_jax.losses import Loss
from dpo_jax.models import Model, hf
from dpo_jax.models.hf import model_folder
from dpo_jax.models.weights import weights_hash
from dpo_jax.prepare import Run
from dpo_jax.records import Chat, UserError
from dpo_jax.sample import sample
from dpo_jax.step import Sync


def reward_encoding(config: Config, loss: Loss) -> dict[str, Any] | None:
    """Returns how the texts that a reward model reads become tokens; None for a loss of language models."""
    options = {k: v for k, v in encoding(config.data).items() if k not in ("template", "degenerate", "skip_bad_rows")}
    return options if loss.rewards else None


def comparisons(options: configs.Data, responses: int) -> tuple[Iterable[Item], Iterable[Item]]:
    """Returns what is trained on and what is held out, each to be gone through as often as need be."""
    first = data.stream(options.name, options.path, options.split, responses)
    if options.eval_path or options.eval_split:
        path, split = options.eval_path or options.path, options.eval_split or options.split
        return first, data.stream(options.name, path, split, responses)
    if not options.eval_fraction:
        raise UserError("data: nothing is held out; set data.eval_fraction, data.eval_split or data.eval_path")
    return data.holdout(first, options.eval_fraction)


def noise_in(config: Config, rows: Iterable[Item]) -> Iterable[Item]:
    """Returns the training data with the noise that the config asks for."""
    options = config.data
    how = {"flip": options.flip_labels, "draw_labels": options.draw_labels, "duplicate": options.duplicate}
    return noise.noisy(rows, **how, seed=config.seed)


def encoding(options: configs.Data) -> dict[str, Any]:
    """Returns how text becomes tokens, as `encode` takes it."""
    names = ("max_length", "max_prompt_length", "truncation", "degenerate", "add_bos", "boundary", "skip_bad_rows")
    try:
        source = Path(options.chat_template).read_text(encoding="utf-8") if options.chat_template else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.chat_template: {options.chat_template}: cannot be read ({e})") from e
    template = chat.template_of(source, options.chat_template_kwargs)
    return {**{name: getattr(options, name) for name in names}, "template": template}


def table_of(
    config: Config, loss: Loss, tokenizer: Any, rows: Iterable[Item], what: str, say: Callable[[str], None]
) -> Table:
    """Returns comparisons as a table that the loss can use, tokenised once; says what was read, dropped and cut.

    Raises:
      UserError: nothing is left.
    """
    folder = cache_folder() / "tokens"
    table, report = cached_encode(rows, tokenizer, folder, **encoding(config.data))
    for line in report.lines():
        say(f"{what} data: {line}")
    if config.data.order == "original" and (fewer := report.read - report.kept):
        say(
            f"{what} data: {fewer:,} comparisons fewer than the original takes, so data.order original has not its "
            "batches; data.degenerate keep leaves them in"
        )
    if faults := label_faults(table, loss):
        raise UserError(f"{what} data: {faults[0]}")
    if loss.rewards:
        table = unnamed(folder, ended(table, tokenizer.eos_token_id, padding(tokenizer)))
    if not loss.mismatched:
        return table
    counts: Counter[str] = Counter()
    table = unnamed(folder, mismatched(table, config.data.max_length, counts))
    say(f"{what} data: each prompt has got a response to another one, {counts['cut']:,} of which were cut to fit")
    return table


def label_faults(table: Table, loss: Loss) -> list[str]:
    """Returns what a loss cannot do with the labels of a table: those that it would not see, or lacks."""
    soft, absent = table.preferences != 1, (table.response_lengths == 0).any(axis=1)
    unrated = table.scores[:, 0] <= table.scores[:, -1]
    kinds = (
        (soft, not loss.soft_labels, "a soft label (preference), which this loss cannot use"),
        (absent, not loss.unpaired, "an absent response (unpaired rows), which this loss cannot use"),
        (unrated, loss.scores, "no score of the first response above the last's, which this loss needs"),
    )
    return [f"{int(rows.sum()):,} comparisons with {kind}" for rows, wrong, kind in kinds if wrong and rows.any()]


def responses_of(config: Config, loss: Loss) -> int:
    """Returns how many responses the sources are to give to a prompt.

    Raises:
      UserError: another number is set than the loss can take.
    """
    wanted, needed = config.data.responses, loss.responses
    if needed is None:
        if wanted is None or wanted < 2:
            raise UserError("data.responses: this loss ranks any number of responses from 2 on; say how many there are")
        return wanted
    needed -= loss.mismatched
    if wanted not in (None, needed):
        raise UserError(f"data.responses: {wanted}: this loss takes {needed}")
    return needed


def sync_of(config: Config, loss: Loss) -> Sync | None:
    """Returns how the reference follows the policy, if it does.

    Raises:
      UserError: it cannot.
    """
    every, alpha = config.reference.sync_every, config.reference.sync_alpha
    if not every and alpha != configs.Reference.sync_alpha:
        raise UserError(
            f"reference.sync_alpha: {alpha} moves nothing; say with reference.sync_every how often it is to"
        )
    if not every:
        return None
    if every < 0 or not 0 < alpha <= 1:
        raise UserError(f"reference: sync_every {every} is less than 0, or sync_alpha {alpha} is not in (0, 1]")
    if not loss.uses_reference:
        raise UserError("reference.sync_every: the loss has no reference that could follow the policy")
    if config.lora.rank or config.lora.path:
        raise UserError("reference.sync_every: with lora the reference is the model without adapters, which stays")
    if config.reference.mode == "cache":
        raise UserError("reference.sync_every: a reference that moves cannot be cached; set reference.mode: online")
    return Sync(every, alpha)


def prompt_texts(prompts: Sequence[str | Chat], tokenizer: Any, options: configs.Data) -> list[str]:
    """Returns prompts as the texts that a model continues, conversations by the chat template."""
    template = encoding(options)["template"]
    return [chat.prompt_text(prompt, tokenizer, template) for prompt in prompts]


def prompt_ids(prompts: Sequence[str | Chat], tokenizer: Any, options: configs.Data) -> list[list[int]]:
    """Returns prompts as ids, as `encode` makes them; an empty one is a UserError."""
    how, special = Options(**encoding(options)), Special.of(tokenizer)
    heads = [[special.bos] * special.bos_before(prompt, how) for prompt in prompts]
    rows = tokenizer(prompt_texts(prompts, tokenizer, options), add_special_tokens=False)["input_ids"]
    ids = [head + row for head, row in zip(heads, rows, strict=True)]
    if not all(ids):
        raise UserError("a prompt is empty: nothing predicts its first token; set data.add_bos")
    return ids


def evaluated(config: Config, table: Table) -> Table:
    """Returns the held-out comparisons that training evaluates: the first in the original's order, or as they stand."""
    count = config.data.eval_examples
    if config.data.order == "original":
        return table.take(order.bind("original", table.prompts, 0)(0)[:count])
    return table if count is None else table.take(np.arange(min(count, len(table))))


def decoded(tokenizer: Any, rows: Sequence[Any]) -> list[str]:
    """Returns ids as texts, without special tokens; the EOS of some tokenizers is none, so it is cut off by its id."""
    ids = [list(row)[:-1] if len(row) and row[-1] == tokenizer.eos_token_id else list(row) for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def completer(config: Config, model: Model, tokenizer: Any, prompts: list[Any]) -> Callable[[Any], list[str]]:
    """Returns `params -> completions as text` of tokenised prompts, drawn as the config says."""
    options = config.samples
    draw = partial(
        sample,
        model,
        prompts=prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_id=tokenizer.eos_token_id,
        seed=config.seed,
    )
    return lambda params: decoded(tokenizer, draw(params))


def check(config: Config) -> None:
    """Refuses values that no run can have, by key; it reads no data and loads no model."""
    check_secrets(config)
    track.check(config.track)
    for key in ("batch_size", "epochs", "save_every", "log_every", "max_nonfinite"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}: {getattr(config, key)} is less than 1")
    if config.keep < 2:
        raise UserError(f"keep: {config.keep}: at least 2 checkpoints, so that one is left if the newest is damaged")
    if not config.hang_seconds >= 0:
        raise UserError(f"hang_seconds: {config.hang_seconds} is less than 0; 0 is never")
    if config.data.skip_bad_rows < 0:
        raise UserError(f"data.skip_bad_rows: {config.data.skip_bad_rows} is less than 0")
    if not 0 <= config.data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction: {config.data.eval_fraction} is not in [0, 1)")
    if config.lora.base and config.reference.path:
        raise UserError(f"reference.path: with lora.base {config.lora.base} the reference is that base; leave it out")
    loss = losses.build(config.loss)
    sync_of(config, loss)
    responses_of(config, loss)
    optim.build(**config.optim)


def _check_ids(table: Table, what: str, tokenizer: Any, model: Model) -> None:
    """Refuses texts with a token that the model has no embedding for."""
    most, vocab = int(table.ids.max()), model.architecture.vocab
    if most >= vocab:
        token = tokenizer.convert_ids_to_tokens(most)
        raise UserError(f"{what} data: a text has {token!r}, for which the model has no embedding; take it out")


def check_length(config: Config, model: Model) -> None:
    """Refuses texts that may be longer than the model."""
    limit = model.architecture.max_positions
    if config.data.max_length > limit:
        raise UserError(f"data.max_length: {config.data.max_length} is more than the model's {limit} positions")


def run_of(config: Config, say: Callable[[str], None]) -> Run:
    """Returns a run, assembled: its folder claimed, its data tokenised, its models loaded."""
    check(config)
    loss = losses.build(config.loss)
    sync = sync_of(config, loss)
    tokenizer = tokenizer_of(config.model)
    loaded = load_model(config.model, tokenizer, config.seed, config.lora, reward_encoding(config, loss))
    check_length(config, loaded.model)
    for line in notes(config, loaded):
        say(line)
    heard: list[str] = []

    def hear(line: str) -> None:  # said now, and kept for the report
        heard.append(line)
        say(line)

    if loaded.note:
        hear(loaded.note)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model, note = admit.with_attention(loaded.model, config.model, mesh)
    if note:
        hear(note)
    rows = comparisons(config.data, responses_of(config, loss))
    with processes.first_before_others("the data"):  # which then find it in the cache
        train = table_of(config, loss, tokenizer, noise_in(config, rows[0]), "training", hear)
        held_out = evaluated(config, table_of(config, loss, tokenizer, rows[1], "held-out", hear))
    for what, table in (("training", train), ("held-out", held_out)):
        _check_ids(table, what, tokenizer, loaded.model)
    same = {"config": keys.dump(config), "training data": train.digest, "held-out data": held_out.digest}
    processes.check_same(same | {"weights at the start": weights_hash(loaded.params, loaded.model.architecture)})
    folder, lock = claim_folder(config)
    if processes.first():
        (folder / "data.json").write_text(json.dumps(heard, indent=1))
    shown = 0 if loss.rewards else config.samples.prompts  # a reward model writes nothing
    prompts = [held_out[i].prompt for i in range(min(shown, len(held_out)))]
    return Run(
        config=config,
        folder=folder,
        lock=lock,
        cache=cache_folder(),
        model=model,
        loss=loss,
        sync=sync,
        params=loaded.params if loaded.lora is None else loaded.adapters,
        frozen=partial(frozen_of, config, loaded) if loss.uses_reference else None,
        train=train,
        held_out=held_out,
        complete=completer(config, loaded.model, tokenizer, prompts) if prompts else None,
        prompts=decoded(tokenizer, prompts),
        export=partial(loaded.export, tokenizer=tokenizer),
        base=None if loaded.lora is None else loaded.params,
        lora=loaded.lora,
    )


def variant_of(run: Run, config: Config) -> Run:
    """Returns a run that differs from another in `prepare.numbers` only, with a folder of its own."""
    loss = losses.build(config.loss)
    folder, lock = claim_folder(config)
    if processes.first():
        shutil.copy(run.folder / "data.json", folder / "data.json")
    return run._replace(config=config, folder=folder, lock=lock, loss=loss)


def frozen_of(config: Config, policy: Loaded) -> tuple[Any, str]:
    """Returns the reference's host or stored arrays and their hash; by default those of the policy at the start.

    Raises:
      UserError: a reference of another architecture, which one table of log-probs cannot serve here.
    """
    params, architecture = policy.params, policy.model.architecture
    if config.reference.path:
        architecture, _, params = hf.stored(model_folder(config.reference.path))
        if architecture != policy.model.architecture:
            raise UserError(f"reference.path: {config.reference.path} is of another architecture than the policy")
    return params, weights_hash(params, architecture)


def named(config: Config, file: str) -> Config:
    """Returns the config with its run folder filled in, runs/<name of the YAML> by default."""
    return dataclasses.replace(config, run=config.run or str(Path("runs") / Path(file).stem))
