"""`dpo-jax leaderboard` in numbers: a run beside its own arithmetic in numpy, standings by hand, tables and figure."""

import math

import jax
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dpo_jax.experiments import leaderboard, standings
from dpo_jax.experiments.leaderboard import CONDITIONS, Batches, LossPaths
from dpo_jax.experiments.standings import BUDGETS, Standing
from dpo_jax.experiments.table_world import LABELS, ExactFrontier, TableWorld
from dpo_jax.intervals import MeanInterval
from dpo_jax.pages import leaderboard as page

# One prompt and three responses, the end, a and b, of a uniform reference, with the rewards log 1, log 2 and log 4.
UNIFORM = np.full((1, 3), -math.log(3), np.float32)
THREE = TableWorld(
    (np.zeros((1, 1, 3), np.float32),), UNIFORM, np.log([[1.0, 2.0, 4.0]]).astype(np.float32), np.ones(3), UNIFORM
)


def by_numpy(batches, beta, steps):
    """Reward, KL and rise of the chosen responses of rpo_sq at steps: Adam at 0.03 (1 - t / T), a batch a step."""
    x, m, v, found = np.zeros(3), np.zeros(3), np.zeros(3), []
    for t in range(steps[-1]):
        (chosen, rejected), scores = batches.ids[t % 2].T, batches.scores[t % 2]
        residual = beta * (x[chosen] - x[rejected]) - (scores[:, 0] - scores[:, 1])
        g = np.zeros(3)
        np.add.at(g, chosen, 2 * beta * residual / len(chosen))
        np.add.at(g, rejected, -2 * beta * residual / len(chosen))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        x = x - 0.03 * (1 - t / steps[-1]) * step
        if t + 1 in steps:
            ratio = x - np.log(np.exp(x).mean())
            mass = np.exp(ratio) / 3
            found.append([mass @ np.log([1, 2, 4]), mass @ ratio, (batches.chosen[0] * ratio).sum()])
    return np.array(found).T


def test_a_run_is_adam_on_its_batches_in_order():
    ids = np.array([[[1, 0], [2, 0]], [[2, 1], [1, 2]]], np.int32)
    scores = np.array([[[2.0, 1.0], [3.0, 0.5]], [[1.0, 0.2], [5.0, 1.0]]], np.float32)
    batches = Batches(np.zeros(2, np.int32), ids, scores, np.array([[0.0, 0.5, 0.5]], np.float32))
    steps = np.array([3, 10, 40])
    term = {"name": "rpo_sq", "beta": 0.7}
    run = jax.jit(lambda world, batches: leaderboard.train_table(term, world, batches, steps))
    *path, _ = run(THREE, batches)
    np.testing.assert_allclose(path, by_numpy(batches, 0.7, steps), rtol=2e-4, atol=2e-6)


# Standings.


def made_paths(rewards):
    """Paths with the KL 0.5, 1 and 2 and rewards[beta] at these, of three seeds that differ little."""
    shape = (len(rewards), len(CONDITIONS), 3, 3)
    reward = np.array(rewards)[:, None, None] + 0.01 * np.arange(3)[:, None] + np.zeros(shape)
    kl, betas = np.array(BUDGETS) + np.zeros(shape), tuple(float(i) for i in range(len(rewards)))
    return LossPaths(
        betas, np.array([1, 2, 3]), reward, kl, 0 * kl, np.arange(len(rewards))[:, None, None] + 0 * kl[..., 0]
    )


def standings_of(rewards):
    """Standings under the first condition, by loss."""
    found = standings.standings_of({n: made_paths(r) for n, r in rewards.items()}, [ExactFrontier(THREE)] * 3)
    return {s.loss: s for s in found if (s.labels, s.size) == CONDITIONS[0]}


def test_the_strength_is_the_best_at_the_main_budget():
    """The first is best at half a nat, the second at a nat, the last at two; each budget's reward is its best one's."""
    row = standings_of({"dpo": [[2.0, 2.1, 2.2], [1.0, 3.0, 3.1], [0.5, 1.0, 9.0]]})["dpo"]
    assert row.beta == 1.0
    assert (row.calibration.mean, row.end_reward.mean) == pytest.approx((1.0, 3.11))
    assert [r.mean for r in row.rewards] == pytest.approx([2.01, 3.01, 9.01])


def test_a_loss_is_dominated_by_the_best_that_dominates_it():
    """By the reward at the main budget, whatever their order."""
    low, middle, high = [[1.0, 1.0, 1.0]], [[2.0, 2.0, 9.0]], [[3.0, 3.0, 3.0]]
    for rewards in ({"a": middle, "b": high, "c": low}, {"c": low, "b": high, "a": middle}):
        assert {name: s.beaten_by for name, s in standings_of(rewards).items()} == {"a": "", "b": "", "c": "b"}


def test_domination_is_widened_for_the_number_of_losses():
    """A gap of 1 with a deviation of 0.55 over 4 seeds: half an interval is 0.88 for one other loss, 1.15 for two."""
    base = np.zeros((3, 4))
    ahead = base + 1 + 0.55 * math.sqrt(3) / 2 * np.array([-1.0, 1.0, -1.0, 1.0])
    assert standings.dominators(np.stack([base, ahead])) == [[1], []]
    assert standings.dominators(np.stack([base, ahead, base])) == [[], [], []]


# Tables and figure.


