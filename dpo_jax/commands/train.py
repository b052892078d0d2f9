"""`dpo-jax train`: SFT, DPO or any loss."""

from dpo_jax import distributed
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.runs.train import train_settings, with_base_model
from dpo_jax.training import setup


def train_command(argv: list[str]) -> None:
    """`dpo-jax train CONFIG.yaml [--key.path value ...] [--distributed auto|HOST:PORT,PROCESSES,INDEX]`."""
    (file,), rest = leading_arguments(argv, "train", "CONFIG.yaml")
    rest = initialize_from_argv(rest)
    settings = setup.with_run_folder(parse_config(Config, file or None, rest, prog="dpo-jax train CONFIG.yaml"), file)
    setup.check_config(settings)  # before the YAML that it starts from is trained for hours
    folder = train_settings(with_base_model(settings, file)).folder
    log_line(f"the model: {folder / 'model'}   the report: {folder / 'report.html'}")


def initialize_from_argv(argv: list[str]) -> list[str]:
    """Joins the other processes if `--distributed` is given; returns the other arguments."""
    how = [values for key, values in arguments(argv) if key == "distributed"]
    if not how:
        return argv
    if len(how) > 1 or len(how[0]) != 1:
        raise UserError(f"--distributed: {distributed.HOW}")
    distributed.initialize(how[0][0])
    at = next(i for i, a in enumerate(argv) if a.partition("=")[0] == "--distributed")
    return argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]
