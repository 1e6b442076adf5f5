import asyncio
import json
import random
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from preceptor.errors import UserError
from preceptor.language import (
    Budget,
    CallFailed,
    Chat,
    ChatSettings,
    Echo,
    Endpoint,
    Limits,
    Reply,
    Request,
    Scripted,
    Spent,
    open_chat,
)
from preceptor.language.limits import WINDOW, Pace, back_off
from preceptor.language.progress import Ticker
from preceptor.language.store import key_of
from preceptor.language.structured import check_schema, read_json

NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def ask(text: str, **fields: Any) -> Request:
    return Request(({"role": "user", "content": text},), **fields)


def counted(said: list[str], answer: str = "") -> Scripted:
    """A script that writes down what it was asked, and says the same again or ``answer``."""

    def say(request: Request) -> str:
        said.append(request.messages[-1]["content"])
        return answer or request.messages[-1]["content"]

    return Scripted(say)


# Replies


def test_replies_come_in_the_order_of_the_requests() -> None:
    replies = Chat(Echo(), limits=Limits(concurrency=3)).ask([ask(f"one two {index}") for index in range(20)])
    assert [reply.text for reply in replies] == [f"one two {index}" for index in range(20)]
    assert all((reply.prompt_tokens, reply.completion_tokens) == (3, 3) for reply in replies)
    assert not any(reply.error or reply.cached or reply.cut for reply in replies)


def test_an_echo_is_cut_to_the_tokens_asked_for() -> None:
    [reply] = Chat(Echo()).ask([ask("a b c", max_tokens=2)])
    assert reply == Reply("a b", 3, 2, cut=True)


def test_a_script_that_runs_out_fails_the_rest() -> None:
    replies = Chat(Scripted(["a", "b"])).ask([ask("x")] * 3)
    assert [reply.text for reply in replies] == ["a", "b", ""]
    assert replies[2].error == "the script has only 2 answers"


def test_nothing_asked_is_nothing_said() -> None:
    assert Chat(Echo()).ask([]) == []


