"""The run of one student and of its f_sub, and the teacher of that run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.distillation.teachers import Teacher, answer_online
from preceptor.engine.run import Run
from preceptor.losses.dac_kl import Quantiles
from preceptor.models.identity import provenance
from preceptor.models.language_model import LanguageModel

if TYPE_CHECKING:
    from preceptor.methods.semantic_revision.recipe import Config


def start(config: Config, student: LanguageModel, teacher: LanguageModel) -> Run:
    """The run of one student and of its f_sub, which records teacher, text and tokenizer."""
    clipping = config.clipping
    learned = clipping.mode == "learned" and config.weights.divergence > 0
    f_sub = Quantiles(clipping, classes=student.vocabulary, seed=config.training.seed) if learned else None
    pace = replace(config.training, optimizer="adam", schedule="constant", warmup=0.0)
    pace = replace(pace, learning_rate=clipping.learning_rate, weight_decay=0.0)
    return Run(
        config.training,
        student=student,
        modules={"f_sub": f_sub} if f_sub is not None else None,
        module_training={"f_sub": pace},
        folder=Path(config.output),
        config=config,
        resume=config.resume,
        provenance=provenance(config.teacher, config.text.source, teacher.tokenizer),
    )


def quantiles_of(run: Run) -> Quantiles | None:
    """The f_sub of a run, without what wraps it."""
    f_sub = run.modules.get("f_sub")
    return None if f_sub is None else run.accelerator.unwrap_model(f_sub)


def teacher_of(config: Config, run: Run, teacher: LanguageModel, student: LanguageModel) -> Teacher | None:
    """The teacher while the student learns: none, the student's own base, or the teacher itself."""
    if not config.weights.divergence and not config.weights.spans:
        return None
    return answer_online(run, teacher, student, config.student)
