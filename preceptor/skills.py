"""Skills, subskills and how many items each gets: the tree of a skill, and what can be done to it.

Source: DataEnvGym (Khan et al., ICLR 2025, arXiv 2410.06215), its Skill-Tree environment. A *skill* is a category of
validation items; a *subskill* is a finer topic under it. A *forest* is one tree a skill.

Decided here, where the published code misbehaves: a subskill without a verdict has no training accuracy (None), which
no mean ever holds; an action that names an unknown subskill is refused; an allocation does not fall below zero.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.folder import write_whole
from preceptor.language import Chat, Request
from preceptor.tasks import Check, Datum, Item

TRIES = 3  # further questions after one whose answer is no allowed label


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


@dataclass(frozen=True)
class Skills:
    """Which skill an item belongs to, found once and kept, so that runs can be compared.

    ``categories``: the skills, each with the names of finer ones that it holds. ``labels``: the skill of each item
    seen, by its text.
    """

    categories: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The skills."""
        return tuple(self.categories)

    def save(self, path: Path) -> None:
        """Write the skills as JSON."""
        write_whole(path, json.dumps({"categories": dict(self.categories), "labels": dict(self.labels)}, indent=2))

    @classmethod
    def load(cls, path: Path) -> Skills:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is not there or is no such file.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            return cls({name: tuple(finer) for name, finer in read["categories"].items()}, dict(read["labels"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no skills ({error!r}): discover them anew.") from error


def skills_of(items: Sequence[Item]) -> Skills:
    """The skills that the items themselves name."""
    found: dict[str, dict[str, None]] = {}
    for item in items:
        found.setdefault(item.skill, {})[item.subskill] = None
    return Skills(
        {skill: tuple(names) for skill, names in found.items()}, {item.instruction: item.skill for item in items}
    )


def discover(items: Sequence[Item], chat: Chat, *, least: int = 0) -> Skills:
    """Skills found by a language model, after Metacognitive Capabilities of LLMs (Didolkar et al., 2024).

    A descriptive name is asked for each item; the names are sorted into exclusive, exhaustive categories (at least
    ``least``); an item whose name no category lists is put to the closed list of categories.

    Raises:
        UserError: an item cannot be labelled after ``TRIES`` further tries; the text lists the allowed labels.
    """
    named = [_one(chat, _name_request(item), "skill") for item in items]
    found = sorted({name for name in named if name})
    request = _sort_request(found, least)
    reply = chat.ask([request])[0]
    categories = {
        str(one["name"]): tuple(str(name) for name in one["skills"]) for one in (reply.data or {}).get("categories", [])
    }
    if not categories:
        raise UserError(f"The teacher sorted {len(found)} skills into no category ({reply.error}): try another model.")
    homes = {name: category for category, names in categories.items() for name in names}
    labels = {
        item.instruction: homes.get(name) or label(item, tuple(categories), chat)
        for item, name in zip(items, named, strict=True)
    }
    return Skills(categories, labels)


def label(item: Item, names: tuple[str, ...], chat: Chat) -> str:
    """The skill of an item, out of a closed list.

    Raises:
        UserError: no answer is on the list after ``TRIES`` further tries; the text lists the allowed labels.
    """
    said = ""
    for attempt in range(TRIES + 1):
        said = _one(chat, _label_request(item, names, said, attempt), "skill")
        if said in names:
            return said
    raise UserError(
        f"The teacher calls the skill of {item.instruction[:60]!r} {said!r}, which is not one of {', '.join(names)}: "
        "discover the skills anew, or with another model."
    )


def _one(chat: Chat, request: Request, key: str) -> str:
    reply = chat.ask([request])[0]
    return str((reply.data or {}).get(key, "")).strip()


def _object(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _name_request(item: Item) -> Request:
    text = (
        "Name the one skill that a student needs most to answer the question below. Give a short reason, and the name "
        f"in lower case with underscores, such as adding_fractions.\n\nQuestion: {item.instruction}"
    )
    schema = _object(reason={"type": "string"}, skill={"type": "string"})
    return Request(({"role": "user", "content": text},), schema=schema)


def _sort_request(names: Sequence[str], least: int) -> Request:
    text = (
        "Sort all the skills below into categories that will guide which practice data to collect. No skill may stand "
        f"in two categories, and none may be left out.{f' Make at least {least} categories.' if least else ''}\n\n"
        + "\n".join(names)
    )
    category = _object(name={"type": "string"}, skills={"type": "array", "items": {"type": "string"}})
    schema = _object(categories={"type": "array", "items": category})
    return Request(({"role": "user", "content": text},), max_tokens=2048, schema=schema)


def _label_request(item: Item, names: tuple[str, ...], said: str, attempt: int) -> Request:
    again = f" You said {said!r} before, which is not on the list." if attempt else ""
    text = f"Choose the category of the question from this list: {', '.join(names)}.{again}\n\nQuestion: "
    schema = _object(skill={"type": "string"})
    return Request(({"role": "user", "content": text + item.instruction},), seed=attempt, schema=schema)
