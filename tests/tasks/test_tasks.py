import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preceptor.errors import UserError
from preceptor.sandbox import Reason, Sandbox, SandboxLimits, sandbox_layers
from preceptor.tasks.arithmetic import Arithmetic
from preceptor.tasks.contamination import leaks
from preceptor.tasks.figures import CELL, GRID, WORDS, Figures, Shape, read_word, render
from preceptor.tasks.gsm8k import read_problems
from preceptor.tasks.programs import Programs, program_of
from preceptor.tasks.records import Completed, Datum, Item, Task, complete, item_of, report
from preceptor.tasks.sampling import select
from tests.data_folder import DATA, needs

needs_isolation = pytest.mark.skipif(
    "refused" in sandbox_layers(), reason="this kernel offers no isolation of files or network"
)
TASKS: list[Task] = [
    Arithmetic(), Arithmetic(form="worded"), Programs(), Programs(form="worded"), Figures(), Figures(form="worded")
]  # fmt: skip
EXACT = [task for task in TASKS if task.name != "code"]


def name_of(task: Task) -> str:
    return f"{task.name}-{getattr(task, 'form', '')}"


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with Sandbox(SandboxLimits(wall=60), workers=1) as sandbox:
        yield Programs(sandbox=sandbox)


# What every task keeps


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_items_are_even_distinct_and_repeatable(task: Task) -> None:
    items = task.items(200, seed=3)
    assert len({item.id for item in items}) == 200
    counts = Counter(item.skill for item in items)
    assert set(counts) == set(task.skills)
    assert max(counts.values()) - min(counts.values()) <= 1
    again = task.items(200, seed=3)
    assert [item.id for item in items] == [item.id for item in again]
    assert [(item.instruction, item.truth) for item in items] == [(item.instruction, item.truth) for item in again]
    assert [item.truth for item in task.items(200, seed=4)] != [item.truth for item in items]
    assert task.items(50, seed=3) == items[:50]


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_a_subskill_gives_the_same_items_whatever_else_is_asked(task: Task) -> None:
    skill = list(task.skills)[1]
    subskill = task.skills[skill][-1]
    alone = task.items(5, seed=9, skill=skill, subskill=subskill)
    assert {(item.skill, item.subskill) for item in alone} == {(skill, subskill)}
    among = [item for item in task.items(400, seed=9) if (item.skill, item.subskill) == (skill, subskill)]
    assert among[:5] == alone


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_unknown_skills_are_named(task: Task) -> None:
    skill = next(iter(task.skills))
    with pytest.raises(UserError, match=rf"no skill 'flying'; choose one of: {skill}"):
        task.items(1, seed=0, skill="flying")
    with pytest.raises(UserError, match="no subskill 'flying'; choose one of"):
        task.items(1, seed=0, skill=skill, subskill="flying")
    with pytest.raises(UserError, match="-1 items"):
        task.items(-1, seed=0)
    with pytest.raises(UserError, match="2 questions and gave 1"):
        task.score(task.items(2, seed=0), ["5"])
    assert task.items(0, seed=0) == []


@pytest.mark.parametrize("task", EXACT, ids=name_of)
def test_the_symbolic_teacher_is_always_right(task: Task) -> None:
    items = task.items(400, seed=1)
    data = [task.datum(item) for item in items]
    assert all(task.score(items, [datum.response for datum in data]))
    asked_again = [item_of(datum, task.name) for datum in data]
    assert all(task.score(asked_again, [item.truth for item in items]))
    assert all(item.image is datum.image for item, datum in zip(items, data))


@pytest.mark.parametrize("task", EXACT, ids=name_of)
def test_wrong_answers_are_wrong(task: Task) -> None:
    items = task.items(200, seed=1)
    other = {item.truth: next(one.truth for one in items if not task.correct(item, one.truth)) for item in items}
    assert not any(task.score(items, [other[item.truth] for item in items]))
    for response in ("", "I do not know", "####", "%", "\x00"):
        assert not any(task.score(items, [response] * len(items)))


