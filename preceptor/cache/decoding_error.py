"""KL(teacher ‖ decoded) of rows, in chunks that never hold a tokens x vocabulary matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from preceptor.knowledge import Head
from preceptor.models.language_model import project

_CHUNK_BYTES = 64 << 20


def chunks(rows: int, head: Head) -> Iterator[slice]:
    """Slices of rows whose float32 logits take 64 MiB."""
    size = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


@dataclass(frozen=True)
class LogProbs:
    """A teacher's distributions for a chunk of rows: ``logits`` and ``probabilities``, both (N, V) float32.

    ``log_normaliser``: (N,), the logarithm of the sum of exp(logits). ``negative_entropy``: (N,), E[log p].
    """

    logits: Tensor
    probabilities: Tensor
    log_normaliser: Tensor
    negative_entropy: Tensor

    @staticmethod
    def of(hidden: Tensor, head: Head) -> LogProbs:
        """The distributions of hidden states (N, D)."""
        return LogProbs.from_logits(project(hidden, head).float())

    @staticmethod
    def from_logits(logits: Tensor) -> LogProbs:
        """The distributions of logits (N, V)."""
        log_normaliser = logits.logsumexp(-1)
        p = torch.exp(logits - log_normaliser[:, None])
        return LogProbs(logits, p, log_normaliser, torch.linalg.vecdot(p, logits) - log_normaliser)

    def likeliest(self, count: int) -> tuple[LogProbs, Tensor]:
        """These distributions over the ``count`` tokens that are likeliest on average, and the ids of these."""
        ids = self.probabilities.sum(0).topk(min(count, self.logits.shape[-1])).indices
        return LogProbs.from_logits(self.logits[:, ids]), ids

    def of_rows(self, piece: slice) -> LogProbs:
        """Those of some rows."""
        parts = (self.logits, self.probabilities, self.log_normaliser, self.negative_entropy)
        return LogProbs(*(part[piece] for part in parts))


def kl_to_hidden(teacher: LogProbs, rows: Tensor, decoded: Tensor, head: Head) -> Tensor:
    """KL(teacher ‖ decoded) of some of the teacher's rows, (len(rows),), for decoded hidden states (len(rows), D).

    With d the decoded minus the teacher's logits, it is log E_p[exp(d - E_p[d])], which keeps its precision near zero.
    """
    whole = len(rows) == len(teacher.logits)
    p = teacher.probabilities if whole else teacher.probabilities[rows]
    difference = project(decoded, head).float().sub_(teacher.logits if whole else teacher.logits[rows])
    mean = torch.linalg.vecdot(p, difference)
    spread = torch.linalg.vecdot(p, difference.sub_(mean[:, None]).clamp_(max=80).expm1_())
    return torch.log1p(spread).clamp_min(0)
