"""`dpo-jax pairs`: builds preference pairs from a model's answers or from data in another form."""

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.commands.common import log_line
from dpo_jax.config.commands import PairsConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import DataConfig, ModelConfig, SamplesConfig
from dpo_jax.config.yaml import read_yaml
from dpo_jax.data import build_pairs
from dpo_jax.data.sources.base import Note, prompt_key
from dpo_jax.data.turns import as_turns
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.paths import written
from dpo_jax.records import Comparison
from dpo_jax.rewards import labels
from dpo_jax.rewards.registry import get_reward
from dpo_jax.sampling import generate
from dpo_jax.training.restore import load_sampled
from dpo_jax.training.tables import decode_texts, open_part, prompt_ids, prompt_texts

PairRows = Iterator[dict[str, Any] | Note]
"""Lines of the output file by column, and counts for the report."""
OF_A_MODEL = ("reward", "correction", "self")
READ = (
    "name",
    "options",
    "columns",
    "text_prompts",
    "path",
    "split",
    "add_bos",
    "chat_template",
    "chat_template_kwargs",
    "skip_bad_rows",
)
NEEDED = {"reward": 0, "correction": 0, "self": 1, "others": 1, "corrupted": 1, "paired": 2, "single": 2}
"""--by -> responses that each example of the data must have."""


def pairs_command(argv: list[str]) -> None:
    """`dpo-jax pairs [RUN_OR_MODEL] OUT.jsonl [--by WAY] [--reward NAME] [--data.name ... --data.path ...]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    settings = parse_config(PairsConfig, None, argv[first:], prog="dpo-jax pairs [RUN_OR_MODEL] OUT.jsonl")
    model, out = _paths(argv[:first], settings)
    _check(settings)
    examples = _Examples(settings)
    found = _of_answers(model, examples, settings) if settings.by in OF_A_MODEL else _of_data(examples, settings)
    count, prompts, left_out = 0, array("Q"), Counter()
    with written(out) as f:
        for row in found:
            if isinstance(row, Note):
                left_out[row.text] += row.number
                continue
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            prompts.append(prompt_key(json.dumps(row["prompt"])))
        for text, number in left_out.items():
            log_line(f"{number} {text}, left out")
        if not count:
            read = f"{len(examples.keys)} examples"
            raise UserError(f"{out}: no pair could be built from {read}; check --by and the data")
    unit = "examples" if settings.by == "single" else "pairs"
    log_line(f"{count} {unit} from {_distinct(prompts)} of {_distinct(examples.keys)} prompts: {out}")


def _distinct(keys: array) -> int:
    return len(np.unique(np.frombuffer(keys, np.uint64)))


def _check(settings: PairsConfig) -> None:
    """Refuses options that --by does not use."""
    if (settings.prompts is not None and settings.prompts < 1) or min(settings.completions, settings.batch_size) < 1:
        raise UserError("--prompts, --completions and --batch-size must be at least 1")
    unused = [f"data.{name}" for name in _given(settings.data, DataConfig()) if name not in READ]
    if settings.by != "reward":
        every = {f.name for f in dataclasses.fields(PairsConfig)}
        own = every - {"label"} if settings.by in OF_A_MODEL else {"by", "data", "prompts", "seed"}
        unused += [name for name in _given(settings, PairsConfig()) if name not in own | {"reward", "corrections"}]
    if unused:
        raise UserError(f"--{unused[0]} has no effect with --by {settings.by}; remove it")


def _given(settings: Any, plain: Any) -> list[str]:
    """Returns the names of the options that differ from their defaults."""
    names = [f.name for f in dataclasses.fields(plain)]
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def _paths(given: Sequence[str], settings: PairsConfig) -> tuple[str, str]:
    """Returns the model, "" if --by needs none, and the file to write.

    Raises:
      UserError: too few or too many arguments; an option that --by needs is missing, or one that it does not use.
    """
    names = ["RUN_OR_MODEL", "OUT.jsonl"] if settings.by in OF_A_MODEL else ["OUT.jsonl"]
    if len(given) != len(names):
        raise UserError(f"dpo-jax pairs --by {settings.by}: give {' and '.join(names)}, then options; got {given}")
    if not given[-1].endswith(".jsonl"):
        raise UserError(f"{given[-1]}: the output is JSON lines; give a name that ends in .jsonl")
    for option, way in (("reward", "reward"), ("corrections", "correction")):
        if bool(getattr(settings, option)) != (settings.by == way):
            raise UserError(f"--{option} is required by (and only valid with) --by {way}")
    return (given[0] if len(given) == 2 else ""), given[-1]


class _Examples:
    """The examples of the first prompts; one per prompt if a model answers them.

    Each iteration reads them again. The first that comes to the end says what it has left out.

    Attributes:
      keys: of the prompts of all examples, once they have been read to the end.
    """

    def __init__(self, settings: PairsConfig):
        self._settings, self.keys = settings, array("Q")

    def __iter__(self) -> Iterator[Comparison]:
        settings, source, prompts = self._settings, self._settings.data, set()
        keys, bad, misplaced, once = array("Q"), 0, 0, settings.by in OF_A_MODEL
        for row in open_part(source, (source.path, source.split), NEEDED[settings.by]):
            if isinstance(row, UserError):
                bad += 1
                if bad > source.skip_bad_rows:
                    raise row
            if not isinstance(row, Comparison) or row.misplaced:
                misplaced += isinstance(row, Comparison)
                continue
            key = prompt_key(row.prompt)
            if once or settings.prompts is not None:  # else the set would grow with the data, for nothing
                left_out = once if key in prompts else len(prompts) == settings.prompts
                if left_out:
                    continue
                prompts.add(key)
            keys.append(key)
            yield row
        if not self.keys:
            self.keys = keys
            _log_skipped(bad, misplaced, source.skip_bad_rows)


def _log_skipped(bad: int, misplaced: int, allowed: int) -> None:
    if bad:
        log_line(f"{bad} invalid examples skipped; data.skip_bad_rows allows {allowed}")
    if misplaced:
        log_line(f"{misplaced} examples left out: the rejected transcript does not start with the prompt")


class AnsweredPrompt(NamedTuple):
    """An example, its prompt as text for the model, and the model's answers."""

    example: Comparison
    prompt: str
    answers: list[str]


