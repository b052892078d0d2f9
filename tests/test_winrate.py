"""Win rates and best of N against sums over all possible responses, and tallies by hand."""

import itertools
import json
import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import evaluation, losses
from dpo_jax.commands.winrate import wins_at_equal_length
from dpo_jax.data.table import Table
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.pages import figure
from dpo_jax.pages.winrate import WinrateRow, winrate_figure, winrate_json
from dpo_jax.records import Tokens
from dpo_jax.rewards.judge import Match, Verdict, by_reward
from dpo_jax.rewards.winrate import WinTally, controlled_share, kl_bound, pick_best, tally_wins, win_share
from dpo_jax.sampling import generate

CONFIGS = Path(__file__).parent.parent / "configs"
PICTURES = runpy.run_path(str(CONFIGS.parent / "scripts" / "pictures"))
VOCAB, EOS = 5, 4
PROMPT = np.array([1, 2], np.int32)
RESPONSES = [(EOS,)] + [r for r in itertools.product(range(VOCAB), repeat=2) if r[0] != EOS]


def score(response):
    """An arbitrary score with ties."""
    return float((3 * response[0] + 5 * response[-1]) % 7)


SCORES = np.array([score(r) for r in RESPONSES])


@pytest.fixture(scope="module")
def world():
    """Two policies over responses of at most two tokens: model, parameters, and each response's probability."""
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.5, "tie_word_embeddings": False,
    }  # fmt: skip
    model = build_model(family("llama").architecture(config))
    params = {who: jax.jit(model.init)(jax.random.key(i)) for i, who in enumerate(("policy", "reference"))}
    judge = evaluation.EvalModel(model, losses.build({"name": "dpo"}), params, np.zeros(1), 64, 16)
    table = Table.of(Tokens(PROMPT, (np.array(r, np.int32),)) for r in RESPONSES)
    p = {who: np.exp(evaluation.table_logps(judge, who, table)[:, 0, 0].astype(np.float64)) for who in params}
    assert all(x.sum() == pytest.approx(1, abs=1e-5) for x in p.values())
    return model, params, {who: x / x.sum() for who, x in p.items()}


def drawn(world, who, prompts, copies, seed):
    """Scores of samples, float[prompts, copies]."""
    model, params, _ = world
    options = {"max_new_tokens": 2, "eos_id": EOS, "seed": seed, "batch_size": 512}
    found = generate(model, params[who], [PROMPT] * prompts, copies=copies, **options)
    return np.array([score(tuple(r.tolist())) for r in found]).reshape(prompts, copies)


def best_distribution(p, n):
    """P(y) of the first response with the highest score among n samples; within one score in proportion to p."""
    out = np.zeros_like(p)
    for s in np.unique(SCORES):
        at, below = p[s == SCORES].sum(), p[s > SCORES].sum()
        out[s == SCORES] = p[s == SCORES] / at * ((below + at) ** n - below**n)
    return out


def test_the_win_rate_is_the_exact_one(world):
    _, _, p = world
    wins = (SCORES[:, None] > SCORES) + 0.5 * (SCORES[:, None] == SCORES)
    exact = float(p["policy"] @ wins @ p["reference"])
    count = 4000
    a, b = (drawn(world, who, count, 1, seed)[:, 0] for seed, who in enumerate(("policy", "reference")))
    judge = by_reward(lambda prompts, texts: np.array([float(t) for t in texts]))
    found = tally_wins(judge([Match("", str(x), str(y)) for x, y in zip(a, b, strict=True)])).wins
    assert abs(exact - 0.5) > 0.025
    assert found.low < exact < found.high
    assert found.n == count
    assert found.high - found.low < 0.04


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_best_of_n_has_the_exact_distribution_and_keeps_its_bound(world, n):
    p = world[2]["reference"]
    exact = best_distribution(p, n)
    assert exact.sum() == pytest.approx(1)
    assert float(exact @ np.log(exact / p)) <= kl_bound(n) + 1e-12
    scores = drawn(world, "reference", 2500, 8, 3)
    chosen = np.take_along_axis(scores, pick_best(scores, n)[:, None], axis=1)[:, 0]
    values = np.unique(SCORES)
    expected = np.array([exact[v == SCORES].sum() for v in values])
    found = np.array([(chosen == v).mean() for v in values])
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / len(chosen))


@pytest.mark.parametrize("n", [2, 5, 128])
def test_the_bound_is_reached_if_every_response_is_rare(n):
    """Of 100,000 equally likely responses with distinct scores, P(best of n = i) = (i^n - (i - 1)^n) / 100,000^n."""
    places = np.arange(0, 100_001) / 100_000
    best = np.diff(places**n)
    kl = float((best * np.log(np.maximum(best, 1e-300) * 100_000)).sum())
    assert kl == pytest.approx(kl_bound(n), abs=2e-3)
    assert kl <= kl_bound(n)


