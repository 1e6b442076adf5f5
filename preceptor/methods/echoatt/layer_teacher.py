"""The teacher of stage 1: soft targets, likeliest tokens, and what leaves the last layer of each group."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from preceptor.data.sequences import Batch
from preceptor.knowledge import Head, HiddenTargets
from preceptor.methods.echoatt.observed import Observed
from preceptor.models.language_model import LanguageModel, project

CHUNK_BYTES = 64 << 20  # of logits that are held while the teacher's likeliest tokens are found


class LayerTargets(NamedTuple):
    """What the teacher gives for a batch: soft targets, its likeliest tokens (-100 elsewhere), outputs of layers."""

    soft: HiddenTargets
    likeliest: Tensor
    inner: list[Tensor]


class TeacherOfLayers(Protocol):
    """What gives targets: the teacher itself, or its memoised outputs."""

    def __call__(self, batch: Batch) -> LayerTargets:
        """The targets of a batch."""
        ...


class Original:
    """The model that the student was made of, frozen; it also returns what leaves the last layer of each group."""

    def __init__(self, model: LanguageModel, ends: tuple[int, ...]) -> None:
        self.model = Observed(model.eval().requires_grad_(False), ends)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> LayerTargets:
        """Hidden states and head; no logits are kept."""
        return self.model(batch, lambda hidden, head, inner: _targets(batch, hidden, head, inner))


def _targets(batch: Batch, hidden: Tensor, head: Head, inner: list[Tensor]) -> LayerTargets:
    likeliest = torch.full_like(batch.labels, -100)
    rows = hidden[batch.predicts]
    step = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    likeliest[batch.predicts] = torch.cat([project(part, head).argmax(-1) for part in torch.split(rows, step)])
    return LayerTargets(HiddenTargets(hidden, head), likeliest, inner)
