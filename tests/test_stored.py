"""Lazy parameters: any block can be read, and little more than the block is read."""

import json
import os
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, folders_of

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.families.tensor_map import read_block
from dpo_jax.models.huggingface import lazy
from dpo_jax.models.huggingface.folder import load_folder, open_folder, save_folder
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.models.model import build_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, created on first use."""
    return folders_of({name: (name, {}) for name in FAMILIES}, tmp_path_factory.mktemp)


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_read_block_by_block(folders, kind):
    _, _, lazy_tree = open_folder(folders(kind))
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(lazy_tree):
        full = np.asarray(leaf)
        assert full.shape == leaf.shape
        for _ in range(4):
            low = [int(rng.integers(0, size)) for size in leaf.shape]
            high = [int(rng.integers(a + 1, size + 1)) for a, size in zip(low, leaf.shape, strict=True)]
            index = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            assert np.array_equal(leaf[index], full[index])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bfloat16 folder whose embedding and MLP tensors dominate its size."""
    config = {"model_type": "llama", "vocab_size": 65536, "hidden_size": 64, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 16, "intermediate_size": 2048, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp("large") / "model"
    save_folder(folder, jax.jit(build_model(architecture_of(config)).init)(jax.random.key(0)), config, dtype="bfloat16")
    return folder


def peak_beside(function):
    """Returns a function's result, and its peak of host memory above the memory that it leaves allocated."""
    tracemalloc.start()
    try:
        result = function()
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, most - left


LARGEST = 65536 * 64 * 4  # bytes of the embedding in float32
SMALL = 2**20  # bytes of Python itself


def test_reading_takes_little_memory_beside_what_is_read(large):
    _, _, params = open_folder(large)
    for leaf in jax.tree.leaves(params):
        array, most = peak_beside(lambda leaf=leaf: np.asarray(leaf))
        assert most < 0.3 * array.nbytes + SMALL


@pytest.mark.parametrize(("sizes", "most_of_it"), [((4, 1, 1), 1.3), ((1, 4, 1), 0.65)])
def test_devices_are_filled_one_after_another(large, sizes, most_of_it):
    """Devices that hold the same block get one copy of it; quarters are read one after another."""
    architecture, _, params = open_folder(large)
    mesh = sharding.make_mesh(*sizes)
    where = sharding.param_shardings(mesh, build_model(architecture).axes, params)
    arrays, most = peak_beside(lambda: sharding.put_params(params, where))
    assert most < most_of_it * LARGEST + SMALL
    assert np.array_equal(arrays["embedding"], params["embedding"])


def test_writing_takes_the_memory_of_a_tensor(large, tmp_path):
    architecture, hf_config, params = open_folder(large)
    mesh = sharding.make_mesh(1, 4, 1)
    arrays = sharding.put_params(params, sharding.param_shardings(mesh, build_model(architecture).axes, params))
    _, most = peak_beside(lambda: save_folder(tmp_path / "out", arrays, hf_config))
    assert most < 1.3 * LARGEST / 2 + SMALL  # in bfloat16
    files = [folder / "model.safetensors" for folder in (large, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_process_that_does_not_write_fetches_what_the_other_does(folders, tmp_path):
    """Arrays that are sharded over several processes are gathered by all of them, one tensor at a time."""
    _, hf_config, params = load_folder(folders("gpt2"))
    seen = {True: [], False: []}
    for writes, shapes in seen.items():

        def fetch(x, shapes=shapes):
            shapes.append(x.shape)
            return np.asarray(x)

        save_folder(tmp_path / str(writes), params, hf_config, fetch=fetch, writes=writes)
    assert seen[True] == seen[False]
    assert max(map(np.prod, seen[True])) < max(leaf.size for leaf in jax.tree.leaves(params)) + 1
    assert [p.name for p in tmp_path.iterdir()] == ["True"]


def test_a_file_is_as_the_library_writes_it(folders, tmp_path):
    _, hf_config, params = load_folder(folders("llama"))
    save_folder(tmp_path / "out", params, hf_config)
    with (tmp_path / "out/model.safetensors").open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        rest = len(f.read())
    assert size % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
    assert [entry["data_offsets"][0] for entry in header.values()] == ends[:-1]
    assert rest == ends[-1]


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "phi3"])
def test_a_device_reads_its_part_of_the_files_only(folders, kind, monkeypatch):
    architecture, _, params = open_folder(folders(kind))
    taken = []

    def spied(tensor, part, index, read):
        taken.append(0)

        class Counted:
            def __getitem__(self, block):
                taken[-1] += np.prod([b.stop - b.start for b in block])
                return read[block]

        return read_block(tensor, part, index, Counted())

    monkeypatch.setattr(lazy, "read_block", spied)
    for name in ("q", "k", "v"):
        leaf = params["layers"][name]["kernel"]
        taken.clear()
        heads = leaf.shape[2] // 2 or 1
        block = leaf[:, :, :heads]
        # GPT-2 has queries, keys and values side by side: one of them is read, and its heads are sliced in memory.
        assert sum(taken) == block.size * (leaf.shape[2] // heads if kind == "gpt2" else 3 if kind == "gpt_neox" else 1)
    taken.clear()
    assert params["layers"]["up"]["kernel"][:1, : architecture.width // 2].size == sum(taken)
    assert params["embedding"][:3].size == taken[-1]


def test_lazy_parameters_are_put_on_devices_as_host_arrays_are(folders):
    architecture, _, params = open_folder(folders("gpt2"))
    mesh = sharding.make_mesh(1, 2, 2)
    where = sharding.param_shardings(mesh, build_model(architecture).axes, params)
    ours = sharding.put_params(params, where)
    assert ours["layers"]["up"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(load_into_memory(params)), strict=True):
        assert a.dtype == b.dtype == np.float32
        assert np.array_equal(a, b)


def test_files_that_change_while_they_are_in_use_are_noticed(folders, tmp_path):
    _, hf_config, params = load_folder(folders("llama"))
    save_folder(tmp_path / "out", params, hf_config)
    opened = open_folder(tmp_path / "out")[2]["embedding"]
    assert np.array_equal(opened[:2], params["embedding"][:2])
    file = tmp_path / "out/model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=r"model.safetensors: was changed or removed while it was in use"):
        np.asarray(opened)
    file.unlink()
    with pytest.raises(UserError, match="was changed or removed"):
        opened[:1]


def test_a_tensor_in_two_files_is_refused(folders, tmp_path):
    _, hf_config, params = load_folder(folders("llama"))
    save_folder(tmp_path / "out", params, hf_config, max_shard_bytes=20_000)
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{second.name}: tensor .* is in {first.name} too; remove one of them"):
        load_folder(tmp_path / "out")
