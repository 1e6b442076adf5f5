"""What a teacher gives, as data.

Soft targets come in four kinds, one frozen dataclass each. Their leading shape is either that of the student's hidden
states, ``(...)``, or ``(rows,)`` where the rows are the positions that the response mask selects, in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preceptor.errors import UserError

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
    that are not listed as the divergence defines.
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


def rows_of(targets: SoftTargets, mask: Tensor) -> HiddenTargets | LogitTargets:
    """Dense targets of the positions that a boolean mask selects, in row-major order; those that are packed stay.

    Raises:
        UserError: the targets are not dense, or speak about other positions.
    """
    if isinstance(targets, HiddenTargets):
        values = targets.hidden
    elif isinstance(targets, LogitTargets):
        values = targets.logits
    else:
        raise UserError(
            f"This needs dense targets, the teacher's whole distribution, not {type(targets).__name__}: ask the "
            "teacher itself, or keep its hidden states."
        )
    rows = int(mask.sum())
    if values.shape[:-1] == mask.shape:
        values = values[mask]
    elif values.shape[:-1] != (rows,):
        raise UserError(
            f"The teacher speaks about positions of shape {tuple(values.shape[:-1])} and the mask has "
            f"{tuple(mask.shape)}, of which {rows} are selected; give the teacher's targets for the same text."
        )
    return HiddenTargets(values, targets.head) if isinstance(targets, HiddenTargets) else LogitTargets(values)


def moved(targets: SoftTargets, device: torch.device) -> SoftTargets:
    """The same targets on a device."""
    parts: dict[str, Any] = {field.name: _on(getattr(targets, field.name), device) for field in fields(targets)}
    return replace(targets, **parts)


def _on(part: Tensor | Head, device: torch.device) -> Tensor | Head:
    if isinstance(part, Tensor):
        return part.to(device)
    return replace(part, weight=part.weight.to(device), bias=None if part.bias is None else part.bias.to(device))
