"""Shortcuts in preference labels: classifiers that see only length, format, or words and pairs of words.

If such a classifier predicts the label, a model can learn it instead of the preference. Each is a logistic regression
on the difference of the two responses' features (on the features of the one response, if unpaired), fitted to four
fifths of the prompts and tested on the rest.
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
from dpo_jax.records import Comparison

MOST = 20_000  # comparisons used
LEAST = 50  # with fewer comparisons no classifier is fitted
HELD_OUT = 5  # one in so many prompts is held out
LEAST_RESPONSES = 5  # training responses in which a word must occur to be a feature
SHOWN = 15  # features in `Shortcut.top`
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters: each counts as a word
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
LENGTHS = 2  # the first so many formats measure length


class Shortcut(NamedTuple):
    """The result of a classifier that sees one kind of feature.

    Attributes:
      name: the kind of feature.
      right: held-out comparisons classified correctly; a tie counts half.
      total: held-out comparisons.
      chance: accuracy without features: one half for pairs, the share of the more frequent label if unpaired.
      top: (feature, weight) of the largest weights; above 0 for the preferred response.
    """

    name: str
    right: float
    total: int
    chance: float
    top: list[tuple[str, float]]


def find_shortcuts(comparisons: Iterable[Comparison]) -> list[Shortcut]:
    """Returns classifiers by length, by format and by words; [] if there are too few comparisons.

    Args:
      comparisons: pairs, unpaired examples, or rankings, whose best and worst responses are used. Only the first
        20,000 count.
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
        _by_numbers("length alone", names[:LENGTHS], [[x and x[:LENGTHS] for x in pair] for pair in formats], held),
        _by_numbers("length and format", names, formats, held),
        _by_words("words and pairs of words", pairs, held),
    ]


def fit_shortcut(features: Any, labels: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Returns the weights float64[D] that minimize sum_i log(1 + exp(-label_i x_i w)) + strength / 2 |w|^2.

    Args:
      features: [N, D], dense or sparse.
      labels: [N], 1 or -1.
      strength: weight of the penalty.
    """
    from scipy.optimize import minimize

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = labels * (features @ weights)
        slopes = -labels * 0.5 * (1 - np.tanh(margins / 2))
        total = np.logaddexp(0, -margins).sum() + strength / 2 * weights @ weights
        return total, features.T @ slopes + strength * weights

    return minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x


def _by_numbers(name: str, names: Sequence[str], pairs: Sequence[Sequence[Any]], held: np.ndarray) -> Shortcut:
    zero = [0.0] * len(names)
    first, second = (np.array([pair[i] or zero for pair in pairs], float) for i in (0, 1))
    labels = _labels(pairs)
    features = (first - second) * labels[:, None]
    features /= features[~held].std(axis=0) + 1e-12
    return _fit_and_test(name, [*names], features, labels, held)


def _by_words(name: str, pairs: Sequence[Sequence[Any]], held: np.ndarray) -> Shortcut:
    """Features: whether a word, or a pair of adjacent words, occurs in one response and not in the other."""
    from scipy.sparse import csr_matrix

    bags = [[None if text is None else _bag(text) for text in pair] for pair in pairs]
    seen = Counter(word for pair, out in zip(bags, held, strict=True) if not out for bag in pair if bag for word in bag)
    names = sorted(word for word, count in seen.items() if count >= LEAST_RESPONSES)
    place = {word: i for i, word in enumerate(names)}
    labels = _labels(pairs)
    rows, columns, values = [], [], []
    for index, (first, second) in enumerate(bags):
        ours, theirs = first or set(), second or set()
        for word in ours ^ theirs:
            if word in place:
                rows.append(index)
                columns.append(place[word])
                values.append(labels[index] * (1.0 if word in ours else -1.0))
    features = csr_matrix((values, (rows, columns)), shape=(len(pairs), len(names)))
    return _fit_and_test(name, names, features, labels, held)


def _labels(pairs: Sequence[Sequence[Any]]) -> np.ndarray:
    """Returns the label of each comparison, float64[N]: -1 for an unwanted unpaired response, else 1.

    It is the sign of the feature difference (first - second) too. A pair keeps its difference. An unpaired response
    stands alone in it, second if unwanted, and the sign turns the difference into its features.
    """
    return np.array([-1.0 if pair[0] is None else 1.0 for pair in pairs])


def _bag(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def _fit_and_test(name: str, names: list[str], features: Any, labels: np.ndarray, held: np.ndarray) -> Shortcut:
    if (labels < 0).any():  # unpaired: an intercept for the more frequent label, which is no feature of a response
        ones = np.ones((len(labels), 1))
        features, names = _with_column(features, ones), [*names, "(any response)"]
    weights = fit_shortcut(features[~held], labels[~held])
    margins = labels[held] * (features[held] @ weights)
    order = [i for i in np.argsort(-np.abs(weights)) if weights[i]][:SHOWN]
    top = [(names[i], float(weights[i])) for i in order]
    wanted = float((labels[held] > 0).mean())
    chance = 0.5 if wanted == 1 else max(wanted, 1 - wanted)
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    return Shortcut(name, right, int(held.sum()), chance, top)


def _with_column(features: Any, column: np.ndarray) -> Any:
    if isinstance(features, np.ndarray):
        return np.hstack([features, column])
    from scipy.sparse import csr_matrix, hstack

    return csr_matrix(hstack([features, column]))
