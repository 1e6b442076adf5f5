"""Teachers that write training items: a symbolic one that knows the skills exactly, and any language model.

An ``Order`` says what is to be written and what the writer is shown: some of the student's errors (Open-Ended), the
errors in one skill with a number of hypotheses about the weak subskill (Skill-List), or a subskill (Skill-Tree).
``Checks`` then decides what may be taught. Source: DataEnvGym (Khan et al., ICLR 2025, arXiv 2410.06215).

Decided here, where the published code misbehaves: an item that fails a check is not only marked but left out; 125 items
at 10 a call are 13 calls, the last of 5; at most as many errors are drawn as there are; no state is shared by writers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from preceptor.errors import UserError
from preceptor.tasks.records import Completed, Datum, Item, Task


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
