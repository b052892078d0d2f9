"""The report page: what it shows, and that data cannot make it do anything."""

import html.parser
import json
from typing import Any

import pytest

from dpo_jax.errors import UserError
from dpo_jax.pages import figure
from dpo_jax.pages.run import PLOTS, polyline_points, read_run, write_report

HOSTILE = "<script>alert('x')</script> & $\\frac{1}{2}$"
DPO = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen")
DPO += ("logps/rejected", "grad_norm", "learning_rate")


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


def test_a_dpo_run_has_every_figure(tmp_path):
    shown = page(tmp_path, run(tmp_path / "a"))
    assert shown.titles == [plot.title for plot in PLOTS]
    assert shown.tags.count("svg") == len(PLOTS) == 8
    assert {metric for plot in PLOTS for metric in plot.series.values()} == set(DPO)
    assert "It may well fall" in shown.text
    assert ["loss", "name dpo, beta 0.1"] in shown.rows
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_an_sft_run_has_only_its_own_figures(tmp_path):
    shown = page(tmp_path, run(tmp_path / "a", metrics=("loss", "grad_norm", "learning_rate")))
    assert shown.titles == ["Loss", "Gradient norm", "Learning rate"]


def test_nothing_from_data_is_obeyed(tmp_path):
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


def test_eval_json_gives_the_final_numbers(tmp_path):
    text = metrics_json({"eval_loss": 0.61312, "kl(policy || reference)": 2.5, "gone": None})
    shown = page(tmp_path, run(tmp_path / "a", eval_json=text))
    assert ["eval_loss", "0.6131  [0.25, 0.75]  n 7"] in shown.rows
    assert ["kl(policy || reference)", "2.5  [0.25, 0.75]  n 7"] in shown.rows
    assert ["gone", "nan  [0.25, 0.75]  n 7"] in shown.rows
    assert "in brackets 95%" in shown.text


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
    x, y = polyline_points(read_run(folder).lines, "eval_loss")
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
    assert "Samples of a, step 5" in shown.text
    assert [row for row in shown.rows if row[0] in ("p0", "p5")] == [["p5", "y", "z"]] * 2


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
