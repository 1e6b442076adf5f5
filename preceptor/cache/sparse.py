"""Rows of a few tokens each, coded compactly: which tokens, and a small integer (a level) for each.

Both sparse kinds are such rows. Tokens are named by their rank of frequency on the sample; every integer is coded in
bins of four to the octave with raw low bits. A row is sorted by level, and by rank within a level, so that levels are
coded as differences (under the level before) and ranks within a level as gaps: an order that carries no information
costs no bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from preceptor.cache.rans import Decoder, Ints, RansEncoder, Tables, quantise_frequencies

_BINS = 72  # enough for integers below 2**19


_PLACES = 32  # models of a rank, by its place in the row; as many again for gaps


@dataclass(frozen=True)
class SparseRows:
    """``ids``: (N, K) tokens; ``levels``: (N, K) from 0; ``counts``: (N,) how many of the K are used; ``extra``: (N,).

    ``extra`` is one more small integer a row (the level of the tail's mass).
    """

    ids: Ints
    levels: Ints
    counts: Ints
    extra: Ints


@dataclass(frozen=True)
class SparseCodec:
    """Symbol models and the order of tokens, the cache's codebook.

    ``order``: (V,) tokens by frequency. ``limit``: the level whose distance tells how the next level will differ.
    """

    order: Ints
    limit: int
    counts: Tables
    extra: Tables
    first: Tables
    differences: Tables
    ranks: Tables

    @staticmethod
    def empty(limit: int) -> SparseCodec:
        """A codec that has seen nothing yet and codes nothing."""
        blank = _counted(np.zeros(0, np.int64))
        return SparseCodec(np.zeros(0, np.int64), limit, blank, blank, blank, blank, blank)

    def encode(self, rows: SparseRows) -> tuple[NDArray[np.uint16], Ints]:
        """Words of all rows one after the other, and words of each row."""
        ranks, levels = self._sorted(rows)
        lanes, active = _by_count(rows.counts)
        encoder = RansEncoder(len(rows.counts), 32)
        for place in range(int(rows.counts.max()) - 1, -1, -1):
            on = lanes[: active[place]]
            model, value = _rank_symbol(ranks, levels, place, on)
            _push(encoder, self.ranks, model, value, on)
            if place:
                before = levels[on, place - 1]
                _push(encoder, self.differences, self._after(before), levels[on, place] - before, on)
        none, every = np.zeros(len(lanes), np.int64), np.arange(len(lanes))
        for tables, value in ((self.first, levels[:, 0]), (self.extra, rows.extra), (self.counts, rows.counts - 1)):
            _push(encoder, tables, none, value, every)
        return encoder.finish()

    def decode(self, words: NDArray[np.uint16], lengths: Ints) -> SparseRows:
        """The rows whose words stand one after the other; K is the largest count among them."""
        decoder = Decoder(words, lengths)
        none = np.zeros(len(lengths), np.int64)
        every = slice(None)
        counts = _pull(decoder, self.counts, none, every) + 1
        extra = _pull(decoder, self.extra, none, every)
        level = _pull(decoder, self.first, none, every)
        lanes, active = _by_count(counts)
        decoder.reorder(lanes)
        ranks = np.zeros((len(lanes), int(counts.max())), np.int64)
        levels = np.zeros_like(ranks)
        levels[:, 0] = level[lanes]
        for place, count in enumerate(active):
            on = slice(0, count)
            same = np.zeros(count, bool)
            if place:
                before = levels[on, place - 1]
                levels[on, place] = before + _pull(decoder, self.differences, self._after(before), on)
                same = levels[on, place] == before
            value = _pull(decoder, self.ranks, _rank_model(place, same), on)
            ranks[on, place] = np.where(same, ranks[on, place - 1] + 1 + value, value)
        back = np.argsort(lanes)
        return SparseRows(self.order[ranks[back]], levels[back], counts, extra)

    def _after(self, level: Ints) -> Ints:
        return _binned(np.abs(self.limit - level))[0]

    def _sorted(self, rows: SparseRows) -> tuple[Ints, Ints]:
        rank = np.empty_like(self.order)
        rank[self.order] = np.arange(len(self.order))
        return _sort(rank[rows.ids], rows)


def fit_sparse(sample: SparseRows, frequency: NDArray[np.float64], *, limit: int) -> SparseCodec:
    """A codec for rows like those of a sample.

    Args:
        sample: rows to count symbols on.
        frequency: (V,) how likely each token is on the sample, for those that it does not list.
        limit: see ``SparseCodec``.
    """
    used = np.arange(sample.ids.shape[1])[None] < sample.counts[:, None]
    listed = np.bincount(sample.ids[used], minlength=len(frequency)) + frequency / max(frequency.max(), 1e-30)
    order = np.argsort(-listed, kind="stable").astype(np.int64)
    codec = replace(SparseCodec.empty(limit), order=order)
    ranks, levels = codec._sorted(sample)
    lanes, active = _by_count(sample.counts)
    of_rank, of_difference = np.full((2 * _PLACES, _BINS), 0.05), np.full((_BINS, _BINS), 0.02)
    for place, count in enumerate(active):
        on = lanes[:count]
        model, value = _rank_symbol(ranks, levels, place, on)
        np.add.at(of_rank, (model, _binned(value)[0]), 1)
        if place:
            before = levels[on, place - 1]
            np.add.at(of_difference, (codec._after(before), _binned(levels[on, place] - before)[0]), 1)
    return replace(
        codec,
        counts=_counted(sample.counts - 1),
        extra=_counted(sample.extra),
        first=_counted(levels[:, 0]),
        differences=Tables.of(quantise_frequencies(of_difference)),
        ranks=Tables.of(quantise_frequencies(of_rank)),
    )


def _counted(values: Ints) -> Tables:
    return Tables.of(quantise_frequencies(np.bincount(_binned(values.reshape(-1))[0], minlength=_BINS)[None] + 0.05))


def _sort(ranks: Ints, rows: SparseRows) -> tuple[Ints, Ints]:
    used = np.arange(ranks.shape[1])[None] < rows.counts[:, None]
    key = np.where(used, rows.levels * (1 << 32) + ranks, np.iinfo(np.int64).max)
    by = np.argsort(key, axis=1, kind="stable")
    return np.take_along_axis(ranks, by, 1), np.take_along_axis(rows.levels, by, 1)


def _by_count(counts: Ints) -> tuple[Ints, list[int]]:
    """Rows with the most tokens first, and how many rows have a token at each place."""
    lanes = np.argsort(-counts, kind="stable")
    places = np.arange(int(counts.max()))
    active = len(counts) - np.searchsorted(np.sort(counts), places, side="right")
    return lanes, active.tolist()


def _rank_symbol(ranks: Ints, levels: Ints, place: int, on: Ints) -> tuple[Ints, Ints]:
    if not place:
        return _rank_model(0, np.zeros(len(on), bool)), ranks[on, 0]
    same = levels[on, place] == levels[on, place - 1]
    return _rank_model(place, same), np.where(same, ranks[on, place] - ranks[on, place - 1] - 1, ranks[on, place])


def _rank_model(place: int, same: NDArray[np.bool_]) -> Ints:
    bin_of_place = int(_binned(np.array([place]))[0][0])
    return min(bin_of_place, _PLACES - 1) + _PLACES * same.astype(np.int64)


def _binned(value: Ints) -> tuple[Ints, Ints, Ints]:
    """Bin of a non-negative integer, how many low bits it leaves, and these bits: 0..7 alone, then 4 bins an octave."""
    octave = np.maximum(np.frexp(value.astype(np.float64))[1] - 1, 2).astype(np.int64)
    low = octave - 2
    symbol = np.where(value < 8, value, 4 * octave - 8 + (value >> low))
    low = np.where(value < 8, 0, low)
    return symbol, low, value & ((1 << low) - 1)


def _push(encoder: RansEncoder, tables: Tables, model: Ints, value: Ints, lanes: Ints) -> None:
    symbol, low, rest = _binned(value)
    encoder.push_raw(rest, low, lanes)
    encoder.push(tables, model, symbol, lanes)


def _pull(decoder: Decoder, tables: Tables, model: Ints, lanes: slice) -> Ints:
    symbol = decoder.pull(tables, model, lanes)
    low = np.where(symbol < 8, 0, (symbol - 4) // 4)
    rest = decoder.pull_raw(low, lanes) if low.any() else np.int64(0)
    return np.where(symbol < 8, symbol, (symbol - 4 * low) << low) + rest
