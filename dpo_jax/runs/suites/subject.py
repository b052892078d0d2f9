"""The policy that suites evaluate: its answers to prompts, and its implicit rewards of given answers."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.encode import encode
from dpo_jax.errors import UserError
from dpo_jax.evaluation import mean_with_interval, table_logps
from dpo_jax.intervals import wilson
from dpo_jax.paths import is_run
from dpo_jax.records import Chat, Comparison
from dpo_jax.runs.suites.registry import Subject
from dpo_jax.sampling import generate
from dpo_jax.training.tables import decode_texts, encode_options, prompt_ids

ANSWER_MEANINGS = {
    "answer_tokens": "Mean length of the answers in tokens, the token that ends one included. Longer is not better.",
    "cut": "Share of the answers that reached the limit of their length.",
}
MAX_LENGTH, MAX_PROMPT_LENGTH = 2048, 128  # tokens, as RewardBench cuts texts for DPO models


class Answers(NamedTuple):
    """Greedy answers to prompts.

    Attributes:
      texts: an answer to each prompt.
      lengths: its tokens, the one that ends it included.
      cut: whether it reached its limit.
      notes: lines on the limits.
    """

    texts: list[str]
    lengths: list[int]
    cut: list[bool]
    notes: tuple[str, ...]


def as_prompt(prompt: str | Sequence[Mapping[str, Any]], chats: bool) -> str | Chat:
    """Returns the prompt of an example: a text, or a conversation if `chats`; a text is the turn of a user.

    Several messages are a conversation always, which a model without a chat template refuses.
    """
    if isinstance(prompt, str):
        return Chat(({"role": "user", "content": prompt},)) if chats else prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user" and not chats:
        return prompt[0]["content"]
    return Chat(tuple(dict(message) for message in prompt))


def template_note(subject: Subject) -> str:
    """Returns a line on how prompts became text."""
    policy = f"the policy of step {subject.step}; " if is_run(subject.path) else ""
    if subject.chats:
        return f"{policy}prompts are turns of a user, written by the chat template"
    return f"{policy}prompts are texts, without a chat template: the answer continues the prompt as it is"


def answer(subject: Subject, prompts: Sequence[str], default: int) -> Answers:
    """Returns the policy's greedy answers, of at most `suite_max_new_tokens` or `default` tokens.

    A prompt that leaves less room in the model's positions gets the largest power of two that fits, so that few lengths
    are compiled; one that leaves none gets an empty answer. Notes count both.
    """
    max_new_tokens = subject.settings.suite_max_new_tokens or default
    asked = [as_prompt(prompt, subject.chats) for prompt in prompts]
    ids = prompt_ids(asked, subject.tokenizer, subject.settings.data)
    positions = subject.judge.model.architecture.max_positions
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(ids):
        room = positions - len(prompt)
        groups[max_new_tokens if room >= max_new_tokens else 1 << room.bit_length() - 1 if room > 0 else 0].append(i)
    found: list[Any] = [np.zeros(0, np.int32)] * len(ids)
    cut = [True] * len(ids)
    for room, members in groups.items():
        if room:
            new = _greedy(subject, [ids[i] for i in members], room)
            for i, tokens in zip(members, new, strict=True):
                found[i], cut[i] = tokens, len(tokens) == room and tokens[-1] not in subject.ends
    notes = [template_note(subject), f"greedy answers of at most {max_new_tokens} tokens; {sum(cut)} reached the limit"]
    short = {room: len(members) for room, members in sorted(groups.items()) if room < max_new_tokens and members}
    if short:
        limits = ", ".join(f"{room} tokens ({count})" for room, count in short.items())
        notes.append(f"long prompts leave less of the model's {positions} positions: answers of at most {limits}")
    return Answers(decode_texts(subject.tokenizer, found, subject.ends), [len(f) for f in found], cut, tuple(notes))


def _greedy(subject: Subject, prompts: list[list[int]], new_tokens: int) -> list[np.ndarray]:
    judge = subject.judge
    options = {"temperature": 0.0, "eos_id": subject.ends, "batch_size": judge.batch_size}
    rows = [np.array(prompt, np.int32) for prompt in prompts]
    return generate(judge.model, judge.params["policy"], rows, max_new_tokens=new_tokens, **options)


def implicit_rewards(
    subject: Subject, prompts: Sequence[Any], answers: Sequence[str], wheres: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns beta (log pi - log ref) of each answer to its prompt, float64[n], and notes.

    Args:
      subject: the policy.
      prompts: n texts or lists of messages.
      answers: n texts.
      wheres: `file:line` of each, for messages.

    Raises:
      UserError: there is no reference, or a text that cannot be encoded.
    """
    if "reference" not in subject.judge.params:
        why = "its loss has no reference" if is_run(subject.path) else "a model folder has no reference"
        raise UserError(f"{subject.path}: {why}; set --reference.path, or --reward for another reward")
    length = min(MAX_LENGTH, subject.judge.model.architecture.max_positions)
    options = encode_options(subject.settings.data) | {
        "max_length": length,
        "max_prompt_length": min(MAX_PROMPT_LENGTH, length // 2),
        "truncation": "paper_keep_end",
        "degenerate": "keep",
        "skip_bad_rows": 0,
    }
    examples = zip(prompts, answers, wheres, strict=True)
    table, report = encode([_comparison(subject, *example) for example in examples], subject.tokenizer, **options)
    judge = subject.judge._replace(max_length=length)
    beta = _beta(subject.settings.loss)
    policy, reference = (table_logps(judge, who, table)[:, 0, 0].astype(np.float64) for who in ("policy", "reference"))
    cut = report.prompts_truncated + report.responses_truncated
    notes = (f"reward: {beta:g} (log pi - log ref); texts over {length} tokens are cut ({cut})", template_note(subject))
    return beta * (policy - reference), notes


def _comparison(subject: Subject, prompt: Any, text: str, where: str) -> Comparison:
    asked = as_prompt(prompt, subject.chats)
    response = {"role": "assistant", "content": text} if isinstance(asked, Chat) else text
    return Comparison(asked, (response,), where=where)


def _beta(loss: Any) -> float:
    """Returns the beta of the first term of a loss that has one, else 1, which changes no comparison of rewards."""
    terms = [loss] if isinstance(loss, Mapping) else loss
    return float(next((term["beta"] for term in terms if term.get("beta")), 1.0))


def generator_name(path: str) -> str:
    """Returns the name of a policy in files of answers: that of its folder, without characters of other folders."""
    return re.sub(r"[^\w.-]+", "-", Path(path).resolve().name).strip(".") or "model"


def answer_metrics(answers: Answers) -> dict[str, dict[str, float]]:
    """Returns the mean length of answers in tokens, and the share that reached its limit."""
    cut = np.array(answers.cut, np.float64)
    low, high = wilson(float(cut.sum()), len(cut))
    return {
        "answer_tokens": mean_with_interval(np.array(answers.lengths, np.float64)),
        "cut": {"mean": float(cut.mean()), "low": low, "high": high, "n": len(cut)},
    }
