"""Correction of the student's samples in a step, and the rates that the step logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preceptor.data.sequences import Sequence
from preceptor.distillation.marked import Marker
from preceptor.distillation.teachers import Teacher
from preceptor.engine.run import Run
from preceptor.methods.semantic_revision.correction import Corrected, correct

if TYPE_CHECKING:
    from preceptor.methods.semantic_revision.recipe import Config


def revise(
    run: Run, marker: Marker, teacher: Teacher | None, config: Config, seen: list[Corrected], written: list[Sequence]
) -> list[Sequence]:
    """The student's samples, corrected; the record is appended to ``seen``."""
    if teacher is None or not config.correction.rounds:
        return written
    text = config.text
    done = correct(
        marker.student,
        teacher,
        written,
        config.correction,
        length=text.answer_length,
        max_length=text.max_length,
        temperature=config.own.temperature,
        autocast=run.accelerator.autocast,
    )
    seen.append(done)
    return done.sequences


def corrections_of(seen: list[Corrected]) -> dict[str, float]:
    """Corrections per sample of the student, and the share of looks that found no candidate."""
    if not seen:
        return {}
    corrected = sum(len(places) for done in seen for places in done.places) / sum(len(done.places) for done in seen)
    return {"corrections": corrected, "no_candidate": sum(d.without for d in seen) / sum(d.tried for d in seen)}
