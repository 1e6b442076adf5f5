"""The two sparse kinds: adaptive top-k with the mass of its tail, and unbiased samples.

Top-k. A row keeps the smallest set of tokens that holds ``mass``, without those below ``floor``, at most ``k``. A
token costs about a byte and a half and saves about p log(p / p_tail) nat, so at a given size a floor on p is near the
best set, and a mass alone spends most on flat rows. Probabilities are rounded to levels whose width in log p grows as
1/√p up to ``_WIDEST``: KL is half of the sum of p times the squared error of log p. The tail's mass is stored the same
way, and decoding scales the listed tokens to hold exactly the rest.

Samples. ``draws`` tokens are drawn from the teacher by systematic sampling (Madow, 1949): one uniform offset, then
every 1/draws of cumulative mass. A token's count is n p rounded up or down, at random with expectation n p, so
``count / n`` is unbiased as in random-sampling distillation (arXiv 2503.16870, which draws independently), with far
less variance: a token of mass ≥ 1/n is never missed. The proposal is the teacher itself at temperature 1; no weight
needs correction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preceptor.cache.decoding_error import LogProbs
from preceptor.cache.rans import Ints
from preceptor.cache.sparse import SparseCodec, SparseRows
from preceptor.knowledge import SampledTargets, TopKTargets

_FINE = 0.05  # width of a level in log p at p = 1


_WIDEST = 0.5


_KNEE = _FINE / _WIDEST  # square root of p where the width stops growing


_LEAST = -23.0  # log p of the last level: 1e-10


MAX_DRAWS = 65536


def level_of(log_p: Tensor) -> Tensor:
    """The level (0 is p = 1) that a log-probability rounds to."""
    fine = (1 - torch.exp(log_p / 2).clamp_min(_KNEE)) * (2 / _FINE)
    coarse = (2 * math.log(_KNEE) - log_p.clamp_min(_LEAST)).clamp_min(0) / _WIDEST
    return (fine + coarse).round().long()


def log_p_of(level: Tensor) -> Tensor:
    """The log-probability in the middle of a level."""
    knee = (1 - _KNEE) * (2 / _FINE)
    level = level.float()
    fine = 2 * torch.log(1 - level.clamp_max(knee) * (_FINE / 2))
    return fine - (level - knee).clamp_min(0) * _WIDEST


LEVELS = int(level_of(torch.tensor(_LEAST))) + 1


@dataclass(frozen=True)
class TopKCodec:
    """Adaptive top-k rows with a tail. ``k``: most tokens of a row; ``mass`` and ``floor``: see the module."""

    sparse: SparseCodec
    k: int
    mass: float
    floor: float

    def decode(self, words: NDArray[np.uint16], lengths: Ints) -> TopKTargets:
        """Targets (N, K), K the longest row's; unused slots hold id 0 and log-probability -inf."""
        return topk_targets(self.sparse.decode(words, lengths))


@dataclass(frozen=True)
class SampledCodec:
    """Rows of samples; ``draws`` of them a row."""

    sparse: SparseCodec
    draws: int

    def decode(self, words: NDArray[np.uint16], lengths: Ints) -> SampledTargets:
        """Targets (N, K), K the most distinct tokens of a row; unused slots hold id 0 and weight 0."""
        return sampled_targets(self.sparse.decode(words, lengths), self.draws)


def topk_rows(teacher: LogProbs, *, k: int, mass: float, floor: float) -> SparseRows:
    """The rows to store of a teacher's distributions."""
    values, ids = teacher.logits.topk(min(k, teacher.logits.shape[-1]), dim=-1)
    values = values - teacher.log_normaliser[:, None]
    p = values.exp()
    before = p.cumsum(-1) - p
    keep = (before < mass) & (p >= floor)
    keep[:, 0] = True
    counts = keep.sum(-1)
    width = int(counts.max())
    tail = (1 - (p * keep).sum(-1)).clamp_min(0)
    listed = ids[:, :width].masked_fill(~keep[:, :width], 0)
    levels = level_of(values[:, :width]).masked_fill(~keep[:, :width], 0)
    extra = level_of(tail.log())
    return SparseRows(*(part.cpu().numpy() for part in (listed, levels, counts, extra)))


