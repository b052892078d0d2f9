"""`dpo-jax sample`: completions, the policy's beside the reference's, or a conversation in the terminal."""

import importlib
import re
import sys
from collections.abc import Iterator

from dpo_jax.commands.common import leading_arguments, log_line, print_samples
from dpo_jax.config.commands import SampleConfig
from dpo_jax.errors import UserError, is_utf8, printable
from dpo_jax.runs.sample import ChatModels, first_messages, open_chat, sample_path, stream_answer
from dpo_jax.runs.settings import config_of_path

COMMAND = re.compile(r"/[a-z]+")  # in a conversation; a path such as /tmp/x is text


def sample_command(argv: list[str]) -> None:
    """`dpo-jax sample RUN_OR_MODEL --prompt TEXT ... [--raw] [--temperature 0.7]`, or `--chat [--reference]`."""
    (path,), rest = leading_arguments(argv, "sample", "RUN_OR_MODEL")
    settings = config_of_path(path, rest, SampleConfig, "dpo-jax sample RUN_OR_MODEL")
    if settings.chat:
        if unused := "--prompt" if settings.prompt else "--raw" if settings.raw is not None else "":
            raise UserError(f"--chat: turns are read from standard input, as those of a user; remove {unused}")
        converse(open_chat(path, settings), path)
        return
    if not settings.prompt:
        raise UserError("--prompt: give at least one text to complete, or --chat")
    found = sample_path(path, settings, settings.prompt)
    print_samples(list(zip(settings.prompt, *found.values(), strict=True)), list(found))


def converse(chat: ChatModels, path: str) -> None:
    """Answers turns from standard input until it ends, or until /exit; /reset forgets those before it."""
    log_line(f"a conversation with {path}, by its chat template; /reset begins anew, /exit or Ctrl-D ends")
    start = first_messages(chat.settings)
    messages = list(start)
    for line in user_turns():
        if COMMAND.fullmatch(line):
            if line == "/exit":
                return
            if line == "/reset":
                messages = list(start)
            log_line("forgotten" if line == "/reset" else f"unknown command {line}; known: /reset, /exit")
            continue
        messages.append({"role": "user", "content": line})
        try:
            answers = {name: _show_answer(chat, name, messages) for name in chat.params}
        except UserError as error:  # the conversation goes on without this turn
            messages.pop()
            log_line(f"{error}; or begin anew with /reset")
            continue
        messages.append({"role": "assistant", "content": answers["policy"]})


def user_turns() -> Iterator[str]:
    """Yields the lines of standard input that are not blank; those of a file are shown, as a terminal shows its own."""
    typed = sys.stdin.isatty()
    if typed:
        importlib.import_module("readline")  # lets `input` edit a line
    while (line := _next_line(typed)) is not None:
        if not is_utf8(line):
            log_line("that line is not UTF-8; write it again")
        elif line.strip():
            if not typed:
                log_line(f"you: {line}")
            yield line


def _next_line(typed: bool) -> str | None:
    """Returns a line of standard input; None at its end, or after Ctrl-C."""
    if not typed:
        return line.rstrip("\n") if (line := sys.stdin.readline()) else None
    try:
        return input("you: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _show_answer(chat: ChatModels, name: str, messages: list[dict[str, str]]) -> str:
    """Prints a model's answer while it is sampled, and returns it. Ctrl-C ends the answer, not the conversation."""
    pieces, note = [], ""
    answer = stream_answer(chat, name, messages)
    print(f"{name}: ", end="", flush=True)
    try:
        for piece in answer:
            pieces.append(piece.text)
            note = f" (cut at --max_new_tokens {chat.settings.samples.max_new_tokens})" if piece.cut else ""
            print(printable(piece.text), end="", flush=True)
    except KeyboardInterrupt:
        note = " (interrupted)"
    print(note, flush=True)
    return "".join(pieces)
