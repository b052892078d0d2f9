"""The sources of public data, each on a few examples with its columns, against comparisons written by hand."""

import json
import tracemalloc

import numpy as np
import pytest

from dpo_jax.data.sources import spool, stack_exchange
from dpo_jax.data.sources.base import Note, holdout, load_comparisons, only_comparisons, open_stream
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def read(source, path, responses=2, split="train"):
    """Returns (comparisons, notes: text -> number)."""
    items = list(open_stream(source, path, split, responses))
    notes = {item.text: item.number for item in items if isinstance(item, Note) and item.number}
    return list(only_comparisons(items)), notes


def shp_row(history, a, b, scores, label):
    row = {"history": history, "human_ref_A": a, "human_ref_B": b, "labels": label}
    return row | dict(zip(("score_A", "score_B"), scores, strict=True))


def test_shp_drops_close_scores_and_merges_prompts(tmp_path):
    rows = [
        shp_row("why?", "x", "y", (10, 5), 1),
        shp_row("how?", "u", "v", (3, 9), 0),
        shp_row("why?", "x", "z", (10, 6), 1),  # 10 / 6 is less than 2
        shp_row("why?", "w", "y", (4, 40), 0),
        shp_row("so?", "a", "b", (1, 1), 1),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    pairs, notes = read("shp", path)
    assert [(c.prompt, c.responses, c.scores, c.where[-1]) for c in pairs] == [
        ("\n\nHuman: why?\n\nAssistant:", (" x", " y"), (10.0, 5.0), "1"),
        ("\n\nHuman: why?\n\nAssistant:", (" y", " w"), (40.0, 4.0), "4"),
        ("\n\nHuman: how?\n\nAssistant:", (" v", " u"), (9.0, 3.0), "2"),
    ]
    assert notes == {"examples left out: scores differ by a factor below 2": 2}
    # The answer y has its first score, 5, so that x with 10 is the best one of its prompt.
    assert [c.responses for c in read("shp", path, 1)[0]] == [(" x",), (" v",)]
    assert [c.responses for c in read("shp", path, 0)[0]] == [(), ()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 2}, "'labels' must be true or false, not 2"),
        ({"score_A": 0}, "'score_A' must be from 1 to"),
        ({"score_B": float("nan")}, "'score_B' must be from 1 to .*, not nan"),
        ({"history": None}, "'history' must be text, not null"),
    ],
)
def test_shp_names_a_bad_example(tmp_path, change, message):
    path = write(tmp_path / "a.jsonl", [shp_row("q", "a", "b", (9, 1), 1), shp_row("q", "a", "b", (9, 1), 1) | change])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}"):
        read("shp", path)


HTML = {
    "<p>one <em>two</em> three <a href='#'>four</a>.</p>": "one  three .",
    "<p>a</p>\n<p>b</p>": "a\n\nb",
    "<pre><code>x = 1\n</code></pre>": "<code>x = 1\n</code>",
    "<pre class='c'><span><code>a <b>b</b></code></span><code>c</code></pre>": "<code>a b</code>\n\n<code>c</code>",
    "<code>f(x)</code>": "<code>f(x)</code>",
    "bare <ul><li><p>lost</p></li></ul><h1>lost</h1><pre>lost</pre>": "",
    "<p>1 &lt; 2 &amp; 3<br>4</p>": "1 < 2 & 34",
    "<p>not closed <b>lost": "not closed ",
    "</p><p>a</b>b<!--c--></p>": "abc",
    "": "",
}


@pytest.mark.parametrize("html", HTML)
def test_html_keeps_what_the_original_keeps(html):
    assert stack_exchange.html_to_text(html) == HTML[html]


def question(text, *answers):
    return {"question": f"<p>{text}</p>", "answers": [{"text": f"<p>{t}</p>", "pm_score": s} for t, s in answers]}


def test_stack_exchange_is_all_pairs_with_ties_to_the_later_one(tmp_path):
    rows = [question("q", ("a", 1), ("b", 3), ("c", 3)), question("r", ("d", 0), ("e", -1))]
    pairs, notes = read("stack_exchange", write(tmp_path / "a.jsonl", rows))
    found = {c.prompt: [(d.responses, d.scores) for d in pairs if d.prompt == c.prompt] for c in pairs}
    assert found == {
        "\n\nHuman: q\n\nAssistant:": [
            ((" b", " a"), (3.0, 1.0)),
            ((" c", " a"), (3.0, 1.0)),
            ((" c", " b"), (3.0, 3.0)),
        ],
        "\n\nHuman: r\n\nAssistant:": [((" d", " e"), (0.0, -1.0))],
    }
    assert notes == {}
    assert {c.responses for c in read("stack_exchange", (str(tmp_path / "a.jsonl"),), 1)[0]} == {(" b",), (" d",)}


