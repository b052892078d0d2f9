"""Reads and tokenizes the data of a config."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config.schema import Config, DataConfig
from dpo_jax.data import noise, order
from dpo_jax.data.cache import cached_encode, write_unnamed
from dpo_jax.data.chat import prompt_text
from dpo_jax.data.encode import EncodeOptions, prompt_limit
from dpo_jax.data.noise import add_mismatched, append_token
from dpo_jax.data.prompt_text import PromptText
from dpo_jax.data.sources.base import Item, holdout
from dpo_jax.data.sources.functions import Part, open_source, takes_columns
from dpo_jax.data.special_tokens import SpecialTokens
from dpo_jax.data.spelling import reveal, token_ids
from dpo_jax.data.table import Table
from dpo_jax.data.template import chat_template
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.models.interface import Model
from dpo_jax.paths import cache_folder
from dpo_jax.records import Chat, Comparison
from dpo_jax.training.load import pad_token_id

log = logging.getLogger(__name__)


def reward_encoding(config: Config, loss: Loss) -> dict[str, Any] | None:
    """Returns the tokenization options that a reward model is exported with; None for a language model's loss."""
    if not loss.rewards:
        return None
    options = {k: v for k, v in encode_options(config.data).items() if k not in ("degenerate", "skip_bad_rows")}
    template = options.pop("template")  # its text is written as the folder's chat template
    return options | {"chat_template_kwargs": dict(template.options)}


def mapped_columns(options: DataConfig) -> dict[str, str]:
    """Returns `data.columns` without the names that are not mapped."""
    return {name: spec for name, spec in dataclasses.asdict(options.columns).items() if spec}


def comparison_streams(options: DataConfig, responses: int) -> tuple[Iterable[Item], Iterable[Item]]:
    """Returns the training and the held-out comparisons; both can be iterated repeatedly.

    Args:
      options: the data section of the config.
      responses: responses per prompt.

    Raises:
      UserError: no held-out comparisons are configured, or data cannot be read.
    """
    first, second = (options.path, options.split), _held_out_part(options)
    if second is None and not options.eval_fraction:
        raise UserError("data: no held-out comparisons; set data.eval_fraction, data.eval_split or data.eval_path")
    train = open_part(options, first, responses, [second] if second else [])
    return (train, open_part(options, second, responses, [first])) if second else holdout(train, options.eval_fraction)


def held_out_comparisons(options: DataConfig, responses: int) -> Iterable[Item]:
    """Returns the held-out comparisons of `comparison_streams`; the training data need not exist for `eval_path`."""
    part = _held_out_part(options)
    if not part or not options.eval_path:
        return comparison_streams(options, responses)[1]
    return open_part(options, part, responses, [(options.path, options.split)])


def _held_out_part(options: DataConfig) -> Part | None:
    """Returns path and split of held-out data of their own; None if they are a fraction of the training data."""
    if not (options.eval_path or options.eval_split):
        return None
    return options.eval_path or options.path, options.eval_split or options.split


def open_part(options: DataConfig, part: Part, responses: int, beside: Sequence[Part] = ()) -> Iterable[Item]:
    """Returns the comparisons of a path and split; `beside` are others of the config, see `open_source`."""
    columns = mapped_columns(options)
    return open_source(options.name, *part, responses, options.options, columns, options.text_prompts, beside)


def are_chats(items: Iterable[Item]) -> bool:
    """Returns whether comparisons are conversations, as the first one is; all are of one kind."""
    first = next((item for item in items if isinstance(item, Comparison)), None)
    return first is not None and isinstance(first.prompt, Chat)


def with_prompts(options: DataConfig, chats: bool) -> DataConfig:
    """Returns the data section with `text_prompts` as it was decided, so that an evaluation needs no training data."""
    if options.text_prompts != "auto" or not takes_columns(options.name):
        return options
    return dataclasses.replace(options, text_prompts="turns" if chats else "texts")


def with_noise(config: Config, examples: Iterable[Item]) -> Iterable[Item]:
    """Returns the training data with the configured noise."""
    options = config.data
    kinds = {"flip": options.flip_labels, "draw_labels": options.draw_labels, "duplicate": options.duplicate}
    return noise.add_noise(examples, **kinds, seed=config.seed)


def encode_options(options: DataConfig) -> dict[str, Any]:
    """Returns the keyword arguments of `encode` for the data section of a config."""
    names = ("max_length", "max_prompt_length", "truncation", "degenerate", "add_bos", "boundary", "skip_bad_rows")
    template = chat_template(template_file_text(options), options.chat_template_kwargs)
    values = {name: getattr(options, name) for name in names}
    return values | {"max_prompt_length": prompt_length(options), "template": template}


def prompt_length(options: DataConfig) -> int:
    """Returns `data.max_prompt_length`, or its default."""
    return prompt_limit(options.max_length) if options.max_prompt_length is None else options.max_prompt_length


def template_file_text(options: DataConfig) -> str:
    """Returns the chat template in the file `data.chat_template`; "" if none is named."""
    try:
        return Path(options.chat_template).read_text(encoding="utf-8") if options.chat_template else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.chat_template: {options.chat_template} cannot be read ({e}); name a text file") from e


