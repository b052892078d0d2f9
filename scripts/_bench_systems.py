"""The systems that scripts/bench times: each a process that takes a step when a line arrives and answers with a line.

Run by scripts/bench as `_bench_systems.py INDEX FOLDER STEPS BATCH_SIZE`; the folder holds `model/` and a token table.
"""

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _bench_levers as levers
import numpy as np
from _bench_list import BETA, CLIP, LEARNING_RATE, LEVERED, MAX_LENGTH, SYSTEMS, Step, System, order

from dpo_jax.data.table import Table


class Pace:
    """The worker's end of the conversation."""

    def __init__(self):
        # Libraries print to standard output; it becomes standard error, and the answers go where it led before.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start: tuple[float, float] | None = None
        self.attention = ""  # the backend of attention, as steps report it

    def wait(self) -> None:
        """Waits for the word to go; at the end of the conversation the process ends."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._start = time.perf_counter(), time.process_time()

    def done(self, loss: float, peak_mb: float) -> None:
        """Reports the step, if one was under way."""
        if self._start is not None:
            spent = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
            print(json.dumps(Step(loss, *spent, peak_mb, self.attention)), file=self._answers, flush=True)


def peak_rss_mb() -> float:
    """Returns the greatest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage there counts what the parent had when it started this process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Ours(NamedTuple):
    """dpo_jax's pieces of a step: the jitted step, its state, the jitted reference log-probs, the reference's params,
    rows -> their batch and its number of microbatches, the rows of every step, and the backend of attention.
    """

    step: Any
    state: Any
    column: Any
    frozen: Any
    batch_of: Callable[[np.ndarray], tuple[Any, int]]
    batches: np.ndarray
    attention: str


def build_ours(folder: Path, system: System, steps: int, batch_size: int) -> Ours:
    """Returns the pieces that the package's loop is made of."""
    import jax

    from dpo_jax import losses, optim, reference
    from dpo_jax.models.huggingface.folder import load_folder
    from dpo_jax.models.model import build_model
    from dpo_jax.step import init_state, make_train_step
    from dpo_jax.training.attention_check import with_attention

    architecture, _, params = load_folder(folder / "model")
    remat = "full" if system.without == "kept activations" else "none"
    model, _ = with_attention(build_model(architecture, compute=system.dtype, remat=remat), "auto", system.dtype)
    objective = losses.build({"name": "dpo", "beta": BETA})
    logps = levers.logps_of(system.without, model)
    tx = optim.build("adamw", learning_rate=LEARNING_RATE, warmup_steps=0, max_grad_norm=CLIP)
    step = jax.jit(make_train_step(model, objective, tx, logps=logps), donate_argnums=0)
    column, frozen = reference.make_ref_logps_fn(logps), jax.device_put(params)
    own = jax.jit(lambda p: init_state(jax.tree.map(lambda x: x + 0, p), tx, objective))  # a state owns what it donates
    table = Table.open(folder)
    shape = levers.shape_of(system.without, table, MAX_LENGTH, batch_size)

    def batch_of(rows: np.ndarray) -> tuple[Any, int]:
        batch, count = levers.build(system.without, table, rows, shape)
        return jax.device_put(batch), count

    return Ours(step, own(frozen), column, frozen, batch_of, order(table, steps, batch_size), model.attention)


def measure_ours(folder: Path, system: System, steps: int, batch_size: int, pace: Pace) -> None:
    """Trains with dpo_jax, the reference filled in just in time or before."""
    import jax

    ours = build_ours(folder, system, steps, batch_size)
    pace.attention = ours.attention
    state, frozen, known = ours.state, ours.frozen, []
    ours = ours._replace(state=None, frozen=None)  # the first step donates the state
    if system.precomputed:
        known = [np.asarray(ours.column(frozen, *ours.batch_of(rows))) for rows in ours.batches]
        frozen = None  # as in a run, which keeps the reference no longer than it is needed
    for index, rows in enumerate(ours.batches):
        pace.wait()
        batch, count = ours.batch_of(rows)
        batch = batch._replace(ref_logps=known[index] if known else ours.column(frozen, batch, count))
        state, metrics = ours.step(state, batch, np.int32(count))
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

    table = Table.open(folder)
    chosen = [table[int(i)] for i in order(table, steps, batch_size, system.grouped).ravel()]
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
    attention = trl_attention(system, torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation=attention)
    pace.attention = model.config._attn_implementation or ""  # noqa: SLF001 - transformers tells it nowhere else
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = Trainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(Pacing())
    trainer.train()


def measure_original(folder: Path, system: System, steps: int, batch_size: int, pace: Pace) -> None:
    """Trains as the original code does: chosen and rejected in one padded batch, and all its logits in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: list[torch.nn.Module] = [
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2)
    ]
    policy, frozen = (model.to(device) for model in models)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    table = Table.open(folder)

    def logps(model: Any, ids: Any, seen: Any, scored: Any) -> Any:
        logits = model(ids, attention_mask=seen).logits.float()[:, :-1].log_softmax(-1)
        return (logits.gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(1)

    for rows in order(table, steps, batch_size):
        pace.wait()
        batch = [torch.from_numpy(x).to(device) for x in padded([table[int(i)] for i in rows])]
        with torch.no_grad():
            reference = logps(frozen, *batch)
        chosen, rejected = (logps(policy, *batch) - reference).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        on_device = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
        pace.done(float(loss.detach()), on_device or peak_rss_mb())


def padded(comparisons: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, which are tokens and which are scored, [2B, T]: all the chosen, then all the rejected."""
    found = [np.concatenate([c.prompt, c.responses[p]]) for p in range(2) for c in comparisons]
    prompts = np.array([len(c.prompt) for _ in range(2) for c in comparisons])[:, None]
    lengths = np.array([len(ids) for ids in found])[:, None]
    ids = np.zeros((len(found), int(lengths.max())), np.int64)
    for row, one in zip(ids, found, strict=True):
        row[: len(one)] = one
    place = np.arange(ids.shape[1])[None]
    return ids, (place < lengths).astype(np.int64), (place < lengths) & (place >= prompts)


def trl_attention(system: System, cuda: bool) -> str | None:
    """Returns the attention of TRL's model; None for the default of transformers.

    TRL at its best has flash attention on a GPU if the package is installed. That takes 16-bit activations only.
    """
    if not cuda or system.name != "TRL best":
        return None
    flash = system.dtype == "bfloat16" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def trl_options(folder: Path, system: System, batch_size: int) -> dict[str, Any]:
    """Returns the settings of TRL that make its work ours; all others keep their defaults.

    `padding_free` is not among them: TRL 1.16 turns it off with a warning.
    """
    return {
        "output_dir": str(folder / "trl"),
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "max_length": MAX_LENGTH,
        "precompute_ref_log_probs": system.precomputed,
        "bf16": system.dtype == "bfloat16",
        "router_aux_loss_coef": 0.0,  # on by default for mixtures, and off in dpo_jax
        "gradient_checkpointing": system.checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    index, folder, steps, batch_size = sys.argv[1:]
    chosen = (*SYSTEMS, *LEVERED)[int(index)]
    work = {"dpo_jax": measure_ours, "TRL": measure_trl, "original": measure_original}[chosen.family]
    work(Path(folder), chosen, int(steps), int(batch_size), Pace())
