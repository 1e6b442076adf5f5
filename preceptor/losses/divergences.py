r"""Divergences between a teacher and a student over a vocabulary, straight from hidden states and output heads.

`divergence` never holds a tokens x vocabulary matrix: it drops masked rows, walks through the others in chunks, and
computes the gradient of each chunk in closed form while its logits are at hand. p is the teacher, q the student:

========================= ============================================================= ==========================
forward_kl                sum p log(p / q)                                              Hinton et al. 2015
reverse_kl                sum q log(q / p)                                              Gu et al. 2024 (MiniLLM)
jensen_shannon (beta)     beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1-beta)q Agarwal et al. 2024 (GKD)
skew_kl (alpha)           KL(p | alpha p + (1 - alpha) q)                               Ko et al. 2024 (DistiLLM)
skew_reverse_kl (alpha)   KL(q | (1 - alpha) p + alpha q)                               Ko et al. 2024 (DistiLLM)
total_variation           1/2 sum \\|p - q\\|                                             Wen et al. 2023
========================= ============================================================= ==========================

Jensen-Shannon at ``beta=0`` is forward KL and at ``beta=1`` reverse KL, as in GKD's implementations. These are the
limits of JSD / beta and JSD / (1 - beta), so the scale jumps there: JSD(0.001) is a thousandth of JSD(0).

Top-k targets leave the other tokens' probabilities open, except their sum. ``tail="bucket"`` compares the k listed
tokens and all others together as one class: exact as a divergence of k + 1 classes, a lower bound of the full one (by
the data-processing inequality), and without effect on the tail's shape, which the student keeps. ``tail="uniform"``
spreads the tail's mass evenly, which also teaches the student a flat tail. At a temperature other than 1 both take the
tail as flat to know its mass.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from preceptor.errors import UserError
from preceptor.knowledge import Head, HiddenTargets, LogitTargets, SampledTargets, SoftTargets, TopKTargets
from preceptor.losses import Loss
from preceptor.losses.fused import FusedDivergence, PassPlan
from preceptor.losses.rows import IGNORED, STATS, Kind, RowObjective

CHUNK_BYTES = 80 * 2**20


def divergence(
    hidden: Tensor,
    head: Head,
    teacher: SoftTargets | None,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    weight: float = 1.0,
    label_weight: float = 0.0,
    tail: Literal["bucket", "uniform"] = "bucket",
    chunk_bytes: int = CHUNK_BYTES,
    float32_gradient: bool = False,
    compiled: bool = True,
) -> Loss:
    """Sum over rows of ``weight * temperature**2 * D(teacher, student) + label_weight * cross_entropy``.

    Args:
        hidden: the student's last hidden states, (..., width).
        head: the student's output head.
        teacher: soft targets of ``hidden``'s leading shape, or (rows,) for the masked rows; None: cross-entropy alone.
        kind: which divergence, see the module.
        beta: the teacher's share in the Jensen-Shannon mixture, in [0, 1].
        alpha: skew, in [0, 1]: the share of a kind's own distribution in its mixture.
        temperature: divides both sides' logits, not those of the cross-entropy.
        mask: boolean, the leading shape of ``hidden``; False rows cost nothing. Default: labelled rows, or all.
        labels: int64, the leading shape of ``hidden``; -100 adds no cross-entropy.
        weight: multiplies the divergence.
        label_weight: multiplies the cross-entropy to ``labels``, in nats at temperature 1.
        tail: how top-k targets treat unlisted tokens, ``"bucket"`` or ``"uniform"``; see the module.
        chunk_bytes: memory for logits that are alive at a time.
        float32_gradient: sum a bfloat16 or float16 head's gradient over chunks in float32, for 4 bytes an entry.
        compiled: use the compiled CPU kernel where there is one; otherwise PyTorch, to the same values.

    Returns:
        `Loss` with the count of rows and detached sums over rows: ``divergence`` (nats, without ``weight`` and
        temperature**2; for sampled targets the cross-entropy to them), ``cross_entropy`` (with labels),
        ``student_entropy``, ``teacher_entropy`` (dense targets) and ``agreement`` (same likeliest token).

    Raises:
        UserError: shapes, vocabularies, labels or settings that do not fit.
    """
    _check_settings(kind, beta, alpha, temperature, tail, chunk_bytes)
    _check_shapes(hidden, head, teacher, mask, labels)
    rows, chosen, targets = _select(hidden, teacher, mask, labels)
    _check_targets(targets, chosen, rows.shape[0], head.weight.shape[0], kind, temperature)
    if rows.shape[0] == 0:
        return _empty(hidden, head, teacher, labels)
    objective = _objective(kind, beta, alpha, temperature=temperature, gain=weight, label_gain=label_weight)
    plan = PassPlan(objective, tail, *_dtypes(rows, head.weight, float32_gradient), chunk_bytes, compiled)
    inputs = (rows, head.weight, head.bias, head, targets, chosen, plan)
    total, sums = FusedDivergence.apply(*inputs)  # type: ignore[no-untyped-call]
    return Loss(
        total,
        torch.tensor(rows.shape[0], device=hidden.device),
        {name: sums[STATS.index(name)] for name in _names(teacher, labels)},
    )


def _names(teacher: SoftTargets | None, labels: Tensor | None) -> list[str]:
    names = ["student_entropy"]
    if teacher is not None:
        names.insert(0, "divergence")
    if labels is not None:
        names.append("cross_entropy")
    if isinstance(teacher, HiddenTargets | LogitTargets):
        names.append("teacher_entropy")
    if isinstance(teacher, HiddenTargets | LogitTargets | TopKTargets):
        names.append("agreement")
    return names


def _objective(
    kind: Kind, beta: float, alpha: float, *, temperature: float, gain: float, label_gain: float
) -> RowObjective:
    """The divergence to compute: kinds whose mixture is one of the two sides become the plain ones."""
    mix = beta if kind == "jensen_shannon" else alpha
    if mix == 0.0 and kind in ("jensen_shannon", "skew_kl"):
        kind = "forward_kl"
    elif (mix == 1.0 and kind == "jensen_shannon") or (mix == 0.0 and kind == "skew_reverse_kl"):
        kind = "reverse_kl"
    return RowObjective(kind=kind, mix=mix, temperature=temperature, gain=gain * temperature**2, label_gain=label_gain)


def _dtypes(rows: Tensor, weight: Tensor, float32_gradient: bool) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of products, of everything by element, and of the sum of the head's gradient (see `PassPlan`)."""
    device, product = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device) and product != torch.float64:
        product = torch.get_autocast_dtype(device)
    work = torch.promote_types(product, torch.float32)
    return product, work, torch.promote_types(weight.dtype, work) if float32_gradient else weight.dtype


