"""An attention kernel is used if it matches our own attention, and refused in one line if it differs or fails."""

import dataclasses
import json
import logging
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import PLAIN
from test_kernels import BY_XLA, INTERPRETED, LLAMA, PLAIN_MODEL

from dpo_jax import cli, reference, sharding
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.schema import ModelConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.experiments import setup
from dpo_jax.models.attention import packed_attention
from dpo_jax.models.blocks import block_attention
from dpo_jax.models.flash import flash_attention
from dpo_jax.models.kernels import KERNELS
from dpo_jax.models.model import build_model
from dpo_jax.training import attention_check
from dpo_jax.training.attention_check import attention_case, kernel_errors, kernel_refusal, with_attention
from dpo_jax.training.metrics_file import read_metrics

FLASH = partial(flash_attention, platform="tpu", interpret=True)
SAME = re.compile("loss|logps|grad_norm|margins|step")
MODEL = dataclasses.replace(PLAIN_MODEL, windows=(0, 16), score_cap=5.0)


def has(monkeypatch, attend, name="splash"):
    """Makes the kernel available on this device."""
    here = (jax.default_backend(),)
    monkeypatch.setitem(KERNELS, name, KERNELS[name]._replace(platforms=here, auto=here, attend=attend))


# Attention that is wrong in one way each.


def with_ids(rows, change):
    return rows._replace(queries=change(rows.queries), keys=change(rows.keys))


def _blind(q, k, v, rows, scoring):
    return packed_attention(q, k, v, with_ids(rows, lambda ids: ids._replace(branch_ids=ids.branch_ids * 0)), scoring)


def _neighbours(q, k, v, rows, scoring):
    rows = with_ids(rows, lambda ids: ids._replace(segment_ids=jnp.minimum(ids.segment_ids, 1)))
    return packed_attention(q, k, v, rows, scoring)


def _wide(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows if rows.window is None else rows._replace(window=rows.window + 1), scoring)


def _hot(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring._replace(scale=1.1 * scoring.scale))


def _uncapped(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring._replace(cap=None))


def _other_heads(q, k, v, rows, scoring):
    return packed_attention(q, k[:, :, ::-1], v[:, :, ::-1], rows, scoring)


def _untaught(q, k, v, rows, scoring):
    return packed_attention(q, jax.lax.stop_gradient(k), v, rows, scoring)


def _nan(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring) * jnp.nan  # and all gradients


def _nan_output(q, k, v, rows, scoring):
    return packed_attention(q, k, v, rows, scoring) + jnp.nan  # its gradients are right


class MosaicError(Exception):
    """As Pallas raises: derived from Exception only."""


def _fails(*_):
    raise MosaicError("no layout\nmore of it")


WRONG = [_blind, _neighbours, _wide, _hot, _uncapped, _other_heads, _untaught, _nan, _nan_output]


@pytest.mark.parametrize(("wrong", "compute"), [*((wrong, "bfloat16") for wrong in WRONG), (_wide, "float32")])
def test_a_wrong_kernel_is_refused(wrong, compute, monkeypatch):
    has(monkeypatch, wrong)
    assert kernel_refusal("splash", MODEL, compute).startswith(
        "differs from chunks on this device (relative error of the "
    )


@pytest.mark.parametrize(
    ("model", "compute"), [pytest.param(MODEL, "float32", marks=pytest.mark.slow), (PLAIN_MODEL, "bfloat16")]
)
def test_a_right_kernel_is_admitted(model, compute, monkeypatch):
    has(monkeypatch, INTERPRETED)
    assert kernel_refusal("splash", model, compute) == ""


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize(("model", "compute"), [(MODEL, "float32"), (MODEL, "bfloat16")])
def test_our_own_kernel_is_admitted(model, compute, platform, monkeypatch):
    has(monkeypatch, partial(flash_attention, platform=platform, interpret=True), "flash")
    assert kernel_refusal("flash", model, compute) == ""


