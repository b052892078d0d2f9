"""Conversations to text, by the tokenizer's own chat template or another one."""

import functools
import json
import re
from typing import Any, NamedTuple

import yaml

from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison


class Template(NamedTuple):
    """How conversations are written.

    Attributes:
      source: the Jinja template; empty for the tokenizer's own.
      options: arguments of it, for every row; a row's own ones go before them.
    """

    source: str = ""
    options: tuple[tuple[str, Any], ...] = ()


class Rendered(NamedTuple):
    """One comparison as text.

    Attributes:
      prompt: all up to where the model begins to write, the template's generation prompt included.
      responses: what it is to write, without the EOS with which it ends; None for an absent one.
      ends: whether the template itself ended all responses with EOS.
    """

    prompt: str
    responses: tuple[str | None, ...]
    ends: bool = True


def chat_template(source: str, options: tuple[str, ...]) -> Template:
    """A template from a file's contents and options written `name=value`, the values as in YAML."""
    pairs = [option.partition("=") for option in options]
    if bad := [option for option, pair in zip(options, pairs, strict=True) if not pair[1]]:
        raise UserError(f"data.chat_template_kwargs: {bad[0]!r} is not name=value")
    try:
        return Template(source, tuple((name.strip(), yaml.safe_load(value)) for name, _, value in pairs))
    except yaml.YAMLError as error:
        raise UserError(f"data.chat_template_kwargs: not YAML: {' '.join(str(error).split())}") from error


def render_comparison(comparison: Comparison, tokenizer: Any, template: Template) -> Rendered:
    """A comparison as text; one that is text already stays as it is.

    Text that the template puts after the EOS of a response is left out, if it is blank.

    Raises:
      UserError: a message spells a special token, which would be taken for one; the template fails, or does not begin
        the whole with the prompt, or writes more after EOS.
    """
    if not isinstance(comparison.prompt, Chat):
        return Rendered(comparison.prompt, comparison.responses)
    chat, where = comparison.prompt, comparison.where
    _check_spelling(comparison, tokenizer)
    prompt = _apply(where, chat, tokenizer, template, None)
    found = [_response(where, chat, tokenizer, template, prompt, answer) for answer in comparison.responses]
    return Rendered(prompt, tuple(text for text, _ in found), all(ends for _, ends in found))


def plain_text(response: Any) -> str:
    """What a response says, without what a template writes around it: a text, or a message's contents and calls."""
    if isinstance(response, str):
        return response
    said = [str(value) for name, value in sorted(response.items()) if name not in ("role", "content") and value]
    return "\n".join([response["content"], *said])


def as_columns(prompt: str | Chat) -> dict[str, Any]:
    """A prompt as the columns of a file from which `files` reads it back."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    extra = {"tools": list(prompt.tools), "chat_template_kwargs": dict(prompt.options)}
    return {"prompt": list(prompt.messages), **{name: value for name, value in extra.items() if value}}


def prompt_text(prompt: str | Chat, tokenizer: Any, template: Template, where: str = "the prompt") -> str:
    """A prompt alone as the text that a model continues."""
    return render_comparison(Comparison(prompt, (), where=where), tokenizer, template).prompt


def _response(
    where: str, chat: Chat, tokenizer: Any, template: Template, prompt: str, answer: Any
) -> tuple[str | None, bool]:
    """A response as text, and whether the template ends it with EOS."""
    if answer is None:
        return None, True
    whole = _apply(where, chat, tokenizer, template, answer)
    if not whole.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        raise UserError(
            f"{where}: the chat template writes {prompt[at:][:40]!r} for the model to continue but "
            f"{whole[at:][:40]!r} before its answer; set data.chat_template_kwargs so that the two agree, or another "
            "data.chat_template"
        )
    said, ending, rest = whole[len(prompt) :].partition(tokenizer.eos_token)
    if rest.strip():
        raise UserError(f"{where}: the chat template writes {rest.strip()[:40]!r} after a response's EOS; use another")
    return said, bool(ending)


def _apply(where: str, chat: Chat, tokenizer: Any, template: Template, answer: Any) -> str:
    import jinja2

    source = template.source or tokenizer.chat_template
    if not source:
        raise UserError(f"{where}: a conversation, and the tokenizer has no chat template; set data.chat_template")
    messages = [*chat.messages] if answer is None else [*chat.messages, answer]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=list(chat.tools) or None,
            chat_template=source,
            add_generation_prompt=answer is None,
            tokenize=False,
            **{**dict(template.options), **chat.options},
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{where}: the chat template fails: {' '.join(str(error).split())[:200]}") from error


def _check_spelling(comparison: Comparison, tokenizer: Any) -> None:
    chat = comparison.prompt
    texts = json.dumps([chat.messages, chat.tools, comparison.responses], ensure_ascii=False)  # type: ignore
    if match := _special(tuple(sorted(_special_tokens(tokenizer)))).search(texts):
        raise UserError(
            f"{comparison.where}: a message spells the special token {match.group()!r}, which would be read as one; "
            "remove it from the text"
        )


def _special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {tokenizer.eos_token}


@functools.lru_cache(maxsize=8)
def _special(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