def test_stack_exchange_splits_as_datasets_shuffles(tmp_path):
    import datasets

    rows = [question(f"q{i}", ("a", 1), ("b", 2)) for i in range(250)]
    path = write(tmp_path / "a.jsonl", rows)
    shuffled = datasets.Dataset.from_list([{"i": i} for i in range(250)]).shuffle(seed=42)["i"]
    prompts = [f"\n\nHuman: q{i}\n\nAssistant:" for i in shuffled]
    assert [c.prompt for c in read("stack_exchange", path, split="test")[0]] == prompts[:2]
    assert [c.prompt for c in read("stack_exchange", path)[0]] == prompts[2:]
    with pytest.raises(UserError, match="has the splits train and test, not 'dev'"):
        read("stack_exchange", path, split="dev")


def test_stack_exchange_takes_the_last_of_questions_asked_twice(tmp_path):
    rows = [question("q", (f"a{i}", 1), (f"b{i}", 0)) for i in range(3)]
    pairs, notes = read("stack_exchange", write(tmp_path / "a.jsonl", rows))
    last = int(np.random.default_rng(42).permutation(3)[-1])
    assert [c.responses for c in pairs] == [(f" a{last}", f" b{last}")]
    assert notes == {"questions left out: they occur again later": 2}
    empty, unrated = question("q"), {"question": "q", "answers": [{"text": "a", "pm_score": None}]}
    for row, message in (
        (empty, "'answers' must be a list of objects"),
        (unrated, "'pm_score' must be a number, not nu"),
    ):
        with pytest.raises(UserError, match=rf"a\.jsonl:1: {message}"):
            read("stack_exchange", write(tmp_path / "a.jsonl", [row]))


def test_tldr(tmp_path):
    post = {"id": "t3", "post": " I did it. ", "title": "Did it", "subreddit": "tifu", "site": None, "article": None}
    news = {"id": "n", "post": None, "title": "News", "subreddit": None, "article": "It rained.\n"}
    summaries = [{"text": " I did.", "policy": "a", "note": "ok"}, {"text": "Someone did", "policy": "b", "note": None}]
    rows = [
        {"info": post, "summaries": summaries, "choice": 0, "worker": "w", "batch": "b", "split": "train", "extra": {}},
        {"info": news, "summaries": summaries, "choice": 1},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert [c[:2] for c in read("tldr", path)[0]] == [
        ("SUBREDDIT: r/tifu\n\nTITLE: Did it\n\nPOST: I did it.\n\nTL;DR:", (" I did.", " Someone did")),
        ("ARTICLE: It rained.\n\nTL;DR:", (" Someone did", " I did.")),
    ]
    assert [c.responses for c in read("tldr", path, 1)[0]] == [(" I did.",), (" Someone did",)]
    for change, message in {
        ("choice", 2): "'choice' must be true or false, not 2",
        ("summaries", None): "'summaries' must be a list of two objects",
        ("info", "x"): "'info' must be an object",
    }.items():
        with pytest.raises(UserError, match=rf"a\.jsonl:1: {message}"):
            read("tldr", write(tmp_path / "a.jsonl", [rows[0] | {change[0]: change[1]}]))


def test_imdb_cuts_reviews_after_two_to_eight_words(tmp_path, shared):
    rows = [{"text": f"A film of{' many' * i} words.<br /><br />It ends {i}.", "label": 1} for i in range(200)]
    path = write(tmp_path / "a.jsonl", [*rows, {"text": "Too short", "label": 0}])
    examples, notes = read("imdb", path, 1)
    sizes = [len(c.prompt.split()) for c in examples]
    assert sorted(set(sizes)) == [2, 3, 4, 5, 6, 7, 8]
    texts = [f"A film of{' many' * i} words. It ends {i}." for i in range(200)]
    assert len(examples) >= 190
    assert {c.prompt + c.responses[0] for c in examples} <= set(texts)
    assert all(c.responses[0][0] == " " for c in examples)
    assert notes["reviews left out: no longer than their prompt"] == 201 - len(examples) >= 1
    assert [c.prompt for c in read("imdb", path, 0)[0]] == [c.prompt for c in examples]
    with pytest.raises(UserError, match="has reviews, no preferences; make pairs from a model with dpo-jax pairs"):
        read("imdb", path)
    real, _ = read("imdb", (str(shared / "data" / "imdb" / "test_2k.jsonl.gz"),), 1)
    assert len(real) == 2000
    assert 4.8 < np.mean([len(c.prompt.split()) for c in real]) < 5.2


def turns(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant"), contents, strict=True)]


def test_ultrafeedback_binarised(tmp_path):
    row = {
        "prompt": "q", "prompt_id": "1", "chosen": turns("q", "a"), "rejected": turns("q", "b"),
        "messages": turns("q", "a"), "score_chosen": 8.5, "score_rejected": 3.0,
    }  # fmt: skip
    path = write(tmp_path / "a.jsonl", [row, row | {"score_rejected": 8.5}])
    ask, (better, worse) = Chat((turns("q", "")[0],)), (turns("q", t)[1] for t in "ab")
    pairs, notes = read("ultrafeedback", path)
    assert pairs == [Comparison(ask, (better, worse), where=f"{path[0]}:1", scores=(8.5, 3.0))]
    assert notes == {"pairs of equal scores left out": 1}
    assert [c[:2] for c in read("ultrafeedback", path, 1)[0]] == [(ask, (better,))] * 2
    with pytest.raises(UserError, match="the chosen one must have the higher score"):
        read("ultrafeedback", write(tmp_path / "a.jsonl", [row | {"score_chosen": 1}]))


def test_ultrafeedback_scored(tmp_path):
    completions = [{"model": m, "response": m, "overall_score": s} for m, s in zip("abcd", (5, 7.5, 5, 1), strict=True)]
    path = write(tmp_path / "a.jsonl", [{"source": "s", "instruction": "q", "models": [], "completions": completions}])
    pairs, notes = read("ultrafeedback", path)
    assert ["".join(r["content"] for r in c.responses) for c in pairs] == ["ba", "bc", "bd", "ad", "cd"]
    assert pairs[-1].scores == (5.0, 1.0)
    assert notes == {"pairs of equal scores left out": 1}
    assert [c.responses[0]["content"] for c in read("ultrafeedback", path, 1)[0]] == ["b"]
    with pytest.raises(UserError, match="two responses have the same score, a tie"):
        read("ultrafeedback", path, 4)
    completions[2]["overall_score"] = 6
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "completions": completions}])
    (ranking,) = read("ultrafeedback", path, 4)[0]
    assert "".join(r["content"] for r in ranking.responses) == "bcad"
    with pytest.raises(UserError, match="4 responses, and the loss needs 3"):
        read("ultrafeedback", path, 3)


