"""Rewards by a trained reward model: a transformers folder of a *ForSequenceClassification with one label."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import reference
from dpo_jax.data import pack
from dpo_jax.data.encode import encode
from dpo_jax.data.noise import append_token
from dpo_jax.data.prompt_text import source_of
from dpo_jax.data.table import Table
from dpo_jax.data.template import Template
from dpo_jax.errors import UserError
from dpo_jax.logprobs import batch_rewards
from dpo_jax.models import reward_head
from dpo_jax.models.huggingface.folder import load_tokenizer, model_folder, open_folder
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.models.model import build_model
from dpo_jax.records import Array, Chat, Comparison, Tokens

ROW = 512  # least tokens in a packed row; longer rows are powers of two of it, so that few shapes are compiled
MICROBATCH = 4096  # tokens
BATCH = 256  # texts


class TrainedReward(NamedTuple):
    """A reward model as two functions (prompts, completions) -> float32[n].

    Attributes:
      of_texts: takes n prompts and n completions as texts; EOS is appended to each completion. The conversation
        behind a `PromptText` is rendered by the chat template of the model's folder, as in training.
      of_ids: takes arrays of token ids by the tokenizer of the model's folder; completions stay as they are.
    """

    of_texts: Callable[..., Array]
    of_ids: Callable[..., Array]


def trained_reward(path: str) -> TrainedReward:
    """Returns the rewards of a model folder, or of a run that has trained a reward model.

    A run's config.json records how texts were tokenized in training; they are tokenized the same way. Texts for another
    folder get the tokenizer's BOS, as in transformers, and are cut at the model's positions.

    Raises:
      UserError: the folder is absent or holds no reward model; when called, a text that cannot be encoded.
    """
    folder = model_folder(path)
    tokenizer, (architecture, config, stored) = load_tokenizer(folder), open_folder(folder)
    if not architecture.score:
        raise UserError(f"{path}: a language model, not a reward model; train one with the loss bradley_terry")
    params = jax.device_put(load_into_memory(stored))
    score = reference.make_ref_logps_fn(partial(batch_rewards, build_model(architecture)))
    pad = config.get("pad_token_id")

    def of_table(table: Table) -> Array:
        table = Table.of(append_token(table, tokenizer.eos_token_id, -1 if pad is None else pad))
        shape = _shape(int(table.lengths().max()))
        return reference.table_ref_logps(score, params, table, shape, BATCH, jax.device_put)[:, 0, 0]

    def of_texts(prompts: Sequence[str], completions: Sequence[str]) -> Array:
        pairs = zip(prompts, completions, strict=True)
        rows = [_comparison(source_of(p), c, f"completion {i}") for i, (p, c) in enumerate(pairs, 1)]
        if not rows:
            return np.zeros(0, np.float32)
        table, _ = encode(rows, tokenizer, **_encoding(config, architecture.max_positions))
        if len(table) < len(rows):
            raise UserError(f"{path}: a prompt leaves no room for a completion; shorten the prompts")
        return of_table(table)

    def of_ids(prompts: Sequence[Array], completions: Sequence[Array]) -> Array:
        return of_table(Table.of(Tokens(p, (c,)) for p, c in zip(prompts, completions, strict=True)))

    return TrainedReward(of_texts, of_ids)


def _comparison(prompt: str | Chat, completion: str, where: str) -> Comparison:
    """Returns a completion of a text, or an answer to a conversation, to be rendered by the model's own template."""
    if isinstance(prompt, Chat):
        return Comparison(prompt, ({"role": "assistant", "content": completion},), where=where)
    return Comparison(prompt, (completion,), where=where)


def _encoding(config: Any, positions: int) -> dict[str, Any]:
    """Returns the arguments of `encode`; no text is dropped."""
    usual = {"max_length": positions, "max_prompt_length": positions - 1, "truncation": "keep_start", "add_bos": None}
    trained = dict(config.get(reward_head.ENCODING, {}))
    template = Template(options=tuple(trained.pop("chat_template_kwargs", {}).items()))
    return usual | trained | {"template": template, "degenerate": "keep"}


def _shape(longest: int) -> pack.Layout:
    """Returns a layout for texts of at most `longest` tokens; there are few distinct layouts."""
    length = ROW
    while length < longest:
        length *= 2
    rows = max(1, MICROBATCH // length)
    return pack.Layout(-(-BATCH // rows), rows, length, length // 8, length)
