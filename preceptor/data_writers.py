"""Teachers that write training items: a symbolic one that knows the skills exactly, and any language model.

An ``Order`` says what is to be written and what the writer is shown: some of the student's errors (Open-Ended), the
errors in one skill with a number of hypotheses about the weak subskill (Skill-List), or a subskill (Skill-Tree).
``Checks`` then decides what may be taught. Source: DataEnvGym (Khan et al., ICLR 2025, arXiv 2410.06215).

Decided here, where the published code misbehaves: an item that fails a check is not only marked but left out; 125 items
at 10 a call are 13 calls, the last of 5; at most as many errors are drawn as there are; no state is shared by writers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from preceptor.errors import UserError
from preceptor.tasks import Check, Completed, Datum, Item, Task, item_of, leaks

Answer = Callable[[Sequence[Item]], list[str]]
"""A student's answers to items, in their order."""


@dataclass(frozen=True)
class Order:
    """``count`` items to write; what is empty is left to the writer.

    ``hypotheses``: about how many weak subskills; 0 where none are asked for. ``seed`` decides what chance decides.
    """

    count: int
    seed: int
    skill: str = ""
    subskill: str = ""
    examples: tuple[Item, ...] = ()
    errors: tuple[Completed, ...] = ()
    hypotheses: int = 0


@dataclass(frozen=True)
class Written:
    """What came of an order: items, and a reason for each one that was lost on the way."""

    data: tuple[Datum, ...] = ()
    failures: tuple[str, ...] = ()


class Writer(Protocol):
    """A teacher that writes items."""

    def write(self, orders: Sequence[Order]) -> list[Written]:
        """What came of each order, at most ``count`` items each; an order of 0 items asks nobody."""

    def propose(self, skill: str, there: tuple[str, ...], count: int) -> Sequence[str]:
        """Up to ``count`` new subskills of a skill that has those ``there``."""


