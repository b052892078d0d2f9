"""One YAML is one experiment: frozen dataclasses, strict, with dotted overrides from the command line.

The YAML is flattened to arguments which stand before those of the command line, so that both are read by one parser
and get the same errors. A loss or an optimiser is chosen by name, and its options are the keyword-only parameters of
the functions of that name: a new variant needs no line here. Such a section may be a list, and then its keys are
counted from 0: `loss: [{name: dpo}, {name: sft}]` is `--loss.0.name dpo --loss.1.name sft`.
"""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro

from dpo_jax import options
from dpo_jax.keys import Pairs, arguments, closest, flatten, read_yaml
from dpo_jax.options import variants
from dpo_jax.records import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Comparisons, and how they become tokens."""

    name: str = "files"
    """The source: files, hh, shp, stack_exchange, tldr, imdb, ultrafeedback, synthetic, or a mixture of them."""
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
    """The original's (keeping the end or the start of a prompt), TRL's keep_start, or none."""
    degenerate: Literal["drop", "refuse", "keep"] = "drop"
    """What to do with empty or identical responses."""
    add_bos: bool | None = False
    """Put the tokenizer's BOS before every prompt (the original never does; None: as the tokenizer does)."""
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
class Model:
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
class Lora:
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
class Reference:
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
class Samples:
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
class Mesh:
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

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    reference: Reference = field(default_factory=Reference)
    loss: Any = field(default_factory=lambda: {"name": "dpo"})
    """A loss and its options, or a list of them with their weights."""
    optim: dict[str, Any] = field(default_factory=lambda: {"name": "rmsprop"})
    samples: Samples = field(default_factory=Samples)
    mesh: Mesh = field(default_factory=Mesh)
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


def _options(section: str, name: str) -> type:
    """Returns a dataclass of `name` and the options of the variant of that name, with their help texts."""
    functions = variants()[section][name]
    fields: list[Any] = [("name", str, field(default=name))]
    for function in functions:
        for option in options.of(function):
            annotated = Annotated[option.kind, tyro.conf.arg(help=option.help)]
            fields.append((option.name, annotated, field(default=option.default)))
    new = dataclasses.make_dataclass(section.capitalize(), fields, frozen=True)
    new.__doc__ = f"{name}: {options.summary(functions[0])}"
    return new


def _chosen(pairs: Pairs, section: str, default: str) -> dict[str, str]:
    """Returns the name that is chosen in a section, as {"": name}, or in each element of a list, {"0": name, ...}."""
    elements = sorted({k.split(".")[1] for k, _ in pairs if k.startswith(f"{section}.") and k.split(".")[1].isdigit()})
    names = {key: texts[0] for key, texts in pairs if texts}
    if not elements:
        return {"": names.get(f"{section}.name", default)}
    for expected, element in enumerate(sorted(elements, key=int)):
        if int(element) != expected or f"{section}.{element}.name" not in names:
            raise UserError(f"{section}.{element}: give {section}.{expected}.name; elements of a list count from 0")
    return {element: names[f"{section}.{element}.name"] for element in sorted(elements, key=int)}


def _with_variants(base: type, pairs: Pairs) -> type:
    """Returns `base` with each section that is chosen by name replaced by that choice's own options."""
    fields: list[Any] = []
    known = variants()
    for f in dataclasses.fields(base):
        if f.name not in known:
            fields.append((f.name, f.type, f))
            continue
        assert callable(f.default_factory)
        kinds: dict[str, Any] = {}
        for element, name in _chosen(pairs, f.name, f.default_factory()["name"]).items():
            if name not in known[f.name]:
                key = ".".join(filter(None, (f.name, element, "name")))
                raise UserError(f"{key}: unknown {f.name} {name!r}; {closest(name, list(known[f.name]))}")
            kinds[element] = _options(f.name, name)
        kind = kinds[""] if "" in kinds else _listing(f.name, kinds)
        fields.append((f.name, kind, field(default_factory=kind)))
    return dataclasses.make_dataclass(base.__name__, fields, bases=(base,), frozen=True)


