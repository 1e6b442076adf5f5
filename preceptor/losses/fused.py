"""The chunked pass: products, rows and gradients, without a tokens x vocabulary matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SampledTargets, SoftTargets, TopKTargets
from preceptor.losses import kernel
from preceptor.losses.products import add_weight_gradient, hidden_gradient, logits_into
from preceptor.losses.rows import (
    STATS,
    Logits,
    RowObjective,
    RowTargets,
    bucket_rows,
    dense_rows,
    sampled_rows,
    spread_rows,
    with_tail,
)

ROWS_BYTES = {"cpu": 2 * 2**20}


MANY_ROWS_BYTES = 64 * 2**20


FEWEST_ROWS = 16


@dataclass(frozen=True)
class PassPlan:
    """How one pass is carried out.

    ``product_dtype`` is the dtype of the matrix products, ``work_dtype`` that of everything by element,
    ``sum_dtype`` that in which the head's gradient is summed over chunks, ``chunk_bytes`` the memory for logits.
    """

    objective: RowObjective
    tail: str
    product_dtype: torch.dtype
    work_dtype: torch.dtype
    sum_dtype: torch.dtype
    chunk_bytes: int
    compiled: bool


def chunk_rows(rows: int, vocabulary: int, plan: PassPlan, buffers: int) -> int:
    """Rows per chunk: chunks of equal size whose logits fit in the budget."""
    most = max(1, plan.chunk_bytes // (buffers * vocabulary * plan.product_dtype.itemsize))
    even = math.ceil(rows / math.ceil(rows / most))
    return min(most, math.ceil(even / FEWEST_ROWS) * FEWEST_ROWS)


class _Teacher:
    """A teacher read chunk by chunk; its logits live in one buffer."""

    def __init__(self, targets: SoftTargets | None, vocabulary: int, plan: PassPlan) -> None:
        self.targets, self.vocabulary, self.plan = targets, vocabulary, plan
        self.spread = isinstance(targets, TopKTargets) and plan.tail == "uniform"
        self.buffers = 2 if isinstance(targets, HiddenTargets) or self.spread else 1
        self.buffer: Tensor | None = None

    def block(self, rows: slice) -> RowTargets:
        targets, plan, heat = self.targets, self.plan, self.plan.objective.temperature
        if isinstance(targets, SampledTargets):
            return RowTargets("sampled", ids=targets.ids[rows], values=targets.weights[rows])
        if isinstance(targets, LogitTargets):
            return RowTargets("dense", logits=targets.logits[rows])
        if isinstance(targets, TopKTargets):
            values = with_tail(targets.log_probs[rows].to(plan.work_dtype), self.vocabulary, heat)
            if plan.tail == "bucket":
                return RowTargets("bucket", ids=targets.ids[rows], values=values)
            return RowTargets("dense", logits=spread_rows(targets.ids[rows], values, self.vocabulary).mul_(heat))
        if isinstance(targets, HiddenTargets):
            x, product = targets.hidden[rows], plan.product_dtype
            x = x.to(product if product.itemsize < 4 else torch.promote_types(x.dtype, product))
            if self.buffer is None:
                self.buffer = torch.empty(x.shape[0], self.vocabulary, dtype=x.dtype, device=x.device)
            logits = self.buffer[: x.shape[0]]
            logits_into(logits, x, targets.head.weight, targets.head.bias)
            return RowTargets("dense", logits=logits, form=Logits(targets.head.scale, targets.head.softcap))
        return RowTargets("labels")


def _score(
    z: Tensor, form: Logits, targets: RowTargets, labels: Tensor | None, plan: PassPlan, gradient: bool
) -> Tensor:
    """Statistics (rows, 5) of one chunk, whose products become gradients."""
    if plan.compiled and plan.work_dtype == torch.float32 and kernel.usable(z):
        return kernel.score(z, form, targets, labels, plan.objective, gradient=gradient)
    rows = {"bucket": bucket_rows, "sampled": sampled_rows}.get(targets.mode, dense_rows)
    step = max(1, ROWS_BYTES.get(z.device.type, MANY_ROWS_BYTES) // (z.shape[1] * plan.work_dtype.itemsize))
    parts = []
    for start in range(0, z.shape[0], step):
        part = slice(start, start + step)
        some = None if labels is None else labels[part]
        parts.append(rows(z[part], form, targets[part], some, plan.objective, work=plan.work_dtype, gradient=gradient))
    return torch.cat(parts)


class FusedDivergence(torch.autograd.Function):
    """Sum over rows, with the gradients computed in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: SoftTargets | None,
        labels: Tensor | None,
        plan: PassPlan,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the sums of the statistics (see `rows.STATS`)."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        (rows, _), vocabulary = hidden.shape, weight.shape[0]
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        teacher, form = _Teacher(targets, vocabulary, plan), Logits(head.scale, head.softcap)
        step = chunk_rows(rows, vocabulary, plan, teacher.buffers)
        gradient = needs_hidden or needs_weight or needs_bias
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = weight.new_empty(weight.shape, dtype=plan.sum_dtype) if needs_weight else None
        grad_bias = weight.new_zeros(vocabulary, dtype=plan.work_dtype) if needs_bias else None
        buffer = torch.empty(step, vocabulary, dtype=plan.product_dtype, device=hidden.device)
        sums = torch.zeros(len(STATS), dtype=wide, device=hidden.device)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            x = hidden[part].to(plan.product_dtype)
            z = buffer[: x.shape[0]]
            logits_into(z, x, weight, bias)
            some = None if labels is None else labels[part]
            sums += _score(z, form, teacher.block(part), some, plan, gradient).sum(0, dtype=wide)
            if grad_hidden is not None:
                grad_hidden[part] = hidden_gradient(z, weight, plan.work_dtype)
            if grad_weight is not None:
                add_weight_gradient(grad_weight, z, x, first=start == 0)
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=plan.work_dtype)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        total = plan.objective.gain * sums[0] if targets is not None else torch.zeros_like(sums[0])
        if labels is not None:
            total = total + plan.objective.label_gain * sums[1]
        return total.to(plan.work_dtype), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients in place and give them away."""
        if ctx.gradients is None:
            raise RuntimeError("This divergence has been differentiated already; compute it again to do it twice.")
        gradients, ctx.gradients = ctx.gradients, None
        # On a CPU reading the factor costs nothing, and the usual 1 saves a pass over the head's gradient.
        if grad_sum.device.type != "cpu" or grad_sum.item() != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_sum.to(gradient.dtype))
        return (*gradients, None, None, None, None)
