"""The student's own samples: which examples of a step the student answers itself, and when.

Either a constant share λ, drawn for each example (GKD: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649), or the
adaptive off-policy schedule of DistiLLM (Ko et al. 2024, https://arxiv.org/abs/2402.03898).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from preceptor.data.sequences import Sequence
from preceptor.distillation.lessons import Text, write_answers
from preceptor.errors import UserError
from preceptor.models.language_model import LanguageModel

BUFFER = 1000  # samples that DistiLLM's replay buffer holds


@dataclass(frozen=True)
class OwnSamples:
    """How often the student learns on its own samples."""

    share: float = 0.0
    """λ (TRL's ``lmbda``), the probability that an example's answer is replaced by one that the student writes."""
    adaptive: bool = False
    """DistiLLM's adaptive off-policy schedule instead of a constant share; it needs ``training.evaluate_every``."""
    temperature: float = 1.0
    """Sampling temperature; it is not applied inside the loss."""

    def __post_init__(self) -> None:
        """Refuse a share that is no probability, before anything is loaded."""
        if not 0.0 <= self.share <= 1.0:
            raise UserError(f"own.share is {self.share}; choose a probability in [0, 1].")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"own.temperature is {self.temperature}; choose a finite temperature above 0.")
        if self.adaptive and self.share:
            raise UserError("own.adaptive sets the share by itself; set own.share to 0.")


class OnPolicyMixer:
    """Decides for each example of a step whether the student answers it, and keeps DistiLLM's state.

    With a constant share λ: yes with probability λ. Adaptive, with threshold φ at progress t/N: draw r ~ U(0, 1); if
    r < φ (1 - t/N), or r < φ while the replay buffer is not full, the student answers and the sample enters the buffer;
    else if r < φ, a sample of the buffer is taken; else the example itself. (DistiLLM's code draws r once for a batch.)
    """

    def __init__(self, own: OwnSamples) -> None:
        self.own = own
        self.threshold, self.reference = 0.0, float("inf")
        self.buffer: list[Sequence] = []

    def mix(
        self,
        student: LanguageModel,
        examples: list[Sequence],
        text: Text,
        *,
        progress: float = 0.0,
        revise: Callable[[list[Sequence]], list[Sequence]] | None = None,
    ) -> list[Sequence]:
        """The examples of one optimizer step, some answered by the student, in one batched generation.

        Args:
            student: writes the answers (not wrapped by DDP).
            examples: the step's examples; plain text without a prompt stays as it is.
            text: the limits of lengths.
            progress: t/N, the share of the run's steps that are done.
            revise: what becomes of the student's answers, before they are learned from and enter the buffer.
        """
        if not self.own.share and not self.threshold:
            return examples
        draws = torch.rand(len(examples)).tolist()
        writes = self._limit(progress)
        mixed, prompts = [], []
        for example, draw in zip(examples, draws):
            if draw < writes and example.prompt:
                prompts.append(example.prompt)
            elif draw < self.threshold and self.buffer:
                mixed.append(self.buffer[int(torch.randint(len(self.buffer), ()))])
            else:
                mixed.append(example)
        # A sharded student is gathered by all processes together, so one that drew nothing writes too.
        waste = not prompts and torch.distributed.is_initialized()
        asked = [examples[0].ids[:1]] if waste else prompts
        written = write_answers(
            student, asked, text.answer_length, max_length=text.max_length, temperature=self.own.temperature
        )
        written = [] if waste else written
        if revise is not None and written:
            written = revise(written)
        if self.own.adaptive:
            self.buffer = (self.buffer + written)[-BUFFER:]
        return mixed + written or examples

    def _limit(self, progress: float) -> float:
        if not self.own.adaptive:
            return self.own.share
        return self.threshold if len(self.buffer) < BUFFER else self.threshold * (1 - progress)

    @property
    def share(self) -> float:
        """λ, or φ as it stands."""
        return self.threshold if self.own.adaptive else self.own.share

    def see(self, loss: float) -> None:
        """Raise φ by 0.1 when the held-out loss has risen by 0.1 since the first one, or since φ was last raised."""
        if loss >= self.reference + 0.1:
            self.threshold = min(self.threshold + 0.1, 1.0)
            self.reference = loss
        elif self.reference == float("inf"):
            self.reference = loss

    def state_dict(self) -> dict[str, Any]:
        """Threshold, reference loss (None before the first) and buffer, for a checkpoint."""
        seen = None if self.reference == float("inf") else self.reference
        buffer = [[list(sequence.ids), list(sequence.response)] for sequence in self.buffer]
        return {"threshold": self.threshold, "reference": seen, "buffer": buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        seen = state["reference"]
        self.threshold, self.reference = state["threshold"], float("inf") if seen is None else seen
        self.buffer = [Sequence(tuple(ids), tuple(response)) for ids, response in state["buffer"]]
