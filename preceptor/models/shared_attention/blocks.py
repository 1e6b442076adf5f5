"""Causal attention kept as blocks of rows: the probabilities that one layer computes and the layers above it reuse.

A block holds the probabilities of some query rows over the keys that these rows may see, and nothing else: neither the
upper triangle nor keys outside a window are ever computed or stored, and no mask of queries x keys is made. The heads
of one key and value group lie in one block under each other, so that a group costs one matrix product.

The gradient is exact and also goes block by block. With outputs O_j = A V_j of the layers j that use A, the gradient
dA = sum_j dO_j V_j' is one product of the dO_j and the V_j laid side by side, so that it is never accumulated: the
layers hand their (dO_j, V_j) to the one that made A, whose backward pass autograd runs after all of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ALIGNED = 64


"""Keys of one cached step are read in multiples of this, so that kernels meet few different shapes."""


@dataclass(frozen=True)
class Span:
    """New query rows [first, last) of a sequence, and the keys [low, high) that some of them may see."""

    first: int
    last: int
    low: int
    high: int


@dataclass(frozen=True)
class Geometry:
    """Which keys new tokens see: ``new`` of them after ``past`` cached ones, each at most ``window`` keys back."""

    new: int
    past: int
    window: int | None
    rows: int
    aligned: bool = False

    def spans(self) -> list[Span]:
        """The blocks of ``rows`` query rows each; with ``aligned`` their keys end at a multiple of ``ALIGNED``."""
        found = []
        for first in range(0, self.new, self.rows):
            last = min(first + self.rows, self.new)
            low = 0 if self.window is None else max(0, self.past + first - self.window + 1)
            high = self.past + last
            found.append(Span(first, last, low, -(-high // ALIGNED) * ALIGNED if self.aligned else high))
        return found

    def hide(self, scores: Tensor, span: Span) -> None:
        """Fill the scores (N, G, rows, keys) of keys after their row or before its window with the least number."""
        least = torch.finfo(scores.dtype).min
        count, keys = span.last - span.first, span.high - span.low
        own = self.past + span.first - span.low
        if count == 1:
            scores[..., own + 1 :].fill_(least)
        elif keys - own > 1:
            places = torch.arange(keys - own, device=scores.device)
            scores[..., own:].masked_fill_(places > places[:count, None], least)
        if self.window is None:
            return
        late = own - self.window + 1
        if count - 1 + late > 0:
            places = torch.arange(count, device=scores.device)
            scores[..., : count - 1 + late].masked_fill_(places[: count - 1 + late] < places[:, None] + late, least)


@dataclass
class Shared:
    """Attention probabilities as one layer computed them.

    ``blocks[i]``: (batch x groups, heads of a group x rows, keys) for ``spans[i]``. ``ticket`` ties the layers that use
    them to the one that made them in autograd's graph; ``given`` is where their gradients wait for it.
    """

    spans: list[Span]
    blocks: list[Tensor]
    ticket: Tensor | None = None
    given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def apply(self, value: Tensor, layer: int) -> Tensor:
        """The outputs (B, T, H x d) of a layer with values (B, groups, keys, d)."""
        if torch.is_grad_enabled() and (value.requires_grad or self.ticket is not None):
            out: Tensor = _Follow.apply(self.ticket, value, self.spans, self.given, layer, *self.blocks)  # type: ignore[no-untyped-call]
            return out
        return weigh(self.spans, self.blocks, value)


def lead(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, padding: Tensor | None, room: Room | None
) -> tuple[Tensor, Shared]:
    """Attention of scaled queries, and its probabilities for other layers.

    Args:
        query: (B, groups, heads of a group, T, d), multiplied by the model's scale.
        key: (B, groups, d, S).
        value: (B, groups, S, d).
        geometry: which keys each row sees.
        padding: (B, S) boolean, True where a key is padding; None where there is none.
        room: memory to keep the blocks in, where no gradient is wanted.

    Returns:
        The outputs (B, T, H x d), and the probabilities.
    """
    spans = geometry.spans()
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not wanted:
        blocks = score(query, key, geometry, padding, room)
        return weigh(spans, blocks, value), Shared(spans, blocks)
    given: dict[int, tuple[Tensor, Tensor]] = {}
    out, ticket, *blocks = _Lead.apply(query, key, value, geometry, padding, given)  # type: ignore[no-untyped-call]
    return out, Shared(spans, blocks, ticket, given)


class Room:
    """One piece of memory for the blocks of one layer after another, which are not needed at the same time."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._taken = 0

    def begin(self, size: int, like: Tensor) -> None:
        """Forget what lies here; make room for ``size`` numbers of the kind of ``like``."""
        self._taken = 0
        if self._memory is None or self._memory.numel() < size:
            self._memory = like.new_empty(size)

    def take(self, *shape: int) -> Tensor:
        """The next tensor of this shape; its content is undefined."""
        assert self._memory is not None
        size = shape[0] * shape[1] * shape[2]
        self._taken += size
        return self._memory[self._taken - size : self._taken].view(shape)


