"""The sections of a run's config, as frozen dataclasses. A docstring below a field is its help text."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ColumnsConfig:
    """Columns of the data under the usual names: a column (question), a part of one (turns.0.content), a text made of
    several ("{instruction}\\n{input}"), or a number whose lower values are better (-rank). Empty: the column of that
    name."""

    prompt: str = ""
    """The text or conversation to answer."""
    chosen: str = ""
    """The better response."""
    rejected: str = ""
    """The worse response."""
    completion: str = ""
    """A single response."""
    completions: str = ""
    """A list of responses, with their scores."""
    messages: str = ""
    """A conversation whose last turn is the response."""
    scores: str = ""
    """Ratings of the completions."""
    score_chosen: str = ""
    """Rating of the better response."""
    score_rejected: str = ""
    """Rating of the worse response."""
    label: str = ""
    """Whether a single response is wanted."""
    weight: str = ""
    """Factor of the loss."""
    preference: str = ""
    """Probability that chosen is the better one."""
    system: str = ""
    """System message."""
    tools: str = ""
    """Functions that the model may call."""
    first: str = ""
    """One of two responses, of which `winner` or the scores say the better one."""
    second: str = ""
    """The other one."""
    winner: str = ""
    """column=value,value: its values if the first, and if the second response is better; null and `tie` are ties."""
    score_first: str = ""
    """Rating of the first response."""
    score_second: str = ""
    """Rating of the second response."""


@dataclass(frozen=True)
class DataConfig:
    """Comparisons, and how they are tokenized."""

    name: str = "files"
    """The source: files, hh, shp, stack_exchange, tldr, imdb, ultrafeedback, synthetic, a mixture of them, memory
    (examples given in Python), a published set (`dpo-jax data --list`), or your own module:function."""
    options: tuple[str, ...] = ()
    """Options of a module:function source, as name=value."""
    path: tuple[str, ...] = ()
    """Files, folders or hub ids that the source reads; for a mixture its parts, such as 0.5*files:pairs.jsonl."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    text_prompts: Literal["auto", "texts", "turns"] = "auto"
    """Prompts that are texts: leave them (texts), or make each a user's turn, which the chat template writes (turns);
    auto: turns if one of the training or held-out data stands beside a system message, tools or earlier turns."""
    responses: int | None = None
    """Responses per prompt. Required by ranking losses; fixed by all others."""
    split: str = "train"
    """The split to train on."""
    eval_path: tuple[str, ...] = ()
    """Held-out data; by default that of `path`."""
    eval_split: str = ""
    """The split to evaluate on; with eval_path, `split` by default."""
    eval_fraction: float = 0.05
    """Fraction of prompts to hold out when neither eval_path nor eval_split is set."""
    eval_examples: int | None = 256
    """Held-out comparisons to evaluate during training (None: all)."""
    max_length: int = 512
    """Maximum length of prompt plus response, in tokens."""
    max_prompt_length: int | None = None
    """Length to which the paper's truncation cuts a prompt, in tokens (None: 256, or half of max_length if less)."""
    truncation: Literal["paper_keep_end", "paper_keep_start", "keep_start", "refuse"] = "paper_keep_end"
    """How to truncate: as the original code (paper_keep_end, for HH, keeps the end of a prompt; paper_keep_start, for
    other data, its start), as TRL (keep_start), or not at all (refuse)."""
    degenerate: Literal["drop", "refuse", "keep"] = "drop"
    """What to do with empty or identical responses, and with responses to another prompt (7 in HH's test splits). The
    original code keeps them."""
    add_bos: bool | None = None
    """Prepend the tokenizer's BOS to every prompt (None: if the tokenizer does so by itself; the tokenizers of the
    paper's models do not, and the original code never does)."""
    boundary: Literal["auto", "separate", "joint"] = "auto"
    """Tokenize prompt and response separately (the original code) or jointly (TRL); auto: texts separately,
    conversations jointly."""
    chat_template: str = ""
    """File with a Jinja template for conversations; by default the tokenizer's template."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the template, as name=value."""
    skip_bad_rows: int = 0
    """Invalid rows to skip (and count) before failing."""
    flip_labels: float = 0.0
    """Noise: fraction of training pairs whose responses are swapped."""
    draw_labels: bool = False
    """Noise: sample the order of training pairs from their scores (Bradley-Terry)."""
    duplicate: float = 0.0
    """Noise: fraction of training comparisons to duplicate."""
    order: Literal["seeded", "original"] = "seeded"
    """Shuffle examples by `seed`, or prompts exactly as the original code does."""
    row_length: int | None = None
    """Tokens per packed row; by default chosen from the data."""
    rows: int | None = None
    """Packed rows per microbatch; by default chosen from the data."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy at the start."""

    path: str = ""
    """A Hugging Face folder, a hub id (owner/name or owner/name@revision), a run folder, or the YAML of a run, which is
    trained first if needed."""
    config: str = ""
    """A Hugging Face config.json (or a folder with one): random initialization."""
    tokenizer: str = ""
    """Tokenizer folder or hub id, or `synthetic`; by default that of `path`."""
    family: str = ""
    """`module:function` of a family of your own (dpo_jax/models/README.md); by default that of config.json."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of activations and matmuls; auto is bfloat16 on a GPU or TPU, float32 on a CPU. Trained parameters are
    always float32."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """Activations to recompute in the backward pass: none, all except projections and attention (dots), all (full).
    auto is none on a CPU, and on a GPU or TPU the first of them whose plan (`dpo-jax plan`) fits in its memory."""
    attention: Literal["auto", "chunks", "flash", "blocks", "cudnn", "splash"] = "auto"
    """Attention backend of packed rows: chunks of queries; blocks of queries and keys (memory linear in the row's
    length); or a kernel: flash (TPU and GPU, linear too), splash (TPU) or cudnn (GPU), whose masks have an entry for
    each pair of a row's tokens. All but chunks are used only if they match chunks in a test on this device; auto takes
    flash if it can be used, else blocks, else chunks, and chunks on a CPU."""
    router_loss: float | None = None
    """Weight of the router loss of a mixture of experts, over all tokens of a step; 0 for none. By default
    router_aux_loss_coef of its config.json if that sets output_router_logits, else 0."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters. Only the adapters are trained and saved; the reference is the initial policy."""

    rank: int = 0
    """Rank of the adapters; 0 trains the full model."""
    alpha: float = 16.0
    """Adapter outputs are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt, named as in transformers (q_proj, mlp.down_proj), or all-linear. Those of experts are named
    beside it (experts.gate_up_proj, experts.down_proj); dense MLPs and shared experts of a mixture are left alone, as
    PEFT takes their names for the experts'. Embedding and head (embed_tokens, lm_head) are trained in full."""
    path: str = ""
    """Adapters to start from: a PEFT folder, hub id or run folder. Fixes rank, alpha and targets. The reference is the
    model with them, as in TRL; the one without if reference.path names it."""
    base: Literal["", "nf4", "int8"] = ""
    """Quantization of the base model's projections (QLoRA); by default the dtype of its files."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference model."""

    path: str = ""
    """Same forms as model.path, except a YAML; by default the initial policy."""
    mode: Literal["cache", "online"] = "cache"
    """When to compute reference log-probs: once over the data, cached for later runs, or online for every batch."""
    sync_every: int = 0
    """Steps between updates of the reference towards the policy (0: never)."""
    sync_alpha: float = 0.6
    """Size of an update: reference = alpha * policy + (1 - alpha) * reference."""


