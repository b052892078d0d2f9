"""Texts in which a chat template was applied already, as some published data has them."""

import re

# The beginnings of turns in the templates of ChatML, Llama 2 and 3, Gemma, Zephyr, Phi-3, Mistral, Cohere and DeepSeek.
MARK = (
    r"<\|(?:im_start|start_header_id|user|assistant|system|end|start_of_role|START_OF_TURN_TOKEN)\|>"
    r"|<start_of_turn>|\[/?INST\]|\[SYSTEM_PROMPT\]|<\|turn>|<\uff5c(?:User|Assistant)\uff5c>"
)
BOS = (
    r"<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<\|endoftext\|>|<\|startoftext\|>|\[gMASK\](?:<sop>)?"
    r"|<\uff5cbegin\u2581of\u2581sentence\uff5c>"
)
ROLE, START = re.compile(MARK), re.compile(rf"\s*(?:{BOS}|{MARK})")


def is_prerendered(prompt: str) -> bool:
    """Returns whether a text has marks of a template's turns and begins with one, or with BOS: others mention one."""
    if "<" not in prompt and "[" not in prompt:  # every mark has one of them
        return False
    return ROLE.search(prompt) is not None and START.match(prompt) is not None


def without_eos(text: str | None, eos: str) -> str | None:
    """Returns a response without the EOS that ends it and blanks after it."""
    return text.rstrip().removesuffix(eos) if text is not None and text.rstrip().endswith(eos) else text
