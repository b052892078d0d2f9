"""`dpo-jax leaderboard`: worlds, data and frontier by hand, losses at their optimum, standings, page and command."""

import json
import math

import jax
import numpy as np
import pytest

from dpo_jax import cli, losses
from dpo_jax.commands.leaderboard import entrants, result_of, summary
from dpo_jax.errors import UserError
from dpo_jax.experiments import leaderboard, standings
from dpo_jax.experiments.leaderboard import CONDITIONS, Batches, LossPaths, batches_of
from dpo_jax.experiments.table_world import (
    FLIPPED,
    LABELS,
    SPREAD,
    ExactFrontier,
    ScoredLists,
    TableWorld,
    logits_logps,
    make_world,
    path_sums,
    sample_lists,
)
from dpo_jax.pages.leaderboard import (
    leaderboard_figure,
    leaderboard_json,
    leaderboard_table,
    order_of,
    render_leaderboard,
)

WORLD = make_world(5)
# One prompt, three responses: the end, a and b; a uniform reference; rewards log 1, log 2 and log 4.
WORTH = np.array([1.0, 2.0, 4.0])
THREE = TableWorld(
    (np.zeros((1, 1, 3), np.float32)[..., [1, 2, 0]],),
    np.full((1, 3), -math.log(3), np.float32),
    np.log(WORTH)[None].astype(np.float32),
    np.ones(3, np.float32),
    np.full((1, 3), -math.log(3), np.float32),
)


def every_pair(worth, count):
    """All pairs of three responses, `count` times each, with either one first by Bradley-Terry: worth / sum of both."""
    ids = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        first = round(count * worth[i] / (worth[i] + worth[j]))
        ids += [[i, j]] * first + [[j, i]] * (count - first)
    ids = np.array(ids, np.int32)[None]
    chosen = np.bincount(ids[0, :, 0], minlength=3)[None] / len(ids[0])
    return Batches(np.zeros(len(ids[0]), np.int32), ids, np.zeros(ids.shape, np.float32), chosen)


# The world.


