"""Divergences between two distributions, row by row: value, gradient and measurements, in plain PyTorch.

Everything here works on blocks of rows of logits that `fused` has just computed and will throw away; nothing needs
autograd. With s = log q (student), t = log p (teacher) and u the student's logits over the temperature, the gradient of
every divergence D is ``dD/du_i = q_i (g_i - sum_j q_j g_j)`` with ``g = dD/dq``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"]


IGNORED = -100


STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "agreement")


@dataclass(frozen=True)
class Logits:
    """What turns a product into logits: ``softcap(scale * product)``; the bias is already in the product."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class RowObjective:
    """What is asked of each row: a divergence of one kind at a temperature, and cross-entropy to a label.

    ``mix`` is beta (Jensen-Shannon) or alpha (skewed kinds). ``gain`` multiplies the divergence in the gradient,
    ``label_gain`` the cross-entropy.
    """

    kind: Kind
    mix: float
    temperature: float
    gain: float
    label_gain: float


@dataclass(frozen=True)
class RowTargets:
    """A teacher's targets for a block of rows.

    ``mode``: ``"labels"`` (nothing), ``"dense"`` (``logits``, products when ``form`` is not plain), ``"bucket"``
    (``ids`` and k + 1 log-probabilities at the temperature, the tail's last) or ``"sampled"`` (``ids`` and weights).
    """

    mode: Literal["labels", "dense", "bucket", "sampled"]
    logits: Tensor | None = None
    form: Logits = Logits()
    ids: Tensor | None = None
    values: Tensor | None = None

    def __getitem__(self, rows: slice) -> RowTargets:
        """The same about some of the rows."""
        logits, ids, values = (None if x is None else x[rows] for x in (self.logits, self.ids, self.values))
        return RowTargets(self.mode, logits, self.form, ids, values)


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """``probability * value`` with 0 * inf = 0, and NaN kept."""
    return (probability * value).masked_fill_(probability == 0, 0.0)


def _log_mixture(q: Tensor, p: Tensor, teacher_share: float) -> tuple[Tensor, Tensor]:
    m = torch.lerp(q, p, teacher_share)
    return m, m.clamp_min(torch.finfo(m.dtype).tiny).log_()


