"""IFEval (Zhou et al. 2023, arXiv 2311.07911): instructions in a prompt that a program can check.

The checks are those of the package if-verifiable (Apache-2.0), which are Google's. Strict accuracy checks the answer;
loose accuracy also accepts it without its first or last line or without asterisks. At the level of prompts all
instructions of a prompt must be followed.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError, closest
from dpo_jax.paths import cache_folder, written
from dpo_jax.runs.suites.examples import column, suite_examples, texts_of
from dpo_jax.runs.suites.registry import SuiteResult, SuiteTask, register_suite
from dpo_jax.runs.suites.scoring import proportion
from dpo_jax.runs.suites.subject import answer

LOOSE = "by the answer, or by it without its first line, its last line or its asterisks"
MEANINGS = {
    "prompt_level_strict_acc": "Share of prompts all of whose instructions are followed by the answer.",
    "inst_level_strict_acc": "Share of instructions that are followed by the answer.",
    "prompt_level_loose_acc": f"Share of prompts all of whose instructions are followed {LOOSE}.",
    "inst_level_loose_acc": f"Share of instructions that are followed {LOOSE}.",
}
MAX_NEW_TOKENS = 1280  # as in lm_eval's task
SPLITS_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
PUNKT = "tokenizers/punkt_tab/english"
EMPTY = ("collocations.tab", "sent_starters.txt", "ortho_context.tab")
ABBREVIATIONS = ("a.m", "dr", "e.g", "etc", "fig", "i.e", "jr", "mr", "mrs", "ms", "p.m", "prof", "sr", "st", "vs")


class Instructions(NamedTuple):
    """A prompt with its instructions: ids of checks, and the arguments of each."""

    where: str
    key: Any
    prompt: str
    ids: list[str]
    arguments: list[dict[str, Any]]


@register_suite("ifeval", data="google/IFEval", keys=("suite_max_new_tokens",), meanings=MEANINGS)
def measure_ifeval(task: SuiteTask) -> SuiteResult:
    """Returns strict and loose accuracy of prompts and of instructions."""
    package, known = _package(), _checks()
    found = [_instructions(*example, known) for _, example in suite_examples(task.data)]
    uses = sum(name in SPLITS_SENTENCES for one in found for name in one.ids)
    notes = _find_sentence_splitter(uses) if uses else ()
    answers = answer(task.subject(), [one.prompt for one in found], MAX_NEW_TOKENS)
    checked = [_check(package, one, text) for one, text in zip(found, answers.texts, strict=True)]
    metrics = {}
    for mode, name in enumerate(("strict", "loose")):
        followed = [pair[mode] for pair in checked]
        metrics[f"prompt_level_{name}_acc"] = proportion([float(all(one)) for one in followed])
        metrics[f"inst_level_{name}_acc"] = proportion([float(each) for one in followed for each in one])
    rows = tuple(
        {"key": one.key, "prompt": one.prompt, "response": text, "strict": strict, "loose": loose}
        for one, text, (strict, loose) in zip(found, answers.texts, checked, strict=True)
    )
    return SuiteResult(metrics, len(found), answers.notes + notes, rows)


def _package() -> Any:
    """Returns the package if_verifiable; the language detector draws random numbers, which get a fixed seed."""
    try:
        package = importlib.import_module("if_verifiable")
        importlib.import_module("langdetect").DetectorFactory.seed = 0
    except ImportError as e:
        raise UserError(f"ifeval: needs a package that is missing ({e}); pip install 'dpo_jax[evals]'") from e
    return package


def _checks() -> Mapping[str, Any]:
    return importlib.import_module("if_verifiable.ifeval.instructions_registry").INSTRUCTION_DICT


def _instructions(where: str, example: dict[str, Any], known: Mapping[str, Any]) -> Instructions:
    ids, arguments = texts_of(where, example, "instruction_id_list"), column(where, example, "kwargs", list)
    for name in ids:
        if name not in known:
            raise UserError(f"{where}: instruction {name!r} is not of IFEval; {closest(name, known)}")
    if len(arguments) != len(ids) or not all(isinstance(one, dict) for one in arguments):
        raise UserError(f"{where}: kwargs must be a list of {len(ids)} objects, as many as instructions; correct it")
    return Instructions(where, example.get("key"), column(where, example, "prompt", str), ids, arguments)


def _check(package: Any, one: Instructions, response: str) -> tuple[list[bool], list[bool]]:
    """Returns whether a response follows each instruction, strictly and loosely; an empty one follows none."""
    sample = package.IFEvalSample(one.key, one.prompt, one.ids, one.arguments)
    try:
        results, _ = package.evaluate_output_for_sample("ifeval", sample, response)
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{one.where}: its kwargs do not fit its instructions ({e}); correct the example") from e
    if not results:
        return [False] * len(one.ids), [False] * len(one.ids)
    return [one.strict_pass for one in results], [one.loose_pass for one in results]


def _find_sentence_splitter(uses: int) -> tuple[str, ...]:
    """Lets nltk split sentences without a download: by its model punkt_tab if that is installed, else by a short list.

    Returns notes; none with nltk's model.
    """
    nltk = importlib.import_module("nltk")
    try:
        nltk.data.find(f"{PUNKT}/")
        return ()
    except LookupError:
        folder = cache_folder() / "nltk_data"
    contents = {"abbrev_types.txt": ABBREVIATIONS} | dict.fromkeys(EMPTY, ())
    for name, lines in contents.items():
        if not (file := folder / PUNKT / name).exists():
            with written(file) as f:
                f.write("\n".join(lines))
    if str(folder) not in map(str, map(Path, nltk.data.path)):
        nltk.data.path.append(str(folder))
    how = "python -m nltk.downloader punkt_tab installs it"
    return (f"{uses} instructions split sentences by a short list of abbreviations, without nltk's punkt_tab; {how}",)
