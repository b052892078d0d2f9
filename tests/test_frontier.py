"""`dpo-jax frontier`: its estimates against sums over every response, its tables by hand, and that it goes on."""

import json
import math
import shutil
from concurrent.futures import CancelledError

import jax
import numpy as np
import pytest

from dpo_jax import cli, sharding
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments import frontier, offline
from dpo_jax.experiments.frontier import BestOf, FrontierJob, FrontierResult
from dpo_jax.experiments.optimum import Optimum
from dpo_jax.experiments.world import (
    Point,
    World,
    draw_pairs,
    draw_responses,
    enumerate_texts,
    eval_layout,
    make_measurer,
    make_ref_logps,
)
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface.folder import save_folder
from dpo_jax.models.model import build_model
from dpo_jax.pages.frontier import (
    budgets,
    frontier_curve,
    frontier_figures,
    frontier_json,
    frontier_table,
    optima,
    point_gap,
    render_frontier,
    standalone_figure,
)
from dpo_jax.records import Tokens
from dpo_jax.rewards.registry import get_reward
from dpo_jax.training.metrics_file import read_metrics

TOKENIZER = synthetic.synthetic_tokenizer()
CONFIG = {
    "model_type": "llama", "vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "initializer_range": 0.5, "tie_word_embeddings": True,
}  # fmt: skip
MODEL = build_model(family("llama").architecture(CONFIG))
PROMPTS = [np.array(TOKENIZER(p)["input_ids"], np.int32) for p in synthetic.synthetic_prompts("test", 150)]


def params(seed):
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(seed)))


@pytest.fixture(scope="module")
def world():
    """A world of one-word responses, of which all can be listed."""
    start, mesh = params(0), sharding.make_mesh()
    where = sharding.param_shardings(mesh, MODEL.axes, start)
    reward = get_reward("synthetic")
    return World(MODEL, mesh, where, start, sharding.put_params(start, where), TOKENIZER, reward, 1, 64, 0)


def test_every_response_is_listed_once():
    """Two tokens beside the end: of at most 2 tokens there are the end alone, 2 ended ones and 4 that are cut."""
    found = draw_responses(3, 2, 2)
    assert sorted(found) == sorted([(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)])


def test_reward_and_kl_are_those_of_the_sum_over_all_responses(world):
    column = make_ref_logps(world)
    rewards_of, base = enumerate_texts(world, PROMPTS, column)
    np.testing.assert_allclose(np.exp(base).sum(1), 1, atol=1e-5)
    policy = sharding.put_params(params(1), world.where)
    _, logps = enumerate_texts(world._replace(reference=policy), PROMPTS, column)
    p = np.exp(logps)
    pairs = Table.of(Tokens(x, (np.array([5]), np.array([6]))) for x in PROMPTS[:4])
    point = make_measurer(world, PROMPTS, pairs, eval_layout(world, pairs), column)(policy, "dpo", 0.1, 3)
    assert point[:3] == ("dpo", 0.1, 3)
    exact_kl = (p * (logps - base)).sum(1)
    exact_reward = (p * rewards_of).sum(1)
    # One draw a prompt: the interval is that of the draws' spread, of which the exact one is known too.
    spread = np.sqrt((p * (logps - base - exact_kl[:, None]) ** 2).sum(1).mean() / len(PROMPTS))
    assert abs(point.kl - exact_kl.mean()) < 3 * spread
    assert point.kl_half == pytest.approx(1.96 * spread, rel=0.3)
    assert exact_kl.mean() > 10 * spread  # so that a KL of the wrong way round would be seen
    spread = np.sqrt((p * (rewards_of - exact_reward[:, None]) ** 2).sum(1).mean() / len(PROMPTS))
    assert abs(point.reward - exact_reward.mean()) < 3 * spread
    assert point.reward_half == pytest.approx(1.96 * spread, rel=0.3)
    assert point.chosen == pytest.approx(logps[:4][:, [_place(5)]].mean(), abs=1e-4)
    assert point.rejected == pytest.approx(logps[:4][:, [_place(6)]].mean(), abs=1e-4)
    assert point.tokens == 1
    assert point.cut > 0.5


def _place(token):
    return draw_responses(len(TOKENIZER), TOKENIZER.eos_token_id, 1).index((token,))


