"""The command line: dispatch of commands, logging, and errors as one line.

The command NAME is the function NAME_command of dpo_jax/commands/NAME.py, imported for that command alone.
"""

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dpo_jax import __version__, paths
from dpo_jax.errors import UserError, closest, is_utf8, printable

DISTRIBUTED = ("--distributed auto|HOST:PORT,PROCESSES,INDEX", "Join the other processes of the run.")


class Command(NamedTuple):
    """A command, as its help shows it.

    Attributes:
      arguments: how they are written.
      what: what the command does, as a sentence.
      example: the arguments of an example.
      options: (syntax, meaning) of the options beside the config's.
    """

    arguments: str
    what: str
    example: str
    options: tuple[tuple[str, str], ...] = ()


COMMANDS = {
    "train": Command(
        "CONFIG.yaml [--key.path value ...] [--distributed auto]",
        "Trains a model by SFT, DPO or any other loss; the same command resumes.",
        "configs/synthetic_dpo.yaml --loss.beta 0.3 --run runs/b",
        (("--KEY VALUE", "Any key of the YAML, such as --loss.beta 0.3; see --help-all."), DISTRIBUTED),
    ),
    "sweep": Command(
        "CONFIG.yaml --key VALUE,VALUE,...",
        "Trains a run for every combination of values.",
        "configs/synthetic_dpo.yaml --loss.beta 0.05,0.1,1",
        (("--KEY VALUE,VALUE,...", "Any key of the YAML with the values to try; see --help-all."), DISTRIBUTED),
    ),
    "eval": Command(
        "RUN_OR_MODEL [--data.path ...] [--reward ...] [--suite NAME,...]",
        "Measures accuracy, margins and KL on held-out data; runs standard suites.",
        "runs/my --suite rewardbench,ifeval",
    ),
    "sample": Command(
        "RUN_OR_MODEL --prompt TEXT ... | --chat",
        "Completes prompts, policy beside reference, or holds a conversation.",
        'runs/my --prompt "Once upon a time" --temperature 0.7',
    ),
    "data": Command(
        "CONFIG.yaml [--out FILE.html]",
        "Reports on the data: counts, lengths, shortcuts, examples.",
        "configs/synthetic_dpo.yaml --show 8",
        (("--list", "List the data sources and their columns; takes no CONFIG.yaml."),),
    ),
    "losses": Command(
        "[NAME[,OPTION=VALUE] | AXIS=VALUE,... ...] [--plot [FILE.svg]]",
        "Lists every loss: formula, options, paper; plots them against the margin.",
        "dpo ipo --plot losses.svg",
        (("--plot [FILE.svg]", "Draw the losses against the margin (default losses.svg)."),),
    ),
    "pairs": Command(
        "[RUN_OR_MODEL] OUT.jsonl [--by WAY] ...",
        "Builds preference pairs from a model's answers or from other data.",
        "runs/my pairs.jsonl --reward happy --data.path prompts.jsonl",
    ),
    "winrate": Command(
        "RUN_OR_MODEL ... --judge NAME [--against ...]",
        "Measures how often a judge prefers a model's responses.",
        "runs/my --judge happy --temperatures 0 1",
    ),
    "frontier": Command(
        "CONFIG.yaml [--run DIR]",
        "Measures each method's reward against KL, and the optimum (figure 2).",
        "configs/frontier_quick.yaml",
    ),
    "leaderboard": Command(
        "[--losses NAME ...] [--beta VALUE ...] [--seeds N]",
        "Ranks the losses in worlds whose optimum is known, under noisy labels.",
        "--losses dpo ipo link=savage --beta 0.3 1 3",
    ),
    "export": Command(
        "RUN OUT [--checkpoint best] [--dtype ...] [--push owner/name]",
        "Writes a checkpoint as a Hugging Face folder with a card; uploads it.",
        "runs/my folder --checkpoint best",
    ),
    "models": Command("", "Lists the supported model families.", ""),
    "plan": Command(
        "CONFIG.yaml [--target NAME] [--devices N] [--memory GB]",
        "Computes memory and speed of a run by compiling it, without starting it.",
        "configs/hh_tiny_sft.yaml --target tpu:v5e:2x4",
    ),
    "report": Command(
        "RUN ... [--out FILE.html]",
        "Shows runs on one page: curves, samples, differences.",
        "runs/my runs/b",
        (("--out FILE.html", "The page (default RUN/report.html; comparison.html for several runs)."),),
    ),
}
NARROWEST = 40  # columns; in fewer a table has no place
HELP, HELP_ALL = ("-h", "--help"), "--help-all"
WRITES = ("export", "pairs")  # commands whose last argument is what they write


