"""The report page: what it shows; and that text of users is escaped in every kind of page."""

import html.parser
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_jax import cli
from dpo_jax.data.audit import Piece
from dpo_jax.data.shortcuts import Shortcut
from dpo_jax.errors import UserError
from dpo_jax.experiments.frontier import FrontierResult
from dpo_jax.experiments.optimum import Optimum
from dpo_jax.experiments.points import Point
from dpo_jax.pages import figure
from dpo_jax.pages.curves import PLOTS, polyline_points
from dpo_jax.pages.data import DataPage, render_data
from dpo_jax.pages.frontier import render_frontier
from dpo_jax.pages.run import read_run, write_report
from dpo_jax.pages.winrate import WinrateRow, render_winrate
from dpo_jax.rewards.winrate import WinTally, win_share

TEMPLATES = Path(figure.__file__).parent / "templates"
HOSTILE = "<script>alert('x')</script> & $\\frac{1}{2}$"
DPO = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen")
DPO += ("logps/rejected", "logratio", "grad_norm", "learning_rate")


def run(folder, metrics=DPO, steps=5, beta=0.1, **files):
    """Makes a run folder; every metric is 1 / (step + 1), the evaluations are at the first and last step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model:\n  path: m<b>\nloss:\n  name: dpo\n  beta: {beta}\nseed: 0\n")
    lines = [{"step": s, "examples": 8 * s} | dict.fromkeys(metrics, 1 / (s + 1)) for s in range(1, steps + 1)]
    lines += [{"step": s, "examples": 8 * s} | {f"eval_{m}": 1 / (s + 1) for m in metrics[:-2]} for s in (0, steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def metrics_json(means):
    """Returns an eval.json, every interval of which is [0.25, 0.75]."""
    return json.dumps(
        {"step": 5, "metrics": {k: {"mean": v, "low": 0.25, "high": 0.75, "n": 7} for k, v in means.items()}}
    )


def test_results_of_suites_in_the_folder_are_shown(tmp_path):
    share = {"mean": 0.75, "low": 0.5, "high": 0.875, "n": 12}
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    meanings = {"prompt": f"Share {HOSTILE}"}
    made = {"suite": "ifeval", "metrics": {"prompt": share}, "meanings": meanings}
    (first / "eval_ifeval.json").write_text(json.dumps(made))
    (first / "eval_lm_eval.json").write_text(json.dumps({"metrics": {"arc/acc": {"mean": 0.25}}}))
    shown = page(tmp_path, first)
    explained = [row for row in shown.rows if row[0].startswith("ifeval/")]
    assert explained == [["ifeval/prompt", "0.75  [0.5, 0.875]  n 12"]]
    assert f"ifeval/promptShare {HOSTILE}0.75" in shown.text.replace("\n", "")  # small text under the name, escaped
    assert "script" not in shown.tags
    assert ["lm_eval/arc/acc", "0.25"] in shown.rows
    assert ["ifeval/prompt", "0.75  [0.5, 0.875]  n 12", "–"] in page(tmp_path, first, second).rows
    assert f"Share {HOSTILE}" in page(tmp_path, second, first).text
    assert "Other evaluations" not in page(tmp_path, second).text
    (first / "eval_ifeval.json").write_text(json.dumps({**made, "meanings": ["Share"]}))
    with pytest.raises(UserError, match="meanings must be an object of texts"):
        page(tmp_path, first)


class Page(html.parser.HTMLParser):
    """Tags, attributes, table rows and figure titles of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.titles, self.text, self.attributes = [], [], [], "", []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self._open and self._open[-1] == "h3":
            self.titles.append(data)


def page(tmp_path, *runs):
    return Page(write_report(list(runs), tmp_path / "out" / "report.html").read_text())


def test_the_page_says_what_its_numbers_were_measured_on(tmp_path):
    """The step of the policy, and data, loss or reference that are not the run's own."""
    stored = json.loads(metrics_json({"eval_loss": 0.5})) | {"step": 3}
    best = run(tmp_path / "best", eval_json=json.dumps(stored))
    assert "Measured: the policy of step 3, on held-out data, with 95% intervals." in page(tmp_path, best).text
    other = stored | {"data": ["<swapped>.jsonl"], "loss": {"name": "ipo"}}
    swapped = run(tmp_path / "swapped", eval_json=json.dumps(other))
    told = "the policy of step 3, on other data than the run's (<swapped>.jsonl), with another loss than the run's"
    assert f"Measured: {told}, with" in page(tmp_path, swapped).text
    assert f"measured: {told}" in page(tmp_path, best, swapped).text


