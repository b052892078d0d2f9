"""Conversations to text, by a chat template."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax.data.prerendered import is_prerendered, without_eos
from dpo_jax.data.sources.base import or_error
from dpo_jax.data.spelling import check_hidden, hide_special_tokens, refuse_private
from dpo_jax.data.template import PYTHON_ERRORS, Template, template_source
from dpo_jax.data.turns import Spans, as_turns, as_written, assistant_spans, occurs_in, unused_arguments, unwritten
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison


class Rendered(NamedTuple):
    """One comparison as text.

    Attributes:
      prompt: the text that the model continues, the template's generation prompt included.
      responses: the continuations, without the EOS that ends them; None for an absent response.
      ends: whether the template itself ends every response with EOS.
      spans: for each response of several turns the characters that the assistant wrote; () if it wrote all.
      templated: whether a chat template wrote the prompt: this one, or one that the data was made with.
      notes: for the report.
      emptied: whether the template writes no more of a response than of an empty one.
    """

    prompt: str
    responses: tuple[str | None, ...]
    ends: bool = True
    spans: tuple[Spans, ...] = ()
    templated: bool = True
    notes: tuple[str, ...] = ()
    emptied: bool = False


def render_comparison(comparison: Comparison, tokenizer: Any, template: Template) -> Rendered:
    """Returns a comparison as text. Texts stay as they are; conversations go through the chat template.

    Blank text that the template writes after the EOS of a response is dropped. A special token that a message spells
    is hidden (see `spelling`), and must be tokenized with `spelling.token_ids`.

    Raises:
      UserError: the template fails, does not write the same prompt before a response as without one, or writes more
        than blanks after EOS; a message spells a special token and the tokenizer cannot take it as text.
    """
    if not isinstance(comparison.prompt, Chat):
        for text in (comparison.prompt, *comparison.responses):
            refuse_private(comparison.where, text)
        return _rendered_text(comparison.prompt, comparison.responses, tokenizer.eos_token)
    if comparison.prompt.messages[-1].get("tool_calls"):
        raise UserError(f"{comparison.where}: the prompt ends in a tool call; add the tool's answer to it")
    comparison = hide_special_tokens(comparison, tokenizer)
    assert isinstance(comparison.prompt, Chat)
    apply = functools.partial(_apply, comparison.where, comparison.prompt, tokenizer, template)
    prompt = apply([])
    found = [
        (None, True, ()) if answer is None else _response(comparison.where, apply, tokenizer, prompt, as_turns(answer))
        for answer in comparison.responses
    ]
    texts, ends, spans = zip(*found, strict=True) if found else ((), (), ())
    for text in (prompt, *texts):
        check_hidden(comparison.where, text, tokenizer)
    source = template_source(tokenizer, template, comparison.prompt)
    notes = unwritten(
        lambda chat, turns: _apply(comparison.where, chat, tokenizer, template, turns),
        comparison.prompt,
        comparison.responses,
        source,
    )
    notes += unused_arguments(comparison.prompt, source, dict(template.options))
    answers = zip(comparison.responses, texts, strict=True)
    emptied = any(text is not None and _emptied(answer, text, apply) for answer, text in answers)
    return Rendered(prompt, texts, all(ends), spans if any(spans) else (), notes=notes, emptied=emptied)


def _emptied(response: Any, text: str, apply: Callable[..., str]) -> bool:
    """Returns whether a template writes the same for a response and for one whose assistant says nothing."""
    turns = as_turns(response)
    if any(occurs_in(turn["content"], text) for turn in turns if turn["role"] == "assistant"):
        return False
    silent = [{"role": "assistant", "content": ""} if turn["role"] == "assistant" else turn for turn in turns]
    return apply(turns) == or_error(apply, silent)  # some templates refuse an empty answer


def _rendered_text(prompt: str, responses: tuple[str | None, ...], eos: str) -> Rendered:
    """Returns texts as they are; the EOS of a response is dropped where a chat template was applied already."""
    if not is_prerendered(prompt):
        bare = prompt.strip()
        again = bare and any(text and bare in text and text.lstrip().startswith(bare) for text in responses)
        repeated = ("comparisons with a response that begins with the prompt; remove it from the response",)
        return Rendered(prompt, responses, templated=False, notes=repeated if again else ())
    note = "texts to which a chat template was applied already; they stay as they are, with one EOS at the end"
    return Rendered(prompt, tuple(without_eos(text, eos) for text in responses), notes=(note,))


def plain_text(response: Any) -> str:
    """Returns the text of a response without a template: a text itself, or its messages' content and tool calls."""
    if isinstance(response, str):
        return response
    parts = [turn.get(name) for turn in as_turns(response) for name in ("reasoning_content", "content", "tool_calls")]
    return "\n".join(part if isinstance(part, str) else json.dumps(part, sort_keys=True) for part in parts if part)


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
    where: str, apply: Callable[..., str], tokenizer: Any, prompt: str, turns: list[dict[str, Any]]
) -> tuple[str, bool, Spans]:
    """Returns (text of a response, whether the template ends it with EOS, what the assistant wrote of several turns).

    The text is the part of the rendered conversation after the prompt, so that prompt and response always join to what
    the template writes.
    """
    rendered = apply(turns)
    if not rendered.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        raise UserError(
            f"{where}: the chat template writes {prompt[at:][:40]!r} for the model to continue but "
            f"{rendered[at:][:40]!r} before its answer; set data.chat_template_kwargs to make the two agree, or set "
            "another data.chat_template"
        )
    spans = assistant_spans(where, apply, turns, prompt, tokenizer.eos_token) if len(turns) > 1 else ()
    start = len(prompt) + (spans[-1][0] if spans else 0)  # of the last turn
    text, ending, rest = rendered[start:].partition(tokenizer.eos_token)
    if rest.strip():
        raise UserError(
            f"{where}: the chat template writes {rest.strip()[:40]!r} after a response's EOS; set another "
            "data.chat_template"
        )
    return rendered[len(prompt) : start] + text, bool(ending), spans


def _apply(
    where: str, chat: Chat, tokenizer: Any, template: Template, turns: list[dict[str, Any]], generate: bool = False
) -> str:
    """Returns what the template writes for a conversation and turns of a response; without turns, the prompt.

    Args:
      where, chat, tokenizer, template: as for `render_comparison`.
      turns: the response. Its first turn continues the last one of the conversation if that is the assistant's.
      generate: whether the assistant's next turn begins after `turns`; always if there are none.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    source = template_source(tokenizer, template, chat)
    if not source:
        raise UserError(f"{where}: a conversation, and the tokenizer has no chat template; set data.chat_template")
    messages, begun = [*chat.messages], chat.messages[-1]["role"] == "assistant"
    if begun and turns:
        last = messages.pop()
        turns = [{**last, **turns[0], "content": f"{last['content']}{turns[0]['content'] or ''}"}, *turns[1:]]
    try:
        # `apply_chat_template` would drop the null content beside a tool call, which some templates test for.
        (text,), _ = render_jinja_template(
            [as_written([*messages, *turns], source)],
            tools=list(chat.tools) or None,
            chat_template=source,
            add_generation_prompt=generate or not (turns or begun),
            continue_final_message=begun and not turns,
            **{**tokenizer.special_tokens_map, **dict(template.options), **chat.options},
        )
        return text
    except (jinja2.TemplateError, ArithmeticError, RuntimeError, *PYTHON_ERRORS) as error:
        raise UserError(f"{where}: the chat template fails: {' '.join(str(error).split())[:200]}") from error
