"""Selects the attention backend of a run: a kernel only if it matches chunks on this device."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import distributed, sharding
from dpo_jax.errors import UserError
from dpo_jax.models.alibi import bias_dims
from dpo_jax.models.architecture import Architecture, HeadSizes
from dpo_jax.models.attention import CHUNKS, Attend, RowMask, Scoring, packed_attention
from dpo_jax.models.decoder_layer import scoring_of
from dpo_jax.models.interface import Model
from dpo_jax.models.kernels import KERNELS
from dpo_jax.records import Array

log = logging.getLogger(__name__)

# Allowed error against exact attention, relative to the largest value: MARGIN times the error of our own chunks in the
# same dtype, or LEAST.
MARGIN, LEAST = 4.0, 1e-5
OUTPUTS = ("the output", *(f"the gradient of {name}" for name in ("q", "k", "v", "sinks")))
WINDOW = 40
LONGEST = 200  # characters of a compiler's message
# Two rows of (segment_ids, branch_ids, tokens): prompts with one to three responses, some across blocks, and padding.
CASE = (
    ((1, 0, 100), (1, 1, 60), (1, 2, 50), (2, 0, 30), (2, 1, 20), (2, 2, 7), (2, 3, 9), (0, 0, 24)),
    ((1, 0, 150), (1, 1, 110), (2, 0, 1), (2, 1, 20), (2, 2, 15), (0, 0, 4)),
)


def with_attention(
    model: Model, attention: str, compute: str, mesh: jax.sharding.Mesh | None = None
) -> tuple[Model, str]:
    """Returns the model with the configured attention backend, and a log message ('' if none).

    `auto` tries those of this device whose memory is linear in a row's tokens, in the order of `KERNELS`, and logs each
    refusal. Call it from all processes; they get the same model.

    Args:
      model: from `build_model`.
      attention: `model.attention` of the config.
      compute: dtype of activations.
      mesh: the device mesh; None for one device.

    Raises:
      UserError: the named kernel is not available on this device, or does not match chunks; or devices share the
        tokens of a row and the model's layers do not allow it.
    """
    refuse_split(model.architecture, mesh)
    names = _candidates(attention, jax.default_backend())
    for name in names:
        problem = _split_refusal(name, mesh) or kernel_refusal(name, model.architecture, compute, _head_devices(mesh))
        if distributed.all_agree(not problem):
            notes = f"attention: {name}, matches {CHUNKS} on this device", KERNELS[name].note
            return _with_kernel(model, name, mesh), "; ".join(filter(None, notes))
        problem = problem or "failed in another process"
        if attention != "auto":
            raise UserError(f"model.attention: {name} {problem}; set {CHUNKS} or auto")
        log.info(f"attention: {name} {problem}")
    return model, f"attention: {CHUNKS}, because nothing else can be used here" if names else ""


def planned_attention(
    model: Model,
    attention: str,
    compute: str,
    mesh: jax.sharding.Mesh,
    platform: str,
    refused: Mapping[str, str] | None = None,
) -> tuple[Model, str]:
    """Returns what `with_attention` would on a device that is not here, if the kernel passes its test there.

    Args:
      model, attention, compute, mesh: as there.
      platform: of the device, "tpu" or "gpu".
      refused: kernels that the device's compiler refuses, and why.

    Raises:
      UserError: the named kernel cannot be used there.
    """
    refused = refused or {}
    for name in _candidates(attention, platform):
        problem = _unsupported(name, model.architecture, compute, _head_devices(mesh), platform)
        problem = _split_refusal(name, mesh) or problem or refused.get(name, "")
        if not problem:
            note = f"attention: {name}, if it passes its test on the device when the run starts"
            return _with_kernel(model, name, mesh), "; ".join((note, *(f"{n} {why}" for n, why in refused.items())))
        if attention != "auto":
            raise UserError(f"model.attention: {name} {problem}; set {CHUNKS} or auto")
    return model, "; ".join((f"attention: {CHUNKS}", *(f"{n} {why}" for n, why in refused.items())))


def attempt(use: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Returns what a function that uses a kernel returns, or why it fails: a kernel may raise anything."""
    try:
        return use(), None
    except Exception as e:
        return None, e


