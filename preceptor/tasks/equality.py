r"""Equal answers: a short answer in LaTeX as one text, such that two answers are equal where their texts are.

A number is its value, and its unit counts where the true answer names one: 2.5 m is 250 cm, but no kilogram. Anything
else is its letters without LaTeX's spaces and variants: ``\frac{\pi}{2}`` is ``\pi/2``, ``(3,4)`` is no 34. Nothing is
computed but powers of numbers; ``x + 1`` is not ``1 + x``.

Verdicts must be the same on every machine, so nothing optional takes part. ``math-verify`` knows algebra, but drops
words after a number (6 pm would be 6 am), reads no 18 dollars, and ends what takes long by the clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from preceptor.tasks.answers import EXPONENT, LONGEST, UNITS, parts, short_unit, written

_SPACES = re.compile(r"\\(?:(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|[,!;: ])|[~\s$]")


_FORMS = (
    (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*([0-9a-zA-Z])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    (r"([\^_]|\\sqrt)\s*\{\s*([0-9a-zA-Z])\s*\}", r"\1\2"),
)


_DRESS = ((r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"), (r"\\%", ""), (r"\^\s*\{?\\circ\}?", ""))


_FEW = r"(?:[\w.^]|\\[a-zA-Z]+(?![a-zA-Z])|\{[^{}]*\})"  # of a product, which a stroke may follow without parentheses


_POWER = re.compile(r"(?P<sign>-?)(?P<base>\d{1,9})\^\{?(?P<power>-?\d{1,3})\}?")


_WORD = r"[a-zA-Zµμ]+(?![a-zA-Zµμ])(?:/[a-zA-Z]+(?![a-zA-Z]))?"


_AFTER = re.compile(
    rf"(?P<gap>\s*)(?:(?P<many>square|sq|cubic)\s+)?(?P<unit>[%°¢€£¥$]|{_WORD})?"
    rf"(?:\s*\^\s*\{{?(?P<power>[23])\}}?)?(?P<more>(?:\s*{_WORD}){{0,4}})\s*\.?"
)


_FILLER = re.compile("an?|by|each|in|is|of|per|the|to")


# Words after a number that change its value, or make it no number.
_COUNTING = re.compile(
    "(?:hundred|thousand|million|billion|trillion|dozen|third|quarter)s?|hal(?:f|ves)|and|or|plus|minus|over|mod|modulo|"
    "factorial|squared|cubed|base|sin|cos|tan|log|exp|infinity|one|two|three|four|five|six|seven|eight|nine|ten"
)


LAYERS = 8  # of braces and parentheses around an answer that are taken off


@dataclass(frozen=True)
class _Quantity:
    """A number, the variable it is the value of, its unit where that is known (to a power), and other words."""

    value: Fraction
    name: str = ""
    unit: str = ""
    power: int = 1
    words: frozenset[str] = frozenset()


def canonical(answer: str, truth: str) -> str:
    """An answer as the text that an equal answer has too, where ``truth`` is the right one."""
    if len(answer) > LONGEST:
        return answer
    given, right = _quantity(answer), _quantity(truth)
    if given is None:
        return _plain_text(answer)
    return written(given.value) if right is None else _against(given, right)


def _against(given: _Quantity, right: _Quantity) -> str:
    """The value in the truth's unit. What contradicts the truth is written beside it, what one of both lacks is not."""
    value, apart = given.value, ""
    sizes = UNITS.get(given.unit), UNITS.get(right.unit)
    if "%" in (given.unit, right.unit) and given.unit != right.unit:
        share = value / 100 if given.unit == "%" else value * 100
        value = share if share == right.value else value
    elif sizes[0] and sizes[1]:
        if (sizes[0][0], given.power) != (sizes[1][0], right.power):
            apart = f"{given.unit}^{given.power}"
        else:
            value *= (sizes[0][1] / sizes[1][1]) ** right.power
    if not (given.words <= right.words or right.words <= given.words):
        apart = " ".join((apart, *sorted(given.words)))
    name = f"{given.name}=" if given.name and right.name and given.name != right.name else ""
    return f"{name}{written(value)} {apart}".strip()


def _quantity(answer: str) -> _Quantity | None:
    """The number that an answer is; None for pairs and intervals, products with letters, and whatever else."""
    text = _bare(answer)
    if re.match(r"\s*[(\[]", text):
        return None
    if power := _POWER.fullmatch(_SPACES.sub("", text)):
        return _raised(power["sign"], int(power["base"]), int(power["power"]))
    found = parts(text.replace("~", " ").strip(" *_\"'`:"))
    measured = _measured(found.after, short_unit(found.currency)) if found else None
    if found and measured:
        return _Quantity(found.value, found.name, *measured)
    found = parts(_plain_text(answer))  # a fraction with a sign below, for one
    return _Quantity(found.value, found.name) if found and not found.after else None


