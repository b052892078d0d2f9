"""Hostile configs, models, data and run folders: refused with a one-line error, without any effect."""

import json
import struct

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config, DataConfig, ModelConfig
from dpo_jax.config.yaml import dump, read_yaml
from dpo_jax.data.sources.base import open_stream
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import load_folder, read_config
from dpo_jax.models.huggingface.safetensors import INDEX, WEIGHTS, weight_files
from dpo_jax.pages.run import write_report
from dpo_jax.training import setup
from dpo_jax.training.checkpoint import checkpoint_problem
from dpo_jax.training.run_folder import claim_folder

# Model folders.

ELSEWHERE = ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "weights.bin"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_names_files_beside_it_only(tmp_path, name):
    (tmp_path / "model").mkdir()
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=r"index.json: names .* which is no safetensors file beside it"):
        weight_files(tmp_path / "model")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"x": 1}}])
def test_an_index_without_files_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map must name a file for each tensor"):
        weight_files(tmp_path)


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "of gigabytes": struct.pack("<Q", 2**32) + b"{" * 100,
    "with offsets outside": None,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie_are_refused(tmp_path, kind):
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}
    header = json.dumps({"transformer.wte.weight": tensor}).encode()
    content = HEADERS[kind] or struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / WEIGHTS).write_bytes(content)
    sizes = {"vocab_size": 8, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        load_folder(tmp_path)


def test_a_header_with_an_unknown_dtype_is_one_line(tmp_path):
    """The library's message has several. Found by scripts/fuzz."""
    header = json.dumps({"x": {"dtype": "\n`", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    sizes = {"vocab_size": 8, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    with pytest.raises(UserError, match=r"is damaged or no safetensors file \(.*\); download it again") as told:
        load_folder(tmp_path)
    assert "\n" not in str(told.value)


def test_elements_of_a_list_are_counted_by_decimals(tmp_path):
    (tmp_path / "x.yaml").write_text("loss: {'²': {name: dpo}}")
    with pytest.raises(UserError, match=r"unknown key 'loss\.²\.name'"):
        parse_config(Config, str(tmp_path / "x.yaml"), [], prog="x")


def test_json_nested_beyond_measure_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_config(tmp_path)


# Configs.


def test_a_yaml_bomb_is_refused_at_its_first_alias(tmp_path):
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(["l0: &l0 [lol]", *levels]))
    with pytest.raises(UserError, match=r"bomb.yaml:2: alias \*l0: write the value out"):
        read_yaml(tmp_path / "bomb.yaml")


HOSTILE = {
    "runs code": ("!!python/object/apply:os.system [id]", "not YAML"),
    "nests": ("[" * 50_000, "not YAML"),
    "is no text": (b"\xff\xfe\x00\xd8\x00", "cannot be read"),
    "merges": ("a: &a {b: 1}\nc:\n  <<: *a", "3: alias"),
    "has a mapping for a key": ("{[1]: 2}", "not YAML"),
    "has a number without end": ("seed: 0x" + "f" * 5000, "not YAML"),
    "has a tag that does not fit": ("seed: !!bool foo", "not YAML"),
    "has a time that is none": ("seed: !!timestamp foo", "not YAML"),
    "has an empty number": ('seed: !!int ""', "not YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_config_that(tmp_path, kind):
    text, message = HOSTILE[kind]
    (tmp_path / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as told:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(told.value)


SECRETS = [
    Config(data=DataConfig(path=("https://me:secret@example.com/x.jsonl",))),
    Config(model=ModelConfig(path="hf_" + "abcdefghijklmnopqrstuvwxyz")),
    Config(run="ghp_" + "a1" * 18),
]


@pytest.mark.parametrize("settings", SECRETS)
def test_secrets_are_refused_before_anything_is_written_and_not_repeated(settings):
    with pytest.raises(UserError, match="holds a password or token") as told:
        setup.check_config(settings)
    assert not any(word in str(told.value) for word in ("secret", "abcdef", "a1a1"))
    setup.check_config(Config(data=DataConfig(path=("https://example.com:8080/a@b.jsonl", "gs://bucket/hf_data/x"))))


ODD = {
    "seed": ({"seed": -1}, "seed must be >= 0, got -1"),
    "eval_examples": ({"data": DataConfig(eval_examples=0)}, r"data\.eval_examples must be at least 1, got 0"),
}


@pytest.mark.parametrize("key", ODD)
def test_values_without_a_meaning_are_refused_by_key(key):
    with pytest.raises(UserError, match=ODD[key][1]):
        setup.check_config(Config(**ODD[key][0]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", "9223372036854775807"], r"batch_size: 9223372036854775807 is beyond 2,147,483,648"),
        (["--seed", "2147483648"], "seed: 2147483648 is beyond"),
        (["--data.chat_template", "a\0b"], r"data\.chat_template: holds a null byte; remove it"),
        (["--data.path", "a", "b\0"], r"data\.path: holds a null byte"),
    ],
)
def test_values_that_nothing_can_hold_are_refused_by_key(argv, message):
    with pytest.raises(UserError, match=message):
        parse_config(Config, None, argv, prog="x")


# Run folders.


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "checkpoints/4", "model", "winrate/a", ".lock"])
def test_links_out_of_a_run_folder_are_refused(tmp_path, name):
    run, outside = tmp_path / "run", tmp_path / "outside"
    settings = Config(run=str(run), optim={"name": "rmsprop", "learning_rate": 1e-6})
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump(parse_config(Config, None, [], prog="x")))
    outside.mkdir()
    if name == "checkpoints":
        (run / "checkpoints").rmdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match=r"a link that leads out of the run folder, .*outside; remove it"):
        claim_folder(settings, {})
    assert list(outside.iterdir()) == []


def test_manifests_cannot_list_files_elsewhere(tmp_path):
    """A manifest that lists a file outside of its checkpoint, with that file's own checksum."""
    folder = tmp_path / "5"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    digest = "a" * 128
    for name in ("../secret", str(tmp_path / "secret")):
        (folder / "manifest.json").write_text(
            json.dumps({"format": 1, "files": {name: digest}, "leaves": {}, "metrics": {}})
        )
        assert checkpoint_problem(folder) == f"its manifest lists {name}, outside the checkpoint"


def test_scripts_in_samples_are_shown_as_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": evil}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "examples": 0, "loss": 0.5, "<b>x": 1}\n')
    sample = {"step": 0, "examples": 0, "prompt": evil, "policy": evil, "reference": evil}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "data.json").write_text(json.dumps([evil]))
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "alert(1)" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>x" not in page


# Whatever bytes.

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = [
    "data",
    "loss",
    "name",
    "dpo",
    "batch_size",
    "optim",
    "path",
    "1e999",
    "-1",
    "null",
    "[]",
    "{}",
    "nan",
    "&a",
    "*a",
]
yaml_like = st.lists(st.sampled_from([*WORDS, ":", " ", "\n", "  ", "-", ",", "[", "]", "{", "}", "!!", "'", "|"]))


def assert_only_user_errors(function):
    told = ""
    try:
        function()
    except UserError as error:
        told = str(error)
    assert "\n" not in told


@FUZZ
@given(content=st.one_of(st.binary(max_size=200), yaml_like.map(lambda parts: "".join(parts).encode())))
def test_whatever_is_in_a_config_ends_in_a_config_or_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    assert_only_user_errors(lambda: parse_config(Config, str(tmp_path / "x.yaml"), [], prog="dpo-jax train"))


@FUZZ
@given(
    argv=st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["--loss.beta", "--data.path", "--keep=3", "--"])))
)
def test_whatever_arguments_end_in_a_config_or_one_line(argv):
    if not any("help" in a for a in argv):
        assert_only_user_errors(lambda: parse_config(Config, None, argv, prog="dpo-jax train"))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["role", "content", "a"]), inner)
    ),
    max_leaves=5,
)
columns = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "label", "messages", "preference", "weight", "x"]
)
lines = st.lists(st.dictionaries(columns, values, max_size=5), max_size=3).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()
)


