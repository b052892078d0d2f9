"""`dpo-jax frontier --seeds`: means and differences over seeds worked by hand, the figure, and the command."""

import dataclasses
import json
import math

import pytest
from test_frontier import FOUND, drawn, point  # noqa: F401 (a fixture)
from test_frontier_world import CONFIG, TOKENIZER, params

from dpo_jax import cli
from dpo_jax.commands.frontier import summary_lines
from dpo_jax.config.commands import FrontierConfig, OnlineConfig
from dpo_jax.config.yaml import difference, dump
from dpo_jax.errors import UserError
from dpo_jax.experiments.points import BestOf, best_of_seeds, difference_of_seeds, frontier_points, over_seeds
from dpo_jax.experiments.reward_model import reward_config
from dpo_jax.intervals import mean_t_interval
from dpo_jax.models.huggingface.folder import save_folder
from dpo_jax.pages.frontier import frontier_json, render_frontier
from dpo_jax.pages.frontier_tables import budgets, differences, frontier_table
from dpo_jax.training.metrics_file import read_metrics
from dpo_jax.training.run_folder import run_config

T2 = 4.302652729911275  # Student's t with 2 degrees of freedom, two-sided 95%
T1 = 12.706204736174704  # with 1


def test_the_interval_of_few_values_is_students():
    """1, 2 and 6: the standard deviation is sqrt(7)."""
    assert mean_t_interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, T2 * math.sqrt(7 / 3)))
    assert mean_t_interval([4.0]) == (4.0, math.inf)
    assert mean_t_interval([5.0, 5.0]) == (5.0, 0.0)


def seeds(*runs):
    """Returns points of (method, strength, step, reward, kl, seed), beside a reference of reward 0 for each seed."""
    start = [point("sft", 0, 0, 0.0, 0.0)._replace(seed=s) for s in {run[-1] for run in runs}]
    return start + [point(*run[:-1], 0.5)._replace(seed=run[-1]) for run in runs]


TWO = seeds(
    ("dpo", 0.1, 10, 2.0, 1.0, 3), ("dpo", 0.1, 20, 3.0, 3.0, 3), ("dpo", 0.1, 10, 1.0, 2.0, 4),
    ("dpo", 0.1, 20, 5.0, 3.5, 4), ("ppo", 6, 20, 2.5, 1.5, 3), ("ppo", 6, 20, 4.5, 3.5, 4),
)  # fmt: skip


def test_a_run_is_the_mean_of_its_seeds():
    """Rewards 3 and 5: half the interval is t sqrt(2) / sqrt(2)."""
    start, early, last, ppo = over_seeds(TWO)
    assert start[:5] == ("sft", 0, 0, 0.0, 0.0)
    assert early[:4] == ("dpo", 0.1, 10, 1.5)
    assert last[:7] == ("dpo", 0.1, 20, 4.0, pytest.approx(T1), 3.25, pytest.approx(T1 / 4))
    assert ppo[:4] == ("ppo", 6, 20, 3.5)
    one = [p for p in TWO if p.seed == 3]
    assert over_seeds(one) == one  # intervals over prompts


def test_the_highest_reward_within_a_kl_is_of_each_seed():
    """Within 2 nats the seeds of DPO have 2 and 1, those of PPO 2.5 and 0, the reference's; within 4, 3 and 5."""
    assert best_of_seeds(TWO, "dpo", 2.0) == pytest.approx((1.5, T1 / 2))
    assert best_of_seeds(TWO, "ppo", 2.0) == pytest.approx((1.25, T1 * 1.25))
    assert best_of_seeds(TWO, "dpo", 4.0) == pytest.approx((4.0, T1))
    one = [p for p in TWO if p.seed == 4]
    assert best_of_seeds(one, "dpo", 4.0) == (5.0, 0.5)


def test_differences_are_paired_by_seed():
    """Within 4 nats 3 - 2.5 and 5 - 4.5, always 0.5, although the seeds differ by 2; within 2 nats -0.5 and 1."""
    assert difference_of_seeds(TWO, "dpo", "ppo", 4.0) == (0.5, 0.0)
    assert difference_of_seeds(TWO, "ppo", "dpo", 4.0) == (-0.5, 0.0)
    assert difference_of_seeds(TWO, "dpo", "ppo", 2.0) == pytest.approx((0.25, T1 * 0.75))