def score(
    query: Tensor, key: Tensor, geometry: Geometry, padding: Tensor | None, room: Room | None = None
) -> list[Tensor]:
    """The probabilities of all blocks; shapes as in `lead`. A row that sees padding alone gets finite ones."""
    batch, groups, heads, _, width = query.shape
    keys = key.reshape(batch * groups, width, -1)
    spans = geometry.spans()
    if room is not None:
        sizes = (heads * (span.last - span.first) * (span.high - span.low) for span in spans)
        room.begin(batch * groups * sum(sizes), query)
    blocks = []
    for span in spans:
        size = (batch * groups, heads * (span.last - span.first), span.high - span.low)
        into = None if room is None else room.take(*size)
        blocks.append(block(query, keys, geometry, span, padding, into))
    return blocks


def block(
    query: Tensor,
    keys: Tensor,
    geometry: Geometry,
    span: Span,
    padding: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """The probabilities (B x groups, heads of a group x rows, keys) of one block; keys are (B x groups, d, S)."""
    batch, groups, heads, _, width = query.shape
    rows = query[:, :, :, span.first : span.last].reshape(batch * groups, -1, width)
    seen = keys[:, :, span.low : span.high]
    scores = torch.bmm(rows, seen) if into is None else torch.bmm(rows, seen, out=into)
    geometry.hide(scores.view(batch * groups, heads, span.last - span.first, -1), span)
    if padding is not None:
        hidden = padding[:, None, None, span.low : span.high]
        scores.view(batch, groups, rows.shape[1], -1).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    # Row by row a CPU's softmax reads before it writes, so that it can work in place.
    return torch.softmax(scores, -1, out=scores) if scores.device.type == "cpu" else scores.softmax(-1)


def weigh(spans: list[Span], blocks: list[Tensor], value: Tensor) -> Tensor:
    """The values (B, groups, S, d) weighted by the probabilities, as (B, T, H x d)."""
    batch, groups, _, width = value.shape
    values = value.reshape(batch * groups, -1, width)
    new, heads = spans[-1].last, blocks[0].shape[1] // (spans[0].last - spans[0].first)
    if new == 1:
        return torch.bmm(blocks[0], values[:, spans[0].low : spans[0].high]).view(batch, 1, groups * heads * width)
    out = value.new_empty(batch, new, groups, heads, width)
    for span, block in zip(spans, blocks):
        part = torch.bmm(block, values[:, span.low : span.high])
        out[:, span.first : span.last] = part.view(batch, groups, heads, -1, width).permute(0, 3, 1, 2, 4)
    return out.view(batch, new, groups * heads * width)


def _rows(gradient: Tensor, span: Span, shape: torch.Size) -> Tensor:
    """The rows of a gradient (B, T, H x d) in the form of a block: (B x groups, heads of a group x rows, d)."""
    batch, groups, heads, _, width = shape
    rows = gradient[:, span.first : span.last].reshape(batch, -1, groups, heads, width)
    return rows.permute(0, 2, 3, 1, 4).reshape(batch * groups, -1, width)


def _add(into: Tensor, span: Span, block: Tensor, rows: Tensor) -> None:
    """into[keys] += block' rows, in the precision of ``into``."""
    there = into[:, span.low : span.high]
    if into.dtype == block.dtype:
        there.baddbmm_(block.transpose(1, 2), rows)
    else:
        there += torch.bmm(block.transpose(1, 2), rows)


def _sum_like(value: Tensor) -> Tensor:
    """Zeros (B x groups, S, d) to sum a gradient in, in float32 at least: blocks are many."""
    batch, groups, length, width = value.shape
    return value.new_zeros(batch * groups, length, width, dtype=torch.promote_types(value.dtype, torch.float32))


class _Lead(Function):
    """`score` and `weigh`; the backward pass takes what the layers above have left in ``given``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Geometry,
        padding: Tensor | None,
        given: dict[int, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        with torch.autocast(query.device.type, enabled=False):
            blocks = score(query, key, geometry, padding)
            out = weigh(geometry.spans(), blocks, value)
        ctx.save_for_backward(query, key, value, *blocks)
        ctx.geometry, ctx.given = geometry, given
        ctx.mark_non_differentiable(*blocks)
        ctx.set_materialize_grads(False)
        return (out, query.new_zeros(()), *blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, own: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, *blocks = ctx.saved_tensors
        received = [] if own is None else [(own, value)]
        received += [ctx.given[layer] for layer in sorted(ctx.given)]
        ctx.given.clear()
        batch, groups, heads, _, width = query.shape
        gradient_q, gradient_k, gradient_v = torch.empty_like(query), _sum_like(value), _sum_like(value)
        keys = key.reshape(batch * groups, width, -1)
        with torch.autocast(query.device.type, enabled=False):
            values = torch.cat([one.reshape(batch * groups, -1, width) for _, one in received], -1).transpose(1, 2)
            for span, block in zip(ctx.geometry.spans(), blocks):
                outputs = [_rows(one, span, query.shape) for one, _ in received]
                gradient_p = torch.bmm(torch.cat(outputs, -1), values[:, :, span.low : span.high])
                if own is not None:
                    _add(gradient_v, span, block, outputs[0])
                scores = torch._softmax_backward_data(gradient_p, block, -1, block.dtype)
                there = query[:, :, :, span.first : span.last]
                _add(gradient_k, span, scores, there.reshape(batch * groups, -1, width))
                part = torch.bmm(scores, keys[:, :, span.low : span.high].transpose(1, 2))
                gradient_q[:, :, :, span.first : span.last] = part.view(there.shape)
        gradient_k = gradient_k.to(key.dtype).view_as(value).transpose(2, 3)
        return gradient_q, gradient_k, gradient_v.to(value.dtype).view_as(value), None, None, None


class _Follow(Function):
    """`weigh` with another layer's probabilities; leaves its gradient of them to the layer that made them."""

    @staticmethod
    def forward(
        ctx: Any,
        ticket: Tensor | None,
        value: Tensor,
        spans: list[Span],
        given: dict[int, tuple[Tensor, Tensor]],
        layer: int,
        *blocks: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(value, *blocks)
        ctx.spans, ctx.given, ctx.layer = spans, given, layer
        with torch.autocast(value.device.type, enabled=False):
            return weigh(spans, list(blocks), value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, own: Tensor) -> tuple[Tensor | None, ...]:
        value, *blocks = ctx.saved_tensors
        batch, groups, _, width = value.shape
        heads = own.shape[-1] // (groups * width)
        if ctx.needs_input_grad[0]:
            ctx.given[ctx.layer] = (own, value)
        shape = torch.Size((batch, groups, heads, own.shape[1], width))
        gradient = _sum_like(value)
        with torch.autocast(value.device.type, enabled=False):
            for span, block in zip(ctx.spans, blocks):
                _add(gradient, span, block, _rows(own, span, shape))
        ticket = own.new_zeros(()) if ctx.needs_input_grad[0] else None
        return (ticket, gradient.to(value.dtype).view_as(value), None, None, None, *(None for _ in blocks))
