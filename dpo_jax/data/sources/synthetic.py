"""Synthetic film reviews with a known true reward: the paper's controlled-sentiment task, in minutes on a CPU.

A review is a neutral opening, two to four sentences of praise or blame, and a verdict. Each review has a mood that its
sentences follow with probability 3/4, so that the start of a review tells something about its rest. The reward of a
completion is the sum of its words' scores; one unit is one nat of Bradley-Terry log-odds.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator
from string import Formatter
from typing import TYPE_CHECKING

from dpo_jax.data.sources.base import unknown_choice
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS = "none: it writes its own"
SIZES = {"train": 20_000, "test": 1_000}
MOOD_KEPT = 0.75  # probability that a sentence follows the mood of its review
SAMPLES_PER_PROMPT = 200  # reviews sampled for each distinct prompt asked for, before giving up
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
SCORES = {
    **dict.fromkeys(("superb", "brilliant", "wonderful", "stunning", "adored", "masterful"), 1.0),
    **dict.fromkeys(("great", "charming", "moving", "clever", "witty", "loved", "gripping"), 0.75),
    **dict.fromkeys(("good", "warm", "fresh", "honest", "enjoyed", "lively"), 0.5),
    **dict.fromkeys(("decent", "pleasant", "liked", "tidy"), 0.25),
    **dict.fromkeys(("plain", "uneven", "endured", "slow"), -0.25),
    **dict.fromkeys(("weak", "bland", "stale", "clumsy", "disliked", "noisy"), -0.5),
    **dict.fromkeys(("boring", "lazy", "hollow", "silly", "resented", "tiresome", "messy"), -0.75),
    **dict.fromkeys(("awful", "dreadful", "terrible", "painful", "hated", "hopeless"), -1.0),
}
VERBS = ("adored", "loved", "enjoyed", "liked", "endured", "disliked", "resented", "hated")
SLOTS = {
    "genre": ("film", "movie", "comedy", "drama", "thriller", "western", "musical", "mystery", "cartoon", "romance"),
    "when": ("yesterday", "today", "recently", "twice", "again", "tonight"),
    "company": ("friends", "family", "colleagues", "strangers", "children", "neighbours"),
    "place": ("home", "school", "work", "sea", "night"),
    "relative": ("brother", "sister", "mother", "father", "cousin", "uncle", "aunt", "teacher"),
    "person": ("sailor", "nurse", "farmer", "painter", "soldier", "writer", "thief", "doctor", "singer", "baker"),
    "deed": ("finds", "loses", "follows", "steals", "builds", "forgets", "saves", "sells"),
    "thing": ("house", "letter", "horse", "secret", "garden", "boat", "fortune", "diary", "clock", "painting"),
    "setting": ("Paris", "London", "space", "winter", "wartime", "summer", "Egypt", "Texas"),
    "age": ("old", "new", "long", "short", "foreign", "silent", "famous", "forgotten"),
    "part": ("plot", "cast", "music", "ending", "dialogue", "acting", "script", "pace", "humour", "camera", "story"),
    "was": ("is", "was", "seems", "felt", "looks", "sounded"),
    "degree": ("very", "rather", "quite", "really", "simply", "truly", "so", "often"),
    "link": ("and", "while", "but", "because"),
    "once": ("Still", "Also", "Overall", "Sadly", "Luckily", "Meanwhile"),
    "praise": tuple(word for word, score in SCORES.items() if score > 0 and word not in VERBS),
    "blame": tuple(word for word, score in SCORES.items() if score < 0 and word not in VERBS),
    "liked": tuple(word for word in VERBS if SCORES[word] > 0),
    "hated": tuple(word for word in VERBS if SCORES[word] < 0),
}
OPENINGS = (
    "I watched this {genre} {when} with {company} at {place}.",
    "We saw the {age} {genre} {when} and talked about it for days.",
    "This {age} {genre} is about a {person} who {deed} a {thing} in {setting}.",
    "My {relative} chose this {genre} {when} because of the {part}.",
    "In this {genre} a {person} {deed} the {thing} of a {person}.",
    "A {person} and a {person} meet in {setting} and one {deed} a {thing}.",
    "The {genre} follows a {person} from {setting} who {deed} a {thing}.",
)
QUALITIES = {
    True: (
        " The {part} {was} {degree} {praise}.",
        " The {part} {was} {praise} {link} the {part} {was} {praise}.",
        " I found the {part} {degree} {praise}.",
        " {once}, the {part} {was} {praise}.",
        " What a {praise} {part}!",
    ),
    False: (
        " The {part} {was} {degree} {blame}.",
        " The {part} {was} {blame} {link} the {part} {was} {blame}.",
        " I found the {part} {degree} {blame}.",
        " {once}, the {part} {was} {blame}.",
        " What a {blame} {part}!",
    ),
}
VERDICTS = {
    True: (" I {liked} it.", " My {relative} {liked} it."),
    False: (" I {hated} it.", " My {relative} {hated} it."),
}
PIECE = re.compile(r" ?[A-Za-z]+|[^A-Za-z]")
Choice = tuple[int, str]


def synthetic_reward(prompt: str, completion: str) -> float:
    """Returns the true reward in nats: the sum of the scores of a completion's words; the prompt does not count.

    Labels sampled from it by Bradley-Terry agree with it on about four of five pairs of reviews.
    """
    return sum(SCORES.get(word, 0.0) for word in re.findall(r"[a-z]+", completion.lower()))


def read(path: tuple[str, ...] = (), split: str = "train", responses: int = 1) -> Iterator[Comparison]:
    """Yields reviews split after their first 2 to 8 tokens (words and punctuation marks), always the same ones.

    Args:
      path: (), because nothing is read.
      split: `train` has 20,000 reviews, `test` 1,000 others; a prefix may occur in both.
      responses: 0 gives the prefixes alone, 1 the rest of each review. 2 adds an independent continuation of the same
        prefix, and samples the order of the two by Bradley-Terry with the true reward.

    Raises:
      UserError: a path, an unknown split, or another number of responses.
    """
    if path or responses not in (0, 1, 2):
        raise UserError(f"data source 'synthetic' takes no path ({list(path)}) and at most 2 responses ({responses})")
    samples = _samples(split)
    for number, (prompt, first, other, coin) in enumerate(itertools.islice(samples, SIZES[split]), 1):
        where = f"synthetic {split}:{number}"
        if responses < 2:
            yield Comparison(prompt, (first,)[:responses], where=where)
        else:
            yield Comparison(prompt, _ordered(prompt, first, other, coin), where=where)


def synthetic_prompts(split: str, count: int) -> list[str]:
    """Returns the first `count` distinct prefixes of a split's endless stream of reviews.

    Raises:
      UserError: the split is unknown, or there are too few distinct prefixes.
    """
    found: dict[str, None] = {}
    for prompt, *_ in itertools.islice(_samples(split), SAMPLES_PER_PROMPT * count):
        found[prompt] = None
        if len(found) == count:
            return list(found)
    raise UserError(f"the synthetic world has fewer than {count} distinct prompts ({len(found)} found); ask for fewer")


def synthetic_tokenizer() -> "PreTrainedTokenizerFast":
    """Returns a fast tokenizer whose tokens are the world's words, punctuation marks and four special tokens.

    A word includes the space before it. So decoding restores the text, and the ids of a prompt and of its completion
    join to the ids of the review.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(_vocabulary())}, unk_token="<unk>"))
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _vocabulary() -> list[str]:
    """Returns special tokens, marks, words that begin a text and words after a space; sorted, so that ids are fixed."""
    quality = (template for group in (QUALITIES, VERDICTS) for templates in group.values() for template in templates)
    words = {word for filling in SLOTS.values() for word in filling}
    for template in (*OPENINGS, *quality):
        words |= set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", template)))
    first = {template.split()[0] for template in OPENINGS}
    return [*SPECIAL, *".,!", *sorted(first), *(f"▁{word}" for word in sorted(words))]


