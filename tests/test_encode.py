"""Tokenizing, truncation, the report, and tables."""

import numpy as np
import pytest
from words import BOS, BOTH_LONG, EOS, OPTIONS, ids, lists, make_tokenizer, pair, words

from dpo_jax.data import cache
from dpo_jax.data.encode import encode
from dpo_jax.data.report import LengthQuantiles
from dpo_jax.data.sources.base import Note, load_comparisons, prompt_key
from dpo_jax.data.special_tokens import SpecialTokens
from dpo_jax.data.spelling import token_ids
from dpo_jax.data.table import KINDS, Table
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import load_tokenizer
from dpo_jax.records import Comparison, Tokens


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(eos_token="<eos>", bos_token="<bos>")


def run(comparisons, tokenizer, **options):
    return encode(comparisons, tokenizer, **(OPTIONS | options))


# (prompt, chosen, rejected) in tokens without EOS; at most 10 in all, prompts are cut to 4.
FIT = (6, 3, 2)  # 6 + 4 = 10
ONE_OVER = (7, 3, 2)  # 7 + 4 = 11
SHORT_PROMPT = (3, 8, 1)  # 3 + 9 = 12
LONG_PROMPT_FITS = (8, 1, 1)  # 8 + 2 = 10
CUTS = {
    "paper_keep_end": {
        FIT: [ids(1, 6, eos=False), ids(41, 3), ids(61, 2)],
        ONE_OVER: [ids(4, 4, eos=False), ids(41, 3), ids(61, 2)],
        SHORT_PROMPT: [ids(1, 3, eos=False), ids(41, 6, eos=False), ids(61, 1)],
        BOTH_LONG: [ids(6, 4, eos=False), ids(41, 6, eos=False), ids(61, 6, eos=False)],
        LONG_PROMPT_FITS: [ids(1, 8, eos=False), ids(41, 1), ids(61, 1)],
    },
    "paper_keep_start": {
        FIT: [ids(1, 6, eos=False), ids(41, 3), ids(61, 2)],
        ONE_OVER: [ids(1, 4, eos=False), ids(41, 3), ids(61, 2)],
        SHORT_PROMPT: [ids(1, 3, eos=False), ids(41, 6, eos=False), ids(61, 1)],
        BOTH_LONG: [ids(1, 4, eos=False), ids(41, 6, eos=False), ids(61, 6, eos=False)],
        LONG_PROMPT_FITS: [ids(1, 8, eos=False), ids(41, 1), ids(61, 1)],
    },
    "keep_start": {
        FIT: [ids(1, 6, eos=False), ids(41, 3), ids(61, 2)],
        ONE_OVER: [ids(1, 7, eos=False), ids(41, 3, eos=False), ids(61, 2)],
        SHORT_PROMPT: [ids(1, 3, eos=False), ids(41, 7, eos=False), ids(61, 1)],
        BOTH_LONG: [ids(1, 9, eos=False), ids(41, 1, eos=False), ids(61, 1, eos=False)],
        LONG_PROMPT_FITS: [ids(1, 8, eos=False), ids(41, 1), ids(61, 1)],
    },
    "refuse": {FIT: [ids(1, 6, eos=False), ids(41, 3), ids(61, 2)]},
}


@pytest.mark.parametrize(("mode", "sizes"), [(mode, sizes) for mode in CUTS for sizes in CUTS[mode]])
def test_truncation(tokenizer, mode, sizes):
    table, report = run([pair(*sizes)], tokenizer, truncation=mode)
    expected = CUTS[mode][sizes]
    assert lists(table[0]) == expected
    assert report.prompts_truncated == (len(expected[0]) < sizes[0])
    assert report.responses_truncated == sum(response[-1] != EOS for response in expected[1:])


def test_keep_start_drops_prompts_that_leave_no_room(tokenizer):
    table, report = run([pair(9, 1, 1), pair(10, 1, 1), pair(11, 1, 1)], tokenizer, truncation="keep_start")
    assert len(table) == 1
    assert (report.read, report.kept, report.prompt_too_long_dropped) == (3, 1, 2)


