"""Configs of the commands. Some extend the config of a run with keys of the command, others have only their own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dpo_jax.config.schema import Config, DataConfig, ModelConfig
from dpo_jax.rewards.endpoint import EndpointConfig

DRAWN = {name: f"samples.{name}" for name in ("temperature", "max_new_tokens", "top_k", "top_p")} | {"seed": "seed"}
"""Options of the commands that sample, and the key of a run's config that each of them sets."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The choice of a checkpoint of a run."""

    checkpoint: str = ""
    """Checkpoint of the run: best (by its keep_best), last, or a step; by default that of model/, which is the best if
    the run has keep_best, else the last."""


@dataclass(frozen=True)
class EvalConfig(Config, CheckpointConfig):
    """A run's config, and the metrics to compute besides those of its loss."""

    SHORT: ClassVar = DRAWN
    reward: str = ""
    """Reward of completions: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER, classifier:FOLDER#LABEL
    or module:function."""
    prompts: int = 256
    """Held-out prompts to sample from both models, for KL and reward (0: none)."""
    show: int = 3
    """Prompts to print with the completions of both models."""
    name: str = ""
    """Store the metrics as eval_NAME.json beside the run's own eval.json; for data other than the run's, of which the
    report then shows KL and log-ratio."""
    per_token: str = ""
    """A .jsonl file to write: log-probs of every token of the held-out responses, by position."""
    suite: str = ""
    """Standard evaluations in place of the held-out data: ifeval, rewardbench, rewardbench2, alpaca_eval, arena_hard,
    lm_eval:TASK, several with commas (lm_eval:TASK,TASK takes tasks up to the next suite)."""
    suite_data: tuple[str, ...] = ()
    """Files or folders of a suite's data, as SUITE=PATH for one of several suites; by default the hub's. For lm_eval a
    folder of task YAMLs."""
    suite_limit: int | None = None
    """First examples of each suite (of each task of lm_eval) to use (None: all)."""
    suite_max_new_tokens: int | None = None
    """Maximum length of a suite's answers, in tokens (None: that of the suite: ifeval 1280, alpaca_eval 2048,
    arena_hard 4096)."""
    suite_num_fewshot: int | None = None
    """Examples in a prompt of lm_eval (None: the task's own number)."""
    suite_out: str = ""
    """Folder of the suites' results; by default the run, or runs/<name>.eval for a model folder."""
    raw: bool | None = None
    """Leave a suite's prompt as it is. By default (None) it is a turn of a user, written by the chat template, if the
    tokenizer or the run has one and the run was not trained on texts; False makes it one in any case. Tasks of lm_eval
    are texts unless this is False."""


@dataclass(frozen=True)
class SampleConfig(Config, CheckpointConfig):
    """A run's config, and the prompts to complete."""

    SHORT: ClassVar = DRAWN | {"reference": "show_reference"}
    prompt: tuple[str, ...] = ()
    """Prompts to complete."""
    raw: bool | None = None
    """Leave a prompt as it is. By default (None) it is a turn of a user, written by the chat template, if the tokenizer
    or the run has one and the run was not trained on texts; False makes it one in any case."""
    system: str = ""
    """Message of the system before a prompt that is a turn of a user."""
    chat: bool = False
    """Keep a conversation going: turns are read from standard input, answers are shown while they are sampled."""
    show_reference: bool = False
    """With --chat: show the reference's answer too; only the policy's goes into the conversation."""


@dataclass(frozen=True)
class LookConfig(Config):
    """A run's config, and options of the data page."""

    out: str = ""
    """HTML file to write; by default runs/<name of the config>.data.html."""
    show: int = 4
    """Comparisons to show as the model sees them."""


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run's config, and the devices to plan it for."""

    target: str = ""
    """Accelerators to compile for, which need not exist: tpu:v5p:4x4x4, tpu:2xv5p:4x4x4 (two slices), gpu:h100:1x8
    (hosts x GPUs); v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200. Needs dpo_jax[aot-tpu] or dpo_jax[aot-gpu]."""
    devices: int = 0
    """Number of devices (0: the devices of this machine), emulated on the CPU in place of GPUs; a target says more."""
    memory: float | None = None
    """Memory of each device, in GB (None: that of the target, what JAX may take of this machine's, else 80). A plan may
    take 90% of it, on GPUs 90% of the part that JAX takes: 75%, or XLA_CLIENT_MEM_FRACTION."""
    json: bool = False
    """Print the plan of a target as JSON."""
    step_only: bool = False
    """Compile a target's step alone, which is faster: not the reference's pass, nor sampling."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The model that answers."""

    tokenizer: str = ""
    """Tokenizer folder or hub id; by default the model's."""


