import math
from dataclasses import replace

import pytest

from preceptor.dialogue.dialogue import Dialogue, Turn, play, read_dialogues
from preceptor.dialogue.examples import worked_dialogues
from preceptor.dialogue.measures import answer_was_there, moves_by_fifth, success_at, telling_at, timing, words_a_turn
from preceptor.dialogue.numerals import final_is, in_digits, mentions, states_number, unsigned_numbers
from preceptor.dialogue.tutors import next_step_tutor, parrot_student, self_correcting_student, teller
from preceptor.errors import UserError
from tests.data_folder import DATA, needs

needs_data = needs("mathdial")


def talk(*said: str, gold: str = "6", student_first: bool = False) -> Dialogue:
    """Turns in alternation, the teacher first."""
    sides = ("student", "teacher") if student_first else ("teacher", "student")
    turns = tuple(Turn(sides[place % 2], text) for place, text in enumerate(said))  # type: ignore[arg-type]
    return Dialogue("p", f"steps\n {gold}", "2 * 4\n 8", turns=turns)


def by_k(dialogue: Dialogue, **rules: bool) -> tuple[list[float], list[float]]:
    timings = [timing(dialogue, **rules)]
    return [success_at(timings, k) for k in (1, 2, 3)], [telling_at(timings, k) for k in (1, 2, 3)]


def test_the_cards_transcripts() -> None:
    found = talk("Hi", "8", "Why?", "8", "Sure?", "it is 6", "Yes, 6", "ok")
    assert by_k(found) == ([0, 1, 1], [0, 0, 0])
    told = talk("Hi", "8", "Why?", "8", "It is 6.", "no, 8", "Really.", "it is 6")
    assert by_k(told) == ([0, 0, 1], [0, 1, 1])


def test_a_tie_is_telling_and_a_confirmation_is_not() -> None:
    assert by_k(talk("Hi", "8", "It is 6.", "it is 6")) == ([1, 1, 1], [1, 1, 1])
    assert by_k(talk("Hi", "8", "Why?", "it is 6", "Right, 6", "yes")) == ([1, 1, 1], [0, 0, 0])


def test_never_is_infinite() -> None:
    assert timing(talk("Hi", "8")) == replace(timing(talk()), student=math.inf, teacher=math.inf)
    assert success_at([timing(talk())], 10**9) == 0
    with pytest.raises(UserError, match="no dialogue"):
        success_at([], 1)


def test_a_student_who_speaks_first_is_shifted() -> None:
    assert timing(talk("it is 6", "Hm", student_first=True)).student == -1
    first = talk("8", "It is 6.", "it is 6", student_first=True)
    assert (timing(first).student, timing(first).teacher) == (0, 0)
    assert timing(first).revealed_by(0)
    confirmed = talk("it is 6", "Yes, 6", student_first=True)
    assert not timing(confirmed).revealed_by(5)


def test_a_student_who_flips_back_stays_a_success_without_a_right_last_answer() -> None:
    flips = timing(talk("Hi", "8", "Why?", "it is 6", "Sure?", "no, 8"))
    assert flips.student == 1
    assert not flips.final_correct
    assert timing(talk("Hi", "8", "Why?", "it is 6", "Good", "Thank you!")).final_correct


def test_the_strict_rule_looks_at_the_answer_alone() -> None:
    passing = talk("Hi", "There are 6 boxes, so 8")
    assert timing(passing).student == 0
    assert timing(passing, strict_final=True).student == math.inf
    assert timing(talk("Hi", "The answer is 6, since 48 / 8 works"), strict_final=True).student == 0


def test_named_students_can_be_left_out() -> None:
    turns = (Turn("teacher", "Hi"), Turn("student", "6", prefix="Ines: "), Turn("student", "6", prefix="Student: "))
    named = replace(talk(), turns=turns)
    assert timing(named).student == 0
    assert timing(replace(named, turns=turns[:2]), labelled_only=True).student == math.inf
    assert timing(named, labelled_only=True).student == 0