def test_the_tables_claim_an_order_where_the_interval_excludes_zero():
    found = FOUND._replace(points=TWO)
    head, row = differences(found)
    assert head == ["difference within a KL of", "0.5", "1", "2", "4", "8", "16"]
    assert row == ["DPO - PPO", "0.00 +- 0.00", "1.00 +- 12.71", "0.25 +- 9.53", *["0.50 +- 0.00, above"] * 3]
    assert differences(found, "ppo")[1][-1] == "-0.50 +- 0.00, below"
    assert differences(FOUND) == differences(found, "unlikelihood") == []
    assert budgets(found)[2][:4] == ["DPO", "0.00 +- 0.00", "1.00 +- 12.71", "1.50 +- 6.35"]
    assert [row[3] for row in frontier_table(found)[1:4]] == ["0.00 +- 0.00", "4.00 +- 12.71", "3.50 +- 12.71"]
    assert "DPO - PPO" in render_frontier(found, [])
    assert "difference" not in render_frontier(FOUND, [])
    assert [p["seed"] for p in frontier_json(found)["points"][2:5]] == [3, 3, 4]


def test_the_figure_has_the_means_and_each_seed(drawn):  # noqa: F811
    axes, _ = drawn(FOUND._replace(points=TWO, best_of=[]))
    bars = {c.get_label(): c.lines[0] for c in axes.containers}
    assert bars["DPO, by beta"].get_xydata().tolist() == [[3.25, 4.0]]
    color = bars["DPO, by beta"].get_color()
    (small,) = [one for one in axes.lines if one.get_marker() == "." and one.get_color() == color]
    assert small.get_xydata().tolist() == [[3.0, 3.0], [3.5, 5.0]]  # last steps only


def test_an_interval_of_a_kl_begins_at_0_at_the_least_and_does_not_widen_the_figure(drawn):  # noqa: F811
    points = [p._replace(kl_half=9.0 if p.method == "dpo" else 0.5) for p in TWO if p.seed == 4]
    axes, _ = drawn(FOUND._replace(points=points, best_of=[]))
    (bars,) = [c for c in axes.containers if c.get_label() == "DPO, by beta"]
    assert bars.lines[2][0].get_segments()[0][:, 0].tolist() == [0.0, 12.5]  # of 3.5 nats
    assert axes.get_xlim() == pytest.approx((-0.005 * 3.5, 1.2 * 3.5))
    axes, _ = drawn(FOUND._replace(points=points, best_of=[BestOf(128, 1.6, 0.1)]))
    assert axes.get_xlim()[1] == pytest.approx(1.2 * (math.log(128) - 127 / 128))


def test_the_summary_states_how_many_completions_each_method_samples():
    settings = FrontierConfig("synthetic", completions=3, online=OnlineConfig(rollouts=64, max_steps=5))
    lines = summary_lines(FOUND, settings)
    assert "sampled to train on: 3 completions a prompt for the pairs; 320 completions by each run" in lines[1]
    settings = dataclasses.replace(settings, ppo=(), ppo_gt=())
    assert "sampled to train on" not in " ".join(summary_lines(FOUND, settings))


