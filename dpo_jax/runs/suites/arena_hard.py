"""Answers for Arena-Hard v2 (Li et al. 2024, arXiv 2406.11939): the `model_answer/NAME.jsonl` that its judge reads.

A line has `uid`, `ans_id`, `model`, `messages`, whose last content is {"answer": text}, `tstamp` and `metadata`, as
`gen_answer.py` of lmarena/arena-hard-auto writes them. Style control reads `metadata`: tokens, and headers, lists and
bold text outside of code.
"""

import hashlib
import json
import re
import time
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.runs.suites.examples import column, suite_examples
from dpo_jax.runs.suites.registry import SuiteResult, SuiteTask, register_suite, suite_folder
from dpo_jax.runs.suites.subject import ANSWER_MEANINGS, answer, answer_metrics, generator_name

PLACE = "arena-hard-auto/data/arena-hard-v2.0/model_answer"  # in a checkout of Arena-Hard
MAX_NEW_TOKENS = 4096
CODE = re.compile("```[^`]*```")


@register_suite(
    "arena_hard",
    data="lmarena-ai/arena-hard-auto/data/arena-hard-v2.0/question.jsonl",
    keys=("suite_max_new_tokens",),
    meanings=ANSWER_MEANINGS,
)
def write_arena_hard(task: SuiteTask) -> SuiteResult:
    """Answers Arena-Hard's questions; returns the length of the answers."""
    found = [_question(*example) for _, example in suite_examples(task.data)]
    if repeated := len(found) - len({uid for uid, _ in found}):
        raise UserError(f"arena_hard: {repeated} questions repeat a uid; name the data once")
    answers = answer(task.subject(), [prompt for _, prompt in found], MAX_NEW_TOKENS)
    name, now = generator_name(task.path), time.time()
    lines = [
        _line(uid, name, prompt, text, tokens, now)
        for (uid, prompt), text, tokens in zip(found, answers.texts, answers.lengths, strict=True)
    ]
    file = f"arena_hard/model_answer/{name}.jsonl"
    notes = (*answers.notes, f"judge them: copy {suite_folder(task.path, task.settings) / file} to {PLACE}")
    notes += ("metadata.token_len counts this tokenizer's tokens; utils/add_markdown_info.py counts the judge's",)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return SuiteResult(answer_metrics(answers), len(found), notes, files={file: text})


def _question(where: str, example: dict[str, Any]) -> tuple[str, str]:
    return column(where, example, "uid", str), column(where, example, "prompt", str)


def _line(uid: str, model: str, prompt: str, text: str, tokens: int, now: float) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": text}}]
    digest = hashlib.blake2b("\0".join((uid, model, text)).encode("utf-8", "surrogatepass"), digest_size=11)
    metadata = {"token_len": tokens, **markdown_counts(text)}
    ids = {"uid": uid, "ans_id": digest.hexdigest(), "model": model}
    return {**ids, "messages": messages, "tstamp": now, "metadata": metadata}


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Returns the headers by level, list items and bold spans of a Markdown text, outside of fenced code."""
    prose = CODE.sub("``````", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
