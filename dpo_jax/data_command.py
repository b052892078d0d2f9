"""`dpo-jax data`: what data is before anything is trained on it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_jax import assemble, config, data, data_page, folders, loading, losses, metrics
from dpo_jax.config import Config
from dpo_jax.data import Item, audit, cache
from dpo_jax.data.encode import Options
from dpo_jax.data.shortcuts import Shortcut, shortcuts
from dpo_jax.losses import Loss
from dpo_jax.settings import Look
from dpo_jax.terminal import leading, say


def data_command(argv: list[str]) -> None:
    """`dpo-jax data CONFIG.yaml [--out FILE.html] [--show N] [--key.path value ...]`."""
    (file,), rest = leading(argv, "data", "CONFIG.yaml")
    prog = "dpo-jax data CONFIG.yaml"
    settings = config.parse(Look, file or None, rest, prog=prog)
    assemble.check(settings)
    tokenizer = loading.tokenizer_of(_first_model(settings.model))
    loss = losses.build(settings.loss)
    train, held_out = assemble.comparisons(settings.data, assemble.responses_of(settings, loss))
    sides = {"training": assemble.noise_in(settings, train), "held-out": held_out}
    page = _page(Path(file).stem, sides, tokenizer, settings, loss)
    _print(page)
    out = Path(settings.out or Path("runs") / f"{Path(file).stem}.data.html")
    with folders.written(out) as f:
        f.write(data_page.page(page))
    say(f"the report: {out}")


def _first_model(model: config.Model) -> config.Model:
    """The model section whose tokenizer a run has: its own, or that of the YAML from which it starts."""
    while not model.tokenizer and model.path.endswith((".yaml", ".yml")):
        parsed = config.parse(Config, model.path, [], prog="dpo-jax data")
        model = parsed.model
    return model


def _page(name: str, sides: dict[str, Iterable[Item]], tokenizer: Any, settings: Look, loss: Loss) -> data_page.Page:
    """All that is found out about the data."""
    options = assemble.encoding(settings.data)
    counts = {side: audit.count(items) for side, items in sides.items()}
    lines, tables = {}, {}
    for side, items in sides.items():
        tables[side], report = cache.cached_encode(items, tokenizer, folders.cache_folder() / "tokens", **options)
        refused = [f"`train` refuses it: {fault}" for fault in assemble.label_faults(tables[side], loss)]
        lines[side] = [*counts[side].lines(), *report.lines(), *refused]
    if shared := audit.shared_prompts(*counts.values()):
        lines["held-out"].append(f"{shared:,} with a prompt that training has too: what is measured there was learnt")
    different, compared = audit.boundary_differences(sides["training"], tokenizer, Options(**options))
    note = f"{different:,} of the first {compared:,} differ in tokens between data.boundary separate and joint"
    lines["training"].append(note)
    table = tables["training"]
    comparisons = (item for item in sides["training"] if isinstance(item, data.Comparison))
    found = shortcuts(comparisons) if table.responses > 1 else None
    shown = [_named(audit.pieces(table, row, tokenizer)) for row in range(min(settings.show, len(table)))]
    return data_page.Page(name, lines, found, shown, _lengths(table), settings.data.max_length)


def _names(responses: int) -> list[str]:
    """What the parts of a comparison are called, the prompt first."""
    return ["prompt", *(["chosen", "rejected"] if responses == 2 else [f"response {i + 1}" for i in range(responses)])]


def _named(parts: list[list[audit.Piece]]) -> dict[str, list[audit.Piece]]:
    """The parts of a comparison by what they are; an absent response is left out."""
    return {name: part for name, part in zip(_names(len(parts) - 1), parts, strict=True) if part}


def _lengths(table: Any) -> dict[str, Any]:
    """Lengths in tokens by what they are lengths of; of absent responses none."""
    lengths = zip(_names(table.responses), [table.prompt_lengths, *table.response_lengths.T], strict=True)
    return {name: values[values > 0] for name, values in lengths}


def _print(page: data_page.Page) -> None:
    for side, lines in page.lines.items():
        for line in lines:
            say(f"{side} data: {line}")
    for shortcut in page.shortcuts or ():
        say(f"shortcut: {described(shortcut)}; most telling: {', '.join(name for name, _ in shortcut.top[:8])}")
    console = Console()
    for parts in page.rows:
        for name, part in parts.items():
            text = Text(f"{name}: ", style="bold")
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
