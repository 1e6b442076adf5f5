"""Losses: pure functions ``(student, teacher, ...) -> Loss``. Forward KL is KL(teacher ‖ student), everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Loss(NamedTuple):
    """A loss that is not yet divided: ``Run.update`` divides once, by what all micro-batches and processes counted.

    ``sum``: scalar, differentiable. ``count``: scalar, how many terms were summed (tokens, rows, relations).
    ``parts``: named detached scalars, sums over the same terms (each divided by the same count when logged).
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # the field hides tuple.count, which nobody calls on a loss
    parts: dict[str, Tensor]
