"""What the student is examined on: the table beside its teacher and itself before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.distillation.lessons import Lessons
from preceptor.evaluation.examine import examine_beside_teacher
from preceptor.evaluation.language import TAUGHT
from preceptor.models.language_model import LanguageModel
from preceptor.report.table import Table

if TYPE_CHECKING:
    from preceptor.methods.semantic_revision.recipe import Config


def examine_student(config: Config, student: LanguageModel, lessons: Lessons) -> Table:
    """Write the student, and evaluate it in float32 beside the teacher and the untaught student."""
    folder = Path(config.output)
    card = {"teacher": config.teacher, "student": config.student, "method": "semantic_revision"}
    student.save(folder / "student", card={**card, "weights": config.weights, "clipping": config.clipping})
    return examine_beside_teacher(
        folder,
        config.teacher,
        config.student,
        {TAUGHT: student},
        lessons,
        method="semantic_revision",
        seed=config.training.seed,
        answer_length=config.text.answer_length,
    )
