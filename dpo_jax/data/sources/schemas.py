"""Published data sets whose columns have names of their own: one function each, to the usual columns (`columns`).

A file or folder with these columns is read as such whatever it is called; `data.name` with the name of a set reads it
from the hub. To add a set, write its function under `@schema` and a row of it in tests/test_schemas.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dpo_jax.data.sources.base import TIE, Note, RawExample, is_tie
from dpo_jax.data.sources.values import Example, binary_label, number_column, parsed, shorten, text_column, value_of
from dpo_jax.errors import UserError

Convert = Callable[[str, Example], Example | Note]


class Schema(NamedTuple):
    """A published data set.

    Attributes:
      hub: its name on the hub.
      columns: those by which it is recognized; a "-" precedes one that it must not have, other than null.
      also: further columns that `convert` reads.
      convert: (where, example) -> the usual columns, or a note if the example compares nothing.
    """

    hub: str
    columns: tuple[str, ...]
    also: tuple[str, ...]
    convert: Convert

    def fits(self, example: Mapping[str, Any]) -> bool:
        """Returns whether an example has the columns."""
        return all(example.get(c[1:]) is None if c[:1] == "-" else c in example for c in self.columns)


ARENA = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b")
SCHEMAS: dict[str, Schema] = {}
USUAL = ("prompt", "chosen", "rejected")


def schema(hub: str, *columns: str, also: tuple[str, ...] = ()) -> Callable[[Convert], Convert]:
    """Returns a decorator that registers a data set under its function's name."""

    def file(convert: Convert) -> Convert:
        SCHEMAS[convert.__name__] = Schema(hub, columns, also, convert)
        return convert

    return file


def usual_columns(where: str, example: Example) -> Example | Note:
    """Returns an example of a known data set in the usual columns; other examples, and usual pairs, as they are.

    Columns that the set does not have, such as `weight` or `tools`, are kept.

    Raises:
      UserError: a column has another value than the set's.
    """
    usual = all(example.get(name) is not None for name in USUAL)
    found = None if usual else next((one for one in SCHEMAS.values() if one.fits(example)), None)
    result = found.convert(where, example) if found else example
    if found is None or isinstance(result, Note):
        return result
    return {name: value for name, value in example.items() if name not in (*found.columns, *found.also)} | result


def grouped(examples: Iterable[RawExample | UserError]) -> Iterator[RawExample | UserError]:
    """Yields examples, and one ranking for successive rated responses to a prompt (HelpSteer 1 and 2)."""
    held: list[RawExample] = []
    for item in examples:
        rated = not isinstance(item, UserError) and {"prompt", "response", "helpfulness"} <= item[1].keys()
        if held and not (rated and item[1]["prompt"] == held[0][1]["prompt"]):  # type: ignore[index]
            yield _ranking(held)
            held = []
        if rated:
            held.append(item)  # type: ignore[arg-type]
        else:
            yield item
    if held:
        yield _ranking(held)


def _ranking(held: list[RawExample]) -> RawExample:
    rows = [row for _, row in held]
    ranking = {"completions": [row["response"] for row in rows], "scores": [row["helpfulness"] for row in rows]}
    return held[0][0], {name: rows[0][name] for name in rows[0] if name not in ("response", "helpfulness")} | ranking


def _pair(prompt: Any, better: Any, worse: Any, **more: Any) -> Example:
    return {"prompt": prompt, "chosen": better, "rejected": worse, **more}


def _by_sign(where: str, example: Example, key: str, prompt: Any, first: str, second: str) -> Example | Note:
    """Returns a pair whose first response is better if a number is below 0; its size is the score of the better one."""
    strength = number_column(where, key, value_of(where, example, key))
    better, worse = (first, second) if strength < 0 else (second, first)
    scores = [abs(strength), 0.0]
    return _pair(prompt, example[better], example[worse], scores=scores) if strength else TIE


@schema("", "prompt", "response_1", "response_2", "preference_strength")
def helpsteer2_preference(where: str, example: Example) -> Example | Note:
    """HelpSteer2's files preference/*.jsonl (Wang et al. 2024, arXiv 2410.01257): -3 .. 3, below 0 for response_1."""
    return _by_sign(where, example, "preference_strength", example["prompt"], "response_1", "response_2")