def test_hub_ids_are_the_default(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or [])
    for source, responses in {"shp": 2, "stack_exchange": 2, "tldr": 2, "imdb": 1, "ultrafeedback": 2}.items():
        with pytest.raises(UserError, match="has no comparisons"):
            load_comparisons(source, (), "train", responses)
    assert list(dict.fromkeys(asked)) == [  # one is read twice: its shuffle depends on the number of rows
        ("stanfordnlp/SHP", "train"),
        ("HuggingFaceH4/stack-exchange-preferences", "train"),
        ("openai/summarize_from_feedback", "comparisons", "train"),
        ("stanfordnlp/imdb", "train"),
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
    ]


def many_rows(source, count):
    """Returns rows of 3 kB, of which every prompt comes three times, far apart."""
    for i in range(count):
        prompt, texts = f"{i % (count // 3)} {'x' * 1000}", [f"{side}{i} {'y' * 1000}" for side in "ab"]
        if source == "shp":
            yield shp_row(prompt, *texts, (10, 4), 1)
        elif source == "hh":
            chosen, rejected = (f"\n\nHuman: {prompt}\n\nAssistant: {text}" for text in texts)
            yield {"chosen": chosen, "rejected": rejected}
        else:
            answers = [{"text": f"<p>{text}</p>", "pm_score": score} for score, text in enumerate(texts)]
            yield {"question": f"<p>{prompt}</p>", "answers": answers}


