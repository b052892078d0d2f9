"""`sample`: completions of a run or a model folder, from Python, and conversations with it."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpo_jax import losses
from dpo_jax.config.commands import SampleConfig
from dpo_jax.data.sources.base import or_error
from dpo_jax.errors import UserError
from dpo_jax.losses import Loss
from dpo_jax.records import Chat
from dpo_jax.runs.settings import config_of_path, section
from dpo_jax.sampling.stream import padded_length, stream_tokens
from dpo_jax.training.completions import make_completer
from dpo_jax.training.load import LoadedModel
from dpo_jax.training.restore import has_template, load_initial, restore_models, restore_state, trained_on_chats
from dpo_jax.training.tables import (
    decode_texts,
    prompt_ids,
    prompt_texts,
)

log = logging.getLogger(__name__)
INCOMPLETE = "\ufffd"  # the text of bytes that are an incomplete character
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of some vocabularies, for characters that have none


def sample(path: str | Path, prompts: Sequence[Any], **keys: Any) -> dict[str, list[str]]:
    """Generates completions with the policy of a run and its reference, or with a model folder.

    A text is a turn of a user, as for `dpo-jax sample`, if there is a chat template and the run was not trained on
    texts; `raw=True` leaves it as it is. A conversation always goes through the chat template.

    Args:
      path: a run folder, a model folder or a hub id.
      prompts: texts, or conversations: lists of messages with `role` and `content`.
      **keys: keys of `dpo-jax sample`, such as `raw=True`, `system="Be brief."`, `temperature=0.7`,
        `max_new_tokens=64`, `seed=1`, `checkpoint="best"`.

    Returns:
      "policy", and "reference" if there is one -> a completion for each prompt.

    Raises:
      UserError: no checkpoint, an empty prompt, or options without a meaning.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"sample: {type(path).__name__}: give the folder of a run or a model, as in result.folder")
    given = [] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise UserError("prompts: give a list of one or more texts, as in [text]")
    chats = [str(p) if isinstance(p, str) else p if isinstance(p, Chat) else Chat(tuple(p)) for p in given]
    return sample_path(str(path), config_of_path(str(path), section(keys), SampleConfig, "dpo_jax.sample"), chats)


def sample_path(path: str, settings: SampleConfig, prompts: Sequence[Any]) -> dict[str, list[str]]:
    """Generates completions as `dpo-jax sample` does: model -> a text for each prompt."""
    if settings.chat or settings.show_reference:
        raise UserError("--chat and --reference: for a conversation in the terminal; remove them, both models answer")
    loss, loaded, tokenizer = load_for_sampling(path, settings)
    prompts, how = prompts_as_turns(path, prompts, tokenizer, settings)
    log.info(how)
    models = restore_models(path, settings, loaded, restore_state(path, settings, loaded, loss, settings.checkpoint))
    complete = make_completer(settings, loaded, tokenizer, prompt_ids(prompts, tokenizer, settings.data))
    return {name: complete(params) for name, params in models.items()}


def load_for_sampling(path: str, settings: SampleConfig) -> tuple[Loss, LoadedModel, Any]:
    """Returns the loss, the initial policy and the tokenizer of a run or model that generates text."""
    loss = losses.build(settings.loss)
    if loss.rewards:
        raise UserError(f"{path}: a reward model, which generates no text; name a language model")
    return (loss, *load_initial(settings, loss))


def prompts_as_turns(
    path: str, prompts: Sequence[Any], tokenizer: Any, settings: SampleConfig
) -> tuple[list[Any], str]:
    """Returns prompts with each text as a turn of a user if it shall be one, and a line that says which it is.

    By default it shall if there is a chat template and, for a run, if its data are conversations too. A text that
    spells a special token has been through a template and stays as it is.

    Raises:
      UserError: a system message where it has no effect, or that the template does not write.
    """
    why_text = _why_text(path, tokenizer, settings)
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    bare = [isinstance(prompt, str) and not any(mark in prompt for mark in marks) for prompt in prompts]
    if settings.system and (why_text or not any(bare)):
        raise UserError("system: no prompt becomes a turn of a user, before which it would stand; remove it")
    if why_text:
        return list(prompts), f"each prompt: text as it is{why_text}"
    check_system(tokenizer, settings)
    how, before = "a turn of a user, by the chat template; --raw leaves the text as it is", first_messages(settings)
    if written := sum(isinstance(prompt, str) for prompt in prompts) - sum(bare):
        how += f"; {written} with special tokens as they are"
    turns = [Chat((*before, {"role": "user", "content": prompt})) for prompt in prompts]
    chosen = zip(prompts, turns, bare, strict=True)
    return [turn if is_bare else prompt for prompt, turn, is_bare in chosen], f"each prompt: {how}"


def _why_text(path: str, tokenizer: Any, settings: SampleConfig) -> str:
    """Returns why prompts that are texts stay as they are, for a message; "" if they become turns of a user."""
    if settings.raw is not None:
        return " (raw)" if settings.raw else ""
    if not has_template(tokenizer, settings):
        return ": the tokenizer has no chat template"
    if trained_on_chats(path, settings):
        return ""
    return ", as in the data of the run; --raw False makes it a turn of a user"


