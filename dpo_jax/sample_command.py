"""`dpo-jax sample`: completions, the policy's beside the reference's."""

from dpo_jax import assemble, loading, losses, policies
from dpo_jax.records import UserError
from dpo_jax.settings import Sampling
from dpo_jax.terminal import leading, print_samples, settings_of


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
    models = policies.models(path, settings, loaded, policies.state(path, settings, loaded, loss))
    prompts = assemble.prompt_ids(settings.prompt, tokenizer, settings.data)
    complete = assemble.completer(settings, loaded.model, tokenizer, prompts)
    print_samples(list(zip(settings.prompt, *(complete(p) for p in models.values()), strict=True)), list(models))