def test_the_bound_by_hand():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(128) == pytest.approx(3.8598, abs=1e-4)


def test_the_best_of_the_first_n():
    scores = [[1.0, 3.0, 3.0, 5.0], [2.0, 1.0, 0.0, -1.0]]
    assert [pick_best(scores, n).tolist() for n in (1, 2, 3, 4)] == [[0, 0], [1, 0], [1, 0], [3, 0]]


def test_a_tally_by_hand():
    win, loss, tie = Verdict(1.0, True, ""), Verdict(0.0, False, ""), Verdict(0.5, False, "")
    unread = Verdict(None, False, "")
    matches = [
        (win, Verdict(1.0, False, "")),  # won in both orders
        (win, Verdict(0.0, False, "")),  # the orders disagree: each prefers the response read first
        (tie, tie),
        (loss, unread),
        (unread,),
        (Verdict(0.5, None, ""),),
        (Verdict(0.0, None, ""),),
    ]
    found = tally_wins(matches)
    assert (found.wins.mean, found.wins.n) == ((1 + 0.5 + 0.5 + 0 + 0.5 + 0) / 6, 6)
    assert (found.ties, found.unread) == (3, 2)
    # Five verdicts prefer a response; four of them prefer the one read first.
    assert (found.first.mean, found.first.n) == (4 / 5, 5)
    assert (found.agree.mean, found.agree.n) == (2 / 3, 3)


def test_nothing_to_tally():
    found = tally_wins([])
    assert math.isnan(found.wins.mean)
    assert found.wins[1:] == (0.0, 1.0, 0)


def test_the_interval_is_wilsons():
    """Wilson 1927: 3 of 10 gives 0.1078 to 0.6032."""
    found = win_share(3, 10)
    assert (round(found.low, 4), round(found.high, 4)) == (0.1078, 0.6032)


def test_the_share_at_equal_length_by_closed_forms():
    """Length alone decides: one half. It decides nothing: the plain share. A curve that is known: its value at 0."""
    longer = np.array([8.0, 3.0, -8.0, -3.0])
    assert controlled_share([1, 1, 0, 0], longer).mean == pytest.approx(0.5, abs=1e-6)
    plain = controlled_share([1.0] * 300 + [0.5] * 100, np.zeros(400))
    assert (plain.mean, plain.n) == (pytest.approx(0.875, abs=1e-3), 400)
    half = 1.959964 / math.sqrt(400 * 0.875 * 0.125)  # of the log-odds, for many matches
    ends = [1 / (1 + math.exp(-(math.log(7) + side * half))) for side in (-1, 1)]
    assert plain[1:3] == pytest.approx(ends, abs=5e-3)
    rng = np.random.default_rng(0)
    more = rng.normal(5.0, 10.0, 100_000)
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(more / more.std()))))
    found = controlled_share(list((rng.random(len(more)) < chance).astype(float)), more)
    assert found.low < 1 / (1 + math.exp(-0.4)) < found.high
    assert found.high - found.low < 0.01
    # All 48 won: the likelihood (1 + e^-a)^-48 is e^-1.92 where the share is 0.9608; the prior lowers it a little.
    all_won = controlled_share([1.0] * 48, np.zeros(48))
    assert all_won.low == pytest.approx(math.exp(-1.920729 / 48), abs=6e-3)
    assert all_won.mean > 0.99
    # All won, all longer: what equal length would give is not known.
    assert controlled_share([1.0] * 48, np.arange(1.0, 49.0)).low < 0.5
    assert controlled_share([], np.zeros(0)).n == 0


def test_lengths_are_those_in_words_of_matches_with_a_verdict():
    """The winner has more letters, but all have two words, so that the share is the plain one, 6 of 8."""
    win, loss, unread = (Verdict(score, None, "") for score in (1.0, 0.0, None))
    matches = [*[Match("?", "aaaaaaaa b", "c d")] * 6, *[Match("?", "a b", "cccccccc d")] * 2, Match("?", "a b c", "d")]
    found = wins_at_equal_length(matches, [*[[win]] * 6, *[[loss]] * 2, [unread]])
    assert (found.mean, found.n) == (pytest.approx(0.75, abs=5e-3), 8)


