r"""Numeric answers: find the final answer in a text, read it exactly, compare.

Read are integers, decimals, thousands commas, signs, fractions, mixed numbers, percent, scientific notation, units and
currencies, ``\boxed{...}``, ``\frac{a}{b}``, ``#### 42`` and "the answer is 42". What cannot be read is None, and None
is the same as nothing, itself included: two unreadable answers are two wrong answers.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 4000  # characters of a response that are looked at, from its end


DIGITS = 60  # of one number; longer ones are not answers


EXPONENT = 300  # largest power of ten that is read: 1e999999999 would fill the memory


_SCALES = {
    "length": {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000"},
    "length in feet": {"in": "1/12", "ft": "1", "yd": "3", "mi": "5280"},
    "mass": {"mg": "1/1000", "g": "1", "kg": "1000", "t": "1000000"},
    "mass in pounds": {"oz": "1/16", "lb": "1"},
    "time": {"ms": "1/1000", "s": "1", "min": "60", "h": "3600", "d": "86400", "wk": "604800"},
    "volume": {"ml": "1/1000", "cl": "1/100", "l": "1"},
    "dollars": {"¢": "1/100", "$": "1"},
    "euros": {"€": "1"},
    "pounds": {"£": "1"},
    "yen": {"¥": "1"},
    "share": {"%": "1/100"},
    "angle": {"°": "1"},
}


UNITS = {unit: (kind, Fraction(size)) for kind, sizes in _SCALES.items() for unit, size in sizes.items()}


_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram", "kg": "kilogram kilo", "t": "tonne", "oz": "ounce", "lb": "lbs",
    "ms": "millisecond", "s": "sec second", "min": "minute", "h": "hr hour", "d": "day", "wk": "week",
    "ml": "milliliter millilitre", "cl": "centiliter centilitre", "l": "liter litre", "¢": "cent", "$": "dollar usd",
    "€": "euro eur", "£": "gbp", "¥": "yen jpy", "%": "percent", "°": "degree deg",
}  # fmt: skip


_NAMES = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in (unit, *spellings.split())}


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)"


_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"


_NUMBER = re.compile(
    r"(?P<sign>[-+]\s?)?(?P<currency>[$€£¥]\s?)?(?P<inner>-)?"
    rf"(?:(?P<whole>{_INTEGER})(?:\s+and)?\s+(?=\d+\s?/))?"
    rf"(?P<top>{_DECIMAL})(?:\s?/\s?(?P<bottom>{_DECIMAL}))?"
    r"(?:\s?(?:e|[x×*·]\s?10\s?\^)\s?(?P<power>[-+]?\d+)(?![\w]))?"
    r"(?P<unit>\s?(?:%|[°¢€£¥]|[a-zA-Zµμ]+(?:/[a-zA-Z]+)?\b))?",
    re.IGNORECASE,
)


_MARK = re.compile(r"\\(?:boxed|fbox)\s*\{|####|answer\s*(?:is|:|=)\s*(?:is|:|=)?", re.IGNORECASE)


_WORDS = re.compile(r"(?:\s*[a-zA-Z]+(?![a-zA-Z])){0,4}\s*")


_NAMED = re.compile(r"(?:(?P<name>[a-zA-Z]\w*)\s*)?=\s*")


@dataclass(frozen=True)
class Quantity:
    """A number and its unit: one of ``UNITS``, another word as it was written, or empty."""

    value: Fraction
    unit: str = ""


@dataclass(frozen=True)
class Parts:
    """A text that begins with a number: ``name`` before it (x of ``x = 5 cm``), ``currency``, and what is ``after``."""

    value: Fraction
    name: str = ""
    currency: str = ""
    after: str = ""


def parts(text: str) -> Parts | None:
    """The number that a text begins with, and everything beside it as it was written; None where there is none."""
    text = _plain(text[-LONGEST:]).strip()
    named = _NAMED.match(text)
    match = _NUMBER.match(text, named.end() if named else 0)
    answer = _value(match, text) if match else None
    if match is None or answer is None:
        return None
    after = text[match.start("unit") if match["unit"] else match.end() :]
    return Parts(answer.value, (named and named["name"]) or "", (match["currency"] or "").strip(), after)


def parse(text: str, *, strict: bool = False) -> Quantity | None:
    r"""The final answer of a text, or None where none can be read.

    The last of ``\boxed{...}``, ``#### ...`` and "answer is ..." decides, where there is one; an "answer is" without a
    number ("this answer is right") says nothing of one that was marked before it. Without: the whole text where it is
    a number (``x = 5`` too), else its last number; with ``strict`` the whole text or nothing.
    """
    text = _plain(text[-LONGEST:])
    marks = list(_MARK.finditer(text))
    if marks:
        answer = _marked(text, marks[-1])
        marked = [mark for mark in marks if mark[0].startswith(("\\", "#"))]
        return answer if answer or not marked or marks[-1] is marked[-1] else _marked(text, marked[-1])
    whole = _whole(text)
    if whole or strict:
        return whole
    numbers = _numbers(text)
    return _value(numbers[-1], text) if numbers else None


def same(truth: str, response: str, *, strict: bool = False) -> bool:
    """Whether a response's final answer is the true one; False when either cannot be read.

    Values are compared exactly. Units are converted where both are known (2.5 m is 250 cm; a length is no mass) and
    count for nothing where the truth or the response has none. A response in percent may be meant as a share: 20% is
    the answer where the truth is 20, 20 % or 0.2.
    """
    right, given = parse(truth), parse(response, strict=strict)
    if right is None or given is None:
        return False
    mine, yours = UNITS.get(right.unit), UNITS.get(given.unit)
    if mine and yours:
        return mine[0] == yours[0] and right.value * mine[1] == given.value * yours[1]
    if right.unit == "%" or given.unit == "%":
        share = given.value / 100 if given.unit == "%" else given.value * 100
        return given.value == right.value or share == right.value
    return right.value == given.value


def written(value: Fraction | int) -> str:
    """A value as its answer is written: an integer, a decimal where it is finite, else a fraction."""
    value = Fraction(value)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = f"{abs(value) * 10**places}".zfill(places + 1)
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def _plain(text: str) -> str:
    """The text without LaTeX and typographic forms of what a keyboard writes."""
    text = "".join(f" {unicodedata.normalize('NFKC', char)}" if char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞" else char for char in text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = re.sub("[\u2212\u2013\u2010\u2011](?=\\s?[\\d.$\\\\(])", "-", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,!;: ()\[\]])", "", text).replace("{,}", ",").replace("\\%", "%")
    text = text.replace("\\$", "¤").replace("^\\circ", "°").replace("^{\\circ}", "°")
    text = re.sub(r"\\(?:times|cdot)", "×", text)
    text = re.sub(r"\$([^$\n]*)\$", r"\1", text).replace("¤", "$")
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\s*\{\s*([-+]?\d+)\s*\}", r"^\1", text)
    text = re.sub(r"(?<!\w)\(\s*([-+]?[\d.,/ ]+)\s*\)", r"\1", text)
    return re.sub(r"[ \t\xa0]+", " ", text.replace("per cent", "%").replace("**", ""))


def _marked(text: str, mark: re.Match[str]) -> Quantity | None:
    rest = text[mark.end() :]
    if mark[0].startswith("\\"):
        return _whole(_inside(rest))
    line = (rest.strip().split("\n") or [""])[0]
    if mark[0] == "####":
        return _whole(line)
    line = re.sub(r"\(\s*=[^()]*\)", " ", line)  # how it came about: 7 (= 3 + 4)
    sentence = re.split(r"\.(?:\s|$)", line)[0].rsplit("=", 1)[-1]
    numbers = _numbers(sentence)
    return _value(numbers[0], sentence) if numbers else None


def _inside(text: str) -> str:
    """What stands before the brace that closes one opened already; empty when none does."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:place]
    return ""


