"""`dpo-jax report`: a page on one run, or on several runs side by side."""

from pathlib import Path

from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.pages.figure import Panel
from dpo_jax.pages.run import write_report


def report_command(argv: list[str]) -> None:
    """`dpo-jax report RUN ... [--out FILE.html]`.

    Without --out the page is `report.html` in the run folder; for several runs it is `comparison.html` in the first
    run folder, so that the first run keeps its own report.
    """
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    runs, options = [Path(a) for a in argv[:first]], arguments(argv[first:])
    if any(key != "out" or len(values) != 1 for key, values in options) or not runs:
        raise UserError("dpo-jax report: give run folders, then at most the option --out FILE.html")
    panels = _loss_panels(runs) if len(runs) > 1 else []
    out = Path(options[-1][1][0]) if options else runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    print(f"wrote {write_report(runs, out, panels)}" + (f", a comparison of {len(runs)} runs" if len(runs) > 1 else ""))


def _loss_panels(runs: list[Path]) -> list[Panel]:
    """Returns the figure of the gradient weights of several runs, computed on a CPU."""
    import jax  # here, because a report of one run needs none

    from dpo_jax.commands.gradient_weights import shown_panels

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be another run's
    return shown_panels(runs)
