"""The config of a call from Python: data, held-out data and functions as it names them."""

import functools

import pytest
from words import make_tokenizer

from dpo_jax import UserError, losses
from dpo_jax.config.schema import ModelConfig
from dpo_jax.data.sources import memory
from dpo_jax.losses.registry import REGISTRY
from dpo_jax.rewards.registry import KEPT, get_reward, keep_reward
from dpo_jax.runs.settings import call_settings
from dpo_jax.training.load import load_run_tokenizer

ROWS = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
KEYS = {"run": "runs/x", "model": "m"}


def settings(data=None, eval_data=None, loss=None, optimizer=None, **keys):
    return call_settings(None, data, eval_data, loss, optimizer, KEYS | keys)[0]


@pytest.mark.parametrize(
    ("data", "held_out", "fits"),
    [
        ("t.jsonl", "e.jsonl", True),
        (None, "e.jsonl", True),
        ({"path": ["t.jsonl"]}, "e.jsonl", True),
        ({"name": "hh"}, "e.jsonl", True),
        (ROWS, ROWS, True),
        ({"path": ["t.jsonl"]}, ROWS, False),
        (None, ROWS, False),
        (ROWS, "e.jsonl", False),
    ],
)
def test_held_out_data_are_kept_as_the_training_data_are(data, held_out, fits):
    try:
        if not fits:
            with pytest.raises(UserError, match="eval_data: give data and eval_data both as paths, or both as"):
                settings(data, held_out)
        elif data is ROWS:
            assert memory.KEPT[settings(data, held_out).data.eval_path[0]] == ROWS
        else:
            assert settings(data, held_out).data.eval_path == ("e.jsonl",)
    finally:
        memory.KEPT.clear()


class Squared:
    def __call__(self, lp, *, beta: float = 0.1):
        return (beta * lp.policy[:, 0]) ** 2


def test_losses_without_a_name_are_refused():
    with pytest.raises(UserError, match="loss: a Squared has no name for the config; give a function that calls it"):
        settings(ROWS, loss=Squared())
    with pytest.raises(UserError, match="optimizer: a partial has no name for the config"):
        settings(ROWS, optimizer=functools.partial(losses.dpo, beta=1.0))
    assert settings(ROWS, loss=losses.dpo).loss["name"] == "dpo"
    assert not [name for name in REGISTRY if "Squared" in name]
    memory.KEPT.clear()


class Long:
    def __call__(self, prompts, completions, scale=1.0):
        return [scale * len(text) for text in completions]


def test_rewards_may_be_partials_and_objects():
    for reward, score in ((Long(), 2.0), (functools.partial(Long.__call__, Long(), scale=3.0), 6.0)):
        name = keep_reward(reward)
        assert get_reward(name)(["p"], ["ab"]).tolist() == [score]
        del KEPT[name]


def test_a_tokenizer_alone_is_enough_to_look_at_data(tmp_path):
    make_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    assert load_run_tokenizer(ModelConfig(tokenizer=str(tmp_path / "tokenizer"))).eos_token == "<eos>"
    with pytest.raises(UserError, match=r"^model: name one"):
        load_run_tokenizer(ModelConfig())