@pytest.mark.parametrize("source", ["hh", "shp", "stack_exchange"])
def test_groups_of_a_prompt_wait_on_disk(source, tmp_path, monkeypatch):
    """In memory is less than a seventh of the texts (2.7 MB); the same is read wherever they wait."""
    path = write(tmp_path / "a.jsonl", many_rows(source, 900))
    expected = [hash(repr(item)) for item in open_stream(source, path, "train", 2)]
    prompts = [c.prompt for c in load_comparisons(source, path, "train", 2)]
    assert len(set(prompts)) == 300
    assert list(dict.fromkeys(prompts)) == [p for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]]
    monkeypatch.setattr(spool, "IN_MEMORY", 1000)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    tracemalloc.start()
    found = [hash(repr(item)) for item in open_stream(source, path, "train", 2)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == expected
    assert peak < 380_000
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", many_rows("hh", 3))
    (tmp_path / "file").touch()
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache: the cache cannot be written .* set DPO_JAX_CACHE"):
        load_comparisons("hh", path, "train", 2)


PAIRS = [{"prompt": f"p{i // 2}", "chosen": f"c{i}", "rejected": f"r{i}", "scores": [2, 0]} for i in range(4000)]


def test_a_mixture_takes_shares_of_prompts(tmp_path):
    (many,), (few,) = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", [PAIRS[0] | {"prompt": "other"}])
    pairs, _ = read("mixture", (f"0.25*files:{many}", f"2*files:{few}", f"files:{few}"))
    counts = {prompt: [c.prompt for c in pairs].count(prompt) for prompt in {c.prompt for c in pairs}}
    assert counts.pop("other") == 3
    assert set(counts.values()) == {2}  # a prompt is taken with both of its pairs
    assert 450 < len(counts) < 550  # of 2,000
    held = [len(list(only_comparisons(side))) for side in holdout(pairs, 0.2)]
    assert 0.15 < held[1] / len(pairs) < 0.25  # what is held out is another draw
    more, _ = read("mixture", (f"0.5*files:{many}",))
    assert {c.prompt for c in pairs} - {"other"} < {c.prompt for c in more}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("0*files:a", "the share of '0.files:a' must be a number above 0"),
        ("x*files:a", "the share of 'x.files:a' must be a number above 0"),
        ("nan*files:a", "must be a number above 0"),
        ("mixture:a", "'mixture:a' is no part of a mixture; write share"),
        ("a b", "'a b' is no part of a mixture"),
        ("file:a", "unknown data source .*did you mean 'files'"),
        ("files:none.jsonl", "none.jsonl: no such file"),
    ],
)
def test_malformed_parts_of_a_mixture_are_refused(part, message):
    with pytest.raises(UserError, match=message):
        read("mixture", (part,))


def noisy(path, **options):
    from dpo_jax.data.noise import add_noise
    from dpo_jax.data.sources.base import Note, only_comparisons, open_stream

    clean = {"flip": 0.0, "draw_labels": False, "duplicate": 0.0, "seed": 0}
    items = list(add_noise(open_stream("files", path, "train", 2), **(clean | options)))
    notes = [item.text for item in items if isinstance(item, Note)]
    return list(only_comparisons(items)), {text: notes.count(text) for text in notes}


def test_noise_is_counted_and_the_same_every_time(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    flipped, notes = noisy(path, flip=0.3)
    swapped = sum(c.responses[0][0] == "r" for c in flipped)
    assert notes == {"pairs flipped (data.flip_labels)": swapped}
    assert abs(swapped / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert all(c.scores == ((2.0, 0.0) if c.responses[0][0] == "c" else (0.0, 2.0)) for c in flipped)
    assert noisy(path, flip=0.3)[0] == flipped != noisy(path, flip=0.3, seed=1)[0]
    drawn, notes = noisy(path, draw_labels=True)
    against = sum(c.responses[0][0] == "r" for c in drawn)
    rate = 1 / (1 + np.exp(2.0))
    assert notes == {"pairs ordered against their scores (data.draw_labels)": against}
    assert abs(against / 4000 - rate) < 4 * (rate * (1 - rate) / 4000) ** 0.5
    twice, notes = noisy(path, duplicate=0.5)
    assert len(twice) == 4000 + notes["comparisons repeated (data.duplicate)"]
    assert abs(len(twice) / 4000 - 1.5) < 4 * (0.25 / 4000) ** 0.5
    assert noisy(path)[0] == read("files", path)[0]


def test_invalid_noise_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    with pytest.raises(UserError, match=r"data\.flip_labels must be between 0 and 1, not 1\.5"):
        noisy(path, flip=1.5)
    with pytest.raises(UserError, match=r"a\.jsonl:1: data\.draw_labels needs two scores"):
        noisy(path, draw_labels=True)


def test_data_are_read_when_they_are_iterated_and_once(monkeypatch):
    """Sources that group by prompt read everything before their first item."""
    started = []
    monkeypatch.setattr("dpo_jax.data.sources.shp.read", lambda *_: iter([started.append(1) or Note("left out")]))
    stream = open_stream("shp", ("x",), "train", 2)
    assert started == []
    with pytest.raises(UserError, match=r"data source 'shp' has no comparisons in split 'train' of \['x'\]; check"):
        list(stream)
    assert started == [1]