def test_a_dpo_run_has_every_figure(tmp_path):
    shown = page(tmp_path, run(tmp_path / "a"))
    titles = ["Loss", "Accuracy", "Margin, nats", "Rewards, nats", "Log-probabilities, nats", "Log-ratio, nats"]
    assert shown.titles == [*titles, "Gradient norm", "Learning rate"]
    assert shown.tags.count("svg") == 8
    others = {"kl", "examples_per_second", "minutes"}
    assert {metric for plot in PLOTS for metric in plot.series.values()} == set(DPO) | others
    assert "Both may well fall" in shown.text
    assert ["loss", "name dpo, beta 0.1"] in shown.rows
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_an_sft_run_has_only_its_own_figures(tmp_path):
    shown = page(tmp_path, run(tmp_path / "a", metrics=("loss", "grad_norm", "learning_rate")))
    assert shown.titles == ["Loss", "Gradient norm", "Learning rate"]
    assert "Dotted horizontal line" not in shown.text


def test_text_from_data_is_escaped(tmp_path):
    sample = json.dumps({"step": 1, "prompt": HOSTILE, "policy": HOSTILE, "reference": HOSTILE})
    files: dict[str, Any] = {
        "samples_jsonl": sample + "\n",
        "data_json": json.dumps([HOSTILE]),
        "eval_json": metrics_json({HOSTILE: 1}),
    }
    folder = run(tmp_path / "<img src=x onerror=alert(1)>$x$", **files)
    for runs in ([folder], [folder, run(tmp_path / "_b")]):
        text = write_report(runs, tmp_path / "report.html").read_text()
        shown = Page(text)
        assert not {"script", "img", "b<", "iframe", "link", "object"} & set(shown.tags)
        assert not [name for name, _ in shown.attributes if name.startswith("on") or name == "src"]
        assert shown.text.count("alert('x')") == 5
        assert "default-src 'none'" in text
        assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")  # svg's namespaces


QUOTED = f"""_" onload="alert(2)" ' onload='alert(3)'><img src=x> {HOSTILE}"""


def hostile_runs(folder):
    sample = json.dumps({"step": 1, "prompt": QUOTED, "policy": QUOTED, "reference": QUOTED}) + "\n"
    files: dict[str, Any] = {"samples_jsonl": sample, "data_json": json.dumps([QUOTED])}
    runs = [run(folder / name, eval_json=metrics_json({QUOTED: 1}), **files) for name in ('a"<script>', "b'&lt;")]
    return write_report(runs, folder / "comparison.html").read_text()


def hostile_data(_):
    pieces = [Piece(QUOTED, False), Piece(QUOTED, True)]
    shortcuts = [Shortcut(QUOTED, 80.5, 100, 0.5, [(QUOTED, 1.25)])]
    lengths = {"prompt": np.array([3, 4])}
    return render_data(DataPage(QUOTED, {"training": [QUOTED]}, shortcuts, [{"prompt": pieces}], lengths, 64))


def hostile_winrate(_):
    tally = WinTally(win_share(7.5, 12), 3, 1, win_share(4, 9), win_share(0, 0))
    rows = [WinrateRow(QUOTED, temperature, 1, tally, tally.wins, None, 5.5) for temperature in (0.5, 1.0)]
    verdicts = [{"score": 1.0, "said": QUOTED}]
    judged = {"prompt": QUOTED, "response": QUOTED, "other": QUOTED, "outcome": 1.0, "verdicts": verdicts}
    return render_winrate(rows, [QUOTED], [judged])


def hostile_frontier(_):
    points = [Point("sft", 0, 0, 1.0, 0.1, 0.0, 0.0, -4.0, -5.0, 3.0, 0.25)]
    curve = [Optimum(math.inf, 1.0, 0.1, 0.0, 0.0, math.inf)]
    return render_frontier(FrontierResult(points, curve, [], [], False, 256, 600), [QUOTED])


