"""`dpo-jax report`: runs on one page."""

from pathlib import Path

from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.pages.run import write_report


def report_command(argv: list[str]) -> None:
    """`dpo-jax report RUN ... [--out FILE.html]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    runs, options = [Path(a) for a in argv[:first]], arguments(argv[first:])
    if any(key != "out" or len(values) != 1 for key, values in options) or not runs:
        raise UserError("dpo-jax report takes the folders of runs, then --out FILE.html; nothing else")
    out = Path(options[-1][1][0]) if options else runs[0] / "report.html"
    print(f"wrote {write_report(runs, out)}")
