"""`dpo-jax data`, and what the commands share."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_jax import assemble, config, data, data_page, folders, loading, losses, metrics, processes
from dpo_jax.config import Config
from dpo_jax.data import Item, audit, cache
from dpo_jax.data.encode import Options
from dpo_jax.data.shortcuts import Shortcut, shortcuts
from dpo_jax.models import hf
from dpo_jax.records import UserError


def say(line: str) -> None:
    """Prints a line at once; of several processes, only the first does."""
    if processes.first():
        print(line, flush=True)


def leading(argv: list[str], command: str, *names: str) -> tuple[list[str], list[str]]:
    """Returns the arguments before the first option, one for each name, and the rest."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    if "--help" in argv and first < len(names):
        return ["" for _ in names], argv
    if first != len(names):
        raise UserError(f"dpo-jax {command} takes {' and '.join(names)}, then options; given: {argv[:first]}")
    return argv[:first], argv[first:]


def settings_of(path: str, argv: list[str], kind: type, command: str) -> Any:
    """Returns the config of a run with overrides, or the overrides alone for a model folder."""
    prog = f"dpo-jax {command} RUN_OR_MODEL"
    if folders.is_run(path):
        return folders.config_of(path, argv, kind, prog)
    settings = config.parse(kind, None, argv, prog=prog, variants=folders.VARIANTS)
    model = dataclasses.replace(settings.model, path=str(hf.model_folder(path)))
    return dataclasses.replace(settings, model=model)


@dataclass(frozen=True)
class Look(Config):
    """A run's config, and how to show its data."""

    out: str = ""
    """The page; by default runs/<name of the config>.data.html."""
    show: int = 4
    """Comparisons shown as the model sees them."""


def data_command(argv: list[str]) -> None:
    """`dpo-jax data CONFIG.yaml [--out FILE.html] [--show N] [--key.path value ...]`."""
    (file,), rest = leading(argv, "data", "CONFIG.yaml")
    prog = "dpo-jax data CONFIG.yaml"
    settings = config.parse(Look, file or None, rest, prog=prog, variants=folders.VARIANTS)
    assemble.check(settings)
    tokenizer = loading.tokenizer_of(_first_model(settings.model))
    train, held_out = assemble.comparisons(settings.data, assemble.responses_of(settings, losses.build(settings.loss)))
    sides = {"training": assemble.noise_in(settings, train), "held-out": held_out}
    page = _page(Path(file).stem, sides, tokenizer, settings)
    _print(page)
    out = Path(settings.out or Path("runs") / f"{Path(file).stem}.data.html")
    with folders.written(out) as f:
        f.write(data_page.page(page))
    say(f"the report: {out}")


def _first_model(model: config.Model) -> config.Model:
    """The model section whose tokenizer a run has: its own, or that of the YAML from which it starts."""
    while not model.tokenizer and model.path.endswith((".yaml", ".yml")):
        parsed = config.parse(Config, model.path, [], prog="dpo-jax data", variants=folders.VARIANTS)
        model = parsed.model
    return model


def _page(name: str, sides: dict[str, Iterable[Item]], tokenizer: Any, settings: Look) -> data_page.Page:
    """All that is found out about the data."""
    options = assemble.encoding(settings.data)
    counts = {side: audit.count(items) for side, items in sides.items()}
    lines, tables = {}, {}
    for side, items in sides.items():
        tables[side], report = cache.cached_encode(items, tokenizer, folders.cache_folder() / "tokens", **options)
        lines[side] = [*counts[side].lines(), *report.lines()]
    if shared := audit.shared_prompts(*counts.values()):
        lines["held-out"].append(f"{shared:,} with a prompt that training has too: what is measured there was learnt")
    different, compared = audit.boundary_differences(sides["training"], tokenizer, Options(**options))
    note = f"{different:,} of the first {compared:,} differ in tokens between data.boundary separate and joint"
    lines["training"].append(note)
    table = tables["training"]
    found = shortcuts(item for item in sides["training"] if isinstance(item, data.Comparison))
    shown = [audit.pieces(table, row, tokenizer) for row in range(min(settings.show, len(table)))]
    return data_page.Page(name, lines, found, shown, _lengths(table), settings.data.max_length)


def _lengths(table: Any) -> dict[str, Any]:
    """Lengths in tokens by what they are lengths of; of absent responses none."""
    names = ["chosen", "rejected"] if table.responses == 2 else [f"response {i + 1}" for i in range(table.responses)]
    lengths = {"prompt": table.prompt_lengths, **dict(zip(names, table.response_lengths.T, strict=True))}
    return {name: values[values > 0] for name, values in lengths.items()}


def _print(page: data_page.Page) -> None:
    for side, lines in page.lines.items():
        for line in lines:
            say(f"{side} data: {line}")
    for shortcut in page.shortcuts:
        say(f"shortcut: {described(shortcut)}; most telling: {', '.join(name for name, _ in shortcut.top[:8])}")
    console = Console()
    for parts in page.rows:
        for number, part in enumerate(parts):
            text = Text("prompt: " if not number else f"response {number}: ", style="bold")
            for place, piece in enumerate(part):
                style = ("on dark_green", "on dark_cyan")[place % 2] if piece.scored else "dim"
                text.append(piece.text, style)
            console.print(text)
        console.rule()


def described(shortcut: Shortcut) -> str:
    """A classifier's accuracy in words."""
    low, high = metrics.wilson(shortcut.right, shortcut.total)
    accuracy = shortcut.right / shortcut.total
    return (
        f"{shortcut.name} predict {accuracy:.3f} ({low:.3f} .. {high:.3f}) of {shortcut.total:,} held-out comparisons, "
        f"chance {shortcut.chance:.3f}"
    )