def in_short(error: Exception) -> str:
    """Returns the kind of an error and the first line of its message, or what of it is read at a glance."""
    line = (str(error).strip() or "no reason").splitlines()[0]
    return f"{type(error).__name__}: {line if len(line) <= LONGEST else line[:LONGEST] + '...'}"


def _candidates(attention: str, platform: str) -> list[str]:
    """Returns the kernels to try, in order: the named one, or with auto those of the platform; none for chunks."""
    if attention == "auto":
        return [name for name, kernel in KERNELS.items() if platform in kernel.auto]
    return [] if attention == CHUNKS else [attention]


def _with_kernel(model: Model, name: str, mesh: jax.sharding.Mesh | None) -> Model:
    attend = KERNELS[name].attend if mesh is None else sharding.shard_heads(mesh, KERNELS[name].attend)
    return model._replace(hidden=partial(model.hidden, attend=attend), attention=name)


def _head_devices(mesh: jax.sharding.Mesh | None) -> int:
    return 1 if mesh is None else sharding.head_devices(mesh)


def refuse_split(a: Architecture, mesh: jax.sharding.Mesh | None) -> None:
    """Refuses a mesh that splits the rows of linear attention.

    Raises:
      UserError: it does.
    """
    if a.delta is not None and mesh is not None and sharding.token_devices(mesh) > 1:
        why = "has linear attention, whose state goes from token to token of a row"
        raise UserError(f"mesh.sequence: a {a.family} {why}; set it to 1")


def _split_refusal(name: str, mesh: jax.sharding.Mesh | None) -> str:
    """Returns why a kernel cannot be used on a mesh that splits rows; "" if it can."""
    split = mesh is not None and sharding.token_devices(mesh) > 1
    return "needs whole rows (mesh.sequence 1)" if split and KERNELS[name].pair_mask else ""


def _unsupported(name: str, a: Architecture, compute: str, devices: int, platform: str) -> str:
    """Returns why a kernel cannot be used for a model on a platform, without trying; "" if that is not known."""
    kernel = KERNELS[name]
    if platform not in kernel.platforms:
        return f"runs on a {' or '.join(kernel.platforms)}, this device is a {platform}"
    if compute not in kernel.dtypes:
        return f"needs model.compute {' or '.join(kernel.dtypes)}, got {compute}"
    if a.sinks and not kernel.sinks:
        return "cannot add attention sinks, which this model has"
    for heads in a.all_heads:
        if heads.kv_heads % devices:
            return f"cannot shard {heads.kv_heads} key-value heads evenly over {devices} devices (mesh.tensor)"
    return ""


def kernel_refusal(name: str, a: Architecture, compute: str, devices: int = 1) -> str:
    """Returns why a kernel cannot be used for a model on this device; "" if it can."""
    problem = _unsupported(name, a, compute, devices, jax.default_backend())
    return problem or kernel_mismatch(KERNELS[name].attend, a, compute)


def kernel_mismatch(attend: Attend, a: Architecture, compute: str) -> str:
    """Returns why attention does not match chunks on this device for a model's heads; "" if it does."""
    for heads, window in itertools.product(a.all_heads, (None, WINDOW) if any(a.windows) else (None,)):
        case, errors = attention_case(a, compute, window, heads), jax.jit(partial(kernel_errors, attend, scoring_of(a)))
        found, error = attempt(lambda case=case, errors=errors: np.asarray(errors(*case)))
        if error is not None:
            return f"fails on this device ({in_short(error)})"
        for what, (far, near) in zip(OUTPUTS[: 4 + a.sinks], found, strict=True):
            limit = max(MARGIN * near, LEAST)
            if far > limit:
                return f"differs from {CHUNKS} on this device (relative error of {what} {far:.1e}, allowed {limit:.1e})"
    return ""


