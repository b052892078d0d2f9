"""`dpo-jax data`: what data is before anything is trained on it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_jax import losses
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.commands import LookConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, ModelConfig
from dpo_jax.data import audit, cache
from dpo_jax.data.encode import EncodeOptions
from dpo_jax.data.shortcuts import Shortcut, find_shortcuts
from dpo_jax.data.sources.base import Item
from dpo_jax.intervals import wilson
from dpo_jax.losses import Loss
from dpo_jax.pages.data import DataPage, render_data
from dpo_jax.paths import cache_folder, written
from dpo_jax.records import Comparison
from dpo_jax.training import setup
from dpo_jax.training.load import load_run_tokenizer
from dpo_jax.training.tables import comparison_streams, encode_options, label_faults, responses_per_prompt, with_noise


def data_command(argv: list[str]) -> None:
    """`dpo-jax data CONFIG.yaml [--out FILE.html] [--show N] [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "data", "CONFIG.yaml")
    prog = "dpo-jax data CONFIG.yaml"
    settings = parse_config(LookConfig, file or None, rest, prog=prog)
    setup.check_config(settings)
    tokenizer = load_run_tokenizer(_first_model(settings.model))
    loss = losses.build(settings.loss)
    train, held_out = comparison_streams(settings.data, responses_per_prompt(settings, loss))
    sides = {"training": with_noise(settings, train), "held-out": held_out}
    page = _page(Path(file).stem, sides, tokenizer, settings, loss)
    _print(page)
    out = Path(settings.out or Path("runs") / f"{Path(file).stem}.data.html")
    with written(out) as f:
        f.write(render_data(page))
    log_line(f"the report: {out}")


def _first_model(model: ModelConfig) -> ModelConfig:
    """The model section whose tokenizer a run has: its own, or that of the YAML from which it starts."""
    while not model.tokenizer and model.path.endswith((".yaml", ".yml")):
        parsed = parse_config(Config, model.path, [], prog="dpo-jax data")
        model = parsed.model
    return model


def _page(name: str, sides: dict[str, Iterable[Item]], tokenizer: Any, settings: LookConfig, loss: Loss) -> DataPage:
    """All that is found out about the data."""
    options = encode_options(settings.data)
    counts = {side: audit.count_pairs(items) for side, items in sides.items()}
    lines, tables = {}, {}
    for side, items in sides.items():
        tables[side], report = cache.cached_encode(items, tokenizer, cache_folder() / "tokens", **options)
        refused = [f"`train` refuses it: {fault}" for fault in label_faults(tables[side], loss)]
        lines[side] = [*counts[side].lines(), *report.lines(), *refused]
    if shared := audit.shared_prompts(*counts.values()):
        lines["held-out"].append(f"{shared:,} with a prompt that training has too: what is measured there was learnt")
    different, compared = audit.boundary_differences(sides["training"], tokenizer, EncodeOptions(**options))
    note = f"{different:,} of the first {compared:,} differ in tokens between data.boundary separate and joint"
    lines["training"].append(note)
    table = tables["training"]
    comparisons = (item for item in sides["training"] if isinstance(item, Comparison))
    found = find_shortcuts(comparisons) if table.responses > 1 else None
    shown = [_named(audit.pieces(table, row, tokenizer)) for row in range(min(settings.show, len(table)))]
    return DataPage(name, lines, found, shown, _lengths(table), settings.data.max_length)


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


def _print(page: DataPage) -> None:
    for side, lines in page.lines.items():
        for line in lines:
            log_line(f"{side} data: {line}")
    for shortcut in page.shortcuts or ():
        log_line(
            f"shortcut: {describe_data(shortcut)}; most telling: {', '.join(name for name, _ in shortcut.top[:8])}"
        )
    console = Console()
    for parts in page.rows:
        for name, part in parts.items():
            text = Text(f"{name}: ", style="bold")
            for place, piece in enumerate(part):
                style = ("on dark_green", "on dark_cyan")[place % 2] if piece.scored else "dim"
                text.append(piece.text, style)
            console.print(text)
        console.rule()


def describe_data(shortcut: Shortcut) -> str:
    """A classifier's accuracy in words."""
    low, high = wilson(shortcut.right, shortcut.total)
    accuracy = shortcut.right / shortcut.total
    return (
        f"{shortcut.name} predict {accuracy:.3f} ({low:.3f} .. {high:.3f}) of {shortcut.total:,} held-out comparisons, "
        f"chance {shortcut.chance:.3f}"
    )