@schema("nvidia/HelpSteer3", "context", "response1", "response2", "overall_preference")
def helpsteer3(where: str, example: Example) -> Example | Note:
    """HelpSteer3 (Wang et al. 2025, arXiv 2505.11475): conversations, preference -3 .. 3, below 0 for response1."""
    return _by_sign(where, example, "overall_preference", example["context"], "response1", "response2")


@schema("Intel/orca_dpo_pairs", "question", "chosen", "rejected", "-prompt")
def intel_orca(where: str, example: Example) -> Example:
    """Intel's Orca pairs: a system message, a question and two answers."""
    return _pair(text_column(where, example, "question"), example["chosen"], example["rejected"])


@schema(
    "argilla/distilabel-intel-orca-dpo-pairs",
    *("input", "chosen", "rejected", "rating", "-prompt"),
    also=("status", "chosen_score"),
)
def distilabel_orca(where: str, example: Example) -> Example | Note:
    """Argilla's rated Orca pairs; those of status `tie` are left out."""
    pair = _pair(text_column(where, example, "input"), example["chosen"], example["rejected"])
    return TIE if example.get("status") == "tie" else pair


@schema("PKU-Alignment/PKU-SafeRLHF", "prompt", "response_0", "response_1", "better_response_id")
def pku_saferlhf(where: str, example: Example) -> Example:
    """PKU-SafeRLHF (Ji et al. 2024, arXiv 2406.15513), by helpfulness (`better_response_id`)."""
    better = int(number_column(where, "better_response_id", example["better_response_id"], 0, 1))
    return _pair(example["prompt"], example[f"response_{better}"], example[f"response_{1 - better}"])


@schema("berkeley-nest/Nectar", "prompt", "answers", "-chosen", "-rejected")
def nectar(where: str, example: Example) -> Example:
    """Nectar (Zhu et al. 2023): seven ranked answers to a dialogue of Human and Assistant."""
    answers = parsed(value_of(where, example, "answers"))
    if not isinstance(answers, list) or not all(isinstance(one, dict) and "answer" in one for one in answers):
        raise UserError(f"{where}: 'answers' must be a list of objects with answer and rank")
    # The space after "Assistant:" belongs to the answer, as in HH.
    texts = [f" {text_column(where, one, 'answer')}" for one in answers]
    ranks = [-number_column(where, "rank", value_of(where, one, "rank")) for one in answers]
    return {"prompt": text_column(where, example, "prompt").rstrip(" "), "completions": texts, "scores": ranks}


@schema("lmarena-ai/arena-human-preference-100k", "winner", "conversation_a", "conversation_b")
def lmarena(where: str, example: Example) -> Example | Note:
    """Chatbot Arena's conversations with a vote (Chiang et al. 2024, arXiv 2403.04132); ties are left out."""
    sides = {"model_a": ("conversation_a", "conversation_b"), "model_b": ("conversation_b", "conversation_a")}
    winner = example["winner"]
    if is_tie(winner):
        return TIE
    if winner not in sides:
        raise UserError(f"{where}: 'winner' must be model_a, model_b or a tie, not {shorten(winner)}")
    better, worse = sides[winner]
    return {"chosen": example[better], "rejected": example[worse]}


@schema("lmsys/lmsys-arena-human-preference-55k", *ARENA, also=("winner_tie",))
def lmsys_55k(where: str, example: Example) -> Example | Note:
    """Chatbot Arena's Kaggle set: turns as JSON lists of texts, a column for each outcome; ties are left out."""
    won = [binary_label(where, key, example[key]) for key in ("winner_model_a", "winner_model_b")]
    if won[0] == won[1]:
        return TIE
    asked, a, b = (_turns(where, example, key) for key in ("prompt", "response_a", "response_b"))
    better, worse = (a, b) if won[0] else (b, a)
    return {"chosen": _talk(asked, better), "rejected": _talk(asked, worse)}


def _turns(where: str, example: Example, key: str) -> list[Any]:
    try:
        found = json.loads(text_column(where, example, key))
    except ValueError as error:
        raise UserError(f"{where}: {key!r} is not a JSON list ({error})") from error
    if not isinstance(found, list):
        raise UserError(f"{where}: {key!r} must be a JSON list of texts")
    return found


def _talk(asked: list[Any], answers: list[Any]) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    turns = [text for pair in zip(asked, answers, strict=False) for text in pair]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


