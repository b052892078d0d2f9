"""Every deliberate bug of scripts/mutants can still be put in; running them is for milestones."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "mutants"))
MUTANTS = SCRIPT["load"]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_applies(mutant):
    assert SCRIPT["problem"](mutant) == ""


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"old": "absent text"}, "occurs 0 times"),
        ({"old": "return"}, "times in"),
        ({"new": "(("}, "no Python"),
        ({"new": MUTANTS[0].old}, "changes nothing"),
        ({"file": "dpo_jax/absent.py"}, "no file"),
        ({"tests": ["tests/test_absent.py"]}, "no tests"),
        ({"tests": ["tests/test_mutants.py::test_absent"]}, "no tests"),
        ({"tests": []}, "no tests"),
    ],
)
def test_one_that_does_not_apply_is_named(change, why):
    assert why in SCRIPT["problem"](MUTANTS[0]._replace(**change))
