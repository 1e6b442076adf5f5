"""What the student is examined on: the held-out text while it learns, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from preceptor.catalogue import repeat
from preceptor.data.sequences import Batch, Sequence
from preceptor.engine.run import Run
from preceptor.evaluation.examine import examine
from preceptor.evaluation.language import TAUGHT, UNTAUGHT
from preceptor.knowledge import Head, HiddenTargets
from preceptor.losses import Loss
from preceptor.losses.divergences import divergence
from preceptor.methods.echoatt.layer_teacher import TeacherOfLayers
from preceptor.methods.echoatt.pictures import draw_similarity
from preceptor.methods.echoatt.similarity import Similarity
from preceptor.models.language_model import LanguageModel, in_evaluation
from preceptor.models.loading import load
from preceptor.models.student import sharing
from preceptor.report.table import Table

if TYPE_CHECKING:
    from preceptor.methods.echoatt.recipe import Config


@torch.no_grad()
def held_out(
    run: Run, teacher: TeacherOfLayers, exam: list[Sequence], batches: Callable[[list[Sequence]], Batch], config: Config
) -> dict[str, float]:
    """Means over the tokens of the held-out text: both directions of L_S, and the cross-entropy to the text."""
    totals, count = dict.fromkeys(("held_out_kl_teacher_first", "held_out_kl_student_first", "held_out_loss"), 0.0), 0
    with in_evaluation(run.student):
        for start in range(0, len(exam), config.training.batch_size):
            batch = batches(exam[start : start + config.training.batch_size]).to(run.device)
            forward, reverse = run.student(batch, partial(_both, batch=batch, soft=teacher(batch).soft))
            totals["held_out_kl_teacher_first"] += float(forward.parts["divergence"])
            totals["held_out_kl_student_first"] += float(reverse.parts["divergence"])
            totals["held_out_loss"] += float(forward.parts["cross_entropy"])
            count += int(forward.count)
    return {name: total / count for name, total in totals.items()}


def _both(hidden: Tensor, head: Head, inner: list[Tensor], *, batch: Batch, soft: HiddenTargets) -> tuple[Loss, Loss]:
    forward = divergence(hidden, head, soft, kind="forward_kl", mask=batch.predicts, labels=batch.labels)
    return forward, divergence(hidden, head, soft, kind="reverse_kl", mask=batch.predicts)


def examine_student(
    config: Config, taught: LanguageModel, followers: list[int], exam: list[Sequence], similarity: Similarity
) -> Table:
    """Write the student, and evaluate it in float32 beside the teacher and itself before it was taught."""
    from preceptor.models.shared_attention.model import removed

    folder, teacher = Path(config.output), load(config.teacher)
    parts = removed(teacher.causal, followers)
    card = {
        "teacher": config.teacher,
        "method": "echoatt",
        "followers": ", ".join(map(str, followers)),
        "removed": f"{sum(size for _, size in parts):,} parameters: {_kinds(parts)} of the followers",
    }
    taught.save(folder / "student", card=card)
    draw_similarity(folder / "pictures", similarity, followers)
    table = examine(
        folder,
        teacher,
        {UNTAUGHT: sharing(teacher, followers).eval(), TAUGHT: taught},
        exam,
        questions=[],
        title=f"{config.teacher} with {len(followers)} layers that share attention",
        command=repeat("echoatt", folder),
        answer_length=32,
    )
    print(f"The student: {folder / 'student'}")
    return table


def _kinds(parts: list[tuple[str, int]]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in parts)) or "nothing"
