"""The README and the page on the architecture: their code runs, their tables and numbers are those of the package."""

import json
import logging
import re
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from launched import make_world
from test_architecture import CORE, FILES, LAYERS, PACKAGE

from dpo_jax import cli, losses
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, ModelConfig
from dpo_jax.models.families.registry import families
from dpo_jax.models.huggingface.folder import save_folder
from dpo_jax.optim import OPTIMIZERS
from dpo_jax.training.load import load_policy, load_run_tokenizer
from dpo_jax.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (PACKAGE / "README.md").read_text()


def blocks(page, language):
    """Returns the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def section(page, heading):
    """Returns the text below a heading, up to the next of its level."""
    return re.split(r"^## ", page.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def cells(text):
    """Returns the rows of the tables in a text, without headings' rules."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def lines_of(name):
    """Returns the number of lines of a file or folder of the package."""
    files = [file for file in FILES if file.relative_to(PACKAGE).as_posix().startswith(name)]
    assert files, name
    return sum(file.read_text().count("\n") for file in files)


@pytest.fixture
def after_quickstart(tmp_path, monkeypatch):
    """A folder with a small random model and pairs, where `scripts/quickstart` writes its own."""
    monkeypatch.chdir(make_world(tmp_path))
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    options = ModelConfig(config="tiny.json", tokenizer="synthetic")
    tokenizer = load_run_tokenizer(options)
    loaded = load_policy(options, tokenizer, seed=0)
    save_folder("runs/synthetic_sft", loaded.params, loaded.hf_config, tokenizer)
    shutil.copy("pairs.jsonl", "runs/synthetic_pairs.jsonl")
    return tmp_path


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_the_python_of_the_readme_trains_with_an_own_loss(after_quickstart, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dpo_jax"), "handlers", [])  # as in a process that is no command
    (block,) = blocks(README, "python")
    assert len([line for line in block.splitlines() if line]) == 12
    capsys.readouterr()
    exec(block, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = [float(loss) for _, loss in printed]
    assert len(found) == 30
    assert found[0] == pytest.approx(1.0, abs=1e-5)  # the policy is its reference, and the target 1 away
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


@pytest.mark.slow
def test_the_python_of_the_architecture_page_runs(after_quickstart, capsys):
    names = {}
    for block in blocks(ARCHITECTURE, "python"):
        exec(block, names)
    out = capsys.readouterr().out
    assert "0.31326" in out
    assert "1.31326" in out
    assert (after_quickstart / "runs/own_model/model.safetensors").is_file()
    assert names["result"].folder == Path("runs/ipo")
    assert len(read_metrics(after_quickstart / "runs/ipo/metrics.jsonl")) > 3
    assert [result.folder.name for result in names["both"]] == ["loss.beta=0.1", "loss.beta=1.0"]


def test_the_yaml_of_the_pages_is_a_config(tmp_path):
    loss = blocks(ARCHITECTURE, "yaml")
    for block in (*blocks(README, "yaml"), *loss):
        (tmp_path / "my.yaml").write_text(block)
        config = parse_config(Config, str(tmp_path / "my.yaml"), prog="dpo-jax train")
        losses.build(config.loss)
    axes, mixture = (yaml.safe_load(block)["loss"] for block in loss)
    assert mixture[1] == {"name": "bco_pair", "weight": 0.2}
    lp = losses.Logps.of([[-8.0, -13.0]], [[-10.0, -12.0]], lengths=[[4, 2]])
    ipo = losses.build({"name": "ipo", "beta": 0.1})
    assert float(losses.build(axes).values(lp)[0]) == pytest.approx(float(ipo.values(lp)[0]))


def test_all_commands_are_listed():
    named = re.findall(r"^\| `dpo-jax (\w+)[^|]*` \|", section(README, "From the command line"), re.MULTILINE)
    assert sorted(named) == sorted(cli.COMMANDS)


def test_all_losses_and_optimizers_are_listed():
    listed = [name for row in cells(section(ARCHITECTURE, "Losses"))[1:] for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(set(listed) - {"label_smoothing"}) == sorted(losses.REGISTRY)
    assert f"all {len(losses.REGISTRY)}" in README
    assert f"the {len(losses.REGISTRY)} losses as equations" in README
    assert f"and {len(losses.REGISTRY) - 1} other losses" in (ROOT / "CITATION.cff").read_text()
    assert f"the {len(families())} model families" in README
    assert f"{len(families())} `families/`" in README
    assert set(OPTIMIZERS) >= {"rmsprop", "adamw"}


def test_folders_and_files_of_the_map_exist():
    for where, _ in cells(section(README, "Map"))[1:]:
        first, *rest = re.findall(r"`([\w./]+)`", where) or re.findall(r"\[([\w./]+)\]", where)
        for name in (first, *(f"dpo_jax/{name}" for name in rest)):
            assert (ROOT / name).exists(), name
    named = re.findall(r"[`[]([\w./]+)[`\]]", section(README, "Map"))
    units = {name.removeprefix("dpo_jax/").rstrip("/").removesuffix(".py") for name in named}
    assert set.union(*LAYERS) - units == {"errors", "named", "paths", "intervals", "cli", "__main__"}


def test_the_line_counts_are_those_of_the_core():
    stated = {row[0]: int(row[1].replace(",", "")) for row in cells(section(ARCHITECTURE, "Reading order"))[1:]}
    read = []
    for names, count in stated.items():
        first, *rest = re.findall(r"`([\w./]+)`", names)
        folder = first.rpartition("/")[0]
        files = [first, *(f"{folder}/{name}" if folder else name for name in rest)]
        assert abs(count - sum(map(lines_of, files))) <= max(50, 0.15 * count), names
        read += files
    assert sorted(read) == sorted(CORE)
    total = sum(map(lines_of, CORE))
    for page in (README, ARCHITECTURE):
        (about,) = re.findall(r"about ([\d,]+)\s+lines", page)
        assert abs(int(about.replace(",", "")) - total) <= 0.05 * total


def test_the_picture_is_the_one_that_the_script_draws():
    script = runpy.run_path(str(ROOT / "scripts/architecture"))
    drawn = script["draw"]()
    assert drawn == (PACKAGE / "architecture.svg").read_text(), "run scripts/architecture"
    for unit in set.union(*LAYERS):
        assert f">{unit}</text>" in drawn


def test_numbers_of_the_results_are_those_of_the_recipes():
    recipes = (ROOT / "configs/README.md").read_text()
    results = section(README, "Results")
    numbers = {n for row in cells(results)[1:] for n in re.findall(r"\d+\.\d+", row[2])}
    assert {n for n in numbers if n not in recipes} == set()
    assert json.dumps(sorted(numbers))  # none is empty