def test_an_event_loop_may_run_already() -> None:
    async def notebook() -> list[Reply]:
        return Chat(Echo()).ask([ask("x")])

    assert asyncio.run(notebook())[0].text == "x"

    async def wrong() -> list[Reply]:
        return Chat(Scripted(lambda request: 1 // 0 * "")).ask([ask("x")])

    with pytest.raises(ZeroDivisionError):
        asyncio.run(wrong())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": ()}, "has no messages"),
        ({"messages": ({"role": "robot", "content": "x"},)}, "role 'robot'"),
        ({"messages": ({"role": "user"},)}, "content that is text"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        Request(**{"messages": ({"role": "user", "content": "x"},), **fields})


# The cache


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    said: list[str] = []
    requests = [ask(f"{index}") for index in range(700)]
    with Chat(counted(said), cache=tmp_path / "cache.sqlite") as chat:
        first = chat.ask(requests)
        assert len(said) == 700
        assert chat.ask(requests) == [replace(reply, cached=True) for reply in first]
    with Chat(counted(said), cache=tmp_path / "cache.sqlite") as chat:
        changed = [*requests[:300], ask("new"), *requests[301:]]
        replies = chat.ask(changed)
        assert said[700:] == ["new"]
        assert [reply.cached for reply in replies] == [index != 300 for index in range(700)]
        assert chat.spent == Spent(1, 1, 1, 0.0)


def test_equal_requests_share_a_call_where_answers_are_kept() -> None:
    said: list[str] = []
    replies = Chat(counted(said), cache="cache.sqlite").ask([ask("x"), ask("y"), ask("x")])
    assert said == ["x", "y"]
    assert [reply.cached for reply in replies] == [False, False, True]
    Chat(counted(said)).ask([ask("x"), ask("x")])
    assert said == ["x", "y", "x", "x"]


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": ({"role": "system", "content": "x"},)},
        {"max_tokens": 1},
        {"temperature": 0.5},
        {"seed": 1},
        {"stop": ("x",)},
        {"schema": {}},
    ],
)
def test_every_field_and_the_backend_are_part_of_the_key(changes: dict[str, Any]) -> None:
    keys = {key_of("echo", ask("x")), key_of("echo", replace(ask("x"), **changes)), key_of("other", ask("x"))}
    assert len(keys) == 3
    assert key_of("echo", ask("x")) in keys


def test_a_failure_is_kept_and_asked_again_alone() -> None:
    def say(request: Request) -> str:
        if "3" in request.messages[0]["content"]:
            raise CallFailed("not today")
        return "fine"

    requests = [ask(f"{index}") for index in range(6)]
    chat = Chat(Scripted(say), cache="cache.sqlite")
    assert [reply.error for reply in chat.ask(requests)] == ["", "", "", "not today", "", ""]
    assert chat.failures() == [(requests[3], "not today")]
    said: list[str] = []
    later = Chat(counted(said), cache="cache.sqlite")
    assert later.ask(requests, again=False)[3].error == "not today"
    assert said == []
    assert later.ask([request for request, _ in later.failures()])[0].text == "3"
    assert said == ["3"]
    assert later.failures() == []
    assert not any(reply.error for reply in later.ask(requests))
    assert said == ["3"]


def test_a_cache_is_refused_when_it_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be looked at as one by its first bytes " * 20)
    with pytest.raises(UserError, match="cannot be opened"):
        Chat(Echo(), cache=tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE birds (name TEXT)")
    other.commit()
    with pytest.raises(UserError, match="no cache of answers"):
        Chat(Echo(), cache=tmp_path / "other.sqlite")
    with pytest.raises(UserError, match="cannot be opened"):
        Chat(Echo(), cache=tmp_path / "text" / "inside")


def test_two_processes_share_a_cache(tmp_path: Path, root: Path) -> None:
    script = (
        "import sys; from preceptor.language import *\n"
        "numbers = range(int(sys.argv[1]), int(sys.argv[2]))\n"
        "requests = [Request(({'role': 'user', 'content': str(number)},)) for number in numbers]\n"
        "assert not any(reply.error for reply in Chat(Echo(), cache='cache.sqlite').ask(requests))"
    )
    words = [sys.executable, "-c", script]
    running = [
        subprocess.Popen([*words, *ends], cwd=tmp_path, env={"PYTHONPATH": str(root)})
        for ends in (("0", "200"), ("100", "300"))
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    chat = Chat(Scripted([]), cache=tmp_path / "cache.sqlite")
    chat.backend = Echo()
    assert all(reply.cached for reply in chat.ask([ask(f"{index}") for index in range(300)]))


def test_unusual_text_survives_the_cache() -> None:
    texts = ["\x00 zero", "𝔘 ünïcode", "", "'; DROP TABLE answers; --"]
    for _ in range(2):
        replies = Chat(Echo(), cache="cache.sqlite").ask([ask(text) for text in texts])
        assert [reply.text for reply in replies] == texts
    Chat(Echo(), cache="cache.sqlite").ask([ask("half \ud83d")])
    assert Chat(Echo(), cache="cache.sqlite").ask([ask("half \ud83d")])[0].text == "half ?"


# Budgets and limits


def test_calls_stop_exactly_at_the_budget() -> None:
    said: list[str] = []
    chat = Chat(counted(said), budget=Budget(calls=7), limits=Limits(concurrency=5), cache="cache.sqlite")
    replies = chat.ask([ask(f"{index}") for index in range(20)])
    assert len(said) == chat.spent.calls == 7
    assert sum(not reply.error for reply in replies) == 7
    assert {reply.error for reply in replies[7:]} == {"not answered: the budget of 7 calls is used up"}
    assert chat.failures() == [], "what was never asked has not failed"
    assert not any(reply.error for reply in chat.ask([ask("3")])), "what the cache has costs nothing"
    assert "budget of 7 calls" in chat.ask([ask("fresh")])[0].error
    more = Chat(counted(said), cache="cache.sqlite").ask([ask(f"{index}") for index in range(20)])
    assert len(said) == 20
    assert not any(reply.error for reply in more)


def test_tokens_are_reserved_at_their_most_and_settled_at_what_they_were() -> None:
    said: list[str] = []
    # A call may take 1 + 10 tokens and takes 1 + 1: after n calls 2 n are spent, and the next needs 11 of the rest.
    chat = Chat(counted(said), budget=Budget(tokens=31), limits=Limits(concurrency=8))
    replies = chat.ask([ask(f"{index}", max_tokens=10) for index in range(40)])
    assert len(said) == 11
    assert chat.spent.tokens == 22
    assert replies[-1].error.startswith("not answered: the rest of the budget of 31 tokens")


def test_money_stops_before_it_is_passed() -> None:
    said: list[str] = []
    budget = Budget(cost=0.01, prompt_price=1000.0, completion_price=2000.0)
    chat = Chat(counted(said), budget=budget, limits=Limits(concurrency=4))
    chat.ask([ask(f"{index}", max_tokens=2) for index in range(40)])
    assert chat.spent.cost == pytest.approx(0.006)
    assert len(said) == 2, "a third could have cost 0.005 beside 0.006"


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(0, 60), seed=st.integers(0, 1000), concurrency=st.integers(1, 9))
def test_no_budget_is_ever_passed(limit: int, seed: int, concurrency: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 8) for _ in range(30)]

    def say(request: Request) -> str:
        return " ".join("w" for _ in range(draw.randint(0, request.max_tokens)))

    chat = Chat(Scripted(say), budget=Budget(tokens=limit), limits=Limits(concurrency=concurrency))
    chat.ask([ask(f"{index}", max_tokens=length) for index, length in enumerate(lengths)])
    assert chat.spent.tokens <= limit


def test_an_estimate_makes_no_call() -> None:
    said: list[str] = []
    chat = Chat(counted(said), cache="cache.sqlite", budget=Budget(prompt_price=1e6, completion_price=2e6))
    chat.ask([ask("a b")])
    estimate = chat.estimate([ask("a b"), ask("a b c", max_tokens=5), ask("d", max_tokens=5)])
    assert said == ["a b"]
    assert (estimate.requests, estimate.cached, estimate.most) == (3, 1, Spent(2, 4, 10, 24.0))


@pytest.mark.parametrize("bad", [{"calls": -1}, {"cost": 1.0}, {"prompt_price": float("nan")}])
def test_budgets_that_cannot_be_meant_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Budget(**bad)


@pytest.mark.parametrize("bad", [{"concurrency": 0}, {"attempts": 0}, {"call_seconds": 0.0}])
def test_limits_that_let_nothing_through_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be more than 0"):
        Limits(**bad)


@pytest.mark.parametrize("limits", [Limits(requests_per_minute=7), Limits(tokens_per_minute=30)])
def test_no_window_of_a_minute_has_more_than_the_limits(limits: Limits) -> None:
    pace, now, draw = Pace(limits), 0.0, random.Random(0)
    begun: list[tuple[float, int]] = []
    for _ in range(200):
        tokens = draw.randint(1, 10)
        now += pace.wait(now, 1, tokens)
        assert pace.wait(now, 1, tokens) == 0.0
        call = pace.begin(now, 1, tokens)
        took = draw.randint(1, tokens)
        pace.settle(call, took)
        begun.append((now, took))
        now += draw.choice([0.0, 0.0, 1.0, 20.0])
    for start, _ in begun:
        window = [tokens for at, tokens in begun if start <= at <= start + 60]
        assert len(window) <= (limits.requests_per_minute or 1000)
        assert sum(window) <= (limits.tokens_per_minute or 1000)


def test_a_pace_lets_calls_begin_as_early_as_it_may() -> None:
    pace = Pace(Limits(requests_per_minute=2))
    pace.begin(10.0, 1, 1)
    pace.begin(30.0, 1, 1)
    assert pace.wait(40.0, 1, 1) == pytest.approx(10.0 + WINDOW - 40.0)
    assert pace.wait(10.0 + WINDOW, 1, 1) == 0.0
    pace.pause(100.0)
    assert pace.wait(90.0, 1, 1) == pytest.approx(10.0)


def test_a_call_that_no_minute_could_hold_fails() -> None:
    limits = Limits(tokens_per_minute=10)
    assert "more than the 10 tokens per minute" in Chat(Echo(), limits=limits).ask([ask("a", max_tokens=50)])[0].error


def test_waits_grow_and_never_undercut_what_was_asked() -> None:
    draw = random.Random(0)
    for attempt in range(1, 12):
        longest = min(60.0, 0.5 * 2 ** (attempt - 1))
        waits = [back_off(attempt, None, draw) for _ in range(100)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert len(set(waits)) == 100, "calls that failed together come back apart"
        assert all(7.0 <= back_off(attempt, 7.0, draw) <= 8.0 for _ in range(100))


# Structured answers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', 1),
        ('```json\n{"a": 1}\n```', 1),
        ('```\n{"a": 1}', 1),
        ('Sure! Here it is: {"a": 1} I hope it helps.', 1),
        ('{"a": 1,}', 1),
        ('As asked [in JSON]:\n```json\n{\n  "a": 1,\n}\n```\nDone.', 1),
        ('{"b": 2} no, rather {"a": 3}', 3),
        ('<think>{ not this }</think> {"a": 4}', 4),
    ],
)
def test_json_is_found_and_mended(text: str, value: int) -> None:
    assert read_json(text, NUMBER) == ({"a": value}, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no complete JSON"),
        ("I cannot do that.", "no complete JSON"),
        ('{"a": "1"}', "at ['a'] '1' is not of type 'integer'"),
        ('{"b": 1}', "'a' is a required property"),
        ('{"a": 1, "b": 2}', "Additional properties"),
        ('{"a": 1', "no complete JSON"),
        ('{"x": {"a": 1}, "y": ', "no complete JSON"),
        ("{'a': 1}", "no complete JSON"),
        ('{"a": NaN}', "no complete JSON"),
        ("[" * 5000, "no complete JSON"),
        (f'{{"a": {"9" * 5000}}}', "too many digits"),
    ],
)
def test_json_is_never_made_up(text: str, reason: str) -> None:
    value, wrong = read_json(text, NUMBER)
    assert value is None
    assert reason in wrong


