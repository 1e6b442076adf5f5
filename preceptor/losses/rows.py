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
class Objective:
    """What is asked of each row: a divergence of one kind at a temperature, and cross-entropy to a label.

    ``mix`` is beta (Jensen-Shannon) or alpha (skewed kinds). ``gain`` multiplies the divergence in the gradient,
    ``label_gain`` the cross-entropy.
    """

    kind: Kind
    mix: float
    temperature: float
    gain: float
    label_gain: float


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
    excess = q.sum(-1) - p.sum(-1)
    if kind == "forward_kl":
        value = _times(p, t - s).sum(-1) + excess
        return value, q - p if gradient else None
    if kind == "reverse_kl":
        slope = s - t
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


class _Student:
    """The student's side of a block of rows: log-probabilities at the temperature, and the way back to the product."""

    def __init__(self, product: Tensor, form: Logits, objective: Objective, work: torch.dtype) -> None:
        z = product.to(work) * form.scale
        self.back = form.scale
        self.curve: Tensor | None = None
        if form.softcap is not None:
            bent = torch.tanh(z / form.softcap)
            z, self.curve = bent * form.softcap, 1 - bent * bent
        self.s = torch.log_softmax(z / objective.temperature, -1)
        self.s1 = self.s if objective.temperature == 1.0 else torch.log_softmax(z, -1)
        self.temperature = objective.temperature

    def write(self, out: Tensor, objective: Objective, du: Tensor | None, labels: Tensor | None) -> None:
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
        if labels is None:
            return torch.zeros_like(self.s[:, 0])
        chosen = -self.s1.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(labels == IGNORED, 0.0)

    def entropy(self) -> Tensor:
        return -_times(self.s.exp(), self.s).sum(-1)


def teacher_log_probs(product: Tensor, form: Logits, temperature: float, work: torch.dtype) -> Tensor:
    """Log-probabilities at the temperature, from the teacher's product."""
    z = product.to(work) * form.scale
    if form.softcap is not None:
        z = torch.tanh(z / form.softcap) * form.softcap
    return torch.log_softmax(z / temperature, -1)


def dense_rows(
    product: Tensor,
    form: Logits,
    teacher: Tensor | None,
    teacher_form: Logits,
    labels: Tensor | None,
    objective: Objective,
    *,
    work: torch.dtype,
    gradient: bool,
) -> Tensor:
    """Rows of student products against rows of teacher products (or labels alone): statistics (rows, 5).

    With ``gradient`` the student's ``product`` is overwritten by the gradient with respect to it.
    """
    student = _Student(product, form, objective, work)
    zero = torch.zeros_like(student.s[:, 0])
    value, du, teacher_entropy, agreement = zero, None, zero, zero
    if teacher is not None:
        t = teacher_log_probs(teacher, teacher_form, objective.temperature, work)
        value, du = divergence_of(objective.kind, objective.mix, student.s, t, gradient=gradient)
        teacher_entropy = -_times(t.exp(), t).sum(-1)
        agreement = (student.s.argmax(-1) == t.argmax(-1)).to(work)
    stats = torch.stack((value, student.cross_entropy(labels), student.entropy(), teacher_entropy, agreement), -1)
    if gradient:
        student.write(product, objective, du, labels)
    return stats


def at_temperature(log_probs: Tensor, vocabulary: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Top-k log-probabilities and the logarithm of the tail's mass, at a temperature.

    A temperature needs the shape of the tail, which nobody kept: it is taken as flat over the unlisted tokens.
    """
    listed = (log_probs > -math.inf).sum(-1)
    tail = torch.log1p(-log_probs.exp().sum(-1).clamp(max=1.0))
    if temperature == 1.0:
        return log_probs, tail
    others = (vocabulary - listed).to(log_probs.dtype).log()
    powered, tail = log_probs / temperature, others + (tail - others) / temperature
    tail = tail.masked_fill(torch.isnan(tail), -math.inf)
    total = torch.logsumexp(torch.cat((powered, tail.unsqueeze(-1)), -1), -1)
    return powered - total.unsqueeze(-1), tail - total


def spread_rows(ids: Tensor, log_probs: Tensor, vocabulary: int, temperature: float, work: torch.dtype) -> Tensor:
    """Top-k targets as dense log-probabilities (rows, vocabulary) at a temperature, the tail spread evenly."""
    log_probs, tail = at_temperature(log_probs.to(work), vocabulary, temperature)
    used = log_probs > -math.inf
    each = tail - (vocabulary - used.sum(-1)).clamp_min(1).to(work).log()
    dense = each.unsqueeze(-1).repeat(1, vocabulary)
    safe = torch.where(used, ids, ids.gather(-1, log_probs.argmax(-1, keepdim=True)))
    return dense.scatter_(-1, safe, torch.where(used, log_probs, log_probs.amax(-1, keepdim=True)))


def bucket_rows(
    product: Tensor,
    form: Logits,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    objective: Objective,
    *,
    work: torch.dtype,
    gradient: bool,
) -> Tensor:
    """Top-k targets as a distribution over k + 1 classes, the last one all unlisted tokens together."""
    student = _Student(product, form, objective, work)
    t, tail = at_temperature(log_probs.to(work), product.shape[-1], objective.temperature)
    used = t > -math.inf
    rest = student.s.exp()
    first = rest.argmax(-1)
    # An unused slot must not touch the token that its id happens to name: it repeats the row's best slot instead.
    safe = torch.where(used, ids, ids.gather(-1, t.argmax(-1, keepdim=True)))
    rest.scatter_(-1, safe, 0.0)
    rest_mass = rest.sum(-1, keepdim=True)
    s_small = torch.cat((student.s.gather(-1, safe).masked_fill(~used, -math.inf), rest_mass.log()), -1)
    t_small = torch.cat((t, tail.unsqueeze(-1)), -1)
    never = (s_small == -math.inf) & (t_small == -math.inf)
    # A class that neither side uses must add 0, not inf - inf.
    low = math.log(torch.finfo(work).tiny) * 2
    s_small, t_small = s_small.masked_fill(never, low), t_small.masked_fill(never, low)
    value, du_small = divergence_of(objective.kind, objective.mix, s_small, t_small, gradient=gradient)
    agreement = (first == ids.gather(-1, t.argmax(-1, keepdim=True)).squeeze(-1)).to(work)
    columns = (value, student.cross_entropy(labels), student.entropy(), torch.zeros_like(value), agreement)
    if du_small is not None:
        du = rest.mul_((du_small[:, -1:] / rest_mass).masked_fill_(rest_mass == 0, 0.0))
        listed = torch.where(used, du_small[:, :-1], du_small.gather(-1, t.argmax(-1, keepdim=True)))
        student.write(product, objective, du.scatter_(-1, safe, listed), labels)
    return torch.stack(columns, -1)


def sampled_rows(
    product: Tensor,
    form: Logits,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    objective: Objective,
    *,
    work: torch.dtype,
    gradient: bool,
) -> Tensor:
    """Tokens sampled from the teacher: cross-entropy, i.e. the forward KL plus the teacher's entropy, unbiased."""
    student = _Student(product, form, objective, work)
    weights = weights.to(work)
    value = -_times(weights, student.s.gather(-1, ids)).sum(-1)
    zero = torch.zeros_like(value)
    stats = torch.stack((value, student.cross_entropy(labels), student.entropy(), zero, zero), -1)
    if gradient:
        du = student.s.exp() * weights.sum(-1, keepdim=True)
        student.write(product, objective, du.scatter_add_(-1, ids, -weights), labels)
    return stats
