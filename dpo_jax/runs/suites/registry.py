"""The registry of suites, and the records that a suite takes and returns.

A suite is a module of this package with a function under `@register_suite(NAME, ...)`. All modules are imported when a
suite is looked up, so that a new one is a file and nothing else; heavy libraries are imported inside of functions.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dpo_jax.config.commands import EvalConfig
from dpo_jax.errors import UserError, closest
from dpo_jax.evaluation import EvalModel
from dpo_jax.paths import is_run
from dpo_jax.runs import suites
from dpo_jax.runs.suites.examples import HARNESS, SuiteData


class Subject(NamedTuple):
    """A loaded policy.

    Attributes:
      path: the run or model folder.
      settings: the keys of `dpo-jax eval`.
      judge: the policy, and its reference if it has one.
      tokenizer: the policy's.
      ends: ids at which sampling stops.
      chats: whether a text prompt is a turn of a user.
      step: updates of the policy, 0 for a model folder.
    """

    path: str
    settings: EvalConfig
    judge: EvalModel
    tokenizer: Any
    ends: tuple[int, ...]
    chats: bool
    step: int = 0


class SuiteTask(NamedTuple):
    """What a suite is asked to do.

    Attributes:
      name: of the suite.
      tasks: those of lm_eval; () for other suites.
      data: where its examples are.
      settings: the keys of `dpo-jax eval`.
      path: the run or model folder, as the user named it.
      subject: loads the policy, once for all suites.
    """

    name: str
    tasks: tuple[str, ...]
    data: SuiteData
    settings: EvalConfig
    path: str
    subject: Callable[[], Subject]


class SuiteResult(NamedTuple):
    """What a suite has found.

    Attributes:
      metrics: name -> mean, n and, where there is one, a 95% interval as low and high.
      examples: number of examples that were used.
      notes: lines on how the numbers were made.
      rows: an object per example, written as JSON lines.
      files: name of a further file -> its text.
    """

    metrics: dict[str, dict[str, float]]
    examples: int
    notes: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    files: Mapping[str, str] = MappingProxyType({})


def suite_folder(path: str, settings: EvalConfig) -> Path:
    """Returns the folder of the results: `suite_out`, the run, or runs/<name>.eval for a model folder."""
    if settings.suite_out:
        return Path(settings.suite_out)
    return Path(path) if is_run(path) else Path("runs") / f"{Path(path).resolve().name}.eval"


class Suite(NamedTuple):
    """A registered suite.

    Attributes:
      measure: the function.
      data: hub id of its data, or `owner/name/file` on the hub; "" for none.
      split: of the hub id, or of a folder.
      keys: keys of `dpo-jax eval` that only some suites read, and this one does.
      meanings: metric -> one line on what it says, for the report; "" has the line of all others.
    """

    measure: Callable[[SuiteTask], SuiteResult]
    data: str = ""
    split: str = "train"
    keys: frozenset[str] = frozenset()
    meanings: Mapping[str, str] = MappingProxyType({})

    def meaning(self, metric: str) -> str:
        """Returns the line on a metric, which may be `TASK/METRIC,FILTER` as lm_eval has it; "" for none."""
        plain = metric.rpartition("/")[2].partition(",")[0]
        return self.meanings.get(plain, self.meanings.get("", ""))


SUITES: dict[str, Suite] = {}


def register_suite(
    name: str,
    *,
    data: str = "",
    split: str = "train",
    keys: tuple[str, ...] = (),
    meanings: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable[[SuiteTask], SuiteResult]], Callable[[SuiteTask], SuiteResult]]:
    """Registers a function `SuiteTask -> SuiteResult` as a suite; args as the fields of `Suite`."""

    def register(measure: Callable[[SuiteTask], SuiteResult]) -> Callable[[SuiteTask], SuiteResult]:
        SUITES[name] = Suite(measure, data, split, frozenset(keys), meanings)
        return measure

    return register


def known_suites() -> dict[str, Suite]:
    """Returns all suites by name; imports their modules."""
    for module in pkgutil.iter_modules(suites.__path__):
        importlib.import_module(f"{suites.__name__}.{module.name}")
    return SUITES


def named_suites(text: str) -> dict[str, tuple[str, ...]]:
    """Returns the suites that `--suite` names, in order -> the tasks of lm_eval, () for other suites.

    Raises:
      UserError: an unknown suite, one that is named twice, or lm_eval without a task.
    """
    known, found, last = known_suites(), dict[str, tuple[str, ...]](), ""
    for part in (part.strip() for part in text.split(",")):
        name, colon, task = part.partition(":")
        if not colon and last == HARNESS and part not in known:
            found[HARNESS] += (part,)
            continue
        if name not in known or bool(colon) != (name == HARNESS) or (colon and not task):
            names = [one + ":TASK" * (one == HARNESS) for one in known]
            raise UserError(f"suite: unknown {part!r}; {closest(part, names)}")
        if name in found and name != HARNESS:
            raise UserError(f"suite: {name} is named twice; name it once")
        found[name] = found.get(name, ()) + ((task,) if colon else ())
        last = name
    return found