@pytest.mark.slow
def test_the_reference_has_no_kl_from_itself(world):
    pairs = Table.of(Tokens(x, (np.array([5]), np.array([6]))) for x in PROMPTS[:4])
    shape, column = eval_layout(world, pairs), make_ref_logps(world)
    point = make_measurer(world, PROMPTS[:20], pairs, shape, column)(world.reference, "sft", 0.0, 0)
    assert (point.kl, point.kl_half) == (0, 0)


def test_many_responses_are_not_listed(world):
    assert enumerate_texts(world._replace(max_new_tokens=2), PROMPTS[:1], make_ref_logps(world)) is None


def test_pairs_are_those_of_the_ids_drawn_and_are_kept(world, tmp_path):
    path = tmp_path / "pairs.jsonl"
    table = draw_pairs(path, world, PROMPTS[:30], 4, "ranked", 0)
    rows = read_metrics(path)
    assert len(rows) == len(table) > 30
    for i, row in enumerate(rows):
        assert synthetic.synthetic_reward(row["prompt"], row["chosen"]) > synthetic.synthetic_reward(
            row["prompt"], row["rejected"]
        )
        ids = [part.tolist() for part in (table[i].prompt, *table[i].responses)]
        assert ids == row["ids"]
        assert TOKENIZER.decode(ids[1], skip_special_tokens=True) == row["chosen"]
    before = path.read_bytes()
    again = draw_pairs(path, world._replace(reward=None), PROMPTS[:30], 4, "ranked", 0)  # which nobody asks
    assert path.read_bytes() == before
    np.testing.assert_array_equal(again.ids, table.ids)


@pytest.mark.parametrize("method", [pytest.param("dpo", marks=pytest.mark.slow), "unlikelihood"])
def test_all_strengths_of_a_method_are_one_program(world, method, tmp_path):
    """And a strength makes the difference that it must."""
    table = draw_pairs(tmp_path / "p.jsonl", world, PROMPTS[:30], 4, "ranked", 0)
    settings = FrontierConfig("synthetic", optim={"name": "rmsprop", "learning_rate": 1e-3}, max_steps=3, batch_size=8)
    build = lambda strength: frontier.job_config(settings, method, strength)  # noqa: E731
    column = make_ref_logps(world)(world.reference, table, eval_layout(world, table))
    program = offline.offline_program(world, build(0.1), table, column)
    ends = []
    for strength in (0.1, 1.0, 0.1):
        *_, (step, end) = offline.offline_steps(program, build(strength), 0)
        assert step == 3
        ends.append(jax.device_get(end))
    assert program.step._cache_size() == 1  # noqa: SLF001
    same = jax.tree.map(np.array_equal, ends[0], ends[2])
    other = jax.tree.map(np.array_equal, ends[0], ends[1])
    assert all(jax.tree.leaves(same))
    assert not all(jax.tree.leaves(other))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    table = draw_pairs(tmp_path / "p.jsonl", world, PROMPTS[:10], 4, "ranked", 0)
    optim = {"name": "rmsprop", "learning_rate": 1e30, "warmup_steps": 0}
    settings = FrontierConfig("synthetic", optim=optim, max_steps=4, batch_size=8)
    c = frontier.job_config(settings, "unlikelihood", 0.5)
    with pytest.raises(UserError, match="not finite at step 2"):
        list(offline.offline_steps(offline.offline_program(world, c, table, None), c, 0))


def test_the_runs_of_the_paper():
    settings = FrontierConfig("synthetic", max_steps=100, eval_every=30)
    found = frontier.frontier_jobs(settings)
    assert [j.strength for j in found if j.method == "dpo"] == [0.05, 0.1, 1, 5]
    assert [j.strength for j in found if j.method == "unlikelihood"] == [0.05, 0.1, 0.5, 1]
    assert len([j for j in found if j.method == "preferred_ft"]) == 6
    assert found[0] == FrontierJob("dpo", 0.05, (30, 60, 90, 100))
    assert frontier.frontier_jobs(FrontierConfig("x", max_steps=60, eval_every=30))[0].steps == (30, 60)
    assert frontier.frontier_jobs(FrontierConfig("x", max_steps=10, eval_every=30))[0].steps == (10,)


def point(method, strength, step, reward, kl, half=0.0):
    return Point(method, strength, step, reward, half, kl, half, -4.0, -5.0, 3.0, 0.25)