def _listing(section: str, kinds: Mapping[str, type]) -> type:
    """Returns a dataclass that stands for a list of dataclasses: its options are called 0, 1, ..."""
    fields: list[Any] = [
        (f"element_{i}", Annotated[kind, tyro.conf.arg(name=i)], field(default_factory=kind, metadata={"name": i}))
        for i, kind in kinds.items()
    ]
    return dataclasses.make_dataclass(section.capitalize(), fields, frozen=True)


def _plain(section: Any) -> Any:
    """Returns a section chosen by name as a dict, or a list of them as a tuple of dicts."""
    values = dataclasses.asdict(section)
    return tuple(values.values()) if "element_0" in values else values


def _keys(kind: type, prefix: str = "") -> list[str]:
    """Returns the dotted names of all options of a dataclass."""
    keys = []
    for f in dataclasses.fields(kind):
        name = prefix + f.metadata.get("name", f.name)
        inner = get_args(f.type)[0] if f.metadata else f.type
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            keys += _keys(inner, f"{name}.")
        else:
            keys.append(name)
    return keys


def _first_sentence(box: str) -> str:
    """Returns the message inside the parser's box as one line."""
    lines = [line.strip(" │") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if set(line) & set("-─") and not set(line) - set("-─╭╮╰╯├┤ ")]
    body = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return " ".join(" ".join(body).split())


def _parse(kind: type[T], pairs: Pairs, where: str, prog: str) -> T:
    """Returns a dataclass from (key, texts) pairs, with every error one line that names its origin."""
    known = _keys(kind)
    for key, _ in pairs:
        if key not in known:
            raise UserError(f"{where}unknown key {key!r}; {closest(key, known)}")
    args = []
    for key, values in pairs:
        single = len(values) == 1 and values[0].startswith("-")  # else taken for an option
        args += [f"--{key}={values[0]}"] if single else [f"--{key}", *values]
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return _cli(kind, args, prog)
    except SystemExit as e:
        raise UserError(f"{where}{_first_sentence(box.getvalue())}") from e


def _cli(kind: type[T], args: Sequence[str], prog: str) -> T:
    config = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(kind, args=args, prog=prog, config=config, use_underscores=True)


def show_help(kind: type, file: str | None, argv: Sequence[str], *, prog: str) -> None:
    """Prints all options of a dataclass; those of a loss and an optimiser are those that a file or argv chooses.

    Raises:
      SystemExit: always, with code 0.
      UserError: no loss or optimiser of that name.
    """
    chosen = [*(flatten(read_yaml(file)) if file else []), *arguments(argv)]
    _cli(_with_variants(kind, chosen), ["--help"], prog)


def parse(kind: type[T], file: str | None, argv: Sequence[str], *, prog: str) -> T:
    """Returns an instance of a dataclass from a YAML file, if any, and overrides.

    Args:
      kind: a dataclass, such as `Config`.
      file: the YAML, or None.
      argv: `--key.path value` overrides; they win over the file.
      prog: the command, for messages.

    Raises:
      UserError: an unknown key or name, a wrong type, a value that is missing.
    """
    written = flatten(read_yaml(file)) if file else []
    given = arguments(argv)
    full = _with_variants(kind, [*written, *given])
    if written:
        _parse(_with_variants(kind, written), written, f"{file}: ", prog)
    last = _applied(written, given, full)
    parsed = _parse(full, list(last.items()), "", prog)
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: _plain(v) if k in variants() else v for k, v in values.items()})


def _applied(written: Pairs, given: Pairs, kind: type) -> dict[str, list[str]]:
    """Returns the file's keys with those of the command line over them. A key given again replaces the earlier one,
    lists included; where a name has changed, options of the file that the new choice does not have are dropped."""
    last, known = dict([*written, *given]), _keys(kind)
    named = {key for key, texts in written if key.endswith(".name") and last[key] != texts}
    sections = {key.removesuffix("name") for key in named if key.split(".")[0] in variants()}
    stale = {k for k, _ in written if k not in dict(given) and k not in known and k.startswith(tuple(sections))}
    return {k: v for k, v in last.items() if k not in stale}