def test_refuse_names_the_comparison_and_its_lengths(tokenizer):
    with pytest.raises(UserError, match=r"^f:7: prompt of 7 tokens and response of 4 exceed data.max_length 10; raise"):
        run([pair(*FIT), pair(*ONE_OVER, where="f:7")], tokenizer, truncation="refuse")


def test_bos_belongs_to_the_prompt_and_is_never_cut(tokenizer):
    table, _ = run([pair(5, 3, 2), pair(6, 3, 2), Comparison("", ("w1", "w2"))], tokenizer, add_bos=True)
    assert lists(table[0])[0] == [BOS, 1, 2, 3, 4, 5]
    assert lists(table[1])[0] == [BOS, 4, 5, 6]  # 1 + 6 + 4 = 11, one over
    assert lists(table[2]) == [[BOS], [1, EOS], [2, EOS]]
    table, _ = run([pair(6, 3, 2)], tokenizer, add_bos=True, truncation="paper_keep_start")
    assert lists(table[0])[0] == [BOS, 1, 2, 3]


@pytest.mark.parametrize(
    ("comparison", "options", "message"),
    [
        (Comparison("w1 <eos>", ("w1", "w2"), where="f:3"), {}, "^f:3: the prompt contains the EOS token '<eos>'"),
        (Comparison("w1", ("w1", "<eos>"), where="f:3"), {}, "^f:3: response 2 contains the EOS token '<eos>'; remove"),
        (Comparison("", ("w1", "w2"), where="f:3"), {}, "^f:3: the prompt has no tokens.*set data.add_bos"),
        (Comparison("w1", ("w1",), where="f:3"), {}, "^f:3: 1 responses where the first comparison has 2"),
        (
            Comparison("w1", ("w1", " \n"), where="f:3"),
            {"degenerate": "refuse"},
            "^f:3: empty response; remove the example",
        ),
        (Comparison("w1", ("w1", "w1"), where="f:3"), {"degenerate": "refuse"}, "^f:3: identical response; remove the"),
        (pair(1, 1, 1), {"truncation": "paper_keep_ends"}, "unknown truncation .* did you mean 'paper_keep_end'"),
        (pair(1, 1, 1), {"degenerate": "dropp"}, "unknown choice for data.degenerate 'dropp'; did you mean 'drop'"),
        (
            pair(1, 1, 1),
            {"max_prompt_length": 10},
            "data.max_prompt_length 10 must lie between 1 and data.max_length 10",
        ),
        (pair(1, 1, 1), {"max_prompt_length": 0}, "data.max_prompt_length 0 must lie between 1 and"),
        (pair(1, 1, 1), {"max_prompt_length": 1, "add_bos": True}, "data.max_prompt_length 1 must lie between 2 and"),
        (pair(1, 1, 1), {"max_length": 1}, "data.max_length 1 leaves no room"),
    ],
)
def test_comparisons_that_cannot_be_encoded_are_named(tokenizer, comparison, options, message):
    with pytest.raises(UserError, match=message):
        run([pair(1, 1, 1), comparison], tokenizer, **options)


def test_modes_that_do_not_use_max_prompt_length_do_not_ask_for_it(tokenizer):
    assert len(run([pair(1, 1, 1)], tokenizer, truncation="keep_start", max_prompt_length=256)[0]) == 1


def test_unsuitable_tokenizers_are_refused():
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        run([pair(1, 1, 1)], make_tokenizer(bos_token="<bos>"))
    with pytest.raises(UserError, match=r"data\.add_bos is set but the tokenizer has no BOS token"):
        run([pair(1, 1, 1)], make_tokenizer(eos_token="<eos>"), add_bos=True)
    with pytest.raises(UserError, match="object is not a fast tokenizer"):
        run([pair(1, 1, 1)], object())


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(UserError, match=r"none of 1 comparisons is left to encode; counted: .*'empty_dropped': 1"):
        run([Comparison("w1", ("w1", ""))], tokenizer)
    with pytest.raises(UserError, match="none of 0 comparisons"):
        run([], tokenizer)


