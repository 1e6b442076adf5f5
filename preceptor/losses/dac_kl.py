"""DAC-KL: a KL divergence over the part of the teacher's distribution that matters, all else as one class.

Liu et al., Multi-Granularity Semantic Revision for Large Language Model Distillation (https://arxiv.org/abs/2407.10068):
a small network f_sub predicts two quantiles l < u for every position; the classes between them and the target token
are kept. Its equations are not public; here, with the teacher's classes in descending order, p_(1) >= p_(2) >= ... and
C_r = p_(1) + ... + p_(r) their cumulative mass:

    f_sub([log p_(1..K), log q of the same classes] / 30) = (o_1, o_2)  MLP, one hidden layer; q without gradient
    l = σ(o_1),   u = l + (1 - l) σ(o_2)                                so 0 < l < u < 1
    w_r = σ((u - C_{r-1}) / τ) σ((C_r - l) / τ)                         gate, 1 for the target token
    w_r = 1 if C_{r-1} < u and C_r > l, else 0                          with quantiles that are fixed
    DAC-KL = Σ_r w_r p_r log(p_r / q_r) + P log(P / Q)                  P = 1 - Σ w p,  Q = 1 - Σ w q

The last class, the tail, holds what the gates let through to no class of its own. With it DAC-KL is the KL divergence
after a stochastic map that is the same for p and q, hence 0 <= DAC-KL <= KL(p ‖ q) (data processing). Partial sums
without a tail can be negative or exceed the KL, and renormalised ones make one kept class a loss of 0 for every
student: neither is offered.

The gradient with respect to the student's logits is q - t, with t_v = w_v p_v + (P / Q) (1 - w_v) q_v: the student is
drawn to the teacher on what is kept and keeps the shape of its own tail. f_sub minimises the very loss that it shapes
and would let everything fall into the tail: λ relu(ρ - Σ w p)² holds it back. It is then the guard that decides: where
SmolLM2 taught, l fell below 1e-3 within 50 steps, since the likeliest classes are most of the mass, and u settled where
the guard begins to cost more than the tail saves, at a median of 0.90 (KL of 10 nat) to 0.93 (KL of 0.9 nat).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.knowledge import Head, SoftTargets
from preceptor.losses import Loss
from preceptor.losses.chunked import CHUNK_BYTES, blocks, nothing, packed, product_type, summed, teacher_log_probs, wide
from preceptor.losses.rows import Logits, RowObjective, StudentRows

FLOOR = -30.0  # log-probabilities as f_sub is shown them go down to here


PARTS = ("divergence", "cross_entropy", "kl", "kept_mass", "kept_classes", "lower", "upper", "slope")


"""Sums over rows: DAC-KL, the cross-entropy, the whole KL(p ‖ q), Σ w p, Σ w, l and u, and the norm of the gradient
with respect to a row's hidden state."""


@dataclass(frozen=True)
class Clipping:
    """Which of the teacher's classes are kept."""

    mode: Literal["learned", "fixed", "off"] = "learned"
    """Quantiles by f_sub (with soft gates), fixed (with hard gates), or off: all of the considered classes."""
    lower: float = 0.01
    """l, in [0, 1): the quantile below which the likeliest classes are left out; where f_sub starts."""
    upper: float = 0.99
    """u, in (l, 1]: the quantile beyond which unlikely classes are left out; where f_sub starts."""
    top: int = 256
    """K: so many likeliest classes of the teacher are considered; the others are always in the tail."""
    quantile: Literal["mass", "classes"] = "mass"
    """Of what l and u are quantiles: the teacher's cumulative mass, or the number of considered classes."""
    softness: float = 0.02
    """τ of the soft gates."""
    guard: float = 1000.0
    """λ of the guard against collapse; 0: none. At 100 it gives way by 0.02 where the KL is some 4 nat."""
    least_mass: float = 0.9
    """ρ: the teacher's mass that the guard wants to be kept."""
    width: int = 128
    """Hidden units of f_sub."""
    learning_rate: float = 1e-3
    """Learning rate of f_sub's own optimizer (Adam), constant."""

    def __post_init__(self) -> None:
        """Refuse quantiles and sizes that leave nothing to keep."""
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"clipping.{name} is {value}; give a finite number.")
        least, most = (0.0, 1.0) if self.mode == "fixed" else (1e-6, 1 - 1e-6)
        if self.mode != "off" and not least <= self.lower < self.upper <= most:
            raise UserError(
                f"clipping.lower is {self.lower} and clipping.upper {self.upper}; choose 0 < lower < upper < 1 (fixed "
                "quantiles may be 0 and 1)."
            )
        for name, size in (("top", self.top), ("width", self.width)):
            if size < 1:
                raise UserError(f"clipping.{name} is {size}; it must be at least 1.")
        for name, value in (("softness", self.softness), ("learning_rate", self.learning_rate)):
            if not value > 0:
                raise UserError(f"clipping.{name} is {value}; it must be above 0.")
        if self.guard < 0:
            raise UserError(f"clipping.guard is {self.guard}; it must be 0 or more.")
        if not 0 <= self.least_mass <= 1:
            raise UserError(f"clipping.least_mass is {self.least_mass}; choose a share in [0, 1].")


