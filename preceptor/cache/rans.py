"""Asymmetric numeral systems over many independent streams at once, vectorised across the streams.

Every row of a cache is a stream (a lane) of its own, so that any row can be read without its neighbours; all the lanes
that a batch needs are decoded in lock-step, one symbol of every lane per NumPy call. Duda, "Asymmetric numeral systems"
(arXiv 1311.2540), range variant: states in [2^16, 2^32), 16-bit words, ``PRECISION`` bits of probability. A lane starts
at state 1 instead of 2^16 and its decoder stops refilling when its words are spent, which saves two bytes a row.

Encoding runs backwards: push what will be read last first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISION = 14


"""Bits of a table's total frequency."""


_TOTAL = 1 << PRECISION


_WORD = np.uint64(16)


_LOW = np.uint64(1 << 16)


Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """Static symbol models. ``frequencies``: (models, symbols) integers, each row summing to ``2**PRECISION``."""

    frequencies: NDArray[np.uint16]
    starts: NDArray[np.uint64]
    widths: NDArray[np.uint64]
    symbols: NDArray[np.uint8]

    @staticmethod
    def of(frequencies: NDArray[np.uint16]) -> Tables:
        """Prepare the lookups. Raises ValueError where a row does not sum to ``2**PRECISION``."""
        wide = frequencies.astype(np.int64)
        if frequencies.ndim != 2 or wide.shape[1] > 256 or (wide.sum(1) != _TOTAL).any():
            raise ValueError(f"every model's frequencies must sum to {_TOTAL}, with at most 256 symbols")
        starts = np.cumsum(wide, 1) - wide
        symbols = np.stack([np.repeat(np.arange(wide.shape[1]), row) for row in wide]).astype(np.uint8)
        return Tables(frequencies, starts.astype(np.uint64), wide.astype(np.uint64), symbols)

    def bits(self) -> NDArray[np.float64]:
        """What each symbol costs under each model, in bits; infinite where it cannot be coded."""
        with np.errstate(divide="ignore"):
            return PRECISION - np.log2(self.frequencies.astype(np.float64))


def quantise_frequencies(weights: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Scale rows of positive weights to integers of at least 1 that sum to ``2**PRECISION``."""
    share = weights / weights.sum(1, keepdims=True)
    whole: Ints = 1 + np.floor(share * (_TOTAL - weights.shape[1])).astype(np.int64)
    # What rounding left over goes to the likeliest symbol, where it changes the code length least.
    whole[np.arange(len(whole)), share.argmax(1)] += _TOTAL - whole.sum(1)
    narrow: NDArray[np.uint16] = whole.astype(np.uint16)
    return narrow


class RansEncoder:
    """``lanes`` streams being written, last symbol first."""

    def __init__(self, lanes: int, words: int) -> None:
        """``words``: 16-bit words to start with for a lane; the buffer grows when a lane needs more."""
        self._state = np.ones(lanes, np.uint64)
        self._words = np.zeros((lanes, max(words, 4)), np.uint16)
        self._used = np.zeros(lanes, np.int64)

    def push(self, tables: Tables, model: Ints, symbol: Ints, lanes: Ints | slice = slice(None)) -> None:
        """Write one symbol under one model on each of ``lanes``."""
        self._put(lanes, tables.starts[model, symbol], tables.widths[model, symbol], np.uint64(PRECISION))

    def push_raw(self, value: Ints, bits: Ints | int, lanes: Ints | slice = slice(None)) -> None:
        """Write ``bits`` (0 to 16) equiprobable bits of ``value`` on each of ``lanes``."""
        self._put(lanes, value.astype(np.uint64), np.uint64(1), np.asarray(bits, np.uint64))

    def _put(self, lanes: Ints | slice, start: NDArray[np.uint64], width: NDArray[np.uint64] | np.uint64,
             precision: NDArray[np.uint64] | np.uint64) -> None:  # fmt: skip
        state = self._state[lanes]
        full = state >= (width << (np.uint64(32) - precision))
        if full.any():
            which = (np.arange(len(self._state)) if isinstance(lanes, slice) else lanes)[full]
            if self._used[which].max() >= self._words.shape[1]:
                self._words = np.concatenate([self._words, np.zeros_like(self._words)], 1)
            self._words[which, self._used[which]] = (state[full] & np.uint64(0xFFFF)).astype(np.uint16)
            self._used[which] += 1
            state = np.where(full, state >> _WORD, state)
        self._state[lanes] = (state // width << precision) + state % width + start

    def finish(self) -> tuple[NDArray[np.uint16], Ints]:
        """Words of all lanes one after the other, and how many words each lane has."""
        high = self._state >> _WORD
        lengths = self._used + 1 + (high > 0)
        out = np.zeros((len(lengths), self._words.shape[1] + 2), np.uint16)
        column = np.arange(out.shape[1])[None]
        # A decoder reads its words in the reverse of the order in which they were written, the state first.
        two = (high > 0).astype(np.int64)
        back = lengths[:, None] - 1 - column
        taken = np.take_along_axis(self._words, np.clip(back, 0, self._words.shape[1] - 1), 1)
        out = np.where(back >= 0, taken, out)
        out[:, 0] = np.where(two, high, self._state & np.uint64(0xFFFF)).astype(np.uint16)
        rows = np.nonzero(two)[0]
        out[rows, 1] = (self._state[rows] & np.uint64(0xFFFF)).astype(np.uint16)
        return out[column < lengths[:, None]], lengths


class Decoder:
    """Streams being read in lock-step."""

    def __init__(self, words: NDArray[np.uint16], lengths: Ints) -> None:
        """``words``: the lanes one after the other; ``lengths``: words of each lane."""
        ends = np.cumsum(lengths)
        starts = ends - lengths
        # One word of padding lets every lane look ahead without a bounds check.
        self._words = np.concatenate([words, np.zeros(2, np.uint16)]).astype(np.uint64)
        self._ends = ends
        first = self._words[starts]
        # A lane that was never renormalised can be one word long; any other lane opens with two words of state.
        long = lengths > 1
        self._state = np.where(long, (first << _WORD) | self._words[np.minimum(starts + 1, len(words))], first)
        self._next = starts + 1 + long

    def reorder(self, order: Ints) -> None:
        """Renumber the lanes: lane ``i`` becomes what ``order[i]`` was."""
        self._state, self._next, self._ends = self._state[order], self._next[order], self._ends[order]

    def pull(self, tables: Tables, model: Ints, lanes: slice = slice(None)) -> Ints:
        """Read one symbol under one model from each of ``lanes``."""
        state = self._state[lanes]
        slot = state & np.uint64(_TOTAL - 1)
        symbol: Ints = tables.symbols[model, slot].astype(np.int64)
        state = tables.widths[model, symbol] * (state >> np.uint64(PRECISION)) + slot - tables.starts[model, symbol]
        self._refill(state, lanes)
        return symbol

    def pull_raw(self, bits: Ints | int, lanes: Ints | slice = slice(None)) -> Ints:
        """Read ``bits`` (0 to 16) equiprobable bits from each of ``lanes``."""
        count = np.asarray(bits, np.uint64)
        state = self._state[lanes]
        value: Ints = (state & ((np.uint64(1) << count) - np.uint64(1))).astype(np.int64)
        self._refill(state >> count, lanes)
        return value

    def _refill(self, state: NDArray[np.uint64], lanes: Ints | slice) -> None:
        at = self._next[lanes]
        need = (state < _LOW) & (at < self._ends[lanes])
        self._state[lanes] = np.where(need, (state << _WORD) | self._words[at], state)
        self._next[lanes] = at + need
