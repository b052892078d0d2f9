"""The synthetic reviews: texts, true reward, tokenizer."""

import itertools
import math
import re
import statistics

import pytest

from dpo_jax.data.encode import encode
from dpo_jax.data.sources import synthetic
from dpo_jax.data.sources.base import load_comparisons
from dpo_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.synthetic_tokenizer()


@pytest.fixture(scope="module")
def pairs():
    return load_comparisons("synthetic", (), "train", 2)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_world_never_changes():
    first = next(synthetic.read((), "test", 1))
    assert first.prompt == "A singer and a baker meet"
    assert first.responses == (
        " in wartime and one saves a house. Meanwhile, the story seems masterful. The humour seems"
        " dreadful but the camera is awful. I found the pace so awful. My uncle resented it.",
    )
    assert synthetic.synthetic_prompts("train", 3) == [
        "My cousin chose",
        "A baker and a nurse",
        "The film follows a doctor from",
    ]
    assert len(synthetic.synthetic_tokenizer()) == 202


def test_reviews_are_cut_after_two_to_eight_tokens(tokenizer):
    for split, count in (("train", 20_000), ("test", 1_000)):
        reviews = load_comparisons("synthetic", (), split, 1)
        assert len(reviews) == count
        sizes = {len(ids(tokenizer, review.prompt)) for review in reviews[:1000]}
        assert sizes == set(range(2, 9))
    assert reviews[999].where == "synthetic test:1000"


def test_splits_share_no_review():
    train, test = (
        {c.prompt + c.responses[0] for c in load_comparisons("synthetic", (), split, 1)} for split in ("train", "test")
    )
    assert len(train) == 20_000
    assert not train & test


def test_the_same_prefix_whatever_the_number_of_responses(pairs):
    for number, (prompt, example) in enumerate(
        zip(load_comparisons("synthetic", (), "train", 0), load_comparisons("synthetic", (), "train", 1), strict=True)
    ):
        assert prompt.responses == ()
        assert prompt.prompt == example.prompt == pairs[number].prompt
        assert example.responses[0] in pairs[number].responses


def test_reward_is_the_sum_of_the_completions_words():
    assert synthetic.synthetic_reward("superb superb", " The plot was awful and the cast was good.") == -0.5
    assert synthetic.synthetic_reward("", " Great, superb! Superb.") == 2.75
    assert synthetic.synthetic_reward("", "") == 0.0
    assert synthetic.synthetic_reward("", "superbly ungreat") == 0.0


def test_labels_agree_with_the_reward_on_about_four_of_five_pairs(pairs):
    gaps = [
        synthetic.synthetic_reward("", first) - synthetic.synthetic_reward("", second)
        for first, second in (p.responses for p in pairs)
    ]
    chance = statistics.mean(1 / (1 + math.exp(-abs(gap))) for gap in gaps)
    right = statistics.mean(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)
    assert 0.75 < chance < 0.85
    assert abs(right - chance) < 0.01
    assert 0.75 < right < 0.85


def test_both_continuations_of_a_prefix_belong_to_the_world(pairs, tokenizer):
    for pair in pairs[:2000]:
        for response in pair.responses:
            assert tokenizer.unk_token_id not in ids(tokenizer, pair.prompt + response)
            assert response[0] in " .,"
            assert response[-1] == "."
    assert sum(pair.responses[0] == pair.responses[1] for pair in pairs) == 0


def test_the_mood_makes_what_follows_likelier():
    ends = []
    for review in load_comparisons("synthetic", (), "train", 1):
        words = re.findall("[a-z]+", review.responses[0])
        praise = [synthetic.SCORES[word] > 0 for word in words if word in synthetic.SCORES]
        ends.append(praise[0] == praise[-1])
    # Each agrees with the mood three times in four, so the two agree with probability 9/16 + 1/16.
    assert statistics.mean(ends) == pytest.approx(0.625, abs=0.01)


def test_what_follows_a_prefix_is_sampled_again(pairs):
    """`My <relative> chose` goes on with " this" and then one of ten genres: two samples agree once in ten."""
    followed = [[response.split()[1] for response in pair.responses] for pair in pairs if ends_in_chose(pair)]
    assert len(followed) > 300
    assert statistics.mean(first == other for first, other in followed) == pytest.approx(0.1, abs=0.05)


def ends_in_chose(pair):
    return pair.prompt.startswith("My ") and pair.prompt.endswith(" chose")


def test_prompts_are_distinct_and_of_their_split():
    prompts = synthetic.synthetic_prompts("test", 1500)
    assert len(set(prompts)) == 1500
    assert prompts[:400] == list(dict.fromkeys(c.prompt for c in synthetic.read((), "test", 0)))[:400]
    assert prompts[:10] == synthetic.synthetic_prompts("test", 10)


def test_too_few_distinct_prompts_is_an_error(monkeypatch):
    monkeypatch.setattr(synthetic, "SAMPLES_PER_PROMPT", 1)
    with pytest.raises(UserError, match=r"has fewer than 1000 distinct prompts \(\d+ found\); ask for fewer"):
        synthetic.synthetic_prompts("test", 1000)


def test_tokenizer_gives_back_the_text_and_ids_concatenate(pairs, tokenizer):
    for pair in itertools.chain(pairs[:3000], load_comparisons("synthetic", (), "test", 2)):
        for response in pair.responses:
            whole = ids(tokenizer, pair.prompt + response)
            assert ids(tokenizer, pair.prompt) + ids(tokenizer, response) == whole
            assert tokenizer.decode(whole) == pair.prompt + response
            assert tokenizer.decode(ids(tokenizer, response)) == response


def test_tokenizer_round_trip_to_disk(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    special = ("<pad>", "<unk>", "<bos>", "<eos>")
    for one in (tokenizer, again):
        assert (one.pad_token, one.unk_token, one.bos_token, one.eos_token) == special
        assert (one.pad_token_id, one.unk_token_id, one.bos_token_id, one.eos_token_id) == (0, 1, 2, 3)
        assert 150 <= len(one) == one.vocab_size <= 256
        text = "The film follows a baker from Paris. Sadly, the plot was very good."
        assert one.decode([*ids(one, text), one.eos_token_id], skip_special_tokens=True) == text
        assert ids(one, "I dislike quarks") == [*ids(one, "I"), 1, 1]
    assert again.get_vocab() == tokenizer.get_vocab()


def test_the_world_encodes(pairs, tokenizer):
    options = {"max_length": 64, "max_prompt_length": 16, "degenerate": "refuse", "add_bos": True}
    table, report = encode(pairs[:500], tokenizer, truncation="refuse", **options)
    assert (report.kept, report.prompts_truncated, report.responses_truncated) == (500, 0, 0)
    assert 3 <= report.prompt.mean <= 9
    assert table.ids.max() < len(tokenizer)


def test_paths_splits_and_responses_that_it_lacks_are_refused():
    with pytest.raises(UserError, match="unknown split of the synthetic world 'tests'; did you mean 'test'"):
        list(synthetic.read((), "tests", 1))
    with pytest.raises(UserError, match=r"takes no path \(\['x'\]\)"):
        list(synthetic.read(("x",), "test", 1))
    with pytest.raises(UserError, match=r"at most 2 responses \(3\)"):
        list(synthetic.read((), "test", 3))