FOUND = FrontierResult(
    [
        point("sft", 0, 0, 1.0, 0.0), point("dpo", 0.1, 10, 2.5, 0.25, 0.1), point("dpo", 0.1, 20, 3.0, 1.5),
        point("dpo", 1, 10, 2.0, 0.4), point("unlikelihood", 0.5, 10, 0.5, 0.1), point("dpo", 1, 20, 2.9, 6.0),
    ],
    [
        Optimum(math.inf, 1.0, 0.1, 0.0, 0.0, math.inf), Optimum(2.0, 3.0, 0.2, 0.5, 0.0, 99.0),
        Optimum(1.0, 4.0, 0.4, 1.5, 0.0, 50.0),
    ],
    [Optimum(0.1, 9.0, 0.1, 5.0, 0.1, 3.0)],
    [BestOf(1, 1.0, 0.1), BestOf(2, 2.0, 0.1)], False, 256, 600,
)  # fmt: skip


def test_gaps_by_hand():
    """On the line from (0, 1) to (0.5, 3), slope 4, the optimum at 0.25 is 2; beyond 1.5 it is below 4 + (kl - 1.5)."""
    assert point_gap(FOUND, FOUND.points[1])[::2] == (-0.5, True)
    assert point_gap(FOUND, FOUND.points[1]).half == pytest.approx(math.hypot(0.1, 0.15, 4 * 0.1))
    assert point_gap(FOUND, FOUND.points[2])[::2] == (1.0, True)
    assert point_gap(FOUND, FOUND.points[5])[::2] == (pytest.approx(8.5 - 2.9), False)


def test_the_most_reward_within_a_kl():
    head, optimum, dpo, unlikelihood, best = budgets(FOUND)
    assert head[1:] == ["0.5", "1", "2", "4", "8", "16"]
    assert optimum[1:4] == ["3.00", "3.50", "<= 4.50"]
    assert dpo[1:] == ["2.50 +- 0.10", "2.50 +- 0.10", *["3.00 +- 0.00"] * 4]
    assert unlikelihood[1:] == ["1.00 +- 0.00"] * 6  # the reference, since it is better
    assert best[1:] == ["2.00 +- 0.10"] * 6  # of 2, log 2 - 1/2 = 0.19


def test_the_table_of_runs():
    head, sft, first, second, unlikelihood, one, two = frontier_table(FOUND)
    assert head[:4] == ["method", "strength", "step", "reward"]
    assert sft[:3] == ["SFT", "", "0"]
    assert first == [
        "DPO", "beta 0.1", "20", "3.00 +- 0.00", "1.50 +- 0.00", "4.00", "1.00 +- 0.40", "-4.0", "-5.0", "3.0", "25%",
    ]  # fmt: skip
    assert second[:7] == ["DPO", "beta 1", "20", "2.90 +- 0.00", "6.00 +- 0.00", "<= 8.50", "<= 5.60"]
    assert unlikelihood[:2] == ["Unlikelihood", "alpha 0.5"]
    assert one[:7] == ["Best of N", "N 1", "", "1.00 +- 0.10", "<= 0.00", "1.00", "0.00 +- 0.14"]
    assert two[4] == "<= 0.19"
    rows = optima(FOUND)
    assert rows[1][0] == "reference"
    assert rows[-1] == ["beta 0.1", "9.00 +- 0.10", "5.00 +- 0.10", "3", "left out: too few"]


