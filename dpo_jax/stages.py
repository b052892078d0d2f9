"""A YAML trained from end to end, and before it the YAML that it starts from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dpo_jax import assemble, config, folders, loop, processes, report
from dpo_jax.config import Config
from dpo_jax.data_commands import say


def trained(file: str, argv: Sequence[str] = ()) -> Path:
    """Trains what a YAML and options say; returns the run folder, with its report."""
    parsed = config.parse(Config, file or None, argv, prog="dpo-jax train CONFIG.yaml", variants=folders.VARIANTS)
    run = assemble.run_of(begun(assemble.named(parsed, file), file), say)
    loop.train(run, say)
    if processes.first():
        report.write([run.folder], run.folder / "report.html")
    return run.folder


def begun(settings: Config, file: str) -> Config:
    """Returns the config with a folder for `model.path`: where a YAML stands there, it is trained first if need be."""
    if not settings.model.path.endswith((".yaml", ".yml")):
        return settings
    say(f"{file} starts from {settings.model.path}")
    stage = trained(settings.model.path)
    say(f"now {file}")
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=str(stage)))
