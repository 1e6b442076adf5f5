"""Span consistency: what two adjacent tokens of a phrase have in common is the same for student and teacher.

Liu et al., Multi-Granularity Semantic Revision for Large Language Model Distillation (https://arxiv.org/abs/2407.10068),
eq. 10: within a phrase the element-wise product of the distributions of adjacent tokens, for teacher and student, is
made consistent. The norm is not public; here, over all adjacent pairs (i, i + 1) of one span,

    L_span = mean of ‖ p_i ∘ p_{i+1} - q_i ∘ q_{i+1} ‖₂              at most √2 a pair
"""

from __future__ import annotations

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SoftTargets
from preceptor.losses import Loss
from preceptor.losses.chunked import CHUNK_BYTES, blocks, nothing, packed, product_type, summed, teacher_log_probs, wide
from preceptor.losses.rows import Logits, RowObjective, StudentRows


def span_consistency(
    hidden: Tensor,
    head: Head,
    teacher: SoftTargets,
    pairs: Tensor,
    *,
    mask: Tensor,
    weight: float = 1.0,
    squared: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Loss:
    """Sum over pairs of ``weight * ‖ p_i ∘ p_{i+1} - q_i ∘ q_{i+1} ‖₂``; only rows of pairs cost something.

    Args:
        hidden: the student's last hidden states, (..., width).
        head: the student's output head.
        teacher: dense soft targets whose leading shape is that of ``hidden``, or (rows,) for the masked rows.
        pairs: int64 (pairs,), ascending: i of each pair (i, i + 1), counted over the rows that ``mask`` selects.
        mask: boolean, the leading shape of ``hidden``.
        weight: multiplies the loss, not the part.
        squared: the squared norm instead of the norm.
        chunk_bytes: memory for logits that are alive at a time.

    Returns:
        `Loss` with the count of pairs and the parts ``span``, a sum over pairs, and ``span_slope``, the sum over rows
        of the norm of the gradient with respect to their hidden states; all exactly 0 without a pair.

    Raises:
        UserError: vocabularies or shapes that do not fit, or a pair beyond the rows.
    """
    rows, outputs = packed(hidden, head, teacher, mask)
    count = torch.tensor(len(pairs), device=hidden.device)
    if len(pairs) == 0:
        return Loss(nothing(hidden, head), count, dict.fromkeys(("span", "span_slope"), count.float()))
    if int(pairs.min()) < 0 or int(pairs.max()) + 1 >= len(rows):
        raise UserError(f"A pair begins at row {int(pairs.max())}, and there are {len(rows)} rows.")
    used = torch.unique(torch.cat([pairs, pairs + 1]))
    first = torch.searchsorted(used, pairs)
    outputs = _some(outputs, used)
    objective = RowObjective("forward_kl", 0.0, 1.0, 1.0, 0.0)

    def score(z: Tensor, part: slice) -> Tensor:
        product = product_type(hidden)
        student = StudentRows(z, Logits(head.scale, head.softcap), objective, wide(product))
        q, p = student.s.exp(), teacher_log_probs(outputs, part, product).exp_()
        here = first[(first >= part.start) & (first < part.stop - 1)] - part.start
        gap = q[here] * q[here + 1] - p[here] * p[here + 1]
        size = gap.square().sum(-1) if squared else gap.norm(dim=-1)
        # Where both agree the norm has no gradient; 0 is one of its subgradients.
        factor = 2 * weight if squared else (weight / size).masked_fill_(size == 0, 0.0).unsqueeze(-1)
        slope, by_q = gap.mul_(factor), torch.zeros_like(q)
        by_q.index_add_(0, here, slope * q[here + 1]).index_add_(0, here + 1, slope * q[here])
        by_q.mul_(q)
        student.write(z, objective, by_q - q * by_q.sum(-1, keepdim=True), None)
        total = size.sum(dtype=size.dtype if z.device.type == "mps" else torch.float64)
        return torch.stack([weight * total, total])

    parts = _whole_pairs(blocks(len(used), head.weight.shape[0], chunk_bytes), first)
    total, sums, slope = summed(rows[used], head, score, parts)
    return Loss(total, count, {"span": sums[1], "span_slope": slope})


def _some(outputs: HiddenTargets | LogitTargets, rows: Tensor) -> HiddenTargets | LogitTargets:
    if isinstance(outputs, HiddenTargets):
        return HiddenTargets(outputs.hidden[rows], outputs.head)
    return LogitTargets(outputs.logits[rows])


def _whole_pairs(parts: list[slice], first: Tensor) -> list[slice]:
    """The parts, each longer by one row where a pair would lie across its end."""
    begins = set(first.tolist())
    return [slice(part.start, part.stop + int(part.stop - 1 in begins)) for part in parts]
