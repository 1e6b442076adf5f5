"""Batches that know their phrases, and which answers were given and which the student wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Listed
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preceptor.data.sequences import Batch, Sequence, collate
from preceptor.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Phrased:
    """A batch; its labels (B, T), which are -100 in what the student wrote; its pairs of neighbours in a phrase.

    ``pairs``: int64 (pairs,), i of each (i, i + 1), counted over the rows that ``text.predicts`` selects.
    """

    text: Batch
    labels: Tensor
    pairs: Tensor

    def to(self, device: torch.device | str) -> Phrased:
        """The same on a device."""
        return Phrased(self.text.to(device), self.labels.to(device), self.pairs.to(device))


@dataclass(frozen=True)
class Lesson:
    """A sequence, whether its answer was given (not written by the student), and its pairs."""

    sequence: Sequence
    given: bool
    pairs: tuple[int, ...]


@dataclass
class Reader:
    """Finds the phrases of sequences, once for each that was given; without a chunker there are none."""

    student: LanguageModel
    find_pairs: Callable[[Sequence], tuple[int, ...]] | None
    known: dict[Sequence, tuple[int, ...]] = field(default_factory=dict)

    def lesson(self, sequence: Sequence, *, given: bool) -> Lesson:
        """One sequence with its pairs; those of a given one are kept."""
        found = self.known.get(sequence)
        if found is None:
            found = () if self.find_pairs is None else self.find_pairs(sequence)
        if given:
            self.known[sequence] = found
        return Lesson(sequence, given, found)

    def collate(self, lessons: Listed[Lesson]) -> Phrased:
        """A batch of lessons, padded on the right."""
        text = collate([lesson.sequence for lesson in lessons], self.student.pad_id)
        given = torch.tensor([lesson.given for lesson in lessons]).unsqueeze(-1)
        begins = [0, *text.predicts.sum(-1).cumsum(0).tolist()]
        places = [begin + first for begin, lesson in zip(begins, lessons) for first in lesson.pairs]
        return Phrased(text, text.labels.masked_fill(~given, -100), torch.tensor(places, dtype=torch.int64))