def kernel_errors(attend: Attend, scoring: Scoring, inputs: Sequence[Array], rows: RowMask) -> Array:
    """Returns the errors of attention and of its gradients, relative to the largest value: float32[4, 2] or [5, 2].

    Columns are the errors of `attend` and of chunks, against float32 attention without chunks; rows are those of
    `OUTPUTS`. Pure; for `jax.jit`.

    Args:
      attend: same interface as `packed_attention`.
      scoring: how queries score keys.
      inputs: q, k, v, a cotangent of the output, and sinks if there are any.
      rows: mask of the packed rows.
    """
    unchunked: Attend = partial(packed_attention, chunk=rows.queries.index.shape[1])
    with jax.default_matmul_precision("highest"):
        exact = _with_gradients(unchunked, scoring, [x.astype(jnp.float32) for x in inputs], rows)
    found, chunks = (_with_gradients(f, scoring, inputs, rows) for f in (attend, packed_attention))

    def error(x: Array, y: Array) -> Array:
        # The maximum may skip NaN, and that of nothing but NaN be -inf.
        far = jnp.abs(x.astype(jnp.float32) - y)
        return jnp.where(jnp.isnan(far), jnp.inf, far).max() / jnp.abs(y).max()

    return jnp.array([(error(x, z), error(y, z)) for x, y, z in zip(found, chunks, exact, strict=True)])


def _with_gradients(attend: Attend, scoring: Scoring, inputs: Sequence[Array], rows: RowMask) -> tuple[Array, ...]:
    def run(q: Array, k: Array, v: Array, *sinks: Array) -> Array:
        return attend(q, k, v, rows, scoring, *sinks)

    q, k, v, cotangent, *sinks = inputs
    out, back = jax.vjp(run, q, k, v, *sinks)
    return out, *back(cotangent)


def attention_case(
    a: Architecture, compute: str, window: int | None = None, of: HeadSizes | None = None
) -> tuple[list[Array], RowMask]:
    """Returns `CASE` for heads of a model: q, k, v, a cotangent and perhaps sinks, with at most two key-value heads;
    the mask. They are by default those of its first layer.

    Scores, and those of sinks, have standard deviation 2; scores a fifth of the cap if that is more. Positions of every
    response continue those of the prompt.
    """
    of = of or a.all_heads[0]
    scoring, rng, kv_heads = scoring_of(a), np.random.default_rng(0), min(2, of.kv_heads)
    parts: tuple[list[list[int]], ...] = ([], [], [])
    for row in CASE:
        prompt = {g: n for g, b, n in row if b == 0}
        tokens = [(g, b, i + (prompt[g] if b else 0)) for g, b, n in row for i in range(n)]
        for part, values in zip(parts, zip(*tokens, strict=True), strict=True):
            part.append(list(values))
    segment_ids, branch_ids, positions = (np.array(part, np.int32) for part in parts)
    heads = [kv_heads * a.heads // of.kv_heads, kv_heads, kv_heads, kv_heads * a.heads // of.kv_heads]
    dim = of.head_dim + bias_dims(a)
    q, *rest = (rng.standard_normal((*segment_ids.shape, n, dim), np.float32) for n in heads)
    q *= max(2.0, (scoring.cap or 0.0) / 5) / (scoring.scale * dim**0.5)
    rows = (
        RowMask.of(segment_ids, branch_ids)
        if window is None
        else RowMask.of(segment_ids, branch_ids, positions, np.int32(window))
    )
    sinks = [jnp.asarray(rng.normal(scale=2.0, size=heads[0]), jnp.float32)] if a.sinks else []
    return [*(jnp.asarray(x, compute) for x in (q, *rest)), *sinks], rows
