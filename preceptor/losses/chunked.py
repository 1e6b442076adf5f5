"""A loss over rows of a vocabulary in chunks, with its gradient in closed form: what `clipped` and `spans` share.

Like `fused`, it never holds a rows x vocabulary matrix: the gradient of each chunk is computed while its logits are at
hand, and the backward pass only scales what the forward pass has stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SoftTargets, rows_of
from preceptor.losses.products import add_weight_gradient, hidden_gradient, logits_into
from preceptor.losses.rows import Logits, row_log_probs

CHUNK_BYTES = 32 * 2**20  # of one matrix (rows, vocabulary) in float32; a score holds some six of them


Score = Callable[[Tensor, slice], Tensor]


"""From the student's products (rows, vocabulary) of a chunk, which it overwrites by the loss's gradient with respect to
them, and the rows that they belong to, to sums over the chunk (statistics,); the first is the loss."""


def packed(
    hidden: Tensor, head: Head, teacher: SoftTargets, mask: Tensor
) -> tuple[Tensor, HiddenTargets | LogitTargets]:
    """The selected rows of the student's hidden states (rows, width), and the teacher's outputs for them.

    Raises:
        UserError: the teacher is not dense, speaks about other positions, or has another vocabulary.
    """
    if mask.shape != hidden.shape[:-1]:
        raise UserError(f"The mask has shape {tuple(mask.shape)} and the positions {tuple(hidden.shape[:-1])}.")
    targets = rows_of(teacher, mask)
    size = len(targets.head.weight) if isinstance(targets, HiddenTargets) else targets.logits.shape[-1]
    if size != head.weight.shape[0]:
        raise UserError(
            f"The teacher's vocabulary has {size} entries and the student's {head.weight.shape[0]}; use models that "
            "share a tokenizer."
        )
    if isinstance(targets, HiddenTargets):
        return hidden[mask], HiddenTargets(targets.hidden.detach(), targets.head)
    return hidden[mask], LogitTargets(targets.logits.detach())


def teacher_log_probs(teacher: HiddenTargets | LogitTargets, rows: slice, product: torch.dtype) -> Tensor:
    """Log-probabilities (rows, vocabulary) of a teacher at some of its packed rows, in float32 at least."""
    if isinstance(teacher, LogitTargets):
        return row_log_probs(teacher.logits[rows], Logits(), 1.0, wide(product))
    head = teacher.head
    x = teacher.hidden[rows].to(product)
    logits = torch.empty(len(x), head.weight.shape[0], dtype=product, device=x.device)
    logits_into(logits, x, head.weight, head.bias)
    return row_log_probs(logits, Logits(head.scale, head.softcap), 1.0, wide(product))


def product_type(hidden: Tensor) -> torch.dtype:
    """The dtype of matrix products with a head: autocast's where it is on."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def wide(product: torch.dtype) -> torch.dtype:
    """The dtype of everything by element: float32 at least."""
    return torch.promote_types(product, torch.float32)


def blocks(rows: int, vocabulary: int, chunk_bytes: int) -> list[slice]:
    """Equal parts of the rows whose float32 logits fit into the budget."""
    count = max(1, -(-rows // max(1, chunk_bytes // (4 * vocabulary))))
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def nothing(hidden: Tensor, head: Head) -> Tensor:
    """An exact 0 that is still connected to the graph."""
    zero = hidden.reshape(-1, hidden.shape[-1])[:0].sum() + head.weight[:0].sum()
    return zero if head.bias is None else zero + head.bias[:0].sum()


def summed(hidden: Tensor, head: Head, score: Score, parts: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss summed over parts of the rows, differentiable; the sums of all statistics, and of slopes, detached.

    The slope of a row is the norm of the loss's gradient with respect to its hidden state (0 where none is asked for).

    Args:
        hidden: the student's rows (rows, width).
        head: its output head.
        score: sums and gradient of one part.
        parts: which rows are scored together; they may overlap, gradients add up.
    """
    total, sums, slope = _Summed.apply(hidden, head.weight, head.bias, score, list(parts))  # type: ignore[no-untyped-call]
    return total, sums, slope


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score, parts: list[slice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        product = product_type(hidden)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = weight.new_empty(weight.shape, dtype=weight.dtype) if needs_weight else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=wide(product)) if needs_bias else None
        longest = max(part.stop - part.start for part in parts)
        buffer = torch.empty(longest, weight.shape[0], dtype=product, device=hidden.device)
        sums: Tensor | None = None
        for part in parts:
            x = hidden[part].to(product)
            z = buffer[: len(x)]
            logits_into(z, x, weight, bias)
            found = score(z, part)
            sums = found if sums is None else sums + found
            if grad_hidden is not None:
                grad_hidden[part] += hidden_gradient(z, weight, wide(product)).to(hidden.dtype)
            if grad_weight is not None:
                add_weight_gradient(grad_weight, z, x, first=part is parts[0])
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=wide(product))
        assert sums is not None
        ctx.gradients = (grad_hidden, grad_weight, None if grad_bias is None or bias is None else grad_bias.to(bias))
        slope = sums.new_zeros(()) if grad_hidden is None else grad_hidden.norm(dim=-1).sum().to(sums.dtype)
        ctx.mark_non_differentiable(sums, slope)
        return sums[0].clone().to(wide(product)), sums, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("This loss has been differentiated already; compute it again to do it twice.")
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_sum.to(gradient.dtype))
        return (*gradients, None, None)
