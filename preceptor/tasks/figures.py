"""The visual task: questions about generated images, with exact answers.

An image is a grid of cells, each empty or with one coloured shape, drawn from a scene. In the ``compact`` form a cell
is 8 × 8 pixels, one patch of the small student, and a question is a few words (``count red circle`` answered by ``3``);
in the ``worded`` form cells and questions are large enough for vision-language models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from preceptor.errors import UserError
from preceptor.tasks.answers import same
from preceptor.tasks.generated import GeneratedTask
from preceptor.tasks.records import Datum, Item

GRID = 4  # cells a side


CELL = {"compact": 8, "worded": 56}  # pixels a side of a cell


COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 200, 40)}


KINDS = ("circle", "square", "triangle", "cross")


WORDS = (*COLOURS, *KINDS, "left", "right", "above", "below", "yes", "no")  # all answers that are no numbers


BACKGROUND = (255, 255, 255)


_SHAPE = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b[^;]*?\brow\s*(\d+)\W+column\s*(\d+)")


FORMAT = "End with a line that holds #### and the answer, one word or a number."


@dataclass(frozen=True, order=True)
class Shape:
    """One shape of a scene: its cell (row and column from 0), kind and colour."""

    row: int
    column: int
    kind: str
    colour: str

    @property
    def label(self) -> str:
        """Colour and kind."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Question:
    """A question on a scene in its two forms, with the working and the answer."""

    scene: tuple[Shape, ...]
    compact: str
    worded: str
    work: str
    answer: str


@dataclass(frozen=True)
class Figures(GeneratedTask):
    """The visual task."""

    form: Literal["compact", "worded"] = "compact"
    """compact: images of 32 × 32 pixels, a few words; worded: images of 224 × 224 pixels, sentences."""
    only: tuple[str, ...] = ()
    """Skills (``counting``) or subskills (``counting/colour``) to examine; empty: all of them."""
    name: str = "visual"

    def correct(self, item: Item, response: str) -> bool:
        """Whether the response gives the right word or number; in the compact form it holds nothing else."""
        strict = self.form == "compact"
        if re.search(r"\d", item.truth):
            return same(item.truth, response, strict=strict)
        return read_word(response, strict=strict) == item.truth

    def datum(self, item: Item) -> Datum:
        """The item with its answer: the word or number alone when compact, else the working and ``#### answer``."""
        lines = [item.work] if item.work else []
        response = item.truth if self.form == "compact" else "\n".join([*lines, f"#### {item.truth}"])
        return Datum(item.id, item.instruction, response, item.truth, item.skill, item.subskill, image=item.image)

    def prompt(self, item: Item) -> str:
        """The text that a student reads beside the image."""
        return item.instruction if self.form == "compact" else f"{item.instruction}\n{FORMAT}"

    def draw(self, description: str) -> Any:
        """The image, uint8 (H, W, 3), of words: ``red circle at row 1 column 2; blue cross at row 4 column 1``.

        Raises:
            UserError: the description names no shape, a cell outside the grid, or one cell twice.
        """
        found = _SHAPE.findall(description.casefold())
        scene = [Shape(int(row) - 1, int(column) - 1, kind, colour) for colour, kind, row, column in found]
        cells = {(shape.row, shape.column) for shape in scene}
        if not scene or len(cells) < len(scene) or not all(0 <= place < GRID for cell in cells for place in cell):
            raise UserError(
                f'No image can be drawn of "{description[:80]}": name each shape as COLOUR KIND at row R column C, in '
                f"a cell of its own, rows and columns from 1 to {GRID}, of the kinds {', '.join(KINDS)} and the "
                f"colours {', '.join(COLOURS)}."
            )
        return render(scene, cell=CELL[self.form])

    def _item(self, skill: str, subskill: str, stream: Random) -> Item:
        question = SKILLS[skill][subskill](stream)
        text = question.compact if self.form == "compact" else question.worded
        image = render(question.scene, cell=CELL[self.form])
        item = Item("", self.name, skill, subskill, text, question.answer, image)
        return replace(item, work=question.work)


