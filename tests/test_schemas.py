"""Published data sets by their columns and by name, and columns mapped by the config."""

import json

import pytest

from dpo_jax import cli
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data.sources import schemas
from dpo_jax.data.sources.base import Note, source_names
from dpo_jax.data.sources.files import example_items, has_turns
from dpo_jax.data.sources.functions import open_source
from dpo_jax.data.sources.mapping import map_columns
from dpo_jax.data.sources.values import Cell
from dpo_jax.errors import UserError
from dpo_jax.records import Chat, Comparison
from dpo_jax.training.tables import held_out_comparisons


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def items(rows, responses=2, columns=None):
    examples = [(f"f:{i + 1}", row) for i, row in enumerate(rows)]
    return list(example_items(examples, responses, columns or {}, has_turns(examples, columns or {})))


TIE = Note("pairs of equal scores left out")
HELP = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
TALK = ([user("q"), answer("good")], [user("q"), answer("bad")])
# name -> rows in the set's columns, and what they are read as.
SETS = {
    "helpsteer2": (
        [
            {"prompt": "q", "response": "bad", "helpfulness": 1} | HELP,
            {"prompt": "q", "response": "good", "helpfulness": 4} | HELP,
            {"prompt": "r", "response": "a", "helpfulness": 3} | HELP,
            {"prompt": "r", "response": "b", "helpfulness": 3} | HELP,
        ],
        [Comparison("q", ("good", "bad"), where="f:1", scores=(4.0, 1.0)), TIE],
    ),
    "helpsteer2_preference": (
        [
            {"split": "train", "prompt": "q", "response_1": "good", "response_2": "bad", "preference_strength": -2},
            {"split": "train", "prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 1},
            {"split": "train", "prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        ],
        [
            Comparison("q", ("good", "bad"), where="f:1", scores=(2.0, 0.0)),
            Comparison("q", ("good", "bad"), where="f:2", scores=(1.0, 0.0)),
            TIE,
        ],
    ),
    "helpsteer3": (
        [{"domain": "code", "language": "c", "context": [user("q")], "response1": "bad", "response2": "good",
          "overall_preference": 3, "individual_preference": []}],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1", scores=(3.0, 0.0))],
    ),
    "intel_orca": (
        [{"system": "be brief", "question": "q", "chosen": "good", "rejected": "bad"},
         {"system": "", "question": "q", "chosen": "good", "rejected": "bad"}],
        [Comparison(Chat(({"role": "system", "content": "be brief"}, user("q"))), (answer("good"), answer("bad")),
                    where="f:1"),
         Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:2")],
    ),
    "distilabel_orca": (
        [{"system": "s", "input": "q", "chosen": "good", "rejected": "bad", "generations": ["good", "bad"],
          "rating": [9.0, 7.0], "status": "unchanged", "chosen_score": 9.0},
         {"system": "", "input": "q", "chosen": "a", "rejected": "b", "rating": [9.0, 9.0], "status": "tie"}],
        [Comparison(Chat(({"role": "system", "content": "s"}, user("q"))), (answer("good"), answer("bad")),
                    where="f:1"), TIE],
    ),
    "pku_saferlhf": (
        [{"prompt": "q", "response_0": "bad", "response_1": "good", "is_response_0_safe": True,
          "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0}],
        [Comparison("q", ("good", "bad"), where="f:1")],
    ),
    "nectar": (
        [{"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "num_responses": 2,
          "answers": [{"answer": "bad", "model": "m", "rank": 2.0}, {"answer": "good", "model": "n", "rank": 1.0}]}],
        [Comparison("\n\nHuman: q\n\nAssistant:", (" good", " bad"), where="f:1", scores=(-1.0, -2.0))],
    ),
    "lmarena": (
        [{"question_id": "1", "model_a": "m", "model_b": "n", "winner": winner, "conversation_a": a,
          "conversation_b": b, "turn": 1}
         for winner, (a, b) in (("model_a", TALK), ("model_b", TALK[::-1]), ("tie (bothbad)", TALK))],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1"),
         Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:2"), TIE],
    ),
    "lmsys_55k": (
        [{"id": 1, "model_a": "m", "model_b": "n", "prompt": json.dumps(["q", "r"]), "winner_model_a": 0,
          "response_a": json.dumps(["bad", "worse"]), "response_b": json.dumps(["good", "better"]),
          "winner_model_b": 1, "winner_tie": 0}],
        [Comparison(Chat((user("q"),)), ([answer("good"), user("r"), answer("better")],
                                         [answer("bad"), user("r"), answer("worse")]), where="f:1")],
    ),
    "stack_exchange_paired": (
        [{"qid": 1, "question": "q", "date": "2020", "metadata": [], "response_j": "good", "response_k": "bad"}],
        [Comparison("q", ("good", "bad"), where="f:1")],
    ),
    "webgpt": (
        [{"question": {"dataset": "eli5", "id": "1", "full_text": "q"}, "quotes_0": {}, "answer_0": "bad",
          "score_0": -0.5, "answer_1": "good", "score_1": 0.5},
         {"question": {"full_text": "q"}, "answer_0": "a", "score_0": 0.0, "answer_1": "b", "score_1": 0.0}],
        [Comparison("q", ("good", "bad"), where="f:1", scores=(0.5, -0.5)), TIE],
    ),
    "openai_preference": (
        [{"input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [answer("good")], "non_preferred_output": [answer("bad")]}],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1")],
    ),
    "alpaca_pairs": (
        [{"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
         {"instruction": "q", "input": "with this", "chosen": "good", "rejected": "bad"}],
        [Comparison("q", ("good", "bad"), where="f:1"), Comparison("q\nwith this", ("good", "bad"), where="f:2")],
    ),
    "ultrainteract": (
        [{"task": "Math", "dataset": "x", "trajectory": [{"from": "user", "value": "q"}], "chosen": "good",
          "rejected": "bad", "id": "1", "parent_id": "0"}],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1")],
    ),
    "truthy_dpo": (
        [{"id": "1", "source": "truthy_dpo", "system": "be true", "prompt": "q", "chosen": "good", "rejected": "bad"}],
        [Comparison(Chat(({"role": "system", "content": "be true"}, user("q"))), (answer("good"), answer("bad")),
                    where="f:1")],
    ),
    "capybara": (
        [{"source": "x", "conversation": [{"input": "q", "output": "good"}], "prompt": "q", "chosen": TALK[0],
          "rejected": TALK[1], "rating_chosen": 5, "rating_rejected": 4}],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1")],
    ),
    "tulu3": (
        [{"id": "1", "source": "x", "prompt": "q", "chosen": TALK[0], "rejected": TALK[1], "chosen_model": "m"}],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1")],
    ),
    "skywork": (
        [{"chosen": TALK[0], "rejected": TALK[1], "source": "x"}],
        [Comparison(Chat((user("q"),)), (answer("good"), answer("bad")), where="f:1")],
    ),
    "rewardbench": (
        [{"prompt": "q", "chosen": "good", "chosen_model": "m", "rejected": "bad", "rejected_model": "n",
          "subset": "x", "id": 1}],
        [Comparison("q", ("good", "bad"), where="f:1")],
    ),
}  # fmt: skip


def test_every_set_has_rows_here():
    assert {name for name, *_ in schemas.listed()} == {*SETS, "alpaca"}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_recognized_by_its_columns(name):
    rows, expected = SETS[name]
    assert [item for item in items(rows) if not (isinstance(item, Note) and "unused" in item.text)] == expected


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_by_its_name(name, tmp_path):
    rows, expected = SETS[name]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [c for c in open_source(name, (str(tmp_path / "x.jsonl"),), "train", 2) if isinstance(c, Comparison)]
    wanted = [c for c in expected if isinstance(c, Comparison)]
    assert [c._replace(where="") for c in found] == [c._replace(where="") for c in wanted]


def test_held_out_data_of_its_own_path_are_mapped_too(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"q": "ask", "a": "x", "b": "y"}) + "\n")
    data = {"eval_path": [str(tmp_path / "x.jsonl")], "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}
    options = parse_config(Config, None, {"data": data}, prog="x").data
    assert [c.prompt for c in held_out_comparisons(options, 2)] == ["ask"]


def test_every_source_is_listed_with_its_columns(capsys):
    cli.run_command(["data", "--list"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {*source_names(), *(name for name, *_ in schemas.listed())}
    assert lines["tldr"].endswith("Columns: info, summaries, choice")
    assert lines["nectar"].endswith("berkeley-nest/Nectar: prompt, answers")
    assert "CSV, TSV" in lines["files"]


def test_alpacas_single_responses_and_history():
    row = {"instruction": "q", "input": "", "output": "good"}
    assert items([row], 1) == [Comparison("q", ("good",), where="f:1")]
    talk = {"instruction": "q", "history": [["a", "b"]], "chosen": "good", "rejected": "bad"}
    assert items([talk])[0].prompt == Chat((user("a"), answer("b"), user("q")))


def test_unknown_and_nameless_sets_are_refused():
    with pytest.raises(UserError, match=r"unknown data source .*'helpstear2'; did you mean 'helpsteer2'"):
        open_source("helpstear2", (), "train", 2)
    with pytest.raises(UserError, match=r"data.path is empty; alpaca is a format of files"):
        open_source("alpaca", (), "train", 1)


# Columns mapped by the config.

ROW = {"id": 1, "q": "ask", "more": "this", "turns": [user("nested"), answer("said")], "a": "x", "b": "y", "won": "A"}


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"prompt": "q"}, {"prompt": "ask"}),
        ({"prompt": "turns.0.content"}, {"prompt": "nested"}),
        ({"prompt": "turns.-1.content"}, {"prompt": "said"}),
        ({"prompt": "{q}\\n{more}"}, {"prompt": "ask\nthis"}),
        ({"weight": "-id"}, {"weight": -1.0}),
        ({"first": "a", "second": "b", "winner": "won=A,B"}, {"chosen": "x", "rejected": "y"}),
        ({"first": "b", "second": "a", "winner": "won=B,A"}, {"chosen": "x", "rejected": "y"}),
    ],
)
def test_columns_are_mapped(columns, found):
    mapped = map_columns("f:1", ROW, columns)
    assert {name: mapped[name] for name in found} == found


def test_a_tie_is_a_note_and_mapped_columns_are_used():
    assert map_columns("f:1", ROW | {"won": "both"}, {"first": "a", "second": "b", "winner": "won=A,B"}) == TIE
    found = items([ROW], columns={"prompt": "q", "first": "a", "second": "b", "winner": "won=A,B"})
    assert found == [Comparison("ask", ("x", "y"), where="f:1"), Note("unused columns: id, more, turns", 3)]
    ranks = {"prompt": "q", "answers": ["a", "b"], "rank": [2, 1]}
    found = items([ranks], columns={"completions": "answers", "scores": "-rank"})
    assert found == [Comparison("q", ("b", "a"), where="f:1", scores=(-1.0, -2.0))]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "quest"}, "f:1: data.columns.prompt: no 'quest'; the columns are: a, b, id, more, q, turns, won"),
        ({"prompt": "turns.7.content"}, "data.columns.prompt: no 'turns.7.content'"),
        ({"first": "a", "winner": "won=A,B"}, "first and second need either winner, or score_first and score_second"),
        ({"scores": "-q"}, "'data.columns.scores' must be a number, not text"),
        ({"first": "a", "second": "b", "winner": "won=X,Y"}, "won is 'A', neither x nor y nor a tie; correct"),
        ({"first": "a", "second": "b", "winner": "won=X"}, "data.columns.winner: write column=value,value"),
        ({"prompt": "{q} {turns}"}, "data.columns.prompt: a text is made of texts and numbers, not of a list"),
    ],
)
def test_wrong_mappings_are_one_line(columns, message):
    with pytest.raises(UserError, match=message):
        map_columns("f:1", ROW, columns)