def test_degenerate_comparisons_are_counted_by_kind(tokenizer):
    comparisons = [
        pair(2, 3, 4, weight=0.5),
        Comparison("w1", ("", "w2")),
        Comparison("w1", ("w2", " \t")),
        Comparison("w1", ("", "")),
        Comparison("w1", ("w2 w3", "w2 w3")),
    ]
    table, report = run(comparisons, tokenizer)
    assert (report.read, report.kept, report.empty_dropped, report.identical_dropped) == (5, 1, 3, 1)
    assert table.weights.tolist() == [0.5]
    table, report = run(comparisons, tokenizer, degenerate="keep")
    assert (report.kept, report.empty_kept, report.identical_kept, report.empty_dropped) == (5, 3, 1, 0)
    assert report.identical_after_truncation == 0  # counts only those that truncation made identical
    assert lists(table[1]) == [[1], [EOS], [2, EOS]]
    assert "3 kept despite an empty response" in report.lines()
    elsewhere = [pair(2, 3, 4), pair(1, 2, 3, misplaced=True), Comparison("w1", ("w2", ""), misplaced=True)]
    table, report = run(elsewhere, tokenizer)
    assert (report.kept, report.misplaced_dropped, report.empty_dropped) == (1, 1, 1)
    assert "1 dropped: the rejected transcript does not start with the prompt" in report.lines()
    assert run(elsewhere, tokenizer, degenerate="keep")[1].misplaced_kept == 1
    with pytest.raises(UserError, match="misplaced response; remove the example"):
        run(elsewhere[:2], tokenizer, degenerate="refuse")
    alone = [Comparison("w1", ("w2",)), Comparison("w1", ("",))]
    assert run(alone, tokenizer)[1].empty_dropped == 1


def test_report(tokenizer):
    comparisons = [pair(2, 3, 4), pair(4, 1, 2), Comparison("w1", (words(41, 9), words(41, 8)))]
    _, report = run(comparisons, tokenizer)
    assert (report.tokens, report.scored, report.identical_after_truncation) == (33, 26, 1)
    assert report.prompt == LengthQuantiles(7 / 3, 2.0, 3.96, 4)
    assert report.response == LengthQuantiles(26 / 6, 4.5, 6.0, 6)  # 4 5 2 3 6 6
    assert report.sequence == LengthQuantiles(7.0, 7.0, 7.0, 7)
    assert report.lines() == [
        "3 comparisons read, 3 kept: 33 tokens, 26 scored",
        "2 responses truncated (they lose their EOS)",
        "1 kept with responses that are identical after truncation",
        "tokens per prompt: mean 2.3, p50 2, p99 3.96, max 4",
        "tokens per response: mean 4.3, p50 4.5, p99 6, max 6",
        "tokens per prompt with longest response: mean 7.0, p50 7, p99 7, max 7",
    ]


def test_special_tokens_are_looked_up_once_per_pass(tokenizer, monkeypatch):
    calls, original = [], SpecialTokens.of
    monkeypatch.setattr(SpecialTokens, "of", lambda its: calls.append(1) or original(its))
    run([pair(2, 3, 4)] * 9, tokenizer, add_bos=None)
    assert len(calls) == 2  # to check the options, and to encode


def test_unknown_tokens_are_counted():
    tokenizer = make_tokenizer(eos_token="<eos>", unk_token="w0")
    report = run([Comparison("w1 x", ("y z", "w2"))], tokenizer)[1]
    assert report.unknown_tokens == 3
    assert "3 tokens are <unk>: the tokenizer has no token for that text" in report.lines()
    assert run([Comparison("w1", ("w2", "w3"))], tokenizer)[1].unknown_tokens == 0