def render(scene: Sequence[Shape], *, grid: int = GRID, cell: int = 8) -> Any:
    """The image of a scene: uint8 (grid · cell, grid · cell, 3); the same scene gives the same pixels."""
    image = Image.new("RGB", (grid * cell, grid * cell), BACKGROUND)
    pen = ImageDraw.Draw(image)
    margin, last = cell // 8, cell - 1 - cell // 8
    for shape in scene:
        left, top = shape.column * cell, shape.row * cell
        box = (left + margin, top + margin, left + last, top + last)
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            pen.ellipse(box, fill=colour)
        elif shape.kind == "square":
            pen.rectangle(box, fill=colour)
        elif shape.kind == "triangle":
            middle = left + (cell - 1) / 2
            pen.polygon([(box[0], box[3]), (box[2], box[3]), (middle, box[1])], fill=colour)
        else:
            third = cell * 3 // 8
            pen.rectangle((left + third, box[1], left + cell - 1 - third, box[3]), fill=colour)
            pen.rectangle((box[0], top + third, box[2], top + cell - 1 - third), fill=colour)
    return np.asarray(image, dtype=np.uint8).copy()


def read_word(response: str, *, strict: bool = False) -> str | None:
    """The answer word of a response: after the last ``####`` or "answer is", else its last word that can be an answer.

    None where there is none, or, with ``strict``, where the response is not just one such word.
    """
    text = re.split(r"####|answer\s*(?:is|:)", response, flags=re.IGNORECASE)[-1].casefold()
    marked = len(text) < len(response)
    words = re.findall(r"[a-z]+", text)
    found = [word for word in words if word in WORDS]
    if strict and not marked and (len(words) != 1 or len(found) != 1):
        return None
    return (found[0] if marked else found[-1]) if found else None


def _cells(stream: Random, count: int) -> list[tuple[int, int]]:
    return [divmod(place, GRID) for place in stream.sample(range(GRID * GRID), count)]


def _shapes(stream: Random, looks: Sequence[tuple[str, str]]) -> tuple[Shape, ...]:
    """Shapes of these (kind, colour) in random cells, in reading order."""
    cells = _cells(stream, len(looks))
    return tuple(sorted(Shape(*cell, kind, colour) for cell, (kind, colour) in zip(cells, looks)))


def _others(
    stream: Random, count: int, *, not_kind: str = "", not_colour: str = "", not_both: bool = False
) -> list[tuple[str, str]]:
    """Random looks without those of a kind, of a colour, or, with ``not_both``, of that kind in that colour."""
    looks = [
        (kind, colour)
        for kind in KINDS
        for colour in COLOURS
        if not ((kind == not_kind and colour == not_colour) if not_both else (kind == not_kind or colour == not_colour))
    ]
    return [stream.choice(looks) for _ in range(count)]


def _count(what: Literal["colour", "kind", "both"]) -> Callable[[Random], Question]:
    def draw(stream: Random) -> Question:
        kind, colour, number = stream.choice(KINDS), stream.choice(tuple(COLOURS)), stream.randint(0, 5)
        if what == "colour":
            looks = [(stream.choice(KINDS), colour) for _ in range(number)]
            looks += _others(stream, stream.randint(2, 6), not_colour=colour)
            compact, noun = f"count {colour}", f"{colour} shapes"
        elif what == "kind":
            looks = [(kind, stream.choice(tuple(COLOURS))) for _ in range(number)]
            looks += _others(stream, stream.randint(2, 6), not_kind=kind)
            compact, noun = f"count {kind}", _plural(kind)
        else:
            looks = [(kind, colour)] * number
            looks += _others(stream, stream.randint(2, 6), not_kind=kind, not_colour=colour, not_both=True)
            compact, noun = f"count {colour} {kind}", f"{colour} {_plural(kind)}"
        scene = _shapes(stream, looks)
        counted = [
            shape
            for shape in scene
            if (shape.colour == colour or what == "kind") and (shape.kind == kind or what == "colour")
        ]
        places = ", ".join(f"row {shape.row + 1} column {shape.column + 1}" for shape in counted) or "none"
        return Question(scene, compact, f"How many {noun} are there?", f"They are at: {places}.", f"{number}")

    return draw


