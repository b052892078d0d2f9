"""Weights of tokens: from the column to tables, rows and log-probs; packed as alone, 1 as without, 0 as left out."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoConfig
from words import EOS, make_tokenizer

import dpo_jax
from dpo_jax import losses
from dpo_jax.data import pack
from dpo_jax.data.cache import cached_encode, write_table
from dpo_jax.data.encode import encode
from dpo_jax.data.noise import add_mismatched, add_noise, append_token
from dpo_jax.data.sources.columns import comparisons_from_columns
from dpo_jax.data.sources.mapping import map_columns
from dpo_jax.data.table import Table
from dpo_jax.data.template import Template
from dpo_jax.data.token_weights import aligned
from dpo_jax.errors import UserError
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.model import build_model

OPTIONS = {
    "max_length": 12, "max_prompt_length": 5, "truncation": "keep_start", "degenerate": "drop", "add_bos": False,
}  # fmt: skip
TOKENIZER = make_tokenizer(eos_token="<eos>")
ROW = {"prompt": "w1 w2", "chosen": "w41 w42 w43", "rejected": "w61 w62"}
CONFIG = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def table_of(*rows, responses=2, **options):
    items = [item for row in rows for item in comparisons_from_columns("f:1", dict(row), responses)]
    return encode(items, TOKENIZER, **OPTIONS | options)[0]


def weights(table, index=0):
    return [w.tolist() for w in table[index].token_weights]


def test_numbers_and_spans_by_hand():
    assert aligned("f:1", (2.0, 0.5), 2, [], 7) == [2.0, 0.5]
    assert aligned("f:1", (2.0, 0.5, 0.0), 2, [], 7) == [2.0, 0.5, 0.0]
    assert aligned("f:1", (), 2, [], 7) == []
    spans = ((0.0, 4.0, 0.0), (4.0, 6.0, 3.0))
    # Tokens of characters 0-2, 2-5, 5-7, 7-9: the second overlaps both spans, the first one more.
    assert aligned("f:1", spans, 4, [(0, 2), (2, 5), (5, 7), (7, 9)], 9) == [0.0, 0.0, 3.0, 1.0]


def test_a_column_of_numbers_has_eos_at_one():
    table = table_of({**ROW, "token_weights": [[2, 0.5, 1], [1, 1, 3]]})
    assert weights(table) == [[2, 0.5, 1, 1], [1, 1, 3]]
    assert table[0].scored == ()
    assert table[0].responses[1].tolist() == [61, 62, EOS]


def test_a_weight_of_zero_is_an_unscored_token():
    table = table_of({**ROW, "token_weights": [[1, 0, 1], None]})
    assert [m.tolist() for m in table[0].scored] == [[True, False, True, True], [True, True, True]]
    assert table.scored_lengths.tolist() == [6]


def test_weights_of_one_leave_nothing():
    plain, ones = table_of(ROW), table_of({**ROW, "token_weights": [[1, 1, 1], [1, 1]]})
    assert ones[0].token_weights == ones[0].scored == ()
    assert plain.digest == ones.digest
    assert table_of({**ROW, "token_weights": [[2, 1, 1], None]}).digest != plain.digest


def test_spans_are_of_characters():
    spans = [[[4, 7, 0.5], [8, 11, 0]], [[0, 1, 4]]]
    table = table_of({**ROW, "token_weights": spans})
    assert weights(table) == [[1, 0.5, 0, 1], [4, 1, 1]]
    joint = table_of({**ROW, "token_weights": spans, "chosen": " w41 w42 w43"[1:]}, boundary="separate")
    assert weights(joint) == weights(table)


def test_spans_behind_a_prompt_count_from_the_response():
    """Tokenized jointly: 'w1 w2 ' and the response."""
    row = {**ROW, "prompt": "w1 w2 ", "token_weights": [[[4, 7, 0.5]], [[0, 3, 2]]]}
    table = table_of(row, boundary="joint")
    assert table[0].prompt.tolist() == [1, 2]
    assert weights(table) == [[1, 0.5, 1, 1], [2, 1, 1]]


def chat_table(content, spans, written, tokenizer=TOKENIZER):
    """Of a template that writes a turn as `written` has it; the rejected response has no weights."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}" + "{{ m.content }} w9 "
        "{% else %}" + written + "{{ eos_token }}{% endif %}{% endfor %}"
    )  # fmt: skip
    row = {
        "prompt": [{"role": "user", "content": "w1"}],
        "chosen": [{"role": "assistant", "content": content}],
        "rejected": [{"role": "assistant", "content": "w61 w62"}],
        "token_weights": [spans, None],
    }
    items = list(comparisons_from_columns("f:1", row, 2))
    return encode(items, tokenizer, **OPTIONS | {"max_length": 40}, template=Template(source))[0]


