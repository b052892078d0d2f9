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
from dpo_jax.settings import Look
from dpo_jax.terminal import leading, say


def data_command(argv: list[str]) -> None:
    """`dpo-jax data CONFIG.yaml [--out FILE.html] [--show N] [--key.path value ...]`."""
    (file,), rest = leading(argv, "data", "CONFIG.yaml")
    prog = "dpo-jax data CONFIG.yaml"
    settings = config.parse(Look, file or None, rest, prog=prog)
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
        parsed = config.parse(Config, model.path, [], prog="dpo-jax data")
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