def test_some_skills_alone() -> None:
    task = Arithmetic(only=("reversal", "addition/one_digit", "addition/three_digit"))
    assert dict(task.skills) == {
        "reversal": ("three_digits", "four_digits", "five_digits"),
        "addition": ("one_digit", "three_digit"),
    }
    with pytest.raises(UserError, match="no skill 'flying'"):
        Arithmetic(only=("flying",)).items(1, seed=0)
    with pytest.raises(UserError, match="no subskill 'flying'"):
        Figures(only=("counting/flying",)).items(1, seed=0)
    assert select({"a": ("x",), "b": ("x", "y")}, subskill="x") == {"a": ("x",), "b": ("x",)}


# Arithmetic


def test_compact_arithmetic_is_true() -> None:
    """Python works out what its own notation can say."""
    task = Arithmetic(
        only=("addition", "subtraction", "multiplication/tables", "division/tables", "division/two_digit")
    )
    for item in task.items(300, seed=2):
        assert eval(item.instruction.rstrip("=")) == int(item.truth)
    for item in Arithmetic(only=("reversal",)).items(30, seed=2):
        assert item.instruction == f"rev {item.truth[::-1]}="
    for item in Arithmetic(only=("comparison/decimals",)).items(30, seed=2):
        assert float(item.truth) == max(float(one) for one in item.instruction[4:-1].split())


def test_compact_items_are_short_and_answered_by_the_number_alone() -> None:
    task = Arithmetic()
    items = task.items(400, seed=0)
    assert max(len(task.prompt(item)) for item in items) <= 20
    assert max(len(task.datum(item).response) for item in items) <= 8
    item = task.items(1, seed=0, skill="addition", subskill="two_digit")[0]
    assert not task.correct(item, f"it is {item.truth} or 7")
    assert task.correct(item, f" {item.truth}\n")


def test_worded_items_show_their_work() -> None:
    task = Arithmetic(form="worded")
    (item,) = task.items(1, seed=0, skill="word_problems", subskill="sharing")
    datum = task.datum(item)
    assert datum.response == f"{item.work}\n#### {item.truth}"
    assert task.prompt(item).startswith(item.instruction)
    assert task.correct(item, f"Each bag holds {item.truth} of them.")


# Written problems


