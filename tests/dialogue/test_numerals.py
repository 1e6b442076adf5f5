import pytest

from preceptor.dialogue.numerals import final_is, in_digits, mentions

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]


@pytest.mark.parametrize(("value", "word"), list(enumerate(WORDS)))
def test_every_number_word_has_its_value(value, word):
    assert in_digits(word) == str(value)


@pytest.mark.parametrize(
    ("words", "digits"),
    [
        ("twenty-five", "25"),
        ("one hundred and five", "105"),
        ("two thousand three hundred", "2300"),
        ("one million two hundred thousand and five", "1200005"),
        ("three hundred and forty-two thousand", "342000"),
        ("a hundred sixteen", "a 116"),
        ("five and six", "5 and 6"),
        ("one two three", "1 2 3"),
        ("two hundred three hundred", "200 300"),
        ("twenty fifteen", "20 15"),
        ("someone is often alone", "someone is often alone"),
    ],
)
def test_number_words_together(words, digits):
    assert in_digits(words) == digits


def test_a_mention_is_anywhere_and_a_final_answer_is_last():
    said = "First I had 6, and so the two of them get 7."
    assert mentions(said, "6")
    assert not final_is(said, "6")
    assert final_is(said, "7")
    assert final_is("They get fourteen apples.", "14")
    assert mentions("It is -1,200.", "1200")
    assert not final_is("It is -1,200.", "1200")
