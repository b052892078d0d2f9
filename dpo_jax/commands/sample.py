"""`dpo-jax sample`: completions, the policy's beside the reference's."""

from dpo_jax import losses
from dpo_jax.commands.common import command_config, leading_arguments, print_samples
from dpo_jax.config.commands import SampleConfig
from dpo_jax.errors import UserError
from dpo_jax.training import setup
from dpo_jax.training.load import load_policy, load_run_tokenizer
from dpo_jax.training.restore import restore_models, restore_state
from dpo_jax.training.tables import prompt_ids


def sample_command(argv: list[str]) -> None:
    """`dpo-jax sample RUN_OR_MODEL --prompt TEXT ... [--samples.temperature 0.7]`."""
    (path,), rest = leading_arguments(argv, "sample", "RUN_OR_MODEL")
    settings = command_config(path, rest, SampleConfig, "sample")
    if not settings.prompt:
        raise UserError("--prompt: give at least one text to complete")
    loss = losses.build(settings.loss)
    if loss.rewards:
        raise UserError(f"{path}: a reward model, which writes nothing; name a language model")
    tokenizer = load_run_tokenizer(settings.model)
    loaded = load_policy(settings.model, tokenizer, settings.seed, settings.lora)
    models = restore_models(path, settings, loaded, restore_state(path, settings, loaded, loss))
    prompts = prompt_ids(settings.prompt, tokenizer, settings.data)
    complete = setup.make_completer(settings, loaded.model, tokenizer, prompts)
    print_samples(list(zip(settings.prompt, *(complete(p) for p in models.values()), strict=True)), list(models))