@pytest.mark.parametrize(
    ("render", "shown"),
    # runs: a row of samples in 4 columns, a report on data, a metric. data: title and heading, a line, a classifier
    # and its feature, two pieces. win rates: title and heading, a line, a label, two rows, four cells of a judgement.
    [(hostile_runs, 6), (hostile_data, 7), (hostile_winrate, 10), (hostile_frontier, 1)],
)
def test_text_of_users_is_escaped_in_every_kind_of_page(tmp_path, render, shown):
    text = render(tmp_path)
    found = Page(text)
    assert not {"script", "img", "iframe", "link", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert found.text.count(QUOTED) == shown
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")


def test_only_the_svg_of_figures_is_not_escaped():
    unescaped = [line for path in TEMPLATES.iterdir() for line in path.read_text().splitlines() if "| safe" in line]
    assert len(unescaped) == 1
    assert "{{ panel.svg | safe }}" in unescaped[0]
    assert not [path for path in TEMPLATES.parent.glob("*.py") if "Markup" in path.read_text()]


def test_the_templates_are_installed():
    settings = tomllib.loads((TEMPLATES.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["dpo_jax.pages"]
    assert {path for pattern in patterns for path in TEMPLATES.parent.glob(pattern)} == set(TEMPLATES.iterdir())


def test_the_command_keeps_the_report_of_the_first_of_several_runs(tmp_path, capsys):
    first, second = run(tmp_path / "first"), run(tmp_path / "second", beta=0.5)
    cli.run_command(["report", str(first)])
    own = (first / "report.html").read_bytes()
    assert capsys.readouterr().out == f"wrote {first / 'report.html'}\n"
    cli.run_command(["report", str(first), str(second)])
    assert capsys.readouterr().out == f"wrote {first / 'comparison.html'}, a comparison of 2 runs\n"
    assert (first / "report.html").read_bytes() == own
    assert ["loss.beta", "0.1", "0.5"] in Page((first / "comparison.html").read_text()).rows
    assert not list(second.glob("*.html"))
    cli.run_command(["report", str(first), str(second), "--out", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").read_bytes() == (first / "comparison.html").read_bytes()


@pytest.mark.parametrize("argv", [[], ["--out", "a.html"], ["RUN", "--outs", "a"], ["RUN", "--out", "a", "b"]])
def test_other_arguments_of_the_command_are_refused(argv):
    with pytest.raises(UserError, match="give run folders, then at most the option --out"):
        cli.run_command(["report", *argv])


def test_eval_json_gives_the_final_numbers(tmp_path):
    text = metrics_json({"eval_loss": 0.61312, "kl(policy || reference)": 2.5, "gone": None})
    shown = page(tmp_path, run(tmp_path / "a", eval_json=text))
    assert ["eval_loss", "0.6131  [0.25, 0.75]  n 7"] in shown.rows
    assert ["eval_kl", "2.5  [0.25, 0.75]  n 7"] in shown.rows
    assert ["gone", "nan  [0.25, 0.75]  n 7"] in shown.rows
    assert "in brackets the 95% interval" in shown.text


def test_without_eval_json_the_last_evaluation_counts(tmp_path):
    shown = page(tmp_path, run(tmp_path / "a"))
    assert ["eval_loss", "0.1667"] in shown.rows
    assert "brackets" not in shown.text
    assert ["loss", "0.1667"] in page(tmp_path, run(tmp_path / "b", metrics=("loss", "grad_norm"))).rows


def test_two_runs_are_overlaid_and_their_differences_named(tmp_path):
    first, second = run(tmp_path / "first"), run(tmp_path / "second", steps=3, beta=0.5)
    text = write_report([first, second], tmp_path / "report.html").read_text()
    shown = Page(text)
    assert ["", "first", "second"] in shown.rows
    assert ["eval_loss", "0.1667", "0.25"] in shown.rows
    assert ["loss.beta", "0.1", "0.5"] in shown.rows
    assert not [row for row in shown.rows if row[0] in ("seed", "loss.name")]
    assert shown.tags.count("svg") == 8
    for colour in figure.COLOURS[:2]:
        assert text.count(colour) >= 8 + 1  # in every figure and in the legend


def test_curves_pass_through_the_data(tmp_path):
    folder = run(tmp_path / "a")
    x, y, half = polyline_points(read_run(folder).lines, "eval_loss")
    assert np.isnan(half).all()
    assert x.tolist() == [0.0, 40.0]
    assert y.tolist() == [1.0, pytest.approx(1 / 6)]


def test_many_points_are_drawn_as_means(tmp_path):
    small, large = (run(tmp_path / str(n), steps=n) for n in (80, 5000))
    sizes = [write_report([r], tmp_path / "r.html").stat().st_size for r in (small, large)]
    assert sizes[1] < 2.5 * sizes[0]
    assert "fill-opacity: 0.14" in (tmp_path / "r.html").read_text()


def test_values_that_are_not_finite_are_counted(tmp_path):
    folder = run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "examples": 72, "loss": null}\n')
    shown = page(tmp_path, folder)
    assert "Not finite, so not drawn: 1 of the values." in shown.text


def test_only_the_last_samples_are_shown(tmp_path):
    samples = [{"step": s, "prompt": f"p{s}", "policy": "y", "reference": "z"} for s in (0, 5, 5)]
    shown = page(tmp_path, run(tmp_path / "a", samples_jsonl="".join(json.dumps(s) + "\n" for s in samples)))
    assert "after step 5 of a" in shown.text
    assert [row for row in shown.rows if row[0] in ("p0", "p5")] == [["p5", "z", "y"]]


def test_samples_without_a_reference_have_no_column_for_it(tmp_path):
    sample = json.dumps({"step": 1, "prompt": "p", "policy": "y", "reference": None})
    assert ["p", "y"] in page(tmp_path, run(tmp_path / "a", samples_jsonl=sample + "\n")).rows


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = run(tmp_path / "a")
    pages = [write_report([folder], tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report([tmp_path], tmp_path / "report.html")


def test_a_damaged_eval_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"eval\.json: not JSON"):
        write_report([run(tmp_path / "a", eval_json="{")], tmp_path / "report.html")
