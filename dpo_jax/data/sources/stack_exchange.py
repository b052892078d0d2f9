"""Stack Exchange answers with votes (Lambert et al. 2023), read as the paper's code does."""

import itertools
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.sources.base import Item, Note, RawExample, or_error, prompt_key
from dpo_jax.data.sources.files import rows
from dpo_jax.data.sources.spool import Spool, first_places
from dpo_jax.data.sources.values import number_column, text_column
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

COLUMNS = "question, answers (text, pm_score)"
HUB_ID = "HuggingFaceH4/stack-exchange-preferences"
TEST_SHARE = 0.01
SHUFFLE_SEED = 42
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class QuestionPost(NamedTuple):
    """A question as a prompt, its answers in the order of the data, their scores, and `file:line`."""

    prompt: str
    answers: list[str]
    scores: list[float]
    where: str


def read(path: tuple[str, ...], split: str, responses: int) -> Iterator[Item]:
    """Yields all pairs of answers to each question, the one with the higher score first; of equals the later one.

    The data has one split, train. It is shuffled as `datasets` does with seed 42; the first hundredth is `test`, the
    rest `train`. A question that occurs twice keeps its first place and its last answers. With one response per prompt,
    that is the answer with the highest score, of equals the first.

    Args:
      path: hub ids, folders or files with the columns question (HTML) and answers (a list of objects with text, HTML,
        and pm_score); () for `HuggingFaceH4/stack-exchange-preferences`.
      split: `train` or `test`.
      responses: 0, 1 or 2.

    Raises:
      UserError: the data cannot be read, or another split or number of responses is asked for.
    """
    if responses not in (0, 1, 2):
        raise UserError(
            f"data source 'stack_exchange' has at most 2 responses per prompt, not {responses}; choose another loss"
        )
    if split not in ("train", "test"):
        raise UserError(f"data source 'stack_exchange' has the splits train and test, not {split!r}; set data.split")
    posts, keys, ranks, bad = Spool(), array("Q"), array("q"), list[tuple[int, UserError]]()
    ranked = _ranked(partial(rows, path or (HUB_ID,), "train"), split)
    for rank, example in ranked:
        found = example if isinstance(example, UserError) else or_error(_question, *example)
        if isinstance(found, UserError):
            bad.append((rank, found))
        else:
            posts.append(found)
            keys.append(prompt_key(found.prompt))
            ranks.append(rank)
    for _, error in sorted(bad, key=lambda pair: pair[0]):
        yield error
    kept = _last_of_each(np.frombuffer(keys, np.uint64), np.frombuffer(ranks, np.int64))
    for values in posts.take(kept):
        yield from _comparisons(QuestionPost(*values), responses)
    if len(posts) > len(kept):
        yield Note("questions left out: they occur again later", len(posts) - len(kept))


def html_to_text(html: str) -> str:
    """Returns the text that the paper's code keeps of HTML: outermost paragraphs and code, joined by blank lines.

    Text inside the elements of a paragraph (links, emphasis, code) is lost, and so is every other element.
    """
    parser = _Outermost()
    parser.feed(html)
    parser.close()
    return "\n\n".join(parser.parts)


class _Outermost(HTMLParser):
    """Collects the text directly in outermost <p>, and all text in outermost <code> and <code> in outermost <pre>."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self._open: list[str] = []  # the elements that are open, outermost first
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
        if self._open == ["p"]:  # BeautifulSoup, which the paper's code uses, counts a comment as text of the paragraph
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
        """Returns the depth of the open element whose text is collected, or 0."""
        if self._open[:1] == ["pre"]:
            return self._open.index("code") + 1 if "code" in self._open else 0
        return int(self._open[:1] in (["p"], ["code"]))


def _ranked(
    examples: Callable[[], Iterator[RawExample | UserError]], split: str
) -> Iterator[tuple[int, RawExample | UserError]]:
    """Yields the examples of a split, in the order of the data, with their places in the shuffled split.

    They are read twice, because the order of a shuffle depends on their number.
    """
    count = sum(1 for _ in examples())
    order, test = np.random.default_rng(SHUFFLE_SEED).permutation(count), int(count * TEST_SHARE)
    chosen = order[:test] if split == "test" else order[test:]
    ranks = np.full(count, -1)
    ranks[chosen] = np.arange(len(chosen))
    return ((int(rank), example) for rank, example in zip(ranks, examples(), strict=True) if rank >= 0)


def _last_of_each(keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Returns which questions are left: of each key the one of the highest rank, in the order of the lowest."""
    by_rank = np.argsort(ranks)
    first = first_places(keys[by_rank])
    last = np.zeros(len(keys), np.int64)
    np.maximum.at(last, first, np.arange(len(keys)))
    return by_rank[last[np.unique(first)]]


def _question(where: str, example: dict[str, Any]) -> QuestionPost:
    answers = example.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"{where}: 'answers' must be a list of objects with text and pm_score")
    scores = [number_column(where, "pm_score", answer.get("pm_score")) for answer in answers]
    texts = [f" {html_to_text(text_column(where, answer, 'text'))}" for answer in answers]
    prompt = f"\n\nHuman: {html_to_text(text_column(where, example, 'question'))}\n\nAssistant:"
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