@pytest.mark.parametrize(
    ("content", "spans", "written", "expected"),
    [
        ("w41 w42 w43", [[4, 7, 2]], "{{ m.content }}", [1, 2, 1, 1]),
        ("w41 w42 w43", [[4, 7, 2]], "w7 w8 {{ m.content }} w9", [1, 1, 1, 2, 1, 1, 1]),
        # The template trims: spans count the blanks that are gone.
        ("  w41 w42 w43 ", [[2, 5, 3], [6, 9, 2]], "{{ m.content | trim }}", [3, 2, 1, 1]),
        ("  w41 w42 w43 ", [[2, 5, 3], [6, 9, 2]], "w7 {{ m.content | trim }} w8", [1, 3, 2, 1, 1, 1]),
    ],
)
def test_spans_of_a_message_count_from_its_content(content, spans, written, expected):
    assert weights(chat_table(content, spans, written))[0] == expected


def test_a_spelled_special_token_has_as_many_characters_as_are_given():
    """It is one character where texts are tokenized; words are not, so that its characters are tokens here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate("?<eos>w0123456789 ")} | {"<eos>": 98}
    backend = Tokenizer(models.WordLevel(letters, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    content = "1<eos>2"
    table = chat_table(content, [[1, 6, 0.5], [6, 7, 3]], "7{{ m.content }}", tokenizer)
    assert weights(table)[0] == [1, 1, *[0.5] * 5, 3, 1]


@pytest.mark.parametrize(
    "written",
    ["{{ m.content | replace('w41', 'w5') }}", "w41 {{ m.content }} w42 {{ m.content }}", "{{ m.content | upper }}"],
)
def test_spans_of_a_message_that_is_not_in_one_place_are_refused(written):
    with pytest.raises(UserError, match=r"f:1: .* does not write in exactly one place; give a number for each token"):
        chat_table("w41 w42", [[0, 3, 2]], written)


def test_numbers_count_what_a_template_writes():
    assert weights(chat_table("w41 w42", [2, 3, 4], "{{ m.content }} w9"))[0] == [2, 3, 4, 1]
    with pytest.raises(UserError, match=r"2 numbers for a response of 3 tokens; .* chat template's tokens included"):
        chat_table("w41 w42", [2, 3], "{{ m.content }} w9")


def test_a_response_that_truncation_leaves_no_weight_is_dropped_and_counted():
    rows = [{**ROW, "token_weights": column} for column in ([[0, 0, 5], None], [[0, 2, 5], [1, 0.5]])]
    items = [item for row in rows for item in comparisons_from_columns("f:1", row, 2)]
    table, report = encode(items, TOKENIZER, **OPTIONS | {"max_length": 4})
    assert weights(table) == [[0, 2], [1, 0.5]]
    assert (report.read, report.kept, report.unweighted_dropped) == (2, 1, 1)
    lines = report.lines()
    assert "1 dropped: truncation left a response no token with a weight above 0" in lines
    assert lines[-1] == "token weights: 2 of 2 responses, mean 0.875"
    # Lengths are checked before.
    with pytest.raises(UserError, match="4 numbers for a response of 2 tokens"):
        table_of({**ROW, "token_weights": [None, [1, 1, 1, 1]]}, max_length=4)


def test_a_report_tells_how_many_responses_have_weights(tmp_path):
    rows = [{**ROW, "token_weights": [[0.5, 1, 0], [1, 1]]}, {**ROW, "prompt": "w7"}]
    items = [item for row in rows for item in comparisons_from_columns("f:1", row, 2)]
    for _ in range(2):  # encoded, and from the cache
        _, report = cached_encode(items, TOKENIZER, tmp_path, **OPTIONS)
        assert report.lines()[-1] == "token weights: 1 of 4 responses, mean 0.625"
    assert not any(
        "token weights" in line for line in cached_encode(items[1:], TOKENIZER, tmp_path, **OPTIONS)[1].lines()
    )


def test_a_cut_response_keeps_the_weights_of_its_tokens():
    table = table_of({**ROW, "token_weights": [[2, 3, 4], [5, 6]]}, max_length=4)
    assert weights(table) == [[2, 3], [5, 6]]


def test_single_and_unpaired_responses():
    single = {"prompt": "w1", "completion": "w41 w42", "token_weights": [3, 1]}
    assert weights(table_of(single, responses=1)) == [[3, 1, 1]]
    assert weights(table_of({**ROW, "token_weights": [[2, 1, 1], [7, 7]]}, responses=1)) == [[2, 1, 1, 1]]
    for label, expected in {True: [[3, 1, 1], []], False: [[], [3, 1, 1]]}.items():
        assert weights(table_of(single | {"label": label})) == expected


def test_a_table_on_disk_keeps_them(tmp_path):
    rows = [ROW, {**ROW, "token_weights": [[2, 0, 1], None]}, {**ROW, "token_weights": [[1, 1, 5], [1, 2]]}]
    table = table_of(*rows)
    write_table(tmp_path, (table[i] for i in range(3)))
    stored = Table.open(tmp_path)
    for i in range(3):
        assert weights(stored, i) == weights(table, i)
        assert weights(table.take(np.array([2, 1, 0])), 2 - i) == weights(table, i)
    assert stored.digest == table.digest


def test_other_weights_of_the_same_texts_are_encoded_again(tmp_path):
    for column in ([[2, 1, 1], None], [[3, 1, 1], None], None):
        items = list(comparisons_from_columns("f:1", {**ROW, "token_weights": column}, 2))
        table, _ = cached_encode(items, TOKENIZER, tmp_path, **OPTIONS)
        assert weights(table) == ([[*column[0], 1], [1, 1, 1]] if column else [])


def test_a_flipped_pair_and_a_response_to_another_prompt():
    row = {**ROW, "token_weights": [[2, 1, 1], [3, 1]]}
    (item,) = comparisons_from_columns("f:1", row, 2)
    *_, flipped = add_noise([item], flip=1.0, draw_labels=False, duplicate=0.0, seed=0)  # after a note
    assert flipped.token_weights == item.token_weights[::-1]
    table = table_of(row, {**ROW, "prompt": "w5"})
    first, second = add_mismatched(table, 12, Counter())
    assert [w.tolist() for w in first.token_weights] == [[2, 1, 1, 1], [3, 1, 1], [1, 1, 1, 1]]
    assert [w.tolist() for w in second.token_weights] == [[1, 1, 1, 1], [1, 1, 1], [2, 1, 1, 1]]


@pytest.mark.parametrize(
    ("span", "expected"),
    [([4, 7, 2], [1, 2, 1]), ([4, 14, 2], [1, 2, 2]), ([8, 13, 0.5], [1, 1, 0.5])],
)
def test_spans_of_a_prerendered_text_count_its_own_eos(span, expected):
    """It is taken off and added again as a token; blanks behind it are characters of the response too."""
    row = {"prompt": "[INST] w1 [/INST]", "chosen": "w41 w42 <eos> ", "rejected": "w61 w62 <eos>"}
    assert weights(table_of({**row, "token_weights": [[span], None]}))[0] == expected
    with pytest.raises(UserError, match="has a span 0 to 15 of a response of 14 characters"):
        table_of({**row, "token_weights": [[[0, 15, 2]], None]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 1], [1, 1]], "'token_weights' has 2 numbers for a response of 3 tokens; give one per token"),
        ([1, 1], "must be lists of numbers, or of"),
        ([[1, 1, 1]], "must be 2 lists, one for each response"),
        ([[1, -1, 1], None], "'token_weights' must be finite and not negative, not -1"),
        ([[[0, 3]], None], "a span of 'token_weights' must be \\[first, end, weight\\]"),
        ([[[0, 99, 1]], None], "has a span 0 to 99 of a response of 11 characters"),
        ([[[0, 3, 1], 2], None], "must be lists of numbers, or of"),
        ([[0, 0, 0, 0], None], "leaves no token of a response; give one a weight above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=f"f:1: .*{message}"):
        table_of({**ROW, "token_weights": given})


def test_rankings_and_reward_models_refuse_them():
    ranking = {"prompt": "w1", "completions": ["w41", "w61"], "scores": [2, 1], "token_weights": [[2], [1]]}
    with pytest.raises(UserError, match="for pairs and single responses, not for rankings"):
        table_of(ranking)
    with pytest.raises(UserError, match="no meaning for a reward model; remove the column"):
        list(append_token(table_of({**ROW, "token_weights": [[2, 1, 1], None]}), EOS, 0))


def test_weights_do_not_follow_a_winner():
    row = {"prompt": "w1", "a": "w41", "b": "w61", "winner": "a", "token_weights": [[2], [1]]}
    with pytest.raises(UserError, match="'token_weights' are of chosen and rejected; name those"):
        map_columns("f:1", row, {"first": "a", "second": "b", "winner": "winner=a,b"})


# Log-probs.


@pytest.fixture(scope="module")
def model():
    made = build_model(architecture_of(AutoConfig.for_model("llama", **CONFIG).to_dict()))
    return made, jax.jit(made.init)(jax.random.key(0))


def logps(model, table, indices):
    """Log-probs of comparisons packed together, in their order."""
    layout = pack.Layout(1, 1, 64, len(indices), 64)
    batch, _, places = pack.build_batch(table, indices, layout)
    found = batch_logps(*model, jax.tree.map(lambda x: jnp.asarray(x[0]), batch))
    found = found._replace(mass=found.lengths if isinstance(found.mass, tuple) else found.mass)
    names = ("policy", "policy_shared", "lengths", "mass")
    return {name: np.asarray(getattr(found, name))[places[:, 2]] for name in names}


def by_token(model, tokens, p):
    """log pi of each token of a response, float64, of prompt and response alone."""
    made, params = model
    ids = np.concatenate([tokens.prompt, tokens.responses[p]])[None]
    hidden = made.hidden(params, ids, np.arange(ids.shape[1])[None], np.ones_like(ids), np.zeros_like(ids))
    logits = np.asarray(jnp.einsum("rtd,vd->rtv", hidden, made.head(params)), np.float64)[0]
    each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return each[len(tokens.prompt) - 1 : -1][np.arange(len(tokens.responses[p])), tokens.responses[p]]


@pytest.mark.slow
def test_packed_log_probs_are_weighted_sums_of_those_alone(model):
    table = table_of(
        {**ROW, "token_weights": [[2, 0, 0.5], [1, 3]]},
        ROW,
        {**ROW, "prompt": "w7", "token_weights": [None, [0, 0.25]]},
    )
    found = logps(model, table, [0, 1, 2])
    for i in range(3):
        alone = logps(model, table, [i])
        for p in (0, 1):
            factors = table[i].weights_of(p).astype(np.float64)
            np.testing.assert_allclose(found["policy"][i, p], (factors * by_token(model, table[i], p)).sum(), rtol=1e-5)
            assert found["mass"][i, p] == pytest.approx(factors.sum())
            assert found["lengths"][i, p] == (factors > 0).sum()
            np.testing.assert_allclose(found["policy"][i, p], alone["policy"][0, p], rtol=1e-6)
    # The shared part is that of scored tokens: three of each response of the first comparison.
    factors, each = np.array([2, 0.5, 1.0]), by_token(model, table[0], 0)[[0, 2, 3]]
    np.testing.assert_allclose(found["policy_shared"][0, 0], (factors * each).sum(), rtol=1e-5)


def test_weight_one_is_unweighted_and_weight_zero_is_left_out(model):
    """Beside a comparison with weights, so that the batch has them."""
    other = {**ROW, "prompt": "w9", "token_weights": [[2, 2, 2], None]}
    plain = logps(model, table_of(ROW), [0])
    beside = logps(model, table_of(ROW, other), [0, 1])
    for name in plain:
        np.testing.assert_array_equal(plain[name][0], beside[name][0])
    almost = logps(model, table_of({**ROW, "token_weights": [[1, 1e-6, 1], None]}), [0])
    masked = logps(model, table_of({**ROW, "token_weights": [[1, 0, 1], None]}), [0])
    assert (almost["lengths"] - masked["lengths"]).tolist() == [[1, 0]]
    for name in ("policy", "mass"):
        np.testing.assert_allclose(almost[name], masked[name], rtol=1e-5)


FEW = {**ROW, "token_weights": [[0.1, 0, 0.2, 0.1], [0.25, 0, 0]]}  # three tokens and one, of weights below 1 in all


def test_means_are_over_weights_that_sum_to_less_than_one():
    policy, mass = np.array([[-1.0, -2.0]]), np.array([[0.4, 0.25]])
    lp = losses.Logps.of(policy, policy, lengths=[[3.0, 1.0]], mass=mass)
    means = policy / mass
    assert losses.sft(lp, reduction="mean")[0] == pytest.approx(2.5)
    margin = 2 * (means[0, 0] - means[0, 1]) - 0.5
    assert losses.build("simpo").values(lp)[0] == pytest.approx(np.log1p(np.exp(-margin)))
    assert losses.build("dpo").metrics(lp)["nll"][0] == pytest.approx(2.5)
    # A soft label swaps them with their responses.
    swapped = losses.Logps.of(policy[:, ::-1], lengths=[[1.0, 3.0]], mass=mass[:, ::-1])
    half = losses.build("simpo").values(lp._replace(preference=np.array([0.5])))[0]
    assert half == pytest.approx(np.mean([losses.build("simpo").values(x)[0] for x in (lp, swapped)]))


def test_means_over_lengths_below_one_are_means_without_a_mass():
    lp = losses.Logps.of([[-1.0, -2.0]], lengths=[[0.5, 0.0]])
    assert losses.sft(lp, reduction="mean")[0] == pytest.approx(2.0)
    assert np.isfinite(losses.simpo(lp)).all()


def test_lengths_are_numbers_of_tokens_whatever_their_weights(model):
    """In r_dpo, in the target `length` and in metrics."""
    made, params = model
    batch, count = dpo_jax.collate(table_of(FEW), [0])
    batch = dpo_jax.with_reference(made, params, batch, count)
    lp = batch_logps(made, params, jax.tree.map(lambda x: jnp.asarray(x[0]), batch))
    losses_of_length = {
        "r_dpo": losses.build({"name": "r_dpo", "alpha": 0.5}),
        "axes": losses.build({"score": "log_ratio", "target": "length", "scale": 0.5}),
    }
    for loss in losses_of_length.values():
        np.testing.assert_allclose(loss.values(lp)[0], np.log1p(np.exp(-0.5 * (3 - 1))), rtol=1e-5)
    metrics = losses.build("dpo").metrics(lp)
    assert [metrics[f"lengths/{which}"][0] for which in ("chosen", "rejected")] == [3, 1]


def test_lengths_and_weights_of_a_step_are_those_of_its_microbatches(model):
    """Two microbatches, one of them without weights, in a train step of a loss that looks across comparisons or not."""
    made, params = model
    table = table_of(FEW, {**ROW, "prompt": "w9"})
    layout, loss = pack.Layout(2, 1, 16, 1, 16), losses.build({"name": "sft", "reduction": "mean"})
    batch, count, places = pack.build_batch(table, [0, 1], layout)
    assert count == 2
    lp = dpo_jax.sequence_logps(made, params, batch)
    order = places[:, 0]
    assert np.asarray(lp.lengths)[order].tolist() == [[3, 1], [4, 3]]
    np.testing.assert_allclose(np.asarray(lp.mass)[order], [[0.4, 0.25], [4, 3]], rtol=1e-6)
    step = jax.jit(dpo_jax.make_eval_step(made, losses.build("simpo")))
    nll = np.asarray(step(params, batch, count)["nll"]).ravel()[order]
    np.testing.assert_allclose(nll, -np.asarray(lp.policy / lp.mass)[order, 0], rtol=1e-6)
    assert np.asarray(loss.values(losses.Logps.of(lp.policy[:, :1], lengths=lp.lengths[:, :1], mass=lp.mass[:, :1])))[
        order
    ] == pytest.approx(nll)


def test_losses_start_where_they_do_without_weights(model):
    """The reference's log-probs have the same weights; per-token losses divide by the sum of weights."""
    made, params = model
    table = table_of({**ROW, "token_weights": [[2, 0, 0.5], [1, 3]]})
    batch, count = dpo_jax.collate(table, [0])
    batch = dpo_jax.with_reference(made, params, batch, count)
    lp = batch_logps(made, params, jax.tree.map(lambda x: jnp.asarray(x[0]), batch))
    c = (np.array([2, 0, 0.5, 1]) * by_token(model, table[0], 0)).sum() / 3.5
    r = (np.array([1, 3, 1]) * by_token(model, table[0], 1)).sum() / 5
    expected = {"dpo": np.log(2), "simpo": np.log1p(np.exp(0.5 - 2 * (c - r)))}
    for name, value in expected.items():
        np.testing.assert_allclose(losses.build(name).values(lp)[0], value, rtol=1e-5)
