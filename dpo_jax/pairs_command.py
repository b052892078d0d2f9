"""`dpo-jax pairs`: preferences where there are none yet, from a model's own answers or from data of another form."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax import assemble, config, data, folders, loading, rewards
from dpo_jax.config import Data, Samples
from dpo_jax.data import chat, made
from dpo_jax.data_commands import say
from dpo_jax.models import hf
from dpo_jax.records import Comparison, UserError
from dpo_jax.sample import sample

Rows = Iterator[dict[str, Any]]
OF_A_MODEL = ("reward", "correction", "self")
NEEDED = {"reward": 0, "correction": 0, "self": 1, "others": 1, "corrupted": 1, "paired": 2, "single": 2}
"""way -> the responses that a row of the data must have for it."""


@dataclass(frozen=True)
class Pairs:
    """Preferences made of a model's own answers, or of data of another form."""

    by: Literal["reward", "correction", "self", "others", "corrupted", "paired", "single"] = "reward"
    """What makes a pair. Of a model's own answers: `reward`, scores of several of them; `correction`, an answer against
    itself with the corrections made; `self`, the data's answer against the model's. Of data alone: the answer against
    one to another prompt (`others`) or against itself with words damaged (`corrupted`); every wanted response against
    every unwanted one of rows with labels (`paired`), and pairs back to such rows (`single`)."""
    reward: str = ""
    """What scores an answer: synthetic, happy, vader, words:FILE, logistic:FILE, model:FOLDER, or module:function."""
    corrections: str = ""
    """A YAML of patterns and what stands in their place, as in Python's re.sub."""
    data: Data = field(default_factory=Data)
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


def pairs_command(argv: list[str]) -> None:
    """`dpo-jax pairs [RUN_OR_MODEL] OUT.jsonl [--by WAY] [--reward NAME] [--data.name ... --data.path ...]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    settings = config.parse(Pairs, None, argv[first:], prog="dpo-jax pairs [RUN_OR_MODEL] OUT.jsonl")
    model, out = _paths(argv[:first], settings)
    rows = _rows(settings)
    found = _of_answers(model, rows, settings) if settings.by in OF_A_MODEL else _of_data(rows, settings)
    count = 0
    with folders.written(out) as f:
        for row in found:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    what = "rows" if settings.by == "single" else "pairs"
    say(f"{count} {what} from {len({data.prompt_key(row.prompt) for row in rows})} prompts: {out}")


def _paths(given: Sequence[str], settings: Pairs) -> tuple[str, str]:
    """Returns the model, if answers of one are wanted, and the file to write.

    Raises:
      UserError: there are others; what the way needs is not given, or what it does not.
    """
    names = ["RUN_OR_MODEL", "OUT.jsonl"] if settings.by in OF_A_MODEL else ["OUT.jsonl"]
    if len(given) != len(names):
        raise UserError(f"dpo-jax pairs --by {settings.by} takes {' and '.join(names)}, then options; given: {given}")
    for option, way in (("reward", "reward"), ("corrections", "correction")):
        if bool(getattr(settings, option)) != (settings.by == way):
            raise UserError(f"--{option}: is for --by {way}, which needs it")
    if (settings.prompts is not None and settings.prompts < 1) or settings.completions < 1:
        raise UserError("--prompts and --completions: at least 1")
    return (given[0] if len(given) == 2 else ""), given[-1]


def _rows(settings: Pairs) -> list[Comparison]:
    """Returns the data's rows of the first prompts; one of each where a model is to answer them."""
    source, kept, prompts = settings.data, [], set()
    for row in data.load(source.name, source.path, source.split, NEEDED[settings.by]):
        key = data.prompt_key(row.prompt)
        if len(prompts) == settings.prompts and key not in prompts:
            continue
        if key not in prompts or settings.by not in OF_A_MODEL:
            kept.append(row)
        prompts.add(key)
    return kept


class Answered(NamedTuple):
    """A row of the data, its prompt as the model reads it, and the model's answers."""

    row: Comparison
    prompt: str
    answers: list[str]