@pytest.mark.slow
def test_the_error_of_chunks_is_that_of_bfloat16():
    """Exact attention and chunks differ by the rounding of bfloat16."""
    found = np.asarray(kernel_errors(packed_attention, PLAIN, *attention_case(PLAIN_MODEL, "bfloat16")))
    assert (found[:, 0] == found[:, 1]).all()
    assert (found > 1e-3).all()
    assert (found < 1e-2).all()


def test_a_kernel_of_another_platform_is_refused():
    here = jax.default_backend()
    other = "splash" if here == "gpu" else "cudnn"
    platform = " or ".join(KERNELS[other].platforms)
    assert kernel_refusal(other, PLAIN_MODEL, "bfloat16") == f"runs on a {platform}, this device is a {here}"


def test_an_error_of_a_kernel_is_one_line(monkeypatch):
    has(monkeypatch, _fails)
    assert kernel_refusal("splash", PLAIN_MODEL, "float32") == "fails on this device (MosaicError: no layout)"
    has(monkeypatch, BY_XLA, "cudnn")
    said = "fails on this device (NotImplementedError: cannot cap scores, which this model does)"
    assert kernel_refusal("cudnn", MODEL, "bfloat16") == said
    said = "needs model.compute bfloat16, got float32"
    assert kernel_refusal("cudnn", PLAIN_MODEL, "float32") == said


def test_heads_that_cannot_be_sharded_are_refused(monkeypatch):
    has(monkeypatch, packed_attention)
    said = "cannot shard 2 key-value heads evenly over 4 devices (mesh.tensor)"
    assert kernel_refusal("splash", PLAIN_MODEL, "float32", 4) == said
    with pytest.raises(UserError, match=re.escape(said)):
        choose("splash", sharding.make_mesh(1, 1, 4))


def choose(attention, mesh=None):
    return with_attention(build_model(PLAIN_MODEL), attention, "float32", mesh)


def test_a_cpu_uses_chunks():
    assert ModelConfig().attention == "auto"
    if jax.default_backend() == "cpu":
        model, said = choose("auto")
        assert (model.attention, said) == ("chunks", "")
        with pytest.raises(
            UserError, match=r"^model.attention: splash runs on a tpu, this device is a cpu; set chunks"
        ):
            choose("splash")


def test_auto_uses_the_devices_kernel_and_reports_it(monkeypatch):
    ran = []

    def attend(*args):
        ran.append(args[0].shape)
        return packed_attention(*args)

    has(monkeypatch, attend)
    model, said = choose("auto")
    assert (model.attention, said) == ("splash", "attention: splash, matches chunks on this device")
    ran.clear()
    row = jnp.ones((1, 4), jnp.int32)
    jax.eval_shape(lambda k: model.hidden(model.init(k), row, row, row, row), jax.random.key(0))
    assert set(ran) == {(1, 4, 4, 16)}
    ran.clear()
    model, said = choose("chunks")
    assert (model.attention, said, ran) == ("chunks", "", [])


def test_auto_logs_each_refusal_and_a_named_kernel_is_an_error(monkeypatch, caplog):
    has(monkeypatch, _fails)
    why = "splash fails on this device (MosaicError: no layout)"
    with caplog.at_level(logging.INFO):
        model, said = choose("auto")
    assert (model.attention, said) == ("chunks", "attention: chunks, because nothing else can be used here")
    assert [record.getMessage() for record in caplog.records] == [f"attention: {why}"]
    with pytest.raises(UserError, match=f"^{re.escape(f'model.attention: {why}; set chunks or auto')}$"):
        choose("splash")


def test_auto_tries_our_kernel_first_then_blocks_and_no_mask_of_pairs(monkeypatch, caplog):
    tried = {name: kernel.auto for name, kernel in KERNELS.items()}
    assert tried == {"flash": ("tpu", "gpu"), "blocks": ("tpu", "gpu"), "splash": (), "cudnn": ()}
    for name in ("flash", "blocks"):
        has(monkeypatch, packed_attention, name)
    assert choose("auto")[0].attention == "flash"
    has(monkeypatch, _nan, "flash")
    with caplog.at_level(logging.INFO):
        assert choose("auto")[0].attention == "blocks"
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("attention: flash differs from chunks on this device (relative error of the output inf, ")


