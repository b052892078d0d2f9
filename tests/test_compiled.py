"""Programs that a run compiles: few, and found again on disk by the next run of the same shapes."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from jax import monitoring

import dpo_jax
from dpo_jax.data.sources import synthetic

ROOT = Path(__file__).parent.parent
REQUESTS, HITS, MISSES = (
    f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")
)


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


@pytest.mark.slow
def test_another_run_of_the_same_shapes_compiles_nothing(tmp_path, compiled):
    """Beta, learning rate, seed, folder and the words of the data are no part of a program, nor is the process."""
    pairs = list(islice(synthetic.read((), "train", 2), 60))
    rows = [dict(zip(("prompt", "chosen", "rejected"), (r.prompt, *r.responses), strict=True)) for r in pairs]
    small = json.loads((ROOT / "configs/models/synthetic.json").read_text()) | {"hidden_size": 32}
    (tmp_path / "tiny.json").write_text(json.dumps(small))
    asked = []
    model = {"config": str(tmp_path / "tiny.json"), "tokenizer": "synthetic"}
    first = trained(tmp_path, "a", rows, model=model, callbacks=[lambda *_: asked.append(compiled[REQUESTS])])
    # Random weights, reference, samples, their KL, the state, the evaluation, the step, and two small ones.
    assert 0 < asked[0] <= 9
    assert compiled[REQUESTS] == compiled[HITS] + compiled[MISSES]
    compiled.clear()
    others = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    optim = {"name": "rmsprop", "learning_rate": 2e-4, "warmup_steps": 1}
    keys = {"loss": {"name": "dpo", "beta": 0.7}, "optim": optim, "seed": 5}
    trained(tmp_path, "b", others, model={"path": str(first / "model")}, **keys)
    assert compiled[REQUESTS] == compiled[HITS] > 0