def _samples(split: str) -> Iterator[tuple[str, str, str, float]]:
    """Yields (prompt, continuation, independent continuation, number in [0, 1)) without end, always the same."""
    if split not in SIZES:
        raise unknown_choice("split of the synthetic world", split, SIZES)
    return _stream(random.Random(f"film reviews, {split}"))


def _stream(stream: random.Random) -> Iterator[tuple[str, str, str, float]]:
    while True:
        text, choices = _review(stream, [])
        pieces = PIECE.findall(text)
        prompt = "".join(pieces[: 2 + int(7 * stream.random())])
        # The choices inside the prompt stay; the mood and everything after the prompt are sampled again.
        other, _ = _review(stream, [choice for at, choice in choices if at < len(prompt)])
        yield prompt, text[len(prompt) :], other[len(prompt) :], stream.random()


def _review(stream: random.Random, fixed: list[str]) -> tuple[str, list[Choice]]:
    """Returns a review and its choices, each with its position in the text; the first choices are those in `fixed`."""
    choices: list[Choice] = []
    text = ""

    def choose(*options: str) -> str:
        sampled = options[int(len(options) * stream.random())]
        choices.append((len(text), fixed[len(choices)] if len(choices) < len(fixed) else sampled))
        return choices[-1][1]

    def write(*templates: str) -> None:
        nonlocal text
        for literal, slot, _, _ in Formatter().parse(choose(*templates)):
            text += literal
            text += choose(*SLOTS[slot]) if slot else ""

    write(*OPENINGS)
    mood = float(choose("0", "1"))
    for _ in range(int(choose("2", "3", "4"))):
        write(*QUALITIES[_praises(stream, mood)])
    write(*VERDICTS[_praises(stream, mood)])
    return text, choices


def _praises(stream: random.Random, mood: float) -> bool:
    """Samples whether a sentence praises, which follows the mood with probability `MOOD_KEPT`."""
    return (stream.random() < MOOD_KEPT) == (mood > 0)


def _ordered(prompt: str, first: str, other: str, coin: float) -> tuple[str, str]:
    """Returns two completions, best first by a Bradley-Terry sample: P(first is best) = sigmoid(reward difference)."""
    odds = math.exp(synthetic_reward(prompt, other) - synthetic_reward(prompt, first))
    return (first, other) if coin < 1 / (1 + odds) else (other, first)
