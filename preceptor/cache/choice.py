"""Codecs fitted to a sample of a teacher's outputs, and the choice among the kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from preceptor.cache.codecs import Codec, Kind, encode, kind_of, sparse_rows
from preceptor.cache.decoding_error import LogProbs
from preceptor.cache.hidden import fit_hidden
from preceptor.cache.soft import MAX_DRAWS, SampledCodec, TopKCodec
from preceptor.cache.sparse import SparseCodec, fit_sparse
from preceptor.errors import UserError
from preceptor.knowledge import Head

_FITTED_ON = 512  # rows on which a sparse codec's symbols are counted, and its budget met


_FITTED_BYTES = 256 << 20  # of their distributions, which are kept meanwhile


_LEAST_ROWS = 64


_LEAST_FLOOR = 1e-8


_MEASURED_ON = 512


_BUDGET_ROUNDS = 7


_LENGTH_BYTES = 1  # of a row's length in its sequence's blob


Sparse = TypeVar("Sparse", TopKCodec, SampledCodec)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a codec. Where a parameter is None it follows from the budget, in bytes a token."""

    budget: float
    k: int
    mass: float | None = None
    floor: float | None = None
    draws: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if not self.budget >= 4:
            raise UserError(f"The budget is {self.budget:g} bytes a token; give at least 4.")
        if self.k < 1:
            raise UserError(f"k is {self.k}; a row keeps at least 1 token.")
        for name, value in (("mass", self.mass), ("floor", self.floor)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} is {value:g}; it must lie in (0, 1].")
        if self.draws is not None and not 2 <= self.draws <= MAX_DRAWS:
            raise UserError(f"draws is {self.draws}; give 2 to {MAX_DRAWS}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise UserError(f"The tolerance is {self.tolerance:g} nat; it must be above 0.")


@dataclass(frozen=True)
class Measured:
    """A codec and what it does on rows of the sample: bytes a token, and mean KL(teacher ‖ decoded) in nats."""

    codec: Codec
    bytes: float
    kl: float


def fit(kind: Kind, sample: Tensor, head: Head, wanted: Wanted) -> Codec:
    """A codec of one kind.

    Args:
        kind: top_k, sampled or hidden.
        sample: (N, D) the teacher's last hidden states at response positions, in the order of their sequences.
        head: the teacher's.
        wanted: its parameters, or the budget that they follow from.
    """
    if kind == "hidden":
        return fit_hidden(sample, head, tolerance=wanted.tolerance, budget=wanted.budget)
    count = max(_LEAST_ROWS, min(_FITTED_ON, _FITTED_BYTES // (8 * head.weight.shape[0])))
    part = sample[:: max(1, len(sample) // count)]
    known = LogProbs.of(part, head)
    if kind == "sampled":
        if wanted.draws is not None:
            return _fitted(known, SampledCodec(SparseCodec.empty(wanted.draws), wanted.draws))
        return _within_budget(part, known, head, wanted.budget, _samples, math.log(MAX_DRAWS))
    if wanted.floor is not None or wanted.mass is not None:
        return _fitted(known, TopKCodec(SparseCodec.empty(0), wanted.k, wanted.mass or 1.0, wanted.floor or 0.0))
    return _within_budget(part, known, head, wanted.budget, lambda x: _likeliest(wanted.k, x), -math.log(_LEAST_FLOOR))


def measure(codec: Codec, sample: Tensor, head: Head) -> Measured:
    """What a codec does on rows from the end of a sample."""
    part = sample[-len(sample) // 8 :]
    part = part[:: max(1, len(part) // _MEASURED_ON)]
    encoded = encode(codec, part, head, _offsets(len(part)))
    return Measured(codec, 2 * float(encoded.lengths.mean()) + _LENGTH_BYTES, float(encoded.kl.mean()))


def choose(sample: Tensor, head: Head, wanted: Wanted) -> tuple[Codec, str]:
    """The kind with the least KL(teacher ‖ decoded) at the budget, and one sentence that gives the reason."""
    kinds: tuple[Kind, ...] = ("hidden", "top_k", "sampled")
    tried = [measure(fit(kind, sample, head, wanted), sample, head) for kind in kinds]
    fitting = [one for one in tried if one.bytes <= 1.15 * wanted.budget] or tried
    best = min(fitting, key=lambda one: one.kl)
    others = ", ".join(f"{kind_of(one.codec)} {one.kl:.2g} at {one.bytes:.0f}" for one in tried if one is not best)
    sentence = (
        f"Chosen: {kind_of(best.codec)}, whose KL(teacher ‖ decoded) on the sample is {best.kl:.2g} nat at "
        f"{best.bytes:.0f} bytes a token, against {others}."
    )
    return best.codec, sentence


def _within_budget(
    part: Tensor, known: LogProbs, head: Head, budget: float, make: Callable[[float], Sparse], most: float
) -> Sparse:
    """The largest codec within the budget: ``make(x)`` keeps more the larger x in [log 2, most] is."""
    low, high = math.log(2.0), most
    best = _fitted(known, make(low))
    for _ in range(_BUDGET_ROUNDS):
        middle = (low + high) / 2
        codec = _fitted(known, make(middle))
        lengths = encode(codec, part, head, _offsets(len(part)), known=known).lengths
        if 2 * float(lengths.mean()) + _LENGTH_BYTES <= budget:
            low, best = middle, codec
        else:
            high = middle
    return best


def _fitted(known: LogProbs, blank: Sparse) -> Sparse:
    rows = sparse_rows(blank, known, _offsets(len(known.logits)))
    limit = blank.draws if isinstance(blank, SampledCodec) else 0
    frequency = known.probabilities.mean(0).double().cpu().numpy()
    return replace(blank, sparse=fit_sparse(rows, frequency, limit=limit))


def _samples(x: float) -> SampledCodec:
    draws = round(math.exp(x))
    return SampledCodec(SparseCodec.empty(draws), draws)


def _likeliest(k: int, x: float) -> TopKCodec:
    return TopKCodec(SparseCodec.empty(0), k, 1.0, math.exp(-x))


def _offsets(rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(rows))
