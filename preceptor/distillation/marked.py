"""Batches that mark which answers were given and which the student wrote, and where their phrases lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Listed
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class MarkedBatch:
    """A batch with labels for the given answers only, and with its pairs of neighbouring tokens in a phrase.

    ``labels``: int64 (B, T), the batch's own where the answer was given, -100 where the student wrote it. ``pairs``:
    int64 (pairs,), i of each (i, i + 1), counted over the rows that ``text.predicts`` selects.
    """

    text: Batch
    labels: Tensor
    pairs: Tensor

    def to(self, device: torch.device | str) -> MarkedBatch:
        """The same batch on a device."""
        return MarkedBatch(self.text.to(device), self.labels.to(device), self.pairs.to(device))


@dataclass(frozen=True)
class MarkedSequence:
    """A sequence, whether its answer was given (not written by the student), and its pairs."""

    sequence: Sequence
    given: bool
    pairs: tuple[int, ...]


@dataclass
class Marker:
    """Marks sequences for a student; the phrases of a given answer are found once and kept.

    ``find_pairs``: the pairs of a sequence; None where no phrases are needed.
    """

    student: LanguageModel
    find_pairs: Callable[[Sequence], tuple[int, ...]] | None = None
    known: dict[Sequence, tuple[int, ...]] = field(default_factory=dict)

    def mark(self, sequences: Listed[Sequence], *, given: Listed[Sequence]) -> list[MarkedSequence]:
        """The sequences with their pairs; those that are objects of ``given`` are marked as given."""
        known = {id(sequence) for sequence in given}
        return [self._marked(sequence, given=id(sequence) in known) for sequence in sequences]

    def _marked(self, sequence: Sequence, *, given: bool) -> MarkedSequence:
        pairs = self.known.get(sequence)
        if pairs is None:
            pairs = () if self.find_pairs is None else self.find_pairs(sequence)
        if given:
            self.known[sequence] = pairs
        return MarkedSequence(sequence, given, pairs)

    def collate(self, marked: Listed[MarkedSequence]) -> MarkedBatch:
        """A batch of marked sequences, padded on the right."""
        text = collate([one.sequence for one in marked], self.student.pad_id)
        given = torch.tensor([one.given for one in marked]).unsqueeze(-1)
        starts = [0, *text.predicts.sum(-1).cumsum(0).tolist()]
        places = [start + first for start, one in zip(starts, marked) for first in one.pairs]
        return MarkedBatch(text, text.labels.masked_fill(~given, -100), torch.tensor(places, dtype=torch.int64))