def test_a_response_sums_the_entries_along_it():
    """Two letters and at most two tokens: end; a end, b end; aa, ab, ba, bb."""
    first, second = np.array([[[1.0, 2.0, 3.0]]]), np.array([[[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]])
    np.testing.assert_array_equal(path_sums([first, second], np), [[3, 31, 62, 11, 21, 42, 52]])
    world = make_world(0, prompts=2, alphabet=2, longest=2)
    np.testing.assert_array_equal(world.lengths, [1, 2, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(np.exp(world.reference).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(logits_logps(world.logits)), np.exp(world.reference), rtol=1e-6)


def test_rewards_have_a_spread_under_the_reference():
    mass = np.exp(WORLD.reference.astype(np.float64))
    np.testing.assert_allclose((mass * WORLD.reward).sum(1), 0, atol=1e-5)
    np.testing.assert_allclose((mass * WORLD.reward**2).sum(1), SPREAD**2, rtol=1e-4)
    assert not np.allclose(WORLD.other, WORLD.reference, atol=0.5)
    assert not np.allclose(make_world(6).reward, WORLD.reward, atol=0.5)


def test_annotators_score_as_their_labels_say():
    found = {labels: sample_lists(WORLD, labels, 4000, seed=1) for labels in LABELS}
    prompts = np.arange(4000) % 4
    for labels, (ids, scores) in found.items():
        assert all(len(set(row)) == 4 for row in ids.tolist())
        true = WORLD.reward[prompts[:, None], ids]
        if labels in ("clean", "off_policy"):
            np.testing.assert_array_equal(scores, true)
        if labels == "flipped":
            pairs, were = scores.reshape(-1, 2), true.reshape(-1, 2)
            flipped = (pairs == were[:, ::-1]).all(1)
            np.testing.assert_array_equal(np.where(flipped[:, None], were[:, ::-1], were), pairs)
            assert flipped.mean() == pytest.approx(FLIPPED, abs=4 * math.sqrt(0.16 / 8000))
        if labels == "bradley_terry":
            gap = true[:, 0] - true[:, 1]
            right, p = (scores[:, 0] > scores[:, 1]) == (gap > 0), 1 / (1 + np.exp(-abs(gap)))
            assert right.mean() == pytest.approx(p.mean(), abs=4 * math.sqrt((p * (1 - p)).mean() / 4000))
    for labels, policy in (("clean", WORLD.reference), ("off_policy", WORLD.other)):
        share = np.zeros((4, WORLD.reward.shape[1]))
        np.add.at(share, (prompts, found[labels].ids[:, 0]), 1 / 1000)
        assert np.abs(share - np.exp(policy)).max() < 4 * math.sqrt(0.25 / 1000)
        assert np.corrcoef(share.ravel(), np.exp(policy).ravel())[0, 1] > 0.95


# The frontier.


def tilted(world, beta):
    """Reward, KL and log-probs of the optimum ref exp(r / beta) / Z."""
    reference, reward = (np.asarray(x, np.float64) for x in (world.reference, world.reward))
    logits = reference + reward / beta
    policy = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    mass = np.exp(policy)
    return (mass * reward).sum(1).mean(), (mass * (policy - reference)).sum(1).mean(), policy


def test_the_frontier_by_hand():
    """At beta 1 the optimum is (1, 2, 4) / 7; at beta 1/2 (1, 4, 16) / 21."""
    frontier = ExactFrontier(THREE)
    for p in (np.array([1, 2, 4]) / 7, np.array([1, 4, 16]) / 21):
        assert frontier.at(math.log(3) + (p * np.log(p)).sum()) == pytest.approx((p * np.log(WORTH)).sum(), abs=1e-6)
    assert frontier.at(0.0) == pytest.approx(math.log(2), abs=1e-6) == frontier.start
    assert frontier.at(50.0) == pytest.approx(math.log(4), abs=1e-6)


def test_the_exact_optimum_is_at_distance_zero_and_others_are_below():
    frontier = ExactFrontier(WORLD)
    for beta in (0.031, 0.11, 0.77, 1.9, 13.0, 77.0):
        reward, kl, _ = tilted(WORLD, beta)
        assert frontier.at(kl) == pytest.approx(reward, abs=2e-6)
    random = np.random.default_rng(0)
    for _ in range(20):
        policy = WORLD.reference + random.uniform(0, 1) * WORLD.reward + random.normal(0, 0.3, WORLD.reward.shape)
        policy -= np.log(np.exp(policy).sum(1, keepdims=True))
        mass = np.exp(policy)
        kl = (mass * (policy - WORLD.reference)).sum(1).mean()
        assert (mass * WORLD.reward).sum(1).mean() < frontier.at(kl) - 1e-3


# The data of a loss.

LISTS = ScoredLists(np.arange(4 * 16, dtype=np.int32).reshape(16, 4), np.tile([[3.0, 1.0, 2.0, 4.0]], (16, 1)))


def first_batch(loss):
    found = batches_of(LISTS, losses.build(loss), (4, 64), 2)
    assert len(found.ids) == 2
    np.testing.assert_array_equal(found.ids[0], found.ids[1])
    return found.prompts.tolist()[:4], found.ids[0, :3].tolist(), found.scores[0, :2].tolist()


def test_each_loss_sees_the_same_responses_in_its_own_order():
    """Scores 3 1 2 4: pairs (0, 1) and (3, 2); the list 3 0 2 1; gold, chosen and rejected 3 0 1."""
    assert first_batch("dpo") == ([0, 0, 1, 1], [[0, 1], [3, 2], [4, 5]], [[3, 1], [4, 2]])
    assert first_batch("sft") == ([0, 0, 1, 1], [[0], [3], [4]], [[3], [4]])
    assert first_batch("plackett_luce") == (
        [0, 1, 2, 3], [[3, 0, 2, 1], [7, 4, 6, 5], [11, 8, 10, 9]], [[4, 3, 2, 1], [4, 3, 2, 1]],
    )  # fmt: skip
    assert first_batch("tpo") == ([0, 1, 2, 3], [[3, 0, 1], [7, 4, 5], [11, 8, 9]], [[4, 3, 1], [4, 3, 1]])
    prompts, ids, scores = first_batch("kto")
    assert (prompts, ids, scores) == ([0, 0, 1, 1], [[0, 1, 4], [3, 2, 7], [4, 5, 8]], [[3, 1, 0], [4, 2, 0]])
    assert batches_of(LISTS, losses.build("kto"), (4, 64), 1).ids[0, -1, 2] == 3  # the last one has the first's


def test_the_share_of_chosen_responses():
    shares = batches_of(LISTS, losses.build("dpo"), (4, 64), 2).chosen
    assert shares.sum() == pytest.approx(1)
    assert shares[0, 0] == shares[0, 3] == shares[1, 4] == pytest.approx(1 / 32)
    assert shares[0, 1] == 0


# Training.


def trained(term, world, batches, steps):
    return jax.jit(lambda world, batches: leaderboard.train_table(term, world, batches, steps))(world, batches)


def train(term, batches, steps=1500):
    path = trained(term, THREE, batches, np.array([20, steps]))
    return [np.asarray(x, np.float64) for x in path]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [pytest.param(0.5, marks=pytest.mark.milestone), 1.0])
def test_dpo_on_every_clean_comparison_reaches_the_optimum(beta):
    """All pairs at their Bradley-Terry frequencies, of (1, 2, 4): 15 of each pair are whole numbers."""
    batches = every_pair(WORTH, 15)
    reward, kl, chosen, calibration = train({"name": "dpo", "beta": beta}, batches)
    best, best_kl, policy = tilted(THREE, beta)
    assert reward[-1] == pytest.approx(best, abs=1e-4)
    assert kl[-1] == pytest.approx(best_kl, abs=1e-4)
    assert ExactFrontier(THREE).at(kl[-1]) - reward[-1] == pytest.approx(0, abs=1e-4)
    assert chosen[-1] == pytest.approx((batches.chosen * (policy - THREE.reference)).sum(), abs=1e-3)
    assert calibration == pytest.approx(0, abs=1e-3)
    assert kl[0] < kl[-1] - 0.01  # on the way


@pytest.mark.slow
def test_a_program_of_all_runs_is_each_of_them():
    worlds = [make_world(seed) for seed in range(2)]
    steps = leaderboard.measured_steps(30)
    for name, betas in {"bco": (0.3, 2.0), "sft": (0.3, 2.0)}.items():
        found = leaderboard.run_loss({"name": name}, betas, worlds, steps)
        assert found.reward.shape == (2 if name == "bco" else 1, len(CONDITIONS), 2, len(steps))
        assert found.betas == betas if name == "bco" else math.isnan(found.betas[0])
        term = {"name": name, "beta": 2.0} if name == "bco" else {"name": name}
        lists = sample_lists(worlds[1], "flipped", 2 * 16, 1)
        data = batches_of(lists, losses.build(term), worlds[1].reward.shape, 64)
        alone = trained(term, worlds[1], data, steps)
        at = (-1, CONDITIONS.index(("flipped", "small")), 1)
        for one, other in zip((found.reward, found.kl, found.chosen, found.calibration), alone, strict=True):
            np.testing.assert_allclose(one[at], other, rtol=2e-3, atol=2e-4)


def test_measured_steps_lie_closer_at_the_start():
    steps = leaderboard.measured_steps(600)
    assert (steps[0], steps[-1]) == (5, 600)
    assert (np.diff(steps) > 0).all()
    assert leaderboard.measured_steps(3).tolist() == [3]


# Standings.


def test_a_run_is_stopped_at_its_budget_by_hand():
    kl = np.array([[0.2, 0.6, 0.4, 1.4], [0.1, 0.2, 0.3, 0.4]])
    reward = np.array([[1.0, 2.0, 5.0, 4.0], [0.5, 1.0, 1.5, 1.2]])
    start = np.zeros(2)
    np.testing.assert_allclose(standings.stopped_at(kl, reward, start, 0.1), [0.5, 0.5])
    np.testing.assert_allclose(standings.stopped_at(kl, reward, start, 0.5), [1.75, 1.2])
    np.testing.assert_allclose(standings.stopped_at(kl, reward, start, 1.0), [4.4, 1.2])
    np.testing.assert_allclose(standings.stopped_at(kl, reward, start, 2.0), [4.0, 1.2])


def test_a_seed_has_no_say_in_its_own_strength():
    """Over the other two seeds, strength 1 is best for seed 0, and strength 0 for seeds 1 and 2."""
    values = np.array([[0.0, 4.0, 5.0], [9.0, 5.0, 5.0]])
    np.testing.assert_array_equal(standings.without_own_choice(values), [9.0, 5.0, 5.0])
    values = np.array([[9.0, 4.0, 4.0], [0.0, 5.0, 5.0]])
    np.testing.assert_array_equal(standings.without_own_choice(values), [0.0, 4.0, 4.0])


def test_a_loss_is_dominated_where_another_is_better_at_every_budget():
    noise = np.array([0.0, 0.01, -0.01, 0.02, -0.02, 0.01])
    base = np.stack([np.linspace(0, 5, 6)] * 3)  # worlds differ far more than losses: each is compared with itself
    rewards = np.stack([base, base + 0.1 + noise, base + np.array([[0.3], [0.3], [-0.1]]) + noise])
    assert standings.dominators(rewards) == [[1], [], []]
    few = rewards[:, :, :2] + np.array([0.0, 0.08])  # of two seeds nothing is known
    few[1, :, 1] -= 0.08
    assert standings.dominators(few) == [[], [], []]


def made_paths(gain, betas=(0.3, 1.0)):
    """Runs whose reward is `gain` times the KL, which goes to 1.5 at the first beta and to 0.6 at the second."""
    shape = (len(betas), len(CONDITIONS), 3, 4)
    kl = np.broadcast_to(np.array([0.1, 0.2, 0.5, 1.0]) * np.array([1.5, 0.6])[: len(betas), None, None, None], shape)
    wobble = 1 + 0.01 * np.arange(3)[:, None]
    sign = np.array([-1.0, 1.0])[np.arange(len(CONDITIONS)) % 2][:, None, None]
    return LossPaths(betas, np.array([1, 2, 3, 4]), gain * kl * wobble, kl, sign * kl, np.full(shape[:3], 0.25))


def made_result():
    broken = made_paths(1.0)
    broken.reward[1, 0, 0, 3] = math.nan
    paths = {"dpo": made_paths(1.0), "sft": made_paths(0.5, (math.nan,)), "hinge": broken}
    return result_of(paths, [THREE] * 3, 4)


def test_standings_of_made_paths():
    found = made_result()
    dpo = next(s for s in found.standings if (s.loss, s.labels, s.size) == ("dpo", "flipped", "large"))
    assert dpo.beta == 0.3
    assert [r.mean for r in dpo.rewards] == pytest.approx([0.505, 1.01, 1.515])
    limit = ExactFrontier(THREE).at(1.0)
    assert dpo.distances[1].mean == pytest.approx(limit - dpo.rewards[1].mean)
    assert dpo.end_kl == pytest.approx((1.5, 0.0), abs=1e-12)
    gain = 1.5 * 1.0, 1.5 * 1.01, 1.5 * 1.02  # of three seeds, at the end; Student's t of two degrees of freedom
    assert dpo.end_reward == pytest.approx((1.515, 4.302652729911275 * np.std(gain, ddof=1) / math.sqrt(3)))
    assert dpo.end_distance.mean == pytest.approx(math.log(4) - 1.515, abs=1e-3)
    assert (dpo.chosen.mean, dpo.fell) == pytest.approx((1.5, 0.0))
    assert {s.fell for s in found.standings if s.labels in ("clean", "bradley_terry")} == {1.0}
    hinge = [s for s in found.standings if s.loss == "hinge"]
    assert {s.beta for s in hinge} == {0.3}
    assert "left out, since the policy became NaN: hinge, beta 1" in summary(found)[-1]


def test_losses_that_all_break_are_an_error_in_one_line():
    broken = made_paths(1.0)
    broken.reward[:, 0, 0, 3] = math.nan
    with pytest.raises(UserError, match="policies of dpo, sft become NaN at every strength; give other losses"):
        result_of({"dpo": broken, "sft": broken}, [THREE] * 3, 4)


def test_the_page_and_its_parts():
    found = made_result()
    assert order_of(found.standings)[-1] == "sft"
    head, *rows = leaderboard_table(found.standings, "small")
    assert head == ["small data", "clean", "flipped", "Bradley-Terry", "off-policy"]
    assert [row[0] for row in rows] == order_of(found.standings)
    assert rows[0][1].endswith("*")
    assert not rows[-1][1].endswith("*")
    text = json.dumps(leaderboard_json(found), allow_nan=False)
    stored = json.loads(text)
    assert stored["paths"]["hinge"]["conditions"]["clean-small"]["reward"][1][3] is None
    assert stored["standings"][0]["beta"] == 0.3
    page = render_leaderboard(found, summary(found))
    assert page.count("<h2>") == 1 + len(CONDITIONS)
    assert "dominated by" in page
    svg = leaderboard_figure(found.standings)
    assert len(svg) < 300_000


# The command.


def test_all_losses_of_policies_enter():
    every = entrants(())
    assert set(every) == {name for name in losses.REGISTRY if name not in ("axes", "bradley_terry")}
    point = "link=savage,scale=2"
    assert entrants([point]) == {point: {"name": "axes", "link": "savage", "scale": 2.0}}
    assert entrants([smooth := "dpo,label_smoothing=0.1"]) == {smooth: {"name": "dpo", "label_smoothing": 0.1}}
    assert leaderboard.beta_of({"name": "dpo"})
    assert not leaderboard.beta_of({"name": "dpo", "beta": 1.0})
    assert not leaderboard.beta_of({"name": "sft"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "needs --seeds of at least 2"),
        (["--losses", "dop"], "dpo-jax leaderboard: unknown loss 'dop'"),
        (["--losses", "dpo,smoothing=0.1"], "unknown key 'smoothing'; did you mean 'label_smoothing'?"),
        (["--losses", "bradley_terry"], "bradley_terry trains a reward model, not a policy; leave it out"),
        (["--losses", "dpo", "--beta", "0"], "beta 0.0 is not a finite number above 0"),
    ],
)
def test_what_cannot_enter_is_refused(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        cli.run_command(["leaderboard", "--run", str(tmp_path / "x"), *arguments])


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    options = ["--losses", "dpo", "link=savage", "--beta", "1", "--seeds", "2", "--max_steps", "12"]
    cli.run_command(["leaderboard", *options, "--run", str(tmp_path / "found")])
    said = capsys.readouterr().out
    assert "small data" in said
    assert "optimum: reward" in said
    stored = json.loads((tmp_path / "found/leaderboard.json").read_text())
    assert {s["loss"] for s in stored["standings"]} == {"dpo", "link=savage"}
    assert (tmp_path / "found/leaderboard.svg").read_text().startswith("<svg")
    assert "link=savage" in (tmp_path / "found/leaderboard.html").read_text()
    # The same command goes on: with one part kept, the other one is trained again.
    json_file, one = tmp_path / "found/leaderboard.json", min((tmp_path / "found/parts").glob("*.npz"))
    before, part = json_file.read_bytes(), one.read_bytes()
    one.unlink()
    json_file.unlink()
    cli.run_command(["leaderboard", *options, "--run", str(tmp_path / "found")])
    assert json_file.read_bytes() == before
    assert one.read_bytes() == part
