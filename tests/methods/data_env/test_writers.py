"""Writers of training items: the symbolic one, a chat model, and the agents that order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from preceptor.errors import UserError
from preceptor.language import Chat, Request, Scripted
from preceptor.methods.data_env.agents import OpenEndedAgent
from preceptor.methods.data_env.chat_writer import ChatWriter
from preceptor.methods.data_env.checks import Checks
from preceptor.methods.data_env.writers import Order, Symbolic
from preceptor.tasks.arithmetic import Arithmetic
from preceptor.tasks.figures import Figures, Shape, render
from preceptor.tasks.records import Completed, Datum

TASK = Arithmetic(form="worded", only=("addition", "reversal"))
ITEMS = TASK.items(12, seed=1)
ERRORS = tuple(Completed(item, "no", False) for item in ITEMS[:4])


def spec(place: int, **more: Any) -> dict[str, Any]:
    return {"index": place, "problem": f"What is {place} plus 1?", "work": "Add.", "answer": f"{place + 1}"} | more


def writer(answer: Callable[[Request], Any], **more: Any) -> tuple[ChatWriter, list[Request]]:
    asked: list[Request] = []

    def say(request: Request) -> str:
        asked.append(request)
        said = answer(request)
        return said if isinstance(said, str) else json.dumps(said)

    return ChatWriter(Chat(Scripted(say)), TASK, **more), asked


def test_the_symbolic_writer_follows_the_errors() -> None:
    [written] = Symbolic(TASK).write([Order(40, 3, errors=ERRORS[:1])])
    assert {(one.skill, one.subskill) for one in written.data} == {(ITEMS[0].skill, ITEMS[0].subskill)}
    assert len(written.data) == 40
    assert all(TASK.correct(ITEMS[0], ITEMS[0].truth) for _ in range(1))
    [most] = Symbolic(TASK).write([Order(12, 3, errors=(*ERRORS[:1] * 5, *ERRORS[1:2]), hypotheses=1)])
    assert {one.subskill for one in most.data} == {ITEMS[0].subskill}


def test_the_symbolic_writer_without_errors_is_even_and_exact() -> None:
    [written] = Symbolic(TASK).write([Order(60, 3)])
    assert set(Counter((one.skill, one.subskill) for one in written.data).values()) == {10}
    checks = Checks(TASK, ())(written.data, [], None)
    assert all(check.parses for check in checks)
    assert Symbolic(TASK).write([Order(0, 3)])[0].data == ()
    [lost] = Symbolic(TASK).write([Order(5, 3, "addition", "singing")])
    assert lost.data == ()
    assert "singing" in lost.failures[0]


def test_every_check_gives_one_verdict_an_item_in_order() -> None:
    data = [TASK.datum(item) for item in ITEMS]
    checks = Checks(TASK, (ITEMS[5],))(data, [], lambda items: [item.truth for item in items[:3]] + [""] * 9)
    assert [check.datum_id for check in checks] == [datum.id for datum in data]
    assert [check.known for check in checks] == [True] * 3 + [False] * 9
    assert checks[5].leaked
    assert Checks(TASK, ())([], [], None) == []


def test_a_chat_writer_makes_items_that_the_scorer_reads() -> None:
    teacher, asked = writer(lambda request: {"items": [spec(place) for place in range(10, 13)]})
    [written] = teacher.write([Order(3, 1, errors=ERRORS[:2], examples=tuple(ITEMS[5:8]))])
    assert [one.response for one in written.data][0] == "Add.\n#### 11"
    assert all(check.passed for check in Checks(TASK, ())(written.data, [], None))
    text = asked[0].messages[-1]["content"]
    assert all(one.item.instruction in text for one in ERRORS[:2])
    assert "Write 3 new problems that teach what is missing" in text


def test_an_agent_without_state_shows_no_error_and_no_example() -> None:
    teacher, asked = writer(lambda request: {"items": [spec(place) for place in range(10)]})
    agent = OpenEndedAgent(teacher, "no_state", tuple(ITEMS), TASK.skills, items=10)
    agent({"round": 0, "completed": ERRORS})
    assert not any(item.instruction in request.messages[-1]["content"] for request in asked for item in ITEMS)


@pytest.mark.parametrize(("items", "sizes"), [(125, [10] * 12 + [5]), (10, [10]), (4, [4])])
def test_no_item_is_lost_to_the_size_of_a_call(items: int, sizes: list[int]) -> None:
    orders: list[Order] = []

    class Watched(Symbolic):
        def write(self, asked: Any) -> Any:
            orders.extend(asked)
            return super().write(asked)

    data, _ = OpenEndedAgent(Watched(TASK), "with_state", tuple(ITEMS), TASK.skills, items=items)(
        {"round": 0, "completed": ERRORS}
    )
    assert [order.count for order in orders] == sizes
    assert len(data) == items


@pytest.mark.parametrize("errors", [0, 1, 2, 4])
def test_at_most_as_many_errors_are_shown_as_there_are(errors: int) -> None:
    orders: list[Order] = []

    class Watched(Symbolic):
        def write(self, asked: Any) -> Any:
            orders.extend(asked)
            return super().write(asked)

    agent = OpenEndedAgent(Watched(TASK), "with_state", tuple(ITEMS), TASK.skills, items=20)
    data, _ = agent({"round": 0, "completed": ERRORS[:errors]})
    assert bool(data) == bool(errors)
    assert {len(order.errors) for order in orders} == ({min(3, errors)} if errors else set())
    assert all(len(order.examples) == 3 for order in orders)


def test_hypotheses_name_the_subskill_of_their_items() -> None:
    groups = [{"weak_subskill": name, "items": [spec(place)]} for place, name in enumerate(("carrying", "zeros"))]
    teacher, asked = writer(lambda request: {"hypotheses": groups})
    [written] = teacher.write([Order(2, 1, "addition", errors=ERRORS[:1], hypotheses=2)])
    assert [(one.skill, one.subskill) for one in written.data] == [("addition", "carrying"), ("addition", "zeros")]
    assert "Make 2 hypotheses" in asked[0].messages[-1]["content"]


def test_what_is_missing_is_asked_for_once_more_showing_what_there_is() -> None:
    turns = iter([[spec(1)], [spec(2), spec(3), spec(4)]])
    teacher, asked = writer(lambda request: {"items": next(turns)})
    [written] = teacher.write([Order(3, 1, "addition", "one_digit")])
    assert [one.instruction for one in written.data] == [f"What is {place} plus 1?" for place in (1, 2, 3)]
    assert len(asked) == 2
    assert "Write 2 new problems" in asked[1].messages[-1]["content"]
    assert "What is 1 plus 1?" in asked[1].messages[-1]["content"]


def test_an_order_of_nothing_asks_nobody() -> None:
    teacher, asked = writer(lambda request: {"items": []})
    assert teacher.write([Order(0, 1)])[0].data == ()
    assert asked == []


def test_malformed_items_are_recorded_and_too_many_failures_end_the_work() -> None:
    teacher, _ = writer(lambda request: {"items": [spec(1), spec(2, answer=" ")]}, least=0.5)
    [written] = teacher.write([Order(2, 1)])
    assert len(written.data) == 2  # the second call gave the first of its items
    assert "malformed item: an item lacks its answer" in written.failures
    broken, _ = writer(lambda request: "no JSON", least=0.5)
    with pytest.raises(UserError, match="Only 0 of 1 calls to the teacher gave an item"):
        broken.write([Order(2, 1)])
    lenient, _ = writer(lambda request: "no JSON", least=0.0)
    [lost] = lenient.write([Order(2, 1)])
    assert lost.data == ()
    assert all("the call failed" in reason for reason in lost.failures)


def test_two_writers_share_nothing() -> None:
    first, _ = writer(lambda request: {"items": [spec(1)]})
    second, asked = writer(lambda request: {"items": [spec(2)]})
    first.write([Order(1, 1)])
    [written] = second.write([Order(1, 1)])
    assert written.data[0].instruction == "What is 2 plus 1?"
    assert len(asked) == 1


def test_subskills_are_proposed_up_to_the_number_asked_for() -> None:
    teacher, asked = writer(lambda request: {"subskills": ["a", "b", "c"]})
    assert teacher.propose("addition", ("carrying",), 2) == ["a", "b"]
    assert "carrying" in asked[0].messages[-1]["content"]
    failing, _ = writer(lambda request: "nothing")
    assert failing.propose("addition", (), 2) == []
    assert Symbolic(TASK).propose("reversal", ("Three_Digits",), 5) == ["four_digits", "five_digits"]


def test_ids_of_unlike_data_differ() -> None:
    data: list[Datum] = [one for written in Symbolic(TASK).write([Order(9, 1), Order(9, 2)]) for one in written.data]
    assert len({one.instruction for one in data}) > 12


def test_images_that_a_model_describes_are_drawn() -> None:
    figures = Figures()
    words = "A red circle at row 1, column 2; blue cross at row 4 column 1."
    said = {"items": [{"index": 1, "problem": "count red", "image": words, "answer": "1"}]}
    said["items"].append({"index": 2, "problem": "count red", "image": "a cat on a mat", "answer": "1"})
    chat = Chat(Scripted(lambda request: json.dumps(said)))
    [written] = ChatWriter(chat, figures, draw=figures.draw).write([Order(1, 0)])
    drawn = render((Shape(0, 1, "circle", "red"), Shape(3, 0, "cross", "blue")))
    assert (written.data[0].image == drawn).all()
    assert "a cat on a mat" in written.failures[0]


@pytest.mark.parametrize(
    "words",
    ["red circle at row 5 column 1", "red circle at row 0 column 1", "", "green circle at row one column 1"]
    + ["red circle at row 1 column 1; blue cross at row 1 column 1"],
)
def test_what_cannot_be_drawn_is_refused(words: str) -> None:
    with pytest.raises(UserError, match="No image can be drawn"):
        Figures().draw(words)