@pytest.mark.parametrize(
    ("named", "values"),
    [("A, B", ("A", "B")), ("true,false", (True, False)), ("0,1", (0.0, 1.0)), ("m,n", ("M", "N"))],
)
def test_a_winner_is_found_whatever_the_type_of_its_column(named, values):
    columns = {"prompt": "q", "first": "a", "second": "b", "winner": f"won={named}"}
    found = items([ROW | {"won": value} for value in (*values, "tie (bothbad)", None)], columns=columns)
    assert [item.responses for item in found[:2]] == [("x", "y"), ("y", "x")]
    assert found[2:4] == [TIE, TIE]


def test_a_winner_is_compared_as_a_number_and_ties_may_have_a_value():
    columns = {"prompt": "q", "first": "a", "second": "b", "winner": "won=1.0,2,3"}
    values = (1, "1", 1.0, Cell("1.0"), 2.0, Cell("2"), "3", 3.0)
    found = items([ROW | {"won": value} for value in values], columns=columns)
    assert [item.responses for item in found if isinstance(item, Comparison)] == [("x", "y")] * 4 + [("y", "x")] * 2
    assert found[6:8] == [TIE, TIE]
    with pytest.raises(UserError, match=r"data.columns.winner: write column=value,value"):
        map_columns("f:1", ROW, columns | {"winner": "won=1,2,1.0"})