@dataclass(frozen=True)
class PairsConfig(CheckpointConfig):
    """Preference pairs built from a model's own answers, or from other data."""

    by: Literal["reward", "correction", "self", "others", "corrupted", "paired", "single"] = "reward"
    """How to build a pair (chosen > rejected). From the model's answers: `reward`, by the scores of several answers;
    `correction`, the corrected answer > the answer; `self`, the data's answer > the model's. From data alone: `others`,
    the answer > an answer to another prompt; `corrupted`, the answer > the answer with damaged words; `paired`, every
    wanted > every unwanted response of unpaired examples; `single` turns pairs into unpaired examples."""
    reward: str = ""
    """Reward of an answer: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER, classifier:FOLDER#LABEL or
    module:function."""
    corrections: str = ""
    """A YAML of patterns and replacements, as for Python's re.sub."""
    data: DataConfig = field(default_factory=DataConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompts: int | None = None
    """Number of distinct prompts of the data (None: all)."""
    completions: int = 4
    """Answers to sample per prompt."""
    label: Literal["bradley_terry", "ranked", "best_worst"] = "bradley_terry"
    """How scores label pairs: sampled with probability sigmoid(difference), by order, or only best > worst."""
    max_new_tokens: int = 64
    """Maximum length of an answer, in tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = None
    """Sample from the k most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with at least this probability (nucleus sampling)."""
    batch_size: int = 256
    """Answers to sample at a time."""
    seed: int = 0
    """Seed of samples, labels and damaged words."""


@dataclass(frozen=True)
class WinrateConfig(Config, CheckpointConfig):
    """A run's config, the texts to compare and the judge."""

    SHORT: ClassVar = {key: to for key, to in DRAWN.items() if key != "temperature"}  # the policy has several
    judge: str = ""
    """A reward (happy, synthetic, vader, words:FILE, logistic:FILE, model:FOLDER, classifier:FOLDER#LABEL,
    module:function), or endpoint (asks a language model)."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    question: str = "dialogue"
    """Question for the endpoint: dialogue, summary, concise, or a file that contains {prompt}, {first} and {second}."""
    order: Literal["random", "both"] = "random"
    """Order of the two responses in a question: random, or both orders (two questions)."""
    against: str = "data"
    """Opponent: the first response of each held-out comparison (data), or a run or model, at samples.temperature."""
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Sampling temperatures of the policy; 0 is greedy."""
    best_of: tuple[int, ...] = (1,)
    """Values of N: judge the best of N samples of each prompt; 1 judges the sample itself."""
    best_by: str = ""
    """Reward that selects the best sample; its mean is reported too."""
    prompts: int = 256
    """Distinct held-out prompts to use, from the first on."""
    out: str = ""
    """Folder of the results; by default RUN/winrate, or runs/<name>.winrate for a model folder."""


@dataclass(frozen=True)
class ExportConfig(CheckpointConfig):
    """A Hugging Face folder of a checkpoint, with a model card."""

    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """dtype of the weights; by default that of the initial model."""
    language_model: bool = False
    """Of a model that reads images too, write the language model alone."""
    push: str = ""
    """Repository of the hub, owner/name, to upload the folder to; needs a token: HF_TOKEN, or hf auth login."""
    public: bool = False
    """Whether a repository that --push creates is public; one that exists keeps its visibility."""


@dataclass(frozen=True)
class OptimumConfig:
    """The exact optimum, estimated from completions of the reference."""

    completions: int = 256
    """Completions per held-out prompt; used for best-of-N too."""
    betas: tuple[float, ...] = (8.0, 4.0, 2.0, 1.5, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2)
    """Betas to compute it for."""


@dataclass(frozen=True)
class OnlineConfig:
    """Methods that train on completions of the policy: PPO and online DPO."""

    learning_rate: float = 1.41e-5
    """Learning rate of Adam at the first step; decays linearly to 0."""
    rollouts: int = 256
    """Completions per step."""
    max_steps: int = 100
    """Steps of each run."""
    eval_every: int = 25
    """Steps between measurements."""
    init_kl_coef: float = 0.2
    """Initial coefficient of PPO's KL penalty, in reward per nat; it is then adapted to the target KL."""
    horizon: float = 10_000.0
    """Time constant of that adaptation, in completions."""
    ppo_epochs: int = 4
    """Passes of PPO over the completions of a step."""


@dataclass(frozen=True)
class RewardModelConfig:
    """The learned reward of PPO: a Bradley-Terry reward model, initialized from the reference."""

    learning_rate: float = 1e-5
    """Learning rate of AdamW."""
    epochs: int = 1
    """Passes over the pairs."""


@dataclass(frozen=True)
class FrontierConfig:
    """Reward against KL for each method at several strengths (figure 2 (left) of the paper)."""

    reward: str
    """True reward of completions: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER,
    classifier:FOLDER#LABEL or module:function."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "rmsprop"})
    prompts: int | None = None
    """Distinct training prompts to build pairs from (None: all)."""
    completions: int = 4
    """Completions per prompt; 4 make 6 pairs (paper, appendix C.1)."""
    label: Literal["bradley_terry", "ranked", "best_worst"] = "bradley_terry"
    """How scores label pairs, as in dpo-jax pairs."""
    max_new_tokens: int = 64
    """Maximum length of a completion, in tokens; sampled at temperature 1."""
    dpo: tuple[float, ...] = (0.05, 0.1, 1.0, 5.0)
    """Betas of DPO."""
    ppo: tuple[float, ...] = (3.0, 6.0, 9.0, 12.0)
    """Target KLs of PPO with the learned reward."""
    ppo_gt: tuple[float, ...] = (3.0, 6.0, 9.0, 12.0)
    """Target KLs of PPO with the true reward."""
    online_dpo: tuple[float, ...] = ()
    """Betas of online DPO: pairs of the policy's completions, labelled by the true reward at every step."""
    unlikelihood: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
    """Alphas of unlikelihood."""
    preferred_ft: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Seeds of supervised fine-tuning on the chosen responses."""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Values of N for best-of-N sampling from the reference."""
    optimum: OptimumConfig = field(default_factory=OptimumConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    batch_size: int = 64
    """Pairs per step."""
    max_steps: int = 100
    """Steps of each run on pairs."""
    eval_every: int = 25
    """Steps between measurements."""
    eval_prompts: int = 256
    """Distinct held-out prompts; every policy is sampled once from each."""
    run: str = ""
    """Folder of the results; by default runs/<name of the config>."""
    seed: int = 0
    """Seed of all random numbers."""
    seeds: int = 1
    """Number of seeds, from seed on; each samples its own pairs and trains every run. Intervals are then over seeds."""


@dataclass(frozen=True)
class LeaderboardConfig:
    """Losses in worlds whose optimum is known."""

    losses: tuple[str, ...] = ()
    """Losses by name, or points of the axes such as link=savage,target=constant; by default all that train a policy."""
    beta: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Strengths of every loss that has a beta; its other options have their defaults."""
    seeds: int = 8
    """Worlds, each with its own data; intervals are over them."""
    max_steps: int = 600
    """Steps of each run."""
    run: str = "runs/leaderboard"
    """Folder of the results."""


COMMAND_CONFIGS: dict[str, type] = {
    "train": Config,
    "sweep": Config,
    "eval": EvalConfig,
    "sample": SampleConfig,
    "data": LookConfig,
    "pairs": PairsConfig,
    "winrate": WinrateConfig,
    "export": ExportConfig,
    "frontier": FrontierConfig,
    "leaderboard": LeaderboardConfig,
    "plan": PlanConfig,
}
"""command -> its config. The other commands take arguments only."""
