"""Reward models against those of transformers: scores, gradients, folders; refusals."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from loss_table import batch_of
from test_losses_trl import stand_in
from tiny import _ARGUMENTS, _IDS, EOS, folder_of, largest_difference
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo_jax import losses
from dpo_jax.config.schema import DataConfig, LoraConfig
from dpo_jax.config.schema import ModelConfig as ModelOptions
from dpo_jax.data import pack
from dpo_jax.data.noise import append_token
from dpo_jax.data.sources import synthetic
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.logprobs import batch_rewards
from dpo_jax.models import reward_head
from dpo_jax.models.families.registry import families, family
from dpo_jax.models.huggingface.folder import load_folder, open_folder
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.rewards.registry import get_reward
from dpo_jax.training.load import load_policy

PAD = 0
ENCODING = {
    k: getattr(DataConfig(), k) for k in ("max_length", "max_prompt_length", "truncation", "add_bos", "boundary")
}
FAMILIES = ("llama", "gpt2", "gptj", "opt", "gemma2")  # their heads: untied, tied, with a bias; a prefix; a cap


class Words:
    """The least of a tokenizer that a model folder's ids need."""

    eos_token_id, pad_token_id, bos_token_id = EOS, PAD, 1
    name_or_path = ""

    def get_vocab(self):
        return {f"w{i}": i for i in range(128)}

    def save_pretrained(self, folder):
        del folder


def torch_reward_model(family, folder=None):
    """Returns a random reward model of transformers, or that of a folder, which it fits exactly."""
    if folder is not None:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()
    config = AutoConfig.for_model(family, **{**_IDS, **_ARGUMENTS[family], "num_labels": 1})
    config._attn_implementation = "eager"  # noqa: SLF001 (the only way before the model is made)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns `family -> folder of a random reward model that transformers has saved`."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("rewards") / family
            torch_reward_model(family).save_pretrained(made[family])
        return made[family]

    return get


def comparisons(n=7, responses=2, seed=0):
    """Random comparisons, of which some responses end with EOS and some do not."""
    draw = np.random.default_rng(seed)

    def ids(most):
        return draw.integers(3, 128, draw.integers(1, most)).astype(np.int32)

    def response():
        return np.append(ids(12), EOS).astype(np.int32) if draw.random() < 0.6 else ids(12)

    return [Tokens(ids(9), tuple(response() for _ in range(responses))) for _ in range(n)]


def by_torch(model, rows):
    """Rewards of every response, tensor[n, P], in one batch that is padded as users pad."""
    texts = [np.concatenate([row.prompt, response]) for row in rows for response in row.responses]
    longest = max(map(len, texts))
    pad = model.config.pad_token_id
    tokens = torch.tensor(np.array([np.pad(t, (0, longest - len(t)), constant_values=pad) for t in texts]))
    mask = torch.tensor(np.array([np.arange(longest) < len(t) for t in texts])).long()
    return model(input_ids=tokens, attention_mask=mask).logits.reshape(len(rows), -1)


