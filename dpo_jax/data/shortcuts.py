"""What predicts the label without understanding it: length, format, single words and pairs of words.

A preference that such a classifier finds will be learnt that way by a model too. Each is a logistic regression on the
difference of the two responses' features (on the features of one, where responses are unpaired), fitted to four fifths
of the prompts and judged on the rest.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.chat import plain_text
from dpo_jax.data.sources.base import prompt_key
from dpo_jax.records import Array, Comparison

MOST = 20_000  # comparisons looked at
LEAST = 50  # fewer tell nothing
HELD_OUT = 5  # every fifth prompt
LEAST_RESPONSES = 5  # in which a word must occur
SHOWN = 15
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters: each is a word
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
FORMATS: dict[str, Callable[[str], float]] = {
    "characters": len,
    "log of characters": lambda text: math.log1p(len(text)),
    "lines": lambda text: text.count("\n"),
    "list items": lambda text: len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE)),
    "headings": lambda text: len(re.findall(r"^#+ ", text, re.MULTILINE)),
    "bold": lambda text: text.count("**") // 2,
    "code blocks": lambda text: text.count("```") // 2,
    "digits": lambda text: sum(map(str.isdigit, text)),
    "question marks": lambda text: text.count("?"),
    "exclamation marks": lambda text: text.count("!"),
    "begins with a space": lambda text: text[:1].isspace(),
    "ends with punctuation": lambda text: text.rstrip()[-1:] in tuple(".!?。！？"),
}
LENGTHS = 2  # the first of them


class Shortcut(NamedTuple):
    """A classifier that sees one kind of feature.

    Attributes:
      name: what it sees.
      right: held-out comparisons it gets right; a draw counts half.
      total: held-out comparisons.
      chance: the share that is right without looking: half of pairs, the larger share of unpaired responses.
      top: the features that weigh most, with their weights: above 0 for the preferred response.
    """

    name: str
    right: float
    total: int
    chance: float
    top: list[tuple[str, float]]


def find_shortcuts(comparisons: Iterable[Comparison]) -> list[Shortcut]:
    """Classifiers by length, by format, and by words; none where there are too few comparisons to tell.

    Args:
      comparisons: of two responses, or unpaired ones; of a ranking the best and the worst are taken. Only the first
        20,000 are looked at.
    """
    pairs, keys = [], []
    for item in comparisons:
        texts = [None if response is None else plain_text(response) for response in item.responses]
        if len(texts) > 1:
            pairs.append((texts[0], texts[-1]))
            keys.append(prompt_key(item.prompt))
        if len(pairs) == MOST:
            break
    held = np.array([key // 7 % HELD_OUT == 0 for key in keys], bool)
    if len(pairs) < LEAST or held.all() or not held.any():
        return []
    formats = [[None if text is None else [f(text) for f in FORMATS.values()] for text in pair] for pair in pairs]
    names = list(FORMATS)
    return [
        _dense("length alone", names[:LENGTHS], [[x and x[:LENGTHS] for x in pair] for pair in formats], held),
        _dense("length and format", names, formats, held),
        _words("words and pairs of words", pairs, held),
    ]


def fit_shortcut(features: Any, labels: Array, strength: float = 1.0) -> Array:
    """Weights float64[D] that minimise sum log(1 + exp(-label * x w)) + strength/2 |w|^2.

    Args:
      features: a matrix [N, D], dense or sparse.
      labels: 1 or -1, [N].
      strength: of the penalty.
    """
    from scipy.optimize import minimize

    def loss(weights: Array) -> tuple[float, Array]:
        margins = labels * (features @ weights)
        slopes = -labels * 0.5 * (1 - np.tanh(margins / 2))
        total = np.logaddexp(0, -margins).sum() + strength / 2 * weights @ weights
        return total, features.T @ slopes + strength * weights

    return minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x


def _dense(name: str, names: Sequence[str], pairs: Sequence[Sequence[Any]], held: Array) -> Shortcut:
    zero = [0.0] * len(names)
    first, second = (np.array([pair[i] or zero for pair in pairs], float) for i in (0, 1))
    labels, signs = _labels(pairs)
    features = (first - second) * signs[:, None]
    features /= features[~held].std(axis=0) + 1e-12
    return _judged(name, [*names], features, labels, held)


def _words(name: str, pairs: Sequence[Sequence[Any]], held: Array) -> Shortcut:
    """Whether a word, or two words in a row, occurs in one response and not in the other."""
    from scipy.sparse import csr_matrix

    bags = [[None if text is None else _bag(text) for text in pair] for pair in pairs]
    seen = Counter(word for pair, out in zip(bags, held, strict=True) if not out for bag in pair if bag for word in bag)
    names = sorted(word for word, count in seen.items() if count >= LEAST_RESPONSES)
    place = {word: i for i, word in enumerate(names)}
    labels, signs = _labels(pairs)
    rows, columns, values = [], [], []
    for row, (first, second) in enumerate(bags):
        ours, theirs = first or set(), second or set()
        for word in ours ^ theirs:
            if word in place:
                rows.append(row)
                columns.append(place[word])
                values.append(signs[row] * (1.0 if word in ours else -1.0))
    features = csr_matrix((values, (rows, columns)), shape=(len(pairs), len(names)))
    return _judged(name, names, features, labels, held)


def _labels(pairs: Sequence[Sequence[Any]]) -> tuple[Array, Array]:
    """The label of each row, and the sign that its difference takes.

    A pair is a difference with label 1; an unpaired response its own features with its own label, whichever side it
    stands on.
    """
    labels = np.array([-1.0 if pair[0] is None else 1.0 for pair in pairs])
    return labels, labels.copy()


def _bag(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def _judged(name: str, names: list[str], features: Any, labels: Array, held: Array) -> Shortcut:
    if (labels < 0).any():  # unpaired: one kind of label may be more frequent, which is no feature of a response
        ones = np.ones((len(labels), 1))
        features, names = _beside(features, ones), [*names, "(any response)"]
    weights = fit_shortcut(features[~held], labels[~held])
    margins = labels[held] * (features[held] @ weights)
    order = [i for i in np.argsort(-np.abs(weights)) if weights[i]][:SHOWN]
    top = [(names[i], float(weights[i])) for i in order]
    wanted = float((labels[held] > 0).mean())
    chance = 0.5 if wanted == 1 else max(wanted, 1 - wanted)
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    return Shortcut(name, right, int(held.sum()), chance, top)


def _beside(features: Any, column: Array) -> Any:
    if isinstance(features, np.ndarray):
        return np.hstack([features, column])
    from scipy.sparse import csr_matrix, hstack

    return csr_matrix(hstack([features, column]))
