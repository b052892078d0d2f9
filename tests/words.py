"""A tokenizer of numbered words, and comparisons of so many of them."""

from dpo_jax.records import Comparison

OPTIONS = {
    "max_length": 10,
    "max_prompt_length": 4,
    "truncation": "paper_keep_end",
    "degenerate": "drop",
    "add_bos": False,
}
EOS, BOS = 98, 99


def make_tokenizer(**special):
    """Words w0 to w97 have their number as id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(98)} | {"<eos>": EOS, "<bos>": BOS}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def words(start, count):
    return " ".join(f"w{i}" for i in range(start, start + count))


def pair(prompt, chosen, rejected, **fields):
    """A comparison of so many tokens: the prompt from w1 on, the responses from w41 and w61 on."""
    return Comparison(words(1, prompt), (words(41, chosen), words(61, rejected)), **{"where": "f:1", **fields})


def ids(start, count, eos=True):
    return [*range(start, start + count), *([EOS] if eos else [])]


def lists(tokens):
    return [tokens.prompt.tolist(), *(response.tolist() for response in tokens.responses)]


BOTH_LONG = (9, 7, 6)  # tokens of prompt, chosen and rejected, of which none fits: 9 + 8 = 17
