"""`dpo-jax pairs`: preferences where there are none yet, from a model's own answers or from data of another form."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.commands.common import log_line
from dpo_jax.config.commands import PairsConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import DataConfig, ModelConfig, SamplesConfig
from dpo_jax.data import build_pairs
from dpo_jax.data.sources.base import Note, open_stream, prompt_key
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import model_folder
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.paths import written
from dpo_jax.records import Comparison
from dpo_jax.rewards import labels
from dpo_jax.rewards.registry import get_reward
from dpo_jax.sampling import generate
from dpo_jax.training.load import load_policy, load_run_tokenizer
from dpo_jax.training.tables import decode_texts, prompt_ids, prompt_texts

Rows = Iterator[dict[str, Any] | Note]
OF_A_MODEL = ("reward", "correction", "self")
READ = ("name", "path", "split", "add_bos", "chat_template", "chat_template_kwargs", "skip_bad_rows")
NEEDED = {"reward": 0, "correction": 0, "self": 1, "others": 1, "corrupted": 1, "paired": 2, "single": 2}
"""way -> the responses that a row of the data must have for it."""


def pairs_command(argv: list[str]) -> None:
    """`dpo-jax pairs [RUN_OR_MODEL] OUT.jsonl [--by WAY] [--reward NAME] [--data.name ... --data.path ...]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    settings = parse_config(PairsConfig, None, argv[first:], prog="dpo-jax pairs [RUN_OR_MODEL] OUT.jsonl")
    model, out = _paths(argv[:first], settings)
    _check(settings)
    rows = _rows(settings)
    found = _of_answers(model, rows, settings) if settings.by in OF_A_MODEL else _of_data(rows, settings)
    count, prompts, left_out = 0, set(), Counter()
    with written(out) as f:
        for row in found:
            if isinstance(row, Note):
                left_out[row.text] += row.number
                continue
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            prompts.add(json.dumps(row["prompt"]))
        for text, number in left_out.items():
            log_line(f"{number} {text}, left out")
        if not count:
            raise UserError(f"{out}: nothing to write: no pair could be made of {len(rows)} rows")
    asked = len({prompt_key(row.prompt) for row in rows})
    log_line(f"{count} {'rows' if settings.by == 'single' else 'pairs'} from {len(prompts)} of {asked} prompts: {out}")


def _check(settings: PairsConfig) -> None:
    """Refuses options that mean nothing for the way."""
    if (settings.prompts is not None and settings.prompts < 1) or min(settings.completions, settings.batch_size) < 1:
        raise UserError("--prompts, --completions and --batch-size: at least 1")
    unused = [f"data.{name}" for name in _given(settings.data, DataConfig()) if name not in READ]
    if settings.by != "reward":
        every = {f.name for f in dataclasses.fields(PairsConfig)}
        own = every - {"label"} if settings.by in OF_A_MODEL else {"by", "data", "prompts", "seed"}
        unused += [name for name in _given(settings, PairsConfig()) if name not in own | {"reward", "corrections"}]
    if unused:
        raise UserError(f"--{unused[0]}: means nothing for --by {settings.by}")


def _given(settings: Any, plain: Any) -> list[str]:
    """Returns the names of what is not at its default."""
    names = [f.name for f in dataclasses.fields(plain)]
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def _paths(given: Sequence[str], settings: PairsConfig) -> tuple[str, str]:
    """Returns the model, if answers of one are wanted, and the file to write.

    Raises:
      UserError: there are others; what the way needs is not given, or what it does not.
    """
    names = ["RUN_OR_MODEL", "OUT.jsonl"] if settings.by in OF_A_MODEL else ["OUT.jsonl"]
    if len(given) != len(names):
        raise UserError(f"dpo-jax pairs --by {settings.by} takes {' and '.join(names)}, then options; given: {given}")
    if not given[-1].endswith(".jsonl"):
        raise UserError(f"{given[-1]}: what is written are JSON lines; give the file a name that ends in .jsonl")
    for option, way in (("reward", "reward"), ("corrections", "correction")):
        if bool(getattr(settings, option)) != (settings.by == way):
            raise UserError(f"--{option}: is for --by {way}, which needs it")
    return (given[0] if len(given) == 2 else ""), given[-1]


def _rows(settings: PairsConfig) -> list[Comparison]:
    """Returns the data's rows of the first prompts; one of each where a model is to answer them."""
    source, kept, prompts, bad, misplaced = settings.data, [], set(), 0, 0
    for row in open_stream(source.name, source.path, source.split, NEEDED[settings.by]):
        if isinstance(row, UserError):
            bad += 1
            if bad > source.skip_bad_rows:
                raise row
        if not isinstance(row, Comparison) or row.misplaced:
            misplaced += isinstance(row, Comparison)
            continue
        key = prompt_key(row.prompt)
        if len(prompts) == settings.prompts and key not in prompts:
            continue
        if key not in prompts or settings.by not in OF_A_MODEL:
            kept.append(row)
        prompts.add(key)
    if bad:
        log_line(f"{bad} rows that cannot be used, left out; data.skip_bad_rows allows {source.skip_bad_rows}")
    if misplaced:
        log_line(f"{misplaced} rows left out, whose rejected transcript does not start with the prompt")
    return kept


class AnsweredPrompt(NamedTuple):
    """A row of the data, its prompt as the model reads it, and the model's answers."""

    row: Comparison
    prompt: str
    answers: list[str]


def _answered(model: str, rows: Sequence[Comparison], settings: PairsConfig) -> list[AnsweredPrompt]:
    """Returns a model's answers to each prompt; says how many are left out, as no text is read back as them."""
    options = ModelConfig(path=str(model_folder(model)), tokenizer=settings.tokenizer)
    tokenizer = load_run_tokenizer(options)
    loaded = load_policy(options, tokenizer, settings.seed)
    prompts = [row.prompt for row in rows]
    ids = prompt_ids(prompts, tokenizer, settings.data)
    drawing = {f.name for f in dataclasses.fields(SamplesConfig)} - {"prompts"} | {"seed", "batch_size"}
    how = {name: getattr(settings, name) for name in drawing} | {"copies": settings.completions}
    drawn = generate(loaded.model, load_into_memory(loaded.params), ids, eos_id=tokenizer.eos_token_id, **how)
    texts = np.reshape(decode_texts(tokenizer, drawn), (len(rows), settings.completions)).tolist()
    own = [[text for text in answers if tokenizer.eos_token not in text] for answers in texts]
    if spelled := sum(map(len, texts)) - sum(map(len, own)):
        log_line(f"{spelled} answers left out, whose text spells {tokenizer.eos_token!r}")
    if cut := sum(len(ids) == 0 or ids[-1] != tokenizer.eos_token_id for ids in drawn):
        log_line(
            f"{cut} of {len(drawn)} answers were cut at max_new_tokens {settings.max_new_tokens}; taken to end there"
        )
    read = prompt_texts(prompts, tokenizer, settings.data)
    return [AnsweredPrompt(*one) for one in zip(rows, read, own, strict=True)]


def _of_answers(model: str, rows: Sequence[Comparison], settings: PairsConfig) -> Rows:
    """Yields pairs made of a model's answers, each with where it comes from."""
    score = get_reward(settings.reward) if settings.reward else None
    rules = build_pairs.correction_rules(settings.corrections) if settings.corrections else []
    drawing = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    made_by = {"by": settings.by, "model": model} | {name: getattr(settings, name) for name in drawing}
    made_by |= {"reward": settings.reward, "label": settings.label} if score else {"corrections": settings.corrections}
    for row, prompt, answers in _answered(model, rows, settings):
        scores: dict[Any, float] = {}
        if score:
            scores = dict(zip(answers, score([prompt] * len(answers), answers).tolist(), strict=True))
            found = labels.label_pairs(prompt, answers, [scores[a] for a in answers], settings.label, settings.seed)
        elif rules:
            found = [(build_pairs.correct_answer(answer, rules), answer) for answer in dict.fromkeys(answers)]
        else:
            found = [(row.responses[0], answer) for answer in dict.fromkeys(answers)]
        for chosen, rejected in found:
            if _text(chosen) == rejected:
                yield Note("answers with nothing to correct" if rules else "answers that are the data's")
                continue
            known = {"scores": [scores[chosen], scores[rejected]]} if score else {}
            yield _pair(row, chosen, rejected, made_by | known)


def _of_data(rows: Sequence[Comparison], settings: PairsConfig) -> Rows:
    """Yields pairs, or single rows, made of data alone, each with where it comes from."""
    made_by = {"by": settings.by}
    if settings.by == "single":
        yield from (
            one | {"provenance": made_by | {"row": row.where}}
            for row in rows
            for one in build_pairs.single_responses(row)
        )
    elif settings.by == "paired":
        for row in build_pairs.pair_up(rows):
            yield row if isinstance(row, Note) else _pair(row, row.responses[0], row.responses[1], made_by)
    elif settings.by == "others":
        for row, other in zip(rows, build_pairs.other_answers(rows), strict=True):
            same = other == row.responses[0]
            yield Note("responses that others have too") if same else _pair(row, row.responses[0], other, made_by)
    else:
        rng = np.random.default_rng(settings.seed)
        for row in rows:
            damaged = build_pairs.corrupt_answer(_text(row.responses[0]), rng)
            if damaged is None:
                yield Note("responses that the damage left as they were")
            else:
                yield _pair(row, row.responses[0], damaged, made_by | {"seed": settings.seed})


def _pair(row: Comparison, chosen: Any, rejected: Any, made_by: dict[str, Any]) -> dict[str, Any]:
    """A pair as the columns of a file from which it is read back."""
    sides = {"chosen": build_pairs.as_column(chosen), "rejected": build_pairs.as_column(rejected)}
    return build_pairs.pair_columns(row) | sides | {"provenance": made_by | {"row": row.where}}


def _text(response: Any) -> str:
    """What a response says."""
    return response.get("content") or "" if isinstance(response, dict) else response