def _select(
    hidden: Tensor, teacher: SoftTargets | None, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None, SoftTargets | None]:
    """Rows, labels and targets of the selected positions, each (rows, ...)."""
    lead = hidden.shape[:-1]
    if labels is not None and mask is None:
        mask = labels != IGNORED

    def pick(values: Tensor) -> Tensor:
        if values.shape[:-1] != lead or (mask is not None and values.shape[:-1] == (int(mask.sum()),) != lead):
            return values
        return values.reshape(-1, values.shape[-1]) if mask is None else values[mask]

    rows = pick(hidden)
    chosen = None if labels is None else (labels.reshape(-1) if mask is None else labels[mask])
    if isinstance(teacher, HiddenTargets):
        return rows, chosen, HiddenTargets(pick(teacher.hidden).detach(), teacher.head)
    if isinstance(teacher, LogitTargets):
        return rows, chosen, LogitTargets(pick(teacher.logits).detach())
    if isinstance(teacher, TopKTargets):
        return rows, chosen, TopKTargets(pick(teacher.ids), pick(teacher.log_probs).detach())
    if isinstance(teacher, SampledTargets):
        return rows, chosen, SampledTargets(pick(teacher.ids), pick(teacher.weights).detach())
    return rows, chosen, None


def _empty(hidden: Tensor, head: Head, teacher: SoftTargets | None, labels: Tensor | None) -> Loss:
    warnings.warn("No position is selected by the mask; the loss is exactly 0.", stacklevel=3)
    zero = hidden.reshape(-1, hidden.shape[-1])[:0].sum() + head.weight[:0].sum()
    if head.bias is not None:
        zero = zero + head.bias[:0].sum()
    nothing = torch.zeros((), device=hidden.device)
    return Loss(zero, torch.tensor(0, device=hidden.device), dict.fromkeys(_names(teacher, labels), nothing))


def _check_settings(kind: str, beta: float, alpha: float, temperature: float, tail: str, chunk_bytes: int) -> None:
    if kind not in get_args(Kind):
        raise UserError(f"There is no divergence {kind!r}; choose one of {', '.join(get_args(Kind))}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature is {temperature}; it must be a number above 0.")
    for name, value in (("beta", beta), ("alpha", alpha)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it must lie in [0, 1].")
    if tail not in ("bucket", "uniform"):
        raise UserError(f"tail is {tail!r}; choose 'bucket' or 'uniform'.")
    if chunk_bytes <= 0:
        raise UserError(f"chunk_bytes is {chunk_bytes}; give the bytes that logits may take, 67108864 for example.")


def _check_shapes(
    hidden: Tensor, head: Head, teacher: SoftTargets | None, mask: Tensor | None, labels: Tensor | None
) -> None:
    lead = tuple(hidden.shape[:-1])
    if hidden.shape[-1] != head.weight.shape[1]:
        raise UserError(
            f"The student's hidden states are {hidden.shape[-1]} wide and its head reads {head.weight.shape[1]}; "
            "pass the head that belongs to these hidden states."
        )
    for name, tensor in (("mask", mask), ("labels", labels)):
        if tensor is not None and tuple(tensor.shape) != lead:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)} and the hidden states {lead}; give one entry a position."
            )
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(f"mask is {mask.dtype}; make it boolean, True where a position is taught (mask != 0).")
    if isinstance(teacher, HiddenTargets) and teacher.hidden.shape[-1] != teacher.head.weight.shape[1]:
        raise UserError(
            f"The teacher's hidden states are {teacher.hidden.shape[-1]} wide and its head reads "
            f"{teacher.head.weight.shape[1]}; pass the head that belongs to these hidden states."
        )
    if isinstance(teacher, TopKTargets | SampledTargets):
        other = teacher.log_probs if isinstance(teacher, TopKTargets) else teacher.weights
        if teacher.ids.shape != other.shape:
            raise UserError(
                f"The teacher's ids have shape {tuple(teacher.ids.shape)} and their values {tuple(other.shape)}; "
                "they must be the same."
            )
    if teacher is None and labels is None:
        raise UserError("There is neither a teacher nor labels; pass at least one of them.")


