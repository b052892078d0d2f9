"""Examples of a suite: files and folders, or the data set on the hub."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.sources.base import RawExample
from dpo_jax.data.sources.files import resolve_files, rows
from dpo_jax.data.sources.formats import examples_in_file
from dpo_jax.errors import UserError, hub_errors

HARNESS = "lm_eval"
KINDS = {str: "a text", list: "a list", int: "a whole number"}


class SuiteData(NamedTuple):
    """Where the examples of a suite are.

    Attributes:
      suite: its name.
      names: files, folders or a hub id.
      given: whether the user named them.
      split: which part of a folder or a hub id.
      limit: the most examples to use; None for all.
    """

    suite: str
    names: tuple[str, ...]
    given: bool
    split: str
    limit: int | None


def suite_examples(data: SuiteData) -> list[tuple[str, RawExample]]:
    """Returns (name of the file or hub id, (`file:line`, values by column)) of the examples, `suite_limit` at most.

    Raises:
      UserError: the data cannot be read or fetched, an example cannot be read, or there are none.
    """
    try:
        found = list(islice(_read(data), data.limit))
    except UserError as error:
        where = "" if data.given else "; give its file or folder as --suite_data PATH"
        raise UserError(f"{data.suite}: {str(error).replace('data.path', 'suite_data')}{where}") from error
    if not found:
        raise UserError(f"{data.suite}: {' '.join(data.names)}: no examples; set suite_data to a file that has some")
    return found


def check_suite_data(data: SuiteData) -> None:
    """Refuses paths of a suite's data where nothing is, and for lm_eval anything but folders of task YAMLs."""
    if data.suite == HARNESS:
        if absent := next((path for path in data.names if not Path(path).is_dir()), None):
            raise UserError(f"{HARNESS}: {absent}: no such folder; set suite_data to a folder of task YAMLs")
    elif data.given:
        try:
            resolve_files(data.names, data.split)
        except UserError as error:
            raise UserError(f"{data.suite}: {str(error).replace('data.path', 'suite_data')}") from error


def _read(data: SuiteData) -> Iterator[tuple[str, RawExample]]:
    names = data.names if data.given else tuple(map(_fetched, data.names))
    for entry in resolve_files(names, data.split):
        found = examples_in_file(entry, data.split) if isinstance(entry, Path) else rows([entry], data.split)
        for example in found:
            if isinstance(example, UserError):
                raise example
            yield Path(entry).name, example


def _fetched(name: str) -> str:
    """Returns a hub id as it is, and `owner/name/file` as the file in the hub's cache."""
    if name.count("/") < 2:
        return name
    from huggingface_hub import hf_hub_download  # imported late: it is slow to import

    owner, repository, file = name.split("/", 2)
    with hub_errors(f"{name}: cannot be fetched from the hub"):
        return hf_hub_download(f"{owner}/{repository}", file, repo_type="dataset")


def column(where: str, example: dict[str, Any], name: str, kind: type) -> Any:
    """Returns a value of an example.

    Raises:
      UserError: it is absent, or not of that type.
    """
    value = example.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {name} must be {KINDS[kind]}, got {type(value).__name__}; correct the example")
    return value


def texts_of(where: str, example: dict[str, Any], name: str) -> list[str]:
    """Returns a column that is a list of one or more texts."""
    found = column(where, example, name, list)
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(f"{where}: {name} must be a list of one or more texts; correct the example")
    return found
