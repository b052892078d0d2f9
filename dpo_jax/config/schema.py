"""The sections of a run's config, as frozen dataclasses. A docstring below a field is its help text."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """Comparisons, and how they become tokens."""

    name: str = "files"
    """The source: files, hh, shp, stack_exchange, tldr, imdb, ultrafeedback, synthetic, or a mixture of them."""
    options: tuple[str, ...] = ()
    """Options of a module:function source, name=value."""
    path: tuple[str, ...] = ()
    """Files, folders or hub ids, as the source takes them; of a mixture its parts, such as 0.5*files:pairs.jsonl."""
    responses: int | None = None
    """Responses to a prompt; a loss of rankings wants to be told, others need a number of their own."""
    split: str = "train"
    """The split that is trained on."""
    eval_path: tuple[str, ...] = ()
    """Data to evaluate on; by default that of `path`."""
    eval_split: str = ""
    """The split to evaluate on."""
    eval_fraction: float = 0.05
    """The share of prompts held out where neither eval_path nor eval_split names other data."""
    eval_examples: int | None = 256
    """Comparisons evaluated during training (None: all)."""
    max_length: int = 512
    """Longest prompt plus response, in tokens."""
    max_prompt_length: int = 256
    """To what the paper's truncation cuts a prompt."""
    truncation: Literal["paper_keep_end", "paper_keep_start", "keep_start", "refuse"] = "paper_keep_end"
    """The original's (keeping the end of a prompt, as it does for HH, or the start, as it does otherwise), TRL's
    keep_start, or none."""
    degenerate: Literal["drop", "refuse", "keep"] = "drop"
    """What to do with empty or identical responses, and with those that are no answer to the prompt (7 in HH's test
    splits); the original keeps them."""
    add_bos: bool | None = None
    """Put the tokenizer's BOS before every prompt (None: if the tokenizer does so itself, which those of the paper's
    models do not; the original never does)."""
    boundary: Literal["separate", "joint"] = "separate"
    """Prompt and response tokenised apart (the paper's code) or together (TRL)."""
    chat_template: str = ""
    """A file with a Jinja template for conversations; by default the tokenizer's own."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the template, name=value."""
    skip_bad_rows: int = 0
    """How many rows that cannot be used are counted and left out before one is an error."""
    flip_labels: float = 0.0
    """Noise: the share of training pairs whose responses change places."""
    draw_labels: bool = False
    """Noise: training pairs ordered by a Bradley-Terry draw from their scores."""
    duplicate: float = 0.0
    """Noise: the share of training comparisons that come twice."""
    order: Literal["seeded", "original"] = "seeded"
    """Rows shuffled by `seed`, or prompts exactly as the original code shuffles them."""
    row_length: int | None = None
    """Tokens in a row; by default chosen from the data."""
    rows: int | None = None
    """Rows in a microbatch; by default chosen from the data."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy at the start."""

    path: str = ""
    """A Hugging Face folder, owner/name of the hub (or owner/name@revision), a run folder, or the YAML of a run, which
    is then trained first if need be."""
    config: str = ""
    """A Hugging Face config.json (or folder with one): random initialisation."""
    tokenizer: str = ""
    """A tokenizer's folder or hub id, or `synthetic`; by default that of `path`."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations and products; parameters are float32 always."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but projections, everything."""
    attention: Literal["auto", "chunks", "cudnn", "splash"] = "auto"
    """What computes attention where texts are scored: our own chunks of queries, which every device has, or a kernel of
    a library (cudnn on GPUs, splash on TPUs), used only if it equals chunks in a test on this device; auto takes the
    device's, and chunks if that fails."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: only they are trained and kept, and the reference is the model without them."""

    rank: int = 0
    """Their rank; 0 trains the whole model."""
    alpha: float = 16.0
    """What adapters add is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules that are adapted, named as in transformers (q_proj, mlp.down_proj), or all-linear."""
    path: str = ""
    """A PEFT folder, owner/name of the hub or a run, with the adapters to start from, which have their own rank, alpha
    and targets."""
    base: Literal["", "nf4", "int8"] = ""
    """In what the projections of the model under the adapters are held (QLoRA); by default as in its files."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference."""

    path: str = ""
    """As model.path; by default the policy at the start."""
    mode: Literal["cache", "online"] = "cache"
    """One pass over the data, kept and reused by every later run, or just in time for every batch."""
    sync_every: int = 0
    """Steps after which the reference follows the policy (0: never)."""
    sync_alpha: float = 0.6
    """How far it follows: alpha * policy + (1 - alpha) * reference."""


@dataclass(frozen=True)
class SamplesConfig:
    """Completions of held-out prompts, written at every evaluation."""

    prompts: int = 4
    """How many prompts (0: none)."""
    max_new_tokens: int = 64
    """Longest completion."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with this probability."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes all that are left."""

    data: int = -1
    """Rows of a microbatch are split, parameters copied."""
    fsdp: int = 1
    """Rows of a microbatch and parameters are split."""
    tensor: int = 1
    """Heads, MLP and vocabulary are split."""
    mode: Literal["jit", "pmap"] = "jit"
    """What compiles the step; pmap for plain data parallelism on one machine, by its classic name."""


@dataclass(frozen=True)
class Config:
    """One run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: Any = field(default_factory=lambda: {"name": "dpo"})
    """A loss and its options, or a list of them with their weights."""
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "rmsprop"})
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: str = ""
    """The run folder; by default runs/<name of the config>."""
    batch_size: int = 64
    """Comparisons in a step, over all devices."""
    epochs: int = 1
    """Passes over the training data; max_steps may end the run earlier."""
    max_steps: int | None = None
    """Steps after which to stop."""
    eval_every: int = 20_000
    """Comparisons between evaluations, rounded down to whole steps (0: at the start and the end only)."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    keep_best: str = ""
    """A metric such as eval_loss: evaluations save too, and the checkpoint with its best value is kept as well."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    track: Literal["", "tensorboard", "wandb"] = ""
    """Where metrics are shown beside metrics.jsonl (extra `track`): in the run folder, or as wandb is set up."""
    max_nonfinite: int = 3
    """Steps in a row with a loss or gradient that is not finite, none of them applied, after which to stop."""
    hang_seconds: float = 3600.0
    """Seconds without a step after which all stacks are printed and the process ends with code 1 (0: never)."""
    seed: int = 0
    """Of the order of the data, random initialisation and samples."""
