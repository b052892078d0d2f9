"""What each command is set to: the config of a run with keys of its own beside it, or keys of its own alone."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_jax.config.schema import Config, DataConfig, ModelConfig
from dpo_jax.rewards.endpoint import EndpointConfig


@dataclass(frozen=True)
class EvalConfig(Config):
    """A run's config, and what to measure beside its held-out comparisons."""

    reward: str = ""
    """A reward of completions: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER,
    classifier:FOLDER#LABEL or module:function."""
    prompts: int = 256
    """Held-out prompts from which both models are sampled, for KL and reward (0: none)."""
    show: int = 3
    """Prompts printed with both models' completions."""
    per_token: str = ""
    """A .jsonl to write the log-probs of every token of the held-out responses to, by position."""


@dataclass(frozen=True)
class SampleConfig(Config):
    """A run's config, and what to complete."""

    prompt: tuple[str, ...] = ()
    """Texts to complete."""


@dataclass(frozen=True)
class LookConfig(Config):
    """A run's config, and how to show its data."""

    out: str = ""
    """The page; by default runs/<name of the config>.data.html."""
    show: int = 4
    """Comparisons shown as the model sees them."""


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run's config, and the devices that it is planned for."""

    devices: int = 0
    """How many devices (0: those that are here)."""
    memory: float = 80.0
    """GB of memory that each has."""


@dataclass(frozen=True)
class PairsConfig:
    """Preferences made of a model's own answers, or of data of another form."""

    by: Literal["reward", "correction", "self", "others", "corrupted", "paired", "single"] = "reward"
    """What makes a pair. Of a model's own answers: `reward`, scores of several of them; `correction`, an answer against
    itself with the corrections made; `self`, the data's answer against the model's. Of data alone: the answer against
    one to another prompt (`others`) or against itself with words damaged (`corrupted`); every wanted response against
    every unwanted one of rows with labels (`paired`), and pairs back to such rows (`single`)."""
    reward: str = ""
    """What scores an answer: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER,
    classifier:FOLDER#LABEL or module:function."""
    corrections: str = ""
    """A YAML of patterns and what stands in their place, as in Python's re.sub."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: str = ""
    """By default the model's own."""
    prompts: int | None = None
    """How many distinct prompts of the data (None: all)."""
    completions: int = 4
    """A model's answers to each prompt."""
    label: Literal["bradley_terry", "ranked", "best_worst"] = "bradley_terry"
    """Winners drawn with probability sigmoid(difference), by score, or only the best against the worst."""
    max_new_tokens: int = 64
    """Longest answer."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with this probability."""
    batch_size: int = 256
    """Answers sampled at a time."""
    seed: int = 0
    """Of the samples, the labels and the damage."""


@dataclass(frozen=True)
class WinrateConfig(Config):
    """A run's config, and what is compared with what by whom."""

    judge: str = ""
    """A reward (happy, synthetic, vader, words:FILE, logistic:FILE, model:FOLDER, classifier:FOLDER#LABEL,
    module:function), or endpoint: a model is asked."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    question: str = "dialogue"
    """What a model is asked: dialogue, summary, concise, or a file with {prompt}, {first} and {second} in it."""
    order: Literal["random", "both"] = "random"
    """In which order a model reads the two responses: one that is drawn, or one and then the other."""
    against: str = "data"
    """The first response of each held-out comparison (data), or a run or model sampled at samples.temperature."""
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """At which the policies are sampled; 0 is greedy."""
    best_of: tuple[int, ...] = (1,)
    """The best of so many samples of each prompt is judged; 1 is the sample itself."""
    best_by: str = ""
    """The reward that says which is the best; its mean is reported too."""
    prompts: int = 256
    """The first distinct held-out prompts, so many of them or as many as there are."""
    out: str = ""
    """The folder of what was found; by default RUN/winrate, or runs/<name>.winrate for a model folder."""


@dataclass(frozen=True)
class OptimumConfig:
    """The exact optimum, from the reference's own completions."""

    samples: int = 256
    """Completions of each held-out prompt, from which the best of N are too."""
    betas: tuple[float, ...] = (8.0, 4.0, 2.0, 1.5, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2)
    """The betas at which it is wanted."""


@dataclass(frozen=True)
class OnlineConfig:
    """What learns from the policy's own completions: PPO and online DPO."""

    learning_rate: float = 1.41e-5
    """Of Adam in the first step; it falls in a line to 0."""
    rollouts: int = 256
    """Completions of a step."""
    max_steps: int = 100
    """Steps of each run."""
    eval_every: int = 25
    """Steps between measurements."""
    init_kl_coef: float = 0.2
    """PPO's price of a nat of KL at the start, which then follows the target."""
    horizon: float = 10_000.0
    """Completions in which it is corrected."""


@dataclass(frozen=True)
class RewardModelConfig:
    """The learned reward of PPO: Bradley-Terry on the pairs, from the reference with a scalar head."""

    learning_rate: float = 1e-5
    """Of AdamW."""
    epochs: int = 1
    """Passes over the pairs."""


@dataclass(frozen=True)
class FrontierConfig:
    """The paper's figure 2 (left): reward against KL, of each method at several strengths."""

    reward: str
    """The true reward of a completion: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER,
    classifier:FOLDER#LABEL or module:function."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "rmsprop"})
    prompts: int | None = None
    """Distinct training prompts of whose completions the pairs are made (None: all)."""
    completions: int = 4
    """Completions of each of them; 4 make 6 pairs (paper, appendix C.1)."""
    label: Literal["bradley_terry", "ranked", "best_worst"] = "bradley_terry"
    """How a pair is labelled, as in dpo-jax pairs."""
    max_new_tokens: int = 64
    """Longest completion; all are drawn at temperature 1."""
    dpo: tuple[float, ...] = (0.05, 0.1, 1.0, 5.0)
    """Betas of DPO."""
    ppo: tuple[float, ...] = (3.0, 6.0, 9.0, 12.0)
    """Target KLs of PPO with the learned reward."""
    ppo_gt: tuple[float, ...] = (3.0, 6.0, 9.0, 12.0)
    """Target KLs of PPO with the true reward."""
    online_dpo: tuple[float, ...] = ()
    """Betas of DPO on pairs of the policy's own completions, labelled by the true reward in every step."""
    unlikelihood: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
    """Alphas of unlikelihood."""
    preferred_ft: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Seeds of fine-tuning on the chosen responses."""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """The best of so many completions of the reference."""
    optimum: OptimumConfig = field(default_factory=OptimumConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    batch_size: int = 64
    """Pairs in a step."""
    max_steps: int = 100
    """Steps of each run on pairs."""
    eval_every: int = 25
    """Steps between measurements."""
    eval_prompts: int = 256
    """Distinct held-out prompts, from each of which every policy is sampled once."""
    run: str = ""
    """The folder of what is found; by default runs/<name of the config>."""
    seed: int = 0
    """Of everything random."""


COMMAND_CONFIGS: dict[str, type] = {
    "train": Config,
    "sweep": Config,
    "eval": EvalConfig,
    "sample": SampleConfig,
    "data": LookConfig,
    "pairs": PairsConfig,
    "winrate": WinrateConfig,
    "frontier": FrontierConfig,
    "plan": PlanConfig,
}
"""command -> what it is set to; the other commands have no options to speak of."""