def test_problems_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [
        {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"question": "Why\u2028?", "answer": "Half of 2,400.\n#### 1,200"},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    task = read_problems(path)
    items = task.items(2, seed=0)
    assert {item.truth for item in items} == {"4", "1200"}
    data = {item.id: task.datum(item).response for item in items}
    assert data["train-1"] == "2+2=4\n#### 4"
    assert task.score(items, list(data.values())) == [True, True]
    assert dict(task.skills) == {"word_problems": ("unsorted",)}
    with pytest.raises(UserError, match="3 problems were asked for, and the data hold 2"):
        task.items(3, seed=0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "holds no problem"),
        ("no json", "Line 1 of"),
        ("[1]", "not an object"),
        ('{"question": "How many?"}', "with a question and an answer"),
        ('{"question": "How many?", "answer": "4"}', "does not end with ####"),
        ('{"question": "How many?", "answer": "#### many"}', "and a number"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=words):
        read_problems(path)
    with pytest.raises(UserError, match="There is no file"):
        read_problems(tmp_path / "absent.jsonl")


@needs("gsm8k", "test.jsonl")
def test_the_whole_of_gsm8k_is_read() -> None:
    task = read_problems(DATA / "gsm8k" / "test.jsonl")
    assert len(task.problems) == 1319
    assert all(task.score(task.problems, [task.datum(item).response for item in task.problems]))


# Programs


@needs_isolation
@pytest.mark.parametrize("form", ["compact", "worded"])
def test_reference_programs_pass_and_others_fail(programs: Programs, form: str) -> None:
    task = replace(programs, form=form)
    items = [
        item
        for skill in task.skills
        for sub in task.skills[skill]
        for item in task.items(2, seed=5, skill=skill, subskill=sub)
    ]
    responses = [task.datum(item).response for item in items]
    assert task.score(items, responses) == [True] * len(items)
    shifted = [item.truth for item in items[2:] + items[:2]]  # the answers to other subskills
    assert sum(task.score(items, shifted)) == 0


@needs_isolation
def test_near_misses_fail(programs: Programs) -> None:
    for skill, subskill, right, wrong in (
        ("arithmetic", "chain", ")*", ")+"),
        ("conditions", "choice", "a if", "b if"),
        ("lists", "filtering", "x>", "x>="),
        ("recursion", "adding", "n<1", "n<2"),
    ):
        items = programs.items(8, seed=1, skill=skill, subskill=subskill)
        items = [item for item in items if right in item.truth]
        assert items
        near = [item.truth.replace(right, wrong) for item in items]
        assert not any(programs.score(items, near)), (skill, near)


@needs_isolation
def test_verdicts_say_why(programs: Programs) -> None:
    (item,) = programs.items(1, seed=0, skill="arithmetic", subskill="chain")
    responses = [item.truth, "(", "1", "__import__('os').fork()", item.truth]
    verdicts = programs.judge([item] * 5, responses)
    reasons = [verdict.reason for verdict in verdicts]
    assert reasons == [Reason.PASSED, Reason.EXCEPTION, Reason.FAILED, Reason.PROCESS, Reason.PASSED]
    assert verdicts[0] is verdicts[4]  # equal programs are run once
    broken = replace(item, tests="whatever")
    assert "cannot be read" in programs.judge([broken], [item.truth])[0].detail
    assert not programs.correct(replace(item, tests=""), item.truth)


def test_programs_are_found_in_responses() -> None:
    item = Item("1", "code", "s", "s", "Do.", "a+b", starter="def f(a, b):\n    return ", tests="f(1, 2) == 3")
    whole = "def f(a, b):\n    return a+b"
    for response in ("a+b", " a+b", "return a+b", "```python\na+b\n```", "```\nreturn a+b\n```\nDone."):
        assert program_of(item, response).rstrip() == whole
    for response in (whole, f"Here:\n```python\n{whole}\n```", f"```py\nx\n```\nor\n```py\n{whole}"):
        assert program_of(item, response).strip() == whole
    assert program_of(replace(item, starter=""), "f = max") == "f = max"


def test_a_worded_lesson_holds_a_teachers_whole_function_once(programs: Programs) -> None:
    whole = "def f(a, b):\n    return a+b"
    item = Item("1", "code", "s", "s", "Do.", whole, starter="def f(a, b):", tests="f(1, 2) == 3")
    datum = replace(programs, form="worded").datum(item)
    assert datum.response == f"```python\n{whole}\n```"
    assert programs.correct(item, datum.response)


# Figures


def test_images_are_what_their_scenes_say() -> None:
    scene = [Shape(0, 1, "square", "red"), Shape(3, 2, "circle", "blue")]
    image = render(scene)
    assert image.shape == (GRID * 8, GRID * 8, 3)
    assert image.dtype == np.uint8
    cells = image.reshape(GRID, 8, GRID, 8, 3).transpose(0, 2, 1, 3, 4)
    drawn = {(row, column) for row in range(GRID) for column in range(GRID) if (cells[row, column] != 255).any()}
    assert drawn == {(0, 1), (3, 2)}
    assert tuple(cells[0, 1, 4, 4]) == (220, 40, 40)
    assert tuple(cells[3, 2, 4, 4]) == (50, 80, 220)
    assert (render(scene) == image).all()
    looks = {render([Shape(0, 0, kind, "red")]).tobytes() for kind in ("circle", "square", "triangle", "cross")}
    assert len(looks) == 4


@pytest.mark.parametrize("form", ["compact", "worded"])
def test_answers_are_what_the_pixels_say(form: str) -> None:
    """Count the cells that hold a colour, by the pixels alone."""
    task = Figures(form=form, only=("counting/colour", "comparison/colours"))
    size = CELL[form]
    from preceptor.tasks.figures import COLOURS

    for item in task.items(60, seed=1):
        cells = item.image.reshape(GRID, size, GRID, size, 3).transpose(0, 2, 1, 3, 4).reshape(GRID * GRID, -1, 3)
        found = {name: sum((cell == value).all(-1).any() for cell in cells) for name, value in COLOURS.items()}
        asked = [name for name in COLOURS if name in item.instruction]
        if item.skill == "counting":
            assert int(item.truth) == found[asked[0]]
        else:
            assert found[item.truth] == max(found[name] for name in asked) > min(found[name] for name in asked)


def test_no_answer_is_much_more_frequent_than_another() -> None:
    task = Figures()
    for skill, subskills in task.skills.items():
        for subskill in subskills:
            counts = Counter(item.truth for item in task.items(300, seed=0, skill=skill, subskill=subskill))
            assert max(counts.values()) < 2 * 300 / len(counts)


def test_answer_words_are_found() -> None:
    assert read_word("It is Red.\n#### Blue") == "blue"
    assert read_word("The answer is left, not right.") == "left"
    assert read_word("I think that it is a circle") == "circle"
    assert read_word("nothing") is None
    assert read_word("Red.", strict=True) == "red"
    assert read_word("red blue", strict=True) is None
    assert read_word("a red one", strict=True) is None
    assert all(read_word(word, strict=True) == word for word in WORDS)


# Reports and leaks


def done(skill: str, subskill: str, *marks: bool) -> list[Completed]:
    item = Item("1", "math", skill, subskill, "1+1=", "2")
    return [Completed(item, "2" if mark else "3", mark) for mark in marks]


def test_a_report_counts() -> None:
    told = report([*done("a", "x", True, False), *done("a", "y", True), *done("b", "x", False)])
    assert (told.task, told.count, told.correct, told.accuracy) == ("math", 4, 2, 0.5)
    assert {skill: one.accuracy for skill, one in told.skills.items()} == {"a": 2 / 3, "b": 0.0}
    assert {key: one.count for key, one in told.subskills.items()} == {("a", "x"): 2, ("a", "y"): 1, ("b", "x"): 1}
    assert "c" not in told.skills  # not examined is unknown, not 0


def test_a_report_of_nothing_or_of_two_tasks_is_refused() -> None:
    with pytest.raises(UserError, match="no completed item"):
        report([])
    (one,) = done("a", "x", True)
    with pytest.raises(UserError, match="code, math"):
        report([one, replace(one, item=replace(one.item, task="code"))])
    with pytest.raises(UserError, match="math has no item"):
        complete(Arithmetic(), [], [])


def test_completed_items_are_scored() -> None:
    task = Arithmetic()
    items = task.items(2, seed=0)
    assert [one.correct for one in complete(task, items, [items[0].truth, "no"])] == [True, False]


def datum(text: str, name: str = "1", **more: object) -> Datum:
    return Datum(name, text, "5", "5", "s", "s", **more)  # type: ignore[arg-type]


def test_equal_questions_leak_however_they_are_written() -> None:
    held = [datum("What is 3  PLUS 4?")]
    data = [datum("what is 3 plus 4?", "a"), datum("What is 4 plus 3?", "b"), datum("What\nis ３ plus 4?", "c")]
    assert leaks(data, held) == {"a", "c"}
    assert leaks([datum("8-5=", "a"), datum("8+5=", "b")], [datum("8-5=")]) == {"a"}
    assert leaks(data, []) == set()


def test_copies_with_small_changes_leak_and_other_numbers_do_not() -> None:
    text = "Natalia sold clips to {} of her friends in April, and then she sold half as many in May. How many in all?"
    held = [datum(text.format(48)), datum("A short one")]
    data = [
        datum("Well: " + text.format(48), "copied"),
        datum(text.format(30), "numbers"),
        datum("She sold half as many clips in May as in April, in all.", "words"),
    ]
    assert leaks(data, held) == {"copied"}


def test_the_image_and_the_starter_belong_to_the_question() -> None:
    one, other = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    held = [datum("count red", image=one)]
    assert leaks(
        [datum("count red", "a", image=one), datum("count red", "b", image=other), datum("count red", "c")], held
    ) == {"a"}
    held = [datum("double", starter="def f(a):")]
    assert leaks([datum("double", "a", starter="def f(a):"), datum("double", "b", starter="def f(b):")], held) == {"a"}
