"""Standard evaluations: scores worked out by hand, rewards as transformers has them, files as judges read them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import shared_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_jax
from dpo_jax import cli
from dpo_jax.errors import UserError
from dpo_jax.intervals import wilson
from dpo_jax.runs.suites import ifeval, rewardbench2
from dpo_jax.runs.suites.arena_hard import markdown_counts
from dpo_jax.runs.suites.registry import known_suites, named_suites
from dpo_jax.runs.suites.rewardbench import SECTIONS, rewardbench_scores
from dpo_jax.runs.suites.rewardbench2 import best_of_credit, ties_metric
from dpo_jax.runs.suites.subject import Answers, answer_metrics, generator_name

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of packages that suites import

PAIRS = [
    {"prompt": "What is 2+2?", "chosen": " It is four.", "rejected": " It is five or so.", "subset": "math-prm"},
    {"prompt": "Say hello.", "chosen": " Hello, hello!", "rejected": " No.", "subset": "alpacaeval-easy"},
    {"prompt": "Say bye.", "chosen": " Bye.", "rejected": " The cat sat on the mat.", "subset": "mt-bench-med"},
]
BEST_OF = [
    {"id": "7", "prompt": "Who was it?", "chosen": [" She was."], "rejected": [" He was.", " A dog.", " No more."]},
    {"id": "ref:0", "prompt": "Name the sky's colour.", "chosen": [" Blue."], "rejected": [" A dog.", " A cat."]},
    {"id": "tied:0", "prompt": "Name a colour.", "chosen": [" Red.", " Blue."], "rejected": [" A dog.", " A cat."]},
]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a policy, a reference of its architecture, and data in the published schemas."""
    folder = tmp_path_factory.mktemp("suites")
    source = shared_model("stories260k")
    model = AutoModelForCausalLM.from_pretrained(source)
    for name in ("policy", "reference"):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
        with torch.no_grad():  # the reference is a model nearby
            model.lm_head.weight.mul_(0.9)
    (folder / "rb.jsonl").write_text(lines({**row, "id": i} for i, row in enumerate(PAIRS)))
    prior = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello.", "rejected": "No.", "subset": "helpful"}
    (folder / "anthropic_hhh.jsonl").write_text(lines([prior]))
    more = {"num_incorrect": 3, "total_completions": 4}
    rows = [
        {**row, **more, "num_correct": len(row["chosen"]), "subset": "Ties" if ":" in row["id"] else "Math"}
        for row in BEST_OF
    ]
    (folder / "rb2.jsonl").write_text(lines(rows))
    questions = [("u1", "Once upon a time"), ("u2", "The dog said"), ("u3", "The cat " * 250)]  # 512 positions
    asked = [{"instruction": text, "output": "x", "generator": "y", "dataset": "koala"} for _, text in questions]
    (folder / "ae.json").write_text(json.dumps(asked))
    (folder / "ah.jsonl").write_text(lines({"uid": uid, "category": "c", "prompt": text} for uid, text in questions))
    return folder


@pytest.fixture
def inside(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    return world


def torch_logp(model, tokenizer, prompt, answer):
    """Returns log p of an answer and EOS after a prompt, as transformers' model has it."""
    head, tail = (tokenizer(text)["input_ids"] for text in (prompt, answer))
    tail = [i for i in tail if i != tokenizer.bos_token_id] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logps[len(head) - 1 + i, token]) for i, token in enumerate(tail))