def _check_targets(
    teacher: SoftTargets | None, labels: Tensor | None, rows: int, vocabulary: int, kind: Kind, temperature: float
) -> None:
    ids: Tensor | None = None
    if isinstance(teacher, HiddenTargets):
        first, classes = teacher.hidden, teacher.head.weight.shape[0]
    elif isinstance(teacher, LogitTargets):
        first, classes = teacher.logits, teacher.logits.shape[-1]
    elif teacher is not None:
        first, classes, ids = teacher.ids, vocabulary, teacher.ids
    if teacher is not None and tuple(first.shape[:-1]) != (rows,):
        raise UserError(
            f"The teacher speaks about positions of shape {tuple(first.shape[:-1])} and the student has {rows} "
            "selected positions; give the teacher's targets for every position or for exactly the selected ones."
        )
    if teacher is not None and classes != vocabulary:
        raise UserError(
            f"The teacher's vocabulary has {classes} entries and the student's {vocabulary}; use models that share a "
            "tokenizer, and slice padded heads to the tokenizer's length."
        )
    if isinstance(teacher, SampledTargets) and (kind != "forward_kl" or temperature != 1.0):
        raise UserError(
            f"Sampled targets estimate the forward KL at temperature 1, not {kind} at {temperature:g}; use forward_kl "
            "with temperature=1, or keep top-k targets or hidden states of the teacher."
        )
    _check_range("The teacher's ids", ids, vocabulary)
    _check_range("labels", None if labels is None else labels[labels != IGNORED], vocabulary)


def _check_range(name: str, ids: Tensor | None, vocabulary: int) -> None:
    if ids is None or ids.numel() == 0:
        return
    if ids.dtype != torch.int64:
        raise UserError(f"{name} are {ids.dtype}; they must be int64.")
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise UserError(f"{name} hold {wrong}, outside the vocabulary [0, {vocabulary}); check the tokenizer.")


def forward_kl(
    hidden: Tensor, head: Head, teacher: SoftTargets, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Loss:
    """KL(teacher ‖ student) summed over rows, times temperature**2. See `divergence`."""
    return divergence(hidden, head, teacher, kind="forward_kl", temperature=temperature, mask=mask)


def reverse_kl(
    hidden: Tensor, head: Head, teacher: SoftTargets, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Loss:
    """KL(student ‖ teacher) summed over rows, times temperature**2. See `divergence`."""
    return divergence(hidden, head, teacher, kind="reverse_kl", temperature=temperature, mask=mask)


def jensen_shannon(
    hidden: Tensor, head: Head, teacher: SoftTargets, beta: float = 0.5, *,
    temperature: float = 1.0, mask: Tensor | None = None,
) -> Loss:  # fmt: skip
    """GKD's generalised Jensen-Shannon divergence summed over rows, times temperature**2. See `divergence`."""
    return divergence(hidden, head, teacher, kind="jensen_shannon", beta=beta, temperature=temperature, mask=mask)


def skew_kl(
    hidden: Tensor, head: Head, teacher: SoftTargets, alpha: float = 0.1, *,
    temperature: float = 1.0, mask: Tensor | None = None,
) -> Loss:  # fmt: skip
    """DistiLLM's skew KL summed over rows, times temperature**2. See `divergence`."""
    return divergence(hidden, head, teacher, kind="skew_kl", alpha=alpha, temperature=temperature, mask=mask)


def skew_reverse_kl(
    hidden: Tensor, head: Head, teacher: SoftTargets, alpha: float = 0.1, *,
    temperature: float = 1.0, mask: Tensor | None = None,
) -> Loss:  # fmt: skip
    """DistiLLM's skew reverse KL summed over rows, times temperature**2. See `divergence`."""
    return divergence(hidden, head, teacher, kind="skew_reverse_kl", alpha=alpha, temperature=temperature, mask=mask)


def total_variation(
    hidden: Tensor, head: Head, teacher: SoftTargets, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Loss:
    """Half the L1 distance summed over rows, times temperature**2. See `divergence`."""
    return divergence(hidden, head, teacher, kind="total_variation", temperature=temperature, mask=mask)


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor, *, mask: Tensor | None = None) -> Loss:
    """Cross-entropy to labels summed over rows. See `divergence`."""
    return divergence(hidden, head, None, mask=mask, labels=labels, label_weight=1.0)