def first_messages(settings: SampleConfig) -> list[dict[str, str]]:
    """Returns the messages before the first turn of a user: the system's, if there is one."""
    return [{"role": "system", "content": settings.system}] if settings.system else []


def check_system(tokenizer: Any, settings: SampleConfig) -> None:
    """Refuses a system message that the chat template does not write, or does not take."""
    if not settings.system:
        return
    user = {"role": "user", "content": "?"}
    without = prompt_texts([Chat((user,))], tokenizer, settings.data)
    found = or_error(prompt_texts, [Chat((*first_messages(settings), user))], tokenizer, settings.data)
    if isinstance(found, UserError) or found == without:
        raise UserError("system: the chat template takes no system turn; remove it, or set data.chat_template")


class ChatModels(NamedTuple):
    """The models of a conversation.

    Attributes:
      settings: the config of the command.
      loaded: the model that the policy started from.
      tokenizer: the policy's tokenizer.
      params: "policy" and, if it answers too, "reference" -> parameters on a device.
      compiled: lengths of prompts that programs were compiled for; grows.
    """

    settings: SampleConfig
    loaded: LoadedModel
    tokenizer: Any
    params: dict[str, Any]
    compiled: set[int]


class Answer(NamedTuple):
    """One step of an answer.

    Attributes:
      text: the next piece of the text.
      cut: whether the answer ends here, at the maximum length.
    """

    text: str
    cut: bool = False


def open_chat(path: str, settings: SampleConfig) -> ChatModels:
    """Loads the models of a conversation as `dpo-jax sample` does.

    Raises:
      UserError: no checkpoint, no chat template, or a reference to show where there is none.
    """
    loss, loaded, tokenizer = load_for_sampling(path, settings)
    if not has_template(tokenizer, settings):
        raise UserError("--chat: the tokenizer has no chat template; set data.chat_template, or give --prompt")
    check_system(tokenizer, settings)
    state = restore_state(path, settings, loaded, loss, settings.checkpoint)
    both = settings.show_reference
    models = restore_models(path, settings, loaded, state) if both else {"policy": loaded.policy(state.params)}
    if both and "reference" not in models:
        raise UserError(f"--reference: {path} has none; set --reference.path, or remove --reference")
    return ChatModels(settings, loaded, tokenizer, jax.device_put(models), set())


def stream_answer(chat: ChatModels, name: str, messages: Sequence[dict[str, str]]) -> Iterator[Answer]:
    """Returns the answer of a model to a conversation, piece by piece; all pieces join to the whole text.

    Args:
      chat: the models.
      name: "policy" or "reference".
      messages: the conversation, which ends in a turn of the user.

    Raises:
      UserError: the template fails, or the conversation is too long for the model.
    """
    options, ends = chat.settings.samples, chat.loaded.end_ids(chat.tokenizer)
    (ids,) = prompt_ids([Chat(tuple(messages))], chat.tokenizer, chat.settings.data)
    tokens = stream_tokens(
        chat.loaded.model,
        chat.params[name],
        ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_id=ends,
        seed=chat.settings.seed + len(messages),
    )
    positions = chat.loaded.model.architecture.max_positions
    if len(ids) + options.max_new_tokens > positions:
        log.info(f"the conversation passes the {positions:,} positions that the model has learned; /reset shortens it")
    if (length := padded_length(len(ids))) not in chat.compiled:
        log.info(f"compiling for conversations of up to {length:,} tokens")
        chat.compiled.add(length)
    return _answer(chat.tokenizer, tokens, ends)


def _answer(tokenizer: Any, tokens: Iterable[int], ends: Sequence[int]) -> Iterator[Answer]:
    """Yields the pieces of an answer, and whether it was cut."""
    made: list[int] = []
    for piece in text_pieces(tokenizer, _kept(tokens, made), ends):
        yield Answer(piece)
    if made[-1] not in ends:
        yield Answer("", cut=True)


def _kept(tokens: Iterable[int], made: list[int]) -> Iterator[int]:
    """Yields tokens, and appends each to a list."""
    for token in tokens:
        made.append(token)
        yield token


def text_pieces(tokenizer: Any, tokens: Iterable[int], ends: Sequence[int]) -> Iterator[str]:
    """Yields the text of tokens, word by word; all pieces join to the text that they decode to together.

    A word is yielded when the next one begins, because its bytes may not be complete, and because a decoder may change
    the space before a sign. A text without spaces is yielded by characters where each is a word (Chinese, Japanese).
    """
    ids: list[int] = []
    shown = text = ""
    for token in tokens:
        ids.append(token)
        (text,) = decode_texts(tokenizer, [ids], ends)
        if BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token)):
            continue  # bytes in a row decode together, and to no character if those of the last one are not complete
        whole = text[: _end_of_words(text)]
        if len(whole) > len(shown) and whole.startswith(shown):
            yield whole[len(shown) :]
            shown = whole
    if len(text) > len(shown):
        yield text[len(shown) :]


def _end_of_words(text: str) -> int:
    """Returns the number of leading characters that further tokens leave as they are."""
    end = len(text.rstrip(INCOMPLETE))
    while end and not (text[end - 1].isspace() or _is_word(text[end - 1])):
        end -= 1
    return len(text[:end].rstrip(" "))


def _is_word(character: str) -> bool:
    """Returns whether a character is a word of its own, as in Chinese and Japanese."""
    return unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) == "W"
