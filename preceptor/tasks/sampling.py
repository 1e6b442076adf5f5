"""Draw items evenly over skills and subskills, each subskill from a random stream of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from preceptor.errors import UserError
from preceptor.tasks.records import Item

TRIES = 50  # draws of one item before it may equal an earlier one


def draw_items(
    make: Callable[[str, str, random.Random], Item],
    skills: Mapping[str, tuple[str, ...]],
    count: int,
    seed: int,
    *,
    skill: str | None = None,
    subskill: str | None = None,
) -> list[Item]:
    """Items number 0 .. count - 1, over the skills in turn, and over the subskills of a skill in turn.

    A subskill's items depend on the seed alone, not on what else is drawn, and differ from one another in instruction,
    starter or image as long as ``TRIES`` draws find another one. ``make`` is given skill, subskill and stream; the
    items' ids are set here.

    Raises:
        UserError: the skill or the subskill is unknown, or the count is negative.
    """
    if count < 0:
        raise UserError(f"{count} items were asked for; ask for 0 or more.")
    wanted = select(skills, skill, subskill)
    names = list(wanted)
    streams = {(one, sub): random.Random(f"{seed}/{one}/{sub}") for one in names for sub in wanted[one]}
    seen: set[object] = set()
    drawn: dict[tuple[str, str], int] = {}
    items = []
    for place in range(count):
        one = names[place % len(names)]
        sub = wanted[one][place // len(names) % len(wanted[one])]
        item = _unseen(make, one, sub, streams[one, sub], seen)
        number = drawn[one, sub] = drawn.get((one, sub), -1) + 1
        items.append(replace(item, id=f"{item.task}-{seed}-{one}-{sub}-{number}"))
    return items


def select(
    skills: Mapping[str, tuple[str, ...]], skill: str | None = None, subskill: str | None = None
) -> dict[str, tuple[str, ...]]:
    """The skills, or the one named, with its subskills, or the one named. A subskill alone is looked for in all skills.

    Raises:
        UserError: the skill or the subskill is unknown.
    """
    if skill is not None and skill not in skills:
        raise UserError(f"There is no skill {skill!r}; choose one of: {', '.join(skills)}.")
    wanted = dict(skills) if skill is None else {skill: skills[skill]}
    if subskill is None:
        return wanted
    found: dict[str, tuple[str, ...]] = {one: (subskill,) for one, subs in wanted.items() if subskill in subs}
    if not found:
        known = ", ".join(dict.fromkeys(sub for subs in wanted.values() for sub in subs))
        raise UserError(f"There is no subskill {subskill!r}; choose one of: {known}.")
    return found


def only_skills(skills: Mapping[str, tuple[str, ...]], only: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The skills (``addition``) and subskills (``addition/two_digit``) that are named; all of them where none is.

    Raises:
        UserError: a skill or a subskill is unknown.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for name in only:
        skill, _, subskill = name.partition("/")
        chosen[skill] = (*chosen.get(skill, ()), *select(skills, skill, subskill or None)[skill])
    return chosen or dict(skills)


def _unseen(
    make: Callable[[str, str, random.Random], Item], skill: str, subskill: str, stream: random.Random, seen: set[object]
) -> Item:
    for _ in range(TRIES):
        item = make(skill, subskill, stream)
        image = None if item.image is None else item.image.tobytes()
        key = (skill, subskill, item.instruction, item.starter, image)
        if key not in seen:
            break
    seen.add(key)
    return item