def test_lists_in_the_cells_of_a_csv_have_parts_and_signs():
    row = {"q": Cell("Q"), "answers": Cell('["x", "y"]'), "rank": Cell("[2, 1]"), "talk": Cell('[{"content": "hi"}]')}
    (found,) = items([row], columns={"prompt": "talk.0.content", "completions": "answers", "scores": "-rank"})[:1]
    assert (found.prompt, found.responses) == ("hi", ("y", "x"))


def test_two_responses_are_ordered_by_a_score_of_each():
    columns = {"prompt": "q", "first": "a", "second": "b", "score_first": "s", "score_second": "t"}
    found = items([ROW | {"s": 1, "t": 3}, ROW | {"s": 2, "t": 2}, ROW | {"s": 2.5, "t": -1}], columns=columns)
    assert [item.responses for item in (found[0], found[2])] == [("y", "x"), ("x", "y")]
    assert [item.scores for item in (found[0], found[2])] == [(3.0, 1.0), (2.5, -1.0)]
    assert found[1] == TIE


def test_a_null_in_a_text_of_several_columns_is_no_text():
    assert map_columns("f:1", {"a": "Do", "b": None, "n": 3}, {"prompt": "{a}\\n{b}{n}"})["prompt"] == "Do\n3"


def test_columns_that_a_set_does_not_have_are_kept_or_counted():
    row = {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}
    kept = {"weight": 0.5, "preference": 0.75, "tools": [{"name": "f", "x": None}], "other": 1}
    pair, note = items([row | kept])
    assert (pair.weight, pair.preference, pair.prompt.tools) == (0.5, 0.75, ({"name": "f"},))
    assert note == Note("unused columns: other")
    assert items([{"instruction": "q", "output": "a", "label": False}])[0].responses == (None, "a")