def load_table(
    config: Config, loss: Loss, tokenizer: Any, examples: Iterable[Item], split: str, notes: list[str] | None = None
) -> Table:
    """Returns comparisons as a tokenized table, from the cache if they were tokenized before.

    Args:
      config: the run's config.
      loss: the loss to train with; its extra responses and tokens are added to the table.
      tokenizer: the policy's tokenizer.
      examples: the comparisons.
      split: "training" or "held-out", for messages.
      notes: list to append messages to; they are also logged: examples read, dropped and truncated.

    Raises:
      UserError: no example is left, or the loss cannot train on these labels.
    """

    def note(line: str) -> None:
        log.info(line)
        if notes is not None:
            notes.append(line)

    folder = cache_folder() / "tokens"
    table, report = cached_encode(examples, tokenizer, folder, **encode_options(config.data))
    for line in report.lines():
        note(f"{split} data: {line}")
    if config.data.order == "original" and (fewer := report.read - report.kept):
        note(
            f"{split} data: {fewer:,} fewer comparisons than in the original code, so data.order original does not "
            "give its batches; set data.degenerate: keep"
        )
    if faults := label_faults(table, loss):
        raise UserError(f"{split} data: {faults[0]}")
    if loss.rewards:
        table = write_unnamed(folder, append_token(table, tokenizer.eos_token_id, pad_token_id(tokenizer)))
    if not loss.mismatched:
        return table
    counts: Counter[str] = Counter()
    table = write_unnamed(folder, add_mismatched(table, config.data.max_length, counts))
    note(f"{split} data: added a response to another prompt to each comparison; truncated {counts['cut']:,} of them")
    if dropped := counts["unweighted"]:
        note(f"{split} data: {dropped:,} dropped: truncation left that response no token with a weight above 0")
    return table


def label_faults(table: Table, loss: Loss) -> list[str]:
    """Returns why a loss cannot train on a table: labels it would ignore, missing labels that it needs, no weight."""
    soft, absent = table.preferences != 1, (table.response_lengths == 0).any(axis=1)
    unrated = table.scores[:, 0] <= table.scores[:, -1]
    kinds = (
        (soft, not loss.soft_labels, "with a soft label (preference), which this loss ignores"),
        (absent, not loss.unpaired, "with an absent response (unpaired), which this loss cannot use"),
        (unrated, loss.scores, "without a first response scored above the last, which this loss needs"),
    )
    faults = [f"{int(found.sum()):,} comparisons {kind}" for found, wrong, kind in kinds if wrong and found.any()]
    none = [] if table.weights.any() else ["every example has weight 0, so that none counts; correct column 'weight'"]
    return [f"{fault}; set another loss or remove them" for fault in faults] + none


def responses_per_prompt(config: Config, loss: Loss) -> int:
    """Returns the number of responses per prompt to read from the sources.

    Raises:
      UserError: `data.responses` is missing, or differs from the number that the loss takes.
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
    """Returns prompts as texts; conversations are rendered by the chat template, and remembered (`PromptText`)."""
    rendered = _rendered_prompts(prompts, tokenizer, options)
    return [PromptText(reveal(text, tokenizer), prompt) for text, prompt in zip(rendered, prompts, strict=True)]


def _rendered_prompts(prompts: Sequence[str | Chat], tokenizer: Any, options: DataConfig) -> list[str]:
    template = encode_options(options)["template"]
    return [prompt_text(prompt, tokenizer, template) for prompt in prompts]


def prompt_ids(prompts: Sequence[str | Chat], tokenizer: Any, options: DataConfig) -> list[list[int]]:
    """Returns prompts as token ids, tokenized as `encode` does.

    Raises:
      UserError: an empty prompt.
    """
    encoding, special = EncodeOptions(**encode_options(options)), SpecialTokens.of(tokenizer)
    starts: list[Any] = [[special.bos] * special.bos_before(prompt, encoding.add_bos) for prompt in prompts]
    texts = token_ids(_rendered_prompts(prompts, tokenizer, options), tokenizer)
    ids = [text if text[:1] == start else start + text for start, text in zip(starts, texts, strict=True)]
    if not all(ids):
        raise UserError("a prompt is empty, so the first token would have no context; set data.add_bos: true")
    return ids


def eval_examples(config: Config, table: Table) -> Table:
    """Returns the held-out comparisons that training evaluates: the first `data.eval_examples` in `data.order`."""
    count = config.data.eval_examples
    if config.data.order == "original":
        found = table.take(order.bind_order("original", table.prompts, 0)(0)[:count])
    else:
        found = table if count is None else table.take(np.arange(min(count, len(table))))
    if not found.weights.any():
        raise UserError(
            f"held-out data: the first {len(found)} examples (data.eval_examples) have weight 0; set more or correct it"
        )
    return found


def decode_texts(tokenizer: Any, rows: Sequence[Any], ends: Sequence[int] = ()) -> list[str]:
    """Returns token ids as texts, without special tokens and without the marker that ends a text.

    `ends` are the ids at which sampling stops; one that is a word or a sign of the vocabulary stays in the text.
    """
    # The EOS of some tokenizers is no special token, so it is cut by its id.
    markers = {tokenizer.eos_token_id, *(set(ends) & set(tokenizer.added_tokens_decoder))}
    ids = [list(row)[:-1] if len(row) and row[-1] in markers else list(row) for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def check_ids(table: Table, split: str, tokenizer: Any, model: Model) -> None:
    """Refuses a table with a token that the model has no embedding for."""
    most, vocab = int(table.ids.max()), model.architecture.vocab
    if most >= vocab:
        token = tokenizer.convert_ids_to_tokens(most)
        raise UserError(f"{split} data: the model has no embedding for {token!r}; remove it from the texts")
