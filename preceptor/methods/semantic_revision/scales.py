"""The scales that make means over given tokens and over pairs of a sum over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preceptor.distillation.marked import MarkedSequence
from preceptor.engine.run import Run


@dataclass(frozen=True)
class Scales:
    """Response tokens a token of a given answer, and a pair, over a step and all processes; 0 where there is none.

    They make of a sum over given tokens or pairs, divided by all tokens, a mean over given tokens or pairs.
    """

    labels: float
    spans: float


def scales_of(run: Run, lessons: list[MarkedSequence]) -> Scales:
    """The scales of one step's lessons, of which this process has a share."""
    tokens = [sum(lesson.sequence.response[1:]) for lesson in lessons]
    given = sum(count for count, lesson in zip(tokens, lessons) if lesson.given)
    counts = torch.tensor([sum(tokens), given, sum(len(lesson.pairs) for lesson in lessons)], device=run.device)
    every, given, pairs = run.accelerator.reduce(counts, reduction="sum").tolist()
    return Scales(every / given if given else 0.0, every / pairs if pairs else 0.0)