def test_the_page_and_its_figures():
    page = render_frontier(FOUND, ["a <b> line"])
    assert "a &lt;b&gt; line" in page
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "Best of N (KL: bound)" in page
    assert json.loads(json.dumps(frontier_json(FOUND), allow_nan=False))["optimum"][0]["beta"] is None
    alone = standalone_figure(frontier_curve(FOUND))
    assert alone.startswith("<svg")
    assert alone.index("<style>") < alone.index("<defs")
    none = FOUND._replace(points=FOUND.points[:1], best_of=[], curve=FOUND.curve[:1])
    assert list(frontier_figures(none)) == ["frontier"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model's folder, and a small experiment."""
    folder = tmp_path_factory.mktemp("frontier")
    save_folder(folder / "model", params(0), CONFIG, TOKENIZER)
    (folder / "small.yaml").write_text(
        "data: {name: synthetic, eval_split: test, max_prompt_length: 16}\nmodel: {path: model}\nreward: synthetic\n"
        "optim: {name: rmsprop, learning_rate: 1.0e-3, warmup_steps: 0}\nprompts: 40\nmax_new_tokens: 6\n"
        "dpo: [0.1, 1.0]\nppo: []\nppo_gt: []\nunlikelihood: []\npreferred_ft: [0, 1]\nbest_of: [1, 4]\n"
        "optimum: {samples: 64}\n"
        "batch_size: 8\nmax_steps: 4\neval_every: 2\neval_prompts: 33\n"
    )
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the command on the small experiment and returns what it says."""
    monkeypatch.chdir(folder)

    def run(*options):
        cli.run_command(["frontier", "small.yaml", *options])
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_command_goes_on_and_the_same_seed_gives_the_same_figure(run, folder):
    said = run()
    assert "4 runs of up to 4 steps" in said
    assert "9 measurements on 33 held-out prompts" in said
    made = folder / "runs/small"

    def kept():
        return sorted(
            read_metrics(made / "points.jsonl"), key=lambda row: (row["method"], row["strength"], row["step"])
        )

    whole = kept()
    assert len(whole) == 9
    figure, numbers = (made / "frontier.svg").read_bytes(), (made / "frontier.json").read_text()
    assert {p.name for p in made.iterdir()} >= {"paths.svg", "likelihoods.svg", "frontier.html", "config.yaml"}
    # Killed after the first point of the second run, while it wrote the next.
    lines = [json.dumps(row) + "\n" for row in (whole[8], *whole[:3])]
    (made / "points.jsonl").write_text("".join(lines) + lines[0][:20])
    assert "dpo 0.1: reward" in said
    one, other = whole[5], whole[7]
    assert (one["method"], one["step"]) == (other["method"], other["step"]) == ("preferred_ft", 4)
    assert one["chosen"] != other["chosen"]  # another seed, another order
    (made / "frontier.svg").unlink()
    said = run()
    assert "dpo 0.1: reward" not in said
    assert "dpo 1: reward" in said
    assert kept() == whole
    assert (made / "frontier.svg").read_bytes() == figure
    said = run("--optimum.betas", "3", "--best_of", "2")  # worked out anew from what is there
    assert "dpo 1: reward" not in said
    assert kept() == whole
    said = run()
    assert (made / "frontier.svg").read_bytes() == figure
    assert (made / "frontier.json").read_text() == numbers


def test_short_responses_are_listed(run, folder):
    options = ("--dpo", "1", "--preferred_ft", "--max_new_tokens", "1", "--eval_every", "4")
    said = run("--run", "runs/listed", *options)
    assert "optimum: summed over all responses there are" in said
    found = json.loads((folder / "runs/listed/frontier.json").read_text())
    assert found["listed"]
    assert not found["left_out"]
    # The samples of the best of 1 are of the reference, whose reward is known exactly.
    best, reference = found["best_of"][0], found["optimum"][0]
    assert abs(best["reward"] - reference["reward"]) < 2 * (best["reward_half"] + reference["reward_half"])


@pytest.mark.slow
def test_online_dpo_goes_up_as_far_as_beta_lets_it(run, folder):
    """All responses are one token, so the most reward of any policy at a KL is a sum, which none may exceed."""
    options = ("--online_dpo", "1", "5", "--dpo", "--preferred_ft", "--max_new_tokens", "1", "--label", "ranked")
    sizes = ("--online.max_steps", "12", "--online.eval_every", "12", "--online.learning_rate", "5e-3")
    assert "2 runs of" in run("--run", "runs/online", *options, *sizes, "--eval_prompts", "150")
    start, far, near = json.loads((folder / "runs/online/frontier.json").read_text())["points"]
    assert [(p["method"], p["strength"]) for p in (far, near)] == [("online_dpo", 1), ("online_dpo", 5)]
    assert far["reward"] - far["reward_half"] > start["reward"] + start["reward_half"]
    assert far["kl"] > near["kl"] > 0
    assert all(p["gap"]["mean"] > -p["gap"]["half"] for p in (far, near))


MISTAKES = [
    (("--batch_size", "0"), "batch_size: 0 is less than 1"),
    (("--ppo_gt", "-1"), "ppo_gt: -1 is not above 0"),
    (("--online_dpo", "1", "--online.rollouts", "30"), "online.rollouts: 30 are not 4 completions of each prompt"),
    (("--completions", "1"), "completions: 1 is less than 2"),
    (("--best_of", "65"), "best_of: numbers from 1 to optimum.samples, 64"),
    (("--dpo", "1", "0"), "dpo: 0 is not above 0"),
    (("--data.flip_labels", "0.1"), "data.flip_labels: .* has no meaning here"),
    (("--reward", "sinthetic"), "unknown reward 'sinthetic'; did you mean 'synthetic'"),
    (("--model.path", ""), "model.path: name the reference"),
    (("--data.max_prompt_length", "4"), "data.max_prompt_length: a prompt has 8 tokens"),
    (("--dop", "1"), "unknown key 'dop'; did you mean 'dpo'"),
    (("--optim.learning_rate", "nan"), "optim.learning_rate: nan"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, tuple) else None)
def test_mistakes_are_told(run, folder, options, message):
    with pytest.raises(UserError, match=message):
        run("--run", "runs/mistake", *options)
    shutil.rmtree(folder / "runs/mistake", ignore_errors=True)


@pytest.mark.slow
def test_a_run_ends_at_its_next_step_when_it_is_told(run, monkeypatch):
    at_once = frontier.distributed.run_concurrently

    def told(tasks, count, stop=None):
        if stop is None:
            return at_once(tasks, count)
        stop()
        return next(iter(tasks))()

    monkeypatch.setattr(frontier.distributed, "run_concurrently", told)
    with pytest.raises(CancelledError):
        run("--run", "runs/stopped", "--dpo", "--preferred_ft", "0")


@pytest.mark.slow
def test_another_experiment_does_not_mix_with_an_old_one(run, folder):
    run("--run", "runs/old", "--max_steps", "1", "--dpo", "--preferred_ft")
    with pytest.raises(UserError, match=r"runs/old belongs to another config \(max_steps: 1 -> 2\)"):
        run("--run", "runs/old", "--max_steps", "2", "--dpo", "--preferred_ft")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ten minutes were seen on one busy core
def test_what_the_paper_found_as_far_as_it_holds_at_this_size(tmp_path, monkeypatch):
    """DPO goes further than Preferred-FT, which stays near the reference whatever it is trained for, and is near the
    exact optimum at its KL. Unlikelihood is as near to it while its KL is small, so nothing is said on which of the two
    is above the other there: it stays where it is, and DPO with a small beta goes on to more reward.
    """
    from test_configs import ROOT

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    cli.run_command(["train", "configs/synthetic_sft.yaml", "--run", "sft", "--max_steps", "60"])
    runs = ("--dpo", "0.1", "1", "--unlikelihood", "0.5", "--preferred_ft", "0", "--ppo", "--ppo_gt")
    sizes = {"eval_prompts": 128, "prompts": 900, "max_steps": 96, "eval_every": 48, "optim.learning_rate": 1e-4}
    sizes |= {"optimum.samples": 512}  # with which the optimum is known up to a KL of about 1.4
    options = [*runs, *(f"--{key}={value}" for key, value in sizes.items())]
    cli.run_command(["frontier", "configs/frontier_quick.yaml", "--model.path", "sft", "--run", "found", *options])
    found = json.loads((tmp_path / "found/frontier.json").read_text())
    ends = {(p["method"], p["strength"]): p for p in found["points"] if p["step"] == 96}
    far, near, unlikelihood, preferred = (
        ends[key] for key in (("dpo", 0.1), ("dpo", 1), ("unlikelihood", 0.5), ("preferred_ft", 0))
    )
    assert near["gap"]["known"]
    assert near["gap"]["mean"] < 0.7  # nats of Bradley-Terry; the reference is about 2 below the optimum at a KL of 1
    assert near["reward"] - near["reward_half"] > preferred["reward"]
    assert far["reward"] - far["reward_half"] > max(unlikelihood["reward"], preferred["reward"])
    assert far["kl"] > near["kl"] > preferred["kl"]
    # Its chosen responses become less likely all the same, and the rejected ones more so.
    (start,) = (p for p in found["points"] if p["method"] == "sft")
    assert far["chosen"] < start["chosen"]
    assert far["rejected"] - start["rejected"] < far["chosen"] - start["chosen"]