def test_only_what_stands_outside_strings_is_mended() -> None:
    assert read_json('{"t": "a, ]\nb, }",}', {"type": "object"}) == ({"t": "a, ]\nb, }"}, "")
    assert read_json('```json\n"x, ]"\n```', {"type": "string"}) == ("x, ]", "")
    assert read_json('{"code": "```python\\nf({})\\n```"}', {"type": "object"})[0] == {"code": "```python\nf({})\n```"}


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_every_value_is_read_as_it_is(value: Any) -> None:
    text = json.dumps(value)
    assert read_json(text, {}) == (value, "")
    assert read_json(f"```json\n{text}\n```", {}) == (value, "")
    if isinstance(value, list | dict):
        assert read_json(f"Here: {text} That is all.", {}) == (value, "")


def test_a_misfit_is_asked_again_with_what_was_wrong() -> None:
    asked: list[Request] = []
    answers = iter(['{"a": "x"}', '{"a": 5}'])

    def say(request: Request) -> str:
        asked.append(request)
        return next(answers)

    [reply] = Chat(Scripted(say)).ask([ask("give a", schema=NUMBER)])
    assert (reply.data, reply.text, reply.error) == ({"a": 5}, '{"a": 5}', "")
    assert json.dumps(NUMBER) in asked[0].messages[0]["content"]
    assert asked[1].messages[1] == {"role": "assistant", "content": '{"a": "x"}'}
    assert "'x' is not of type 'integer'" in asked[1].messages[2]["content"]
    assert reply.completion_tokens == 4