@dataclass(frozen=True)
class Symbolic:
    """A teacher that knows every skill exactly: it draws the task's own items and never errs.

    Shown errors, it writes more items of their subskills, as often as they occur among the errors (of the
    ``hypotheses`` most frequent ones, where hypotheses are asked for). Shown none, it spreads the items evenly.
    """

    task: Task

    def write(self, orders: Sequence[Order]) -> list[Written]:
        """New items of the task, with their exact answers."""
        return [self._write(order) for order in orders]

    def propose(self, skill: str, there: tuple[str, ...], count: int) -> Sequence[str]:
        """The task's own subskills that are not there yet."""
        known = {name.casefold() for name in there}
        return [name for name in self.task.skills.get(skill, ()) if name.casefold() not in known][:count]

    def _write(self, order: Order) -> Written:
        if order.count == 0:
            return Written()
        try:
            shares = Counter(self._kinds(order)[: order.count])
            items = [
                item
                for place, ((skill, subskill), count) in enumerate(sorted(shares.items()))
                for item in self.task.items(count, seed=1000 * order.seed + place, skill=skill, subskill=subskill)
            ]
        except UserError as error:
            return Written((), (str(error),))
        return Written(tuple(self.task.datum(item) for item in items))

    def _kinds(self, order: Order) -> list[tuple[str, str]]:
        """The (skill, subskill) of each item to write, at least ``count`` of them."""
        stream = Random(order.seed)
        if order.subskill:
            return [(order.skill, order.subskill)] * order.count
        kinds = [(one.item.skill, one.item.subskill) for one in order.errors]
        if kinds and order.hypotheses:
            weakest = {kind for kind, _ in Counter(kinds).most_common(order.hypotheses)}
            kinds = [kind for kind in kinds if kind in weakest]
        if not kinds:
            skills = [order.skill] if order.skill else list(self.task.skills)
            kinds = [(skill, subskill) for skill in skills for subskill in self.task.skills[skill]]
        # Shuffled once a turn through the list: what a remainder falls to is left to chance.
        return [kind for _ in range(-(-order.count // len(kinds))) for kind in stream.sample(kinds, len(kinds))]


@dataclass(frozen=True)
class Checks:
    """The quality checks: the annotated answer survives the scorer, the student lacks it, no held-out item leaks.

    ``held_out``: validation and test items. ``reject_known``: leave out what the student answers right already. That
    needs the student's answers: it is a look at its state, which an agent without state does not have.
    """

    task: Task
    held_out: tuple[Item, ...]
    reject_known: bool = True

    def __call__(self, data: Sequence[Datum], taught: Sequence[Datum], answer: Answer | None) -> list[Check]:
        """One verdict a datum, in order.

        Args:
            data: the items to check.
            taught: items accepted before; one that equals them is rejected too.
            answer: asks the student; None leaves ``known`` False everywhere.

        Raises:
            UserError: the student did not answer each item once.
        """
        if not data:
            return []
        items = [item_of(datum, self.task.name) for datum in data]
        parses = self.task.score(items, [datum.response for datum in data])
        known = [False] * len(items)
        asked = [place for place, good in enumerate(parses) if good] if answer else []
        if answer and asked:
            marks = self.task.score([items[place] for place in asked], answer([items[place] for place in asked]))
            for place, mark in zip(asked, marks, strict=True):
                known[place] = mark
        leaked = leaks(data, self.held_out)
        seen = {_text(datum) for datum in taught}
        checks = []
        for datum, good, knows in zip(data, parses, known, strict=True):
            reason = ""
            if not good:
                reason = "its answer does not pass the scorer"
            elif knows and self.reject_known:
                reason = "the student knows it"
            elif datum.id in leaked:
                reason = "it is a held-out item"
            elif _text(datum) in seen:
                reason = "it was written before"
            seen.add(_text(datum))
            checks.append(Check(datum.id, good, knows, datum.id in leaked, not reason, reason))
        return checks


def _text(datum: Datum) -> tuple[str, str, bytes]:
    image = b"" if datum.image is None else bytes(datum.image.tobytes())
    return " ".join(datum.instruction.split()), datum.starter, image


def named(data: Sequence[Datum], prefix: str) -> list[Datum]:
    """The same data under ids that no other batch has."""
    return [replace(datum, id=f"{prefix}-{place:04d}") for place, datum in enumerate(data)]


def datum_of(task: Task, spec: Mapping[str, Any], order: Order, image: Any = None) -> Datum:
    """A training item from what a language model wrote (``SPECS``).

    Raises:
        UserError: a field is missing or empty; the text names it.
    """
    missing = [name for name in SPECS[task.name] if name in REQUIRED and not str(spec.get(name, "")).strip()]
    if missing:
        raise UserError(f"an item lacks its {missing[0]}")
    text = {name: str(spec.get(name, "")).strip() for name in SPECS[task.name]}
    item = Item(
        id="",
        task=task.name,
        skill=order.skill or str(spec.get("skill", "")),
        subskill=order.subskill or str(spec.get("subskill", "")),
        instruction=text["problem"],
        truth=text["answer"],
        image=image,
        starter=text.get("starter", ""),
        tests=text.get("tests", ""),
        work=text.get("work", ""),
    )
    return task.datum(item)


SPECS: Mapping[str, Mapping[str, str]] = {
    "math": {
        "problem": "the problem",
        "work": "one line of working",
        "answer": "the final answer: a number",
    },
    "code": {
        "problem": "what the function is to do",
        "starter": "the function's first line, or nothing",
        "answer": "the whole function in Python",
        "tests": "calls with their results, one a line, such as f(2, 3) == 5",
    },
    "visual": {
        "problem": "the question about the image",
        "image": (
            "the image, a grid of 4 rows and 4 columns counted from 1: each shape as COLOUR KIND at row R column C, "
            "separated by semicolons, with the colours red, green, blue, yellow and the kinds circle, square, "
            "triangle, cross"
        ),
        "answer": "the answer: a word or a number",
    },
}
REQUIRED = ("problem", "answer", "tests", "image")