@FUZZ
@given(
    kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "parquet", "arrow", "jsonl.zst"]),
    content=st.binary(max_size=300),
)
def test_whatever_bytes_are_in_a_data_file_end_in_rows_or_one_line(tmp_path, kind, content):
    (tmp_path / f"x.{kind}").write_bytes(content)
    assert_only_user_errors(lambda: list(open_stream("files", (str(tmp_path / f"x.{kind}"),), "train", 2)))


@FUZZ
@given(content=lines)
@example(content=b'{"prompt": {"role": []}, "chosen": null, "rejected": null}')
def test_whatever_rows_are_in_a_data_file_end_in_rows_or_one_line(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    assert_only_user_errors(lambda: list(open_stream("files", (str(tmp_path / "x.jsonl"),), "train", 2)))


@FUZZ
@given(content=st.binary(max_size=200))
def test_whatever_bytes_are_in_a_model_folder_end_in_one_line(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    sizes = {"vocab_size": 8, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    with pytest.raises(UserError):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError):
        load_folder(tmp_path)


parts = st.fixed_dictionaries({"format": st.just(1), "files": values}, optional={"leaves": values, "metrics": values})
manifests = st.one_of(values, parts).map(lambda v: json.dumps(v).encode())


@FUZZ
@given(content=st.one_of(st.binary(max_size=100), manifests))
def test_whatever_bytes_are_in_a_manifest_are_a_problem(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    try:
        told = checkpoint_problem(tmp_path)
    except UserError as error:
        told = str(error)
    assert told
