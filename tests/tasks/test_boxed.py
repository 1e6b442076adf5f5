"""Answers in a box, the reader of MATH, and questions chosen by name."""

import json
import time
from pathlib import Path

import pytest

from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping.questions import QuestionSource, draw, read_file
from preceptor.tasks.boxed import boxed, by_text, by_value, read_math
from preceptor.tasks.records import Item

GSM8K = '{"question": "2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\\n#### 5"}\n'


def item(truth):
    return Item("one", "math", "", "", "?", truth)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a^{b_{c}}} and more", r"a^{b_{c}}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed{3} and \fbox{$4$}", "$4$"),
        (r"so it is $\boxed 5$ pens, for $3$.", "5"),
        (r"so $x=\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
        (r"\boxed 42. It costs $3.", "42"),
        (r"\boxed{4}, which I put into a \boxed form", "4"),
        (r"\boxed", None),
        (r"\boxed {3}", "3"),
        (r"\boxed{ 18 }", "18"),
        (r"\boxed{12", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_box_decides_with_matched_braces(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize("given", ["1000", "1,000", "1000.0", "1{,}000"])
def test_a_thousand_is_a_thousand_however_it_is_written(given):
    assert by_value(item("1000"), rf"\boxed{{{given}}}").correct
    assert by_value(item("1,000"), rf"\boxed{{{given}}}").correct


@pytest.mark.parametrize("given", ["18", "$18", r"\$18", "18.0", "18 dollars", " 18"])
def test_eighteen_is_eighteen(given):
    assert by_value(item("18"), rf"\boxed{{{given}}}").correct


def test_letter_by_letter_is_what_the_authors_compare():
    assert by_text(item("18"), r"\boxed{18}").correct
    assert by_text(item("18"), r"\boxed{ 18 }").correct
    for given in ("$18", "18.0", "1,8"):
        verdict = by_text(item("18"), rf"\boxed{{{given}}}")
        assert verdict.answer == given
        assert not verdict.correct
    assert not by_text(item("1000"), r"\boxed{1,000}").correct


def test_wrong_answers_that_are_equal_have_equal_texts():
    same = ("7", "7.0", " 7", "$7", r"\$7", "7 dollars", r"7 \text{ dollars}", r"\frac{14}{2}", "x = 7", "{7}", "(7)")
    for truth in ("5", "$5"):
        told = [by_value(item(truth), rf"\boxed{{{given}}}").answer for given in same]
        assert set(told) == {"7"}
        assert by_value(item(truth), r"\boxed{8}").answer == "8"
    assert {by_value(item("2 m"), rf"\boxed{{{given}}}").answer for given in ("3 m", "300 cm", "3")} == {"3"}
    assert by_value(item("2 m"), r"\boxed{3 kg}").answer != "3"
    assert {by_value(item("x"), rf"\boxed{{{given}}}").answer for given in (r"\frac{y}{2}", r"\dfrac y2", "y/2")} == {
        "y/2"
    }


def test_no_answer_is_none_and_not_right():
    for text in ("5", "", r"\boxed{}", r"\boxed{5"):
        assert by_value(item("5"), text) == by_text(item("5"), text)
        assert by_value(item("5"), text).answer is None
        assert not by_value(item("5"), text).correct


@pytest.mark.parametrize(
    ("truth", "given", "right"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"2\sqrt{3}", r"2 \sqrt{3}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        ("(1,200)", "1200", False),
        ("90^\\circ", "90", True),
        ("x+1", "x + 2", False),
    ],
)
def test_answers_that_are_no_numbers_are_compared_without_their_dress(truth, given, right):
    assert by_value(item(truth), rf"\boxed{{{given}}}").correct is right


DIFFERENT = (
    ("2", "2x"), ("2", "2i"), ("2", "2pi"), ("2", r"2\pi"), ("2", "2e"), ("2", "2m"), ("2", "2xyz"), ("2x", "2y"),
    (r"\frac{1}{2}", r"\frac{1}{2}x"), (r"\frac{1}{2x}", r"\frac{1}{2}x"), ("6 pm", "6 am"), ("6", "6 pm"),
    ("5", "5 million"), ("4", "4 dozen"), ("7", "7 and a half"), ("5", "5!"), ("120", "5!"), ("5", "y=5z"),
    (r"5 \text{ east}", r"5 \text{ west}"), ("5 apples", "5 pears"), ("x=3", "y=3"), ("5 cm", "5 cm^2"),
    ("2 m", "2 kg"), ("12", "1 2"), ("21/2", r"2\frac{1}{2}"), ("-4", "(-2)^2"), ("4", "-2^2"), ("(1,2]", "(1,2)"),
    (r"72^\circ C", r"72^\circ F"), ("1/3", r"0.\overline{3}"), ("y=2x+3", "2x+3"), (r"\sqrt{12}", r"\sqrt12"),
    ("3,4", "(3,4)"), (r"\frac{3}{4}\pi", r"\frac{3}{4\pi}"),
)  # fmt: skip
EQUAL = (
    ("22", "'22'"), ("8", "8*"),
    (r"-\frac12", r"\frac{1}{-2}"), (r"\frac{1}{2}", r"\frac{1}2"), ("5", "{5}"), ("5", "(5)"), ("5", r"\text{5}"),
    ("x^2+1", "x^{2}+1"), (r"\sqrt{2}", r"\sqrt2"), (r"\text{(A)}", "A"), (r"\frac{\pi}{2}", r"\pi/2"),
    ("1000", "10^3"), ("1/8", "2^{-3}"), ("8", r"8~\text{cm}"), ("5", r"5\text{ cm}^2"), ("12 cm^2", "12 square cm"),
    ("3/4", r"\left(\frac{3}{4}\right)"), ("12", "12 square units"), ("5 apples", "5 red apples"), ("x=3", "3"),
    ("3", "x = 3"), (r"\frac{x+1}{2}", "(x+1)/2"), (r"x^{\frac{1}{2}}", "x^{1/2}"), ("10000", "10 000"),
    (r"-\frac{x}{3}", r"\frac{-x}{3}"), ("2.5", r"2\frac{1}{2}"), ("5!", "5!"), ("2x", "2x"), ("20", r"20\%"),
    ("0.2", r"20\%"), ("5 km/h", "5"), ("1 ft", "12 in"), (r"6\!:\!00", "6:00"), ("72^\\circ", "72 degrees"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("truth", "given", "right"), [*((*pair, False) for pair in DIFFERENT), *((*pair, True) for pair in EQUAL)]
)
def test_what_stands_beside_a_number_counts_and_how_it_is_dressed_does_not(truth, given, right):
    assert by_value(item(truth), rf"\boxed{{{given}}}").correct is right
    assert by_value(item(given), rf"\boxed{{{truth}}}").correct is right


def test_a_hostile_box_takes_no_time():
    deep = 1900
    for text in ("(" * deep + "1" + ")" * deep, "{" * deep + "}" * deep, "\\frac12" * 500, "5 " + "a" * 3900 + "(",
                 "\\frac{" + "\\alpha" * 300 + "(}{2}", "9^" * deep, "1 000" * 700, "a" * 10**5):  # fmt: skip
        begun = time.perf_counter()
        by_value(item(text), rf"\boxed{{{text}}}")
        assert time.perf_counter() - begun < 5


def test_math_is_read_from_a_folder_and_from_lines(tmp_path: Path):
    folder = tmp_path / "algebra"
    folder.mkdir()
    problem = {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "level": "Level 1", "type": "Algebra"}
    (folder / "1.json").write_text(json.dumps(problem))
    (one,) = read_math(tmp_path)
    assert (one.instruction, one.truth, one.skill, one.subskill) == ("1+1?", "2", "Algebra", "Level 1")
    lines = tmp_path / "test.jsonl"
    lines.write_text(json.dumps({"problem": "1+2?", "solution": "", "answer": "3", "subject": "Algebra"}) + "\n\n")
    assert [one.truth for one in read_math(lines)] == ["3"]
    assert [one.truth for one in read_file(lines)] == ["3"]
    assert [one.truth for one in read_file(tmp_path)] == ["2"]
    for name, box in (("2", r"$\boxed 7$"), ("3", r"$\fbox{8}$")):
        (folder / f"{name}.json").write_text(json.dumps({**problem, "solution": f"It is {box}."}))
    assert [one.truth for one in read_math(tmp_path)] == ["2", "7", "8"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"problem": "1+1?", "solution": "two"}', r"line 1 .* has no answer"),
        ('{"problem": "", "answer": "2"}', "has no problem"),
        ("[1]", "is no object"),
        ('{"problem": ', "is not JSON"),
    ],
)
def test_a_problem_without_its_parts_is_named(tmp_path: Path, text, says):
    path = tmp_path / "test.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=says):
        read_math(path)


def test_questions_are_chosen_by_name(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(GSM8K + GSM8K.replace("2 and 3", "5"))
    assert [one.truth for one in read_file(path)] == ["5", "5"]
    learned, exam = draw(QuestionSource(source=str(path), exam=1), seed=0)
    assert len(learned) == len(exam) == 1
    assert learned[0].instruction != exam[0].instruction
    for source in ("sums", "problems"):
        learned, exam = draw(QuestionSource(source=source, count=20, exam=10), seed=3)
        assert (len(learned), len(exam)) == (20, 10)
        assert not {one.instruction for one in learned} & {one.instruction for one in exam}
        assert draw(QuestionSource(source=source, count=20, exam=10), seed=3) == (learned, exam)


def test_an_exam_from_another_file_shares_no_question(tmp_path: Path):
    for name, numbers in (("train", range(1, 9)), ("test", range(7, 11))):
        lines = [json.dumps({"problem": f"{n} and 3?", "answer": f"{n + 3}"}) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = {"source": str(tmp_path / "train.jsonl"), "exam_source": str(tmp_path / "test.jsonl")}
    learned, exam = draw(QuestionSource(**files, exam=4), seed=0)
    assert sorted(one.truth for one in exam) == ["10", "11", "12", "13"]
    assert sorted(int(one.truth) for one in learned) == [4, 5, 6, 7, 8, 9]


def test_a_sum_in_another_order_is_no_other_question():
    learned, exam = draw(QuestionSource(smallest=2, largest=35, count=1000, exam=200), seed=0)
    numbers = [one.instruction.removeprefix("What is ").removesuffix("?").split(" + ") for one in (*learned, *exam)]
    assert len(numbers) == len({tuple(sorted(pair)) for pair in numbers}) == 34 * 35 // 2
    assert 0.3 < sum(int(first) > int(second) for first, second in numbers) / len(numbers) < 0.7


def test_the_difficulty_of_sums_is_tuned():
    hard, _ = draw(QuestionSource(terms=3, smallest=100, largest=999, count=8, exam=1), seed=1)
    for one in hard:
        numbers = [int(word) for word in one.instruction.removeprefix("What is ").removesuffix("?").split(" + ")]
        assert len(numbers) == 3
        assert all(100 <= number <= 999 for number in numbers)
        assert str(sum(numbers)) == one.truth


def test_what_gives_no_question_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file or folder nowhere\.jsonl with questions: give sums, problems"):
        draw(QuestionSource(source="nowhere.jsonl"), seed=0)
    path = tmp_path / "train.jsonl"
    path.write_text(GSM8K)
    with pytest.raises(UserError, match=r"1 different questions, and 200 are for the exam"):
        draw(QuestionSource(source=str(path)), seed=0)
    two = tmp_path / "test.jsonl"
    two.write_text(GSM8K + GSM8K.replace("2 and 3", "5"))
    with pytest.raises(UserError, match=r"test\.jsonl has 2 different questions, and 5 are for the exam"):
        draw(QuestionSource(source=str(path), exam_source=str(two), exam=5), seed=0)
    with pytest.raises(UserError, match=r"All 1 questions of .*train\.jsonl are in .*test\.jsonl too"):
        draw(QuestionSource(source=str(path), exam_source=str(two), exam=2), seed=0)
    for name in ("sums", "problems"):
        with pytest.raises(UserError, match=rf"exam_source is {name}, and only a file or a folder"):
            QuestionSource(source=str(path), exam_source=name)
    path.write_text('{"question": "2 and 3?", "answer": "five"}\n')
    with pytest.raises(UserError, match="does not end with ####"):
        draw(QuestionSource(source=str(path)), seed=0)
    with pytest.raises(UserError, match=r"questions\.exam is 0"):
        QuestionSource(exam=0)
    with pytest.raises(UserError, match="from 9 to 3"):
        QuestionSource(smallest=9, largest=3)


@pytest.mark.parametrize("text", [GSM8K, '{"problem": "1+1?", "answer": "2"}\n'])
def test_a_file_in_another_encoding_is_named(tmp_path: Path, text):
    for path in (tmp_path / "train.jsonl", tmp_path / "folder" / "1.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.replace("?", " caf\u00e9?").encode("latin-1"))
        with pytest.raises(UserError, match=rf"{path.name} is not text in UTF-8"):
            read_file(path if path.suffix == ".jsonl" else path.parent)
