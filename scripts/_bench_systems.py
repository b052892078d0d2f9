"""The systems that scripts/bench times: each a process that takes a step when a line arrives and answers with a line.

Run by scripts/bench as `_bench_systems.py INDEX FOLDER STEPS BATCH_SIZE`; the folder holds `model/` and a token table.
"""

import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BETA, LEARNING_RATE, CLIP, MAX_LENGTH = 0.1, 1e-6, 1.0, 512


class System(NamedTuple):
    """One way to train: a row of the table."""

    name: str
    dtype: str
    checkpointing: bool = False


SYSTEMS = (
    System("dpo_jax", "float32"),
    System("TRL", "float32"),
    System("dpo_jax", "bfloat16"),
    System("TRL", "bfloat16"),
    System("TRL defaults", "bfloat16", checkpointing=True),
)


class Step(NamedTuple):
    """One measured step: its loss, wall and processor seconds, peak memory in MB so far, cores that others used."""

    loss: float
    seconds: float
    cpu: float
    peak_mb: float
    foreign: float = 0.0


def order(rows: int, steps: int, batch_size: int) -> np.ndarray:
    """Returns the rows of every step, int[steps, batch_size]."""
    return np.random.default_rng(0).permutation(rows)[: steps * batch_size].reshape(steps, batch_size)


class Pace:
    """The worker's end of the conversation."""

    def __init__(self):
        # Libraries print to standard output; it becomes standard error, and the answers go where it led before.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start: tuple[float, float] | None = None

    def wait(self) -> None:
        """Waits for the word to go; at the end of the conversation the process ends."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._start = time.perf_counter(), time.process_time()

    def done(self, loss: float, peak_mb: float) -> None:
        """Reports the step, if one was under way."""
        if self._start is not None:
            spent = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
            print(json.dumps(Step(loss, *spent, peak_mb)), file=self._answers, flush=True)


def peak_rss_mb() -> float:
    """Returns the greatest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_ours(folder: Path, system: System, steps: int, batch_size: int, pace: Pace) -> None:
    """Trains with dpo_jax, the pieces that its loop is made of, the reference filled in just in time."""
    import jax

    from dpo_jax import losses, optim, reference
    from dpo_jax.data import pack
    from dpo_jax.data.table import Table
    from dpo_jax.logprobs import batch_logps
    from dpo_jax.models import build, hf
    from dpo_jax.step import init_state, make_train_step

    architecture, _, params = hf.load(folder / "model")
    logps = partial(batch_logps, build(architecture, compute=system.dtype))
    tx = optim.build("adamw", learning_rate=LEARNING_RATE, warmup_steps=0, max_grad_norm=CLIP)
    step = jax.jit(make_train_step(logps, losses.build("dpo", beta=BETA), tx), donate_argnums=0)
    column, frozen = reference.make_column(logps), jax.device_put(params)
    state = jax.jit(lambda p: init_state(jax.tree.map(lambda x: x + 0, p), tx))(frozen)  # owns what it donates
    table = Table.open(folder)
    shape = pack.choose(table, max_length=MAX_LENGTH, batch_size=batch_size)
    del params
    for rows in order(len(table), steps, batch_size):
        pace.wait()
        batch, count, _ = pack.build(table, rows, shape)
        batch = jax.device_put(batch)
        batch = batch._replace(ref_logps=column(frozen, batch, count))
        state, metrics = step(state, batch, np.int32(count))
        loss = float(metrics["loss"])
        on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20
        pace.done(loss, on_device or peak_rss_mb())


def measure_trl(folder: Path, system: System, steps: int, batch_size: int, pace: Pace) -> None:
    """Trains with TRL's own trainer and loop; the reference model is in the step, as by default."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from dpo_jax.data.table import Table

    table = Table.open(folder)
    chosen = [table[int(i)] for i in order(len(table), steps, batch_size).ravel()]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, (ids.tolist() for ids in (t.prompt, *t.responses)), strict=True)) for t in chosen]

    class Trainer(DPOTrainer):
        """TRL's, on token ids that are there already, in the order given; it tells the loss of a step."""

        loss = 0.0

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            self.loss = (found[0] if isinstance(found, tuple) else found).detach()
            return found

    def report() -> None:
        on_device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        pace.done(float(trainer.loss), on_device or peak_rss_mb())

    class Pacing(TrainerCallback):
        """A step lasts from the word to go until the loop begins the next one."""

        def on_step_begin(self, *_, **__):
            report()
            pace.wait()

        def on_train_end(self, *_, **__):
            report()

    config = DPOConfig(**trl_options(folder, system, batch_size), use_cpu=not torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = Trainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(Pacing())
    trainer.train()


def trl_options(folder: Path, system: System, batch_size: int) -> dict[str, Any]:
    """Returns the settings of TRL that make its work ours; all others keep their defaults."""
    return {
        "output_dir": str(folder / "trl"),
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "max_length": MAX_LENGTH,
        "precompute_ref_log_probs": False,
        "bf16": system.dtype == "bfloat16",
        "gradient_checkpointing": system.checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    index, folder, steps, batch_size = sys.argv[1:]
    work = measure_ours if SYSTEMS[int(index)].name == "dpo_jax" else measure_trl
    work(Path(folder), SYSTEMS[int(index)], int(steps), int(batch_size), Pace())
