"""The learned reward of PPO: a reward model, trained on the pairs as a run of its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, SamplesConfig
from dpo_jax.config.yaml import as_lists
from dpo_jax.experiments.world import World, sample_completions, score_completions
from dpo_jax.records import Array
from dpo_jax.rewards.words import Reward
from dpo_jax.training import loop, setup
from dpo_jax.training.plan import with_remat


def centered(reward: Reward, world: World, prompts: Sequence[Array]) -> Reward:
    """Returns a reward less its mean over completions of the reference, one for each prompt.

    Pairs determine a reward up to a constant. Until PPO's value function has learned it, a positive one pays for short
    completions and a negative one for long ones. Ziegler et al. 2019 (arXiv 1909.08593, section 2.1) center it so too.
    """
    completions = sample_completions(world, world.reference, prompts)
    mean = float(np.mean(score_completions(world, reward, prompts, completions)))
    return lambda texts, answers: np.asarray(reward(texts, answers)) - mean


def train_reward_model(settings: FrontierConfig, folder: Path) -> Path:
    """Trains a reward model on the pairs of a folder, or resumes its run; returns the run folder."""
    config = reward_config(settings, folder)
    loop.train_run(setup.setup_run(with_remat(config)))
    return Path(config.run)


def reward_config(settings: FrontierConfig, folder: Path) -> Config:
    """Returns the config of the reward model's run, with all options of loss and optimizer, as its folder has it."""
    paths = {"path": (str(folder / "pairs.jsonl"),), "eval_path": (str(folder / "held_out.jsonl"),)}
    data = dataclasses.replace(
        settings.data, name="files", split="train", eval_split="train", eval_examples=None, **paths
    )
    adamw = {"name": "adamw", "learning_rate": settings.reward_model.learning_rate, "max_grad_norm": 1.0}
    config = Config(
        data=data, model=settings.model, loss={"name": "bradley_terry"}, optim={**adamw, "warmup_steps": 10},
        samples=SamplesConfig(0), batch_size=settings.batch_size, epochs=settings.reward_model.epochs, eval_every=0,
        run=str(folder / "reward"), seed=settings.seed,
    )  # fmt: skip
    return parse_config(Config, as_lists(dataclasses.asdict(config)))
