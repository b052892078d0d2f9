"""The pages in headless Chromium: nothing is wider than the page on a desktop or a phone; light and dark mode."""

import io
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_frontier import FOUND
from test_headline import ACCURACY, LOGP, MARGIN
from test_report import hostile_data, hostile_winrate, metrics_json, run

from dpo_jax.pages.frontier import render_frontier
from dpo_jax.pages.run import write_report

_browser = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "_browser.py")))
PROGRAM = _browser.find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium; install one: apt-get install chromium")
WIDTHS = (1280, 375)
WORD = "incomprehensibilities" * 12  # in prompts, names and keys
COLORS = "['color', 'backgroundColor'].map(key => getComputedStyle(document.body)[key].match(/[0-9.]+/g).map(Number))"
LOADED = "performance.getEntriesByType('resource').map(entry => entry.name)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with _browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def report(folder, count):
    """Writes a page on `count` runs with long words everywhere."""
    names = [ACCURACY, MARGIN, LOGP, "eval_kl", "true reward of the policy", "true reward of the reference", WORD]
    runs = []
    for i in range(count):
        samples = [{"step": 5, "prompt": f"{WORD} {j}", "policy": WORD, "reference": f"{WORD} y"} for j in range(3)]
        files = {"eval_json": metrics_json(dict.fromkeys(names, 0.5)), "data_json": json.dumps([WORD])}
        files["samples_jsonl"] = "".join(json.dumps(sample) + "\n" for sample in samples)
        runs.append(run(folder / f"{WORD[:80]}{i}", beta=f"{i}.{'1' * 60}", **files))
    return write_report(runs, folder / "report.html").read_text()


PAGES = {
    "run": lambda folder: report(folder, 1),
    "comparison": lambda folder: report(folder, 2),
    "data": hostile_data,
    "winrate": hostile_winrate,
    "frontier": lambda _: render_frontier(FOUND, [WORD]),
}


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "page.html").write_text(PAGES[request.param](folder))
    return folder / "page.html"


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page(browser, page, width):
    browser.open(page, width)
    found = browser.run(_browser.WIDER)
    assert found == {"window": width, "page": width, "content": width, "wider": []}
    assert browser.run(LOADED) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_readable_in_light_and_dark_mode(browser, page, width):
    image = pytest.importorskip("PIL.Image")
    for dark in (False, True):
        browser.open(page, width, dark=dark)
        text, back = (np.mean(color[:3]) for color in browser.run(COLORS))
        shown = np.asarray(image.open(io.BytesIO(browser.screenshot())).convert("L"), float)
        assert shown.shape[1] == width
        assert (np.median(shown) < 64) == dark  # most of a page is background
        assert np.ptp(shown) > 150  # on which something is written
        assert not dark or text - back > 150


@pytest.mark.parametrize("width", [800, 375])
def test_what_is_too_wide_is_found(browser, tmp_path, width):
    head = '<meta name="viewport" content="width=device-width"><body style="margin: 0">'
    wide = '<p style="width: 900px">x</p>'
    (tmp_path / "page.html").write_text(f'{head}<div style="overflow-x: auto">{wide}</div>')
    browser.open(tmp_path / "page.html", width)
    assert browser.run(_browser.WIDER) == {"window": width, "page": width, "content": width, "wider": []}
    (tmp_path / "page.html").write_text(head + wide)
    browser.open(tmp_path / "page.html", width)
    found = browser.run(_browser.WIDER)
    assert found.pop("window") >= (900 if width == 375 else width)  # a phone zooms out
    assert found == {"page": width, "content": 900, "wider": [wide]}
