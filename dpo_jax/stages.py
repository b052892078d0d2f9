"""A YAML trained from end to end, and before it the YAML that it starts from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dpo_jax import assemble, config, keys, loop, processes, report
from dpo_jax.config import Config
from dpo_jax.records import UserError
from dpo_jax.terminal import say


def trained(file: str, argv: Sequence[str] = (), later: tuple[str, ...] = ()) -> Path:
    """Trains what a YAML and options say; returns the run folder, with its report.

    `later` are the YAMLs that start from it.
    """
    settings = assemble.named(config.parse(Config, file or None, argv, prog="dpo-jax train CONFIG.yaml"), file)
    assemble.check(settings)  # before the YAML that it starts from is trained for hours
    run = assemble.run_of(begun(settings, file, later), say)
    loop.train(run, say)
    if processes.first():
        report.write([run.folder], run.folder / "report.html")
    return run.folder


def begun(settings: Config, file: str, later: tuple[str, ...] = ()) -> Config:
    """Returns the config with a folder for `model.path`: where a YAML stands there, it is trained first if need be.

    Raises:
      UserError: as `trained`; a YAML that starts from itself.
    """
    if not settings.model.path.endswith((".yaml", ".yml")):
        return settings
    say(f"{file} starts from {settings.model.path}")
    if settings.model.path in (file, *later):
        raise UserError(f"{settings.model.path}: starts from itself; model.path must lead to a model or a config.json")
    stage = trained(settings.model.path, later=(file, *later))
    say(f"now {file}")
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=str(stage)))


def joined(argv: list[str]) -> list[str]:
    """Makes this process one of several if `--distributed` says so; returns the other arguments."""
    how = [values for key, values in keys.arguments(argv) if key == "distributed"]
    if not how:
        return argv
    if len(how) > 1 or len(how[0]) != 1:
        raise UserError(f"--distributed: {processes.HOW}")
    processes.join(how[0][0])
    at = next(i for i, a in enumerate(argv) if a.partition("=")[0] == "--distributed")
    return argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]