def _name(what: Literal["colour", "kind"]) -> Callable[[Random], Question]:
    """Name the colour of the only shape of a kind, or the kind of the only shape of a colour."""

    def draw(stream: Random) -> Question:
        kind, colour = stream.choice(KINDS), stream.choice(tuple(COLOURS))
        if what == "colour":
            scene = _shapes(stream, [(kind, colour), *_others(stream, stream.randint(1, 6), not_kind=kind)])
            return Question(scene, f"colour of {kind}", f"What colour is the {kind}?", f"It is {colour}.", colour)
        scene = _shapes(stream, [(kind, colour), *_others(stream, stream.randint(1, 6), not_colour=colour)])
        return Question(scene, f"shape of {colour}", f"Which shape is {colour}?", f"It is a {kind}.", kind)

    return draw


def _side(words: tuple[str, str]) -> Callable[[Random], Question]:
    """On which side of a second shape a first one is; both are alone of their kind and colour."""

    def draw(stream: Random) -> Question:
        first, second = stream.sample([(kind, colour) for kind in KINDS for colour in COLOURS], 2)
        answer = stream.choice(words)
        low, high = sorted(stream.sample(range(GRID), 2))
        places = (low, high) if answer == words[0] else (high, low)
        across = (stream.randrange(GRID), stream.randrange(GRID))
        rows, columns = (across, places) if words[0] == "left" else (places, across)
        one, other = (Shape(row, column, *look) for row, column, look in zip(rows, columns, (first, second)))
        more = [shape for shape in _shapes(stream, _others(stream, 2)) if _apart(shape, one, other)]
        scene = tuple(sorted([one, other, *more]))
        compact = f"{one.label} {'left' if words[0] == 'left' else 'above'}? {other.label}"
        verb = f"{words[0]} of or {words[1]} of" if words[0] == "left" else "above or below"
        worded = f"Is the {one.label} {verb} the {other.label}?"
        noun, ends = ("column", columns) if words[0] == "left" else ("row", rows)
        return Question(scene, compact, worded, f"Their {noun}s are {ends[0] + 1} and {ends[1] + 1}.", answer)

    return draw


def _apart(shape: Shape, *taken: Shape) -> bool:
    """Whether a shape is in another cell than these, and looks otherwise."""
    return all((shape.row, shape.column) != (one.row, one.column) and shape.label != one.label for one in taken)


def _more(what: Literal["colour", "kind"]) -> Callable[[Random], Question]:
    def draw(stream: Random) -> Question:
        first, second = stream.sample(tuple(COLOURS) if what == "colour" else KINDS, 2)
        few, many = sorted(stream.sample(range(6), 2))
        answer = stream.choice((first, second))
        numbers = {first: many if answer == first else few, second: few if answer == first else many}
        names = [name for name, number in numbers.items() for _ in range(number)]
        looks = [
            (stream.choice(KINDS), name) if what == "colour" else (name, stream.choice(tuple(COLOURS)))
            for name in names
        ]
        work = f"{numbers[first]} and {numbers[second]}."
        nouns = (f"{first} shapes", f"{second} shapes") if what == "colour" else (_plural(first), _plural(second))
        worded = f"Are there more {nouns[0]} or more {nouns[1]}? Answer {first} or {second}."
        return Question(_shapes(stream, looks), f"more {first} or {second}", worded, work, answer)

    return draw


def _exists(stream: Random) -> Question:
    kind, colour = stream.choice(KINDS), stream.choice(tuple(COLOURS))
    there = stream.random() < 0.5
    looks = _others(stream, stream.randint(3, 7), not_kind=kind, not_colour=colour, not_both=True)
    # both halves of the look occur apart from each other, so that neither alone tells
    looks += [(kind, _others(stream, 1, not_colour=colour)[0][1]), (_others(stream, 1, not_kind=kind)[0][0], colour)]
    scene = _shapes(stream, [*looks[1:], (kind, colour)] if there else looks)
    found = "There is one." if there else f"Each {kind} has another colour."
    return Question(scene, f"any {colour} {kind}", f"Is there a {colour} {kind}?", found, "yes" if there else "no")


def _plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"


SKILLS: Mapping[str, Mapping[str, Callable[[Random], Question]]] = {
    "counting": {"colour": _count("colour"), "shape": _count("kind"), "both": _count("both")},
    "naming": {"colour": _name("colour"), "shape": _name("kind")},
    "position": {"left_right": _side(("left", "right")), "above_below": _side(("above", "below"))},
    "comparison": {"colours": _more("colour"), "shapes": _more("kind")},
    "existence": {"one": _exists},
}


Figures.SKILLS = SKILLS