def test_the_note_of_a_kernel_is_reported(monkeypatch):
    has(monkeypatch, packed_attention, "cudnn")
    monkeypatch.delitem(KERNELS, "splash")
    monkeypatch.setattr(attention_check, "kernel_refusal", lambda *_: "")
    assert choose("auto")[1] == f"attention: cudnn, matches chunks on this device; {KERNELS['cudnn'].note}"


def test_all_processes_fall_back_if_one_must(monkeypatch, caplog):
    has(monkeypatch, packed_attention)
    monkeypatch.setattr(attention_check, "kernel_refusal", lambda *_: "")
    monkeypatch.setattr(attention_check.distributed, "all_agree", lambda flag: False)
    with caplog.at_level(logging.INFO):
        assert choose("auto")[0].attention == "chunks"
    assert [record.getMessage() for record in caplog.records] == ["attention: splash failed in another process"]


def test_experiments_refuse_a_kernel():
    settings = FrontierConfig(reward="happy", model=ModelConfig(path="x", attention="cudnn"))
    with pytest.raises(UserError, match=r"model.attention: cudnn: experiments compute it by chunks"):
        setup.check_frontier(settings)


def test_cached_ref_logps_depend_on_the_kernel():
    table = SimpleNamespace(digest="d")
    keys = {reference.ref_logps_key(table, "w", "bfloat16", name) for name in ("chunks", "splash", "cudnn")}
    assert len(keys) == 3
    assert reference.ref_logps_key(table, "w", "bfloat16") in keys


# On a device that has one.


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_of_this_device(name, compute):
    kernel = KERNELS[name]
    if jax.default_backend() not in kernel.platforms:
        pytest.skip(f"no {' or '.join(kernel.platforms)} here, on which {name} would be compared with chunks")
    if compute not in kernel.dtypes:
        pytest.skip(f"{name} does not take {compute}")
    model = MODEL if name != "cudnn" else dataclasses.replace(MODEL, score_cap=None, head_dim=64)
    assert kernel_refusal(name, model, compute) == ""


@pytest.fixture
def trained(tmp_path):
    """(run folder, options) -> its metrics, except timings and, at the start, rounding noise."""
    (tmp_path / "c.yaml").write_text("{}")
    (tmp_path / "c.json").write_text(json.dumps(LLAMA | {"vocab_size": 256}))
    rows = [row for row, _ in zip(synthetic.read((), "train", 2), range(40), strict=False)]
    pairs = [{"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = {"model.config": tmp_path / "c.json", "model.tokenizer": "synthetic", "data.path": tmp_path / "pairs.jsonl"}
    given |= {
        "data.max_length": 96,
        "data.max_prompt_length": 32,
        "data.eval_fraction": 0.2,
        "samples.prompts": 0,
        "batch_size": 8,
    }
    given |= {"max_steps": 2, "optim.learning_rate": 1e-3, "optim.warmup_steps": 0}

    def train(folder, **options):
        every = given | {"run": folder} | {key.replace("_", ".", 1): value for key, value in options.items()}
        cli.run_command(["train", str(tmp_path / "c.yaml"), *(str(x) for k, v in every.items() for x in (f"--{k}", v))])
        return [{k: v for k, v in row.items() if SAME.search(k)} for row in read_metrics(folder / "metrics.jsonl")]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "name", "attend"),
    [
        ("tensor", "splash", INTERPRETED),
        pytest.param("fsdp", "splash", INTERPRETED, marks=pytest.mark.milestone),
        ("tensor", "flash", FLASH),
        ("tensor", "blocks", block_attention),
    ],
)
def test_a_run_over_devices_is_the_same_by_a_kernel(axis, name, attend, tmp_path, monkeypatch, trained, capsys):
    """Through the command line: the TPU's kernels, run on four emulated devices."""
    has(monkeypatch, attend, name)
    chunks = trained(tmp_path / "chunks", model_attention="chunks")
    assert "attention" not in capsys.readouterr().out
    by_kernel = trained(tmp_path / "kernel", **{f"mesh_{axis}": 2})
    assert f"attention: {name}, matches chunks on this device" in capsys.readouterr().out
    for found, expected in zip(by_kernel, chunks, strict=True):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)