def wins_by_transformers(rows, policy, reference, beta):
    """Returns subset -> whether the pair is won; asserts that the rewards in the rows are transformers'."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    models = [AutoModelForCausalLM.from_pretrained(name) for name in (policy, reference)]
    wins = {}
    for row, line in zip(PAIRS, rows.read_text().splitlines(), strict=True):
        logps = [[torch_logp(m, tokenizer, row["prompt"], row[key]) for m in models] for key in ("chosen", "rejected")]
        chosen, rejected = (beta * (own - other) for own, other in logps)
        found = json.loads(line)
        assert [found["chosen"], found["rejected"]] == pytest.approx([chosen, rejected], abs=1e-4)
        assert abs(chosen) > 0.01
        wins[row["subset"]] = float(chosen > rejected)
    return wins


@pytest.mark.slow
def test_a_run_is_compared_with_its_own_reference(inside):
    config = {"model": {"path": "policy"}, "batch_size": 3, "epochs": 4, "samples": {"prompts": 0}}
    config |= {"optim": {"learning_rate": 1e-3, "warmup_steps": 0}, "data": {"max_length": 64}}
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS]
    dpo_jax.train(config, data=pairs, eval_data=pairs, loss={"name": "dpo", "beta": 0.5}, run="run")
    dpo_jax.evaluate("run", suite="rewardbench", suite_data="rb.jsonl")
    wins = wins_by_transformers(inside / "run/eval_rewardbench.jsonl", "run/model", "policy", 0.5)
    assert wins.keys() == {row["subset"] for row in PAIRS}


def test_rewards_are_those_of_transformers_and_the_table_counts_them(inside, capsys):
    keys = ["--reference.path", "reference", "--loss.beta", "0.5", "--suite", "rewardbench", "--suite_out", "out"]
    cli.run_command(["eval", "policy", *keys, "--suite_data", "rb.jsonl"])
    printed = capsys.readouterr().out
    wins = wins_by_transformers(inside / "out/eval_rewardbench.jsonl", "policy", "reference", 0.5)
    result = json.loads((inside / "out/eval_rewardbench.json").read_text())
    assert result["examples"] == 3
    metrics = {name: entry["mean"] for name, entry in result["metrics"].items()}
    chat = (100 * wins["alpacaeval-easy"] + 40 * wins["mt-bench-med"]) / 140
    assert metrics == pytest.approx(
        {**wins, "Chat": chat, "Reasoning": wins["math-prm"], "score": (chat + wins["math-prm"]) / 2}
    )
    assert "3 examples" in printed
    assert "no examples of alpacaeval-length" in printed


def test_another_reward_needs_no_policy(inside):
    keys = {"suite": "rewardbench,rewardbench2", "reward": lambda prompts, completions: [len(c) for c in completions]}
    data = ["rewardbench=rb.jsonl", "rewardbench=anthropic_hhh.jsonl", "rewardbench2=rb2.jsonl"]
    found = dpo_jax.evaluate("policy", suite_data=data, suite_out="by-length", raw=True, **keys)
    means = {name: entry["mean"] for name, entry in found.items()}
    wins = {row["subset"]: float(len(row["chosen"]) > len(row["rejected"])) for row in PAIRS} | {"anthropic_hhh": 1.0}
    assert {name: means[f"rewardbench/{name}"] for name in wins} == wins
    chat = 100 / 140
    assert means["rewardbench/score"] == pytest.approx((chat + 0.0 + 0.5 * 1.0) / 2.5)
    assert means["rewardbench2/Math"] == 0.5  # " She was." and " No more." are the longest, and one is right
    assert found["rewardbench2/Math"]["n"] == 1


def test_a_section_weighs_its_subsets_by_their_published_sizes():
    wins = {"math-prm": [1.0, 0.0], "hep-cpp": [1.0], "hep-go": [0.0, 0.0, 0.0, 1.0], "shp": [1.0], "summarize": [0.0]}
    metrics, _ = rewardbench_scores(wins)
    reasoning = (984 * 0.5 + 164 * 1 + 164 * 0.25) / (984 + 2 * 164)
    assert metrics["Reasoning"]["mean"] == pytest.approx(reasoning)
    weights = np.array([492, 492, 164, 41, 41, 41, 41])
    n = weights.sum() ** 2 / (weights**2).sum()
    assert [metrics["Reasoning"][end] for end in ("low", "high")] == pytest.approx(list(wilson(reasoning * n, n)))
    assert metrics["Prior Sets"]["mean"] == 0.5
    assert metrics["score"]["mean"] == pytest.approx((reasoning + 0.5 * 0.5) / 1.5)
    below = [metrics[name]["mean"] - metrics[name]["low"] for name in ("Reasoning", "Prior Sets")]
    assert metrics["score"]["mean"] - metrics["score"]["low"] == pytest.approx(math.hypot(below[0], below[1] / 2) / 1.5)


def test_sizes_are_those_of_the_published_set():
    assert sum(sum(SECTIONS[name].values()) for name in ("Chat", "Chat Hard", "Safety")) == 358 + 456 + 740
    assert SECTIONS["Reasoning"]["math-prm"] == sum(SECTIONS["Reasoning"].values()) / 2


def test_an_answer_that_shares_the_top_counts_in_part():
    assert best_of_credit(np.array([2.0, 1.0, 0.0, 1.0])) == 1
    assert best_of_credit(np.array([2.0, 2.0, 0.0, 2.0])) == pytest.approx(1 / 3)
    assert best_of_credit(np.array([1.0, 2.0, 0.0, 0.0])) == 0


def test_ties_are_scored_as_published():
    tied = {
        "ref:0": (1, np.array([3.0, 1.0])),  # gap 2
        "tied:0": (2, np.array([4.0, 3.0, 1.5])),  # spread 1, gap 1.5: preferred, and so is the lesser gap
        "ref:1": (1, np.array([1.0, 0.5])),  # gap 0.5
        "tied:1": (2, np.array([4.0, 3.0, 1.0])),  # spread 1, gap 2: preferred, but not with the lesser gap
        "ref:2": (1, np.array([0.0, 1.0])),  # wrong, gap -1
        "tied:2": (2, np.array([2.0, 2.0, 3.0])),  # wrong, spread 0: the margin is tanh(-inf)
    }
    margins = (math.tanh(1.5 - 1) + math.tanh(0.5 - 1) - 1) / 3
    wanted = 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margins
    found, _ = ties_metric(tied)
    assert found["mean"] == pytest.approx(wanted)
    assert -0.01 <= found["low"] < wanted < found["high"] <= 1.01
    assert found["n"] == 6


def test_ties_without_counterparts_count_for_accuracy():
    found, notes = ties_metric({"ref:0": (1, np.array([1.0, 0.0])), "tied:4": (2, np.array([1.0, 0.0, 0.5]))})
    assert found == {"mean": pytest.approx(0.3), "low": 0.0, "high": 1.0, "n": 2}
    assert any("2 prompts without" in note for note in notes)


INSTRUCTIONS = [
    (["punctuation:no_comma"], [{}]),
    (["length_constraints:number_words", "startend:quotation"], [{"relation": "less than", "num_words": 4}, {}]),
    (["length_constraints:number_sentences"], [{"relation": "less than", "num_sentences": 3, "num_words": None}]),
    (["startend:end_checker"], [{"end_phrase": "The end."}]),
]
RESPONSES = ["Sure, gladly:\nno comma here", "one two three", "Mr. Smith met Dr. Jones. They talked.", "*The end.*"]


def test_ifeval_counts_instructions_and_prompts(inside, monkeypatch):
    rows = [
        {"key": i, "prompt": f"p{i}", "instruction_id_list": ids, "kwargs": kwargs}
        for i, (ids, kwargs) in enumerate([*INSTRUCTIONS, INSTRUCTIONS[1]])
    ]
    (inside / "if.jsonl").write_text(lines(rows))
    responses = [*RESPONSES, ""]
    given = Answers(responses, [1] * 5, [False] * 5, ())
    monkeypatch.setattr(ifeval, "answer", lambda subject, prompts, tokens: given if tokens == 1280 else None)
    found = dpo_jax.evaluate("policy", suite="ifeval", suite_data="if.jsonl", suite_out="if")
    means = {name.partition("/")[2]: (entry["mean"], entry["n"]) for name, entry in found.items()}
    # Strictly: a comma; few words, but no quotation marks; two sentences, not four; asterisks; nothing. Loosely the
    # first line and the asterisks go.
    assert means == {
        "prompt_level_strict_acc": (1 / 5, 5),
        "inst_level_strict_acc": (2 / 7, 7),
        "prompt_level_loose_acc": (3 / 5, 5),
        "inst_level_loose_acc": (4 / 7, 7),
    }
    assert found["ifeval/inst_level_loose_acc"]["low"] == pytest.approx(wilson(4, 7)[0])
    made = json.loads((inside / "if/eval_ifeval.json").read_text())
    notes, meanings = made["notes"], made["meanings"]
    assert meanings.keys() == means.keys()
    assert meanings["inst_level_strict_acc"] == "Share of instructions that are followed by the answer."
    assert any("1 instructions split sentences" in note for note in notes)
    first = json.loads((inside / "if/eval_ifeval.jsonl").read_text().splitlines()[0])
    assert (first["strict"], first["loose"]) == ([False], [True])


def test_answers_are_greedy_and_in_the_formats_of_the_judges(inside):
    data = ["alpaca_eval=ae.json", "arena_hard=ah.jsonl"]
    keys = {"suite": "alpaca_eval,arena_hard", "suite_data": data, "suite_max_new_tokens": 12}
    found = dpo_jax.evaluate("policy", **keys)
    folder = inside / "runs/policy.eval"
    outputs = pd.read_json(folder / "alpaca_eval/model_outputs.json")  # as alpaca_eval reads it
    assert {"instruction", "output", "generator", "dataset"} <= set(outputs.columns)
    assert set(outputs.generator) == {"policy"}
    options = {"temperature": 0.0, "max_new_tokens": 12}
    wanted = dpo_jax.sample("policy", ["Once upon a time", "The dog said"], samples=options)["policy"]
    assert list(outputs.output) == [*wanted, ""]  # the last prompt leaves no room
    answers = {}
    for line in (folder / "arena_hard/model_answer/policy.jsonl").read_text().splitlines():  # as gen_judgment.py does
        answer = json.loads(line)
        answers[answer["uid"]] = answer["messages"][-1]["content"]["answer"]
        assert {"ans_id", "model", "tstamp"} <= answer.keys()
        assert {"token_len", "header_count", "list_count", "bold_count"} == answer["metadata"].keys()
    assert list(answers.values()) == list(outputs.output)
    assert found["arena_hard/answer_tokens"]["mean"] == pytest.approx(8.0)  # 12, 12 and 0
    notes = json.loads((folder / "eval_arena_hard.json").read_text())["notes"]
    less = "long prompts leave less of the model's 512 positions: answers of at most 0 tokens (1)"
    assert less in notes
    assert any("copy runs/policy.eval/arena_hard/model_answer/policy.jsonl to " in note for note in notes)
    judged = json.loads((folder / "eval_alpaca_eval.json").read_text())
    assert "judge them: alpaca_eval --model_outputs runs/policy.eval/alpaca_eval/model_outputs.json" in judged["notes"]
    assert (judged["max_new_tokens"], judged["raw"], judged["checkpoint"]) == (12, None, "")


def test_a_single_answer_has_a_mean_without_an_interval(inside, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([{"instruction": "Once"}]))
    keys = {"suite_data": str(tmp_path / "one.json"), "suite_max_new_tokens": 4, "suite_out": str(tmp_path)}
    found = dpo_jax.evaluate("policy", suite="alpaca_eval", **keys)
    assert found["alpaca_eval/answer_tokens"] == {"mean": 4.0, "n": 1}
    assert "Infinity" not in (tmp_path / "eval_alpaca_eval.json").read_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"samples": {"temperature": 0.7}}, "samples.temperature: has no effect with suite, whose answers are greedy"),
        ({"samples": {"max_new_tokens": 9}}, "samples.max_new_tokens: .*; suite_max_new_tokens sets their length"),
        ({"suite": "rewardbench", "checkpoint": "3", "reward": "happy"}, "checkpoint: has no effect on a reward"),
    ],
)
def test_keys_that_no_suite_reads_are_refused_before_any_runs(inside, keys, message):
    with pytest.raises(UserError, match=message):
        dpo_jax.evaluate("policy", **{"suite": "alpaca_eval", "suite_data": "ae.json"} | keys)


def test_prompts_are_turns_of_a_user_if_the_model_has_a_template(inside, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("policy")
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained("policy").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "one.json").write_text(json.dumps([{"instruction": "Once"}]))
    keys = {"suite": "alpaca_eval", "suite_data": str(tmp_path / "one.json"), "suite_max_new_tokens": 6}
    dpo_jax.evaluate(tmp_path / "chat", suite_out=str(tmp_path), **keys)
    (row,) = json.loads((tmp_path / "alpaca_eval/model_outputs.json").read_text())
    options = {"temperature": 0.0, "max_new_tokens": 6}
    (in_turns,) = dpo_jax.sample(tmp_path / "chat", [[{"role": "user", "content": "Once"}]], **options)["policy"]
    (as_text,) = dpo_jax.sample(tmp_path / "chat", ["Once"], raw=True, **options)["policy"]
    assert row["output"] == in_turns != as_text


def test_markdown_is_counted_outside_of_code():
    text = "# One\n## Two\n- a\n1. b\n**bold** and __bold__\n```\n# no\n- no\n```\n### Three"
    counts = markdown_counts(text)
    assert [counts["header_count"][f"h{i}"] for i in range(1, 7)] == [1, 1, 1, 0, 0, 0]
    assert counts["list_count"] == {"ordered": 1, "unordered": 1}
    assert counts["bold_count"] == {"**": 1, "__": 1}


def test_every_metric_of_a_suite_is_explained_in_one_line():
    suites = known_suites()
    every = rewardbench_scores({subset: [1.0] for sizes in SECTIONS.values() for subset in sizes})[0]
    assert suites["rewardbench"].meanings.keys() == every.keys()
    assert suites["rewardbench2"].meanings.keys() == {*rewardbench2.SUBSETS, "score"}
    answers = answer_metrics(Answers(["a", "b"], [1, 1], [True, False], ()))
    for name in ("alpaca_eval", "arena_hard"):
        assert suites[name].meanings.keys() == answers.keys()
    for suite in suites.values():
        assert all(text and "\n" not in text and text.endswith(".") for text in suite.meanings.values())


def test_a_metric_of_lm_eval_is_explained_by_its_name_without_task_and_filter():
    suite = known_suites()["lm_eval"]
    assert suite.meaning("arc/acc") == suite.meaning("a/b/acc,strict") == suite.meanings["acc"]
    assert suite.meaning("arc/acc_norm") == "The same by log-likelihood per character of the answer."
    assert suite.meaning("own/brier") == "As lm_eval's task defines it."
    assert known_suites()["rewardbench"].meaning("other") == ""


def test_names_of_suites():
    assert {"ifeval", "rewardbench", "rewardbench2", "lm_eval", "alpaca_eval", "arena_hard"} == known_suites().keys()
    assert named_suites("lm_eval:a,b,ifeval,lm_eval:c") == {"lm_eval": ("a", "b", "c"), "ifeval": ()}
    assert generator_name("runs/my model") == "my-model"


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"suite": "ifevl"}, "unknown 'ifevl'; did you mean 'ifeval'"),
        ({"suite": "lm_eval"}, "did you mean 'lm_eval:TASK'"),
        ({"suite": "ifeval,ifeval"}, "named twice"),
        ({"suite": "ifeval"}, "give its file or folder as --suite_data PATH"),
        ({"suite": "arena_hard"}, "give its file or folder as --suite_data PATH"),
        ({"suite": "ifeval", "suite_data": "absent.jsonl"}, "no such file; check suite_data"),
        ({"suite": "lm_eval:x", "suite_data": "absent"}, "no such folder"),
        ({"suite": "ifeval,rewardbench", "suite_data": "rb.jsonl"}, "write SUITE=PATH with one of ifeval, rewardbench"),
        ({"suite": "rewardbench", "suite_data": "rb.jsonl"}, "a model folder has no reference; set --reference.path"),
        ({"suite": "rewardbench", "suite_data": "rb2.jsonl"}, "subset 'Math' is not of RewardBench"),
        ({"suite": "rewardbench2", "suite_data": "rb.jsonl"}, "rb.jsonl:1: chosen must be a list, got str"),
        ({"suite": "ifeval", "suite_data": "rb.jsonl"}, "instruction_id_list must be a list, got NoneType"),
        ({"suite": "alpaca_eval", "suite_data": "rb.jsonl"}, "instruction must be a text, got NoneType"),
        ({"suite": "ifeval", "reward": "happy"}, "add one of rewardbench, rewardbench2"),
        ({"suite": "ifeval", "per_token": "x.jsonl"}, "per_token: has no effect with suite"),
        ({"suite_limit": 2}, "suite_limit: has no effect without suite"),
        ({"suite": "ifeval", "suite_limit": 0}, "suite_limit: must be at least 1"),
        ({"suite": "ifeval", "suite_num_fewshot": 2}, "has no effect on ifeval; remove it, or add one of lm_eval"),
    ],
)
def test_mistakes_are_named(inside, keys, wanted):
    with pytest.raises(UserError) as error:
        dpo_jax.evaluate("policy", **keys)
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "did you mean 'punctuation:no_comma'"),
        ({"kwargs": []}, "kwargs must be a list of 1 objects"),
        ({"kwargs": [{"num_words": 3}]}, "its kwargs do not fit its instructions"),
    ],
)
def test_bad_instructions_are_named(inside, tmp_path, monkeypatch, change, wanted):
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], **change}
    (tmp_path / "bad.jsonl").write_text(lines([row]))
    monkeypatch.setattr(ifeval, "answer", lambda *_: SimpleNamespace(texts=["a"], notes=()))
    with pytest.raises(UserError) as error:
        dpo_jax.evaluate("policy", suite="ifeval", suite_data=str(tmp_path / "bad.jsonl"))
    assert wanted in str(error.value)
