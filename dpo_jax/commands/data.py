"""`dpo-jax data`: describes the data of a config before anything is trained on it, in the terminal and as a page."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo_jax import losses
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.commands import LookConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, DataConfig, ModelConfig
from dpo_jax.data import audit, cache
from dpo_jax.data.encode import EncodeOptions, encode_stream
from dpo_jax.data.report import EncodeTally, NothingLeftError
from dpo_jax.data.shortcuts import Shortcut, find_shortcuts
from dpo_jax.data.sources.base import Item, source_names
from dpo_jax.data.sources.schemas import listed
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.intervals import wilson
from dpo_jax.losses import Loss
from dpo_jax.pages.data import DataPage, render_data
from dpo_jax.paths import cache_folder, written
from dpo_jax.records import Comparison
from dpo_jax.training import setup
from dpo_jax.training.load import load_run_tokenizer
from dpo_jax.training.tables import (
    are_chats,
    comparison_streams,
    encode_options,
    label_faults,
    responses_per_prompt,
    with_noise,
)

# For the page alone, if the tokenizer has no chat template.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHOWN_BAD = 5  # bad rows of each kind
QUOTED = re.compile(r"'[^']*'|\d+")  # what differs between errors of one kind


def data_command(argv: list[str]) -> None:
    """`dpo-jax data CONFIG.yaml [--out FILE.html] [--show N] [--key.path value ...]`, or `dpo-jax data --list`."""
    if argv == ["--list"]:
        _list_sources()
        return
    (file,), rest = leading_arguments(argv, "data", "CONFIG.yaml")
    prog = "dpo-jax data CONFIG.yaml"
    settings = parse_config(LookConfig, file or None, rest, prog=prog)
    setup.check_config(settings)
    tokenizer = load_run_tokenizer(_first_model(settings.model))
    loss = losses.build(settings.loss)
    train, held_out = comparison_streams(settings.data, responses_per_prompt(settings, loss))
    sides = {"training": with_noise(settings, train), "held-out": held_out}
    try:
        page = _page(Path(file).stem, sides, tokenizer, settings, loss)
    except UserError:
        _refuse_bad(sides, tokenizer, settings.data)  # all bad examples, where that was the first
        raise
    _print(page)
    out = Path(settings.out or Path("runs") / f"{Path(file).stem}.data.html")
    with written(out) as f:
        f.write(render_data(page))
    log_line(f"report: {out}")


def _first_model(model: ModelConfig) -> ModelConfig:
    """Returns the model section that has the tokenizer: follows `model.path` through the YAMLs of earlier runs."""
    while not model.tokenizer and model.path.endswith((".yaml", ".yml")):
        model = parse_config(Config, model.path, [], prog="dpo-jax data").model
    return model


def _page(name: str, sides: dict[str, Iterable[Item]], tokenizer: Any, settings: LookConfig, loss: Loss) -> DataPage:
    """Returns counts, shortcuts, lengths and comparisons to show, of the training and held-out data (`sides`)."""
    options, refused_by_train = _encode_options(settings.data, tokenizer)
    counts = {side: audit.count_pairs(items) for side, items in sides.items()}
    lines, tables = {}, {}
    for side, items in sides.items():
        tables[side], report = cache.cached_encode(items, tokenizer, cache_folder() / "tokens", **options)
        faults = [*label_faults(tables[side], loss), *(refused_by_train if are_chats(items) else [])]
        refused = [f"`train` will refuse this data: {fault}" for fault in faults]
        lines[side] = [*counts[side].lines(), *report.lines(), *refused]
    if shared := audit.shared_prompts(*counts.values()):
        lines["held-out"].append(f"{shared:,} with a prompt of the training data: evaluation on them is not held out")
    different, compared = audit.boundary_differences(sides["training"], tokenizer, EncodeOptions(**options))
    note = f"{different:,} of the first {compared:,} tokenize differently with data.boundary separate and joint"
    lines["training"].append(note)
    table = tables["training"]
    comparisons = (item for item in sides["training"] if isinstance(item, Comparison))
    found = find_shortcuts(comparisons) if table.responses > 1 else None
    shown = [_named(audit.pieces(table, i, tokenizer)) for i in range(min(settings.show, len(table)))]
    return DataPage(name, lines, found, shown, _lengths(table), settings.data.max_length)


def _refuse_bad(sides: Mapping[str, Iterable[Item]], tokenizer: Any, data: DataConfig) -> None:
    """Refuses more bad examples than may be skipped: their number, and the first of each kind.

    Bad are examples that cannot be read, rendered or tokenized.
    """
    bad = list({str(error): error for items in sides.values() for error in _bad(items, tokenizer, data)}.values())
    if len(bad) <= data.skip_bad_rows:
        return
    kinds: dict[str, list[str]] = {}
    for error in bad:
        kinds.setdefault(QUOTED.sub("", str(error).partition(": ")[2]), []).append(str(error))
    for errors in kinds.values():
        log_line(f"{len(errors):,} bad rows: {'; '.join(errors[:SHOWN_BAD])}")
    if len(bad) == 1:
        raise bad[0]
    raise UserError(f"{bad[0]} ({len(bad):,} bad rows; correct or remove them, or set data.skip_bad_rows: {len(bad)})")


def _bad(items: Iterable[Item], tokenizer: Any, data: DataConfig) -> list[UserError]:
    """Returns the errors of bad examples."""
    tally = EncodeTally(keep_errors=True)
    options = EncodeOptions(**_encode_options(data, tokenizer)[0])._replace(skip_bad_rows=sys.maxsize)
    with contextlib.suppress(NothingLeftError):
        for _ in encode_stream(items, tokenizer, options, tally):
            pass
    return tally.errors


def _encode_options(data: DataConfig, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the options of `encode` and what `train` will refuse: for the page, conversations are always rendered."""
    options = encode_options(data)
    if tokenizer.chat_template or options["template"].source:
        return options, []
    options["template"] = options["template"]._replace(source=PLAIN)
    return options, ["the tokenizer has no chat template; set data.chat_template"]


