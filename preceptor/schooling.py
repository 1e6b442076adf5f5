"""Exams and schools: what a student is asked, and what a small one has learned before its first lesson."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from preceptor.learners import Pupil, small_student
from preceptor.tasks import Item, Task, leaks
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


@dataclass(frozen=True)
class Exam:
    """What the student is asked; the items are drawn apart from all that is taught."""

    validation: int = 60
    """Items of each skill whose answers the agent sees, evenly over its subskills."""
    test: int = 210
    """Items of each skill for the end, which nobody sees."""
    answer_length: int = 12
    """Tokens of an answer at most."""


@dataclass(frozen=True)
class Questions:
    """What the student is asked."""

    validation: tuple[Item, ...]
    test: tuple[Item, ...]


def draw_questions(exam: Exam, task: Task, *, seed: int) -> Questions:
    """Validation and test items, evenly over subskills; no test item is a validation item."""
    validation: list[Item] = []
    test: list[Item] = []
    for skill, subskills in task.skills.items():
        few, many = (-(-count // len(subskills)) for count in (exam.validation, exam.test))
        for subskill in subskills:
            drawn = task.items(few + many, seed=EXAM_SEED + seed, skill=skill, subskill=subskill)
            validation += drawn[:few]
            test += drawn[few:]
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
    first = small_student(seed=seed, sees=lessons[0].image is not None)
    pupil = Pupil(first, task, replace(school.training, seed=seed))
    shutil.rmtree(folder, ignore_errors=True)
    pupil.learn(lessons, folder / "training")
    pupil.save(folder / "student", card={"method": "school", "items": len(lessons), "weak": ", ".join(school.weak)})