class Quantiles(nn.Module):
    """f_sub: from both models' log-probabilities of the teacher's K likeliest classes to l and u, row by row."""

    def __init__(self, clipping: Clipping, *, classes: int, seed: int) -> None:
        """Starts at the clipping's l and u, whatever it is shown.

        Args:
            clipping: sizes, and the quantiles to start from.
            classes: the size of the vocabulary; fewer classes than `clipping.top` are all considered.
            seed: of the initial weights.
        """
        super().__init__()
        top = min(clipping.top, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(2 * top, clipping.width), nn.Linear(clipping.width, 2)
            nn.init.normal_(self.last.weight, std=1e-3)
        between = (clipping.upper - clipping.lower) / (1 - clipping.lower)
        with torch.no_grad():
            self.last.bias.copy_(torch.tensor([_logit(clipping.lower), _logit(between)]))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The quantiles l and u (rows,), 0 < l < u < 1, from features (rows, 2 K)."""
        out = self.last(torch.relu(self.first(features))).float()
        lower = torch.sigmoid(out[:, 0])
        upper = lower + (1 - lower) * torch.sigmoid(out[:, 1])
        return lower, upper


@dataclass(frozen=True, eq=False)
class Classes:
    """Both distributions at the classes that are considered, constants.

    ``p``, ``q``: log-probabilities (rows, K + 1) of the teacher's K likeliest classes and, last, of the target token
    where it is not among them (-inf where it is). ``target``: (rows, K + 1) bool, the target's column. ``p_rest``,
    ``q_rest``: (rows,) the mass of all other classes.
    """

    p: Tensor
    q: Tensor
    target: Tensor
    p_rest: Tensor
    q_rest: Tensor

    @property
    def features(self) -> Tensor:
        """What f_sub is shown (rows, 2 K), in [-1, 0].

        Log-probabilities as they are would move its quantiles by a power of ten with every step of its optimizer.
        """
        return torch.cat([self.p[:, :-1], self.q[:, :-1]], dim=-1).float().clamp_min(FLOOR) / -FLOOR


def gates(classes: Classes, lower: Tensor, upper: Tensor, clipping: Clipping) -> Tensor:
    """The gates w (rows, K + 1), in [0, 1], of quantiles l and u (rows,): soft if they are learned, hard if fixed."""
    mass = classes.p[:, :-1].exp()
    after = mass.cumsum(-1)
    before = after - mass
    if clipping.quantile == "classes":
        after = torch.arange(1, mass.shape[1] + 1, device=mass.device).expand_as(mass) / mass.shape[1]
        before = after - 1 / mass.shape[1]
    lower, upper = lower.to(mass).unsqueeze(-1), upper.to(mass).unsqueeze(-1)
    if clipping.mode == "off":
        kept = torch.ones_like(mass)
    elif clipping.mode == "learned":
        kept = torch.sigmoid((upper - before) / clipping.softness) * torch.sigmoid((after - lower) / clipping.softness)
    else:
        kept = ((before < upper) & (after > lower)).to(mass)
    kept = torch.cat([kept, torch.zeros_like(kept[:, :1])], dim=-1)
    return torch.where(classes.target, torch.ones_like(kept), kept)


def clipped_rows(classes: Classes, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DAC-KL (rows,), and the masses P and Q (rows,) of the tail, of gates w (rows, K + 1)."""
    p, q = classes.p.exp(), classes.q.exp()
    p_tail = classes.p_rest + ((1 - kept) * p).sum(-1)
    q_tail = (classes.q_rest + ((1 - kept) * q).sum(-1)).clamp_min(torch.finfo(q.dtype).tiny)
    inside = (kept * p * (classes.p - classes.q).masked_fill(p == 0, 0.0)).sum(-1)
    # The slope of P log P is infinite at 0: below 1e-12 f_sub gets none.
    outside = p_tail.clamp_min(1e-12)
    return inside + outside * (outside.log() - q_tail.log()).masked_fill(p_tail == 0, 0.0), p_tail, q_tail


def quantile_loss(classes: Classes, quantiles: Callable[[Tensor], tuple[Tensor, Tensor]], clipping: Clipping) -> Loss:
    """What f_sub minimises, summed over rows: DAC-KL of constant p and q, and the guard λ relu(ρ - Σ w p)²."""
    lower, upper = quantiles(classes.features)
    if bool((lower > upper).any()):
        raise AssertionError("a lower quantile above its upper one")
    kept = gates(classes, lower, upper, clipping)
    value, _, _ = clipped_rows(classes, kept)
    lacks = torch.relu(clipping.least_mass - (kept * classes.p.exp()).sum(-1)) ** 2
    total = (value + clipping.guard * lacks).sum()
    return Loss(total, torch.tensor(len(kept), device=kept.device), {"guard": lacks.detach().sum()})


def clipped_kl(
    hidden: Tensor,
    head: Head,
    teacher: SoftTargets,
    clipping: Clipping,
    *,
    mask: Tensor,
    targets: Tensor,
    quantiles: Quantiles | None = None,
    labels: Tensor | None = None,
    weight: float = 1.0,
    label_weight: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Loss, Classes]:
    """Sum over rows of ``weight * DAC-KL(p ‖ q) + label_weight * cross_entropy``, and what f_sub learns from.

    Args:
        hidden: the student's last hidden states, (..., width).
        head: the student's output head.
        teacher: dense soft targets whose leading shape is that of ``hidden``, or (rows,) for the masked rows.
        clipping: what is kept; with ``mode="off"`` the K likeliest classes, and all others as one.
        mask: boolean, the leading shape of ``hidden``; rows that are False cost nothing.
        targets: int64, the leading shape of ``hidden``: the text's own next token, always kept.
        quantiles: f_sub, read without gradient, where the quantiles are learned.
        labels: int64, the leading shape of ``hidden``; -100 adds no cross-entropy.
        weight: multiplies DAC-KL.
        label_weight: multiplies the cross-entropy to ``labels``.
        chunk_bytes: memory for logits that are alive at a time.

    Returns:
        `Loss` with the count of rows and sums over them (``PARTS``); and the classes for `quantile_loss`.

    Raises:
        UserError: vocabularies or shapes that do not fit, or learned quantiles without f_sub.
    """
    _check_quantiles(clipping, quantiles)
    rows, outputs = packed(hidden, head, teacher, mask)
    if len(rows) == 0:
        return _of_no_row(hidden, head, clipping)
    wanted, seen = targets[mask], list[Classes]()
    taught = torch.full_like(wanted, -100) if labels is None else labels[mask]
    objective = RowObjective("forward_kl", 0.0, 1.0, weight, label_weight)

    def score(z: Tensor, part: slice) -> Tensor:
        student = StudentRows(z, Logits(head.scale, head.softcap), objective, wide(product_type(hidden)))
        log_p = teacher_log_probs(outputs, part, product_type(hidden))
        ids, classes = considered(log_p, student.s, wanted[part], clipping.top)
        lower, upper = _quantiles(classes, clipping, quantiles)
        kept = gates(classes, lower, upper, clipping)
        value, p_tail, q_tail = clipped_rows(classes, kept)
        student.write(z, objective, _gradient(student.s, ids, classes, kept, p_tail / q_tail), taught[part])
        seen.append(classes)
        entropy = student.cross_entropy(taught[part])
        values = [weight * value + label_weight * entropy, value, entropy, *_of_rows(log_p, student.s, classes, kept)]
        return torch.stack([x.double() if z.device.type != "mps" else x for x in (*values, lower, upper)]).sum(-1)

    total, sums, slope = summed(rows, head, score, blocks(len(rows), head.weight.shape[0], chunk_bytes))
    return Loss(total, torch.tensor(len(rows), device=hidden.device), dict(zip(PARTS, [*sums[1:], slope]))), _joined(
        seen
    )


def _check_quantiles(clipping: Clipping, quantiles: Quantiles | None) -> None:
    if clipping.mode == "learned" and quantiles is None:
        raise UserError("Learned quantiles need f_sub: pass `quantiles`, or set clipping.mode to fixed.")


def _joined(parts: list[Classes]) -> Classes:
    return Classes(*(torch.cat([getattr(one, name) for one in parts]) for name in Classes.__dataclass_fields__))


def _of_rows(log_p: Tensor, log_q: Tensor, classes: Classes, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the whole KL(p ‖ q), Σ w p and Σ w."""
    return (log_p.exp() * (log_p - log_q)).sum(-1), (kept * classes.p.exp()).sum(-1), kept.sum(-1)


def _of_no_row(hidden: Tensor, head: Head, clipping: Clipping) -> tuple[Loss, Classes]:
    warnings.warn("No position is selected by the mask; the loss is exactly 0.", stacklevel=3)
    zero = torch.zeros((), device=hidden.device)
    empty = hidden.new_zeros(0, min(clipping.top, head.weight.shape[0]) + 1)
    classes = Classes(empty, empty, empty.bool(), empty[:, 0], empty[:, 0])
    return Loss(nothing(hidden, head), zero.long(), dict.fromkeys(PARTS, zero)), classes


def considered(log_p: Tensor, log_q: Tensor, target: Tensor, top: int) -> tuple[Tensor, Classes]:
    """The ids (rows, K + 1) of the classes that are considered, and both log-distributions (rows, V) at them."""
    likeliest, ids = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    target = target.unsqueeze(-1)
    listed = ids == target
    beside = ~listed.any(-1, keepdim=True)
    every = torch.cat([ids, target], dim=-1)
    marks = torch.cat([listed, beside], dim=-1)
    p = torch.cat([likeliest, log_p.gather(-1, target).masked_fill(~beside, -torch.inf)], dim=-1)
    q = log_q.gather(-1, every)
    q[:, -1:] = q[:, -1:].masked_fill(~beside, -torch.inf)
    p_rest, q_rest = (_rest(values, every) for values in (log_p, log_q))
    return every, Classes(p, q, marks, p_rest, q_rest)


def _rest(values: Tensor, ids: Tensor) -> Tensor:
    # Not 1 - sum, which loses the digits of a faint rest.
    return values.scatter(-1, ids, -torch.inf).exp_().sum(-1)


def _quantiles(classes: Classes, clipping: Clipping, quantiles: Quantiles | None) -> tuple[Tensor, Tensor]:
    if clipping.mode == "learned" and quantiles is not None:
        with torch.no_grad():
            lower, upper = quantiles(classes.features)
            return lower, upper
    ends = (0.0, 1.0) if clipping.mode == "off" else (clipping.lower, clipping.upper)
    lower, upper = (torch.full_like(classes.p_rest, end) for end in ends)
    return lower, upper


def _gradient(log_q: Tensor, ids: Tensor, classes: Classes, kept: Tensor, ratio: Tensor) -> Tensor:
    """The gradient q - t (rows, V), with t = w p + (P / Q) (1 - w) q."""
    ratio = ratio.unsqueeze(-1)
    slope = log_q.exp().mul_(1 - ratio)
    p, q = classes.p.exp(), classes.q.exp()
    listed = q - kept * p - ratio * (1 - kept) * q
    slope.scatter_(-1, ids[:, :-1], listed[:, :-1])
    # The last column repeats an id where the target is among the likeliest: it must not write there.
    beside = classes.target[:, -1:]
    last = torch.where(beside, listed[:, -1:], slope.gather(-1, ids[:, -1:]))
    return slope.scatter_(-1, ids[:, -1:], last)


def _logit(share: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(share / (1 - share))
