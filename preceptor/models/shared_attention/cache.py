"""What a model with shared attention remembers of the tokens it has read: values of all layers, keys of the leaders.

Room is made ahead, so that a new token is written in its place and nothing is copied; keys lie transposed, as their
product with a query wants them. The classes are transformers' own kind, so that ``generate`` and beam search work.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from preceptor.errors import UserError
from preceptor.models.shared_attention.blocks import ALIGNED


class LayerMemory(DynamicLayer):  # type: ignore[no-untyped-call]
    """Of one layer: ``values`` (B, groups, room, d) and, in a leader, ``keys`` (B, groups, d, room).

    ``length``: how many tokens of the room are in use. What lies beyond ``length`` is finite, and nobody attends to it.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, *, leads: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leads = leads
        self.length = 0

    def write(self, key: Tensor | None, value: Tensor) -> tuple[Tensor | None, Tensor]:
        """Put new keys (B, groups, T, d) and values in their place; returns all there is, room included."""
        begin, self.length = self.length, self.length + value.shape[2]
        if self.values is None or self.values.shape[2] < self.length or self.values.dtype != value.dtype:
            self._grow(value)
        assert self.values is not None
        self.values[:, :, begin : self.length] = value
        if key is None:
            return None, self.values
        assert self.keys is not None
        self.keys[:, :, :, begin : self.length] = key.transpose(2, 3)
        return self.keys, self.values

    def _grow(self, like: Tensor) -> None:
        batch, groups, new, width = like.shape
        room = -(-max(self.length + ALIGNED, self.length * 5 // 4) // ALIGNED) * ALIGNED
        values = like.new_zeros(batch, groups, room, width)
        keys = like.new_zeros(batch, groups, width, room) if self.leads else None
        kept = self.length - new
        if self.values is not None:
            values[:, :, :kept] = self.values[:, :, :kept]
        if keys is not None and self.keys is not None:
            keys[:, :, :, :kept] = self.keys[:, :, :, :kept]
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = like.dtype, like.device

    def get_seq_length(self) -> int:
        """How many tokens are remembered."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that ``query_length`` new tokens see, and where they begin."""
        return self.length + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        """Not for models without shared attention.

        Raises:
            UserError: always.
        """
        raise UserError("This cache belongs to a model with shared attention: give another model a cache of its own.")

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.length, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, whose number is given as a negative one (0: none)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one")
        self.length = max(0, self.length + tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.values is not None:
            self.values = self.values[indices]
        if self.keys is not None:
            self.keys = self.keys[indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams of a search."""
        if self.values is not None:
            self.batch_select_indices(beam_idx.to(self.values.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.values is not None:
            rows = torch.arange(self.values.shape[0], device=self.values.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class SharedCache(Cache):
    """The memories of all layers of a model with shared attention."""

    def __init__(self, layers: int, followers: tuple[int, ...]) -> None:
        super().__init__(layers=[LayerMemory(leads=index not in followers) for index in range(layers)])

    def memory(self, layer: int) -> LayerMemory:
        """That of one layer."""
        found = self.layers[layer]
        assert isinstance(found, LayerMemory)
        return found
