"""Conversations to text, by a chat template: the tokenizer's own or another one."""

import functools
import json
import re
from typing import Any, NamedTuple

import yaml

from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison


class Template(NamedTuple):
    """A chat template and its arguments.

    Attributes:
      source: the Jinja template; "" for the tokenizer's own.
      options: (name, value) of arguments for every conversation; those of a conversation itself override them.
    """

    source: str = ""
    options: tuple[tuple[str, Any], ...] = ()


class Rendered(NamedTuple):
    """One comparison as text.

    Attributes:
      prompt: the text that the model continues, the template's generation prompt included.
      responses: the continuations, without the EOS that ends them; None for an absent response.
      ends: whether the template itself ends every response with EOS.
    """

    prompt: str
    responses: tuple[str | None, ...]
    ends: bool = True


def chat_template(source: str, options: tuple[str, ...]) -> Template:
    """Returns the template of a file's contents and of arguments written `name=value`, values in YAML.

    Raises:
      UserError: an argument is not `name=value`, or its value is not YAML.
    """
    pairs = [option.partition("=") for option in options]
    if bad := [option for option, pair in zip(options, pairs, strict=True) if not pair[1]]:
        raise UserError(f"data.chat_template_kwargs: {bad[0]!r} is not name=value")
    try:
        return Template(source, tuple((name.strip(), yaml.safe_load(value)) for name, _, value in pairs))
    except yaml.YAMLError as error:
        raise UserError(f"data.chat_template_kwargs: not YAML: {' '.join(str(error).split())}") from error


def render_comparison(comparison: Comparison, tokenizer: Any, template: Template) -> Rendered:
    """Returns a comparison as text. Texts stay as they are; conversations go through the chat template.

    Blank text that the template writes after the EOS of a response is dropped.

    Raises:
      UserError: a message spells a special token, which would be tokenized as one; the template fails, does not write
        the same prompt before a response as without one, or writes more than blanks after EOS.
    """
    if not isinstance(comparison.prompt, Chat):
        return Rendered(comparison.prompt, comparison.responses)
    chat, where = comparison.prompt, comparison.where
    _check_spelling(comparison, tokenizer)
    prompt = _apply(where, chat, tokenizer, template, None)
    found = [_response(where, chat, tokenizer, template, prompt, answer) for answer in comparison.responses]
    return Rendered(prompt, tuple(text for text, _ in found), all(ends for _, ends in found))


def plain_text(response: Any) -> str:
    """Returns the text of a response without a template: a text itself, or a message's content and other fields."""
    if isinstance(response, str):
        return response
    others = [str(value) for name, value in sorted(response.items()) if name not in ("role", "content") and value]
    return "\n".join([response["content"], *others])


def as_columns(prompt: str | Chat) -> dict[str, Any]:
    """Returns a prompt as columns from which the source `files` reads it back."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    extra = {"tools": list(prompt.tools), "chat_template_kwargs": dict(prompt.options)}
    return {"prompt": list(prompt.messages), **{name: value for name, value in extra.items() if value}}


def prompt_text(prompt: str | Chat, tokenizer: Any, template: Template, where: str = "the prompt") -> str:
    """Returns a prompt without responses as the text that a model continues; errors as `render_comparison`."""
    return render_comparison(Comparison(prompt, (), where=where), tokenizer, template).prompt


def _response(
    where: str, chat: Chat, tokenizer: Any, template: Template, prompt: str, answer: Any
) -> tuple[str | None, bool]:
    """Returns (text of a response, whether the template ends it with EOS).

    The text is the part of the rendered conversation after the prompt, so that prompt and response always join to what
    the template writes.
    """
    if answer is None:
        return None, True
    rendered = _apply(where, chat, tokenizer, template, answer)
    if not rendered.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        raise UserError(
            f"{where}: the chat template writes {prompt[at:][:40]!r} for the model to continue but "
            f"{rendered[at:][:40]!r} before its answer; set data.chat_template_kwargs to make the two agree, or set "
            "another data.chat_template"
        )
    text, ending, rest = rendered[len(prompt) :].partition(tokenizer.eos_token)
    if rest.strip():
        raise UserError(
            f"{where}: the chat template writes {rest.strip()[:40]!r} after a response's EOS; set another "
            "data.chat_template"
        )
    return text, bool(ending)


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
    """Refuses messages whose text contains a special token, such as a forged end of turn."""
    chat = comparison.prompt
    texts = json.dumps([chat.messages, chat.tools, comparison.responses], ensure_ascii=False)  # type: ignore
    if match := _special_pattern(tuple(sorted(_special_tokens(tokenizer)))).search(texts):
        raise UserError(
            f"{comparison.where}: a message spells the special token {match.group()!r}, which would be read as one; "
            "remove it from the text"
        )


def _special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {tokenizer.eos_token}


@functools.lru_cache(maxsize=8)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
