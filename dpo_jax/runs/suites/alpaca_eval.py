"""Answers for AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): the JSON that `alpaca_eval --model_outputs` reads.

Its `evaluate` takes a list of objects with `instruction`, `output` and `generator`; `dataset` is kept if it is there.
"""

import json

from dpo_jax.runs.suites.examples import column, suite_examples
from dpo_jax.runs.suites.registry import SuiteResult, SuiteTask, register_suite, suite_folder
from dpo_jax.runs.suites.subject import ANSWER_MEANINGS, answer, answer_metrics, generator_name

MAX_NEW_TOKENS = 2048
FILE = "alpaca_eval/model_outputs.json"


@register_suite(
    "alpaca_eval",
    data="tatsu-lab/alpaca_eval/alpaca_eval.json",
    keys=("suite_max_new_tokens",),
    meanings=ANSWER_MEANINGS,
)
def write_alpaca_eval(task: SuiteTask) -> SuiteResult:
    """Answers AlpacaEval's instructions; returns the length of the answers."""
    found = [example for _, example in suite_examples(task.data)]
    prompts = [column(where, example, "instruction", str) for where, example in found]
    answers = answer(task.subject(), prompts, MAX_NEW_TOKENS)
    name = generator_name(task.path)
    outputs = [
        {"dataset": example.get("dataset", ""), "instruction": prompt, "output": text, "generator": name}
        for (_, example), prompt, text in zip(found, prompts, answers.texts, strict=True)
    ]
    notes = (*answers.notes, f"judge them: alpaca_eval --model_outputs {suite_folder(task.path, task.settings) / FILE}")
    files = {FILE: json.dumps(outputs, indent=1, ensure_ascii=False)}
    return SuiteResult(answer_metrics(answers), len(found), notes, files=files)