def divergence_of(kind: Kind, mix: float, s: Tensor, t: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """One divergence from log-probabilities (rows, classes): its value by row, and dD/du.

    The sums of q and p that are added to the values are 0 in exact arithmetic; they cancel what rounding of the two
    normalisers does to the value to first order.
    """
    q, p = s.exp(), t.exp()
    gap = (t - s).masked_fill((s == -math.inf) & (t == -math.inf), 0.0)
    excess = q.sum(-1) - p.sum(-1)
    if kind == "forward_kl":
        value = _times(p, gap).sum(-1) + excess
        return value, q - p if gradient else None
    if kind == "reverse_kl":
        slope = -gap
        value = _times(q, slope).sum(-1) - excess
    elif kind == "jensen_shannon":
        _, log_m = _log_mixture(q, p, mix)
        slope = (1 - mix) * (s - log_m)
        value = mix * _times(p, t - log_m).sum(-1) + _times(q, slope).sum(-1)
    elif kind == "skew_kl":
        m, log_m = _log_mixture(q, p, mix)
        slope = _times(p, (mix - 1) / m)
        value = _times(p, t - log_m).sum(-1) + (1 - mix) * excess
    elif kind == "skew_reverse_kl":
        m, log_m = _log_mixture(q, p, 1 - mix)
        value = _times(q, s - log_m).sum(-1) - (1 - mix) * excess
        slope = s - log_m - _times(q, mix / m)
    else:
        value = 0.5 * (q - p).abs().sum(-1)
        slope = 0.5 * (q - p).sign()
    if not gradient:
        return value, None
    slope = _times(q, slope)
    return value, slope - q * slope.sum(-1, keepdim=True)


class StudentRows:
    """The student's side of a block of rows: log-probabilities at the temperature, and the way back to the product."""

    def __init__(self, product: Tensor, form: Logits, objective: RowObjective, work: torch.dtype) -> None:
        z = product.to(work) * form.scale
        self.back = form.scale
        self.curve: Tensor | None = None
        if form.softcap is not None:
            bent = torch.tanh(z / form.softcap)
            z, self.curve = bent * form.softcap, 1 - bent * bent
        self.s = torch.log_softmax(z / objective.temperature, -1)
        self.s1 = self.s if objective.temperature == 1.0 else torch.log_softmax(z, -1)
        self.temperature = objective.temperature

    def write(self, out: Tensor, objective: RowObjective, du: Tensor | None, labels: Tensor | None) -> None:
        """Put the gradient with respect to the product into ``out``."""
        total = torch.zeros_like(self.s) if du is None else du * (objective.gain / self.temperature)
        if labels is not None and objective.label_gain != 0:
            kept = labels != IGNORED
            toward = self.s1.exp() * kept.unsqueeze(-1)
            at = labels.clamp_min(0).unsqueeze(-1)
            toward.scatter_add_(-1, at, -kept.to(toward.dtype).unsqueeze(-1))
            total = total + objective.label_gain * toward
        if self.curve is not None:
            total = total * self.curve
        out.copy_(total * self.back)

    def cross_entropy(self, labels: Tensor | None) -> Tensor:
        """The cross-entropy (rows,) to labels, 0 where there is none."""
        if labels is None:
            return torch.zeros_like(self.s[:, 0])
        chosen = -self.s1.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(labels == IGNORED, 0.0)

    def entropy(self) -> Tensor:
        """The entropy (rows,) at the temperature."""
        return -_times(self.s.exp(), self.s).sum(-1)


def dense_rows(
    product: Tensor, form: Logits, targets: RowTargets, labels: Tensor | None, objective: RowObjective, *,
    work: torch.dtype, gradient: bool,
) -> Tensor:  # fmt: skip
    """Rows of student products against rows of teacher products (or labels alone): statistics (rows, 5), see `STATS`.

    With ``gradient`` the student's ``product`` is overwritten by the gradient with respect to it.
    """
    student = StudentRows(product, form, objective, work)
    value = teacher_entropy = agreement = torch.zeros_like(student.s[:, 0])
    du = None
    if targets.logits is not None:
        t = row_log_probs(targets.logits, targets.form, objective.temperature, work)
        value, du = divergence_of(objective.kind, objective.mix, student.s, t, gradient=gradient)
        teacher_entropy = -_times(t.exp(), t).sum(-1)
        agreement = (student.s.argmax(-1) == t.argmax(-1)).to(work)
    stats = torch.stack((value, student.cross_entropy(labels), student.entropy(), teacher_entropy, agreement), -1)
    if gradient:
        student.write(product, objective, du, labels)
    return stats


def row_log_probs(product: Tensor, form: Logits, temperature: float, work: torch.dtype) -> Tensor:
    """Log-probabilities (rows, vocabulary) at a temperature, of a block of products."""
    z = product.to(work) * form.scale
    if form.softcap is not None:
        z = torch.tanh(z / form.softcap) * form.softcap
    return torch.log_softmax(z / temperature, -1)


def with_tail(log_probs: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """Top-k log-probabilities (rows, k) and, last, the logarithm of the tail's mass, at a temperature: (rows, k + 1).

    A temperature needs the shape of the tail, which nobody kept: it is taken as flat over the unlisted tokens. Where
    rounding of the kept values leaves no mass for tokens that are there, the tail gets one rounding error of it; then
    all is normalised.
    """
    # 1 - sum loses digits where the tail is faint: in float64, which k numbers a row can afford.
    wide = torch.float32 if log_probs.device.type == "mps" else torch.float64
    kept = log_probs.to(wide)
    others = (vocabulary - (kept > -math.inf).sum(-1)).to(wide)
    mass = (1 - kept.exp().sum(-1)).clamp_min(torch.finfo(log_probs.dtype).eps)
    tail = mass.log().masked_fill(others <= 0, -math.inf)
    spread = others.clamp_min(1).log()
    heated = torch.cat((kept / temperature, (spread + (tail - spread) / temperature).unsqueeze(-1)), -1)
    return torch.log_softmax(heated, -1).to(log_probs.dtype)


def _used(ids: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots are used, the best slot, and ids in which unused slots repeat the best one.

    An unused slot must not touch the token that its id happens to name.
    """
    used, best = t > -math.inf, t.argmax(-1, keepdim=True)
    return used, best, torch.where(used, ids, ids.gather(-1, best))


def spread_rows(ids: Tensor, values: Tensor, vocabulary: int) -> Tensor:
    """Top-k targets with their tail (rows, k + 1) as dense log-probabilities (rows, vocabulary), the tail flat."""
    t = values[:, :-1]
    used, best, safe = _used(ids, t)
    each = values[:, -1] - (vocabulary - used.sum(-1)).clamp_min(1).to(t.dtype).log()
    dense = each.unsqueeze(-1).repeat(1, vocabulary)
    return dense.scatter_(-1, safe, torch.where(used, t, t.gather(-1, best)))


def bucket_rows(
    product: Tensor, form: Logits, targets: RowTargets, labels: Tensor | None, objective: RowObjective, *,
    work: torch.dtype, gradient: bool,
) -> Tensor:  # fmt: skip
    """As `dense_rows` for top-k targets: a divergence of k + 1 classes, the last one all unlisted tokens together."""
    assert targets.ids is not None
    assert targets.values is not None
    student = StudentRows(product, form, objective, work)
    t = targets.values.to(work)
    used, best, safe = _used(targets.ids, t[:, :-1])
    rest = student.s.scatter(-1, safe, -math.inf)
    log_rest = torch.logsumexp(rest, -1, keepdim=True)
    s = torch.cat((student.s.gather(-1, safe).masked_fill(~used, -math.inf), log_rest), -1)
    value, du_classes = divergence_of(objective.kind, objective.mix, s, t, gradient=gradient)
    agreement = (student.s.argmax(-1) == targets.ids.gather(-1, best).squeeze(-1)).to(work)
    zero = torch.zeros_like(value)
    stats = torch.stack((value, student.cross_entropy(labels), student.entropy(), zero, agreement), -1)
    if du_classes is not None:
        inside = (rest - log_rest).exp().masked_fill(log_rest == -math.inf, 0.0)
        du = inside.mul_(du_classes[:, -1:].masked_fill(log_rest == -math.inf, 0.0))
        listed = torch.where(used, du_classes[:, :-1], du_classes.gather(-1, best))
        student.write(product, objective, du.scatter_(-1, safe, listed), labels)
    return stats


def sampled_rows(
    product: Tensor, form: Logits, targets: RowTargets, labels: Tensor | None, objective: RowObjective, *,
    work: torch.dtype, gradient: bool,
) -> Tensor:  # fmt: skip
    """As `dense_rows` for tokens sampled from the teacher: the cross-entropy to them, unbiased.

    Its expectation is the forward KL plus the teacher's entropy, and its gradient's is that of the forward KL.
    """
    assert targets.ids is not None
    assert targets.values is not None
    student = StudentRows(product, form, objective, work)
    weights = targets.values.to(work)
    value = -_times(weights, student.s.gather(-1, targets.ids)).sum(-1)
    zero = torch.zeros_like(value)
    stats = torch.stack((value, student.cross_entropy(labels), student.entropy(), zero, zero), -1)
    if gradient:
        du = student.s.exp() * weights.sum(-1, keepdim=True)
        student.write(product, objective, du.scatter_add_(-1, targets.ids, -weights), labels)
    return stats
