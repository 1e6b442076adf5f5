"""What the students are examined on: the table beside their teacher and the student before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.distillation.lessons import Lessons
from preceptor.distillation.objective import LABELS
from preceptor.evaluation.examine import examine_beside_teacher
from preceptor.evaluation.language import LABELS_ONLY, TAUGHT
from preceptor.models.language_model import LanguageModel
from preceptor.report.table import Table

if TYPE_CHECKING:
    from preceptor.methods.gkd.recipe import Config


def examine_students(config: Config, taught: dict[str, LanguageModel], lessons: Lessons) -> Table:
    """Write the students, and evaluate them in float32 beside the teacher and the untaught student."""
    folder = Path(config.output)
    card = {"teacher": config.teacher, "student": config.student, "method": "gkd", "objective": config.objective}
    taught[TAUGHT].save(folder / "student", card=card)
    if LABELS_ONLY in taught:
        taught[LABELS_ONLY].save(folder / "labels" / "student", card={**card, "objective": LABELS})
    return examine_beside_teacher(
        folder,
        config.teacher,
        config.student,
        {name: taught[name] for name in (LABELS_ONLY, TAUGHT) if name in taught},
        lessons,
        method="gkd",
        seed=config.training.seed,
        answer_length=config.text.answer_length,
    )
