"""`dpo-jax frontier`: the reward of each method against its KL, as figures, tables, JSON and a page."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.commands.common import leading_arguments, log_line, print_table
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.experiments import frontier, optimum
from dpo_jax.experiments.frontier import FrontierResult
from dpo_jax.pages.frontier import (
    budgets,
    differences,
    frontier_figures,
    frontier_json,
    frontier_table,
    optima,
    render_frontier,
    standalone_figure,
)
from dpo_jax.paths import refuse_links, written
from dpo_jax.runs.train import with_base_model
from dpo_jax.training.run_folder import check_secrets


def frontier_command(argv: list[str]) -> None:
    """`dpo-jax frontier CONFIG.yaml [--run DIR] [--key.path value ...]`."""
    (file,), rest = leading_arguments(argv, "frontier", "CONFIG.yaml")
    prog = "dpo-jax frontier CONFIG.yaml"
    settings = parse_config(FrontierConfig, file or None, rest, prog=prog)
    run = settings.run or str(Path("runs") / Path(file).stem)
    settings, start = dataclasses.replace(settings, run=run), time.perf_counter()
    if settings.model.path.endswith((".yaml", ".yml")):
        base = with_base_model(settings, file).model
        settings = dataclasses.replace(settings, model=base)
    check_secrets(settings)
    refuse_links(run)
    found = frontier.run_frontier(settings)
    lines = summary_lines(found, settings)
    for rows in filter(None, (budgets(found), differences(found), frontier_table(found), optima(found))):
        print_table(rows[0], rows[1:], wrap=False)
    for line in (*lines, f"{time.perf_counter() - start:.0f} s"):
        log_line(line)
    log_line(f"page: {write_frontier(Path(run), found, lines)}")


def summary_lines(found: FrontierResult, settings: FrontierConfig) -> list[str]:
    """Returns sentences on the sizes of the experiment and on the estimation of the optimum."""
    measured = len({(*p[:2], p.seed) for p in found.points if p.method != "sft"})
    lines = [
        f"{measured} runs of up to {settings.max_steps} steps, {found.pairs:,} pairs, true reward {settings.reward}; "
        f"{len(found.points)} measurements on {found.prompts} held-out prompts; {_seeds_text(settings)}"
    ]
    if found.other_seeds:
        lines.append(f"measurements of other seeds in {settings.run}/points.jsonl, left out: {found.other_seeds:,}")
    if any(getattr(settings, method) for method in frontier.ONLINE):
        sampled = settings.online.rollouts * settings.online.max_steps
        pairs = f"{settings.completions} completions a prompt for the pairs"
        lines.append(f"sampled to train on: {pairs}; {sampled:,} completions by each run of PPO and online DPO")
    if found.enumerated:
        return [*lines, "optimum: exact sum over all possible responses"]
    lines.append(f"optimum: self-normalized importance weights, {settings.optimum.completions} samples per prompt")
    if found.left_out:
        betas = ", ".join(f"{o.beta:g}" for o in found.left_out)
        lines.append(f"left out (fewer than {optimum.MIN_EFFECTIVE} effective samples): beta {betas}")
    return lines


def _seeds_text(settings: FrontierConfig) -> str:
    """Returns which seeds there are, and what the intervals are over."""
    if settings.seeds == 1:
        return f"seed {settings.seed}"
    return f"{settings.seeds} seeds from {settings.seed}, intervals over seeds (Student's t)"


def write_frontier(folder: Path, found: FrontierResult, lines: Sequence[str]) -> Path:
    """Writes the figures, `frontier.json` and `frontier.html`; returns the path of the page."""
    for name, svg in frontier_figures(found).items():
        with written(folder / f"{name}.svg") as file:
            file.write(standalone_figure(svg))
    with written(folder / "frontier.json") as file:
        json.dump(frontier_json(found), file, indent=1)
    page = folder / "frontier.html"
    with written(page) as file:
        file.write(render_frontier(found, lines))
    return page
