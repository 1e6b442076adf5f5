"""What a small student learns before the first round."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.data_env.exam import SCHOOL_SEED, Questions
from preceptor.methods.data_env.small_models import small_student
from preceptor.methods.data_env.student import TaskStudent, Teach
from preceptor.tasks.contamination import leaks
from preceptor.tasks.records import Item, Task
from preceptor.tasks.sampling import select


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
        """Refuses settings that leave nothing to learn."""
        if self.items < 1 or self.few < 0:
            raise UserError(f"school.items is {self.items} and school.few {self.few}: give 1 or more, and 0 or more.")


def pretrain(school: School, task: Task, questions: Questions, teach: Teach, folder: Path, *, seed: int) -> None:
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
    student = TaskStudent(first, task, replace(school.training, seed=seed), teach)
    shutil.rmtree(folder, ignore_errors=True)
    student.learn(lessons, folder / "training")
    card: dict[str, object] = {"method": "school", "items": len(lessons), "weak": ", ".join(school.weak)}
    student.save(folder / "unfinished" / "student", card=card)
    # Renamed last: a folder in which only the image encoder is missing would load as a model that reads no images.
    (folder / "unfinished" / "student").rename(folder / "student")
    (folder / "unfinished").rmdir()


def check_weak(school: School, task: Task) -> None:
    """Refuses weak subskills that are none; the default ones are those of mathematics, and count for nothing elsewhere.

    Raises:
        UserError: there is no such skill or subskill.
    """
    for name in school.weak if school.weak != School().weak else ():
        skill, _, subskill = name.partition("/")
        select(task.skills, skill, subskill)
