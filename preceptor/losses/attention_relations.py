"""Self-attention relations: what a MiniLM student copies from its teacher.

A relation is a row-wise softmax of scaled inner products: of queries with keys (the attention distribution), or of
values, queries or keys with themselves. The loss is KL(teacher ‖ student) between the rows of both models' relations,
each model scaled by the square root of its own head width, which is why widths may differ.

Sources: Wang et al., MiniLM (arXiv 2002.10957), eq. 6-8, for attention and value relations; Wang et al., MiniLMv2
(arXiv 2012.15828) for query, key and value relations over relation heads.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.losses import Loss

if TYPE_CHECKING:
    from collections.abc import Sequence


Average = Literal["sequence", "token"]


@dataclass(frozen=True)
class Projections:
    """Queries (B, H, T, d), keys (B, Hkv, T, d) and values (B, Hkv, T, d') of one self-attention layer.

    Hkv divides H and equals it outside grouped-query attention. Attention scores are ``query @ key.T / sqrt(d)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def attention_value_loss(
    student: Projections,
    teacher: Projections,
    mask: Tensor,
    *,
    causal: bool = False,
    weights: Sequence[float] = (1.0, 1.0),
    average: Average = "sequence",
    chunk_bytes: int = 1 << 25,
) -> Loss:
    """MiniLM's loss: ``weights[0] * L_AT + weights[1] * L_VR``, each KL(teacher ‖ student) per head and query row.

    Args:
        student: queries and keys as the attention scores see them (after rotary embedding, where there is one), values.
        teacher: the same of the teacher, with as many query heads and as many key and value heads; d may differ.
        mask: (B, T), true at real tokens. Padded keys are masked before the softmax, padded query rows are dropped.
        causal: rows see no later position, in attention and value relations alike.
        weights: of the attention and of the value term; the paper has one each. A term of weight 0 is still measured.
        average: what ``Loss.count`` counts. ``"sequence"`` is the paper's 1/(heads * tokens) for each sequence, then a
            mean over the batch's sequences; ``"token"`` is one mean over all tokens.
        chunk_bytes: bound on one (sequences, H, T, T) map in memory; several live at once.

    With grouped queries, keys are repeated for their group and value relations are taken over the Hkv value heads.
    ``parts`` holds ``attention`` and ``value``, unweighted. A batch without a real token gives exactly 0.

    Raises:
        UserError: shapes or head counts that do not fit, or negative weights.
    """
    _check(student, teacher, mask, weights, terms=2)
    heads, groups = (student.query.shape[1], teacher.query.shape[1]), (student.key.shape[1], teacher.key.shape[1])
    if heads[0] != heads[1] or groups[0] != groups[1]:
        name, counts = ("attention", heads) if heads[0] != heads[1] else ("key and value", groups)
        raise UserError(
            f"The student has {counts[0]} {name} heads and the teacher {counts[1]}, but attention and value relations "
            "are matched head by head: set relation_heads (MiniLMv2), which cuts both models into as many heads."
        )
    mine, theirs = relation_inputs(student), relation_inputs(teacher)
    return _total(mine, theirs, weights, mask, causal=causal, average=average, chunk_bytes=chunk_bytes)


def relation_heads_loss(
    student: Projections,
    teacher: Projections,
    mask: Tensor,
    *,
    relation_heads: int,
    causal: bool = False,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    average: Average = "sequence",
    chunk_bytes: int = 1 << 25,
) -> Loss:
    """MiniLMv2's loss: query-query, key-key and value-value relations over ``relation_heads`` heads.

    All heads of a projection are laid side by side (B, T, H * d) and cut anew into ``relation_heads`` pieces, so that
    neither head counts nor widths of the two models need to agree. ``relation_heads`` must divide each projection's
    whole width in both models. Queries and keys are best taken before rotary embedding. ``weights`` are those of the
    query, key and value terms; ``parts`` holds ``query``, ``key`` and ``value``, unweighted. The other arguments are
    those of `attention_value_loss`.

    Raises:
        UserError: shapes that do not fit, negative weights, or a number of relation heads that does not divide.
    """
    _check(student, teacher, mask, weights, terms=3)
    check_relation_heads(relation_heads, [*_widths(student), *_widths(teacher)])
    mine, theirs = relation_inputs(student, relation_heads), relation_inputs(teacher, relation_heads)
    return _total(mine, theirs, weights, mask, causal=causal, average=average, chunk_bytes=chunk_bytes)


def relation_inputs(model: Projections, relation_heads: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """What each relation is the softmax of the inner products of: two (B, heads, T, d) by the name of the loss's term.

    With ``relation_heads`` 0 these are MiniLM's ``attention`` (keys repeated for grouped queries) and ``value``, else
    MiniLMv2's ``query``, ``key`` and ``value`` over that many heads.
    """
    if relation_heads == 0:
        repeats = model.query.shape[1] // model.key.shape[1]
        key = model.key if repeats == 1 else model.key.repeat_interleave(repeats, dim=1)
        return {"attention": (model.query, key), "value": (model.value, model.value)}
    parts = {"query": model.query, "key": model.key, "value": model.value}
    return {name: (cut, cut) for name, part in parts.items() for cut in [_split(part, relation_heads)]}


def check_relation_heads(relation_heads: int, widths: Sequence[int]) -> None:
    """Raise UserError, with the numbers that would fit, unless ``relation_heads`` divides every one of ``widths``."""
    widths = sorted(set(widths))
    if relation_heads < 1 or any(width % relation_heads for width in widths):
        common = math.gcd(*widths)
        divisors = [number for number in range(1, common + 1) if common % number == 0]
        raise UserError(
            f"{relation_heads} relation heads do not divide the projections' widths "
            f"({', '.join(map(str, widths))}): choose one of {', '.join(map(str, divisors))}."
        )


def uniform_reference(teacher_x: Tensor, teacher_y: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    """KL(teacher ‖ uniform) of a relation, (B,): mean over heads and valid rows of ``log n - entropy(teacher row)``.

    What a student whose scores are all equal loses: the natural reference at step 0. ``teacher_x`` and ``teacher_y``
    are (B, H, T, d); n counts the positions that a row may see. Rows without a real token give 0.
    """
    zeros = torch.zeros_like(teacher_x[..., :1])
    rows = _row_weights(mask, teacher_x, "sequence")[0]
    log_q, log_p, weight = _log_rows(zeros, zeros, teacher_x, teacher_y, mask=mask, causal=causal, rows=rows)
    return (log_p.exp() * (log_p - log_q) * weight).sum((1, 2, 3))


def _check(student: Projections, teacher: Projections, mask: Tensor, weights: Sequence[float], *, terms: int) -> None:
    mine, theirs = student.query.shape, teacher.query.shape
    if (mine[0], mine[2]) != (theirs[0], theirs[2]) or mask.shape != (mine[0], mine[2]):
        raise UserError(
            f"The student's queries {tuple(mine)}, the teacher's {tuple(theirs)} and the mask {tuple(mask.shape)} are "
            "not of the same sequences: give both models the same token ids and their attention mask."
        )
    if len(weights) != terms or min(weights) < 0:
        raise UserError(f"The loss has {terms} terms, so give {terms} weights of at least 0, not {tuple(weights)}.")
    if int(mask.bool().sum(1).max()) < 2:
        warnings.warn("no sequence of this batch has two tokens, so every relation is trivial", stacklevel=3)


def _widths(model: Projections) -> list[int]:
    return [part.shape[1] * part.shape[3] for part in (model.query, model.key, model.value)]


def _split(heads: Tensor, pieces: int) -> Tensor:
    """(B, H, T, d) to (B, pieces, T, H * d / pieces)."""
    batch, _, length, _ = heads.shape
    return heads.transpose(1, 2).reshape(batch, length, pieces, -1).transpose(1, 2)


def _row_weights(mask: Tensor, like: Tensor, average: Average) -> tuple[Tensor, Tensor]:
    """The weight of each query row (B, T) of heads (B, H, T, d), and how many terms the weighted sum has."""
    heads, real = like.shape[1], mask.bool()
    rows, lengths = real.to(torch.promote_types(like.dtype, torch.float32)), real.sum(1, keepdim=True)
    if average == "token":
        return rows / heads, lengths.sum()
    return rows / (heads * lengths.clamp(min=1)), (lengths > 0).sum()


def _total(
    student: dict[str, tuple[Tensor, Tensor]],
    teacher: dict[str, tuple[Tensor, Tensor]],
    weights: Sequence[float],
    mask: Tensor,
    *,
    causal: bool,
    average: Average,
    chunk_bytes: int,
) -> Loss:
    if average not in ("sequence", "token"):
        raise UserError(f'`average` is "sequence" or "token", not "{average}".')
    parts, terms, count = {}, [], mask.sum()
    for (name, mine), weight in zip(student.items(), weights, strict=True):
        rows, count = _row_weights(mask, mine[0], average)
        theirs = [part.detach() for part in teacher[name]]
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            args = (*mine, *theirs, mask.bool(), rows, causal, chunk_bytes)
            term: Tensor = _RelationKL.apply(*args)  # type: ignore[no-untyped-call]
        parts[name] = term.detach()
        terms.append(weight * term)
    return Loss(torch.stack(terms).sum(), count, parts)


class _RelationKL(torch.autograd.Function):
    """Sum of weighted row divergences, with the gradient in closed form so that no map outlives its chunk.

    For one row, d KL(p ‖ q) / d scores = q - p (softmax of the student minus that of the teacher).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, tx: Tensor, ty: Tensor, mask: Tensor, rows: Tensor, *rest: Any
    ) -> Tensor:
        causal, chunk_bytes = rest
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        total = rows.new_zeros(())
        for part, end in _chunks(mask, x.shape[1], chunk_bytes):
            cut_x, cut_y, cut_tx, cut_ty = (heads[part, :, :end] for heads in (x, y, tx, ty))
            log_q, log_p, weight = _log_rows(
                cut_x, cut_y, cut_tx, cut_ty, mask=mask[part, :end], causal=causal, rows=rows[part, :end]
            )
            p = log_p.exp()
            total += (log_p.sub_(log_q).mul_(p).sum(-1, keepdim=True) * weight).sum()
            if wanted:
                slope = log_q.exp_().sub_(p).mul_(weight / math.sqrt(x.shape[-1]))
                grad_x[part, :, :end] = (slope @ cut_y.to(slope)).to(x.dtype)
                grad_y[part, :, :end] = (slope.transpose(-1, -2) @ cut_x.to(slope)).to(y.dtype)
        if wanted:
            ctx.save_for_backward(grad_x, grad_y)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = ctx.saved_tensors
        return (grad_x * grad.to(grad_x), grad_y * grad.to(grad_y), *[None] * 6)


def _chunks(mask: Tensor, heads: int, chunk_bytes: int) -> list[tuple[slice, int]]:
    """Slices of the batch whose maps fit into ``chunk_bytes``, each with the length up to its last real token."""
    batch, length = mask.shape
    size = max(1, chunk_bytes // (4 * heads * length * length))
    ends = (mask * torch.arange(1, length + 1, device=mask.device)).amax(1).tolist()
    starts = range(0, batch, size)
    return [(slice(start, start + size), end) for start in starts if (end := max(ends[start : start + size])) > 0]


def _log_rows(
    x: Tensor, y: Tensor, tx: Tensor, ty: Tensor, *, mask: Tensor, causal: bool, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log relations (B, H, T, T) of the student and of the teacher, and the weight of each row (B, 1, T, 1)."""
    length = mask.shape[1]
    seen = mask.bool()[:, None, None, :]
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    log_q = _log_relation(x, y, seen)
    return log_q, _log_relation(tx, ty, seen).to(log_q), rows[:, None, :, None]


def _log_relation(x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
    """``log_softmax(x @ y.T / sqrt(d))`` over seen positions, float32 at least.

    Unseen positions get a large finite score rather than -inf, so that their terms are 0 * finite and never NaN.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        scores = (x.to(dtype) / math.sqrt(x.shape[-1])) @ y.to(dtype).transpose(-1, -2)
    scores = scores.masked_fill_(~seen, torch.finfo(dtype).min / 4)
    return torch.log_softmax(scores, dim=-1)
