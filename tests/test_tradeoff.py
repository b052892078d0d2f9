"""Figures of runs against their KL: which runs are drawn, in which order, and how their losses are told apart."""

import json
import re
import runpy
from pathlib import Path

import pytest
from test_report import HOSTILE, metrics_json, page, run

from dpo_jax.pages.metrics import Measured
from dpo_jax.pages.tradeoff import places_by_loss, tradeoff_panels

CONFIGS = Path(__file__).parent.parent / "configs"
PICTURES = runpy.run_path(str(CONFIGS.parent / "scripts" / "pictures"))
KL, REWARD, ACCURACY = "eval_kl", "true reward of the policy", "eval_rewards/accuracies"


def of(name, beta, kl, value, metric=REWARD):
    """A run's config and metrics; intervals reach 0.5 to each side."""
    measured = {key: Measured(x, x - 0.5, x + 0.5, 9) for key, x in ((KL, kl), (metric, value))}
    return {"loss.name": name, "loss.beta": beta}, measured


def test_runs_of_a_loss_are_joined_by_rising_beta():
    runs = [of("dpo", "10", 1.0, 2.0), of("ipo", "0.3", 4.0, 1.0), of("dpo", "2", 3.0, 2.5)]
    found = places_by_loss(runs, REWARD)
    assert [(p.beta, p.kl.mean, p.value.mean) for p in found["dpo"]] == [("2", 3.0, 2.5), ("10", 1.0, 2.0)]
    assert [(p.beta, p.kl.mean, p.value.mean) for p in found["ipo"]] == [("0.3", 4.0, 1.0)]


def test_a_beta_that_is_no_number_comes_last():
    """An option of one's own loss may be anything."""
    given = ("cosine", "1e+03", "1e-2", "None", "1.2.3", ".5", "nan", "-1")
    found = places_by_loss([of("own", beta, 1.0, 1.0) for beta in given], REWARD)
    assert [place.beta for place in found["own"]] == ["-1", "1e-2", ".5", "1e+03", "1.2.3", "None", "cosine", "nan"]


def test_terms_of_a_loss_are_named_together():
    config = {"loss.0.name": "dpo", "loss.0.beta": "0.1", "loss.1.name": "sft", "loss.1.weight": "0.5"}
    assert [*places_by_loss([(config, of("", "", 1.0, 1.0)[1])], REWARD)] == ["dpo sft"]


def test_runs_without_an_interval_or_a_kl_are_left_out():
    config, measured = of("dpo", "1", 1.0, 2.0)
    bare = {**measured, REWARD: Measured(2.0)}
    assert places_by_loss([(config, bare), (config, {REWARD: measured[REWARD]})], REWARD) == {}
    assert tradeoff_panels([of("dpo", "1", 1.0, 2.0), of("dpo", "2", 1.0, 2.0)]) == []  # two points are no curve


def test_each_metric_with_enough_runs_has_a_figure():
    runs = [of("dpo", str(beta), 1.0 / beta, beta, ACCURACY) for beta in (1, 2, 4)]
    (panel,) = tradeoff_panels(runs)
    assert panel.title == "Accuracy against KL"
    for label in ("dpo", "1", "2", "4", "KL from the reference, nats"):
        assert f">{label}</text>" in panel.svg
    # The line goes from the largest KL (beta 1) to the smallest: its points run to the left.
    line = max(re.findall(r'd="M ([^"]*)" clip-path', panel.svg), key=lambda path: path.count("L"))
    assert [float(x) for x in re.findall(r"([\d.]+) [\d.]+", line)] == sorted(
        (float(x) for x in re.findall(r"([\d.]+) [\d.]+", line)), reverse=True
    )


def test_a_long_name_leaves_room_for_the_figure():
    """Its end stays, by which the terms of a loss differ."""
    panels = tradeoff_panels([of("x" * 300 + " sft", str(beta), 1.0, 1.0) for beta in (1, 2, 3)])
    assert f">…{'x' * 27} sft</text>" in panels[0].svg


def test_a_page_of_runs_shows_them_and_escapes_their_losses(tmp_path):
    runs = [run(tmp_path / str(i), beta=i, eval_json=metrics_json({KL: 0.5, REWARD: 0.5})) for i in (1, 2, 3)]
    for folder in runs:
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("name: dpo", f"name: {HOSTILE!r}"))
    shown = page(tmp_path, *runs)
    assert "True reward against KL" in shown.titles
    assert "script" not in shown.tags
    assert "True reward against KL" not in page(tmp_path, *runs[:2]).titles


def test_runs_of_an_ablation_are_stored_and_drawn(tmp_path):
    """Three runs, of which each needs both evaluations: the metrics of training do not do."""
    runs = [run(tmp_path / f"{i}", (ACCURACY, REWARD, KL), beta=beta) for i, beta in enumerate((0.1, 0.3, 1.0))]
    other = json.loads(metrics_json({KL: 0.3, "eval_logps/chosen": -0.2}))
    other["metrics"]["eval_logps/chosen"] |= {"low": -0.3, "high": -0.1}
    for name, text, missing in (
        ("eval_other.json", json.dumps(other), KL.removeprefix("eval_")),
        ("eval.json", metrics_json({ACCURACY: 0.7, REWARD: 0.6, KL: 0.5}), ""),
    ):
        for folder in runs:
            (folder / name).write_text(text)
        if missing:
            with pytest.raises(SystemExit, match=f"0 has no {missing} with an interval"):
                PICTURES["store_ablation"](runs, tmp_path / "all.json")
    PICTURES["store_ablation"](runs, tmp_path / "all.json")
    lines = PICTURES["draw_ablation"](tmp_path / "all.json", tmp_path / "all.svg")
    values = "0.70 +- 0.25 | 0.60 +- 0.25 | 0.50 +- 0.25 | 0.30 +- 0.25 | -0.20 +- 0.10"
    assert lines == [f"| `dpo` {beta} | {values} |" for beta in ("0.1", "0.3", "1")]
    assert "True reward" in (tmp_path / "all.svg").read_text()


def test_the_stored_ablation_is_the_published_table(tmp_path):
    lines = PICTURES["draw_ablation"](CONFIGS / "ablation.json", tmp_path / "all.svg")
    assert len(lines) == 30
    assert len({row["loss.name"] for row in json.loads((CONFIGS / "ablation.json").read_text())}) == 10
    text = (CONFIGS / "README.md").read_text()
    assert [line for line in lines if line not in text] == []
