"""The cache of tokenized data: hit by the same content only, and valid whatever is killed or damaged."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from functools import partial

import numpy as np
import pytest
from words import BOTH_LONG, OPTIONS, ids, lists, make_tokenizer, pair

from dpo_jax.data import cache
from dpo_jax.data import encode as encode_module
from dpo_jax.data.cache import cached_encode
from dpo_jax.data.encode import encode
from dpo_jax.data.noise import add_mismatched, append_token
from dpo_jax.data.sources.base import open_stream
from dpo_jax.data.table import KINDS
from dpo_jax.errors import UserError
from dpo_jax.records import Comparison


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(eos_token="<eos>", bos_token="<bos>")


@pytest.fixture
def tokenized(monkeypatch):
    """A list with one element for each pass of encoding."""
    calls, original = [], encode_module.encode_stream
    monkeypatch.setattr(cache, "encode_stream", lambda *args: calls.append(1) or original(*args))
    return calls


def arrays(table):
    return {name: getattr(table, name).tolist() for name in KINDS}


def test_the_cache_is_hit_by_the_same_content_only(tokenizer, tmp_path, tokenized):
    rows, folder = [pair(2, 3, 4), pair(*BOTH_LONG)], tmp_path / "deep" / "cache"
    table, report = cached_encode(rows, tokenizer, folder, **OPTIONS)
    plain, plain_report = encode(rows, tokenizer, **OPTIONS)
    assert (arrays(table), report) == (arrays(plain), plain_report)
    tokenizer(["w1"], truncation=True, max_length=3)  # leaves its mark in the tokenizer's JSON
    moved = [row._replace(where="elsewhere:1") for row in rows]
    same = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    again, again_report = cached_encode(moved, same, folder, **OPTIONS)
    cached_encode(rows, tokenizer, folder, **OPTIONS)
    assert len(tokenized) == 1
    assert isinstance(again.ids, np.memmap)
    assert (arrays(again), again_report) == (arrays(plain), plain_report)
    other = [
        ([rows[1], rows[0]], tokenizer, {}),
        ([rows[0]._replace(weight=2.0), rows[1]], tokenizer, {}),
        ([rows[0]._replace(prompt="w1 w2 "), rows[1]], tokenizer, {}),
        (rows, make_tokenizer(eos_token="w97", bos_token="<bos>"), {}),
        (rows, make_tokenizer(eos_token="<eos>", bos_token="w97"), {}),
        *((rows, tokenizer, {key: value}) for key, value in (("max_length", 11), ("truncation", "keep_start"))),
        (rows, tokenizer, {"add_bos": True}),
        (rows, tokenizer, {"boundary": "joint"}),
        ([rows[0]._replace(preference=0.5), rows[1]], tokenizer, {}),
        ([rows[0]._replace(misplaced=True), rows[1]], tokenizer, {}),
    ]
    for number, (comparisons, its, options) in enumerate(other, 2):
        cached_encode(comparisons, its, folder, **(OPTIONS | options))
        assert len(tokenized) == number
    assert len(list(folder.iterdir())) == len(other) + 1


def test_chunks_make_one_table(tokenizer, tmp_path, monkeypatch):
    rows = [pair(1 + i % 5, 1 + i % 3, 2, weight=i, preference=i / 10, scores=(i, 0)) for i in range(10)]
    monkeypatch.setattr(cache, "CHUNK", 3)
    table, report = cached_encode(rows, tokenizer, tmp_path, **OPTIONS)
    plain, plain_report = encode(rows, tokenizer, **OPTIONS)
    assert (arrays(table), report) == (arrays(plain), plain_report)


def peak(function):
    """Returns (peak memory of Python and numpy in bytes, result of the function)."""
    tracemalloc.start()
    try:
        result = function()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_examples(tokenizer, tmp_path, monkeypatch):
    """Reading, tokenizing and writing; KTO's responses to other prompts; a reward model's token after each response."""
    monkeypatch.setattr(cache, "CHUNK", 64)
    monkeypatch.setattr(encode_module, "CHUNK", 64)
    row, made = json.dumps({"prompt": "w1 w2", "chosen": "w4 w5 " * 20, "rejected": "w6 w7 " * 20}), {}
    for size in (1000, 6000):
        file = tmp_path / f"{size}.jsonl"
        file.write_text("\n".join(row.replace("w1", f"w{i % 90}") for i in range(size)))
        items = open_stream("files", (str(file),), "train", 2)
        read, (table, _) = peak(partial(cached_encode, items, tokenizer, tmp_path, **(OPTIONS | {"max_length": 64})))
        other, wider = peak(partial(cache.write_unnamed, tmp_path, add_mismatched(table, 64, Counter())))
        last, longer = peak(partial(cache.write_unnamed, tmp_path, append_token(table, 2, 0)))
        assert [len(one) for one in (table, wider, longer)] == [size] * 3
        assert wider.response_lengths[-1].tolist() == [41, 41, 41]
        assert longer.response_lengths[-1].tolist() == [42, 42]
        made[size] = (read, other, last)
    assert not list(tmp_path.glob("tokens-unnamed*"))
    a_row = 84 * 4  # what its tokens take
    grown = [(after - before) / 5000 for before, after in zip(*made.values(), strict=True)]
    assert max(grown) < a_row / 4, grown


def test_a_killed_run_leaves_a_draft_that_is_ignored_and_later_removed(tokenizer, tmp_path, monkeypatch):
    """The draft lies beside the entry; the next run does not open it, and removes an old one."""
    rows = [pair(2, 3, 4), pair(1, 2, 3)]
    old, new = tmp_path / "tokens-old.1-aa", tmp_path / "tokens-new.1-bb"
    for draft in (old, new):
        draft.mkdir()
        (draft / "ids.npy").write_bytes(b"half")
    os.utime(old, (0, 0))

    def killed(*_):
        yield from ()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "encode_stream", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_encode(rows, tokenizer, tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == [new]
    table, _ = cached_encode(rows, tokenizer, tmp_path, **OPTIONS)
    assert arrays(table) == arrays(encode(rows, tokenizer, **OPTIONS)[0])


def test_a_process_killed_at_any_instant_leaves_a_valid_cache(tmp_path):
    """Real processes, killed while they read, tokenize and write; the next one gets the table of an undisturbed one."""
    rows = [
        json.dumps({"prompt": f"I saw {i}", "chosen": " I loved it.", "rejected": " I hated it."}) for i in range(6000)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    code = """