def test_bad_examples_are_counted_up_to_a_limit(tokenizer):
    items = [pair(1, 1, 1), UserError("f:2: broken"), pair(2, 2, 2), Comparison("w1", ("w1 <eos>", "w2"), where="f:4")]
    table, report = run(items, tokenizer, skip_bad_rows=2)
    assert (len(table), report.read, report.kept, report.bad_skipped) == (2, 4, 2, 2)
    assert "2 bad examples skipped; the first: f:2: broken" in report.lines()
    with pytest.raises(
        UserError, match=r"^f:4: response 1 contains the EOS .* \(bad example 2; data\.skip_bad_rows is 1\)"
    ):
        run(items, tokenizer, skip_bad_rows=1)
    with pytest.raises(UserError, match=r"^f:2: broken$"):
        run(items, tokenizer)
    long = [pair(*FIT), pair(*ONE_OVER), Comparison("w1", ("w2", ""))]
    refused = {"truncation": "refuse", "degenerate": "refuse", "skip_bad_rows": 2}
    assert run(long, tokenizer, **refused)[1].bad_skipped == 2


def test_notes_are_added_up(tokenizer):
    items = [Note("ties"), pair(1, 1, 1), Note("ties", 2), Note("others")]
    report = run(items, tokenizer)[1]
    assert (report.read, report.notes) == (1, {"ties": 3, "others": 1})
    assert {"3 ties", "1 others"} <= set(report.lines())


def test_table(tokenizer, tmp_path):
    table, _ = run([pair(2, 3, 4, weight=0.5), pair(4, 1, 2)], tokenizer)
    assert table.offsets.tolist() == [[0, 2, 6, 11], [11, 15, 17, 20]]
    assert table.prompt_lengths.tolist() == [2, 4]
    assert table.response_lengths.tolist() == [[4, 5], [2, 3]]
    assert table.scored_lengths.tolist() == [9, 5]
    assert table.lengths().tolist() == [9, 7]  # 2 + 3 + 4 and 4 + 1 + 2
    assert (len(table), table.responses) == (2, 2)
    kinds = {name: (getattr(table, name).dtype, getattr(table, name).ndim) for name in KINDS}
    assert kinds == KINDS
    assert table.prompts.tolist() == [prompt_key(words(1, 2)), prompt_key(words(1, 4))]
    cache.write_table(tmp_path, [table[0], table[1]])
    again = Table.open(tmp_path)
    assert isinstance(again.ids, np.memmap)
    assert [lists(again[i]) for i in range(2)] == [lists(table[i]) for i in range(2)]
    assert again[0].weight == 0.5
    assert again.digest == table.digest
    np.save(tmp_path / "offsets.npy", table.offsets.astype(np.int32))
    with pytest.raises(ValueError, match="holds no table"):
        Table.open(tmp_path)


def test_tables_of_token_ids_and_of_indices():
    rows = [Tokens([1, 2], ([3], [4, 5]), 0.5, 9), Tokens([6], ([7], [8]))]
    table = Table.of(rows)
    assert table.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert table.offsets.tolist() == [[0, 2, 3, 5], [5, 6, 7, 8]]
    taken = table.take(np.array([1, 0, 1]))
    assert [lists(taken[i])[0] for i in range(3)] == [[6], [1, 2], [6]]
    assert taken.weights.tolist() == [1.0, 0.5, 1.0]
    assert taken.prompts.tolist() == [0, 9, 0]
    for bad in ([], [Tokens([1], ([],))], [Tokens([], ([1],))]):
        with pytest.raises(ValueError, match="at least one token in its prompt"):
            Table.of(bad)