def test_misfits_are_bounded_and_the_last_is_told() -> None:
    said: list[str] = []
    chat = Chat(counted(said, "no"), limits=Limits(schema_attempts=4), cache="cache.sqlite")
    [reply] = chat.ask([ask("give a", schema=NUMBER)])
    assert len(said) == 4
    assert reply.text == "no"
    assert reply.data is None
    assert reply.error.startswith("no answer that fits the schema in 4 attempts; of the last one: it holds no complete")
    assert chat.failures() == [(ask("give a", schema=NUMBER), reply.error)]
    chat.ask([ask("give a", schema=NUMBER)], again=False)
    assert len(said) == 4
    better = Chat(counted(said, '{"a": 2}'), limits=Limits(schema_attempts=4), cache="cache.sqlite")
    assert better.ask([request for request, _ in better.failures()])[0].data == {"a": 2}
    assert len(said) == 5, "only the attempt that failed is made again"
    assert better.ask([ask("give a", schema=NUMBER)])[0].cached
    assert better.failures() == []


def test_fewer_attempts_than_in_the_cache_end_with_a_call() -> None:
    said: list[str] = []
    Chat(counted(said, "no"), limits=Limits(schema_attempts=4), cache="cache.sqlite").ask([ask("a", schema=NUMBER)])
    fewer = Chat(counted(said, '{"a": 2}'), limits=Limits(schema_attempts=2), cache="cache.sqlite")
    [reply] = fewer.ask([ask("a", schema=NUMBER)])
    assert len(said) == 5
    assert (reply.data, reply.completion_tokens) == ({"a": 2}, 3)