def laid_out(rows, pad=PAD):
    """The rows as one microbatch of several to a row, and where each is."""
    table = Table.of(append_token(Table.of(rows), EOS, pad))
    batch, _, places = pack.build_batch(table, range(len(rows)), pack.Layout(1, 4, 96, 4, 96))
    return jax.tree.map(lambda x: x[0], batch), places


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_transformers(folders, family):
    """Several comparisons to a row, prompts shared, against each text alone in a padded batch."""
    rows = comparisons()
    architecture, _, params = load_folder(folders(family))
    batch, places = laid_out(rows)
    found = batch_rewards(build_model(architecture), params, batch)
    with torch.no_grad():
        wanted = by_torch(torch_reward_model(family, folders(family)), rows).numpy()
    policy = pack.unpack_batch(np.asarray(found.policy).reshape(1, *batch.scores.shape), places)
    np.testing.assert_allclose(policy, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 0.1
    lengths = pack.unpack_batch(np.asarray(found.lengths).reshape(1, *batch.scores.shape), places)
    np.testing.assert_array_equal(lengths, [[len(r) for r in row.responses] for row in rows])
    assert found.present.sum() == 14


def test_a_family_of_which_transformers_has_no_reward_model_is_refused():
    with pytest.raises(UserError, match="GraniteForSequenceClassification is not in transformers; train"):
        reward_head.reward_class("GraniteForCausalLM")


def test_absent_responses_have_no_reward(folders):
    rows = comparisons(3)
    rows[1] = rows[1]._replace(responses=(np.zeros(0, np.int32), rows[1].responses[1]))
    architecture, _, params = load_folder(folders("llama"))
    batch, places = laid_out(rows)
    found = batch_rewards(build_model(architecture), params, batch)
    shape = (1, *batch.scores.shape)
    present = pack.unpack_batch(np.asarray(found.present).reshape(shape), places)
    np.testing.assert_array_equal(present, [[True, True], [False, True], [True, True]])
    policy = pack.unpack_batch(np.asarray(found.policy).reshape(shape), places)
    assert policy[1, 0] == 0
    with torch.no_grad():
        wanted = by_torch(torch_reward_model("llama", folders("llama")), rows).numpy()
    np.testing.assert_allclose(policy[present], wanted[present], atol=1e-4)


def test_the_gradient_of_the_loss_is_that_of_torch(folders):
    """Of -log sigmoid(r_c - r_r) + 0.1 (r_c + r_r)^2, by every parameter."""
    rows = comparisons()
    architecture, config, params = load_folder(folders("llama"))
    model, loss = build_model(architecture), losses.build({"name": "bradley_terry", "center": 0.1})
    batch, _ = laid_out(rows)

    def mean(params):
        lp = batch_rewards(model, params, batch)
        return (lp.weights * loss.values(lp)).sum() / lp.weights.sum()

    value, slopes = jax.jit(jax.value_and_grad(mean))(params)
    theirs = torch_reward_model("llama", folders("llama"))
    chosen, rejected = by_torch(theirs, rows).T
    wanted = (-torch.nn.functional.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).mean()
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), abs=1e-5)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert largest_difference(slopes["score"], gradients["score.weight"]) < 1e-4
    assert largest_difference(slopes["embedding"], gradients["model.embed_tokens.weight"]) < 1e-4
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_language_model_becomes_a_reward_model_that_transformers_loads(family, tmp_path):
    """The new head is small and random, and the rest is the language model's; both give the same scores."""
    options = ModelOptions(path=str(folder_of(family, tmp_path / "base")))
    loaded = load_policy(options, Words(), 3, None, ENCODING)
    assert "becomes " in loaded.note
    params = load_into_memory(loaded.params)
    assert params["score"].shape == (1, 32)
    assert 0.5 < params["score"].std() * math.sqrt(33) < 1.5
    assert not {"head", "head_bias"} & set(params)
    loaded.save(loaded.params, tmp_path / "out", Words())
    theirs = torch_reward_model(family, tmp_path / "out")
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == PAD
    rows = comparisons()
    batch, places = laid_out(rows)
    found = batch_rewards(loaded.model, params, batch).policy
    policy = pack.unpack_batch(np.asarray(found).reshape(1, *batch.scores.shape), places)
    with torch.no_grad():
        np.testing.assert_allclose(policy, by_torch(theirs, rows).numpy(), atol=1e-4)
    again = load_policy(ModelOptions(path=str(tmp_path / "out")), Words(), 4, None, ENCODING)
    assert again.note == ""
    jax.tree.map(np.testing.assert_array_equal, load_into_memory(again.params), params)