@schema("lvwerra/stack-exchange-paired", "question", "response_j", "response_k")
def stack_exchange_paired(where: str, example: Example) -> Example:
    """StackExchange answers in pairs; response_j has more votes."""
    return _pair(text_column(where, example, "question"), example["response_j"], example["response_k"])


@schema("openai/webgpt_comparisons", "question", "answer_0", "answer_1", "score_0", "score_1")
def webgpt(where: str, example: Example) -> Example | Note:
    """WebGPT's comparisons (Nakano et al. 2021, arXiv 2112.09332); equal scores are left out."""
    question = example["question"]
    prompt = question.get("full_text") if isinstance(question, dict) else question
    scores = [number_column(where, key, example[key]) for key in ("score_0", "score_1")]
    if scores[0] == scores[1]:
        return TIE
    better = int(scores[1] > scores[0])
    ordered = sorted(scores, reverse=True)
    return _pair(prompt, example[f"answer_{better}"], example[f"answer_{1 - better}"], scores=ordered)


@schema("", "input", "preferred_output", "non_preferred_output")
def openai_preference(where: str, example: Example) -> Example:
    """OpenAI's format of preference data: input.messages, preferred_output, non_preferred_output."""
    given = example["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise UserError(f"{where}: 'input' must be an object with messages")
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    sides = example["preferred_output"], example["non_preferred_output"]
    return {"prompt": given["messages"], "chosen": sides[0], "rejected": sides[1], **tools}


@schema("", "instruction", "chosen", "rejected", "-prompt", also=("input", "history"))
def alpaca_pairs(where: str, example: Example) -> Example:
    """LLaMA-Factory's alpaca format of pairs: instruction, input, history and system beside chosen and rejected."""
    return _pair(_instruction(where, example), example["chosen"], example["rejected"])


@schema("", "instruction", "output", "-prompt", "-chosen", "-completion", also=("input", "history"))
def alpaca(where: str, example: Example) -> Example:
    """The alpaca format of single responses: instruction, input, output."""
    return {"prompt": _instruction(where, example), "completion": example["output"]}


def _instruction(where: str, example: Example) -> Any:
    parts = [text_column(where, example, key) for key in ("instruction", "input") if example.get(key)]
    asked, history = "\n".join(parts), parsed(example.get("history"))
    if not history:
        return asked
    if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
        raise UserError(f"{where}: 'history' must be a list of [question, answer]")
    before = [text for pair in history for text in pair]
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(before)]
    return [*turns, {"role": "user", "content": asked}]


@schema("openbmb/UltraInteract_pair", "trajectory", "chosen", "rejected", "-prompt")
def ultrainteract(where: str, example: Example) -> Example:
    """UltraInteract's pairs (Yuan et al. 2024, arXiv 2404.02078): steps after a trajectory of turns."""
    return _pair(value_of(where, example, "trajectory"), example["chosen"], example["rejected"])


# Sets with the usual columns, known by their names alone.
NAMED = {
    "helpsteer2": "nvidia/HelpSteer2",
    "capybara": "argilla/distilabel-capybara-dpo-7k-binarized",
    "truthy_dpo": "jondurbin/truthy-dpo-v0.1",
    "tulu3": "allenai/llama-3.1-tulu-3-8b-preference-mixture",
    "skywork": "Skywork/Skywork-Reward-Preference-80K-v0.2",
    "rewardbench": "allenai/reward-bench",
}
SHOWN_COLUMNS = {
    "helpsteer2": "prompt, response, helpfulness",
    "capybara": "prompt, chosen, rejected (messages)",
    "truthy_dpo": "system, prompt, chosen, rejected",
    "tulu3": "prompt, chosen, rejected (messages)",
    "skywork": "chosen, rejected (messages)",
    "rewardbench": "prompt, chosen, rejected",
}


def hub_of(name: str) -> str | None:
    """Returns the hub id of a named set, "" for a format without one, None for an unknown name."""
    return NAMED.get(name) if name in NAMED else SCHEMAS[name].hub if name in SCHEMAS else None


def listed() -> list[tuple[str, str, str]]:
    """Returns (name, hub id, columns) of every set, for `dpo-jax data --list`."""
    found = [(n, s.hub, ", ".join(c for c in s.columns if c[0] != "-")) for n, s in SCHEMAS.items()]
    return sorted([*found, *((n, hub, SHOWN_COLUMNS[n]) for n, hub in NAMED.items())])
