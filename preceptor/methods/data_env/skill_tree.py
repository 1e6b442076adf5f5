"""Skills, subskills and how many items each gets: the tree of a skill, and what can be done to it.

Source: DataEnvGym (Khan et al., ICLR 2025, arXiv 2410.06215), its Skill-Tree environment. A *skill* is a category of
validation items; a *subskill* is a finer topic under it. A *forest* is one tree a skill.

Decided here, where the published code misbehaves: a subskill without a verdict has no training accuracy (None), which
no mean ever holds; an action that names an unknown subskill is refused; an allocation does not fall below zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preceptor.errors import UserError
from preceptor.tasks.records import Check, Datum


@dataclass(frozen=True)
class Explore:
    """Add ``new`` subskills, and let each have ``items`` items; what was allocated before stays as it is."""

    new: int
    items: int

    def __post_init__(self) -> None:
        if self.new < 1 or self.items < 0:
            raise UserError(
                f"Explore({self.new}, {self.items}) is no action: give 1 new subskill or more, and 0 items or more."
            )


@dataclass(frozen=True)
class Exploit:
    """Add ``delta[s]`` to the items of every subskill s; a negative one prunes, none repeats the same amount."""

    delta: Mapping[str, int]


Action = Explore | Exploit


@dataclass(frozen=True)
class SkillTree:
    """A skill's subskills with their allocation, and what came of the last items written for them.

    ``allocation``: items a subskill, in order of discovery. ``data``: ids of the items written. ``checks``: their
    verdicts. ``training_accuracy``: the share of them that the student answered right before it was taught; None where
    it is not known.
    """

    skill: str
    allocation: Mapping[str, int] = field(default_factory=dict)
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    checks: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)
    training_accuracy: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def subskills(self) -> tuple[str, ...]:
        """The subskills, in order of discovery."""
        return tuple(self.allocation)

    @property
    def total(self) -> int:
        """Items allocated."""
        return sum(self.allocation.values())

    @property
    def accuracy(self) -> float:
        """Training accuracy: the mean over subskills where it is known, weighted by their allocation; 0 without any."""
        known = [
            (count, accuracy)
            for subskill, count in self.allocation.items()
            if (accuracy := self.training_accuracy.get(subskill)) is not None
        ]
        weight = sum(count for count, _ in known)
        return sum(count * accuracy for count, accuracy in known) / weight if weight else 0.0

    def without_data(self) -> SkillTree:
        """The subskills and their allocation alone."""
        return SkillTree(self.skill, dict(self.allocation))

    def filled(self, data: Sequence[Datum], checks: Sequence[Check], *, probed: bool = True) -> SkillTree:
        """The tree with the items written for it, in any order, and a verdict on each.

        ``probed``: the student was asked about them; otherwise the training accuracy stays unknown.
        """
        names = {name.casefold(): name for name in self.allocation}
        found: dict[str, list[tuple[Datum, Check]]] = {name: [] for name in self.allocation}
        for datum, check in zip(data, checks, strict=True):
            found[names[datum.subskill.casefold()]].append((datum, check))
        return replace(
            self,
            data={name: tuple(datum.id for datum, _ in pairs) for name, pairs in found.items()},
            checks={name: tuple(check for _, check in pairs) for name, pairs in found.items()},
            training_accuracy={
                name: _known_share([check for _, check in pairs]) if probed else None for name, pairs in found.items()
            },
        )


@dataclass(frozen=True)
class Experience:
    """What was done to one skill in one round, and what came of it.

    ``tree``: after the action, with its data. ``performance``: validation accuracy before, None where the skill was
    not examined. ``reward``: performance after minus before; None as long as either is unknown.
    """

    tree: SkillTree
    action: Action
    performance: float | None
    reward: float | None


def read_experience(data: Mapping[str, Any]) -> Experience:
    """An experience from its JSON (``dataclasses.asdict``)."""
    tree, action = data["tree"], data["action"]
    return Experience(
        SkillTree(
            tree["skill"],
            dict(tree["allocation"]),
            {name: tuple(ids) for name, ids in tree["data"].items()},
            {name: tuple(Check(**check) for check in checks) for name, checks in tree["checks"].items()},
            dict(tree["training_accuracy"]),
        ),
        Explore(**action) if "new" in action else Exploit(**action),
        data["performance"],
        data["reward"],
    )


Propose = Callable[[str, tuple[str, ...], int], Sequence[str]]


"""From a skill, the subskills that it has, and a number: as many new names, or fewer."""


def act(tree: SkillTree, action: Action, propose: Propose) -> SkillTree:
    """The tree after an action, without data. Explore never changes what is there, Exploit never adds a subskill.

    Raises:
        UserError: an Exploit names a subskill that the tree does not have.
    """
    allocation = dict(tree.allocation)
    if isinstance(action, Explore):
        allocation |= dict.fromkeys(_new_names(tree, action.new, propose), action.items)
        return SkillTree(tree.skill, allocation)
    unknown = sorted(action.delta.keys() - allocation.keys())
    if unknown:
        raise UserError(
            f"Exploit names the subskill {unknown[0]!r}, which {tree.skill} does not have: choose among "
            f"{', '.join(allocation) or 'none; explore first'}."
        )
    for subskill, change in action.delta.items():
        if allocation[subskill] + change < 0:
            warnings.warn(f"{subskill} of {tree.skill} was to have fewer than 0 items; it has 0.", stacklevel=2)
        allocation[subskill] = max(0, allocation[subskill] + change)
    return SkillTree(tree.skill, allocation)


def _new_names(tree: SkillTree, count: int, propose: Propose) -> list[str]:
    """Up to ``count`` names, none of them there already in any case; what is missing is asked for once more."""
    names: list[str] = []
    for _ in range(2):
        there = (*tree.subskills, *names)
        for name in propose(tree.skill, there, count - len(names)) if len(names) < count else ():
            clean = " ".join(name.split())
            if clean and clean.casefold() not in {one.casefold() for one in (*tree.subskills, *names)}:
                names.append(clean)
    return names[:count]


def _known_share(checks: Sequence[Check]) -> float | None:
    """The share of right answers among those items whose own answer can be scored."""
    scored = [check.known for check in checks if check.parses]
    return sum(scored) / len(scored) if scored else None
