"""The records that pass between a student, a teacher and an environment: items, answers, training data, reports.

Source of the vocabulary: DataEnvGym (Khan et al., ICLR 2025, https://arxiv.org/abs/2410.06215).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from preceptor.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question. ``truth``: the right answer, in the form that the task's scorer reads.

    ``image``: uint8 (H, W, 3) or None. ``starter``: code that a program begins with. ``tests``: one call a line
    (``f(2, 3) == 5``); empty outside of programming. ``work``: the working that leads to the truth, which only a
    teacher sees.
    """

    id: str
    task: str
    skill: str
    subskill: str
    instruction: str
    truth: str
    image: Any | None = field(default=None, compare=False, repr=False)
    starter: str = ""
    tests: str = ""
    work: str = ""


@dataclass(frozen=True)
class Completed:
    """An item, what the student answered, and whether that was right."""

    item: Item
    response: str
    correct: bool


@dataclass(frozen=True)
class Datum:
    """A training item as a teacher writes it.

    ``response``: worked line or lines, then the answer in exactly the form that the scorer reads.
    """

    id: str
    instruction: str
    response: str
    truth: str
    skill: str
    subskill: str
    image: Any | None = field(default=None, compare=False, repr=False)
    starter: str = ""
    tests: str = ""


@dataclass(frozen=True)
class Check:
    """The verdict of the quality checks on one datum.

    ``parses``: the annotated answer survives the scorer. ``known``: the student answers it correctly already.
    ``leaked``: it equals a held-out item. ``passed``: it may be trained on. ``reason``: why not; empty when passed.
    """

    datum_id: str
    parses: bool
    known: bool
    leaked: bool
    passed: bool
    reason: str


@dataclass(frozen=True)
class Slice:
    """How many items of a skill (``subskill`` empty) or of a subskill were answered, and how many correctly."""

    skill: str
    subskill: str
    count: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count


@dataclass(frozen=True)
class PerformanceReport:
    """A student's performance in a task.

    ``skills``: a slice a skill that was examined. ``subskills``: a slice a (skill, subskill). What was not examined has
    no slice: its accuracy is unknown, not 0.
    """

    task: str
    count: int
    correct: int
    skills: Mapping[str, Slice]
    subskills: Mapping[tuple[str, str], Slice]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count


class Task(Protocol):
    """What examines a student. ``skills``: the subskills of each skill, by the skill's name."""

    @property
    def name(self) -> str:
        """The task's name: math, code or visual."""

    @property
    def skills(self) -> Mapping[str, tuple[str, ...]]:
        """The skills, each with its subskills; empty where the data name none."""

    def items(self, count: int, *, seed: int, skill: str | None = None, subskill: str | None = None) -> list[Item]:
        """Exactly ``count`` items, evenly over the (sub)skills asked for; the same seed gives the same items.

        The items of one call differ from one another as long as the subskill holds as many.

        Raises:
            UserError: the skill or the subskill is unknown; the text lists those there are.
        """

    def score(self, items: Sequence[Item], responses: Sequence[str]) -> list[bool]:
        """Whether each response is right, in order.

        Raises:
            UserError: there are not as many responses as items.
        """

    def correct(self, item: Item, response: str) -> bool:
        """Whether the response is right."""

    def datum(self, item: Item) -> Datum:
        """The symbolic teacher's training item: the item with its exact answer."""

    def prompt(self, item: Item) -> str:
        """The text that a student reads (the image goes beside it)."""


def item_of(datum: Datum, task: str) -> Item:
    """The question that a training item asks, to examine a student (or the scorer) with it."""
    return Item(
        id=datum.id,
        task=task,
        skill=datum.skill,
        subskill=datum.subskill,
        instruction=datum.instruction,
        truth=datum.truth,
        image=datum.image,
        starter=datum.starter,
        tests=datum.tests,
    )


def complete(task: Task, items: Sequence[Item], responses: Sequence[str]) -> list[Completed]:
    """Score responses to items.

    Raises:
        UserError: there is no item, or not as many responses as items.
    """
    if not items:
        raise UserError(f"The task {task.name} has no item to examine the student with; ask for at least one.")
    marks = task.score(items, responses)
    return [Completed(item, response, mark) for item, response, mark in zip(items, responses, marks)]


def same_length(items: Sequence[Any], responses: Sequence[str]) -> None:
    """See that there is one response an item.

    Raises:
        UserError: the two counts differ; both are named.
    """
    if len(items) != len(responses):
        raise UserError(
            f"The student was asked {len(items)} questions and gave {len(responses)} answers; it must answer each once."
        )


def report(completed: Sequence[Completed]) -> PerformanceReport:
    """The accuracy overall, by skill and by subskill.

    Raises:
        UserError: nothing was answered, or the items are of several tasks.
    """
    tasks = sorted({one.item.task for one in completed})
    if len(tasks) != 1:
        found = f"items of the tasks {', '.join(tasks)}" if tasks else "no completed item"
        raise UserError(f"A performance report is about one task and was given {found}; give items of one task.")
    skills: dict[str, list[bool]] = {}
    subskills: dict[tuple[str, str], list[bool]] = {}
    for one in completed:
        skills.setdefault(one.item.skill, []).append(one.correct)
        subskills.setdefault((one.item.skill, one.item.subskill), []).append(one.correct)
    return PerformanceReport(
        task=tasks[0],
        count=len(completed),
        correct=sum(one.correct for one in completed),
        skills={skill: Slice(skill, "", len(marks), sum(marks)) for skill, marks in sorted(skills.items())},
        subskills={key: Slice(*key, len(marks), sum(marks)) for key, marks in sorted(subskills.items())},
    )
