"""Completions that training samples at every evaluation: some to show, more to estimate KL(policy || reference)."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dpo_jax.config.schema import Config
from dpo_jax.data.table import Table
from dpo_jax.evaluation import distinct_prompts
from dpo_jax.losses import Loss
from dpo_jax.records import Array
from dpo_jax.sampling import PLAIN, generate
from dpo_jax.training.load import LoadedModel
from dpo_jax.training.run import Completions, kl_prompt_count
from dpo_jax.training.tables import decode_texts

log = logging.getLogger(__name__)


def make_completer(
    config: Config, loaded: LoadedModel, tokenizer: Any, prompts: list[Any]
) -> Callable[[Any], list[str]]:
    """Returns `params -> completions as text` for tokenized prompts, sampled with the options of `config.samples`."""
    sample, ends = _sampler(config, loaded, tokenizer), loaded.end_ids(tokenizer)
    return lambda params: decode_texts(tokenizer, sample(params, prompts=prompts, **_options(config)), ends)


def make_run_completer(
    config: Config, loaded: LoadedModel, tokenizer: Any, shown: list[Array], kl_prompts: list[Array]
) -> Callable[[Any], Completions] | None:
    """Returns `params -> completions` of the sample prompts and the KL prompts; None if there are neither.

    KL is an expectation over the policy's own distribution, so its prompts are sampled without temperature, top_k and
    top_p. If the samples are too, and are of the same prompts, they are sampled once.
    """
    sample, options, ends = _sampler(config, loaded, tokenizer), _options(config), loaded.end_ids(tokenizer)
    alike = len(shown) <= len(kl_prompts) and all(map(np.array_equal, shown, kl_prompts))
    same = not shown or (alike and options == options | PLAIN)

    def complete(params: Any) -> Completions:
        ids = sample(params, prompts=kl_prompts, **(options | PLAIN)) if kl_prompts else []
        ours = ids[: len(shown)] if same else sample(params, prompts=shown, **options)
        return Completions(decode_texts(tokenizer, ours, ends), ids)

    return complete if shown or kl_prompts else None


def _sampler(config: Config, loaded: LoadedModel, tokenizer: Any) -> Callable[..., list[np.ndarray]]:
    return partial(generate, loaded.model, eos_id=loaded.end_ids(tokenizer), seed=config.seed)


def _options(config: Config) -> dict[str, Any]:
    return {name: getattr(config.samples, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


def prompts_to_sample(config: Config, loaded: LoadedModel, loss: Loss, table: Table) -> tuple[list[Array], list[Array]]:
    """Returns the sample prompts and the KL prompts of a run: the first distinct ones of the held-out data."""
    count = 0 if loss.rewards else config.samples.prompts  # reward models generate nothing
    found = distinct_prompts(table, kl_prompt_count(config, loss))
    return distinct_prompts(table, count), prompts_with_room(found, loaded, config.samples.max_new_tokens, "KL")


def prompts_with_room(prompts: list[Array], loaded: LoadedModel, max_new_tokens: int, what: str) -> list[Array]:
    """Returns the prompts that leave room for a completion in the model's positions; says how many do not."""
    room = loaded.model.architecture.max_positions - max_new_tokens
    fit = [prompt for prompt in prompts if len(prompt) <= room]
    if fewer := len(prompts) - len(fit):
        log.info(
            f"{what}: {fewer} of {len(prompts)} prompts are left out; they leave no room for samples.max_new_tokens "
            f"({max_new_tokens})"
        )
    return fit