def _answered(model: str, rows: Sequence[Comparison], settings: Pairs) -> list[Answered]:
    """Returns a model's answers to each prompt; says how many are left out, as no text is read back as them."""
    options = config.Model(path=str(hf.model_folder(model)), tokenizer=settings.tokenizer)
    tokenizer = loading.tokenizer_of(options)
    loaded = loading.load_model(options, tokenizer, settings.seed)
    prompts = [row.prompt for row in rows]
    ids = assemble.prompt_ids(prompts, tokenizer, settings.data)
    drawing = {f.name for f in dataclasses.fields(Samples)} - {"prompts"} | {"seed", "batch_size"}
    how = {name: getattr(settings, name) for name in drawing} | {"copies": settings.completions}
    drawn = sample(loaded.model, hf.whole(loaded.params), ids, eos_id=tokenizer.eos_token_id, **how)
    texts = np.reshape(assemble.decoded(tokenizer, drawn), (len(rows), settings.completions)).tolist()
    own = [[text for text in answers if tokenizer.eos_token not in text] for answers in texts]
    if spelled := sum(map(len, texts)) - sum(map(len, own)):
        say(f"{spelled} answers left out, whose text spells {tokenizer.eos_token!r}")
    read = assemble.prompt_texts(prompts, tokenizer, settings.data)
    return [Answered(*one) for one in zip(rows, read, own, strict=True)]


def _of_answers(model: str, rows: Sequence[Comparison], settings: Pairs) -> Rows:
    """Yields pairs made of a model's answers, each with where it comes from."""
    score = rewards.get(settings.reward) if settings.reward else None
    rules = made.rules(settings.corrections) if settings.corrections else []
    made_by = {"by": settings.by, "model": model, "temperature": settings.temperature, "seed": settings.seed}
    made_by |= {"reward": settings.reward, "label": settings.label} if score else {"corrections": settings.corrections}
    for row, prompt, answers in _answered(model, rows, settings):
        scores: dict[Any, float] = {}
        if score:
            scores = dict(zip(answers, score([prompt] * len(answers), answers).tolist(), strict=True))
            found = rewards.label(prompt, answers, [scores[a] for a in answers], settings.label, settings.seed)
        elif rules:
            found = [(made.corrected(answer, rules), answer) for answer in dict.fromkeys(answers)]
        else:
            found = [(row.responses[0], answer) for answer in dict.fromkeys(answers)]
        for chosen, rejected in found:
            if _text(chosen) != rejected:  # nothing to correct, or the model has said the same
                known = {"scores": [scores[chosen], scores[rejected]]} if score else {}
                yield _pair(row, chosen, rejected, made_by | known)


def _of_data(rows: Sequence[Comparison], settings: Pairs) -> Rows:
    """Yields pairs, or single rows, made of data alone, each with where it comes from."""
    made_by = {"by": settings.by}
    if settings.by == "single":
        yield from (one | {"provenance": made_by | {"row": row.where}} for row in rows for one in made.single(row))
    elif settings.by == "paired":
        yield from (_pair(row, row.responses[0], row.responses[1], made_by) for row in made.paired(rows))
    elif settings.by == "others":
        for row, other in zip(rows, made.answers_to_others(rows), strict=True):
            if other != row.responses[0]:
                yield _pair(row, row.responses[0], other, made_by)
    else:
        rng = np.random.default_rng(settings.seed)
        for row in rows:
            damaged = made.corrupted(_text(row.responses[0]), rng)
            if damaged is not None:
                yield _pair(row, row.responses[0], damaged, made_by | {"seed": settings.seed})


def _pair(row: Comparison, chosen: Any, rejected: Any, made_by: dict[str, Any]) -> dict[str, Any]:
    """A pair as the columns of a file from which it is read back."""
    sides = {"chosen": made.as_column(chosen), "rejected": made.as_column(rejected)}
    return chat.as_columns(row.prompt) | sides | {"provenance": made_by | {"row": row.where}}


def _text(response: Any) -> str:
    """What a response says."""
    return response["content"] if isinstance(response, dict) else response
