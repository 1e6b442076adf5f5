"""Answers in a box, the reader of MATH, and questions chosen by name."""

import time
from pathlib import Path

import pytest

from preceptor.errors import UserError
from preceptor.tasks.boxed import boxed, by_text, by_value, read_math
from preceptor.tasks.records import Item


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
