"""`dpo-jax train`: SFT, DPO or any loss."""

from dpo_jax.stages import joined, trained
from dpo_jax.terminal import leading, say


def train_command(argv: list[str]) -> None:
    """`dpo-jax train CONFIG.yaml [--key.path value ...] [--distributed auto|HOST:PORT,PROCESSES,INDEX]`."""
    (file,), rest = leading(argv, "train", "CONFIG.yaml")
    rest = joined(rest)
    folder = trained(file, rest)
    say(f"the model: {folder / 'model'}   the report: {folder / 'report.html'}")