@pytest.mark.parametrize(
    ("text", "gold", "is_mentioned"),
    [
        ("1,200 dollars", "1200", True),
        ("1200.0", "1,200", True),
        ("-5", "5", True),
        ("15", "5", False),
        ("0.3333333", "0.33333334", True),
        ("0.333", "0.3333", False),
        ("Is it yes?", "yes", True),
        ("yesterday", "yes", False),
        ("five", "5", False),
        ("", "5", False),
    ],
)
def test_the_published_rule_of_numbers(text: str, gold: str, is_mentioned: bool) -> None:
    assert mentions(text, gold) is is_mentioned


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("so it's -5", "-5"),
        ("I get −5", "-5"),
        ("12 - 3 = 9 left", "9"),
        ("3/4 of it", "0.75"),
        ("1 1/2 cups", "1.5"),
        ("25%", "0.25"),
        ("25 percent", "25"),
        ("$1,200.00!", "1200"),
        ("twenty-five", "25"),
        ("one hundred and five apples", "105"),
        ("eighteen", "18"),
        ("The answer is 12 because 3 times 4", "12"),
        ("12 + 3 = 15. So she bought 10 spoons.", "10"),
        ("2.5 hours", "2.5"),
        ("I say no.", "no"),
    ],
)
def test_the_final_number_is_read_in_many_forms(text: str, gold: str) -> None:
    assert final_is(text, gold)
    assert not final_is(text, "77")


@pytest.mark.parametrize(
    ("text", "gold"), [("12 - 3", "-3"), ("the two of them get 7", "2"), ("6 then 8", "6"), ("", "5"), ("Hm", "5")]
)
def test_what_is_not_the_final_number(text: str, gold: str) -> None:
    assert not final_is(text, gold)


def test_numbers_in_words() -> None:
    assert in_digits("seventy six") == "76"
    assert in_digits("two thousand three hundred") == "2300"
    assert in_digits("someone tends") == "someone tends"
    assert unsigned_numbers("1,200 and 3.5") == [1200, 3.5]
    assert states_number("seven")
    assert not states_number("Thank you!")


@pytest.mark.parametrize("after", [1, 3])
def test_closed_forms_of_scripted_play(after: int) -> None:
    cases = [replace(one, turns=()) for one in worked_dialogues()]
    timings = [timing(one) for one in play(next_step_tutor, self_correcting_student(after), cases, rounds=5)]
    told = [timing(one) for one in play(teller(after), parrot_student, cases, rounds=5)]
    for k in range(6):
        assert success_at(timings, k) == (k >= after)
        assert telling_at(timings, k) == 0
        assert success_at(told, k) == telling_at(told, k) == (k >= after)


def test_an_answer_that_was_there_is_found() -> None:
    assert answer_was_there(Dialogue("p", "x\n 6", "first 6, then 8\n 8"))
    assert not answer_was_there(Dialogue("p", "x\n 6", "8"))


def test_moves_and_words() -> None:
    turns = [
        Turn("teacher", "one two", move) for move in ("generic", "probing", "focus", "telling", "focus", "telling")
    ]
    fifths = moves_by_fifth([replace(talk(), turns=tuple(turns))])
    assert fifths[0] == {"focus": 0, "probing": 1, "telling": 0, "generic": 1}
    assert sum(sum(fifth.values()) for fifth in fifths) == 6
    assert words_a_turn([replace(talk(), turns=tuple(turns))]) == 2
    assert math.isnan(words_a_turn([talk()]))


@needs_data
def test_the_published_example_of_a_models_dialogue() -> None:
    for dialogue in read_dialogues(DATA / "mathdial" / "example_model_output.jsonl"):
        said = dialogue.facts["chatgpt_baseline"].split("<EOM>")
        turns = [text.partition(":")[::2] for text in said]
        model = replace(
            dialogue, turns=tuple(Turn("teacher" if who == "Teacher" else "student", text) for who, text in turns)
        )
        for k in (1, 2, 3):
            assert success_at([timing(model)], k) == telling_at([timing(model)], k) == 1