import sys
from pathlib import Path
from dpo_jax.data.sources import synthetic
from dpo_jax.data.sources.base import open_stream
from dpo_jax.data.cache import cached_encode
print("ready", flush=True)
options = dict(max_length=64, max_prompt_length=32, truncation="refuse", degenerate="drop", add_bos=False)
items = open_stream("files", (sys.argv[1],), "train", 2)
table, report = cached_encode(items, synthetic.synthetic_tokenizer(), Path(sys.argv[2]), **options)
print(table.digest, report.kept)
"""
    folder = tmp_path / "cache"
    args = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(folder)]
    for delay in (0.05, 0.25, 0.6, 0.9):
        with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
    done = [
        subprocess.run([*args[:-1], str(place)], capture_output=True, text=True).stdout
        for place in (folder, tmp_path / "b")
    ]
    assert done[0] == done[1]
    assert done[0].endswith(" 6000\n")


def test_texts_do_not_run_into_one_another_in_the_cache_key(tokenizer, tmp_path, tokenized):
    cached_encode([Comparison("w1", ("w1", "w2"))], tokenizer, tmp_path, **OPTIONS)
    cached_encode([Comparison("w1w", ("1", "w2"))], tokenizer, tmp_path, **OPTIONS)
    assert len(tokenized) == 2


def flip(entry):
    content = bytearray((entry / "ids.npy").read_bytes())
    content[-1] ^= 1
    (entry / "ids.npy").write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "an empty array": lambda entry: (entry / "offsets.npy").write_bytes(b""),
    "a missing array": lambda entry: (entry / "weights.npy").unlink(),
    "no JSON": lambda entry: (entry / "report.json").write_text("{"),
    "a report of another kind": lambda entry: (entry / "report.json").write_text("[]"),
    "a report with other fields": lambda entry: (entry / "report.json").write_text(
        json.dumps({"digests": json.loads((entry / "report.json").read_text())["digests"], "report": {}})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_encoded_again_with_a_warning(tokenizer, tmp_path, tokenized, caplog, kind):
    rows = [pair(2, 3, 4)]
    _, report = cached_encode(rows, tokenizer, tmp_path, **OPTIONS)
    (entry,) = tmp_path.iterdir()
    DAMAGE[kind](entry)
    again, again_report = cached_encode(rows, tokenizer, tmp_path, **OPTIONS)
    assert "is damaged" in caplog.text
    assert (lists(again[0]), again_report) == ([ids(1, 2, eos=False), ids(41, 3), ids(61, 4)], report)
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]
    cached_encode(rows, tokenizer, tmp_path, **OPTIONS)
    assert len(tokenized) == 2


def test_a_cache_that_cannot_be_written_is_an_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache cannot be written"):
        cached_encode([pair(1, 1, 1)], tokenizer, tmp_path / "file", **OPTIONS)