def usage() -> str:
    """Returns the overview of commands."""
    lines = [f"{f'  dpo-jax {name} {c.arguments}'.rstrip()}\n      {c.what}" for name, c in COMMANDS.items()]
    return "\n".join(
        [
            "Direct Preference Optimization in JAX: a model folder and a preference file in,",
            "a trained model out.\n",
            *lines,
            "\nEvery command takes --help, for its own options, and --help-all, for all. Every",
            "key of a YAML is an option: dpo-jax train CONFIG.yaml --loss.beta 0.3",
            "dpo-jax --version prints the version.",
        ]
    )


def run_command(argv: Sequence[str]) -> None:
    """Runs one command."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(f"dpo_jax {__version__}")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; {closest(argv[0], list(COMMANDS))}")
    name, rest = argv[0], list(argv[1:])
    if {*HELP, HELP_ALL} & {*rest}:
        _help(name, [a for a in rest if a not in (*HELP, HELP_ALL)], every=HELP_ALL in rest)
        return
    # With --json standard output has that alone.
    messages = sys.stderr if any(a.partition("=")[0] == "--json" for a in rest) else None
    _print_first_line(name, rest, messages)
    module = importlib.import_module(f"dpo_jax.commands.{name}")
    if "jax" in sys.modules and name != "plan":  # programs for devices that are not here cannot be loaded again
        paths.keep_compiled()
    _print_log(messages is not None)
    getattr(module, f"{name}_command")(rest)


def _print_first_line(name: str, rest: Sequence[str], file: TextIO | None) -> None:
    """Prints the file that is read, before slow imports; not in a distributed run, whose process 0 is not known yet."""
    if "jax" in sys.modules or any(a.partition("=")[0] == "--distributed" for a in rest):
        return
    paths = rest[: next((i for i, a in enumerate(rest) if a.startswith("-")), len(rest))]
    found = [path for path in paths[: -1 if name in WRITES else None] if os.path.exists(path)]
    print(printable(f"reading {', '.join(found)}" if found else "loading JAX"), file=file, flush=True)


class _Printer(logging.Handler):
    """Prints log records as plain lines, from process 0 only."""

    to_errors = False  # to standard error; the stream of the moment, which may be another one later

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        jax = sys.modules.get("jax")
        if jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0:
            print(printable(self.format(record)), file=sys.stderr if self.to_errors else None, flush=True)


def _print_log(to_errors: bool) -> None:
    """Prints the package's progress messages, on standard output or on standard error."""
    log = logging.getLogger("dpo_jax")
    log.setLevel(logging.INFO)
    printers = [handler for handler in log.handlers if isinstance(handler, _Printer)] or [_Printer()]
    printers[0].to_errors = to_errors
    log.addHandler(printers[0])