def _raised(sign: str, base: int, power: int) -> _Quantity | None:
    if abs(power) > EXPONENT or (base == 0 and power <= 0):
        return None
    value = Fraction(base) ** power
    return _Quantity(-value if sign else value)


def _measured(after: str, currency: str) -> tuple[str, int, frozenset[str]] | None:
    """The unit that stands after a number, its power and other words; None where it is no unit.

    A letter close by is a variable (2m), and words of one or two letters are none of a unit's (2i, 6 pm).
    """
    match = _AFTER.fullmatch(after)
    if match is None:
        return None
    first, more = match["unit"] or "", (match["more"] or "").lower().split()
    unit = short_unit(first) if short_unit(first) in UNITS else ""
    if not match["gap"] and first.isalpha() and (not unit or len(first) == 1):
        return None
    words = [*(() if unit or not first else (first.lower(),)), *more]
    letters = [part for word in words for part in word.split("/")]
    known = [len(part) > 2 or _FILLER.fullmatch(part) or short_unit(part) in UNITS for part in letters]
    if not (all(known) or (unit == "°" and letters in (["c"], ["f"]))) or any(map(_COUNTING.fullmatch, letters)):
        return None
    if match["many"] and not first:
        return None
    power = int(match["power"] or {"cubic": 3, None: 1}.get(match["many"], 2))
    return unit or currency, power, frozenset(word.removesuffix("s") for word in words if not _FILLER.fullmatch(word))


def _bare(text: str) -> str:
    """Without the braces and parentheses around all of it; those of a pair, with its comma, stay."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", text).strip(' \n\t*`"')
    for _ in range(LAYERS):
        inner = re.fullmatch(
            r"(?:\\(?:text|mathrm|textbf|mathbf|mbox)\s*)?(\{.*\})|(\([^,]*\))|\$([^$]*)\$", text, re.DOTALL
        )
        if inner is None:
            break
        group = inner[1] or inner[2]
        if group and not _closed(group):
            break
        text = (group[1:-1] if group else inner[3]).strip()
    return text


def _closed(text: str) -> bool:
    """Whether the last character closes the first one."""
    opening, closing = text[0], text[-1]
    depth = 0
    for place, char in enumerate(text):
        depth += (char == opening) - (char == closing)
        if depth == 0:
            return place == len(text) - 1
    return False


def _plain_text(answer: str) -> str:
    """The letters of an answer that is no number, without what LaTeX lets one write in several ways."""
    text = answer
    for form, plain in (*_FORMS, *_DRESS):
        text = re.sub(form, plain, text)
    text = _fractions(text.replace("{,}", ""))
    text = re.sub(r"(?<=\d)\s+(?=\d)(?!\d{3}(?!\d))", "\0", text)  # 1 2 is no 12, but 10 000 is 10000
    text = _SPACES.sub("", text).replace("\0", " ")
    return _bare(text).rstrip(".")


def _fractions(text: str) -> str:
    r"""With ``a/b`` for ``\frac{a}{b}``, innermost first; in parentheses where it takes them."""
    while (place := text.rfind("\\frac")) >= 0:
        top = _argument(text, place + 5)
        bottom = _argument(text, top[1]) if top else None
        if top is None or bottom is None:
            break
        before, after = text[:place].rstrip(), text[bottom[1] :]
        ratio = _ratio(top[0], bottom[0])
        if before[-1:] in ("^", "_"):
            ratio = f"{{{ratio}}}"
        elif re.search(r"[\w)}]$", before):
            ratio = f"*{ratio}"
        text = before + ratio + ("*" if re.match(r"\s*\d", after) else "") + after
    return re.sub(r"^\s*--", "", text)


def _ratio(top: str, bottom: str) -> str:
    top, bottom = top.strip(), bottom.strip()
    if bottom.startswith("-") and re.fullmatch(rf"-?{_FEW}+", top):
        top, bottom = f"-{top}".replace("--", ""), bottom[1:]
    above = top if re.fullmatch(rf"-?{_FEW}+", top) else f"({top})"
    below = bottom if re.fullmatch(r"\d+(?:\.\d+)?|[a-zA-Z]|\\[a-zA-Z]+", bottom) else f"({bottom})"
    return f"{above}/{below}"


def _argument(text: str, start: int) -> tuple[str, int] | None:
    r"""What a LaTeX command takes at a place, and where that ends: a group in braces, a command, or a character."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if text[start : start + 1] != "{":
        token = re.compile(r"\\[a-zA-Z]+|[^\s}]").match(text, start)
        return (token[0], token.end()) if token else None
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + 1 : place], place + 1
    return None
