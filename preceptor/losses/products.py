"""Matrix products with an output head, block by block of its vocabulary.

On a CPU blocks of 2,048 entries stay in cache from one use to the next, and keep temporaries small. In float32 on x86
the products go to oneDNN, which PyTorch ships beside MKL: MKL is at its best on one vendor's processors only.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK = 2048


def _blocks(weight: Tensor) -> Iterator[slice]:
    vocabulary = weight.shape[0]
    step = CPU_BLOCK if weight.device.type == "cpu" else vocabulary
    return (slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step))


@functools.cache
def _onednn() -> bool:
    """Whether oneDNN's float32 linear is there and computes what it should."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight = torch.arange(12.0).view(3, 4), torch.arange(20.0).view(5, 4)
    try:
        return bool(torch.equal(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), x @ weight.t()))
    except (RuntimeError, AttributeError):
        return False


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and bool(x.numel()) and _onednn()


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``."""
    if _by_onednn(x):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product
    return x @ weight.t()


def logits_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``out = x @ weight.T + bias``; ``out`` (rows, vocabulary) and ``x`` (rows, width) share a dtype."""
    if x.dtype == weight.dtype and not _by_onednn(x):
        torch.mm(x, weight.t(), out=out)
    else:
        for block in _blocks(weight):
            out[:, block] = _linear(x, weight[block].to(x.dtype))
    if bias is not None:
        out += bias.to(out.dtype)


def hidden_gradient(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient @ weight``, summed in ``dtype`` over the blocks: (rows, width)."""
    total = torch.zeros(gradient.shape[0], weight.shape[1], dtype=dtype, device=gradient.device)
    for block in _blocks(weight):
        total += _linear(gradient[:, block], weight[block].to(gradient.dtype).t())
    return total


def add_weight_gradient(total: Tensor, gradient: Tensor, x: Tensor, *, first: bool) -> None:
    """``total += gradient.T @ x`` (``total =`` when first): (vocabulary, width).

    Where ``total`` is as narrow as the factors, one fused product adds to it and rounds once.
    """
    across = x.t().contiguous()
    for block in _blocks(total):
        piece = gradient[:, block].t()
        if x.dtype in (torch.float32, torch.float64):
            piece = piece.contiguous()
        if first:
            total[block] = _linear(piece, across)
        elif total.dtype == x.dtype != torch.float32:
            total[block].addmm_(piece, x)
        else:
            total[block] += _linear(piece, across)
