"""Memory plans: exact where bytes can be counted, less where less is kept, advice where a run does not fit."""

import json

import jax
import pytest

from dpo_jax import cli, optim, sharding
from dpo_jax.commands.plan import plan_advice, resolve_base_model, verdict, warmup_needs
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, MeshConfig
from dpo_jax.config.yaml import dump
from dpo_jax.data import pack
from dpo_jax.errors import UserError
from dpo_jax.training import fit, lower, plan, run_folder, setup
from dpo_jax.training.abstract import abstract_batch, abstract_run, plan_layout
from dpo_jax.training.checks import with_compute
from dpo_jax.training.fit import Room, device_room, jax_fraction
from dpo_jax.training.load import recomputed
from dpo_jax.training.plan import plan_run, with_remat
from dpo_jax.training.plan_records import Memory, Plan
from dpo_jax.training.shard import policy_shardings, state_shardings
from dpo_jax.training.targets import parse_target
from dpo_jax.training.train_step import compiled_step, hparams

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA |= {"intermediate_size": 128}
# Embedding and head; four projections of attention, three of the MLP and two norms a layer; the last norm.
COUNT = 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
MESH = MeshConfig(data=4)
ADAPTED = 2 * (4 * (64 + 64) + 3 * (64 + 128)) * 2  # rank 2


