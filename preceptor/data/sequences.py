"""Token sequences with response masks, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """Token ids and, for each, whether it belongs to a response."""

    ids: tuple[int, ...]
    response: tuple[bool, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids up to the first token of the last response."""
        start = len(self.ids)
        while start and not self.response[start - 1]:
            start -= 1
        while start and self.response[start - 1]:
            start -= 1
        return self.ids[:start]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences padded on the right. ``input_ids`` and ``attention_mask``: (B, T) int64; ``response``: (B, T) bool."""

    input_ids: Tensor
    attention_mask: Tensor
    response: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def predicts(self) -> Tensor:
        """(B, T) bool: position t predicts a response token at t + 1; the last column is False."""
        return torch.cat([self.response[:, 1:], torch.zeros_like(self.response[:, :1])], dim=1)

    @property
    def labels(self) -> Tensor:
        """(B, T) int64: at t the id at t + 1 where it is a response token, else -100."""
        following = torch.cat([self.input_ids[:, 1:], torch.full_like(self.input_ids[:, :1], -100)], dim=1)
        return following.masked_fill(~self.predicts, -100)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(
            *(part.to(device, non_blocking=True) for part in (self.input_ids, self.attention_mask, self.response))
        )

    def sequences(self) -> list[Sequence]:
        """The sequences without padding."""
        lengths = self.attention_mask.sum(-1).tolist()
        rows = zip(self.input_ids.tolist(), self.response.tolist(), lengths)
        return [Sequence(tuple(ids[:length]), tuple(response[:length])) for ids, response, length in rows]


def collate(sequences: Listed[Sequence], pad_id: int) -> Batch:
    """Pad sequences on the right with ``pad_id``; the attention mask marks the padding, not the id."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    response = np.zeros((len(sequences), width), dtype=bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[row, :length] = sequence.ids
        mask[row, :length] = 1
        response[row, :length] = sequence.response
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(response))


def sequence_key(sequence: Sequence) -> bytes:
    """16 bytes that name a sequence by its content: BLAKE2b of its ids (int32, little endian) and its packed mask."""
    ids = np.asarray(sequence.ids, dtype="<i4").tobytes()
    mask = np.packbits(np.asarray(sequence.response, dtype=bool)).tobytes()
    return hashlib.blake2b(ids + mask, digest_size=16).digest()