def test_a_file_of_before_there_were_seeds_is_of_the_configs_seed(tmp_path):
    row = point("dpo", 0.1, 10, 2.0, 1.0)._replace(cut=math.nan)._asdict() | {"cut": None}
    del row["seed"]
    (tmp_path / "points.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = frontier_points(tmp_path / "points.jsonl", 5)
    assert (found.seed, found.reward) == (5, 2.0)
    assert math.isnan(found.cut)
    assert frontier_points(tmp_path / "none.jsonl", 5) == []


def test_measurements_of_other_seeds_are_left_out_and_counted():
    settings = FrontierConfig("synthetic", run="runs/x")
    lines = summary_lines(FOUND._replace(other_seeds=3), settings)
    assert "measurements of other seeds in runs/x/points.jsonl, left out: 3" in lines
    assert not any("other seeds" in line for line in summary_lines(FOUND, settings))


def test_the_run_of_the_reward_model_is_known_again(tmp_path):
    """A run that was killed goes on only if its folder has the same config, which holds every option."""
    settings = FrontierConfig("synthetic", batch_size=8, seed=3)
    config = reward_config(settings, tmp_path)
    run = tmp_path / "reward"
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    assert difference(run_config(run), reward_config(settings, tmp_path), ()) == []
    assert (config.run, config.seed, config.batch_size, config.loss["name"]) == (str(run), 3, 8, "bradley_terry")
    assert config.data.path == (str(tmp_path / "pairs.jsonl"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random model and the config of a small experiment."""
    folder = tmp_path_factory.mktemp("seeds")
    save_folder(folder / "model", params(0), CONFIG, TOKENIZER)
    (folder / "small.yaml").write_text(
        "data: {name: synthetic, eval_split: test, max_prompt_length: 16}\nmodel: {path: model}\nreward: synthetic\n"
        "optim: {name: rmsprop, learning_rate: 1.0e-3, warmup_steps: 0}\nprompts: 20\nmax_new_tokens: 1\n"
        "dpo: [1.0]\nppo: []\nppo_gt: []\nunlikelihood: [1.0]\npreferred_ft: []\nbest_of: [1]\n"
        "optimum: {completions: 4}\nbatch_size: 8\nmax_steps: 1\neval_every: 1\neval_prompts: 33\nseed: 5\n"
    )
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the command on the small experiment and returns its output."""
    monkeypatch.chdir(folder)

    def run(*options):
        cli.run_command(["frontier", "small.yaml", *options])
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_seeds_are_added_to_those_that_are_there(run, folder):
    """Each seed has its own pairs, those of a run of that seed alone; a seed that is there is not run again."""
    assert "DPO - " not in run("--run", "runs/one")
    first = (folder / "runs/one/points.jsonl").read_text()
    output = run("--run", "runs/one", "--seeds", "3")
    assert "6 runs of up to 1 steps" in output
    assert "3 seeds from 5, intervals over seeds" in output
    assert "DPO - Unlikelihood" in output
    assert "dpo 1, seed 5" not in output
    assert "dpo 1, seed 7" in output
    rows = read_metrics(folder / "runs/one/points.jsonl")
    assert (folder / "runs/one/points.jsonl").read_text().startswith(first)
    assert sorted((r["seed"], r["method"], r["strength"]) for r in rows) == [
        (seed, *run) for seed in (5, 6, 7) for run in (("dpo", 1.0), ("sft", 0.0), ("unlikelihood", 1.0))
    ]
    assert len({r["reward"] for r in rows if r["method"] == "sft"}) == 3  # other completions of the same policy
    run("--run", "runs/alone", "--seed", "7", "--dpo", "--unlikelihood")
    for name in ("pairs.jsonl", "held_out.jsonl"):
        files = [folder / "runs" / part / name for part in ("one/seed_7", "alone", "one", "one/seed_6")]
        same, again, *others = (file.read_text() for file in files)
        assert same == again
        assert same not in others
    fewer = run("--run", "runs/one", "--seeds", "2")
    assert "4 runs of up to 1 steps" in fewer
    assert "points.jsonl, left out: 3" in fewer
    assert len(json.loads((folder / "runs/one/frontier.json").read_text())["points"]) == 6
    # A folder of before there were seeds, whose rows have none, is of the config's seed, and nothing runs again.
    points, rows = folder / "runs/alone/points.jsonl", read_metrics(folder / "runs/alone/points.jsonl")
    points.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "seed"}) + "\n" for row in rows))
    alone = ("--run", "runs/alone", "--seed", "7", "--dpo", "--unlikelihood")
    assert "left out" not in run(*alone)
    assert len(read_metrics(points)) == len(rows)
    (start,) = json.loads((folder / "runs/alone/frontier.json").read_text())["points"]
    assert start["seed"] == 7
    rows[0]["seed"] = 6  # below those asked for
    points.write_text(points.read_text() + json.dumps(rows[0]) + "\n")
    assert "points.jsonl, left out: 1" in run(*alone)


def test_no_seed_is_refused(run):
    with pytest.raises(UserError, match="seeds must be at least 1, got 0"):
        run("--run", "runs/none", "--seeds", "0")