def _help(name: str, rest: Sequence[str], *, every: bool) -> None:
    """Prints the help of a command, with every key of a run's config or without them; imports no JAX."""
    from dpo_jax.config import help as page  # here: it takes time to import
    from dpo_jax.config.commands import COMMAND_CONFIGS

    command, kind = COMMANDS[name], COMMAND_CONFIGS.get(name)
    lines = [*page.wrapped(f"usage: dpo-jax {name} {command.arguments}", "", "    "), "", *page.wrapped(command.what)]
    if command.example:
        lines += ["", *page.wrapped(f"example: dpo-jax {name} {command.example}", "", "    ")]
    print("\n".join(lines))
    first = next((i for i, a in enumerate(rest) if a.startswith("-")), len(rest))
    own = page.OptionGroup("options:", [page.OptionLine(*option) for option in command.options])
    if kind is None:
        groups = [own] if own.lines else []
    else:
        plain, *sections = page.own_options(kind)
        hint = page.OptionLine(HELP_ALL, "List the keys of the run's config too, by section.")
        groups = [own._replace(lines=[*own.lines, *plain.lines, *([] if every else [hint])]), *sections]
        groups += page.config_options(kind, _chosen_in(rest[:first]), rest[first:]) if every else []
    if groups:
        print(page.rendered(groups))


def _chosen_in(paths: Sequence[str]) -> str | None:
    """Returns the YAML that may choose a loss and an optimizer: an argument, or that of a run folder."""
    yamls = (path if path.endswith((".yaml", ".yml")) else f"{path}/config.yaml" for path in paths)
    return next((file for path, file in zip(paths, yamls, strict=True) if file == path or Path(file).is_file()), None)


def main() -> None:
    """Runs the command line; an error that the user can fix is one line on standard error and exit code 2."""
    # Imports and traces make a million objects that stay. To look through them again and again takes a second.
    gc.set_threshold(100_000, 50, 100)
    # The hub is contacted only for names that the user gives, and not for telemetry.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch, which is not used, is absent
    logging.getLogger("dpo_jax").propagate = False  # a library may have given the root logger a handler
    _fit_terminal()
    sys.unraisablehook = show_unraisable
    try:
        if odd := next((arg for arg in sys.argv[1:] if not is_utf8(arg)), None):
            raise UserError(f"argument {odd!r} is not UTF-8; write it in UTF-8, or rename the file")
        run_command(sys.argv[1:])
        sys.stdout.flush()  # here, where an error of it is caught
    except UserError as e:
        sys.exit(_fail(str(e)))
    except BrokenPipeError:  # the reader of the output has gone
        sys.exit(_fail("", 141))
    except OSError as e:
        sys.exit(_fail(_os_error(e)))
    except MemoryError as e:
        sys.exit(_fail(f"out of memory ({e}); lower batch_size, or the sizes of the data, or free memory"))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; the same command resumes from the last checkpoint", 130))


def show_unraisable(unraisable: Any) -> None:
    """Prints an exception that C code could not raise, except one of a callback of tensorstore after a failed save.

    The callback finds its event loop closed. Its traceback, which begins in asyncio, would stand beside the line that
    says why the save failed.

    Args:
      unraisable: what `sys.unraisablehook` is given.
    """
    trace = unraisable.exc_traceback
    callback = trace is not None and trace.tb_frame.f_globals["__name__"] == "asyncio.base_events"
    closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    if not (callback and closed):
        sys.__unraisablehook__(unraisable)


def _fit_terminal() -> None:
    """Lets any characters be read and written in any encoding, on a terminal of any width or on none."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def _os_error(error: OSError) -> str:
    """Returns the message on a failed file operation: the file, the reason and the fix."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    where = error.filename2 or error.filename or "writing"
    return f"{where}: {reason}; free space or fix the path, then run the command again"


def _fail(message: str, code: int = 2) -> int:
    """Prints the message; one of several processes exits at once, so that the others do not wait for it."""
    jax = sys.modules.get("jax")  # not imported for the overview of commands
    if jax is None or not jax.distributed.is_initialized():
        who, leave = "", lambda code: code
    else:
        from dpo_jax import distributed

        who, leave = distributed.process_prefix(), distributed.exit_now
    with contextlib.suppress(OSError):  # a full disk, or nobody who reads
        if message:
            print(printable(f"dpo-jax: {who}{' '.join(message.split())}"), file=sys.stderr, flush=True)
        sys.stdout.flush()
    if code == 141:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest of the buffer has no reader
    return leave(code)
