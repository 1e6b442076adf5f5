"""The loss on held-out text: a mean over its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Listed
from typing import TypeVar

import torch
from torch import nn

from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.objective import Objective
from preceptor.distillation.teachers import Teacher
from preceptor.losses import Loss
from preceptor.models.language_model import in_evaluation

Example = TypeVar("Example")


@torch.no_grad()
def held_out_means(
    student: nn.Module,
    examples: Listed[Example],
    losses: Callable[[Listed[Example]], Iterable[tuple[str, Loss]]],
    *,
    batch_size: int,
) -> dict[str, float]:
    """Named losses of held-out examples, in evaluation mode and without gradients: each its sum divided by its count.

    Args:
        student: the module that is put into evaluation mode meanwhile.
        examples: read in their order, ``batch_size`` at a time.
        losses: the losses of a batch by name; a name may come several times, and one that is never counted is left out.
        batch_size: examples at a time.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    with in_evaluation(student):
        for start in range(0, len(examples), batch_size):
            for name, loss in losses(examples[start : start + batch_size]):
                sums[name] = sums.get(name, 0.0) + float(loss.sum)
                counts[name] = counts.get(name, 0.0) + float(loss.count)
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


def held_out_loss(
    student: nn.Module,
    teacher: Teacher | None,
    sequences: Listed[Sequence],
    objective: Objective,
    *,
    batch_size: int,
    pad_id: int,
) -> float:
    """The objective's mean over the response tokens of held-out sequences, of which at least one has such a token.

    ``student`` is a language model or what wraps it; ``teacher`` may be None for an objective of labels alone.
    """
    device = next(student.parameters()).device

    def losses(examples: Listed[Sequence]) -> Iterable[tuple[str, Loss]]:
        batch = collate(examples, pad_id).to(device)
        yield "loss", student(batch, objective.against(teacher(batch) if teacher else None, batch))

    return held_out_means(student, sequences, losses, batch_size=batch_size)["loss"]
