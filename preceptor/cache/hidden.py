"""Hidden states quantised where the head looks.

KL(teacher ‖ decoded) is quadratic in a small error e of the last hidden state: ½ eᵀ M e with the Fisher metric of the
head, M = E[Wᵀ (diag p - p pᵀ) W]. The states are centred and transformed by T = Uᵀ M^½, where U diagonalises their
covariance in that metric: now equal squared errors cost equal KL and the coordinates are uncorrelated, so one step for
all of them is what reverse water-filling asks for (Cover & Thomas, §10.3), and coordinates below the step cost nothing.
Coordinates are rounded to the step and entropy-coded under the distribution of their ratio of spread to step, measured
on the sample.

The metric is an average, so each row has a step of its own: the largest, in quarters of an octave, that keeps the row's
*measured* KL(teacher ‖ decoded) within the tolerance. That is the stated error of this kind: no row exceeds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preceptor.cache.decoding_error import LogProbs, chunks, kl_to_hidden
from preceptor.cache.rans import Decoder, Ints, RansEncoder, Tables, quantise_frequencies
from preceptor.knowledge import Head
from preceptor.models.language_model import project

STEPS = 96


"""Row steps: ``2**(r/4)`` of the finest, r < STEPS."""


_PER_OCTAVE = 4


_DEAD = -20  # quarter octaves of spread over step under which a coordinate is always 0: a step 32 times the spread


_RAW = 12  # ... over which the low bits are stored as they are: they are uniform to 1e-4


_CONTEXTS = _RAW - _DEAD + 1


_REACH = 63  # largest coded integer; the symbol 2 * _REACH + 1 announces 16 raw bits


_ESCAPE = 2 * _REACH + 1


_FINEST = 2.0**-14  # finest step in units of sqrt(2 nat): KL is about half the squared error


_ROUNDS = 8


_LIKELIEST = 4096  # tokens on which a row's step is looked for before it is checked on all of them


_BLUR = np.array([0.02, 0.1, 0.3, 1, 0.3, 0.1, 0.02])  # of the counts of row steps


_FITTED_ON = 1024  # rows for symbol models and budget, twice as many for the metric


_FIRST_TOLERANCE = 0.01


_LEAST_TOLERANCE = 1e-6  # below it a KL of float32 logits is noise


_BUDGET_ROUNDS = 4


_OVERHEAD = 2.5  # bytes a row: its length, and the last word of its stream


@dataclass(frozen=True)
class HiddenCodec:
    """Encodes and decodes rows of hidden states. Made by ``fit_hidden``; its tensors are the cache's codebook.

    ``mean``: (D,). ``inverse``: (D, D), from coordinates to states: ``h = y @ inverse + mean``. ``spread``: (D,) int64,
    quarter octaves of each coordinate's standard deviation over the finest step, descending. ``steps`` and
    ``coordinates`` are the symbol models of the row's step and of the coordinates.
    """

    mean: Tensor
    forward: Tensor
    inverse: Tensor
    spread: Ints
    steps: Tables
    coordinates: Tables
    tolerance: float
    """Largest KL(teacher ‖ decoded) of a row, in nats."""

    def encode(
        self, hidden: Tensor, head: Head, known: LogProbs | None = None
    ) -> tuple[NDArray[np.uint16], Ints, Tensor]:
        """Words of all rows, words of each row, and each row's KL(teacher ‖ decoded), measured.

        Args:
            hidden: (N, D) float32.
            head: the teacher's.
            known: their distributions, where they are there already.
        """
        rounded, step, kl = self.quantise(hidden, head, known)
        words, lengths = self._write(rounded, step)
        return words, lengths, kl

    def decode(self, words: NDArray[np.uint16], lengths: Ints) -> Tensor:
        """The hidden states (N, D), float32, of rows whose words stand one after the other."""
        rounded, step = self._read(words, lengths)
        return self._restore(torch.from_numpy(rounded), torch.from_numpy(step))

    def bits(self, rounded: Ints, step: Ints) -> NDArray[np.float64]:
        """Code length of each row in bits, without the rounding to words."""
        cost = self.coordinates.bits()
        total: NDArray[np.float64] = self.steps.bits()[0, step]
        for place in range(rounded.shape[1]):
            model, low = _context(self.spread[place] - step)
            symbol, _ = _split(rounded[:, place], low)
            total = total + np.where(model >= 0, cost[np.maximum(model, 0), symbol] + low + 16 * (symbol == _ESCAPE), 0)
        return total

    def _restore(self, rounded: Tensor, step: Tensor) -> Tensor:
        scale = (_FINEST * torch.exp2(step.float() / _PER_OCTAVE)).to(self.mean.device)
        return (rounded.float() * scale[:, None]) @ self.inverse + self.mean

    def _round(self, turned: Tensor, step: Tensor) -> Tensor:
        scale = (_FINEST * torch.exp2(step.float() / _PER_OCTAVE)).to(turned.device)
        alive = (torch.from_numpy(self.spread)[None] - step[:, None] >= _DEAD).to(turned.device)
        # An escape holds 16 bits of what is left over the low bits; nothing real comes near.
        return ((turned / scale[:, None]).round().clamp(-30000, 30000) * alive).to(torch.int32)

    def quantise(self, hidden: Tensor, head: Head, known: LogProbs | None = None) -> tuple[Ints, Ints, Tensor]:
        """Integers (N, D), the step of each row, and its KL(teacher ‖ decoded)."""
        mean, forward, inverse = (part.to(hidden.device) for part in (self.mean, self.forward, self.inverse))
        codec = replace(self, mean=mean, forward=forward, inverse=inverse)
        rounded, steps, kls = [], [], []
        guess = STEPS // 2
        for piece in chunks(len(hidden), head):
            part = hidden[piece].float()
            turned = (part - codec.mean) @ codec.forward
            teacher = LogProbs.of(part, head) if known is None else known.of_rows(piece)
            few, ids = teacher.likeliest(_LIKELIEST)
            narrow = replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])
            near, _ = codec._search(turned, few, narrow, torch.full((len(part),), guess))
            step, kl = codec._search(turned, teacher, head, near)
            guess = int(step.median())
            rounded.append(codec._round(turned, step).cpu())
            steps.append(step)
            kls.append(kl)
        return torch.cat(rounded).numpy().astype(np.int64), torch.cat(steps).numpy(), torch.cat(kls)

    def _search(self, turned: Tensor, teacher: LogProbs, head: Head, step: Tensor) -> tuple[Tensor, Tensor]:
        """The coarsest step of each row whose measured KL is within the tolerance, and that KL.

        KL grows with the square of the step; each measurement proposes the next. The finest step is taken as it is.
        """

        def measured(rows: Tensor, now: Tensor) -> Tensor:
            where = rows.to(turned.device)
            return kl_to_hidden(teacher, where, self._restore(self._round(turned[where], now), now), head).cpu()

        good, bad = torch.zeros_like(step), torch.full_like(step, STEPS)
        kept = torch.full(step.shape, math.nan)
        rows = torch.arange(len(step))
        for _ in range(_ROUNDS):
            now = step[rows]
            kl = measured(rows, now)
            fits = kl <= self.tolerance
            better = fits & (now >= good[rows])
            good[rows[better]], kept[rows[better]] = now[better], kl[better]
            bad[rows[~fits]] = torch.minimum(bad[rows[~fits]], now[~fits])
            move = torch.floor(2 * torch.log2(self.tolerance / kl.clamp_min(1e-12))).long()
            step[rows] = torch.minimum(torch.maximum(now + move, good[rows] + 1), bad[rows] - 1)
            # Settled: the next step is known to fail, or KL is within a quarter octave of step of the tolerance.
            rows = rows[(bad[rows] - good[rows] > 1) & ~(fits & (move <= 0))]
            if not len(rows):
                break
        lost = torch.isnan(kept).nonzero()[:, 0]
        if len(lost):
            kept[lost] = measured(lost, good[lost])
        return good, kept

    def _order(self, step: Ints) -> tuple[Ints, list[int]]:
        """Rows with the finest step first, and how many of them have each coordinate alive."""
        order = np.argsort(step, kind="stable")
        alive = np.searchsorted(step[order], self.spread - _DEAD, side="right")
        return order, alive.tolist()

    def _write(self, rounded: Ints, step: Ints) -> tuple[NDArray[np.uint16], Ints]:
        order, alive = self._order(step)
        encoder = RansEncoder(len(step), 64)
        for place in range(rounded.shape[1] - 1, -1, -1):
            count = alive[place]
            if not count:
                continue
            lanes = order[:count]
            model, low = _context(self.spread[place] - step[lanes])
            symbol, rest = _split(rounded[lanes, place], low)
            wide = symbol == _ESCAPE
            if wide.any():
                over = (rounded[lanes, place] + (1 << low >> 1)) >> low
                encoder.push_raw((over[wide] + 32768).astype(np.int64), 16, lanes[wide])
            if low.any():
                encoder.push_raw(rest, low, lanes)
            encoder.push(self.coordinates, model, symbol, lanes)
        encoder.push(self.steps, np.zeros(len(step), np.int64), step)
        return encoder.finish()

    def _read(self, words: NDArray[np.uint16], lengths: Ints) -> tuple[NDArray[np.int32], Ints]:
        decoder = Decoder(words, lengths)
        step = decoder.pull(self.steps, np.zeros(len(lengths), np.int64))
        order, alive = self._order(step)
        decoder.reorder(order)
        sorted_step = step[order]
        out = np.zeros((len(self.spread), len(step)), np.int32)
        for place, count in enumerate(alive):
            if not count:
                continue
            lanes = slice(0, count)
            model, low = _context(self.spread[place] - sorted_step[lanes])
            symbol = decoder.pull(self.coordinates, model, lanes)
            value = symbol - _REACH
            rest = decoder.pull_raw(low, lanes) if low.any() else np.int64(0)
            wide = np.nonzero(symbol == _ESCAPE)[0]
            if len(wide):
                value[wide] = decoder.pull_raw(16, wide) - 32768
            out[place, :count] = (value << low) + rest - (1 << low >> 1)
        rounded = np.empty((len(step), len(self.spread)), np.int32)
        rounded[order] = out.T
        return rounded, step


def _context(ratio: Ints) -> tuple[Ints, Ints]:
    """The symbol model for a spread over the step (quarter octaves), -1 where dead, and how many low bits are raw."""
    low = np.maximum(0, -((_RAW - ratio) // _PER_OCTAVE))
    return np.maximum(ratio - low * _PER_OCTAVE - _DEAD, -1), low


def _split(value: Ints, low: Ints) -> tuple[Ints, Ints]:
    """The coded symbol of an integer and its low bits."""
    moved = value + (1 << low >> 1)
    high = moved >> low
    return np.where(np.abs(high) <= _REACH, high + _REACH, _ESCAPE), moved & ((1 << low) - 1)


def fit_hidden(sample: Tensor, head: Head, *, tolerance: float | None, budget: float) -> HiddenCodec:
    """A codec for a teacher's hidden states.

    Symbol models and tolerance are found on the last quarter of the sample, under a transform fitted on the rest, for
    codes are shorter on the rows that a transform was fitted on; at the end it is fitted on all.

    Args:
        sample: (N, D) hidden states in the order of their sequences, many times as many as they are wide.
        head: the teacher's.
        tolerance: largest KL of a row in nats; None finds the one that meets the budget on the sample.
        budget: bytes a token.
    """
    cut = len(sample) * 3 // 4
    metric = _metric(_thinned(sample.float(), 2 * _FITTED_ON), head)
    rest = _thinned(sample[cut:], _FITTED_ON).float()
    flat = Tables.of(quantise_frequencies(np.ones((1, STEPS))))
    fitted = _transform(sample[:cut].float(), metric)
    codec = HiddenCodec(*fitted, flat, _gaussian_tables(), tolerance or _FIRST_TOLERANCE)
    tried: list[tuple[float, float]] = []
    for _ in range(1 if tolerance else _BUDGET_ROUNDS):
        rounded, step, _ = codec.quantise(rest, head)
        codec = _counted(codec, rounded, step)
        if tolerance is None:
            tried.append((codec.bits(rounded, step).mean() / 8 + _OVERHEAD, math.log2(codec.tolerance)))
            codec = replace(codec, tolerance=max(2 ** _aimed(tried, budget, len(codec.spread)), _LEAST_TOLERANCE))
    mean, forward, inverse, spread = _transform(sample.float(), metric)
    return replace(codec, mean=mean, forward=forward, inverse=inverse, spread=spread)


def _aimed(tried: list[tuple[float, float]], budget: float, width: int) -> float:
    """The logarithm of the tolerance (base 2) that meets the budget: the secant through the two nearest tries.

    ``tried``: bytes and logarithms. A coordinate costs half a bit more when KL is halved; two thirds of them count
    where there is no second try yet.
    """
    (size, log), *others = sorted(tried, key=lambda one: abs(one[0] - budget))
    slope = -width / 24
    if others and others[0][1] != log:
        slope = min((others[0][0] - size) / (others[0][1] - log), slope / 8)
    return log + min(max((budget - size) / slope, -10), 10)


def _thinned(rows: Tensor, count: int) -> Tensor:
    return rows[:: max(1, len(rows) // count)]


def _counted(codec: HiddenCodec, rounded: Ints, step: Ints) -> HiddenCodec:
    """The codec with symbol models counted on rows that it quantised, the Gaussian ones as prior."""
    counts = _gaussian_tables().frequencies.astype(np.float64) / 64
    for place in range(rounded.shape[1]):
        model, low = _context(codec.spread[place] - step)
        symbol, _ = _split(rounded[:, place], low)
        np.add.at(counts, (np.maximum(model, 0), symbol), model >= 0)
    seen = np.convolve(np.bincount(step, minlength=STEPS), _BLUR, mode="same") + 1e-3
    steps, coordinates = quantise_frequencies(seen[None]), quantise_frequencies(counts)
    return replace(codec, steps=Tables.of(steps), coordinates=Tables.of(coordinates))


def _gaussian_tables() -> Tables:
    """Rounded Gaussians of every ratio of spread to step."""
    edges = np.arange(-_REACH, _REACH + 2) - 0.5
    rows = []
    for context in range(_CONTEXTS):
        ratio = 2.0 ** ((context + _DEAD) / _PER_OCTAVE)
        below = np.array([0.5 * (1 + math.erf(edge / ratio / math.sqrt(2))) for edge in edges])
        rows.append(np.append(np.diff(below), 1e-5))
    weights = np.array(rows) * (1 << 14)
    return Tables.of(quantise_frequencies(weights))


def _metric(hidden: Tensor, head: Head) -> Tensor:
    """(D, D) float64: E[Wᵀ J (diag p - p pᵀ) J W], J the slope of the head's scale and soft cap."""
    weight = head.weight.float()
    mass = torch.zeros(weight.shape[0], device=weight.device)
    means = []
    for piece in chunks(len(hidden), head):
        logits = project(hidden[piece], head).float()
        slope = head.scale * (1 - (logits / head.softcap) ** 2) if head.softcap else head.scale
        p = logits.softmax(-1)
        mass += (p * slope * slope).sum(0)
        means.append((p * slope) @ weight)
    mean = torch.cat(means).double()
    return ((weight.T * mass) @ weight).double() / len(hidden) - mean.T @ mean / len(hidden)


def _transform(hidden: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor, Ints]:
    """Mean, the (D, D) matrices to coordinates and back (rows times matrix), and the spread of coordinates."""
    values, vectors = torch.linalg.eigh(metric)
    # Directions that the head does not see at all are kept invertible.
    root = values.clamp_min(float(values.max()) * 1e-9).sqrt()
    half = vectors * root @ vectors.T
    mean = hidden.mean(0)
    states = (hidden - mean).double()
    covariance = half @ (states.T @ states / max(1, len(states) - 1)) @ half
    power, axes = torch.linalg.eigh(covariance)
    order = power.argsort(descending=True)
    axes, power = axes[:, order], power[order]
    forward = half @ axes
    inverse = axes.T @ (vectors / root @ vectors.T)
    deviation = power.clamp_min(float(power.max()) * 1e-12).sqrt().cpu().numpy()
    spread = np.round(_PER_OCTAVE * np.log2(deviation / _FINEST)).astype(np.int64)
    return mean, forward.float(), inverse.float(), spread