def test_labels_scores_and_absent_responses_reach_the_table(tokenizer):
    items = [
        Comparison("w1 w2", ("w3", None), 2.0, "f:1", 0.75),
        Comparison("w1", (None, "w4 w5"), where="f:2"),
        Comparison("w1", ("w3", "w4"), where="f:3", scores=(2.0, -1.0)),
    ]
    table, report = run(items, tokenizer)
    assert [lists(table[i]) for i in range(3)] == [
        [[1, 2], [3, EOS], []],
        [[1], [], [4, 5, EOS]],
        [[1], [3, EOS], [4, EOS]],
    ]
    assert table.lengths().tolist() == [3, 3, 3]  # a response's last token takes no place, nor does an absent one
    assert table.response_lengths.tolist() == [[2, 0], [0, 3], [2, 2]]
    assert table.preferences.tolist() == [0.75, 1.0, 1.0]
    assert table.scores.tolist() == [[0, 0], [0, 0], [2, -1]]
    assert table[2].scores == (2.0, -1.0)
    assert report.response == pytest.approx((9 / 4, 2.0, 2.97, 3))
    assert report.kept == 3
    with pytest.raises(ValueError, match="at least one token in its prompt and a response"):
        Table.of([Tokens([1], ([], []))])


def test_the_digest_depends_on_ids_and_offsets_but_not_on_weights():
    table = Table.of([Tokens([1, 2], ([3, 4],))])
    assert table.digest == Table.of([Tokens([1, 2], ([3, 4],), 0.5)]).digest
    assert table.digest != Table.of([Tokens([1], ([2, 3, 4],))]).digest
    assert table.digest != Table.of([Tokens([1, 2], ([3, 5],))]).digest


def originals_cut(tokenizer, prompt, chosen, rejected, keep):
    """Truncates by the rule of the paper's code, written independently: 512 tokens, 256 of them for the prompt."""
    eos = [tokenizer.eos_token_id]
    p, c, r = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, chosen, rejected))
    c, r = c + eos, r + eos
    over = len(p) + max(len(c), len(r)) - 512
    if over > 0 and len(p) > 256:
        over -= len(p) - 256
        p = p[:256] if keep == "start" else p[len(p) - 256 :]
    if over > 0:
        c, r = c[:256], r[:256]
    return [p, c, r]


@pytest.mark.parametrize(("name", "keep"), [("gpt2", "end"), ("pythia", "start")])
def test_real_dialogues_are_cut_as_the_original_cuts_them(shared, name, keep):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    rows = load_comparisons("hh", (str(shared / "data" / "hh" / "harmless-base"),), "test", 2)
    options = {"max_length": 512, "max_prompt_length": 256, "degenerate": "keep", "add_bos": False}
    table, report = encode(rows, tokenizer, truncation=f"paper_keep_{keep}", **options)
    assert len(table) == report.kept == 2312
    assert (report.empty_kept, report.identical_kept) == (6, 0)
    assert report.prompts_truncated > 20
    for number, row in enumerate(rows):
        expected = originals_cut(tokenizer, row.prompt, *row.responses, keep)
        assert lists(table[number]) == expected, row.where


def test_a_tokenizer_with_padding_of_its_own_is_not_padded(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm2_sorachio")
    options = OPTIONS | {"max_length": 100, "truncation": "refuse"}
    table, _ = encode([Comparison("a", ("b", "b c d e f"))], tokenizer, **options)
    assert table.offsets.tolist() == [[0, 1, 3, 9]]


def test_texts_have_the_ids_of_a_call_of_the_tokenizer(shared):
    """Each distinct one is tokenized once; a class with its own way to encode is asked its own way."""
    texts = ["one two", "", " three\n\n", "one two", "<|endoftext|> \u00e9\u4e16 \U0001f600", "one  two"]
    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    expected = gpt2(texts, add_special_tokens=False)["input_ids"]
    gpt2.backend_tokenizer.enable_padding(length=9)
    gpt2.backend_tokenizer.enable_truncation(1)
    assert token_ids(texts, gpt2) == expected
    gpt2.split_special_tokens = True
    assert token_ids(texts, gpt2) == gpt2(texts, add_special_tokens=False)["input_ids"] != expected

    class Reversing(type(gpt2)):
        def _encode_plus(self, text, **options):
            found = super()._encode_plus(text, **options)
            return {"input_ids": [ids[::-1] for ids in found["input_ids"]]}

    gpt2.split_special_tokens, gpt2.__class__ = False, Reversing
    assert token_ids(texts, gpt2) == [ids[::-1] for ids in expected]
