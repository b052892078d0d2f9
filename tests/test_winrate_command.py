"""`dpo-jax winrate` from the command line on small random models: a reward or a local server judges."""

import itertools
import json
import re

import jax
import numpy as np
import pytest
from chat_server import serving

from dpo_jax import cli
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface.folder import save_folder
from dpo_jax.models.model import build_model
from dpo_jax.paths import write_checked
from dpo_jax.rewards.registry import get_reward
from dpo_jax.rewards.winrate import kl_bound


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two random models, and comparisons of the built-in world to compare them on."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = synthetic.synthetic_tokenizer()
    config = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    model = build_model(family("llama").architecture(config))
    for i, name in enumerate(("one", "two")):
        save_folder(folder / name, jax.device_get(jax.jit(model.init)(jax.random.key(i))), config, tokenizer)
    rows = [r for r, _ in zip(synthetic.read((), "test", 2), range(30), strict=False)]
    lines = [json.dumps({"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]}) for r in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def winrate(folders, tmp_path, monkeypatch):
    """Runs the command and returns its table and its judgements."""
    monkeypatch.chdir(folders)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))

    def run(*argv):
        data = ("--data.path", "pairs.jsonl", "--data.eval-path", "pairs.jsonl", "--samples.max-new-tokens", "6")
        cli.run_command(
            ["winrate", *argv, *data, "--prompts", "12", "--batch-size", "24", "--out", str(tmp_path / "out")]
        )
        lines = (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()
        return json.loads((tmp_path / "out" / "winrate.json").read_text()), [json.loads(line) for line in lines]

    return run


def scored(judged):
    """Outcomes computed again from the texts by the synthetic reward."""
    score = get_reward("synthetic")
    a, b = (score([""] * len(judged), [row[k] for row in judged]) for k in ("response", "other"))
    return 0.5 + 0.5 * np.sign(a - b)


def test_a_reward_judges_the_best_of_several_against_the_data(winrate, tmp_path, capsys):
    args = ("one", "--judge", "synthetic", "--temperatures", "0.5", "2", "--best-of", "1", "2", "8")
    rows, judged = winrate(*args, "--best-by", "synthetic")
    assert [(r["policy"], r["temperature"], r["best_of"]) for r in rows] == [
        ("one", t, n) for t in (0.5, 2.0) for n in (1, 2, 8)
    ]
    chosen = {json.loads(line)["chosen"] for line in (tmp_path.cwd() / "pairs.jsonl").read_text().splitlines()}
    for row in rows:
        own = [j for j in judged if (j["temperature"], j["best_of"]) == (row["temperature"], row["best_of"])]
        assert len({j["prompt"] for j in own}) == len(own) == 12
        assert row["tally"]["wins"]["mean"] == pytest.approx(scored(own).mean())
        assert [j["outcome"] for j in own] == scored(own).tolist()
        assert {j["other"] for j in own} <= chosen
        mean = get_reward("synthetic")([""] * 12, [j["response"] for j in own]).mean()
        assert row["reward"][0] == pytest.approx(mean)
        assert row["words"] == pytest.approx(np.mean([len(j["response"].split()) for j in own]))
        assert row["kl_bound"] == kl_bound(row["best_of"])
    cool, hot = ([j["response"] for j in judged if (j["temperature"], j["best_of"]) == (t, 1)] for t in (0.5, 2))
    assert sum(a != b for a, b in zip(cool, hot, strict=True)) > 6
    assert all(a["reward"][0] <= b["reward"][0] for a, b in itertools.pairwise(rows) if b["best_of"] > 1)
    out = capsys.readouterr().out
    assert "12 prompts, against the data's responses" in out
    page = (tmp_path / "out" / "winrate.html").read_text()
    assert page.count("<svg") == 4  # win rate and reward, by temperature and by N
    assert "best of 8" in page
    assert "<script" not in page


def test_a_policy_against_itself_and_cached_completions(winrate, tmp_path):
    rows, judged = winrate("one", "two", "--judge", "synthetic", "--against", "one", "--temperatures", "0",
                           "--samples.temperature", "0")  # fmt: skip
    assert [j["response"] == j["other"] for j in judged if j["policy"] == "one"] == [True] * 12
    assert rows[0]["tally"]["wins"]["mean"] == 0.5
    assert rows[0]["tally"]["ties"] == 12
    assert not all(j["response"] == j["other"] for j in judged if j["policy"] == "two")
    kept = sorted((tmp_path / "cache" / "completions").glob("*.json"))
    assert len(kept) == 3  # `one` is sampled a second time, with the opponent's seed
    for path in kept:
        write_checked(path, json.dumps(["great"] * 12).encode())
    rows, judged = winrate("two", "--judge", "synthetic", "--temperatures", "0")
    assert {j["response"] for j in judged} == {"great"}


def test_a_model_judges_in_both_orders_and_resumes(winrate, capsys):
    """The server prefers the longer text in either order; at first it refuses after ten answers."""
    state = {"left": 10}

    def say(body):
        state["left"] -= 1
        if state["left"] < 0:
            return 400, {}, {"error": {"message": "no more"}}
        text = body["messages"][0]["content"]
        ((first, second),) = re.findall(r"Summary A:\n(.*)\n\nSummary B:\n(.*)\n\nFirst say", text, re.DOTALL)
        return f"Length.\nBetter: {'tie' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}"

    with serving(say) as server:
        args = ("one", "--judge", "endpoint", "--endpoint.model", "m", "--endpoint.base-url", server.url)
        args = (*args, "--endpoint.parallel", "1", "--question", "summary", "--order", "both", "--temperatures", "1")
        with pytest.raises(UserError, match="400 Bad Request: no more"):
            winrate(*args)
        before = len(server.seen)  # another request may have been sent before the first refusal
        assert before in (11, 12)
        state["left"] = 1000
        rows, judged = winrate(*args)
        winrate(*args)
        assert len(server.seen) == before + 14
    assert "m was asked 14 times; 10 answers cached" in capsys.readouterr().out
    expected = [0.5 + 0.5 * np.sign(len(j["response"].strip()) - len(j["other"].strip())) for j in judged]
    assert [j["outcome"] for j in judged] == expected
    assert all([v["response_first"] for v in j["verdicts"]] == [True, False] for j in judged)
    tally = rows[0]["tally"]
    assert tally["wins"]["mean"] == pytest.approx(np.mean(expected))
    assert (tally["first"]["mean"], tally["agree"]["mean"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("one",), "--judge: name a reward"),
        ((), "give the folders of runs or models"),
        (("one", "--judge", "hapy"), "did you mean 'happy'"),
        (("one", "--judge", "endpoint"), "endpoint.model: name the model"),
        (("one", "--judge", "happy", "--best-of", "4"), "--best-of needs --best-by REWARD"),
        (
            ("one", "--judge", "happy", "--best-of", "4", "--best-by", "happy"),
            "all samples at temperature 0 are the same",
        ),
        (("one", "--judge", "happy", "--best-of", "0"), "--best-of and --prompts must be at least 1"),
        (("absent", "--judge", "happy"), "absent: no such folder"),
        (("one", "--judge", "happy", "--against", "absent"), "absent: no such folder"),
        (("one", "--judge", "happy", "--temperature", "1"), "did you mean 'temperatures'"),
    ],
)
def test_invalid_options_are_refused(winrate, argv, message):
    with pytest.raises(UserError, match=message):
        winrate(*argv)
