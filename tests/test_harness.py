"""lm_eval on our model against lm_eval's own on transformers' (HFLM): the same numbers and texts."""

import json
import warnings

import pytest
from tiny import shared_model

import dpo_jax
from dpo_jax.config.commands import EvalConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.errors import UserError
from dpo_jax.intervals import wilson
from dpo_jax.runs.suites.harness import harness_lm, share_or_normal_interval
from dpo_jax.runs.suites.run import load_subject

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and those of the packages that it imports

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
STORY = "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog. "
DOCS = [
    {"text": "Once upon a time, there was a little", "answer": 0, "choices": ["girl", "boat", "zebra"]},
    {"text": "The dog wanted to", "answer": 1, "choices": ["fly to Mars", "play", "add"]},
    {"text": "They lived happily ever", "answer": 2, "choices": ["so", "before the sun", "after"]},
]
CHOICES = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
GENERATED = 'generation_kwargs: {until: ["."], max_gen_toks: 24}\nmetric_list: [{metric: exact_match}]'
PERPLEXITY = "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"


@pytest.fixture(scope="module")
def folder():
    return shared_model("stories260k")


@pytest.fixture(scope="module")
def ours(folder):
    settings = parse_config(EvalConfig, None, {"model": {"path": str(folder)}, "batch_size": 8}, prog="x")
    return harness_lm(load_subject(str(folder), settings))


@pytest.fixture(scope="module")
def theirs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_log_likelihoods_are_those_of_hflm(ours, theirs):
    pairs = [(doc["text"], f" {choice}") for doc in DOCS for choice in doc["choices"]]
    pairs += [("", "Once upon"), ("Once upon a ", "time"), (STORY * 30, " The end."), ("<s>The dog", " ran away")]
    found = ours.loglikelihood(requests("loglikelihood", *pairs))
    wanted = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in found} == {True, False}


def test_rolling_log_likelihoods_are_those_of_hflm(ours, theirs):
    texts = [(STORY * 30,), ("The cat.",)]  # the first takes several windows
    assert len(ours.tok_encode(STORY * 30)) > 512
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-4)


def test_greedy_texts_are_those_of_hflm(ours, theirs):
    stops = (["\n", "."], ["he", "zzz"])  # two groups of one shape; the long prompt is cut
    asked = [
        (text, {"until": stops[i % 2], "max_gen_toks": 24})
        for i, text in enumerate((DOCS[0]["text"], DOCS[1]["text"], STORY * 30, STORY * 30))
    ]
    found = ours.generate_until(requests("generate_until", *asked))
    assert found == theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert not any("." in text for text in found[::2])
    assert not any("he" in text for text in found[1::2])
    assert all(found)


def test_options_that_are_not_supported_are_refused(ours):
    for options, wanted in (({"num_beams": 3}, "option 'num_beams'"), ({"max_gen_toks": 512}, "leave no room")):
        with pytest.raises(UserError, match=wanted):
            ours.generate_until(requests("generate_until", ("Once", options)))


def test_texts_that_cannot_be_scored_are_refused(ours):
    for pair, wanted in ((("Once upon", ""), "leaves no token"), (("Once", STORY * 30), "exceeds the model's 512")):
        with pytest.raises(UserError, match=wanted):
            ours.loglikelihood(requests("loglikelihood", pair))


def test_conversations_are_written_as_hflm_writes_them(ours, theirs, monkeypatch):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    for model in (ours, theirs):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert ours.apply_chat_template(history[:1]) == "<s>[user] Hi</s>[assistant] "
    for begins, messages in ((True, history[:1]), (False, history)):
        assert ours.apply_chat_template(messages, begins) == theirs.apply_chat_template(messages, begins)
    text = ours.apply_chat_template(history[:1])
    assert ours.tok_encode(text) == theirs.tok_encode(text)


def write_tasks(folder):
    kinds = {"choice": ("multiple_choice", CHOICES), "said": ("generate_until", GENERATED)}
    kinds["text"] = ("loglikelihood_rolling", PERPLEXITY)
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, (kind, more) in kinds.items():
        text = CHOICE.format(name=f"tiny_{name}", file=folder / "docs.jsonl", kind=kind, more=more)
        if name == "text":
            text = text.replace('doc_to_text: "{{text}}"', 'doc_to_text: ""').replace("{{answer}}", "{{text}}")
        (folder / f"{name}.yaml").write_text(text)


def test_tasks_have_the_metrics_of_lm_eval(folder, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    names = ["tiny_choice", "tiny_said", "tiny_text"]
    found = dpo_jax.evaluate(folder, suite=f"lm_eval:{','.join(names)}", suite_data=str(tmp_path), suite_out="out")
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(tmp_path), include_defaults=False).load(names)
    wanted = evaluator.evaluate(lm=theirs, task_dict=loaded, bootstrap_iters=1000)["results"]
    for task, metric in (("choice", "acc"), ("choice", "acc_norm"), ("said", "exact_match"), ("text", "bits_per_byte")):
        entry = found[f"lm_eval/tiny_{task}/{metric}"]
        assert entry["mean"] == pytest.approx(wanted[f"tiny_{task}"][f"{metric},none"], abs=1e-5)
        assert entry["n"] == 3
    acc = found["lm_eval/tiny_choice/acc"]
    assert (acc["low"], acc["high"]) == pytest.approx(wilson(acc["mean"] * 3, 3))  # right or wrong
    assert len((tmp_path / "out/eval_lm_eval.jsonl").read_text().splitlines()) == 9
    result = json.loads((tmp_path / "out/eval_lm_eval.json").read_text())
    assert (result["examples"], result["tasks"]) == (9, names)


@pytest.mark.parametrize(
    ("value", "error", "n", "low", "high"),
    [
        (0.0, 0.0, 8, 0.0, 0.324408),  # none of 8: z^2 / (8 + z^2)
        (0.5, 0.1, 26, 0.320606, 0.679394),  # sqrt(.5 * .5 / 25): 13 of 26; .5 +- 1.959964 * .5 / sqrt(26 + z^2)
        (0.5, 0.2, 26, 0.108007, 0.891993),  # no share
        (7.0, 0.5, 26, 6.020018, 7.979982),
    ],
)
def test_shares_have_wilsons_interval_and_other_metrics_the_normal_one(value, error, n, low, high):
    assert share_or_normal_interval(value, error, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.slow  # lm_eval reads all its tasks
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("arc_esy", "did you mean 'arc_easy'"), ("arc_easy", "arc_easy: .*give tasks whose data are at hand")],
)
def test_tasks_that_cannot_run_are_named(folder, name, wanted):
    with pytest.raises(UserError, match=wanted):
        dpo_jax.evaluate(folder, suite=f"lm_eval:{name}")
