"""The chunked pass: products, rows and gradients, without a tokens x vocabulary matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SampledTargets, SoftTargets, TopKTargets
from preceptor.losses.rows import STATS, Logits, Objective, bucket_rows, dense_rows, sampled_rows, spread_rows


@dataclass(frozen=True)
class Plan:
    """How one pass is carried out: the objective, the dtypes and the budget."""

    objective: Objective
    tail: str
    product_dtype: torch.dtype
    work_dtype: torch.dtype
    chunk_bytes: int


def project(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """``hidden @ weight.T + bias`` in ``dtype``: (rows, vocabulary)."""
    product = hidden.to(dtype) @ head.weight.to(dtype).t()
    return product if head.bias is None else product.add_(head.bias.to(dtype))


def _score(
    product: Tensor,
    form: Logits,
    teacher: SoftTargets | None,
    rows: slice,
    labels: Tensor | None,
    plan: Plan,
    gradient: bool,
) -> Tensor:
    """Statistics of one chunk; its products become gradients."""
    work, objective = plan.work_dtype, plan.objective
    if isinstance(teacher, SampledTargets):
        return sampled_rows(
            product, form, teacher.ids[rows], teacher.weights[rows], labels, objective, work=work, gradient=gradient
        )
    if isinstance(teacher, TopKTargets) and plan.tail == "bucket":
        return bucket_rows(
            product, form, teacher.ids[rows], teacher.log_probs[rows], labels, objective, work=work, gradient=gradient
        )
    said, said_form = None, Logits()
    if isinstance(teacher, TopKTargets):
        vocabulary, heat = product.shape[-1], objective.temperature
        said = spread_rows(teacher.ids[rows], teacher.log_probs[rows], vocabulary, heat, work) * heat
    elif isinstance(teacher, LogitTargets):
        said = teacher.logits[rows]
    elif isinstance(teacher, HiddenTargets):
        said = project(teacher.hidden[rows], teacher.head, _teacher_dtype(teacher, plan))
        said_form = Logits(teacher.head.scale, teacher.head.softcap)
    return dense_rows(product, form, said, said_form, labels, objective, work=work, gradient=gradient)


def _teacher_dtype(teacher: HiddenTargets, plan: Plan) -> torch.dtype:
    narrow = torch.finfo(plan.product_dtype).bits < 32
    return plan.product_dtype if narrow else teacher.hidden.dtype


class FusedDivergence(torch.autograd.Function):
    """Sum over rows, with the gradients computed in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: SoftTargets | None,
        labels: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the sums of the statistics (see `rows.STATS`)."""
        needs = ctx.needs_input_grad[:3]
        rows, gradient = hidden.shape[0], any(needs)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=plan.work_dtype, device=weight.device) if needs[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=plan.work_dtype, device=weight.device) if needs[2] else None
        exact = torch.float32 if hidden.device.type == "mps" else torch.float64
        sums = torch.zeros(len(STATS), dtype=exact, device=hidden.device)
        narrow_weight = weight.to(plan.product_dtype)
        student = Head(narrow_weight, bias, head.scale, head.softcap)
        chunk = max(1, plan.chunk_bytes // (2 * weight.shape[0] * plan.work_dtype.itemsize))
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            x = hidden[part].to(plan.product_dtype)
            z = project(x, student, plan.product_dtype)
            said = None if labels is None else labels[part]
            stats = _score(z, Logits(head.scale, head.softcap), teacher, part, said, plan, gradient)
            sums += stats.to(exact).sum(0)
            if grad_hidden is not None:
                grad_hidden[part] = z @ narrow_weight
            if grad_weight is not None:
                grad_weight += z.t() @ x
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=plan.work_dtype)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        objective = plan.objective
        gain = (
            objective.gain * sums[0] + objective.label_gain * sums[1]
            if objective.label_gain
            else objective.gain * sums[0]
        )
        return gain.to(plan.work_dtype), sums

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients in place and give them away."""
        if ctx.gradients is None:
            raise RuntimeError("This divergence has been differentiated already; compute it again to do it twice.")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = tuple(None if g is None else g.mul_(grad_sum) for g in gradients)
        return (*scaled, None, None, None, None)