@pytest.fixture
def config_of(tmp_path):
    """Options -> the config of a run of a small Llama."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def config_of(*options):
        fixed = ("--model.config", str(tmp_path / "config.json"), "--data.max_length", "64", "--batch_size", "8")
        return parse_config(Config, None, [*fixed, *options], prog="x")

    return config_of


@pytest.mark.slow
def test_bytes_that_can_be_counted_are_exact(config_of):
    one = plan_run(config_of())
    assert one.parameters == one.trained == COUNT
    assert one.memory.trained == one.memory.gradients == 4 * COUNT
    assert one.memory.optimizer == 4 * COUNT + 4  # RMSprop has one number each, the warm-up its count
    assert one.memory.frozen == 4 * COUNT  # the reference, by which the KL of samples is estimated
    assert one.shape == pack.Layout(1, 8, 128, 2, 128)  # no more rows than comparisons
    batch = 2 * (4 * 128 + 3 * 128 + 2 * 2 + 2 * 2 * 3) * 4  # a quarter of the rows, int32 or float32
    assert one.memory.batch == batch
    adamw = plan_run(config_of("--optim.name", "adamw", "--mesh.fsdp", "4"))
    whole = 2 * 4  # the counts of Adam and of the schedule
    assert adamw.memory.optimizer == pytest.approx(2 * COUNT, abs=whole)
    assert adamw.memory.trained == COUNT  # a quarter of 4 bytes each: all axes that are split are multiples of 4


@pytest.mark.slow
def test_adapters_need_little_beside_the_frozen_base(config_of):
    found = plan_run(config_of("--lora.rank", "2"))
    assert (found.parameters, found.trained) == (COUNT, ADAPTED)
    assert found.memory.frozen == 4 * COUNT
    assert found.memory.trained == found.memory.optimizer - 4 == 4 * ADAPTED


@pytest.mark.slow
def test_remat_and_fewer_rows_need_less_memory(config_of):
    online = plan_run(config_of("--reference.mode", "online", "--data.rows", "16"))
    less = plan_run(config_of("--model.remat", "full", "--data.rows", "16"))
    fewer = plan_run(config_of("--model.remat", "full", "--data.rows", "4"))
    assert online.memory.activations > less.memory.activations > fewer.memory.activations
    without = plan_run(config_of("--model.remat", "full", "--samples.kl_prompts", "0", "--samples.prompts", "0"))
    assert [plan.memory.frozen for plan in (online, less, without)] == [4 * COUNT, 4 * COUNT, 0]


def test_advice_for_a_run_that_does_not_fit(config_of):
    config = config_of("--reference.mode", "online")
    need = Memory(trained=40, frozen=40, optimizer=40, gradients=40, logits=1, activations=99, batch=0)
    found = Plan(config, 1, 1, pack.Layout(1, 8, 128, 2, 128), need, MESH)
    assert plan_advice(found, 260) == []
    lines = plan_advice(found, 100)
    # 160 bytes are permanent and may take 60 of 100: a quarter of them does.
    assert [line.partition(":")[0] for line in lines] == [
        "mesh.fsdp 4", "lora.rank 16", "reference.mode cache", "model.remat dots", "data.rows 4",
    ]  # fmt: skip
    over = found._replace(config=config_of("--reference.mode", "online", "--lora.rank", "2"))
    assert [line.partition(":")[0] for line in plan_advice(over, 100)][:2] == ["mesh.fsdp 4", "lora.base nf4"]
    few = over._replace(config=config_of("--lora.rank", "2", "--lora.base", "int8"))
    assert "lora.base" not in " ".join(plan_advice(few, 100))
    small = found._replace(memory=need._replace(trained=1, frozen=0, optimizer=1, gradients=1))
    assert [line.partition(":")[0] for line in plan_advice(small, 50)] == ["model.remat dots", "data.rows 4"]
    shared = small._replace(mesh=MeshConfig(data=1, fsdp=2, expert=2))
    assert [line.partition(":")[0] for line in plan_advice(shared, 50)] == ["model.remat dots", "data.rows 4"]
    bare = found._replace(shape=pack.Layout(1, 4, 128, 2, 128), memory=small.memory._replace(activations=2, logits=99))
    assert plan_advice(bare, 50) == ["data.max_length: lower it, or use devices with more memory"]
    long = bare._replace(shape=pack.Layout(1, 4, 8192, 2, 8192), memory=need._replace(trained=1, frozen=0, optimizer=1))
    assert "mesh.sequence 2: shards the tokens of each row over as many devices" in plan_advice(long, 100)


def test_activations_that_must_be_kept_are_those_of_a_devices_tokens(config_of):
    whole = config_of("--mesh.data", "4", "--data.row_length", "2048", "--data.rows", "4")
    split = config_of("--mesh.data", "1", "--mesh.sequence", "4", "--data.row_length", "2048", "--data.rows", "4")
    one = config_of("--mesh.data", "1", "--mesh.sequence", "4", "--data.row_length", "2048", "--data.rows", "1")
    kept = [fit.least_activations(config, None) for config in (whole, split, one)]
    assert kept == [kept[0], kept[0], kept[0] // 4]


def test_room_for_the_tokens_of_other_devices_is_for_those_of_experts(config_of, tmp_path):
    """Gate and activation of 2 rows of width 24 for each token of all devices; a shared expert has its device's own."""
    mixture = LLAMA | {"model_type": "qwen3_next", "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    mixture |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "full_attention_interval": 2}
    (tmp_path / "config.json").write_text(json.dumps(mixture))
    one, two = (config_of("--mesh.data", str(4 // n), "--mesh.expert", str(n), "--data.rows", "8") for n in (1, 2))
    tokens = 2 * 128
    more = fit.least_activations(two, None) - fit.least_activations(one, None)
    assert more == 4 * 2 * tokens * 2 * 2 * 24  # of 4 bytes, in 2 layers


def test_a_rounded_sum_of_gradients_needs_whole_heads_and_is_no_layout(config_of):
    config = config_of("--mesh.reduce_dtype", "bfloat16", "--mesh.tensor", "2")
    with pytest.raises(UserError, match=r"mesh\.reduce_dtype: bfloat16 needs mesh\.tensor 1"):
        setup.check_config(config)
    assert "mesh.fsdp" in run_folder.FREE
    assert "mesh.reduce_dtype" not in run_folder.FREE


@pytest.mark.parametrize(("memory", "remat"), [(100, "none"), (99, "dots"), (70, "dots"), (60, "full"), (1, "full")])
def test_an_accelerator_takes_bfloat16_and_the_fastest_remat_that_fits(config_of, monkeypatch, memory, remat):
    """Plans of 90, 63 and 10 bytes must fit in nine tenths of a device's memory."""
    totals = {"none": 90, "dots": 63, "full": 10}

    def planned(config, target):
        assert config.model.compute == "bfloat16"  # which the plan depends on
        return Plan(config, 1, 1, pack.Layout(1, 1, 1, 1, 1), Memory(totals[config.model.remat], *[0] * 6), MESH)

    monkeypatch.setattr(plan, "plan_run", planned)
    chosen = with_remat(config_of(), "gpu", memory).model
    assert (chosen.compute, chosen.remat) == ("bfloat16", remat)
    fixed = with_remat(config_of("--model.compute", "float32", "--model.remat", "none"), "tpu", 1).model
    assert (fixed.compute, fixed.remat) == ("float32", "none")


def test_a_plan_of_gpus_may_take_nine_tenths_of_what_jax_takes(config_of, monkeypatch):
    """Of 80 GB 54 by default. A run is told 60 by JAX and takes the same."""
    for name in fit.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    gpu, tpu = parse_target("gpu:a100:1x8"), parse_target("tpu:v5e:2x4")
    room = device_room(gpu)
    assert room.usable == pytest.approx(54 * 2**30)
    assert str(room) == "54 GB, which is 90% of the 75% that JAX takes (XLA_CLIENT_MEM_FRACTION) of 80 GB"
    assert room.usable == pytest.approx(Room(60 * 2**30).usable)
    assert device_room(tpu).usable == pytest.approx(14.4 * 2**30)
    assert device_room(tpu, 100).usable == 90
    assert device_room(None, 100, emulated=True).usable == 67.5  # emulated devices stand for GPUs
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert device_room(gpu, 100).usable == 45
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "75%")
    with pytest.raises(UserError, match=r"XLA_PYTHON_CLIENT_MEM_FRACTION=75% is not a fraction .* above 0, at most 1"):
        jax_fraction("gpu")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(
        UserError, match=r"^XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION are both set; unset"
    ):
        jax_fraction("gpu")
    found = Plan(config_of(), 1, 1, pack.Layout(1, 8, 128, 2, 128), Memory(9 * 2**30, *[0] * 6), MESH)
    assert verdict(found, Room(100 * 2**30, 0.5)).startswith("20% of 45 GB, which is 90% of the 50%")


def test_a_device_that_is_here_says_what_jax_takes(monkeypatch):
    for name in fit.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    assert device_room(None).usable == pytest.approx(72 * 2**30)  # a CPU stands for a device of 80 GB
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fit, "device_memory", lambda: 1000)
    assert device_room(None).usable == 900
    assert device_room(None, 1000).usable == 675  # which is that of the whole device


def test_devices_along_sequence_have_equal_parts_of_the_chunks_of_the_head():
    """A chunk has 512 tokens: of two rows 256 each, 16 of them in 4,096 tokens and four in a quarter of these."""
    mesh, shape = sharding.make_mesh, pack.Layout(3, 2, 4096, 8, 4096)
    assert lower.head_chunks(shape._replace(rows=8), mesh(4, 1, 1, 1)) == (2, 256, 16)
    assert lower.head_chunks(shape, mesh(1, 1, 1, 4)) == (2, 256, 4)
    assert lower.head_chunks(shape, mesh(1, 1, 2, 2)) == (2, 256, 8)
    assert lower.head_chunks(shape, mesh(2, 1, 2, 1)) == (1, 512, 8)
    assert lower.head_chunks(shape._replace(scored=100), mesh(1, 1, 4, 1)) == (2, 100, 1)


def test_a_plan_on_cpus_has_the_microbatches_of_a_run_there(tmp_path, monkeypatch, config_of):
    """At most 1,024 tokens on each of four: 8 rows of 128. Emulated accelerators have 4,096; rows that are set stay.

    As in a run, there are no more rows than comparisons: 2 of 8 on each of four.
    """
    rows = []

    def planned(config, *_):
        rows.append(plan_layout(config, 4).rows)
        raise UserError("planned")

    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # these tests emulate four devices already
    monkeypatch.setattr("dpo_jax.commands.plan.plan_run", planned)
    monkeypatch.setattr(plan, "plan_run", planned)
    (tmp_path / "my.yaml").write_text(dump(config_of()))
    for options in (
        [],
        ["--devices", "4"],
        ["--data.rows", "64"],
        ["--data.row_length", "2048"],
        ["--batch_size", "8"],
    ):
        with pytest.raises(UserError, match="planned"):
            cli.run_command(["plan", str(tmp_path / "my.yaml"), "--batch_size", "256", *options])
    assert rows == [4 * 8, 4 * 32, 64, 4, 4 * 2]


def test_a_cpu_takes_float32_and_recomputes_nothing(config_of):
    assert with_compute(config_of()).model.compute == "float32"
    assert recomputed(with_remat(config_of()).model) == "none"  # a CPU does not say how much memory it has


def test_a_run_that_goes_on_elsewhere_keeps_its_dtype(config_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(config_of("--run", str(run), "--model.compute", "bfloat16")))
    assert with_compute(config_of("--run", str(run))).model.compute == "bfloat16"
    assert with_compute(config_of("--run", str(tmp_path / "new"))).model.compute == "float32"
    assert with_compute(config_of("--run", str(tmp_path / "new")), "tpu").model.compute == "bfloat16"


@pytest.mark.slow
def test_the_command_plans_emulated_devices_as_accelerators(config_of, tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # these tests emulate four devices already
    monkeypatch.setattr(plan, "plan_run", lambda config, *_: tried.append(config.model.remat) or plan_run(config))
    options = ["--model.config", str(tmp_path / "config.json"), "--data.max_length", "64", "--batch_size", "8"]
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    cli.run_command(["plan", str(tmp_path / "my.yaml"), *options, "--devices", "4", "--memory", "1e-6"])
    assert "model.compute: bfloat16, model.remat: full" in capsys.readouterr().out
    assert tried == ["none", "dots", "full"]  # the fastest first
    cli.run_command(["plan", str(tmp_path / "my.yaml"), *options])
    assert "model.compute: float32, model.remat: none" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_plans_a_run_that_starts_from_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "sft.yaml").write_text("model: {config: config.json, tokenizer: synthetic}\n")
    (tmp_path / "dpo.yaml").write_text("model: {path: sft.yaml}\nbatch_size: 4\ndata: {max_length: 32}\n")
    cli.run_command(["plan", "dpo.yaml", "--memory", "0.0001"])
    out = capsys.readouterr().out
    assert f"{COUNT:,} parameters, {COUNT:,} trained; 4 device(s); at most 1 microbatches" in out
    assert ": does not fit; set one or more of:" in out
    assert "  mesh.fsdp" in out
    cli.run_command(["plan", "dpo.yaml", "--lora.rank", "2"])
    assert "of 72 GB, which is 90% of 80 GB: fits" in capsys.readouterr().out
    (tmp_path / "b.yaml").write_text("model: {path: runs/sft}\nbatch_size: 4\ndata: {max_length: 32}\n")
    cli.run_command(["plan", "b.yaml", "--lora.rank", "2"])  # a run that has not begun
    assert "runs/sft does not exist yet; planned with the model of sft.yaml\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.rows 3: 4 devices share the rows of a microbatch; give a multiple"):
        cli.run_command(["plan", "dpo.yaml", "--data.rows", "3"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        cli.run_command(["plan", "dpo.yaml", "--model.path", "nowhere"])


def test_other_hyper_parameters_compile_the_same_program(config_of):
    """Numbers are arguments of the step, so that a sweep over beta or the learning rate compiles once."""

    def program(*options):
        config = config_of(*options)
        run, mesh = abstract_run(config), sharding.make_mesh()
        trained, like = state_shardings(run, optim.build(**config.optim), mesh)
        step = compiled_step(run, policy_shardings(run, mesh, trained), like)
        batch = abstract_batch(plan_layout(config, 8), 2)
        count, numbers = jax.ShapeDtypeStruct((), "int32"), hparams(config)
        return step.lower(like, batch, count, None, numbers).as_text()

    first = program()
    assert program("--loss.beta", "0.7", "--loss.label_smoothing", "0.1", "--optim.learning_rate", "1e-3") == first
    assert program("--loss.name", "ipo") != first


def test_a_plan_says_what_the_warm_up_asks_of_the_run(config_of):
    set_ = config_of("--optim.warmup_steps", "150")
    needed = "optim.warmup_steps: the learning rate reaches its peak after 1,200 comparisons (150 steps of 8)"
    assert warmup_needs(set_, None) == needed
    assert "the warm-up takes 150 updates (optim.warmup_steps) and the run has 100" in warmup_needs(set_, 100)
    assert [warmup_needs(set_, 151), warmup_needs(config_of(), None)] == ["", ""]


def test_the_model_of_an_earlier_stage_is_planned(tmp_path):
    """That of the first YAML in the chain, with the other keys of the config itself."""
    (tmp_path / "first.yaml").write_text("model: {config: tiny.json}\nbatch_size: 4\n")
    (tmp_path / "second.yaml").write_text(f"model: {{path: {tmp_path / 'first.yaml'}, remat: full}}\n")
    config = parse_config(Config, None, ["--model.path", str(tmp_path / "second.yaml"), "--batch_size", "9"], prog="x")
    found = resolve_base_model(config)
    assert (found.model.path, found.model.config, found.model.remat, found.batch_size) == ("", "tiny.json", "auto", 9)
    (tmp_path / "first.yaml").write_text("batch_size: 4\n")
    with pytest.raises(UserError, match=r"first\.yaml: names no model; set model\.path or model\.config"):
        resolve_base_model(config)
