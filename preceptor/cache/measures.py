"""KL(teacher ‖ decoded) of rows, in chunks that never hold a tokens x vocabulary matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from preceptor.knowledge import Head
from preceptor.models import project

_CHUNK_BYTES = 64 << 20


def chunks(rows: int, head: Head) -> Iterator[slice]:
    """Slices of rows whose float32 logits take 64 MiB."""
    size = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


@dataclass(frozen=True)
class LogProbs:
    """A teacher's distributions for a chunk of rows: ``logits`` and ``probabilities``, both (N, V) float32."""

    logits: Tensor
    probabilities: Tensor

    @staticmethod
    def of(hidden: Tensor, head: Head) -> LogProbs:
        """The distributions of hidden states (N, D)."""
        logits = project(hidden, head).float()
        return LogProbs(logits, logits.softmax(-1))

    def likeliest(self, count: int) -> tuple[LogProbs, Tensor]:
        """These distributions over the ``count`` tokens that are likeliest on average, and the ids of these."""
        ids = self.probabilities.sum(0).topk(min(count, self.logits.shape[-1])).indices
        p = self.probabilities[:, ids]
        return LogProbs(self.logits[:, ids], p / p.sum(-1, keepdim=True)), ids

    def of_rows(self, piece: slice) -> LogProbs:
        """Those of some rows."""
        return LogProbs(self.logits[piece], self.probabilities[piece])


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
