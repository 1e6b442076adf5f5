"""Soft targets out of a cache, for training."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preceptor.cache.codecs import Codec, decode
from preceptor.cache.header import Header, load
from preceptor.cache.store import Shelf, unpack
from preceptor.data.sequences import Batch, Sequence, sequence_key
from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.knowledge import Head, SoftTargets, moved
from preceptor.models.language_model import LanguageModel


class Cache:
    """A teacher's targets, found by the content of token sequences. ``CachedTeacher(cache)`` is a teacher.

    Open it with ``Cache.open``. ``len`` counts sequences.
    """

    def __init__(self, header: Header, codec: Codec, head: Head | None, shelf: Shelf) -> None:
        self.header = header
        self._codec = codec
        self._head = head
        self._shelf = shelf
        self._device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Cache:
        """Keep the teacher's head on a device, and give targets there from now on."""
        self._device = torch.device(device)
        if self._head is not None:
            bias = self._head.bias
            weight = self._head.weight.to(self._device)
            self._head = replace(self._head, weight=weight, bias=None if bias is None else bias.to(self._device))
        return self

    @staticmethod
    def open(folder: str | Path, *, tokenizer: Tokenizer | None = None, teacher: LanguageModel | None = None) -> Cache:
        """The cache in a folder; what is already there can be read while a capture goes on.

        Args:
            folder: as given to ``preceptor cache``.
            tokenizer: the student's, to be checked against the cache.
            teacher: a model that must be the one whose targets these are.

        Raises:
            UserError: no cache, another format, tokenizer, chat template or teacher, or damaged files.
        """
        path = Path(folder)
        header = Header.read(path)
        if tokenizer is not None:
            header.check_tokenizer(tokenizer)
        if teacher is not None:
            header.check_teacher(teacher)
        codec, head = load(path, header)
        return Cache(header, codec, head, Shelf(path))

    def __len__(self) -> int:
        return len(self._shelf)

    def missing(self, sequences: Listed[Sequence]) -> int:
        """How many of the sequences the cache does not hold."""
        return int((self._shelf.find([sequence_key(sequence) for sequence in sequences]) < 0).sum())

    def targets(self, wanted: Batch | Listed[Sequence]) -> SoftTargets:
        """Soft targets of a batch, or of sequences, on the CPU (or on the device given to ``to``).

        Returns:
            Packed rows (N, ...): one for each position that predicts a response token, in the order of
            ``batch.predicts`` (row-major).

        Raises:
            UserError: a sequence is not in the cache; says how many are missing.
        """
        return self.rows(wanted.sequences() if isinstance(wanted, Batch) else wanted)

    def rows(self, sequences: Listed[Sequence]) -> SoftTargets:
        """The packed rows of all response positions of the sequences, one sequence after the other."""
        places = self._shelf.find([sequence_key(sequence) for sequence in sequences])
        lost = int((places < 0).sum())
        if lost:
            raise UserError(
                f"{lost} of {len(places)} sequences are not in the cache of {self.header.teacher}: run `preceptor "
                f"cache` on this data with max_length {self.header.max_length} into the same folder."
            )
        if not len(places):
            raise UserError("No sequence was asked of the cache: give at least one.")
        parts = [unpack(self._shelf.blob(place), int(self._shelf.entries["rows"][place])) for place in places]
        words = np.concatenate([part[0] for part in parts])
        targets = decode(self._codec, words, np.concatenate([part[1] for part in parts]), self._head)
        return moved(targets, self._device)

    def summary(self) -> dict[str, Any]:
        """Header, and over all rows: ``tokens``, ``bytes_per_token`` (the index included), ``kl``, ``mass``."""
        entries = self._shelf.entries
        rows = entries["rows"].astype(np.float64)
        tokens = max(1.0, float(rows.sum()))
        return {
            **asdict(self.header),
            "sequences": len(self),
            "tokens": int(rows.sum()),
            "bytes_per_token": float(entries["bytes"].sum() + entries.nbytes) / tokens,
            "kl": float(entries["kl"] @ rows) / tokens,
            "mass": float(entries["mass"] @ rows) / tokens,
        }
