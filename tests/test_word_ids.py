"""Ids of texts by their words: those of whole texts, for every tokenizer whose words keep within their borders."""

import numpy as np
import pytest
from words import make_tokenizer

from dpo_jax.data import word_ids
from dpo_jax.data.spelling import token_ids
from dpo_jax.data.word_ids import WordIds, finds_words
from dpo_jax.models.huggingface.folder import load_tokenizer

SCRAPS = [" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", " \n", "\xa0", "\x1c", "\x85", "\u3000", "\u0301", "\0"]
SCRAPS += ["'S", "12345", ".", "!!", "(", "\u4e16\u754c", "\xe9", "\U0001f600", "cat", "<|endoftext|>", " " * 24]


@pytest.mark.parametrize("name", ["gpt2", "pythia", "qwen2.5", "smollm2_sorachio", "minimind_6400"])
def test_words_have_the_ids_that_they_have_in_their_texts(shared, name):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(SCRAPS, draw.integers(30))) for _ in range(2000)]
    assert finds_words(tokenizer)
    given = WordIds(tokenizer)
    found = given(texts[:1500]) + given(texts[1000:])
    expected = token_ids(texts, tokenizer)
    assert list(map(list, found)) == expected[:1500] + expected[1000:]


def test_words_are_remembered_within_bounds(shared, monkeypatch):
    """Each is tokenized once until they take too much memory."""
    calls, original = [], word_ids.token_ids
    monkeypatch.setattr(word_ids, "token_ids", lambda new, its: calls.append(sorted(new)) or original(new, its))
    monkeypatch.setattr(word_ids, "MEMORY", 2 * word_ids.SIZE + 9)
    given = WordIds(load_tokenizer(shared / "tokenizers" / "gpt2"))
    for texts in (["a b"], ["b b", "a"], ["a c"], ["c"]):
        given(texts)
    assert calls == [[" b", "a"], ["b"], [" c", "a"], ["c"]]


def test_tokenizers_whose_words_may_cross_a_space_get_whole_texts(shared):
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

    def changed(change):
        gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
        change(gpt2.backend_tokenizer, gpt2)
        return finds_words(gpt2)

    def cut(pattern, behavior="isolated"):
        steps = [pre_tokenizers.Split(Regex(pattern), behavior), pre_tokenizers.ByteLevel(False, use_regex=False)]
        return changed(lambda rust, _: setattr(rust, "pre_tokenizer", pre_tokenizers.Sequence(steps)))

    known = sorted(word_ids.WORDS)
    assert [cut(known[0]), cut(known[1]), cut(known[0], "removed"), cut("x")] == [True, True, False, False]
    others = [pre_tokenizers.ByteLevel(True), pre_tokenizers.ByteLevel(False, use_regex=False), None]
    assert not any(changed(lambda rust, _, one=one: setattr(rust, "pre_tokenizer", one)) for one in others)
    for one in (normalizers.Strip(), normalizers.ByteLevel(), normalizers.Sequence([normalizers.NFC()] * 2)):
        known_steps = type(one) is normalizers.Sequence
        assert changed(lambda rust, _, one=one: setattr(rust, "normalizer", one)) == known_steps
    assert not changed(lambda rust, _: setattr(rust.model, "dropout", 0.5))
    late = [pre_tokenizers.ByteLevel(False, use_regex=False), pre_tokenizers.Split(Regex(known[0]), "isolated")]
    assert not changed(lambda rust, _: setattr(rust, "pre_tokenizer", pre_tokenizers.Sequence(late)))
    tokens = [AddedToken("one two"), AddedToken(" one", single_word=True)]
    for token in [*tokens, AddedToken("<t>", lstrip=True), AddedToken("<t>", rstrip=True)]:
        assert not changed(lambda _, own, token=token: own.add_tokens([token]))
    assert not finds_words(make_tokenizer(eos_token="<eos>"))


def test_steps_in_python_get_whole_texts(shared):
    from tokenizers import normalizers, pre_tokenizers

    class Letters:
        def normalize(self, text):
            pass

        def pre_tokenize(self, text):
            text.split(lambda i, word: [word[j : j + 1] for j in range(len(str(word)))])

    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    rust, usual, changed = gpt2.backend_tokenizer, gpt2.backend_tokenizer.pre_tokenizer, normalizers.Normalizer
    for normalizer in (changed.custom(Letters()), normalizers.Sequence([changed.custom(Letters())]), None):
        rust.normalizer = normalizer
        assert finds_words(gpt2) == (normalizer is None)
    letters = pre_tokenizers.PreTokenizer.custom(Letters())
    for pre_tokenizer in (pre_tokenizers.Sequence([letters, usual]), letters):
        rust.pre_tokenizer = pre_tokenizer
        assert not finds_words(gpt2)
    assert [list(ids) for ids in WordIds(gpt2)(["cat"])] == token_ids(["cat"], gpt2) == [[66, 64, 83]]
