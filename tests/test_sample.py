"""Sampling: against transformers token by token, its distribution, its seeds, its rows on devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import COMPOSED, EOS, FAMILIES, MILESTONE, folder_of, load_torch, shared_model, tokens_of

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.models.attention import capped
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface.folder import load_folder, load_tokenizer
from dpo_jax.models.model import build_model
from dpo_jax.sampling import generate, placement, run, slots

NEW = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> (folder, model, params), built on first use."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = folder_of(kind, tmp_path_factory.mktemp("models") / kind)
            architecture, _, params = load_folder(folder)
            made[kind] = folder, build_model(architecture), jax.tree.map(jnp.asarray, params)
        return made[kind]

    return get


def prompts_of(*lengths):
    return [tokens_of(1, n, seed=n)[0] for n in lengths]


def torch_greedy(folder, prompt, new, eos):
    import torch

    model = load_torch(folder)
    ids = torch.tensor(np.asarray(prompt)[None], dtype=torch.long)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return out[0, len(prompt) :].numpy()


# Families that decode by code which another family of the list runs.
LIKE = ("gemma", "gpt_neox", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "qwen2", "qwen3")
MARKS = dict.fromkeys(LIKE, MILESTONE) | COMPOSED
LATER = [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in FAMILIES]


@pytest.mark.parametrize("kind", LATER)
def test_greedy_equals_transformers_token_by_token(models, kind):
    folder, model, params = models(kind)
    prompts = prompts_of(7, 1, 33, 20)
    ours = generate(model, params, prompts, max_new_tokens=NEW, temperature=0, eos_id=EOS, batch_size=3)
    for prompt, new in zip(prompts, ours, strict=True):
        assert new.dtype == np.int32
        assert new.tolist() == torch_greedy(folder, prompt, NEW, EOS).tolist()


@pytest.mark.parametrize("name", ["tinystories-656k", pytest.param("stories260k", marks=pytest.mark.slow)])
def test_greedy_equals_transformers_on_a_trained_model(name):
    folder = shared_model(name)
    architecture, _, params = load_folder(folder)
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The dog ran to the big tree and")]
    ours = generate(build_model(architecture), params, prompts, max_new_tokens=200, temperature=0, eos_id=())
    for prompt, new in zip(prompts, ours, strict=True):
        theirs = torch_greedy(folder, prompt, 200, None)
        assert tokenizer.decode(new) == tokenizer.decode(theirs)
        assert new.tolist() == theirs.tolist()


def test_bfloat16_generates(models):
    _, model, params = models("llama")
    model = build_model(model.architecture, compute="bfloat16")
    out = generate(model, params, prompts_of(5), max_new_tokens=4, temperature=0, eos_id=())
    assert out[0].shape == (4,)


def test_a_text_ends_with_the_first_of_its_end_tokens(models):
    _, model, params = models("llama")
    prompts = prompts_of(7, 20, 9)
    options = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 3, "batch_size": 4}
    free = generate(model, params, prompts, eos_id=(), **options)
    assert [len(x) for x in free] == [NEW] * 3
    ends = (int(free[0][4]), int(free[1][0]))
    cut = generate(model, params, prompts, eos_id=ends, **options)
    for long, short in zip(free, cut, strict=True):
        stops = np.flatnonzero(np.isin(long, ends))
        assert short.tolist() == long[: stops[0] + 1 if len(stops) else NEW].tolist()
    assert len(cut[1]) == 1


def test_samples_depend_on_the_seed_and_the_index_only(models):
    _, model, params = models("gpt2")
    prompts = prompts_of(7, 20, 9, 40, 3)
    options = {"max_new_tokens": NEW, "eos_id": EOS, "top_k": 50}
    together = generate(model, params, prompts, seed=1, batch_size=5, **options)
    apart = generate(model, params, prompts, seed=1, batch_size=2, **options)
    assert [x.tolist() for x in together] == [x.tolist() for x in apart]
    other = generate(model, params, prompts, seed=2, batch_size=5, **options)
    assert all(a.tolist() != b.tolist() for a, b in zip(together, other, strict=True))
    same = generate(model, params, [prompts[0]] * 3, seed=1, batch_size=5, **options)
    assert same[0].tolist() == together[0].tolist()
    assert same[0].tolist() != same[1].tolist() != same[2].tolist()


@pytest.mark.parametrize("batch_size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (3, 40)), 6])
def test_copies_are_the_same_prompt_again(models, batch_size):
    """Batches that hold all copies of a prompt, some of them, or those of several prompts."""
    _, model, params = models("gpt2")
    prompts, options = prompts_of(7, 33, 9), {"max_new_tokens": NEW, "eos_id": EOS, "seed": 4, "batch_size": batch_size}
    apart = generate(model, params, [p for p in prompts for _ in range(5)], **options)
    shared = generate(model, params, prompts, copies=5, **options)
    assert [x.tolist() for x in shared] == [x.tolist() for x in apart]
    assert len({tuple(x.tolist()) for x in shared}) == 15


def test_every_token_has_other_random_numbers(models):
    _, model, params = models("gpt2")
    uniform = jax.tree.map(jnp.zeros_like, params)
    (out,) = generate(model, uniform, prompts_of(7), max_new_tokens=NEW, eos_id=(), batch_size=5)
    assert len(set(out.tolist())) > NEW / 2


def test_tokens_are_sampled_from_capped_logits(models):
    _, model, params = models("gemma2")
    steep = {**params, "embedding": params["embedding"] * 100}  # without the cap one token has all of the probability
    options = {"max_new_tokens": NEW, "eos_id": (), "batch_size": 1}
    free = build_model(dataclasses.replace(model.architecture, logit_cap=None))
    (greedy,) = generate(free, steep, prompts_of(7), temperature=0, **options)
    (drawn,) = generate(free, steep, prompts_of(7), **options)
    assert drawn.tolist() == greedy.tolist()
    (capped,) = generate(model, steep, prompts_of(7), **options)
    assert (capped != greedy).sum() > NEW / 2


def test_a_shape_is_compiled_once(models):
    _, model, params = models("gpt2")
    options = {"max_new_tokens": 5, "eos_id": EOS, "batch_size": 2}
    for _ in range(2):
        generate(model, params, prompts_of(3, 9, 31), temperature=0.5, **options)
    programs = run._prepare, run._begin, run._add, run._move  # noqa: SLF001
    before = [f._cache_size() for f in programs]  # noqa: SLF001
    generate(model, params, prompts_of(32, 5), temperature=0.7, seed=8, **options)
    assert [f._cache_size() for f in programs] == before  # noqa: SLF001
    generate(model, params, prompts_of(33, 5), **options)
    assert [f._cache_size() - n for f, n in zip(programs, before, strict=True)] == [0, 1, 1, 0]  # noqa: SLF001


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [("gpt2", 0.5), *(pytest.param(kind, 2.0, marks=pytest.mark.slow) for kind in ("gemma2", "gptj"))],
)
def test_samples_of_a_model_follow_its_softmax_at_a_temperature(tmp_path, kind, temperature):
    """By a chi-squared statistic of first tokens against the softmax of the logits: a plain head, capped logits,
    and a head with a bias. The vocabulary is no multiple of a block, so it is padded."""
    architecture, _, params = load_folder(folder_of(kind, tmp_path / kind, vocab_size=100))
    if architecture.logit_cap:  # so that logits reach it
        architecture = dataclasses.replace(architecture, logit_cap=2.0)
        params = {**params, "embedding": 10 * params["embedding"]}
    model, count = build_model(architecture), 20_000
    tokens = tokens_of(1, 6, vocab=100)
    one = jnp.ones_like(tokens)
    hidden = model.hidden(params, tokens, jnp.arange(6)[None], one, jnp.zeros_like(one))[0, -1]
    logits = capped(hidden @ model.head(params).T, architecture.logit_cap)
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    options = {"max_new_tokens": 1, "temperature": temperature, "eos_id": (), "batch_size": count}
    found = np.bincount(np.concatenate(generate(model, params, list(tokens), copies=count, **options)), minlength=100)
    assert len(found) == 100
    likely = count * p > 5
    observed, expected = (np.append(x[likely], x[~likely].sum()) for x in (found, count * p))
    statistic, free = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum(), likely.sum()
    assert likely.sum() > 10
    assert statistic < free + 5 * np.sqrt(2 * free)


def mesh_of(*sizes):
    """Of data, fsdp, tensor, sequence, expert; 1 where not given."""
    return sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


@pytest.fixture
def made(monkeypatch):
    """Sharding of the results of each batch: (number of devices, shape, shape of one device's shard)."""
    seen, fetch = [], run.distributed.fetch

    def look(arrays):
        found = [x for x in arrays if x.ndim == 2]
        seen.extend((len(x.sharding.device_set), x.shape, x.addressable_shards[0].data.shape) for x in found)
        return fetch(arrays)

    monkeypatch.setattr(run.distributed, "fetch", look)
    return seen


@pytest.mark.parametrize("sizes", [(2,), (4,), (1, 4), (2, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2)], ids=str)
@pytest.mark.slow
def test_samples_are_the_same_on_any_devices(models, made, sizes):
    """Parameters replicated on 2 and on 4 devices, sharded over four, and sharded over both halves of the devices."""
    _, model, params = models("llama")
    prompts, options = prompts_of(7, 33, 9, 20, 3), {"max_new_tokens": NEW, "eos_id": EOS, "seed": 4, "copies": 3}
    alone = generate(model, jax.device_put(params, sharding.replicated(mesh_of(1))), prompts, batch_size=8, **options)
    mesh = mesh_of(*sizes)
    laid = jax.device_put(params, sharding.param_shardings(mesh, model.axes, params))
    made.clear()
    spread = generate(model, laid, prompts, batch_size=8, **options)
    assert [x.tolist() for x in spread] == [x.tolist() for x in alone]
    rows = sharding.independent_devices(mesh)
    assert all(found == (mesh.size, (-(-2 // rows) * rows * 3, NEW), (-(-2 // rows) * 3, NEW)) for found in made)


@pytest.mark.parametrize(
    ("kind", "sizes", "temperature"),
    [
        pytest.param("llama", (2, 2), 0.0, marks=pytest.mark.slow),
        pytest.param("llama", (1, 4), 1.0, marks=MILESTONE),
        pytest.param("gptj", (1, 4), 1.0, marks=MILESTONE),
        pytest.param("gpt2", (1, 2, 2), 0.0, marks=pytest.mark.slow),
        pytest.param("gemma4_text", (1, 4), 0.0, marks=pytest.mark.slow),
    ],
)
def test_parameters_that_stay_sharded_give_the_same_tokens(models, monkeypatch, kind, sizes, temperature):
    """Each token gathers every layer: a head tied or not, with a bias, learned positions, embeddings of each layer."""
    _, model, params = models(kind)
    prompts, options = prompts_of(7, 33, 9, 20, 3), {"max_new_tokens": NEW, "eos_id": EOS, "copies": 2}
    alone = jax.device_put(params, sharding.replicated(mesh_of(1)))
    mesh = mesh_of(*sizes)
    laid = jax.device_put(params, sharding.param_shardings(mesh, model.axes, params))
    monkeypatch.setattr(placement, "WHOLE_SHARE", 0)
    add, texts = run._add, []  # noqa: SLF001

    def look(*args):
        if not texts:
            texts.append(add.lower(*args).compile().as_text())
        return add(*args)

    monkeypatch.setattr(run, "_add", look)
    options["temperature"] = temperature
    spread = generate(model, laid, prompts, batch_size=8, **options)
    whole = generate(model, alone, prompts, batch_size=8, **options)
    assert [x.tolist() for x in spread] == [x.tolist() for x in whole]
    before, _, main = texts[0].partition("\nENTRY ")
    assert before.count(" all-gather(") > model.architecture.layers  # in the loop over tokens; XLA joins some
    if len(sizes) == 2:  # where `tensor` shards parameters too, XLA moves the cache as well
        assert " all-gather(" not in main


def test_concurrent_batches_give_the_same_samples(models, monkeypatch):
    _, model, params = models("llama")
    params, prompts = jax.device_put(params, sharding.replicated(mesh_of(1))), prompts_of(7, 33, 9, 20, 3, 11)
    options = {"max_new_tokens": NEW, "eos_id": EOS, "seed": 4, "batch_size": 1}
    alone, given = generate(model, params, prompts, **options), []
    at_once = run.distributed.run_concurrently
    monkeypatch.setattr(run.distributed, "concurrent_programs", lambda: 3)
    monkeypatch.setattr(run.distributed, "run_concurrently", lambda *a: (given.append(a[1]), at_once(*a)))
    assert [x.tolist() for x in generate(model, params, prompts, **options)] == [x.tolist() for x in alone]
    monkeypatch.setattr(run, "SMALL_MODEL", 0)  # each batch of a large model takes memory for a copy of it
    generate(model, params, prompts[:1], **options)
    assert given == [1, 3, 1, 1]
    assert not generate(model, params, [], **options)


@pytest.mark.slow
def test_host_parameters_are_put_on_all_devices(models, made):
    _, model, params = models("llama")
    options = {"max_new_tokens": NEW, "eos_id": EOS}
    alone = generate(model, jax.device_put(params, sharding.replicated(mesh_of(1))), prompts_of(7), copies=6, **options)
    made.clear()
    for where in (np.asarray, jnp.asarray):
        spread = generate(model, jax.tree.map(where, params), prompts_of(7), copies=6, **options)
        assert [x.tolist() for x in spread] == [x.tolist() for x in alone]
    assert made == [(4, (8, NEW), (2, NEW))] * 2  # the copies of one prompt in four parts


@pytest.mark.parametrize(
    ("lengths", "copies", "batch_size", "devices", "shape", "count"),
    [
        ([5, 3, 4], 1, 8, 1, (3, 1), 1),
        ([5, 3, 4], 4, 8, 1, (2, 4), 2),
        ([5, 3, 4], 4, 8, 4, (4, 3), 2),  # 12 continuations, 3 a device: six places
        ([5], 10, 32, 4, (4, 3), 1),
        ([5], 10, 4, 1, (1, 4), 3),
        ([5, 6], 7, 3, 2, (2, 3), 3),
        ([], 2, 8, 4, None, 0),
    ],
)
def test_every_continuation_is_in_one_batch(lengths, copies, batch_size, devices, shape, count):
    batches = list(slots.prompt_batches(lengths, copies, batch_size, devices))
    assert [numbers.shape for _, numbers in batches] == [shape] * count
    owner = {n: p for chosen, numbers in batches for p, row in zip(chosen, numbers) for n in row if n >= 0}  # noqa: B905
    assert owner == {n: n // copies for n in range(len(lengths) * copies)}
    assert sum((numbers >= 0).sum() for _, numbers in batches) == len(owner)


@pytest.mark.parametrize(
    ("prompts", "copies", "left", "shape"),
    [
        (64, 4, 63, (64, 1)),
        (64, 1, 63, (16, 1)),
        (8, 16, 63, (8, 4)),
        (16, 6, 63, (12, 2)),
        (1, 40, 63, (1, 10)),
        (7, 4, 63, None),  # 7 rows
        (64, 4, 31, None),  # 31 tokens
    ],
)
def test_a_smaller_batch_has_a_quarter_of_the_rows(prompts, copies, left, shape):
    assert slots.smaller_shape(prompts, copies, left) == shape


def test_living_rows_move_together():
    one, other = [[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    alive, indices = np.array([one, other], bool), np.arange(100, 124).reshape(6, 4)
    prompts, rows = slots.compacted(alive, (3, 2))
    assert prompts.tolist() == [0, 0, 2, 1, 0, 0]
    assert rows.tolist() == [[0, 2], [3, -1], [9, -1], [7, -1], [-1, -1], [-1, -1]]
    assert slots.moved(indices, rows, 2).tolist() == [[100, 102], [103, -1], [109, -1], [119, -1], [-1, -1], [-1, -1]]
    assert slots.compacted(alive, (2, 2)) is None
    assert slots.compacted(alive, (2, 3))[1][:2].tolist() == [[0, 2, 3], [9, -1, -1]]
    assert np.array_equal(slots.moved(indices, slots.as_they_are(2, 3, 4)[1], 2), indices)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_compacted_batch_has_the_same_samples(models, monkeypatch, devices):
    """Forty texts a device that end one by one, in a cache that grows: shapes shrink, and no token changes."""
    _, model, params = models("llama")
    params = jax.device_put(params, sharding.replicated(mesh_of(devices)))
    prompts, move, shapes = [tokens_of(1, 3 + n, seed=n)[0] for n in range(10 * devices)], run._move, []  # noqa: SLF001
    options = {"copies": 4, "max_new_tokens": 90, "eos_id": (3, 50, 77), "seed": 5, "top_k": 60}
    monkeypatch.setattr(run, "_move", lambda *args: (shapes.append(args[3][1].shape), move(*args))[1])
    apart = generate(model, params, prompts, batch_size=8, **options)
    assert not shapes or set(shapes) == {(2, 4)}  # they only grow
    shapes.clear()
    together = generate(model, params, prompts, batch_size=40 * devices, **options)
    assert (10 * devices, 1) in shapes
    assert [x.tolist() for x in together] == [x.tolist() for x in apart]
    assert max(map(len, together)) > 64


def test_no_prompts_give_no_texts(models):
    _, model, params = models("gpt2")
    assert generate(model, params, [], max_new_tokens=3, eos_id=EOS) == []


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_texts_end_where_the_angles_of_the_model_do(scaling):
    """Beyond their original positions other angles apply; ours are NaN there, of which sampling would make token 0."""
    settings = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    architecture = family("llama").architecture({**settings, "num_hidden_layers": 1, "max_position_embeddings": 64})
    rope = dataclasses.replace(architecture.rope, scaling=scaling, original_positions=32)
    model = build_model(dataclasses.replace(architecture, rope=rope))
    message = "max_new_tokens: 24 and the longest prompt are 33 tokens, the model has 32 positions; lower it"
    with pytest.raises(UserError, match=message):
        generate(model, None, [[5] * 9], max_new_tokens=24, eos_id=EOS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"prompts": [[5], []]}, "prompt 2 has no tokens"),
        (
            {"max_new_tokens": 255},
            "max_new_tokens: 255 and the longest prompt are 257 tokens, the model has 256 positions",
        ),
    ],
)
def test_invalid_sampling_options_are_refused(change, message):
    settings = {"vocab_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 256}
    model = build_model(family("gpt2").architecture(settings))
    options = {"prompts": [[5, 6]], "max_new_tokens": 4, "eos_id": EOS} | change
    with pytest.raises(UserError, match=message):
        generate(model, None, options.pop("prompts"), **options)