def test_attempts_before_a_stop_are_not_made_again() -> None:
    said: list[str] = []
    Chat(counted(said, "no"), budget=Budget(calls=2), cache="cache.sqlite").ask([ask("give a", schema=NUMBER)])
    [reply] = Chat(counted(said, '{"a": 1}'), cache="cache.sqlite").ask([ask("give a", schema=NUMBER)])
    assert len(said) == 3
    assert reply.data == {"a": 1}
    assert not reply.cached


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"$ref": "https://example.com/schema.json"}, {"items": {"$ref": "#/$defs/none"}}]
)
def test_schemas_that_are_none_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="schema of a structured answer"):
        Chat(Echo()).ask([ask("x", schema=schema)])


def test_a_schema_may_refer_to_itself() -> None:
    schema = {"$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}, "$ref": "#/$defs/list"}
    check_schema(schema)
    assert read_json("[[], [[]]]", schema) == ([[], [[]]], "")
    assert read_json("[" * 400 + "]" * 400, schema) == (None, "it is nested too deeply")


def test_half_characters_are_replaced() -> None:
    assert read_json('{"t": "a\\ud83d b\\ud83d\\ude00"}', {}) == ({"t": "a? b\U0001f600"}, "")


# Settings, progress, and what is missing


def test_settings_open_a_chat() -> None:
    assert open_chat(ChatSettings(model="echo")).ask([ask("x")])[0].text == "x"
    with pytest.raises(UserError, match="base_url is not"):
        open_chat(ChatSettings(model="m", key_variable="A_KEY"))
    with pytest.raises(UserError, match="UNSET_KEY"):
        open_chat(ChatSettings(model="m", base_url="http://127.0.0.1:1/v1", key_variable="UNSET_KEY"))


def test_a_key_is_no_setting() -> None:
    with pytest.raises(UserError, match="never the key itself") as refused:
        ChatSettings(model="m", base_url="http://127.0.0.1:1/v1", key_variable="sk-do-not-print-this")
    assert "do-not-print-this" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://x/v1", "http://", "http://x:99999/v1", "http://x/v1\r\nA: b", "http://x y/v1"]
)
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="no endpoint's"):
        Endpoint(url, "m")


