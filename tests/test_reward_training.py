"""A reward model trained by the command: what it learns, the scores of its folder, and the commands on its run."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from test_reward_model import by_torch, torch_reward_model

from dpo_jax import cli
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.models import reward_head
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.records import Tokens
from dpo_jax.rewards import trained
from dpo_jax.rewards.registry import get_reward

ROOT = Path(__file__).parent.parent


def pairs(split, count):
    """The built-in world's first pairs, labelled by Bradley-Terry draws from its true reward."""
    return list(itertools.islice(synthetic.read((), split, 2), count))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a run that has trained a small reward model on the built-in world's pairs, by the command."""
    folder = tmp_path_factory.mktemp("world")
    config = json.loads((ROOT / "configs/models/synthetic.json").read_text())
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    (folder / "tiny.json").write_text(json.dumps(config | tiny))
    for split, count in (("train", 1500), ("test", 256)):
        rows = pairs(split, count)
        columns = ({"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]} for r in rows)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, columns)))
    data = {"path": ["train.jsonl"], "eval_path": ["test.jsonl"], "max_length": 96, "max_prompt_length": 32}
    settings = {
        "data": data,
        "model": {"config": "tiny.json", "tokenizer": "synthetic"},
        "loss": {"name": "bradley_terry"},
        "optim": {"name": "adamw", "learning_rate": 1e-2, "warmup_steps": 5},
        "batch_size": 64,
        "epochs": 2,
        "eval_every": 0,
    }
    (folder / "reward.yaml").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        cli.run_command(["train", "reward.yaml"])
    return folder


def ids_of(text):
    return np.array(synthetic.synthetic_tokenizer()(text)["input_ids"], np.int32)


@pytest.mark.slow
def test_a_run_learns_the_true_reward(world):
    """Held-out labels are Bradley-Terry draws of the true reward, of which its own order gets about 80% right."""
    found = [json.loads(line) for line in (world / "runs/reward/metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in found if "eval_rewards/accuracies" in row)
    assert abs(first["eval_rewards/accuracies"] - 0.5) < 0.2
    assert last["eval_rewards/accuracies"] > 0.68
    assert last["eval_loss"] < 0.6 < first["eval_loss"]
    rows = pairs("test", 200)
    prompts, texts = [r.prompt for r in rows] * 2, [r.responses[i] for i in (0, 1) for r in rows]
    scores = get_reward(f"model:{world / 'runs/reward'}")(prompts, texts)
    truth = [synthetic.synthetic_reward(p, t) for p, t in zip(prompts, texts, strict=True)]
    assert np.corrcoef(scores, truth)[0, 1] > 0.8


@pytest.mark.slow
def test_scores_of_texts_are_those_of_training(world):
    """model:FOLDER encodes as the run did: its accuracy on the held-out pairs is the run's own evaluation's."""
    rows = pairs("test", 256)
    score = get_reward(f"model:{world / 'runs/reward/model'}")
    chosen, rejected = (score([r.prompt for r in rows], [r.responses[i] for r in rows]) for i in (0, 1))
    found = json.loads((world / "runs/reward/eval.json").read_text())["metrics"]
    assert found["eval_rewards/margins"]["n"] == 256
    assert float((chosen - rejected).mean()) == pytest.approx(found["eval_rewards/margins"]["mean"], abs=1e-4)
    ids = [ids_of(r.prompt) for r in rows], [ids_of(f"{r.responses[0]}<eos>") for r in rows]
    np.testing.assert_allclose(trained.trained_reward(str(world / "runs/reward")).of_ids(*ids), chosen, atol=1e-5)
    assert score([], []).shape == (0,)


@pytest.mark.slow
def test_transformers_gives_the_runs_scores(world):
    model = torch_reward_model("llama", world / "runs/reward/model")
    prompts, texts = ["This film", "We saw the"], [" What a superb plot!", " I hated it."]
    rows = [Tokens(ids_of(p), (ids_of(f"{c}<eos>"),)) for p, c in zip(prompts, texts, strict=True)]
    with torch.no_grad():
        wanted = by_torch(model, rows).numpy()[:, 0]
    np.testing.assert_allclose(get_reward(f"model:{world / 'runs/reward'}")(prompts, texts), wanted, atol=1e-4)


@pytest.mark.slow
def test_commands_that_want_a_language_model_refuse_it(world, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(UserError, match="a reward model, which generates no text"):
        cli.run_command(["sample", "runs/reward", "--prompt", "This film"])
    with pytest.raises(UserError, match="a reward model generates no text and has no token log-probs"):
        cli.run_command(["eval", "runs/reward", "--reward", "synthetic"])
    with pytest.raises(UserError, match="a reward model generates no text"):
        cli.run_command(["pairs", "runs/reward", "x.jsonl", "--reward", "synthetic", "--data.name", "synthetic"])


@pytest.mark.slow
def test_a_reward_run_is_evaluated_and_exported(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("DPO_JAX_CACHE", str(world / "cache"))
    cli.run_command(["eval", "runs/reward"])
    assert "rewards/accuracies" in capsys.readouterr().out
    cli.run_command(["export", "runs/reward", "out"])
    _, config, params = load_folder(world / "out")
    jax.tree.map(np.testing.assert_array_equal, params, load_folder(world / "runs/reward/model")[2])
    assert config[reward_head.ENCODING]["max_length"] == 96
