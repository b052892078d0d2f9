"""The data section of a config -> tokenised tables."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config.schema import Config, DataConfig
from dpo_jax.data import chat, noise, order
from dpo_jax.data.cache import cached_encode, write_unnamed
from dpo_jax.data.encode import EncodeOptions, SpecialTokens
from dpo_jax.data.noise import add_mismatched, append_token
from dpo_jax.data.sources.base import Item, holdout, open_stream
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.models.model import Model
from dpo_jax.paths import cache_folder
from dpo_jax.records import Chat
from dpo_jax.training.load import pad_token_id


def reward_encoding(config: Config, loss: Loss) -> dict[str, Any] | None:
    """Returns how the texts that a reward model reads become tokens; None for a loss of language models."""
    options = {
        k: v for k, v in encode_options(config.data).items() if k not in ("template", "degenerate", "skip_bad_rows")
    }
    return options if loss.rewards else None


def comparison_streams(options: DataConfig, responses: int) -> tuple[Iterable[Item], Iterable[Item]]:
    """Returns what is trained on and what is held out, each to be gone through as often as need be."""
    first = open_stream(options.name, options.path, options.split, responses)
    if options.eval_path or options.eval_split:
        path, split = options.eval_path or options.path, options.eval_split or options.split
        return first, open_stream(options.name, path, split, responses)
    if not options.eval_fraction:
        raise UserError("data: nothing is held out; set data.eval_fraction, data.eval_split or data.eval_path")
    return holdout(first, options.eval_fraction)


def with_noise(config: Config, rows: Iterable[Item]) -> Iterable[Item]:
    """Returns the training data with the noise that the config asks for."""
    options = config.data
    how = {"flip": options.flip_labels, "draw_labels": options.draw_labels, "duplicate": options.duplicate}
    return noise.add_noise(rows, **how, seed=config.seed)


def encode_options(options: DataConfig) -> dict[str, Any]:
    """Returns how text becomes tokens, as `encode` takes it."""
    names = ("max_length", "max_prompt_length", "truncation", "degenerate", "add_bos", "boundary", "skip_bad_rows")
    try:
        source = Path(options.chat_template).read_text(encoding="utf-8") if options.chat_template else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.chat_template: {options.chat_template}: cannot be read ({e})") from e
    template = chat.chat_template(source, options.chat_template_kwargs)
    return {**{name: getattr(options, name) for name in names}, "template": template}


def load_table(
    config: Config, loss: Loss, tokenizer: Any, rows: Iterable[Item], what: str, say: Callable[[str], None]
) -> Table:
    """Returns comparisons as a table that the loss can use, tokenised once; says what was read, dropped and cut.

    Raises:
      UserError: nothing is left.
    """
    folder = cache_folder() / "tokens"
    table, report = cached_encode(rows, tokenizer, folder, **encode_options(config.data))
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
        table = write_unnamed(folder, append_token(table, tokenizer.eos_token_id, pad_token_id(tokenizer)))
    if not loss.mismatched:
        return table
    counts: Counter[str] = Counter()
    table = write_unnamed(folder, add_mismatched(table, config.data.max_length, counts))
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


def responses_per_prompt(config: Config, loss: Loss) -> int:
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


def prompt_texts(prompts: Sequence[str | Chat], tokenizer: Any, options: DataConfig) -> list[str]:
    """Returns prompts as the texts that a model continues, conversations by the chat template."""
    template = encode_options(options)["template"]
    return [chat.prompt_text(prompt, tokenizer, template) for prompt in prompts]


def prompt_ids(prompts: Sequence[str | Chat], tokenizer: Any, options: DataConfig) -> list[list[int]]:
    """Returns prompts as ids, as `encode` makes them; an empty one is a UserError."""
    how, special = EncodeOptions(**encode_options(options)), SpecialTokens.of(tokenizer)
    heads = [[special.bos] * special.bos_before(prompt, how) for prompt in prompts]
    rows = tokenizer(prompt_texts(prompts, tokenizer, options), add_special_tokens=False)["input_ids"]
    ids = [head + row for head, row in zip(heads, rows, strict=True)]
    if not all(ids):
        raise UserError("a prompt is empty: nothing predicts its first token; set data.add_bos")
    return ids


def eval_examples(config: Config, table: Table) -> Table:
    """Returns the held-out comparisons that training evaluates: the first in the original's order, or as they stand."""
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
