"""What a student of a language model minimises at each token: a divergence from its teacher, labels, or both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from preceptor.data.sequences import Batch
from preceptor.errors import UserError
from preceptor.knowledge import Head, SoftTargets
from preceptor.losses import Loss
from preceptor.losses.divergences import divergence
from preceptor.losses.rows import Kind


@dataclass(frozen=True)
class Objective:
    """What is minimised at each token of a response."""

    divergence: Kind = "forward_kl"
    """D between teacher p and student q."""
    beta: float = 0.5
    """β of the generalised Jensen-Shannon divergence, in [0, 1]."""
    alpha: float = 0.1
    """α of the skewed divergences, in [0, 1]."""
    temperature: float = 1.0
    """τ, divides both models' logits; the divergence is multiplied by τ²."""
    weight: float = 1.0
    """Weight of the divergence; at 0 no teacher is asked."""
    label_weight: float = 0.0
    """Weight w of the cross-entropy to the text's own tokens."""

    def __post_init__(self) -> None:
        """Refuse what no divergence can take, before anything is loaded."""
        for name, value in (("beta", self.beta), ("alpha", self.alpha)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"objective.{name} is {value}; choose a value in [0, 1].")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"objective.temperature is {self.temperature}; choose a finite temperature above 0.")
        weights = (self.weight, self.label_weight)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise UserError("objective.weight and objective.label_weight must be 0 or more, and one of them above 0.")

    def against(
        self, targets: SoftTargets | None, batch: Batch, labels: Tensor | None = None
    ) -> Callable[[Tensor, Head], Loss]:
        """The loss of the student's hidden states (batch, length, width) and head, against the teacher's targets.

        ``labels``: (batch, length) int64 in place of the batch's own, -100 where there is none.
        """
        return partial(
            divergence,
            teacher=targets,
            kind=self.divergence,
            beta=self.beta,
            alpha=self.alpha,
            temperature=self.temperature,
            mask=batch.predicts,
            labels=batch.labels if labels is None else labels,
            weight=self.weight,
            label_weight=self.label_weight,
        )


LABELS = Objective(weight=0.0, label_weight=1.0)


"""The text's own tokens alone: no teacher is asked."""