def test_a_set_is_not_recognized_where_the_usual_columns_are_complete():
    """GSM8K-like data may have `answers` beside a pair; Nectar's answers have ranks."""
    for answers in (["4"], None, [{"answer": "x", "rank": 1.0}]):
        row = {"prompt": "q", "chosen": "good", "rejected": "bad", "answers": answers}
        assert items([row])[0] == Comparison("q", ("good", "bad"), where="f:1")
    strength = {"response_1": "a", "response_2": "b", "preference_strength": -1}
    assert items([row | strength])[0] == Comparison("q", ("good", "bad"), where="f:1")


def test_an_unknown_winner_is_an_error():
    row = {"winner": "model_c", "conversation_a": TALK[0], "conversation_b": TALK[1]}
    assert "'winner' must be model_a, model_b or a tie, not 'model_c'" in str(items([row])[0])


@pytest.mark.parametrize(
    ("row", "responses", "hint"),
    [
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "A"}, 2,
         "set data.columns: {first: response_a, second: response_b, winner: 'winner=A,B'}, where A and B are its"),
        ({"question": "q", "answer": "a", "label": True}, 2, "data.columns: {prompt: question, completion: answer}"),
        ({"prompt": "q", "response": "a"}, 1, "set data.columns: {completion: response}"),
        ({"question": "q", "responses": ["a", "b"], "ranks": [1, 2]}, 2, "{prompt: question, scores: -ranks}"),
        ({"query": "q"}, 0, "set data.columns: {prompt: query}"),
        ({"x": "q"}, 0, "set data.columns to theirs, as in data.columns.prompt: question"),
    ],
)  # fmt: skip
def test_a_missing_column_has_a_hint_of_its_kind(row, responses, hint):
    assert hint in str(items([row], responses)[0])


def test_a_missing_column_lists_the_mapping_that_would_fit():
    found = items([{"query": "q", "preferred": "a", "dispreferred": "b"}])[0]
    assert str(found) == (
        "f:1: the loss needs pairs: columns prompt, chosen, rejected; the columns are: dispreferred, preferred, query; "
        "set data.columns: {prompt: query, chosen: preferred, rejected: dispreferred}"
    )
    with pytest.raises(UserError, match=r"data.columns: the source 'hh' knows its own columns"):
        open_source("hh", (), "train", 2, columns={"prompt": "q"})
