"""The programs of a run, lowered and compiled for shapes: which they are, what they need, what follows if one fails."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.commands.plan import plan_advice
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, MeshConfig
from dpo_jax.data.pack import Layout
from dpo_jax.errors import UserError
from dpo_jax.models import kernels
from dpo_jax.sampling import run
from dpo_jax.training import attention_check, lower, plan, plan_records
from dpo_jax.training.fit import Room
from dpo_jax.training.targets import parse_target

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA |= {"intermediate_size": 96, "max_position_embeddings": 512, "tie_word_embeddings": False}


def config_of(folder, *options):
    (folder / "config.json").write_text(json.dumps(LLAMA))
    fixed = ["--model.config", str(folder / "config.json"), "--model.compute", "bfloat16", "--model.remat", "full"]
    fixed += ["--data.max_length", "128", "--data.row_length", "256", "--batch_size", "32", "--data.rows", "8"]
    return parse_config(Config, None, [*fixed, *options], prog="x")


def test_a_program_that_is_refused_says_what_it_needs():
    def refused(message):
        def fail():
            raise jax.errors.JaxRuntimeError(message)

        return SimpleNamespace(compile=fail)

    need = lower.compile_program(refused("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded"))
    assert need.bytes == int(20.5 * 2**30)
    known = plan_records.Memory(100, 0, 50, gradients=10, logits=20, activations=0, batch=5)
    memory = plan._with_temporary(known, *plan._needs(need, 155, "tpu"))  # noqa: SLF001
    assert memory.total == need.bytes
    assert memory.trained + memory.optimizer + memory.batch == 155
    beside = lower.compile_program(
        refused("RESOURCE_EXHAUSTED: total memory required for HLO temporaries (512.00M) exceeds available HBM.")
    )
    assert plan._needs(beside, 155, "tpu") == (2**29, 0)  # noqa: SLF001
    with pytest.raises(jax.errors.JaxRuntimeError):
        lower.compile_program(refused("INTERNAL: no such operation"))


def test_what_a_program_needs_beside_its_arguments():
    found = SimpleNamespace(
        argument_size_in_bytes=107, temp_size_in_bytes=50, peak_memory_in_bytes=140, output_size_in_bytes=90,
        alias_size_in_bytes=80, generated_code_size_in_bytes=3,
    )  # fmt: skip
    program = SimpleNamespace(memory_analysis=lambda: found)
    assert plan._needs(program, 100, "tpu") == (33, 7 + 10 + 3)  # noqa: SLF001 - padding, results, the program
    assert plan._needs(program, 110, "gpu") == (50, 13)  # noqa: SLF001
    known = plan_records.Memory(1, 2, 3, gradients=10, logits=20, activations=0, batch=5)
    for temporary, parts in ((50, (10, 20, 20)), (15, (10, 5, 0)), (4, (4, 0, 0))):
        assert plan._with_temporary(known, temporary, 7)[3:6] == parts  # noqa: SLF001


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), True),  # for KL of the samples
        (("--samples.prompts", "0"), False),
        (("--samples.prompts", "0", "--samples.kl_prompts", "3"), True),
        (("--samples.kl_prompts", "0"), False),
        (("--samples.kl_prompts", "0", "--reference.mode", "online"), True),
        (("--loss.name", "sft", "--reference.mode", "online"), False),
    ],
)
def test_a_reference_for_kl_or_of_every_batch_stays_on_the_devices(tmp_path, options, kept):
    config = config_of(tmp_path, *options)
    assert lower.keeps_reference(config, losses.build(config.loss)) is kept


def test_the_planned_program_of_sampling_is_the_one_that_a_run_starts(tmp_path, monkeypatch):
    """Same static arguments, shapes and dtypes: of 64 prompts, 32 at a time, on four devices."""
    started = []
    monkeypatch.setattr(run, "_begin", SimpleNamespace(lower=lambda *args: started.append(args)))
    planned = lower.planned_run(config_of(tmp_path, "--mesh.fsdp", "4", "--mesh.data", "1"), None)
    lower.lower_sampling(planned)

    class BegunError(Exception):
        """The program has started."""

    def begun(*args):
        started.append(args)
        raise BegunError

    monkeypatch.setattr(run, "_begin", begun)
    params = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype, device=x.sharding), planned.state.params)
    prompts = [np.ones(64, np.int32)] * 64  # half of data.max_length
    with pytest.raises(BegunError):
        run.generate(planned.run.model, params, prompts, max_new_tokens=64, eos_id=0)
    (*fixed, weights, rows, traced), (*static, real, real_rows, real_traced) = started
    assert static == fixed
    shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in ((weights, rows), (real, real_rows)))
    assert next(shapes) == next(shapes)
    assert [type(x) for x in traced[1]] == [type(x) for x in real_traced[1]]
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), weights, real)
    assert all(jax.tree.leaves(same))
    assert planned.run.config.samples.kl_prompts is None
    rewards = lower.planned_run(config_of(tmp_path, "--loss.name", "bradley_terry", "--mesh.fsdp", "4"), None)
    assert lower.lower_sampling(rewards) is None


def no_kernel(*_):
    raise NotImplementedError("no such instruction\nat line 7")


def test_kernels_that_do_not_compile_are_named_and_the_next_one_is_planned(tmp_path, monkeypatch):
    """The compiler refuses flash and blocks, so that chunks are planned; a kernel that the config names is an error."""
    compiled = []
    monkeypatch.setattr(lower, "planned_platform", lambda target: "gpu")
    monkeypatch.setattr(lower, "compile_program", lambda lowered: compiled.append(lowered) or 7)
    for name in ("flash", "blocks"):
        monkeypatch.setitem(kernels.KERNELS, name, kernels.KERNELS[name]._replace(attend=no_kernel))
    planned, program = lower.compiled_run(config_of(tmp_path), None)
    assert (planned.run.model.attention, program, len(compiled)) == ("chunks", 7, 1)
    why = "does not compile for the gpu (NotImplementedError: no such instruction)"
    assert planned.note == f"attention: chunks; flash {why}; blocks {why}"
    with pytest.raises(UserError, match=r"model\.attention: flash does not compile .* such instruction\); set chunks"):
        lower.compiled_run(config_of(tmp_path, "--model.attention", "flash"), None)


def test_a_compilers_message_is_cut_where_nobody_reads_on():
    assert attention_check.in_short(ValueError("x" * 300 + "\nmore")) == "ValueError: " + "x" * 200 + "..."
    assert attention_check.in_short(ValueError("x" * 200)) == "ValueError: " + "x" * 200
    assert attention_check.in_short(ValueError("")) == "ValueError: no reason"


def test_a_program_too_large_for_the_memory_is_no_fault_of_its_kernel(tmp_path, monkeypatch):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")

    monkeypatch.setattr(lower, "planned_platform", lambda target: "gpu")
    monkeypatch.setattr(lower, "lower_step", lambda planned: None)
    monkeypatch.setattr(lower, "compile_program", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError):
        lower.compiled_run(config_of(tmp_path), None)
    assert not lower.lacks_memory(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"))


def test_sampling_is_planned_for_the_memory_that_jax_takes(tmp_path, monkeypatch):
    """It decides whether a device gathers all parameters at once, in the run by the same number."""
    asked = []
    monkeypatch.setattr(plan, "planned_run", lambda config, *_: lower.planned_run(config, None))
    monkeypatch.setattr(plan, "lower_sampling", lambda planned, memory: asked.append(memory))
    config = config_of(tmp_path, "--loss.name", "simpo")
    step, compiled = plan_records.Memory(10, 0, 10, 10, 0, 10, 0), SimpleNamespace(kernel="chunks")
    found = plan_records.Plan(config, 1, 1, Layout(1, 8, 256, 2, 128), step, MeshConfig(4, 1), compiled)
    assert plan.with_passes(found, parse_target("gpu:h100:1x4"), Room(80, 0.75)).passes == ()
    assert asked == [60]


def test_the_verdict_is_that_of_the_largest_program():
    step = plan_records.Memory(10, 10, 10, 10, 0, 10, 0)
    large = step._replace(activations=99)
    both = plan_records.Pass("reference", step._replace(trained=0), 1.0), plan_records.Pass("sampling", large, 2.0)
    config = parse_config(Config, None, ["--model.config", "x"], prog="x")
    found = plan_records.Plan(config, 1, 1, Layout(1, 4, 8, 2, 8), step, MeshConfig(1, 4), passes=both)
    assert found.largest == ("sampling", both[1].memory)
    assert found._replace(passes=both[:1]).largest == ("step", step)
    assert plan_advice(found, 200) == []
    assert [line.partition(":")[0] for line in plan_advice(found, 60)] == ["samples.prompts 0", "mesh.tensor 2"]
    large = found._replace(passes=(both[0]._replace(memory=step._replace(activations=50)),))
    assert [line.partition(":")[0] for line in plan_advice(large, 60)] == ["data.rows 4"]


def test_temporary_memory_of_a_tpu_is_what_the_peak_leaves_beside_the_arguments():
    found = SimpleNamespace(temp_size_in_bytes=50, peak_memory_in_bytes=70, argument_size_in_bytes=40)
    assert lower.temporary_bytes(found, "tpu") == 30
    assert lower.temporary_bytes(found, "gpu") == lower.temporary_bytes(found, "") == 50
    found.peak_memory_in_bytes = 0  # not said
    assert lower.temporary_bytes(found, "tpu") == 50


def test_pmap_is_planned_as_jit_whose_devices_hold_the_same(tmp_path):
    planned = lower.planned_run(config_of(tmp_path, "--mesh.mode", "pmap"), None)
    assert planned.run.config.mesh.mode == "jit"
    with pytest.raises(UserError, match=r"mesh\.mode pmap: parameters are replicated"):
        lower.planned_run(config_of(tmp_path, "--mesh.mode", "pmap", "--mesh.fsdp", "4"), None)
