"""A YAML trained from end to end, and before it the YAML that it starts from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dpo_jax import distributed
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.pages.run import write_report
from dpo_jax.training import loop, setup


def train_config(file: str, argv: Sequence[str] = (), later: tuple[str, ...] = ()) -> Path:
    """Trains what a YAML and options say; returns the run folder, with its report.

    `later` are the YAMLs that start from it.
    """
    settings = setup.with_run_folder(parse_config(Config, file or None, argv, prog="dpo-jax train CONFIG.yaml"), file)
    setup.check_config(settings)  # before the YAML that it starts from is trained for hours
    run = setup.setup_run(train_base_model(settings, file, later), log_line)
    loop.train_run(run, log_line)
    if distributed.is_primary():
        write_report([run.folder], run.folder / "report.html")
    return run.folder


def train_base_model(settings: Config, file: str, later: tuple[str, ...] = ()) -> Config:
    """Returns the config with a folder for `model.path`: where a YAML stands there, it is trained first if need be.

    Raises:
      UserError: as `trained`; a YAML that starts from itself.
    """
    if not settings.model.path.endswith((".yaml", ".yml")):
        return settings
    log_line(f"{file} starts from {settings.model.path}")
    if settings.model.path in (file, *later):
        raise UserError(f"{settings.model.path}: starts from itself; model.path must lead to a model or a config.json")
    stage = train_config(settings.model.path, later=(file, *later))
    log_line(f"now {file}")
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=str(stage)))


def initialize_from_argv(argv: list[str]) -> list[str]:
    """Makes this process one of several if `--distributed` says so; returns the other arguments."""
    how = [values for key, values in arguments(argv) if key == "distributed"]
    if not how:
        return argv
    if len(how) > 1 or len(how[0]) != 1:
        raise UserError(f"--distributed: {distributed.HOW}")
    distributed.initialize(how[0][0])
    at = next(i for i, a in enumerate(argv) if a.partition("=")[0] == "--distributed")
    return argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]


def train_command(argv: list[str]) -> None:
    """`dpo-jax train CONFIG.yaml [--key.path value ...] [--distributed auto|HOST:PORT,PROCESSES,INDEX]`."""
    (file,), rest = leading_arguments(argv, "train", "CONFIG.yaml")
    rest = initialize_from_argv(rest)
    folder = train_config(file, rest)
    log_line(f"the model: {folder / 'model'}   the report: {folder / 'report.html'}")