def _sample_answers(model: str, examples: Sequence[Comparison], settings: PairsConfig) -> list[AnsweredPrompt]:
    """Returns a model's answers to each prompt. Leaves out answers that spell EOS: their text has other tokens."""
    options = ModelConfig(tokenizer=settings.model.tokenizer)
    loaded, tokenizer = load_sampled(model, options, settings.seed, settings.checkpoint)
    prompts = [example.prompt for example in examples]
    ids = prompt_ids(prompts, tokenizer, settings.data)
    drawing = {f.name for f in dataclasses.fields(SamplesConfig)} - {"prompts", "kl_prompts"} | {"seed", "batch_size"}
    how: dict[str, Any] = {name: getattr(settings, name) for name in drawing}
    ends = loaded.end_ids(tokenizer)
    params, copies = load_into_memory(loaded.params), settings.completions
    drawn = generate(loaded.model, params, ids, copies=copies, eos_id=ends, **how)
    texts = np.reshape(decode_texts(tokenizer, drawn, ends), (len(examples), settings.completions)).tolist()
    own = [[text for text in answers if tokenizer.eos_token not in text] for answers in texts]
    if spelled := sum(map(len, texts)) - sum(map(len, own)):
        log_line(f"{spelled} answers left out: their text contains {tokenizer.eos_token!r}")
    if cut := sum(len(ids) == 0 or ids[-1] not in ends for ids in drawn):
        log_line(f"{cut} of {len(drawn)} answers were cut at --max-new-tokens {settings.max_new_tokens}, and kept")
    read = prompt_texts(prompts, tokenizer, settings.data)
    return [AnsweredPrompt(*one) for one in zip(examples, read, own, strict=True)]


def _of_answers(model: str, examples: Iterable[Comparison], settings: PairsConfig) -> PairRows:
    """Yields pairs built from a model's answers, with their provenance."""
    score = get_reward(settings.reward) if settings.reward else None
    path, which = settings.corrections, settings.checkpoint
    rules = build_pairs.correction_rules(path, read_yaml(path)) if path else []
    drawing = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    made_by = {"by": settings.by, "model": model} | ({"checkpoint": which} if which else {})
    made_by |= {name: getattr(settings, name) for name in drawing}
    made_by |= {"reward": settings.reward, "label": settings.label} if score else {"corrections": settings.corrections}
    for example, prompt, answers in _sample_answers(model, [*examples], settings):
        scores: dict[Any, float] = {}
        if score:
            scores = dict(zip(answers, score([prompt] * len(answers), answers).tolist(), strict=True))
            found = labels.label_pairs(prompt, answers, [scores[a] for a in answers], settings.label, settings.seed)
        elif rules:
            found = [(build_pairs.correct_answer(answer, rules), answer) for answer in dict.fromkeys(answers)]
        else:
            found = [(example.responses[0], answer) for answer in dict.fromkeys(answers)]
        for chosen, rejected in found:
            if _text(chosen) == rejected:
                yield Note("answers without a correction" if rules else "answers equal to the data's")
                continue
            known = {"scores": [scores[chosen], scores[rejected]]} if score else {}
            yield _pair(example, chosen, rejected, made_by | known)


def _of_data(examples: Iterable[Comparison], settings: PairsConfig) -> PairRows:
    """Yields pairs, or unpaired examples, built from data alone, with their provenance; `paired` alone keeps all."""
    made_by = {"by": settings.by}
    if settings.by == "single":
        for example in examples:
            for row in build_pairs.single_responses(example):
                yield row | {"provenance": made_by | {"row": example.where}}
    elif settings.by == "paired":
        for pair in build_pairs.pair_up(examples):
            yield pair if isinstance(pair, Note) else _pair(pair, pair.responses[0], pair.responses[1], made_by)
    elif settings.by == "others":
        for example, other in zip(examples, build_pairs.other_answers(examples), strict=True):
            own = example.responses[0]
            yield Note("responses equal to the other prompt's") if other == own else _pair(example, own, other, made_by)
    else:
        rng = np.random.default_rng(settings.seed)
        for example in examples:
            *before, last = as_turns(example.responses[0])
            damaged = build_pairs.corrupt_answer(_text(last), rng)
            if damaged is None:
                yield Note("responses that the corruption left unchanged")
                continue
            worse = [*before, last | {"content": damaged}] if before else damaged
            yield _pair(example, example.responses[0], worse, made_by | {"seed": settings.seed})


def _pair(example: Comparison, chosen: Any, rejected: Any, made_by: dict[str, Any]) -> dict[str, Any]:
    """Returns a pair as columns from which the source `files` reads it back."""
    sides = {"chosen": build_pairs.as_column(chosen), "rejected": build_pairs.as_column(rejected)}
    return build_pairs.pair_columns(example) | sides | {"provenance": made_by | {"row": example.where}}


def _text(response: Any) -> str:
    """Returns the text of a response."""
    return response.get("content") or "" if isinstance(response, dict) else response
