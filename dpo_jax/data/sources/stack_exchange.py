"""Answers of Stack Exchange by votes (Lambert et al. 2023), read as the original DPO code does it."""

import itertools
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.sources.base import Item, Note, RawExample, convert_examples
from dpo_jax.data.sources.columns import number_column, text_column
from dpo_jax.data.sources.files import file_rows
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

HUB_ID = "HuggingFaceH4/stack-exchange-preferences"
TEST_SHARE = 0.01
SHUFFLE_SEED = 42
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class QuestionPost(NamedTuple):
    """A question, its answers in the order of the data, their scores, and where it stands."""

    prompt: str
    answers: list[str]
    scores: list[float]
    where: str


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields all pairs of answers to each question, the one with the higher score first; of equals the later one.

    The data has one split, train. It is shuffled as `datasets` does with seed 42; the first hundredth is `test`, the
    rest `train`. A question that is asked twice stands where it first appears, with the answers of the last time. With
    one response there is one example for each question: the answer with the highest score, of equals the first.

    Args:
      path: hub ids, folders or files with the columns question (HTML) and answers (a list of objects with text, HTML,
        and pm_score); nothing is `HuggingFaceH4/stack-exchange-preferences`.
      split: `train` or `test`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be found.
    """
    if responses not in (0, 1, 2):
        raise UserError(f"data source 'stack_exchange' has at most 2 responses to a prompt, not {responses}")
    if split not in ("train", "test"):
        raise UserError(f"data source 'stack_exchange' has the splits train and test, not {split!r}")
    questions: dict[str, QuestionPost] = {}
    count = 0
    for found in convert_examples(_split(list(file_rows(path or (HUB_ID,), "train")), split), _question):
        if isinstance(found, UserError):
            yield found
        else:
            questions[found.prompt] = found
            count += 1
    for question in questions.values():
        yield from _comparisons(question, responses)
    if count > len(questions):
        yield Note("questions left out, since they are asked again", count - len(questions))


def plain_text(html: str) -> str:
    """What the original keeps of HTML: of the outermost elements, paragraphs' own text and code, blank lines between.

    Text inside the elements of a paragraph (links, emphasis, code) is lost, and so is every other element.
    """
    parser = _Outermost()
    parser.feed(html)
    parser.close()
    return "\n\n".join(parser.parts)


class _Outermost(HTMLParser):
    """Collects the texts of outermost <p> (their own), of <code> in outermost <pre>, and of outermost <code>."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self._open: list[str] = []  # the elements around what comes next
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self._open.append(tag)
            if self._collected() == len(self._open):
                self._text = []

    def handle_data(self, data: str) -> None:
        depth = self._collected()
        if depth and (self._open[0] != "p" or depth == len(self._open)):
            self._text.append(data)

    def handle_comment(self, data: str) -> None:
        if self._open == ["p"]:  # the original's library counts a comment as a paragraph's own text
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open:
            if self._collected() == len(self._open):
                text = "".join(self._text)
                self.parts.append(text if self._open == ["p"] else f"<code>{text}</code>")
            if self._open.pop() == tag:
                break

    def close(self) -> None:
        super().close()
        if self._open:
            self.handle_endtag(self._open[0])

    def _collected(self) -> int:
        """How deep the element stands whose text is collected here, or 0."""
        if self._open[:1] == ["pre"]:
            return self._open.index("code") + 1 if "code" in self._open else 0
        return int(self._open[:1] in (["p"], ["code"]))


def _split(every: list[RawExample | UserError], split: str) -> Iterator[RawExample | UserError]:
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(every))
    test = int(len(every) * TEST_SHARE)
    return (every[i] for i in (order[:test] if split == "test" else order[test:]))


def _question(where: str, row: dict[str, Any]) -> QuestionPost:
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"{where}: 'answers' must be a list of objects with text and pm_score")
    scores = [number_column(where, "pm_score", answer.get("pm_score")) for answer in answers]
    texts = [f" {plain_text(text_column(where, answer, 'text'))}" for answer in answers]
    prompt = f"\n\nHuman: {plain_text(text_column(where, row, 'question'))}\n\nAssistant:"
    return QuestionPost(prompt, texts, scores, where)


def _comparisons(question: QuestionPost, responses: int) -> Iterator[Comparison]:
    prompt, answers, scores, where = question
    if responses < 2:
        best = max(answers, key=lambda answer: scores[answers.index(answer)])
        yield Comparison(prompt, (best,)[:responses], where=where)
        return
    for i, j in itertools.combinations(range(len(answers)), 2):
        better, worse = (i, j) if scores[i] > scores[j] else (j, i)
        yield Comparison(prompt, (answers[better], answers[worse]), where=where, scores=(scores[better], scores[worse]))