def test_a_random_reward_model_has_the_same_head(tmp_path):
    config = AutoConfig.for_model("llama", **{**_IDS, **_ARGUMENTS["llama"]}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_policy(ModelOptions(config=str(tmp_path)), Words(), 0, None, ENCODING)
    assert loaded.params["score"].shape == (1, 32)
    assert 0.5 < loaded.params["score"].std() * math.sqrt(33) < 1.5
    assert "head" not in loaded.params


def test_ended_puts_a_token_after_each_response_but_for_one_that_ends_in_padding():
    absent = np.zeros(0, np.int32)
    rows = [
        Tokens(np.array([5, 6]), (np.array([7, EOS]), np.array([8]))),
        Tokens(np.array([9]), (absent, np.array([10, 11])), 0.5, scores=(0.0, 2.0)),
    ]
    table = Table.of(append_token(Table.of(rows), EOS, PAD))
    assert [[r.tolist() for r in table[i].responses] for i in (0, 1)] == [[[7, 2, 2], [8, 2]], [[], [10, 11, 2]]]
    assert [table[i].prompt.tolist() for i in (0, 1)] == [[5, 6], [9]]
    assert table[1].weight == 0.5
    assert table[1].scores == (0.0, 2.0)
    same = Table.of(append_token(Table.of(rows), EOS, EOS))  # where EOS is padding, it ends the text before it
    assert [[r.tolist() for r in same[i].responses] for i in (0, 1)] == [[[7, 2], [8, 2]], [[], [10, 11, 2]]]


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_where_eos_is_padding_the_token_before_it_is_scored(folders, pad, tmp_path):
    """As transformers finds it: the rightmost token that is not padding, which is EOS only if that is not."""
    rows = comparisons(5, responses=1)
    theirs = torch_reward_model("gpt2", folders("gpt2"))
    theirs.config.pad_token_id = pad
    architecture, _, params = load_folder(folders("gpt2"))
    batch, places = laid_out(rows, pad)
    found = batch_rewards(build_model(architecture), params, batch).policy
    policy = pack.unpack_batch(np.asarray(found).reshape(1, *batch.scores.shape), places)
    with torch.no_grad():
        np.testing.assert_allclose(policy, by_torch(theirs, rows).numpy(), atol=1e-4)


@pytest.mark.parametrize("center", [None, 0.3])
def test_the_loss_is_that_of_trls_reward_trainer(center):
    from trl.trainer.reward_trainer import RewardTrainer

    values = np.random.default_rng(0).normal(0, 2, (5, 2)).astype(np.float32)
    given = torch.tensor(values.T.ravel(), requires_grad=True)

    class Answering(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=given[:, None])

    trainer = stand_in(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center), model=Answering())
    wanted = trainer.compute_loss(trainer.model, {"attention_mask": torch.ones(10, 3)})
    wanted.backward()
    loss, lp = losses.build({"name": "bradley_terry", "center": center or 0.0}), batch_of(values)
    value, slope = jax.value_and_grad(lambda p: loss.values(lp._replace(policy=p)).mean())(lp.policy)
    assert float(value) == pytest.approx(wanted.item(), abs=1e-6)
    np.testing.assert_allclose(slope.T.ravel(), given.grad, atol=1e-6)


def test_metrics_are_of_rewards():
    found = losses.build({"name": "bradley_terry"}).metrics(batch_of([[1.5, -0.5], [0.0, 1.0], [2.0, 2.0]]))
    assert set(found) == {
        "loss", "lengths/chosen", "lengths/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "gradient_weight",
    }  # fmt: skip
    np.testing.assert_allclose(found["rewards/accuracies"], [1.0, 0.0, 0.5])
    np.testing.assert_allclose(found["rewards/margins"], [2.0, -1.0, 0.0])
    np.testing.assert_allclose(found["rewards/rejected"], [-0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([{"name": "bradley_terry"}, {"name": "sft"}], "bradley_terry, sft: one is of a reward model, another of a"),
        ([{"name": "dpo"}, {"name": "bradley_terry"}], "dpo, bradley_terry: one is of a reward model"),
        ({"name": "bradley_terry", "ld_alpha": 0.5}, "ld_alpha 0.5 cannot be used"),
        ({"name": "bradley_terry", "wpo": True}, "wpo True cannot be used"),
        ({"name": "bradley_terry", "reference_free": True}, "it has no reference anyway"),
        ({"name": "bradley_terry", "divergence": "js"}, "divergence js cannot be used"),
    ],
)
def test_a_reward_models_loss_goes_with_no_other(loss, message):
    with pytest.raises(UserError, match=message):
        losses.build(loss)


def test_models_of_the_wrong_kind_are_refused(folders, tmp_path):
    reward, language = folders("llama"), folder_of("llama", tmp_path / "language")
    with pytest.raises(UserError, match="llama: a reward model generates no text"):
        load_policy(ModelOptions(path=str(reward)), Words(), 0)
    with pytest.raises(UserError, match=r"lora: adapters cannot train the head of a reward model; remove"):
        load_policy(ModelOptions(path=str(reward)), Words(), 0, LoraConfig(rank=4), ENCODING)
    config = json.loads((reward / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "a", "1": "b", "2": "c"}, {"a": 0, "b": 1, "c": 2}
    (reward.parent / "three").mkdir()
    (reward.parent / "three" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a classifier of 3 labels; a reward model has one"):
        open_folder(reward.parent / "three")
    synthetic.synthetic_tokenizer().save_pretrained(language)
    with pytest.raises(UserError, match="language: a language model, not a reward model"):
        get_reward(f"model:{language}")


def test_class_names_are_those_of_transformers():
    import transformers

    refused = set()
    for model_type in families():
        try:
            name = reward_head.reward_class(family(model_type).CLASS)
        except UserError:
            refused.add(model_type)
        else:
            assert hasattr(transformers, name), name
    # Of which transformers has none.
    assert refused == {"cohere2", "gemma4_text", "glm4_moe", "granite", "granitemoe", "olmoe", "qwen3_5_moe_text"}
