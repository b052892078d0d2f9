"""`dpo-jax sample`: completions, the policy's beside the reference's."""

from dpo_jax.commands.common import leading_arguments, print_samples
from dpo_jax.config.commands import SampleConfig
from dpo_jax.errors import UserError
from dpo_jax.runs.evaluate import sample_path
from dpo_jax.runs.settings import config_of_path


def sample_command(argv: list[str]) -> None:
    """`dpo-jax sample RUN_OR_MODEL --prompt TEXT ... [--samples.temperature 0.7]`."""
    (path,), rest = leading_arguments(argv, "sample", "RUN_OR_MODEL")
    settings = config_of_path(path, rest, SampleConfig, "dpo-jax sample RUN_OR_MODEL")
    if not settings.prompt:
        raise UserError("--prompt: give at least one text to complete")
    found = sample_path(path, settings, settings.prompt)
    print_samples(list(zip(settings.prompt, *found.values(), strict=True)), list(found))