def topk_targets(rows: SparseRows) -> TopKTargets:
    """What stored rows decode to: the listed tokens hold exactly one minus the tail's mass."""
    used = torch.arange(rows.ids.shape[1])[None] < torch.from_numpy(rows.counts)[:, None]
    log_p = log_p_of(torch.from_numpy(rows.levels)).masked_fill(~used, -torch.inf)
    extra = torch.from_numpy(rows.extra)
    tail = torch.where(extra >= LEVELS - 1, 0.0, log_p_of(extra).exp()).clamp_max(1 - 1e-4)
    log_p = log_p + (torch.log1p(-tail) - log_p.logsumexp(-1))[:, None]
    return TopKTargets(torch.from_numpy(rows.ids).masked_fill(~used, 0), log_p)


def sampled_rows(p: Tensor, draws: int, offsets: Tensor) -> SparseRows:
    """Systematic samples of probabilities (N, V); ``offsets``: (N,) uniform in [0, 1).

    The level of a token is ``draws`` minus its count.
    """
    cumulative = p.double().cumsum(-1)
    places = torch.arange(draws, device=p.device, dtype=torch.float64) + offsets.to(cumulative)[:, None]
    drawn = torch.searchsorted(cumulative, places * (cumulative[:, -1:] / draws), right=True).clamp_max_(
        p.shape[-1] - 1
    )
    # Draws come sorted by token: each begins a new token or repeats the one before.
    begins = torch.cat([torch.ones_like(drawn[:, :1], dtype=torch.bool), drawn[:, 1:] != drawn[:, :-1]], -1)
    column = begins.cumsum(-1) - 1
    counts = column[:, -1] + 1
    ids = torch.zeros(len(p), int(counts.max()), dtype=torch.int64, device=p.device)
    ids.scatter_(-1, column, drawn)
    times = torch.zeros_like(ids).scatter_add_(-1, column, torch.ones_like(column))
    levels = torch.where(times > 0, draws - times, 0)
    return SparseRows(ids.cpu().numpy(), levels.cpu().numpy(), counts.cpu().numpy(), np.zeros(len(p), np.int64))


def sampled_targets(rows: SparseRows, draws: int) -> SampledTargets:
    """What stored samples decode to: weights ``count / draws``, which sum to 1."""
    used = torch.arange(rows.ids.shape[1])[None] < torch.from_numpy(rows.counts)[:, None]
    weights = (draws - torch.from_numpy(rows.levels)).masked_fill(~used, 0).float() / draws
    return SampledTargets(torch.from_numpy(rows.ids).masked_fill(~used, 0), weights)


def kl_to_topk(teacher: LogProbs, targets: TopKTargets) -> Tensor:
    """KL(teacher ‖ decoded) of each row (N,), the tail's mass spread evenly over the tokens not listed."""
    vocabulary, device = teacher.logits.shape[-1], teacher.logits.device
    targets = TopKTargets(targets.ids.to(device), targets.log_probs.to(device))
    used = targets.log_probs > -torch.inf
    p_listed = teacher.probabilities.gather(-1, targets.ids) * used
    log_tail = torch.log1p(-targets.log_probs.exp().sum(-1).clamp_max(1 - 1e-7))
    each = log_tail - torch.log((vocabulary - used.sum(-1)).clamp_min(1))
    cross = (p_listed * targets.log_probs.masked_fill(~used, 0)).sum(-1) + (1 - p_listed.sum(-1)).clamp_min(0) * each
    return (teacher.negative_entropy - cross).clamp_min(0)


def kl_to_sampled(teacher: LogProbs, targets: SampledTargets, draws: int) -> Tensor:
    """KL(teacher ‖ decoded) of each row (N,), for measuring only: samples say nothing of tokens that were not drawn.

    Tokens drawn once are as many as Good and Turing need to tell the mass of all that were not: that share of the mass
    is spread evenly over the tokens not drawn, and the samples share the rest.
    """
    once = (targets.weights * draws).round() == 1
    missing = (once.sum(-1) / draws).clamp(1 / (2 * draws), 0.999)
    scaled = torch.log(targets.weights) + torch.log1p(-missing)[:, None]
    return kl_to_topk(teacher, TopKTargets(targets.ids, scaled))