@dataclass(frozen=True)
class SamplesConfig:
    """Completions of held-out prompts, sampled at every evaluation."""

    prompts: int = 4
    """Number of distinct prompts to show (0: none)."""
    kl_prompts: int | None = None
    """Number of prompts for the metric `eval_kl`, KL(policy || reference), whose completions are sampled at temperature
    1 (0: none; None: 64 if the loss has a reference and `prompts` is not 0)."""
    max_new_tokens: int = 64
    """Maximum length of a completion, in tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = None
    """Sample from the k most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with at least this probability (nucleus sampling)."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all remaining devices."""

    data: int = -1
    """Data parallelism: shards the batch, replicates the parameters."""
    fsdp: int = 1
    """FSDP: shards the batch and the parameters."""
    tensor: int = 1
    """Tensor parallelism: shards heads, MLP and vocabulary."""
    sequence: int = 1
    """For long rows: shards the tokens of a row, and the parameters as fsdp does. Row lengths are multiples of 128 *
    sequence."""
    expert: int = 1
    """Expert parallelism of a mixture: shards the batch and the experts, whose tokens devices exchange. It must divide
    the number of experts."""
    mode: Literal["jit", "pmap"] = "jit"
    """Transformation that compiles the step. pmap: data parallelism in one process."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over fsdp (and sequence); bfloat16 sends half the bytes, and rounds them. Not
    with tensor."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The arguments of `sharding.make_mesh`."""
        return self.data, self.fsdp, self.tensor, self.sequence, self.expert


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: Any = field(default_factory=lambda: {"name": "dpo"})
    """A loss by name or module:function, with its options; or a list of them, each with a weight."""
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "rmsprop"})
    """An optimizer by name, or module:function that returns an optax transformation, with its options."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: str = ""
    """Run folder; by default runs/<name of the config>."""
    batch_size: int = 64
    """Comparisons per step, over all devices."""
    epochs: int = 1
    """Passes over the training data, unless max_steps ends the run earlier."""
    max_steps: int | None = None
    """Maximum number of steps (None: all epochs)."""
    eval_every: int | str = 20_000
    """Training comparisons between evaluations, rounded down to full steps (0: only at the start and the end); or
    "100 steps", or "0.5 epochs"."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep, at least 2."""
    keep_best: str = ""
    """Metric of an evaluation (eval_loss, eval_rewards/accuracies, eval_rewards/margins, eval_kl, ...): save at every
    evaluation, keep the checkpoint with the best value too, and export it as model/."""
    patience: int = 0
    """Evaluations in a row without a better value of the metric of keep_best after which the run ends (0: never)."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    track: Literal["", "tensorboard", "wandb", "mlflow", "trackio"] = ""
    """Tracker to log to besides metrics.jsonl (needs the extra `track`). tensorboard writes into the run folder; the
    others read their environment variables."""
    max_nonfinite: int = 3
    """Consecutive steps with a non-finite loss or gradient before failing; their updates are skipped."""
    hang_seconds: float = 3600.0
    """Seconds without a step before the process prints all stacks and exits with code 1 (0: never)."""
    seed: int = 0
    """Seed of the data order, random initialization, label noise and samples."""