def test_win_rates_and_rewards_are_drawn_against_the_temperature(monkeypatch):
    """None of 48 and all of 48 have intervals of their own, and a row without a reward leaves the second figure out."""
    monkeypatch.setattr(figure, "figure_svg", lambda _, axes, *labels: (axes, labels))
    tallies = [WinTally(win_share(wins, 48), 0, 0, win_share(0, 0), win_share(0, 0)) for wins in (0, 48)]
    rows = [
        WinrateRow("a", t, 1, tally, tally.wins, (t + 2.0, 0.5), 5.0)
        for t, tally in zip((1.0, 0.25), tallies, strict=True)
    ]
    low = 48 / (48 + 1.959964**2)  # Wilson's bound at n of n
    shares = [[0.25, 1.0], [1.0, 0.0]], [[low, 1.0], [0.0, 1 - low]]
    rewards = [[0.25, 2.25], [1.0, 3.0]], [[1.75, 2.75], [2.5, 3.5]]
    for reward, label, (points, ends) in ((False, "win rate", shares), (True, "reward", rewards)):
        axes, labels = winrate_figure(rows, "temperature", reward=reward)
        assert labels == ("temperature", label)
        (bars,) = axes.containers
        assert bars.lines[0].get_xydata().tolist() == points
        assert [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()] == [
            pytest.approx(end, abs=1e-6) for end in ends
        ]
    assert winrate_figure([*rows, rows[0]._replace(reward=None)], "temperature", reward=True) == ""


TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = {"DPO": ("DPO", 1), "Preferred-FT": ("Preferred-FT", 1)}
MODEL = "smollm2-135m-instruct"
NAMES |= {"the model itself": (MODEL, 1), "the best of 16 of the model": (MODEL, 16)}


def test_the_stored_summaries_are_those_of_the_published_table():
    """Each cell of the table, and the win rates and words that the text names."""
    rows = PICTURES["read_winrates"](CONFIGS / "summaries.json")
    found = {(row.policy, row.best_of, row.temperature): row for row in rows}
    section = (CONFIGS / "README.md").read_text().partition("#### Summaries in small")[2].partition("\n###")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and " +- " in line]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [cells[0] for cells in table] == list(NAMES)
    cells = {(*NAMES[name], t): text for name, *texts in table for t, text in zip(TEMPERATURES, texts, strict=True)}
    assert {key: text for key, text in cells.items() if text} == {
        key: f"{row.reward[0]:.2f} +- {row.reward[1]:.2f}" for key, row in found.items()
    }
    flat = " ".join(section.split())
    best = {
        key: max((r.tally.wins for k, r in found.items() if k[:2] == key), key=lambda w: w.mean)
        for key in NAMES.values()
    }
    dpo, preferred, model, best_of = ("{:.2f} ({:.2f} .. {:.2f})".format(*best[key][:3]) for key in NAMES.values())
    assert f"DPO wins {dpo}" in flat
    assert f"Preferred-FT {preferred[:4]}, the model {model[:4]}, and the best of 16 {best_of}" in flat
    words = [found[(name, 1, 0.0)].words for name in ("DPO", MODEL)]
    assert "greedy answers have {:.1f} words, the model's {:.1f}".format(*words) in flat


def test_stored_win_rates_are_joined_and_drawn(tmp_path):
    """An unread share, which is NaN, comes back from null."""
    tally = WinTally(win_share(3, 4), 0, 0, win_share(0, 0), win_share(0, 0))
    rows = [WinrateRow("a", t, 1, tally, tally.wins, (t, 0.5), 5.0) for t in (0.0, 1.0)]
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps([winrate_json(row)]))
    PICTURES["join_winrates"](files, tmp_path / "all.json")
    found = PICTURES["read_winrates"](tmp_path / "all.json")
    assert [row.temperature for row in found] == [0.0, 1.0]
    assert (found[1].tally.wins, found[1].controlled) == (tally.wins, tally.wins)
    assert math.isnan(found[0].tally.first.mean)
    PICTURES["draw_winrates"](tmp_path / "all.json", tmp_path / "all.svg", reward=False)
    assert "win rate" in (tmp_path / "all.svg").read_text()


def test_the_stored_win_rates_of_helpful_dialogue_are_those_of_the_published_table():
    rows = {(row.policy, row.temperature): row for row in PICTURES["read_winrates"](CONFIGS / "helpful.json")}
    section = (
        (CONFIGS / "README.md").read_text().partition("### Helpful dialogue on a real model")[2].partition("\n###")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("| ") and ".. " in line]
    table = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    shares = {
        "DPO": [rows["smollm2_hh_dpo", t].tally.wins for t in TEMPERATURES],
        "DPO at equal length": [rows["smollm2_hh_dpo", t].controlled for t in TEMPERATURES],
        "SFT": [rows["smollm2_hh_sft", t].tally.wins for t in TEMPERATURES],
    }
    assert table == {
        name: ["{:.2f} ({:.2f} .. {:.2f})".format(*share[:3]) for share in some] for name, some in shares.items()
    }
    words = {who: [round(rows[f"smollm2_hh_{who}", t].words) for t in TEMPERATURES] for who in ("dpo", "sft")}
    assert f"{min(words['dpo'])} to {max(words['dpo'])} words" in section
    assert (min(words["sft"]), max(words["sft"])) == (24, 26)
