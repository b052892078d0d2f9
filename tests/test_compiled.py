"""Programs that a run compiles: few, and found again on disk by the next run of the same shapes."""

import json
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

import dpo_jax
from dpo_jax.data.sources import synthetic
from dpo_jax.models.attention import packed_attention

ROOT = Path(__file__).parent.parent
REQUESTS, HITS, MISSES = (
    f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")
)


# Of the first step of a process: weights, log-probs of data and of samples, samples, the state, metrics, the step. JAX
# keeps those that it has compiled before.
ONCE = ("stage", "_threefry_seed", "<lambda>", "_prepare", "_begin", "_add", "own", "metrics", "step")
BEFORE_A_STEP = Counter({**dict.fromkeys((f"jit({name})" for name in ONCE), 1), "jit(logps)": 2})


@pytest.fixture
def compiled():
    """Programs asked for, found and compiled since the test began; JAX counts them where a cache is set."""
    counts = Counter()

    def listen(event, **_):
        counts[event] += 1

    monitoring.register_event_listener(listen)
    yield counts
    monitoring.unregister_event_listener(listen)


def trained(folder, name, rows, callbacks=(), **keys):
    """Returns the folder of a run of two steps, evaluated before and after, with samples and their KL."""
    config = {
        "data": {"max_length": 96, "max_prompt_length": 32, "eval_fraction": 0.2},
        "samples": {"prompts": 2, "kl_prompts": 2, "max_new_tokens": 4},
        "optim": {"name": "rmsprop", "learning_rate": 1e-3, "warmup_steps": 1},
        **{"batch_size": 8, "max_steps": 2, "loss": {"name": "dpo", "beta": 0.1}},
    }
    return dpo_jax.train(config | keys, data=rows, callbacks=[*callbacks], run=str(folder / name)).folder


def rows_and_model(folder):
    """Returns 60 comparisons, and a section `model` of small random weights."""
    pairs = list(islice(synthetic.read((), "train", 2), 60))
    rows = [dict(zip(("prompt", "chosen", "rejected"), (r.prompt, *r.responses), strict=True)) for r in pairs]
    small = json.loads((ROOT / "configs/models/synthetic.json").read_text()) | {"hidden_size": 32}
    (folder / "tiny.json").write_text(json.dumps(small))
    return rows, {"config": str(folder / "tiny.json"), "tokenizer": "synthetic"}


@pytest.fixture
def programs():
    """Names of the programs compiled, or read, since the test began."""
    names = []

    def listen(event, duration_secs, **about):
        names.extend([about["fun_name"]] if event.endswith("backend_compile_duration") else [])

    monitoring.register_event_duration_secs_listener(listen)
    yield names
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_another_run_of_the_same_shapes_compiles_nothing(tmp_path, compiled, programs):
    """Beta, learning rate, seed, folder and the words of the data are no part of a program, nor is the process."""
    rows, model = rows_and_model(tmp_path)
    at_steps = []
    first = trained(tmp_path, "a", rows, model=model, callbacks=[lambda *_: at_steps.append(Counter(programs))])
    assert at_steps[0] <= BEFORE_A_STEP
    assert at_steps[0]["jit(step)"] == 1
    assert compiled[REQUESTS] == compiled[HITS] + compiled[MISSES]
    compiled.clear()
    others = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    optim = {"name": "rmsprop", "learning_rate": 2e-4, "warmup_steps": 1}
    keys = {"loss": {"name": "dpo", "beta": 0.7}, "optim": optim, "seed": 5}
    trained(tmp_path, "b", others, model={"path": str(first / "model")}, **keys)
    assert compiled[REQUESTS] == compiled[HITS] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"jit(logps)": 1}),
        ({"loss": {"name": "dpo", "wpo": True}}, {"jit(logps)": 1, "jit(ref_logps)": 1}),
        ({"lora": {"rank": 2}}, {"jit(logps)": 1, "jit(ref_logps)": 1}),
    ],
    ids=["whole", "confidence", "adapters"],
)
def test_reference_and_evaluation_share_a_program(tmp_path, monkeypatch, programs, more, expected):
    """If it is frozen and a whole policy. Then policy and reference are the same to the last bit at the start."""
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))  # no reference of another test
    rows, model = rows_and_model(tmp_path)
    folder = trained(tmp_path, "a", rows, model=model, samples={"prompts": 0}, **more)
    assert {name: n for name, n in Counter(programs).items() if name in ("jit(logps)", "jit(ref_logps)")} == expected
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert abs(first["eval_logratio"]) <= (0 if len(expected) == 1 else 1e-4)
    assert abs(first["eval_loss"] - np.log(2)) < 1e-5 or "wpo" in str(more)


def test_a_layer_is_traced_once():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model, params = dpo_jax.init_model({"model_type": "llama", "vocab_size": 32, **sizes})
    calls = []

    def attend(*args):
        calls.append(len(args))
        return packed_attention(*args)

    ids = jnp.ones((1, 8), jnp.int32)
    jax.eval_shape(partial(model.hidden, attend=attend), params, ids, ids, ids, 0 * ids)
    assert len(calls) == 1
