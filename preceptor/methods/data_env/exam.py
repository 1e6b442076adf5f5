"""The items that a student is examined on, and the items that decide what it is taught."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.language import Chat
from preceptor.methods.data_env.skill_discovery import Skills, discover, label, skills_of
from preceptor.tasks.contamination import leaks
from preceptor.tasks.records import Item, Task

UNSORTED = "unsorted"  # the subskill of an item whose skill was discovered


EXAM_SEED, SCHOOL_SEED = 7_000_000, 8_000_000  # apart from the seeds of what is taught


@dataclass(frozen=True)
class Exam:
    """What the student is asked; the items are drawn apart from all that is taught."""

    validation: int = 60
    """Items of each skill whose answers the agent sees, evenly over its subskills."""
    test: int = 210
    """Items of each skill for the end, which nobody sees."""
    answer_length: int | None = None
    """Tokens of an answer at most. None: twice what the right answers take."""

    def __post_init__(self) -> None:
        """Refuses an exam without questions or answers."""
        for name, value in (
            ("validation", self.validation), ("test", self.test), ("answer_length", self.answer_length)
        ):  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"exam.{name} is {value}: it must be 1 or more.")


@dataclass(frozen=True)
class Questions:
    """What the student is asked."""

    validation: tuple[Item, ...]
    test: tuple[Item, ...]


def draw_questions(exam: Exam, task: Task, *, seed: int) -> Questions:
    """Validation and test items, evenly over subskills; no test item is a validation item.

    At most half of a subskill's different items are asked, with a warning, so that others are left to be taught.
    """
    validation: list[Item] = []
    test: list[Item] = []
    small: dict[str, int] = {}
    for skill, subskills in task.skills.items():
        few, many = (-(-count // len(subskills)) for count in (exam.validation, exam.test))
        for subskill in subskills:
            drawn = task.items(2 * (few + many), seed=EXAM_SEED + seed, skill=skill, subskill=subskill)
            different = list({_question(item): item for item in drawn}.values())
            asked = min(few + many, len(different) // 2)
            if asked < few + many:
                small[f"{skill}/{subskill}"] = asked
            shown = min(few, max(1, round(asked * few / (few + many))))
            validation += different[:shown]
            test += different[shown:asked]
    if small:
        asked_of = ", ".join(f"{count} of {name}" for name, count in small.items())
        warnings.warn(f"The exam asks only {asked_of}: as many different items are left to be taught.", stacklevel=2)
    both = leaks(test, validation)
    return Questions(tuple(validation), tuple(item for item in test if item.id not in both))


def discover_skills(questions: Questions, chat: Chat, kept: Path) -> Questions:
    """The same questions with skills that a language model finds in the validation items.

    Test items are labelled from the list of skills so found. ``kept``: the file of the skills, read where it exists, so
    that a resumed run has the same.

    Raises:
        UserError: an item cannot be labelled, or the file is damaged.
    """
    skills = Skills.load(kept) if kept.exists() else discover(questions.validation, chat)
    unseen = [item for item in questions.test if item.instruction not in skills.labels]
    labels = {**skills.labels, **{item.instruction: label(item, skills.names, chat) for item in unseen}}
    if unseen or not kept.exists():
        Skills(skills.categories, labels).save(kept)

    def renamed(items: Sequence[Item]) -> tuple[Item, ...]:
        return tuple(replace(item, skill=labels[item.instruction], subskill=UNSORTED) for item in items)

    return Questions(renamed(questions.validation), renamed(questions.test))


def skills_named(questions: Questions) -> dict[str, tuple[str, ...]]:
    """The skills of the validation items, with their subskills."""
    return {skill: tuple(names) for skill, names in skills_of(questions.validation).categories.items()}


def answer_length(exam: Exam, task: Task, items: Sequence[Item], tokenizer: Tokenizer) -> int:
    """How many tokens of an answer are read.

    Raises:
        UserError: the exam sets fewer than the right answer to one of the items takes.
    """
    right = [task.datum(item).response for item in items]
    needed = max(len(ids) for ids in tokenizer(right, add_special_tokens=False)["input_ids"])
    if exam.answer_length is not None and exam.answer_length < needed:
        raise UserError(
            f"exam.answer_length is {exam.answer_length}, and right answers take up to {needed} tokens: give as many "
            "or more, or leave it out."
        )
    return exam.answer_length or 2 * needed


def _question(item: Item) -> tuple[str, str, bytes]:
    return item.instruction, item.starter, b"" if item.image is None else item.image.tobytes()
