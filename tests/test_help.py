"""Help: every option with its values, from the declarations that check them, in 80 columns."""

import dataclasses
import re
import shlex
from typing import Literal, get_args, get_origin

import pytest
from launched import ROOT

from dpo_jax import cli, losses, optim
from dpo_jax.config import help as page
from dpo_jax.config.choices import choice_names, choice_options
from dpo_jax.config.commands import COMMAND_CONFIGS
from dpo_jax.config.parse import named_options, option_kinds, parse_config
from dpo_jax.config.schema import DataConfig, ModelConfig
from dpo_jax.data.sources.base import source_names
from dpo_jax.errors import UserError
from dpo_jax.models import model
from dpo_jax.models.remat import POLICIES
from dpo_jax.optim.schedules import SCHEDULES, Name


def shown(capsys, *argv):
    cli.run_command([*argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("section", ["loss", "optim"])
def test_options_that_are_read_from_the_source_are_those_that_are_imported(section):
    known = choice_names(section)
    assert set(known) == ({*losses.REGISTRY} if section == "loss" else {*optim.OPTIMIZERS, *optim.OPTAX})
    assert len(known) == len(set(known))
    for name in known:
        if name in optim.OPTAX:
            assert choice_options(section, name) is None
        else:
            assert choice_options(section, name) == named_options(section, name, f"{section}.name"), name
    with pytest.raises(UserError, match=rf"{section}\.name: unknown name 'x'; known: "):
        choice_options(section, "x")


@pytest.mark.parametrize("command", COMMAND_CONFIGS)
def test_help_all_has_every_option_with_its_values_and_its_meaning(command, capsys):
    said = shown(capsys, command, "--help-all")
    kind = COMMAND_CONFIGS[command]
    entries = dict(re.findall(r"^  --(\S+)(.*?)(?=^  --|^\S|\Z)", said, re.MULTILINE | re.DOTALL))
    hidden = {"loss", "optim", *(key for key in getattr(kind, "SHORT", {}).values() if key == "show_reference")}
    for key, of in option_kinds(kind).items():
        if key in hidden:
            continue
        text = " ".join(entries[key].split())
        assert re.search(r"[a-z]{2,}.*\.$", text), key
        for part in (of, *get_args(of)):
            if get_origin(part) is Literal:
                assert f"One of {', '.join(filter(None, get_args(part)))}" in text, key
    assert all(len(line) <= 80 for line in said.splitlines())


def test_help_of_a_command_begins_with_what_it_does_an_example_and_its_own_options(capsys):
    lines = shown(capsys, "plan", "--help").splitlines()
    assert lines[0] == "usage: dpo-jax plan CONFIG.yaml [--target NAME] [--devices N] [--memory GB]"
    assert lines[2] == "Computes memory and speed of a run by compiling it, without starting it."
    assert lines[4] == "example: dpo-jax plan configs/paper/hh_dpo.yaml --target gpu:h100:1x8"
    assert [line for line in lines if line.startswith("  --")] == [
        "  --target TEXT", "  --devices INT (default 0)", "  --memory FLOAT (default None)",
        "  --json [True|False] (default False)", "  --help-all",
    ]  # fmt: skip
    every = shown(capsys, "plan", "--help-all").splitlines()
    titles = [line.partition(":")[0] for line in every if line and not line.startswith(" ")]
    sections = ["model", "data", "data.columns", "loss", "optim", "reference", "lora", "samples", "mesh", "Of the run"]
    assert [title for title in titles if title in sections] == sections


def test_every_example_parses():
    for name, command in cli.COMMANDS.items():
        argv = shlex.split(command.example)
        first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
        file = argv[0] if argv and argv[0].startswith("configs/") else None
        if file:
            assert (ROOT / file).is_file()
        if name in COMMAND_CONFIGS and name != "sweep":
            parse_config(COMMAND_CONFIGS[name], file and str(ROOT / file), argv[first:])


def test_fixed_sets_of_values_are_those_of_the_code():
    assert set(get_args(Name)) == set(SCHEDULES)
    fields = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    assert get_args(fields["compute"]) == ("auto", *model.COMPUTE)
    assert set(get_args(fields["remat"])) == {"auto", *POLICIES}
    named = page._field_texts(DataConfig)["name"]  # noqa: SLF001
    assert set(source_names()) <= {*re.findall(r"\w+", named)}


def test_a_loss_of_a_list_and_ones_own_have_their_options(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = 'def own(lp, *, tilt: float = 0.5):\n    """Mine.\n\n    Args:\n      tilt: Angle.\n    """\n'
    (tmp_path / "mine.py").write_text(code)
    said = shown(capsys, "train", "--loss.0.name", "ipo", "--loss.1.name", "mine:own", "--help-all")
    assert "  --loss.0.beta FLOAT (default 0.1)" in said
    assert "loss: options of mine:own: Mine.\n  --loss.1.tilt FLOAT (default 0.5)\n      Angle.\n" in said


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_option_is_cut_in_a_narrow_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    said = shown(capsys, "train", "--help-all")
    for word in ("--data.columns.score_rejected", "optimistic_gradient_descent,", "paper_keep_start,"):
        assert word in said.split()
    if width > 40:
        assert max(map(len, said.splitlines())) <= min(width, page.WIDEST)
