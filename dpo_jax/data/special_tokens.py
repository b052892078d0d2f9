"""Special tokens of a tokenizer, and where they may stand."""

from typing import Any, NamedTuple

from dpo_jax.data.truncate import Ids
from dpo_jax.errors import UserError
from dpo_jax.records import Chat


class SpecialTokens(NamedTuple):
    """Special tokens of a tokenizer, looked up once per pass because transformers is slow to find them.

    Attributes:
      eos, bos: ids; `bos` is None if there is none.
      unk: the id for text without a token; None if there is none, or if it is EOS.
      eos_token, bos_token: their texts.
      adds_bos: whether the tokenizer puts BOS before a text by itself.
    """

    eos: int
    bos: int | None
    unk: int | None
    eos_token: str
    bos_token: str
    adds_bos: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Returns the special tokens of a tokenizer."""
        eos, bos, unk = (getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "bos", "unk"))
        adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        return cls(eos, bos, None if unk == eos else unk, tokenizer.eos_token, tokenizer.bos_token, adds_bos)

    def bos_before(self, prompt: Any, add_bos: bool | None) -> bool:
        """Returns whether BOS goes before this prompt; `add_bos` is None if the tokenizer decides."""
        if add_bos is not None:
            return add_bos
        return self.adds_bos and not isinstance(prompt, Chat)


def check_special_ids(
    where: str, prompt: Ids, responses: list[Ids], special: SpecialTokens, bos: bool, templated: bool, turns: bool
) -> None:
    """Refuses EOS or BOS in the middle of a text, and a prompt without tokens.

    Args:
      where: names the example, for errors.
      prompt, responses: their ids, without BOS and EOS around them.
      special: the tokenizer's special tokens.
      bos: whether BOS will be put before the prompt.
      templated: whether a chat template wrote the text.
      turns: whether responses have several turns.

    Raises:
      UserError: a text contains a special token, or the prompt has no tokens.
    """
    for number, ids in enumerate([prompt, *responses]):
        part = f"response {number}" if number else "the prompt"
        # A chat template ends the turns of a prompt with EOS; in plain text EOS can only be a mistake.
        if (not turns if number else not templated) and special.eos in ids:
            raise UserError(f"{where}: {part} contains the EOS token {special.eos_token!r}; remove it from the text")
        if number and not turns and special.bos in ids and special.bos != special.eos:
            raise UserError(f"{where}: {part} contains the BOS token {special.bos_token!r}; remove it from the text")
    if not prompt and not bos:
        raise UserError(f"{where}: the prompt has no tokens, so nothing predicts a response's first; set data.add_bos")
