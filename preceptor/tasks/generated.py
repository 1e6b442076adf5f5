"""What the tasks with generated items share: skills by name, items drawn evenly over them, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from preceptor.tasks.records import Item, same_length
from preceptor.tasks.sampling import draw_items, only_skills


class GeneratedTask:
    """A task whose items are drawn: ``SKILLS`` holds a function for each subskill, ``only`` names those examined."""

    SKILLS: ClassVar[Mapping[str, Mapping[str, Any]]]
    only: tuple[str, ...]

    @property
    def skills(self) -> Mapping[str, tuple[str, ...]]:
        """The skills, each with its subskills, from easy to hard.

        Raises:
            UserError: ``only`` names a skill or a subskill that there is not.
        """
        return only_skills({skill: tuple(subskills) for skill, subskills in self.SKILLS.items()}, self.only)

    def items(self, count: int, *, seed: int, skill: str | None = None, subskill: str | None = None) -> list[Item]:
        """Items, evenly over the (sub)skills asked for; see ``Task.items``.

        Raises:
            UserError: the skill or the subskill is unknown.
        """
        return draw_items(self._item, self.skills, count, seed, skill=skill, subskill=subskill)

    def score(self, items: Sequence[Item], responses: Sequence[str]) -> list[bool]:
        """Whether each response is right.

        Raises:
            UserError: there are not as many responses as items.
        """
        same_length(items, responses)
        return [self.correct(item, response) for item, response in zip(items, responses)]

    def correct(self, item: Item, response: str) -> bool:
        """Whether a response is right."""
        raise NotImplementedError

    def _item(self, skill: str, subskill: str, stream: Random) -> Item:
        raise NotImplementedError
