"""Judges: functions that say of two responses to a prompt which is better, by a reward or by asking a model.

A judge maps matches to verdicts. One that reads both responses one after the other may prefer whichever stands first:
their order is drawn for each match, or both are asked for, and every verdict says which it was.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.rewards.registry import Reward

ORDERS = ("random", "both")


class Match(NamedTuple):
    """Two responses to one prompt, as texts."""

    prompt: str
    a: str
    b: str


class Verdict(NamedTuple):
    """One judgement of a match.

    Attributes:
      score: 1 where `a` is better, 0 where `b` is, 0.5 a tie; None where the judge's answer says nothing.
      a_first: whether `a` was read before `b`; None where neither was.
      said: on what it rests: scores, or what a model answered.
    """

    score: float | None
    a_first: bool | None
    said: str


Judge = Callable[[Sequence[Match]], list[tuple[Verdict, ...]]]
"""Matches -> the verdicts on each: one, or two where both orders were asked for."""


def by_reward(reward: Reward) -> Judge:
    """Returns the judge that prefers the higher reward; equal rewards are a tie."""

    def judge(matches: Sequence[Match]) -> list[tuple[Verdict, ...]]:
        prompts = [m.prompt for m in matches]
        both = zip(reward(prompts, [m.a for m in matches]), reward(prompts, [m.b for m in matches]), strict=True)
        return [(Verdict(0.5 + 0.5 * float(np.sign(a - b)), None, f"{a:.6g} against {b:.6g}"),) for a, b in both]

    return judge


def by_asking(ask: Callable[[list[str]], list[str]], question: str, order: str, seed: int) -> Judge:
    """Returns the judge that asks a model.

    Equal responses are a tie without being asked about.

    Args:
      ask: questions -> answers.
      question: a name of `QUESTIONS`, or a file with {prompt}, {first} and {second} in it.
      order: "random", drawn for each match from the seed and its texts; "both", two verdicts.
      seed: of the order.

    Raises:
      UserError: there is no such question or order.
    """
    if order not in ORDERS:
        raise UserError(f"order: {order!r} is not known; choose one of {', '.join(ORDERS)}")
    template = question_template(question)

    def judge(matches: Sequence[Match]) -> list[tuple[Verdict, ...]]:
        asked = [
            (place, a_first)
            for place, match in enumerate(matches)
            if match.a != match.b
            for a_first in ((True, False) if order == "both" else (load_judge(match, seed),))
        ]
        answers = ask([fill_template(template, matches[place], a_first) for place, a_first in asked])
        found: list[list[Verdict]] = [[] for _ in matches]
        for (place, a_first), answer in zip(asked, answers, strict=True):
            found[place].append(Verdict(parse_verdict(answer, a_first), a_first, answer))
        return [tuple(verdicts) or (Verdict(0.5, None, "the same text"),) for verdicts in found]

    return judge


def load_judge(match: Match, seed: int) -> bool:
    """Returns whether `a` is to be read first: a fair draw that depends on the seed and the match alone."""
    text = "\0".join((str(seed), *match)).encode("utf-8", "surrogatepass")
    return bool(hashlib.sha256(text).digest()[0] & 1)


def fill_template(template: str, match: Match, a_first: bool) -> str:
    """Returns the question on a match; what stands in braces within its texts stays as it is."""
    first, second = (match.a, match.b) if a_first else (match.b, match.a)
    texts = {"prompt": match.prompt, "first": first, "second": second}
    return re.sub(r"\{(prompt|first|second)\}", lambda found: texts[found[1]].strip(), template)


_BETTER = re.compile(r"^\W*[Bb]etter:\W*(A|B|(?:a )?[Tt]ie)\W*$", re.MULTILINE)


def parse_verdict(answer: str, a_first: bool) -> float | None:
    """Returns the score of `a` that an answer's last line `Better: ...` says, or None where there is none."""
    found = _BETTER.findall(answer)
    if not found:
        return None
    return {"A": float(a_first), "B": float(not a_first)}.get(found[-1], 0.5)


def question_template(question: str) -> str:
    """Returns the text of a question, built in or in a file."""
    if question in QUESTIONS:
        return QUESTIONS[question]
    try:
        template = Path(question).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        known = ", ".join(QUESTIONS)
        raise UserError(f"question: {question!r} is none of {known}, nor a file that can be read ({e})") from e
    if lacks := [place for place in ("{prompt}", "{first}", "{second}", "Better:") if place not in template]:
        raise UserError(f"{question}: lacks {', '.join(lacks)}; the answer is to end with a line Better: A, B or tie")
    return template


_END = """
First say in one sentence what decides between the two. Then end with a line of its own that reads exactly
Better: A
or
Better: B
or, where neither is better,
Better: tie
"""
# What the paper asks (appendix C.2), in our words: of summaries with and without a word on length, and of dialogues.
QUESTIONS: Mapping[str, str] = {
    "summary": "Below are a post from a forum and two summaries of it. Which of them summarises the post better: which "
    "says what matters most in it?\n\nPost:\n{prompt}\n\nSummary A:\n{first}\n\nSummary B:\n{second}\n" + _END,
    "concise": "Below are a post from a forum and two summaries of it. Which of them summarises the post better? A "
    "good summary says what matters most in the post, gets it right, and is short: details that do not matter count "
    "against it.\n\nPost:\n{prompt}\n\nSummary A:\n{first}\n\nSummary B:\n{second}\n" + _END,
    "dialogue": "Below are a conversation with a chatbot and two replies to its last turn. Which reply is more helpful "
    "to the person who asked?\n\nConversation:\n{prompt}\n\nReply A:\n{first}\n\nReply B:\n{second}\n" + _END,
}
