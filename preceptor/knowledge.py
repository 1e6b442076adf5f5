"""What a teacher says, as data.

Soft targets come in four kinds, one frozen dataclass each. Their leading shape is either that of the student's hidden
states, ``(...)``, or ``(rows,)`` where the rows are the positions that the response mask selects, in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Head:
    """A language model's output head: ``softcap(scale * (hidden @ weight.T + bias))``.

    ``weight``: (vocabulary, width). ``bias``: (vocabulary,) or None. ``scale`` multiplies the logits (Cohere's
    ``logit_scale``; Granite's ``logits_scaling`` inverted). ``softcap`` c replaces logits z by ``c * tanh(z / c)``
    (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HiddenTargets:
    """Dense soft targets, not yet projected: last hidden states (..., width) and the head that reads them."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class LogitTargets:
    """Dense soft targets as logits (..., vocabulary)."""

    logits: Tensor


@dataclass(frozen=True)
class TopKTargets:
    """The likeliest tokens and the mass of all the others.

    ``ids``: (..., k) int64. ``log_probs``: (..., k), natural logarithms under the teacher's full softmax; ``-inf`` is
    an unused slot (rows may hold fewer than k). The tail mass is ``1 - sum(exp(log_probs))``, spread over the tokens
    that are not listed as the divergence says.
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the teacher, with weights that make the estimate of the teacher's distribution unbiased.

    ``ids``: (..., k) int64, repeats allowed; ``weights``: (..., k), non-negative, summing to 1 in each row.
    """

    ids: Tensor
    weights: Tensor


SoftTargets = HiddenTargets | LogitTargets | TopKTargets | SampledTargets
