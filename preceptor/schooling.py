"""Exams and schools: what a student is asked, and what a small one has learned before its first lesson."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.learners import Pupil, small_student
from preceptor.tasks import Item, Task, leaks
from preceptor.tasks.sampling import select
from preceptor.training import Training

EXAM_SEED, SCHOOL_SEED = 7_000_000, 8_000_000  # apart from the seeds of what is taught


@dataclass(frozen=True)
class School:
    """What the small student learns before the first round."""

    weak: tuple[str, ...] = ("reversal/four_digits", "reversal/five_digits")
    """Subskills of which it sees few items, as ``skill/subskill``."""
    items: int = 5000
    """Items of each skill, evenly over its subskills but for the weak ones."""
    few: int = 40
    """Items of each weak one."""
    training: Training = Training(epochs=1, batch_size=32, learning_rate=2e-3, warmup=0.05, weight_decay=0.01)
    """How it is taught them."""

    def __post_init__(self) -> None:
        """Refuses a school without lessons."""
        if self.items < 1 or self.few < 0:
            raise UserError(f"school.items is {self.items} and school.few {self.few}: give 1 or more, and 0 or more.")


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
        told = ", ".join(f"{count} of {name}" for name, count in small.items())
        warnings.warn(f"The exam asks only {told}: as many different items are left to be taught.", stacklevel=2)
    both = leaks(test, validation)
    return Questions(tuple(validation), tuple(item for item in test if item.id not in both))


def go_to_school(school: School, task: Task, questions: Questions, folder: Path, *, seed: int) -> None:
    """Teach a fresh small student unevenly and save it in ``folder/student``; no item of the exam is among its lessons.

    It sees images where the task's items have any.
    """
    items: list[Item] = []
    for skill, subskills in task.skills.items():
        for subskill in subskills:
            count = school.few if f"{skill}/{subskill}" in school.weak else school.items // len(subskills)
            items += task.items(count, seed=SCHOOL_SEED + seed, skill=skill, subskill=subskill)
    held_out = leaks(items, [*questions.validation, *questions.test])
    lessons = [task.datum(item) for item in items if item.id not in held_out]
    if not lessons:
        raise UserError(f"school.items is {school.items}, which leaves nothing to learn: give more items.")
    first = small_student(seed=seed, sees=lessons[0].image is not None)
    pupil = Pupil(first, task, replace(school.training, seed=seed))
    shutil.rmtree(folder, ignore_errors=True)
    pupil.learn(lessons, folder / "training")
    card: dict[str, object] = {"method": "school", "items": len(lessons), "weak": ", ".join(school.weak)}
    pupil.save(folder / "unfinished" / "student", card=card)
    # Only now: a student without its eyes, which are saved last, would pass for one that sees nothing.
    (folder / "unfinished" / "student").rename(folder / "student")
    (folder / "unfinished").rmdir()


def answer_length(exam: Exam, task: Task, items: Sequence[Item], tokenizer: Any) -> int:
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


def check_weak(school: School, task: Task) -> None:
    """Refuses weak subskills that are none; the default ones are those of mathematics, and count for nothing elsewhere.

    Raises:
        UserError: there is no such skill or subskill.
    """
    for name in school.weak if school.weak != School().weak else ():
        skill, _, subskill = name.partition("/")
        select(task.skills, skill, subskill)


def _question(item: Item) -> tuple[str, str, bytes]:
    return item.instruction, item.starter, b"" if item.image is None else item.image.tobytes()
