"""The data section of a config -> tokenised tables."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config.schema import Config, DataConfig
from dpo_jax.data import chat, noise, order
from dpo_jax.data.cache import cached_encode, write_unnamed
from dpo_jax.data.encode import EncodeOptions, SpecialTokens
from dpo_jax.data.noise import add_mismatched, append_token
from dpo_jax.data.sources.base import Item, holdout
from dpo_jax.data.sources.functions import open_source
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.models.model import Model
from dpo_jax.paths import cache_folder
from dpo_jax.records import Chat
from dpo_jax.training.load import pad_token_id

log = logging.getLogger(__name__)


def reward_encoding(config: Config, loss: Loss) -> dict[str, Any] | None:
    """Returns the tokenisation of the texts that a reward model reads; None for losses of language models."""
    options = {
        k: v for k, v in encode_options(config.data).items() if k not in ("template", "degenerate", "skip_bad_rows")
    }
    return options if loss.rewards else None


def comparison_streams(options: DataConfig, responses: int) -> tuple[Iterable[Item], Iterable[Item]]:
    """Returns the training and the held-out comparisons; both can be iterated repeatedly."""
    first = open_source(options.name, options.path, options.split, responses, options.options)
    if options.eval_path or options.eval_split:
        path, split = options.eval_path or options.path, options.eval_split or options.split
        return first, open_source(options.name, path, split, responses, options.options)
    if not options.eval_fraction:
        raise UserError("data: no held-out comparisons; set data.eval_fraction, data.eval_split or data.eval_path")
    return holdout(first, options.eval_fraction)


def with_noise(config: Config, rows: Iterable[Item]) -> Iterable[Item]:
    """Returns the training data with the configured noise."""
    options = config.data
    how = {"flip": options.flip_labels, "draw_labels": options.draw_labels, "duplicate": options.duplicate}
    return noise.add_noise(rows, **how, seed=config.seed)


def encode_options(options: DataConfig) -> dict[str, Any]:
    """Returns the keyword arguments of `encode` for a data section."""
    names = ("max_length", "max_prompt_length", "truncation", "degenerate", "add_bos", "boundary", "skip_bad_rows")
    try:
        source = Path(options.chat_template).read_text(encoding="utf-8") if options.chat_template else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.chat_template: {options.chat_template}: cannot be read ({e})") from e
    template = chat.chat_template(source, options.chat_template_kwargs)
    return {**{name: getattr(options, name) for name in names}, "template": template}


def load_table(
    config: Config, loss: Loss, tokenizer: Any, rows: Iterable[Item], split: str, notes: list[str] | None = None
) -> Table:
    """Returns comparisons as a tokenised table that the loss can train on, from the cache or tokenised once.

    Counts of examples read, dropped and truncated are logged and appended to `notes`.

    Raises:
      UserError: no example is left, or labels do not suit the loss.
    """

    def note(line: str) -> None:
        log.info(line)
        if notes is not None:
            notes.append(line)

    folder = cache_folder() / "tokens"
    table, report = cached_encode(rows, tokenizer, folder, **encode_options(config.data))
    for line in report.lines():
        note(f"{split} data: {line}")
    if config.data.order == "original" and (fewer := report.read - report.kept):
        note(
            f"{split} data: {fewer:,} comparisons fewer than in the original, so data.order original does not give its "
            "batches; set data.degenerate: keep"
        )
    if faults := label_faults(table, loss):
        raise UserError(f"{split} data: {faults[0]}")
    if loss.rewards:
        table = write_unnamed(folder, append_token(table, tokenizer.eos_token_id, pad_token_id(tokenizer)))
    if not loss.mismatched:
        return table
    counts: Counter[str] = Counter()
    table = write_unnamed(folder, add_mismatched(table, config.data.max_length, counts))
    note(f"{split} data: each prompt has a response to another prompt added; {counts['cut']:,} of them were truncated")
    return table


def label_faults(table: Table, loss: Loss) -> list[str]:
    """Returns why a loss cannot train on this table: labels it would ignore, or labels it needs that are missing."""
    soft, absent = table.preferences != 1, (table.response_lengths == 0).any(axis=1)
    unrated = table.scores[:, 0] <= table.scores[:, -1]
    kinds = (
        (soft, not loss.soft_labels, "a soft label (preference), which this loss cannot use"),
        (absent, not loss.unpaired, "an absent response (unpaired rows), which this loss cannot use"),
        (unrated, loss.scores, "no score of the first response above the last's, which this loss needs"),
    )
    return [f"{int(rows.sum()):,} comparisons with {kind}" for rows, wrong, kind in kinds if wrong and rows.any()]


def responses_per_prompt(config: Config, loss: Loss) -> int:
    """Returns the number of responses per prompt to read from the sources.

    Raises:
      UserError: `data.responses` is missing, or not the number that the loss takes.
    """
    wanted, needed = config.data.responses, loss.responses
    if needed is None:
        if wanted is None or wanted < 2:
            raise UserError("data.responses: set it (2 or more) for a ranking loss")
        return wanted
    needed -= loss.mismatched
    if wanted not in (None, needed):
        raise UserError(f"data.responses: {wanted}: this loss takes {needed}; remove it")
    return needed


def prompt_texts(prompts: Sequence[str | Chat], tokenizer: Any, options: DataConfig) -> list[str]:
    """Returns prompts as texts to continue; conversations are rendered by the chat template."""
    template = encode_options(options)["template"]
    return [chat.prompt_text(prompt, tokenizer, template) for prompt in prompts]


def prompt_ids(prompts: Sequence[str | Chat], tokenizer: Any, options: DataConfig) -> list[list[int]]:
    """Returns prompts as token ids, as `encode` makes them; an empty prompt is a UserError."""
    how, special = EncodeOptions(**encode_options(options)), SpecialTokens.of(tokenizer)
    heads = [[special.bos] * special.bos_before(prompt, how) for prompt in prompts]
    rows = tokenizer(prompt_texts(prompts, tokenizer, options), add_special_tokens=False)["input_ids"]
    ids = [head + row for head, row in zip(heads, rows, strict=True)]
    if not all(ids):
        raise UserError("a prompt is empty, so its first token has no context; set data.add_bos: true")
    return ids


def eval_examples(config: Config, table: Table) -> Table:
    """Returns the held-out comparisons of training's evaluations: the first `data.eval_examples`, in `data.order`."""
    count = config.data.eval_examples
    if config.data.order == "original":
        return table.take(order.bind_order("original", table.prompts, 0)(0)[:count])
    return table if count is None else table.take(np.arange(min(count, len(table))))


def decode_texts(tokenizer: Any, rows: Sequence[Any]) -> list[str]:
    """Returns ids as texts, without special tokens; the EOS of some tokenizers is none, so it is cut off by its id."""
    ids = [list(row)[:-1] if len(row) and row[-1] == tokenizer.eos_token_id else list(row) for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def check_ids(table: Table, what: str, tokenizer: Any, model: Model) -> None:
    """Refuses texts with a token that the model has no embedding for."""
    most, vocab = int(table.ids.max()), model.architecture.vocab
    if most >= vocab:
        token = tokenizer.convert_ids_to_tokens(most)
        raise UserError(f"{what} data: a text has {token!r}, for which the model has no embedding; take it out")
