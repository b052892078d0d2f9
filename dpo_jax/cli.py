"""The command line: dispatch of commands, logging, and errors as one line.

The command NAME is the function NAME_command of dpo_jax/commands/NAME.py, imported for that command alone.
"""

import contextlib
import errno
import importlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dpo_jax import __version__, paths
from dpo_jax.errors import UserError, closest, printable

COMMANDS = {
    "train": ("CONFIG.yaml [--key.path value ...] [--distributed auto]", "SFT, DPO or any loss; resumes by itself"),
    "sweep": ("CONFIG.yaml --key VALUE,VALUE,...", "a run for every combination of values"),
    "eval": (
        "RUN_OR_MODEL [--data.path ...] [--reward ...] [--suite NAME,...]",
        "accuracy, margins, KL with confidence intervals; standard evaluations",
    ),
    "sample": ("RUN_OR_MODEL --prompt TEXT ...", "completions, policy beside reference"),
    "data": (
        "CONFIG.yaml [--out FILE.html]",
        "report on the data: counts, lengths, shortcuts, examples",
    ),
    "losses": ("[NAME ...] [--plot [FILE.svg]]", "every loss: formula, options, paper; curves against the margin"),
    "pairs": (
        "[RUN_OR_MODEL] OUT.jsonl [--by WAY] ...",
        "preference pairs from a model's answers or from other data",
    ),
    "winrate": ("RUN_OR_MODEL ... --judge NAME [--against ...]", "how often a judge prefers its responses"),
    "frontier": ("CONFIG.yaml [--run DIR]", "the paper's figure 2: reward against KL of each method, and the optimum"),
    "export": ("RUN OUT [--checkpoint best]", "a checkpoint, the newest by default, as a Hugging Face folder"),
    "models": ("", "the supported model families"),
    "plan": ("CONFIG.yaml [--devices N] [--memory GB]", "memory per device of a run, compiled but not started"),
    "report": ("RUN ... [--out FILE.html]", "runs on one page: curves, samples, differences"),
}
NARROWEST = 40  # columns; in fewer a table has no place
PLAIN = ("export", "losses", "models", "report")  # commands without config keys


def usage() -> str:
    """Returns the overview of commands."""
    lines = [f"{f'  dpo-jax {name} {what[0]}'.rstrip()}\n      {what[1]}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Direct Preference Optimization in JAX: a model folder and a preference file in, a trained model out.\n",
            *lines,
            "\nEvery command takes --help; every key of a YAML is an option: dpo-jax train CONFIG.yaml --loss.beta 0.3",
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
    if "--help" in rest or "-h" in rest:
        _help(name, [a for a in rest if a not in ("-h", "--help")])
        return
    module = importlib.import_module(f"dpo_jax.commands.{name}")
    if "jax" in sys.modules:
        paths.keep_compiled()
    _print_log()
    getattr(module, f"{name}_command")(rest)


class _Printer(logging.Handler):
    """Prints log records as plain lines, from process 0 only."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        jax = sys.modules.get("jax")
        if jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0:
            print(printable(self.format(record)), flush=True)


def _print_log() -> None:
    """Prints the package's progress messages on standard output."""
    log = logging.getLogger("dpo_jax")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Printer) for handler in log.handlers):
        log.addHandler(_Printer())


def _help(name: str, rest: Sequence[str]) -> None:
    """Prints the options of a command; imports JAX only for the options of a loss or an optimizer that is named."""
    arguments, what = COMMANDS[name]
    if name in PLAIN:
        print(f"usage: dpo-jax {name} {arguments}".rstrip() + f"\n\n{what}")
        return
    from dpo_jax.config.commands import COMMAND_CONFIGS
    from dpo_jax.config.parse import show_help  # tyro takes time to import

    first = next((i for i, a in enumerate(rest) if a.startswith("-")), len(rest))
    prog = f"dpo-jax {name} " + arguments.partition(" [--")[0]
    show_help(COMMAND_CONFIGS[name], _chosen_in(rest[:first]), rest[first:], prog=prog)


def _chosen_in(paths: Sequence[str]) -> str | None:
    """Returns the YAML that may choose a loss and an optimizer: an argument, or that of a run folder."""
    yamls = (path if path.endswith((".yaml", ".yml")) else f"{path}/config.yaml" for path in paths)
    return next((file for path, file in zip(paths, yamls, strict=True) if file == path or Path(file).is_file()), None)


def main() -> None:
    """Runs the command line; an error that the user can fix is one line on standard error and exit code 2."""
    # The hub is contacted only for names that the user gives, and not for telemetry.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch, which is not used, is absent
    logging.getLogger("dpo_jax").propagate = False  # a library may have given the root logger a handler
    _fit_terminal()
    sys.excepthook = show_uncaught
    try:
        if odd := next((arg for arg in sys.argv[1:] if not _is_utf8(arg)), None):
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


def show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of an uncaught exception, except one of a thread after a failed save.

    A thread of tensorstore that outlives a failed save finds its event loop closed. Its traceback would follow the line
    that says why the save failed.
    """
    main = threading.current_thread() is threading.main_thread()
    if main or kind is not RuntimeError or str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _fit_terminal() -> None:
    """Lets output of any characters be written in any encoding, to a terminal of any width or to none."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


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
