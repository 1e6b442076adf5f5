"""The two kinds of attention of a model that shares: one computes the probabilities, the other reuses them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from preceptor.errors import UserError
from preceptor.models.shared_attention.blocks import ALIGNED, Geometry, Room, Shared, lead
from preceptor.models.shared_attention.cache import SharedCache

ROWS = {torch.float32: 64, torch.float64: 64}


ROWS_NARROW = 128


ROWS_ACCELERATOR = 512


@dataclass
class ForwardState:
    """What the layers of one forward pass have in common.

    ``new`` tokens are read after ``past`` ones. ``padding``: (B, S) boolean, True where a key is padding, or None.
    ``cache``: what is remembered, or None. ``shared``: the probabilities that the last leader computed.
    """

    new: int
    past: int
    padding: Tensor | None
    cache: SharedCache | None
    shared: Shared | None = None
    room: Room = field(default_factory=Room)


class Leader(nn.Module):
    """Attention as the base model computes it, of the base model's own parts.

    ``followed``: whether layers above reuse its probabilities; if not they are kept nowhere, and torch's fused kernel
    does the work where it can do it without a mask.
    """

    def __init__(self, base: Any, layer: int, *, window: int | None, followed: bool) -> None:
        super().__init__()
        self.layer, self.window, self.followed = layer, window, followed
        self.width: int = base.head_dim
        self.scale: float = base.scaling
        self.q_proj, self.k_proj = base.q_proj, base.k_proj
        self.v_proj, self.o_proj = base.v_proj, base.o_proj
        self.q_norm = base.q_norm if hasattr(base, "q_norm") else None
        self.k_norm = base.k_norm if hasattr(base, "k_norm") else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        sharing: ForwardState,
        attention_mask: None = None,
        position_ids: None = None,
        past_key_values: None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, None]:
        """The output (B, T, D) of hidden states after the layer's norm; leaves its probabilities in ``sharing``.

        The last four are what a decoder layer hands on to its attention; they are not used.
        """
        query, key = scored(self, hidden_states, position_embeddings)
        value = _by_head(self.v_proj(hidden_states), self.width)
        kind = _precision(value)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        if sharing.cache is None:
            keys, values = key.transpose(2, 3), value
        else:
            kept, values = sharing.cache.memory(self.layer).write(key, value)
            assert kept is not None
            keys = kept
        if not self.followed and sharing.past == 0 and sharing.padding is None and self._sees_all(sharing.new):
            out = scaled_dot_product_attention(
                query, key, value, is_causal=sharing.new > 1, scale=self.scale, enable_gqa=True
            )
            return self.o_proj(out.transpose(1, 2).flatten(2)), None
        rows = ROWS.get(kind, ROWS_NARROW) if query.device.type == "cpu" else ROWS_ACCELERATOR
        aligned = sharing.cache is not None and sharing.new < ALIGNED
        geometry = Geometry(sharing.new, sharing.past, self.window, rows, aligned)
        grouped = (query * self.scale).view(query.shape[0], key.shape[1], -1, *query.shape[2:])
        out, sharing.shared = lead(grouped, keys, values, geometry, sharing.padding, sharing.room)
        return self.o_proj(out), None

    def _sees_all(self, length: int) -> bool:
        return self.window is None or length <= self.window


class Follower(nn.Module):
    """Attention with its leader's probabilities: values and output are its own, and it has no queries and no keys."""

    def __init__(self, base: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.width: int = base.head_dim
        self.v_proj, self.o_proj = base.v_proj, base.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: None,
        sharing: ForwardState,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """The output (B, T, D) of hidden states after the layer's norm; only ``sharing`` is used of the rest."""
        assert sharing.shared is not None
        value = _by_head(self.v_proj(hidden_states), self.width)
        value = value.to(_precision(value))
        if sharing.cache is not None:
            _, value = sharing.cache.memory(self.layer).write(None, value)
        return self.o_proj(sharing.shared.apply(value, self.layer)), None


def scored(attention: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries (B, H, T, d) and keys (B, groups, T, d) as the scores see them, not yet scaled.

    Args:
        attention: the attention of a supported base model, or a `Leader`.
        hidden: (B, T, D), after the layer's norm.
        positions: cosines and sines of the rotary embedding, (B or 1, T, d).
    """
    width = attention.width if isinstance(attention, Leader) else attention.head_dim
    query, key = _by_head(attention.q_proj(hidden), width), _by_head(attention.k_proj(hidden), width)
    if hasattr(attention, "q_norm") and attention.q_norm is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (part.unsqueeze(1) for part in positions)
    return _turn(query, cos, sin), _turn(key, cos, sin)


def removed_parts(attention: nn.Module) -> list[str]:
    """The names of an attention's parts that a follower does without: queries, keys and their norms."""
    return [name for name, _ in attention.named_children() if name in ("q_proj", "k_proj", "q_norm", "k_norm")]


def padding_of(mask: Tensor | None, length: int, *, aligned: bool) -> Tensor | None:
    """Which of ``length`` keys are padding (B, S), True where they are; None where none is.

    Raises:
        UserError: the mask is not one entry a token.
    """
    if mask is None or bool((mask != 0).all()):
        return None
    if mask.dim() != 2 or mask.shape[1] != length:
        raise UserError(
            f"The attention mask has shape {tuple(mask.shape)}, but {length} tokens are read: give (batch, tokens), 1 "
            "for a token and 0 for padding."
        )
    padding = mask == 0
    return nn.functional.pad(padding, (0, -length % ALIGNED)) if aligned else padding


def _by_head(projected: Tensor, width: int) -> Tensor:
    return projected.view(*projected.shape[:-1], -1, width).transpose(1, 2)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864), half-split, of heads (B, H, T, d)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _precision(value: Tensor) -> torch.dtype:
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