def _list_sources() -> None:
    """Prints the name, the data set and the columns of every data source."""
    for name in source_names():
        module = importlib.import_module(f"dpo_jax.data.sources.{name}")
        print(f"{name:22} {(module.__doc__ or '').splitlines()[0]} Columns: {module.COLUMNS}")
    for name, hub, columns in listed():
        print(f"{name:22} {hub or 'files'}: {columns}")


def _names(responses: int) -> list[str]:
    """Returns the names of the parts of a comparison, the prompt first."""
    return ["prompt", *(["chosen", "rejected"] if responses == 2 else [f"response {i + 1}" for i in range(responses)])]


def _named(parts: list[list[audit.Piece]]) -> dict[str, list[audit.Piece]]:
    """Returns the parts of a comparison by name, without absent responses."""
    return {name: part for name, part in zip(_names(len(parts) - 1), parts, strict=True) if part}


def _lengths(table: Table) -> dict[str, np.ndarray]:
    """Returns lengths in tokens by name of the part, without absent responses."""
    lengths = zip(_names(table.responses), [table.prompt_lengths, *table.response_lengths.T], strict=True)
    return {name: values[values > 0] for name, values in lengths}


def _print(page: DataPage) -> None:
    for side, lines in page.lines.items():
        for line in lines:
            log_line(f"{side} data: {line}")
    for shortcut in page.shortcuts or ():
        top = ", ".join(name for name, _ in shortcut.top[:8])
        log_line(f"shortcut: {describe_shortcut(shortcut)}; largest weights: {top}")
    console = Console()
    for parts in page.rows:
        for name, part in parts.items():
            text = Text(f"{name}: ", style="bold")
            for place, piece in enumerate(part):
                style = ("on dark_green", "on dark_cyan")[place % 2] if piece.scored else "dim"
                text.append(piece.text, style).append(piece.mark, "bold")
            console.print(text)
        console.rule()


def describe_shortcut(shortcut: Shortcut) -> str:
    """Returns a classifier's accuracy, its 95% confidence interval and chance as text."""
    low, high = wilson(shortcut.right, shortcut.total)
    accuracy = shortcut.right / shortcut.total
    return (
        f"{shortcut.name} predict {accuracy:.3f} ({low:.3f} .. {high:.3f}) of {shortcut.total:,} held-out comparisons, "
        f"chance {shortcut.chance:.3f}"
    )
