"""A run -> the same on devices: everything done once before the first step."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import evaluation, optim, reference, sharding
from dpo_jax.config.schema import Config
from dpo_jax.data import order, pack
from dpo_jax.data.table import Table
from dpo_jax.evaluation import Evaluator
from dpo_jax.logprobs import batch_logps
from dpo_jax.records import Batch, Tokens, TrainState
from dpo_jax.training.abstract import microbatch_tokens
from dpo_jax.training.run import PolicyShardings, Run, total_steps
from dpo_jax.training.shard import gather_on_use, policy_shardings, state_shardings
from dpo_jax.training.train_step import compiled_step, hparams, loss_with

log = logging.getLogger(__name__)


class FrozenReference(NamedTuple):
    """The reference on the devices; the defaults are those of a loss without one.

    Attributes:
      ref_logps: float32[N, P, 2], of the training table, if computed ahead.
      fill: (state, batch, count) -> the batch with `ref_logps`, if computed just in time.
      eval_ref_logps: float32[N, P, 2], of the held-out table.
      moving: the parameters at the start of a reference that moves; () for a frozen one.
      recompute: state -> `eval_ref_logps` of a reference that has moved.
      samples: the reference's completions of the sample prompts.
      log_ratios: (state, completions of the KL prompts) -> log pi - log ref of each, float32[n].
    """

    ref_logps: np.ndarray | None = None
    fill: Callable[[TrainState, Batch, int], Batch] | None = None
    eval_ref_logps: np.ndarray | None = None
    moving: Any = ()
    recompute: Callable[[TrainState], np.ndarray] | None = None
    samples: list[str] | None = None
    log_ratios: Callable[[TrainState, Sequence[np.ndarray]], np.ndarray] | None = None


class PreparedRun(NamedTuple):
    """A run on its devices: shardings, layout, compiled functions, reference log-probs.

    Runs that differ in their hyper-parameters only can share it; see `with_hparams`.

    Attributes:
      shardings: of the policy.
      layout: of a batch.
      put: moves a Batch to the devices.
      step: the compiled train step, `(state, batch, count, base, hparams) -> (state, metrics)`.
      base: the parameters below the adapters, on the devices.
      abstract_state: shapes, dtypes and shardings of the state.
      reference: the reference.
      evaluator: of the held-out table.
      hparams: traced hyper-parameters of this run.
      total_steps: updates of the run.
      order: of the training table.
    """

    shardings: PolicyShardings
    layout: pack.Layout
    put: Callable
    step: Callable
    base: Any
    abstract_state: TrainState
    reference: FrozenReference
    evaluator: Evaluator
    hparams: Any
    total_steps: int
    order: order.Order


def with_hparams(prepared: PreparedRun, config: Config) -> PreparedRun:
    """Returns a prepared run for a config that differs in its `hparams` only; compiles nothing."""
    own = hparams(config)
    return prepared._replace(hparams=own, evaluator=prepared.evaluator._replace(hparams=own))


def prepare_run(run: Run) -> PreparedRun:
    """Returns a run on its devices: layouts, reference log-probs, functions ready to compile."""
    config = run.config
    mesh = sharding.make_mesh(*config.mesh.sizes)
    layout = _layout(config, mesh, run.train_table)
    eval_layout = layout if _fits(run.eval_table, layout) else _layout(config, mesh, run.eval_table)
    put, tx, own = partial(sharding.put_batch, mesh), optim.build(**config.optim), hparams(config)
    trained, abstract = state_shardings(run, tx, mesh)
    shardings = policy_shardings(run, mesh, trained)
    base = None if shardings.base is None else sharding.put_params(run.base, shardings.base)
    policy_logps = evaluation.jit_logps(shardings.model, run.loss, shardings.collectives, shardings.policy)
    frozen = FrozenReference()
    if run.load_reference is not None:
        frozen = _reference(run, shardings, base, (layout, eval_layout), put, policy_logps)
    eval_step = evaluation.jit_eval_step(policy_logps, partial(loss_with, config))
    evaluator = Evaluator(
        eval_step, run.eval_table, frozen.eval_ref_logps, eval_layout, config.batch_size, put, own
    )  # fmt: skip
    steps = total_steps(config, len(run.train_table))
    log.info(
        f"{steps} steps of {config.batch_size} comparisons; microbatches of {layout.rows} rows x {layout.length} "
        f"tokens on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    step, rows = (
        compiled_step(run, shardings, abstract),
        order.bind_order(config.data.order, run.train_table.prompts, config.seed),
    )
    return PreparedRun(shardings, layout, put, step, base, abstract, frozen, evaluator, own, steps, rows)


def _layout(config: Config, mesh: Any, table: Table, own_sizes: bool = True) -> pack.Layout:
    """Returns the layout of a table's batches, with the rows that this process builds.

    Its sizes may be those of the config; without `own_sizes` they are chosen for the table.
    """
    layout = pack.choose_layout(
        table,
        max_length=config.data.max_length,
        batch_size=config.batch_size,
        length=config.data.row_length if own_sizes else None,
        rows=config.data.rows if own_sizes else None,
        multiple_of=sharding.row_devices(mesh),
        parts=sharding.token_devices(mesh),
        most_tokens=microbatch_tokens(jax.default_backend()),
    )
    blocks, size = sharding.local_row_blocks(mesh), layout.rows // sharding.row_devices(mesh)
    return layout._replace(own=(blocks.start * size, blocks.stop * size))


def _fits(table: Table, layout: pack.Layout) -> bool:
    """Returns whether rows of a layout hold a table; the reference's program is then compiled once, for both tables."""
    return int(table.lengths().max()) <= layout.length and int(table.scored_lengths.max()) <= layout.scored


