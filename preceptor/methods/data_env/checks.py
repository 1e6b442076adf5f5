"""Which of the written data may be taught: checks that leave out what is wrong, repeated or leaked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from preceptor.tasks.contamination import leaks
from preceptor.tasks.records import Check, Datum, Item, Task, item_of

Answer = Callable[[Sequence[Item]], list[str]]


"""A student's answers to items, in their order."""


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