@pytest.mark.parametrize("url", ["https://me:secret-word@x/v1", "https://x/v1?api-key=secret-word"])
def test_addresses_that_hold_a_key_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="bare address") as refused:
        Endpoint(url, "m")
    assert "secret-word" not in str(refused.value)


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        ("httptools", "Endpoint('http://127.0.0.1:1/v1', 'm')"),
        ("jsonschema", "Chat(Echo()).ask([Request(({'role': 'user', 'content': 'x'},), schema={})])"),
        ("torch", "open_chat(ChatSettings())"),
    ],
)
def test_a_missing_package_is_named(package: str, asked: str, root: Path, tmp_path: Path) -> None:
    # A finder that hides one package, as if it were not installed.
    script = (
        "import importlib.machinery, sys\n"
        "class Hidden(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *rest):\n"
        f"        return None if name.split('.')[0] == {package!r} else super().find_spec(name, *rest)\n"
        "sys.meta_path = [Hidden if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]\n"
        "from preceptor.errors import UserError\n"
        "from preceptor.language import *\n"
        f"try:\n    {asked}\n"
        "except UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    assert f"needs the package {package}" in done.stdout, done.stderr
    assert 'pip install "preceptor[' in done.stdout


def test_talking_to_an_endpoint_imports_no_torch(root: Path) -> None:
    script = (
        "import sys; from preceptor.language import *; from preceptor.language import connection\n"
        "open_chat(ChatSettings(model='m', base_url='http://127.0.0.1:1/v1')); Chat(Echo()).ask([])\n"
        "assert not {'torch', 'transformers', 'jsonschema'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_requests_are_planned_while_the_first_are_answered(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: Request) -> str:
        asked.append(request.messages[0]["content"])
        return f"answer to {asked[-1]}"

    requests = [Request(({"role": "user", "content": str(place % 700)},)) for place in range(3 * 700)]
    with Chat(Scripted(answer), cache=tmp_path / "answers.sqlite", limits=Limits(concurrency=8), shown=False) as chat:
        replies = chat.ask(requests)
        assert [reply.text for reply in replies] == [f"answer to {place % 700}" for place in range(3 * 700)]
        assert sorted(map(int, asked)) == list(range(700)), "equal requests share a call, however far apart they stand"
        assert [reply.cached for reply in replies] == [False] * 700 + [True] * 1400
        assert all(reply.cached for reply in chat.ask(requests))
    assert len(asked) == 700


def test_what_stands_behind_a_stop_is_still_found_in_the_cache(tmp_path: Path) -> None:
    requests = [Request(({"role": "user", "content": str(place)},)) for place in range(1200)]
    with Chat(Echo(), cache=tmp_path / "answers.sqlite", shown=False) as chat:
        chat.ask(requests[600:])
    with Chat(Echo(), cache=tmp_path / "answers.sqlite", budget=Budget(calls=5), shown=False) as chat:
        replies = chat.ask(requests)
    assert [reply.text for reply in replies if not reply.error] == [str(n) for n in [*range(5), *range(600, 1200)]]
    assert all("not answered" in reply.error for reply in replies[5:600])


def test_progress_tells_rate_cost_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    ticker = Ticker(1000, Budget(cost=5.0, prompt_price=1.0), Spent(1, 100, 0), shown=True)
    ticker.count(100, failed=False, called=False, spent=Spent())
    for _ in range(100):
        ticker.count(3, failed=False, called=True, spent=Spent())
    ticker.count(1, failed=True, called=True, spent=Spent())
    line = ticker.describe(10.0, Spent(301, 4000, 1100, 0.25))
    assert line == "0:00:20 left  30.1/s  5,000 tokens  cost 0.25 of 5  100 from the cache  1 failed"
    ticker.close()
    assert capsys.readouterr().err == "", "short work says nothing"
