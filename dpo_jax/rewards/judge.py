"""Judges of two responses to a prompt, by a reward or by asking a model.

A judge maps matches to verdicts. A model that reads one response after the other may prefer the first: the order is
sampled for each match, or both orders are asked for. Each verdict records its order.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.rewards.words import Reward

ORDERS = ("random", "both")


class Match(NamedTuple):
    """Two responses to one prompt, as texts."""

    prompt: str
    a: str
    b: str


class Verdict(NamedTuple):
    """One judgement of a match.

    Attributes:
      score: 1 if `a` is better, 0 if `b` is, 0.5 for a tie; None if the judge's answer has no verdict.
      a_first: whether `a` was read before `b`; None if the judge does not read them in an order.
      reason: the two scores, or the model's answer.
    """

    score: float | None
    a_first: bool | None
    reason: str


Judge = Callable[[Sequence[Match]], list[tuple[Verdict, ...]]]
"""Matches -> verdicts on each: one, or two if both orders are asked for."""


def by_reward(reward: Reward) -> Judge:
    """Returns the judge that prefers the higher reward; equal rewards are a tie."""

    def judge(matches: Sequence[Match]) -> list[tuple[Verdict, ...]]:
        prompts = [m.prompt for m in matches]
        both = zip(reward(prompts, [m.a for m in matches]), reward(prompts, [m.b for m in matches]), strict=True)
        return [(Verdict(0.5 + 0.5 * float(np.sign(a - b)), None, f"{a:.6g} against {b:.6g}"),) for a, b in both]

    return judge


def by_asking(ask: Callable[[list[str]], list[str]], question: str, order: str, seed: int) -> Judge:
    """Returns the judge that asks a model. Equal responses are a tie and are not asked about.

    Args:
      ask: questions -> answers.
      question: a name in `QUESTIONS`, or a file that contains {prompt}, {first} and {second}.
      order: "random", sampled for each match from the seed and its texts; "both", two verdicts.
      seed: seed of the order.

    Raises:
      UserError: unknown question or order.
    """
    if order not in ORDERS:
        raise UserError(f"order: unknown order {order!r}; choose one of {', '.join(ORDERS)}")
    template = question_template(question)

    def judge(matches: Sequence[Match]) -> list[tuple[Verdict, ...]]:
        asked = [
            (place, a_first)
            for place, match in enumerate(matches)
            if match.a != match.b
            for a_first in ((True, False) if order == "both" else (sample_order(match, seed),))
        ]
        answers = ask([fill_template(template, matches[place], a_first) for place, a_first in asked])
        found: list[list[Verdict]] = [[] for _ in matches]
        for (place, a_first), answer in zip(asked, answers, strict=True):
            found[place].append(Verdict(parse_verdict(answer, a_first), a_first, answer))
        return [tuple(verdicts) or (Verdict(0.5, None, "the same text"),) for verdicts in found]

    return judge


def sample_order(match: Match, seed: int) -> bool:
    """Returns whether `a` is read first: a fair coin that depends only on the seed and the match."""
    text = "\0".join((str(seed), *match)).encode("utf-8", "surrogatepass")
    return bool(hashlib.sha256(text).digest()[0] & 1)


def fill_template(template: str, match: Match, a_first: bool) -> str:
    """Returns the question on a match; braces within the match's texts are left alone."""
    first, second = (match.a, match.b) if a_first else (match.b, match.a)
    texts = {"prompt": match.prompt, "first": first, "second": second}
    return re.sub(r"\{(prompt|first|second)\}", lambda found: texts[found[1]].strip(), template)


_BETTER = re.compile(r"^\W*[Bb]etter:\W*(A|B|(?:a )?[Tt]ie)\W*$", re.MULTILINE)


def parse_verdict(answer: str, a_first: bool) -> float | None:
    """Returns the score of `a` in an answer's last line `Better: ...`, or None without such a line."""
    found = _BETTER.findall(answer)
    if not found:
        return None
    return {"A": float(a_first), "B": float(not a_first)}.get(found[-1], 0.5)


def question_template(question: str) -> str:
    """Returns the template of a question, built in or read from a file."""
    if question in QUESTIONS:
        return QUESTIONS[question]
    try:
        template = Path(question).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        known = ", ".join(QUESTIONS)
        raise UserError(f"question: {question!r} is neither {known} nor a readable file ({e})") from e
    if lacks := [place for place in ("{prompt}", "{first}", "{second}", "Better:") if place not in template]:
        raise UserError(
            f"{question}: lacks {', '.join(lacks)}; ask for a last line Better: A, Better: B or Better: tie"
        )
    return template


_END = """
First say in one sentence what decides between the two. Then end with a line of its own that reads exactly
Better: A
or
Better: B
or, where neither is better,
Better: tie
"""
# The paper's questions (appendix C.2), reworded: summaries, with and without regard to length, and dialogues.
QUESTIONS: Mapping[str, str] = {
    "summary": "Below are a post from a forum and two summaries of it. Which of them summarises the post better: which "
    "says what matters most in it?\n\nPost:\n{prompt}\n\nSummary A:\n{first}\n\nSummary B:\n{second}\n" + _END,
    "concise": "Below are a post from a forum and two summaries of it. Which of them summarises the post better? A "
    "good summary says what matters most in the post, gets it right, and is short: details that do not matter count "
    "against it.\n\nPost:\n{prompt}\n\nSummary A:\n{first}\n\nSummary B:\n{second}\n" + _END,
    "dialogue": "Below are a conversation with a chatbot and two replies to its last turn. Which reply is more helpful "
    "to the person who asked?\n\nConversation:\n{prompt}\n\nReply A:\n{first}\n\nReply B:\n{second}\n" + _END,
}