def _placed_reference(run: Run, shardings: PolicyShardings, weights: Any, base: Any) -> tuple[Any, Any, Callable]:
    """Returns the weights of a reference on the devices, its parameters, and the function of its log-probs."""
    if run.lora is not None and weights is run.params:  # the base with the adapters that training starts from
        placed = sharding.put_params(weights, shardings.trained), base
        adapted = partial(_adapted_logps, shardings)
        return placed, shardings.policy(*placed), reference.make_ref_logps_fn(adapted, shardings.collectives)
    where = shardings.trained if shardings.base is None else shardings.base
    placed = base if weights is run.base else sharding.put_params(weights, where)
    collectives = sharding.mesh_collectives(shardings.mesh, where)
    logps = partial(batch_logps, gather_on_use(run.model, collectives, where))
    return placed, placed, reference.make_ref_logps_fn(logps, collectives)


def _reference(
    run: Run, shardings: PolicyShardings, base: Any, layouts: tuple[pack.Layout, pack.Layout], put: Callable,
    policy_logps: Callable,
) -> FrozenReference:  # fmt: skip
    """Returns the reference on the devices; the base of adapters is there already.

    Of a whole policy it is computed by `policy_logps`, which the evaluation compiles too, where only sums are needed.
    """
    assert run.load_reference is not None
    weights, name = run.load_reference()
    weights, params, ref_logps = _placed_reference(run, shardings, weights, base)
    cached = run.config.reference.mode == "cache"
    if cached and run.lora is None and not run.loss.confidence:
        ref_logps = evaluation.reference_by(policy_logps)
    cache = partial(_cached_ref_logps, run, ref_logps, weights, name, put)

    def fill(state: TrainState, batch: Batch, count: int) -> Batch:
        return batch._replace(ref_logps=ref_logps(state.reference or weights, batch, count))

    def recompute(state: TrainState) -> np.ndarray:
        return reference.table_ref_logps(
            ref_logps, state.reference, run.eval_table, layouts[1], run.config.batch_size, put
        )

    return FrozenReference(
        eval_ref_logps=cache(run.eval_table, layouts[1], "held-out"),
        ref_logps=cache(run.train_table, layouts[0], "training") if cached else None,
        fill=None if cached else fill,
        moving=weights if run.sync else (),
        recompute=recompute if run.sync else None,
        samples=run.complete(params).texts if run.complete and run.prompts else None,
        log_ratios=_log_ratios(run, shardings, base, ref_logps, weights, put) if run.kl_prompts else None,
    )


def _log_ratios(
    run: Run, shardings: PolicyShardings, base: Any, ref_logps: Callable, weights: Any, put: Callable
) -> Callable[[TrainState, Sequence[np.ndarray]], np.ndarray]:
    """Returns `FrozenReference.log_ratios`; its layout fits all completions, so that it compiles once."""
    config = dataclasses.replace(run.config, batch_size=len(run.kl_prompts))
    longest = [np.zeros(config.samples.max_new_tokens, np.int32)] * len(run.kl_prompts)
    layout = _layout(config, shardings.mesh, _completed(run.kl_prompts, longest), own_sizes=False)
    policy_logps = ref_logps
    if base is not None and not isinstance(weights, tuple):  # the reference has no adapters
        policy_logps = reference.make_ref_logps_fn(partial(_adapted_logps, shardings), shardings.collectives)

    def log_ratios(state: TrainState, completions: Sequence[np.ndarray]) -> np.ndarray:
        table, policy = _completed(run.kl_prompts, completions), state.params if base is None else (state.params, base)
        logps = partial(reference.table_ref_logps, table=table, layout=layout, batch_size=len(table), put=put)
        return (logps(policy_logps, policy) - logps(ref_logps, state.reference or weights))[:, 0, 0]

    return log_ratios


def _completed(prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> Table:
    return Table.of(Tokens(prompt, (ids,)) for prompt, ids in zip(prompts, completions, strict=True))


def _adapted_logps(shardings: PolicyShardings, pair: tuple[Any, Any], batch: Batch) -> Any:
    """Returns the log-probs of a microbatch under a pair (adapters, base)."""
    return batch_logps(shardings.model, shardings.policy(*pair), batch)


def _cached_ref_logps(
    run: Run, ref_logps: Callable, weights: Any, name: str, put: Callable, table: Table, layout: Any, split: str
) -> np.ndarray:
    """Returns the reference log-probs of a table, from the cache or from one pass over it."""
    start = time.perf_counter()
    compute = partial(reference.table_ref_logps, ref_logps, weights, table, layout, run.config.batch_size, put)
    key = reference.ref_logps_key(table, name, run.config.model.compute, run.model.attention)
    values, hit = reference.cached_array(run.cache / "reference", key, compute, (len(table), table.responses, 2))
    how = "from the cache" if hit else f"computed in {time.perf_counter() - start:.1f} s"
    log.info(f"reference log-probs of the {split} data: {how}")
    return values
