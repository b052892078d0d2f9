"""Pages: links resolve, documented data formats are readable, metrics and options are all described."""

import dataclasses
import json
import re
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pytest
import yaml
from launched import TIMES, make_world
from loss_table import batch_of

from dpo_jax import cli, losses
from dpo_jax.data.sources.base import load_comparisons, source_names
from dpo_jax.losses import REGISTRY
from dpo_jax.losses.axes import TARGETS, axes_needs
from dpo_jax.losses.points import POINTS
from dpo_jax.records import Chat
from dpo_jax.training.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"!?\[(?:[^\]]|\](?!\())*?\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```json (\w+) (\d)\n(.*?)^```\n\n^```json gives\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DATA = (ROOT / "configs/DATA.md").read_text()
METRICS = (ROOT / "configs/METRICS.md").read_text()
COMING_FROM = (ROOT / "configs/COMING_FROM.md").read_text()
WRITTEN = {
    "step",
    "examples",
    "grad_norm",
    "nonfinite",
    "unweighted",
    "learning_rate",
    "examples_per_second",
    "length_bias",
}
SAMPLED = ("kl", "true reward of the policy", "true reward of the reference")
TWO_TERMS = [{"name": "dpo"}, {"name": "sft"}]


def tracked_pages():
    """Returns the Markdown files of the repository, without those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:  # a copy of the tree without .git
        folders = (ROOT, ROOT / "configs", ROOT / "scripts", ROOT / "tests", ROOT / "dpo_jax", ROOT / ".github")
        return sorted(page for folder in folders for page in folder.glob("*.md"))
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def anchors(page):
    """Returns the anchors that GitHub gives the headings of a page."""
    text, seen = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken_links(page):
    """Returns the relative links of a page whose file or anchor is missing."""
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        missing = not target.exists() or not target.is_relative_to(ROOT.resolve())
        if missing or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def described(page):
    """Returns the names in backticks in the first cells of all tables of a page."""
    cells = [re.split(r"(?<!\\)\|", line)[1] for line in page.splitlines() if line.startswith("| ")]
    return {name.replace("\\|", "|") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_links_resolve():
    pages = tracked_pages()
    assert {"README.md", "configs/README.md", "scripts/README.md", "tests/README.md", ".github/SECURITY.md"} <= {
        str(page.relative_to(ROOT)) for page in pages
    }
    assert {str(page.relative_to(ROOT)): broken for page in pages if (broken := broken_links(page))} == {}


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` (c): d\n[x](other.md) [x](#a-b-c-d) [x](#a-b-c) [x](https://a.b/c.md) `[x](code.md)`\n"
        "![x](page.md#a-b-c-d) [[1]](gone.svg) [x](../up.md)\n```\n[x](block.md)\n```\n"
    )
    (tmp_path.parent / "up.md").write_text("")
    assert broken_links(page) == ["other.md", "#a-b-c", "gone.svg", "../up.md"]


@pytest.mark.parametrize("name", ["configs/METRICS.md", "configs/DATA.md", "configs/COMING_FROM.md"])
def test_pages_are_linked_from_the_page_of_their_folder(name):
    folder, _, file = name.partition("/")
    assert f"]({file})" in (ROOT / folder / "README.md").read_text()


def as_documented(comparison):
    """Returns a comparison as DATA.md writes it."""
    prompt = comparison.prompt
    found = {"prompt": list(prompt.messages) if isinstance(prompt, Chat) else prompt}
    found["responses"] = list(comparison.responses)
    optional = {"scores": list(comparison.scores), "weight": comparison.weight, "preference": comparison.preference}
    return found | {key: value for key, value in optional.items() if value not in ([], 1.0)}


@pytest.mark.parametrize("example", EXAMPLE.findall(DATA), ids=lambda found: f"{found[0]}-{found[1]}")
def test_documented_rows_are_read_as_documented(example, tmp_path):
    source, responses, row, gives = example
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(row)) + "\n")
    found = load_comparisons(source, (str(path),), "train", int(responses))
    assert [as_documented(comparison) for comparison in found] == json.loads(gives)


def test_every_source_has_an_example():
    blocks = re.findall(r"^```json (\w+)", DATA, re.MULTILINE)
    assert len(EXAMPLE.findall(DATA)) == blocks.count("gives") == len(blocks) / 2
    without_files = {"synthetic", "mixture", "memory"}
    assert set(source_names()) == {*blocks} - {"gives"} | without_files
    assert set(source_names()) - {"files"} <= described(DATA)


def shown_by(terms):
    """Returns the names of the metrics of an objective."""
    objective = losses.build(terms)
    one = batch_of([[-1.0, -2.0, -3.0][: objective.responses or 3]])
    return set(objective.metrics(one))


@pytest.mark.parametrize("name", [*losses.REGISTRY])
def test_every_metric_of_a_loss_is_described(name):
    assert shown_by({"name": name}) <= described(METRICS)


def test_metrics_of_terms_are_described():
    names = shown_by(TWO_TERMS)
    assert names - described(METRICS) == {"loss/dpo", "loss/sft"}
    assert "loss/NAME" in described(METRICS)


def test_metrics_of_a_run_are_described():
    assert WRITTEN | {*TIMES} <= described(METRICS)


@pytest.mark.slow
def test_a_run_writes_no_other_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(make_world(tmp_path))
    cli.run_command(["train", "dpo.yaml", "--max-steps", "1", "--samples.prompts", "0"])
    names = {name for line in read_metrics(tmp_path / "runs/dpo/metrics.jsonl") for name in line}
    assert {name.removeprefix("eval_") for name in names} - {*TIMES} == shown_by({"name": "dpo"}) | WRITTEN - {*TIMES}
    assert {f"eval_{name}" for name in shown_by({"name": "dpo"}) | {"length_bias"}} <= names


def test_metrics_of_samples_are_described():
    assert set(SAMPLED) <= described(METRICS)
    source = (ROOT / "dpo_jax/runs/evaluate.py").read_text()
    for name in ("eval_kl", "true reward of the {name}"):
        assert name in source


def test_every_option_of_trl_is_described_with_a_key_or_a_reason():
    trl, transformers = (pytest.importorskip(name) for name in ("trl", "transformers"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
        fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert {"beta", "loss_type", "max_length", "neftune_noise_alpha", "fsdp_config"} <= fields
    own, rest = (
        COMING_FROM[COMING_FROM.index(f"\n### {first}\n") : COMING_FROM.index(f"\n### {end}\n")]
        for first, end in (("DPOConfig", "Losses"), ("TrainingArguments", "Model, adapters and data"))
    )
    assert described(own) | described(rest) == fields | {
        *("callbacks", "optimizers", "EarlyStoppingCallback"),
        "warmup_ratio",  # of earlier versions of transformers
    }
    assert described(own) & described(rest) == set()
    assert fields - inherited <= described(own)
    for line in (own + rest).splitlines():
        if line.startswith("| `"):
            _, name, here, difference, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", line))
            assert (here and here != "-") or difference, name


def test_options_named_in_the_pages_exist():
    schema = {}

    def collect(kind, prefix):
        for field in dataclasses.fields(kind):
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            schema[f"{prefix}{field.name}"] = default
            if dataclasses.is_dataclass(default):
                collect(type(default), f"{prefix}{field.name}.")

    from dpo_jax.config.schema import Config

    collect(Config, "")
    sections = "|".join(name for name, default in schema.items() if dataclasses.is_dataclass(default))
    named = re.findall(rf"`((?:{sections})\.\w+)", COMING_FROM + DATA + METRICS)
    assert set(named) - schema.keys() == {"model.name_or_path", "model.tokenizer_name_or_path"} | {
        f"model.{name}" for name in ("archive", "block_name", "policy_dtype", "fsdp_policy_mp", "reference_dtype")
    }  # the original repository's


def test_the_page_on_data_names_all_that_reads_scores():
    sentence = " ".join(DATA[DATA.index("Scores are read by") : DATA.index("`data.draw_labels`; the")].split())
    losses, targets = (set(re.findall(r"`(\w+)`", part)) for part in sentence.split("by the losses with a `target`"))
    assert losses == {name for name, entry in REGISTRY.items() if entry.scores}
    needs = {target: axes_needs(score="log_ratio", ranking="pair", target=target) for target in TARGETS}
    assert targets == {target for target, need in needs.items() if need["scores"]}
    single = next(line for line in DATA.splitlines() if line.startswith("| single responses |"))
    found = set(re.findall(r"`([\w: ]+)`", single.split("|")[3]))
    assert found == {name for name, entry in REGISTRY.items() if entry.unpaired} | {"ranking: pointwise"}


def test_the_readme_counts_the_points():
    readme = (ROOT / "dpo_jax/README.md").read_text()
    assert f"{len(POINTS)} of\nthe named losses are points" in readme


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "version", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    paper = citation["references"][0]
    assert paper["identifiers"][0]["value"] == "arXiv:2305.18290"
    assert [author["family-names"] for author in paper["authors"]][::5] == ["Rafailov", "Finn"]
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


def test_forms_and_workflow_are_yaml_with_the_keys_that_github_needs():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        keys = yaml.safe_load(form.read_text()).keys()
        assert form.name == "config.yml" or {"name", "description", "body"} <= keys
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: .ci/run" in workflow
    assert {"push", "pull_request"} <= yaml.load(workflow, Loader=yaml.BaseLoader)["on"].keys()
