"""Settings of config.json that transformers knows by two names: either is read, and two that differ are refused."""

import pytest
from test_families import CONFIGS

from dpo_jax.errors import UserError
from dpo_jax.models.families import gpt2
from dpo_jax.models.families.registry import architecture_of

NAMES = {
    "bloom": (("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads")),
    "falcon": (("hidden_size", "n_embed"),),
    "gpt2": (*gpt2.SIZES, gpt2.POSITIONS),
    "gpt_neo": (("num_heads", "num_attention_heads"), ("num_layers", "num_hidden_layers")),
    "gptj": (*gpt2.SIZES, gpt2.POSITIONS),
}
EACH = [(kind, *names) for kind, pairs in NAMES.items() for names in pairs]


@pytest.mark.parametrize(("kind", "first", "second"), EACH)
def test_either_name_is_read(kind, first, second):
    given = {"model_type": kind, "n_positions": 64, **CONFIGS[kind]} if first == "n_positions" else CONFIGS[kind]
    given = {"model_type": kind, **given}
    renamed = {second if key == first else key: value for key, value in given.items()}
    assert renamed != given
    assert architecture_of(renamed) == architecture_of(given | renamed) == architecture_of(given)


@pytest.mark.parametrize(("kind", "first", "second"), EACH)
def test_two_that_differ_are_refused(kind, first, second):
    with pytest.raises(UserError, match=rf"config.json: {first} = 8, but {second} = 4; keep one of them"):
        architecture_of({"model_type": kind, **CONFIGS[kind], first: 8, second: 4})


@pytest.mark.parametrize(("kind", "first", "second"), EACH)
def test_these_are_the_two_names_of_transformers(kind, first, second):
    from transformers import AutoConfig

    plain = AutoConfig.for_model(kind)
    if plain.attribute_map.get(second) != first:  # an argument under the old name of released files
        assert getattr(AutoConfig.for_model(kind, **{second: 8}), first) == 8 != getattr(plain, first)