def _whole(text: str) -> Quantity | None:
    """The number that the text is, beside a name before and some words of a unit after it."""
    text = text.strip().lstrip("*_\"'`:").rstrip("*_\"'`.!:").strip()
    text = text[named.end() :] if (named := _NAMED.match(text)) else text
    match = _NUMBER.match(text)
    if match is None or not _WORDS.fullmatch(text, match.end()):
        return None
    return _value(match, text)


def _numbers(text: str) -> list[re.Match[str]]:
    """The numbers of a text that are not parts of names."""
    return [match for match in _NUMBER.finditer(text) if not re.search(r"[\w.]", text[: match.start("top")][-1:])]


def _value(match: re.Match[str], text: str) -> Quantity | None:
    if max(len(match[part] or "") for part in ("whole", "top", "bottom")) > DIGITS:
        return None
    if len(match["power"] or "") > 5 or abs(int(match["power"] or 0)) > EXPONENT:
        return None
    whole, top, bottom = (Fraction((match[part] or "0").replace(",", "")) for part in ("whole", "top", "bottom"))
    if match["bottom"] and bottom == 0:
        return None
    value = (whole + (top / bottom if match["bottom"] else top)) * Fraction(10) ** int(match["power"] or 0)
    before = text[: match.start()].rstrip()
    minus = (match["sign"] or "").strip() == "-" and not re.search(r"[\w)%]$", before)
    written_unit = (match["unit"] or match["currency"] or "").strip()
    return Quantity(-value if minus != bool(match["inner"]) else value, short_unit(written_unit))


def short_unit(word: str) -> str:
    """The unit's short name; a word that names none stays as it is."""
    for spelling in (word, word.lower(), word.lower().removesuffix("s")):
        if spelling in _NAMES:
            return _NAMES[spelling]
    return word.lower()