def standing(loss, labels, size, distance, **fields):
    """A standing whose distances are 9, `distance` and 7, and all else 0.5."""
    near, half = MeanInterval(distance, 0.125), MeanInterval(0.5, 0.0)
    distances = (MeanInterval(9.0, 0.0), near, MeanInterval(7.0, 0.0))
    row = Standing(loss, labels, size, 0.3, (half,) * 3, distances, half, half, half, half, half, 0.25, "")
    return row._replace(**fields)


def made_standings(distances=(("ipo", 0.25), ("dpo", 0.75), ("sft", 0.5))):
    """Distances rise by 1 with each kind of labels, and by 0.1 with large data; ipo is dominated by dpo."""
    return [
        standing(loss, labels, size, d + i + 0.1 * (size == "large"), beaten_by="dpo" if loss == "ipo" else "")
        for size, labels in ((size, labels) for labels, size in CONDITIONS)
        for i in [list(LABELS).index(labels)]
        for loss, d in distances
    ]


def test_the_tables_in_numbers():
    assert page.order_of(made_standings()) == ["ipo", "sft", "dpo"]
    _, *rows = page.leaderboard_table(made_standings(), "large")
    assert rows == [
        ["ipo", "0.35 +- 0.12", "1.35 +- 0.12", "2.35 +- 0.12", "3.35 +- 0.12"],
        ["sft", "0.60 +- 0.12*", "1.60 +- 0.12*", "2.60 +- 0.12*", "3.60 +- 0.12*"],
        ["dpo", "0.85 +- 0.12*", "1.85 +- 0.12*", "2.85 +- 0.12*", "3.85 +- 0.12*"],
    ]
    none = standing("sft", "clean", "small", 0.5, calibration=MeanInterval(math.nan, math.nan), beta=math.nan)
    head, one, other = page.condition_table(
        [standing("ipo", "clean", "small", 0.75, beaten_by="sft"), none], "clean", "small"
    )
    half = "0.50 +- 0.00"
    assert dict(zip(head, one, strict=True)) == {
        "loss": "sft", "beta": "", "reward at 0.5": half, "reward at 1": half, "reward at 2": half,
        "distance": "0.50 +- 0.12", "end: KL": half, "reward": half, "its distance": half, "calibration error": "-",
        "log p chosen": "+0.50 +- 0.00", "fell": "25%", "dominated by": "",
    }  # fmt: skip
    assert (other[0], other[1], other[5], other[-1]) == ("ipo", "0.3", "0.75 +- 0.12", "sft")
    assert dict(zip(head, other, strict=True))["calibration error"] == "0.500 +- 0.000"


def drawn_figure(monkeypatch, rows):
    monkeypatch.setattr(page.figure, "set_svg_id", lambda fig: fig)
    fig = page.leaderboard_figure(rows)
    FigureCanvasAgg(fig).draw()
    return fig


def test_the_figure_has_the_distances(monkeypatch):
    left, right = drawn_figure(monkeypatch, made_standings()).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["ipo", "sft", "dpo"]
    assert left.get_ylim() == (2.6, -0.6)
    assert [t.get_text() for t in right.get_yticklabels()] == [""] * 3
    for axes, more in ((left, 0.0), (right, 0.1)):
        for i, bars in enumerate(axes.containers):
            line, _, (whiskers,) = bars.lines
            x, y = np.array(sorted(zip(*line.get_data(orig=False), strict=True))).T
            np.testing.assert_allclose(x, np.array([0.25, 0.5, 0.75]) + i + more)
            np.testing.assert_allclose(y, np.arange(3) + 0.18 * (i - 1.5), atol=1e-12)
            ends = np.sort([segment[:, 0] for segment in whiskers.get_segments()], axis=0)
            np.testing.assert_allclose(ends, x[:, None] + [-0.125, 0.125])
    legend = [t.get_text() for t in right.get_legend().get_texts()]
    assert legend == ["clean", "flipped", "Bradley-Terry", "off-policy"]


def test_rows_of_long_names():
    """Of two further lines a row is 1.5 lines of 0.2 inches higher."""
    long = "score=log_prob,ranking=all_pairs,link=savage"
    texts, centers, height = page.name_rows(["dpo", long, "ipo"])
    assert texts == ["dpo", "score=log_prob,\nranking=all_pairs, link=savage", "ipo"]
    assert centers == pytest.approx([0.0, 1.375, 2.75])
    assert height == pytest.approx(3.75)


@pytest.mark.parametrize("names", [
    ("dpo",),
    ("score=log_prob_mean,ranking=all_pairs,link=exponential,target=constant,scale=2",
     "score=log_odds,link=savage,target=reference_positive", "apo_zero_unpaired", "a_module.of_my_own:$loss$"),
])  # fmt: skip
def test_texts_of_the_figure_do_not_overlap(names, monkeypatch):
    fig = drawn_figure(monkeypatch, made_standings([(name, 0.1 * i) for i, name in enumerate(names)]))
    texts = [*fig.texts, *fig.axes[-1].get_legend().get_texts()]
    for axes in fig.axes:
        low, high = axes.get_xlim()
        shown = [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high] + axes.get_yticklabels()
        texts += [axes.title, *(t for t in shown if t.get_text())]
        assert axes.get_window_extent().width > 0.25 * fig.bbox.width
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert fig.bbox.x0 <= box.x0 <= box.x1 <= fig.bbox.x1
        assert fig.bbox.y0 <= box.y0 <= box.y1 <= fig.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i].get_text()
