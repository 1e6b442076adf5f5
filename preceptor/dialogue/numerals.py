"""What number a turn of a dialogue states: mentioned anywhere, or as its answer.

``mentions`` is the rule of MathDial's published evaluation (Macina et al. 2023, https://arxiv.org/abs/2305.14536):
unsigned numbers, found anywhere. ``final_is`` is stricter in place and wider in form: the last number, or one that is
declared as the answer, with signs, fractions, percentages, units, and numbers in words.
"""

from __future__ import annotations

import re

from preceptor.tasks import answers

_UNSIGNED = re.compile(r"\d+(?:\.\d+)?")


_CLOSE = 1e-7


_ONES = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"


_TEENS = "thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"


_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"


_VALUES = {word: value for value, word in enumerate(f"{_ONES}|{_TEENS}".split("|"))}


_VALUES |= {word: 20 + 10 * place for place, word in enumerate(_TENS.split("|"))}


_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}


_WORD = "|".join(sorted([*_VALUES, *_SCALES], key=len, reverse=True))  # eighteen before eight


# One number as it is spoken, so that neither "five and six" nor "one two three" is read as a sum.
_AND = r"(?:\s+and\s+|[\s-]+)"


_BELOW = rf"(?:(?:{_TENS})(?:[\s-]+(?:one|two|three|four|five|six|seven|eight|nine))?|{_ONES}|{_TEENS})\b"


_GROUP = rf"(?:(?:{_BELOW}[\s-]+)?hundred\b(?:{_AND}{_BELOW}(?![\s-]+hundred))?|{_BELOW})"


_THOUSANDS = rf"(?:{_GROUP}[\s-]+)?thousand\b(?:{_AND}{_GROUP}(?![\s-]+thousand))?"


_MILLIONS = rf"(?:{_GROUP}[\s-]+)?million\b(?:{_AND}(?:{_THOUSANDS}|{_GROUP}(?![\s-]+million)))?"


_WORDS = re.compile(rf"\b(?:{_MILLIONS}|{_THOUSANDS}|{_GROUP})", re.I)


def unsigned_numbers(text: str) -> list[float]:
    """The unsigned integers and decimals of a text, its commas removed first: 1,200 is 1200, and -5 is 5."""
    return [float(number) for number in _UNSIGNED.findall(text.replace(",", ""))]


def mentions(text: str, gold: str) -> bool:
    """Whether the text holds the number anywhere, within 1e-7; a gold that is no number must be one of its words."""
    try:
        wanted = float(gold.replace(",", ""))
    except ValueError:
        words = [word.strip(".,;:!?()\"'").lower() for word in text.split()]
        return gold.strip().lower() in words
    return any(abs(number - wanted) < _CLOSE for number in unsigned_numbers(text))


def final_is(text: str, gold: str) -> bool:
    """Whether the text's answer is the gold: the number declared as the answer, else the last one.

    Read are signs, fractions, mixed numbers, percentages (20 % may be meant as 0.2), currencies, units and thousands
    commas (``tasks.answers``), and numbers in words where no digit stands: "the two of them get 7" is about 7. A gold
    that is no number must be the last word, or follow "answer is".
    """
    if answers.parse(gold, strict=True) is None:
        wanted = re.escape(gold.strip())
        return re.search(rf"(?:answer\s+is\s+|^|\s){wanted}[\s.!\"']*$", text.strip(), re.I) is not None
    return answers.same(gold, _readable(text))


def states_number(text: str) -> bool:
    """Whether an answer can be read in the text at all."""
    return answers.parse(_readable(text)) is not None


def _readable(text: str) -> str:
    """The text with number words as digits where there is no digit, and a dash after a word not taken for a minus."""
    text = text if re.search(r"\d", text) else in_digits(text)
    return re.sub(r"([A-Za-z]{2}|'s) [-\u2212](?=\d)", r"\1: -", text)


def in_digits(text: str) -> str:
    """The text with its number words as digits: "twenty-five" is 25, "one hundred and five" 105."""
    return _WORDS.sub(lambda match: str(_value(re.findall(rf"{_WORD}", match[0].lower()))), text)


def _value(words: list[str]) -> int:
    total = part = 0
    for word in words:
        if word == "hundred":
            part = max(part, 1) * 100
        elif word in _SCALES:
            total, part = total + max(part, 1) * _SCALES[word], 0
        else:
            part += _VALUES[word]
    return total + part
