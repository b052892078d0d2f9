"""Prompts as text that remember the conversation they were rendered from."""

from dpo_jax.records import Chat


class PromptText(str):
    """A prompt as text for a model. A reward model with another chat template renders the conversation anew.

    Attributes:
      source: the conversation, or the text itself.
    """

    source: str | Chat

    def __new__(cls, text: str, source: str | Chat) -> "PromptText":
        """Returns the text of a prompt, given the prompt."""
        found = super().__new__(cls, text)
        found.source = source
        return found


def source_of(prompt: str | Chat) -> str | Chat:
    """Returns the conversation behind a prompt, or the text of one that has none."""
    return prompt.source if isinstance(prompt, PromptText) else prompt
