"""Judges: verdicts checked by hand, orders, and requests to a local server of the chat-completions protocol."""

import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from chat_server import serving

from dpo_jax.errors import UserError
from dpo_jax.rewards import judge as judging
from dpo_jax.rewards.endpoint import EndpointClient, EndpointConfig
from dpo_jax.rewards.judge import Match, Verdict

SECRET = "sk-0123456789"  # of no real service


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def waits(monkeypatch):
    """Seconds asked of time.sleep, which returns at once."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def client_of(server, cache, **settings):
    return EndpointClient(EndpointConfig("a-model", server.url, **settings), cache)


def echo(body):
    return "you said " + body["messages"][0]["content"]


def test_answers_come_in_order_and_each_question_is_asked_once(tmp_path):
    questions = [f"question {i}" for i in range(20)] + ["question 3"]
    with serving(echo) as server:
        client = client_of(server, tmp_path)
        assert client.ask(questions) == [f"you said {q}" for q in questions]
        assert (client.asked, client.found) == (20, 0)
        path, body = server.seen[0]
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-model", 0, 300)
        assert body["messages"][0]["role"] == "user"
        again = client_of(server, tmp_path)
        assert again.ask(questions[:5]) == [f"you said {q}" for q in questions[:5]]
        assert (again.asked, again.found) == (0, 5)
        assert len(server.seen) == 20
        other = client_of(server, tmp_path, body=("temperature=1", "stop=x"))
        other.ask(questions[:1])  # another field, another cache key
        assert (server.seen[-1][1]["temperature"], server.seen[-1][1]["stop"]) == (1, "x")
        assert "max_tokens" not in server.seen[-1][1]
        next(tmp_path.glob("*/*.json")).write_text("{damaged")
        assert client_of(server, tmp_path).ask(questions[:20]) == [f"you said {q}" for q in questions[:20]]
        assert len(server.seen) in (21, 22)  # 21 if the damaged answer is that of the other request


def test_temporary_failures_are_retried_after_growing_waits(tmp_path, waits):
    failures = [
        (429, {"Retry-After": "17"}, {}),
        (503, {}, {}),
        (500, {}, b"<html>"),
        (429, {"Retry-After": "soon"}, {}),
    ]
    left = list(failures)
    with serving(lambda body: left.pop(0) if left else "yes") as server:
        assert client_of(server, tmp_path).ask(["?"]) == ["yes"]
        assert len(server.seen) == 5
    assert waits[0] == 17
    for wait, most in zip(waits[1:], (1, 2, 4), strict=True):
        assert 0.75 * most <= wait <= most


def test_retries_end(tmp_path, waits):
    with serving(lambda body: (503, {}, {"error": {"message": "too\nbusy"}})) as server:
        with pytest.raises(UserError, match="no answer after 3 tries: 503 Service Unavailable: too busy"):
            client_of(server, tmp_path, retries=2).ask(["?"])
        assert len(server.seen) == 3
    with serving(lambda body: (429, {"Retry-After": "121"}, {})) as server:  # longer than the client waits
        with pytest.raises(UserError, match="no answer after 1 tries: 429 Too Many Requests"):
            client_of(server, tmp_path).ask(["?"])
        assert len(server.seen) == 1
    waits.clear()
    with pytest.raises(UserError, match=r"no answer after 2 tries: .*refused"):
        client_of(server, tmp_path, retries=1).ask(["?"])  # the server is closed
    assert len(waits) == 1


def test_a_refusal_is_not_retried_and_its_message_lacks_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    with serving(lambda body: (401, {}, {"error": {"message": f"Incorrect key: {SECRET}"}})) as server:
        with pytest.raises(UserError, match=r"401 Unauthorized: Incorrect key: .*; check \$MY_KEY") as error:
            client_of(server, tmp_path, key="MY_KEY").ask(["?"])
        assert SECRET not in str(error.value)
        assert len(server.seen) == 1
        assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_the_key_is_written_nowhere_and_none_is_sent_without_one(tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with serving(echo) as server:
        client_of(server, tmp_path).ask(["?"])
        assert "Authorization" not in server.headers[0]
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        client_of(server, tmp_path).ask(["??"])
        assert server.headers[1]["Authorization"] == f"Bearer {SECRET}"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and SECRET in f.read_text()]
    assert "openai" in {record.name.partition(".")[0] for record in caplog.records}
    assert SECRET not in caplog.text
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\nX: y")
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY: contains characters that no API key has"):
        client_of(server, tmp_path)


def test_nothing_else_of_the_environment_is_sent(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {SECRET}\nX-Other: {SECRET}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    with serving(echo) as server:
        client_of(server, tmp_path, key="ABSENT").ask(["?"])
        client_of(server, tmp_path, key="MY_KEY").ask(["??"])
    without, with_key = server.headers
    assert with_key.pop("Authorization") == "Bearer sk-mine"
    for headers in (without, with_key):
        assert {name.lower() for name in headers if not name.lower().startswith("x-stainless-")} == {
            *("host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length")
        }
        assert SECRET not in str(headers)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(echo) as other, serving(lambda body: (status, {"Location": other.url}, {})) as server:
        with pytest.raises(UserError, match=f"after 1 tries: {status}"):
            client_of(server, tmp_path).ask(["?"])
        assert not other.seen
        assert len(server.seen) == 1


def test_a_proxy_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("ALL_PROXY", "unknown://127.0.0.1:9")
    with serving(echo) as server, pytest.raises(UserError, match=r"proxy in the environment: .*unset HTTPS_PROXY"):
        client_of(server, tmp_path).ask(["?"])


def test_without_the_client(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"needs the package openai; install dpo_jax\[judge\]"):
        EndpointClient(EndpointConfig("m"), tmp_path)


def test_importing_the_settings_is_light():
    heavy = ("jax", "numpy", "openai", "yaml", "dpo_jax.config.schema")
    code = f"import sys, dpo_jax.rewards.endpoint; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not JSON of a chat completion; check endpoint.base_url: hello"),
        (b"\xff", "not JSON of a chat completion"),
        ({"error": "x"}, 'not JSON of a chat completion; .* {"error": "x"}'),
        ([1], "not JSON of a chat completion"),
        ({"choices": []}, "not JSON of a chat"),
    ],
)
def test_other_responses_are_refused(tmp_path, content, message):
    with serving(lambda body: (200, {}, content)) as server, pytest.raises(UserError, match=message):
        client_of(server, tmp_path).ask(["?"])


def test_an_empty_answer_counts(tmp_path):
    with serving(lambda body: (200, {}, {"choices": [{"message": {"content": None}}]})) as server:
        assert client_of(server, tmp_path).ask(["?"]) == [""]


def test_cost_is_counted_and_limited_and_the_next_call_goes_on(tmp_path):
    prices = {"price_in": 1000.0, "price_out": 20_000.0}  # 100 and 10 tokens: 0.1 + 0.2 an answer
    questions = [str(i) for i in range(10)]
    with serving(echo) as server:
        client = client_of(server, tmp_path, parallel=1, max_cost=0.7, **prices)
        with pytest.raises(UserError, match=r"max_cost: 3 answers cost 0\.9 of at most 0\.7"):
            client.ask(questions)
        assert len(server.seen) == 3
        again = client_of(server, tmp_path, parallel=1, **prices)
        again.ask(questions)
        assert (again.found, again.asked) == (3, 7)
        assert again.cost == pytest.approx(2.1)
    no_usage = (200, {}, {"choices": [{"message": {"content": "x"}}]})
    with (
        serving(lambda body: no_usage) as server,
        pytest.raises(UserError, match="no token usage, which endpoint"),
    ):
        client_of(server, tmp_path, max_cost=1.0, **prices).ask(["?"])


def test_requests_keep_their_rate(tmp_path, waits):
    with serving(echo) as server:
        client_of(server, tmp_path, parallel=1, per_minute=60).ask([str(i) for i in range(4)])
    assert len(waits) == 3  # sleep returns at once, so each waits a second longer
    assert np.allclose(np.round(waits), [1, 2, 3])


def test_retries_count_for_the_rate(tmp_path, waits):
    left = [(503, {"Retry-After": "17"}, {})]
    with serving(lambda body: left.pop() if left else "yes") as server:
        client_of(server, tmp_path, per_minute=60).ask(["?"])
    assert np.allclose(np.round(waits), [17, 1])


def test_nothing_is_retried_once_the_budget_is_spent(tmp_path, monkeypatch):
    left = [(503, {}, {})]
    with serving(lambda body: left.pop() if left else "yes") as server:
        client = client_of(server, tmp_path, max_cost=1.0, price_in=1.0, price_out=1.0)
        monkeypatch.setattr(time, "sleep", lambda seconds: setattr(client, "cost", 1.0))
        with pytest.raises(UserError, match="max_cost"):
            client.ask(["?"])
        assert len(server.seen) == 1


def test_a_lone_surrogate_is_asked_about(tmp_path):
    with serving(echo) as server:
        assert client_of(server, tmp_path).ask(["a \ud800 b"]) == ["you said a ? b"]
        assert client_of(server, tmp_path).ask(["a ? b"]) == ["you said a ? b"]
        assert len(server.seen) == 2


def test_requests_are_concurrent(tmp_path):
    together = threading.Barrier(4, timeout=20)

    def say(body):
        together.wait()
        return "yes"

    with serving(say) as server:
        assert client_of(server, tmp_path, parallel=4).ask(list("abcd")) == ["yes"] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "endpoint.model: name the model"),
        ({"base_url": "file:///etc"}, "endpoint.base_url must start with http"),
        ({"parallel": 0}, "endpoint.parallel must be at least 1, got 0"),
        ({"per_minute": 0.0}, "endpoint.per_minute must be at least 0.001, got 0.0"),
        ({"max_cost": 1.0}, "needs endpoint.price_in and endpoint.price_out"),
        ({"body": ("temperature",)}, "endpoint.body: 'temperature': write name=value"),
        ({"body": ("model=x",)}, "model, messages, stream and n cannot be set"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        EndpointClient(EndpointConfig(**({"model": "m"} | settings)), tmp_path)


MATCH = Match("What is it?", "the longer answer", "short")


def test_a_reward_as_a_judge():
    judge = judging.by_reward(lambda prompts, texts: np.array([float(len(t)) for t in texts]))
    matches = [MATCH, MATCH._replace(a="x"), MATCH._replace(a="equal")]
    assert judge(matches) == [
        (Verdict(1.0, None, "17 against 5"),),
        (Verdict(0.0, None, "1 against 5"),),
        (Verdict(0.5, None, "5 against 5"),),
    ]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("A is longer.\nBetter: A", 1.0),
        ("Because.\n\nbetter: **B**.", 0.0),
        ('Better: "A"\nNo, wait.\nBetter: B\n', 0.0),
        ("Better: tie", 0.5),
        ("**Better:** a tie", 0.5),
        ("Better: A or B", None),
        ("A is better than B", None),
        ("Better: C", None),
        ("", None),
    ],
)
def test_answers_are_parsed(answer, score):
    assert judging.parse_verdict(answer, a_first=True) == score
    assert judging.parse_verdict(answer, a_first=False) == (None if score is None else 1 - score)


def reads_longer(question):
    """A judge without position bias: prefers the longer reply."""
    ((first, second),) = re.findall(r"Reply A:\n(.*)\n\nReply B:\n(.*)\n\nFirst say", question, re.DOTALL)
    return f"Length.\nBetter: {'A' if len(first) > len(second) else 'B'}"


def test_a_model_as_a_judge_in_any_order():
    asked = []

    def ask(questions):
        asked.extend(questions)
        return [reads_longer(q) for q in questions]

    for order in ("random", "both"):
        judge = judging.by_asking(ask, "dialogue", order, seed=0)
        matches = [
            MATCH,
            MATCH._replace(a="x"),
            *(MATCH._replace(prompt=str(i)) for i in range(20)),
            MATCH._replace(a="short"),
        ]
        found = judge(matches)
        assert [v[0].score for v in found] == [1.0, 0.0, *[1.0] * 20, 0.5]
        assert found[-1] == (Verdict(0.5, None, "the same text"),)
        assert len({v[0].a_first for v in found[:-1]}) == (2 if order == "random" else 1)
        assert {len(v) for v in found[:-1]} == {1 if order == "random" else 2}
    assert found[0][1].a_first is not found[0][0].a_first
    assert len(asked) == 22 + 44


def test_a_position_bias_shows_in_the_verdicts():
    judge = judging.by_asking(lambda qs: ["Better: A"] * len(qs), "summary", "both", seed=0)
    ((one, two),) = judge([MATCH])
    assert (one.score, one.a_first, two.score, two.a_first) == (1.0, True, 0.0, False)


def test_the_order_is_a_fair_draw_of_the_seed_and_the_match():
    matches = [Match(f"p{i}", "a", "b") for i in range(1000)]
    drawn = [judging.sample_order(m, 0) for m in matches]
    assert abs(sum(drawn) - 500) < 4 * 250**0.5
    assert drawn == [judging.sample_order(m, 0) for m in matches]
    assert drawn != [judging.sample_order(m, 1) for m in matches]


def test_braces_in_texts_are_left_alone():
    match = Match("Say {second} {x} \\1", "{prompt}", " b ")
    assert (
        judging.fill_template("{prompt}|{first}|{second}|{other}", match, True)
        == "Say {second} {x} \\1|{prompt}|b|{other}"
    )
    assert judging.fill_template("{first}|{second}", match, False) == "b|{prompt}"


def test_questions(tmp_path):
    for name, text in judging.QUESTIONS.items():
        assert judging.question_template(name) == text
        assert all(place in text for place in ("{prompt}", "{first}", "{second}", "\nBetter: A\n"))
    own = tmp_path / "own.txt"
    own.write_text("{prompt} {first} {second} Better: A, B or tie")
    assert judging.question_template(str(own)) == own.read_text()
    own.write_text("{prompt} {first} Better:")
    with pytest.raises(UserError, match=r"lacks \{second\}"):
        judging.question_template(str(own))
    with pytest.raises(UserError, match="'dialog' is neither summary, concise, dialogue nor a readable file"):
        judging.question_template("dialog")
    with pytest.raises(UserError, match="order: unknown order 'first'"):
        judging.by_asking(list, "summary", "first", 0)


def test_the_rate_limit_waits_in_seconds(tmp_path):
    """Really sleeps: 2 requests at 600 a minute are 0.1 s apart."""
    with serving(echo) as server:
        start = time.monotonic()
        EndpointClient(EndpointConfig("m", server.url, per_minute=600, parallel=1), tmp_path).ask(["a", "b"])
        assert time.monotonic() - start >= 0.1
