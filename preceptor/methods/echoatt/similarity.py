"""How alike the attention matrices of a model's layers are, and which layers to share on that ground.

S_ij is the mean over texts of the cosine of vec(A_i) and vec(A_j), where A_l (heads x T x T) is layer l's attention
(Rajabzadeh et al., 2024, section 3). Only inner products are kept: of each text the matrices of all layers pass by in
blocks of rows, and a Gram matrix of layers x layers is summed up.

Causal masks and a strong first token make any two layers alike. A matrix that spreads its attention evenly over what
may be seen therefore passes by too, as one layer more: the layers' cosines with it are the floor to read S against.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preceptor.engine.progress_bar import Bar
from preceptor.errors import UserError
from preceptor.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 32


@dataclass(frozen=True)
class Similarity:
    """``cosines``: S, layers x layers. ``floor``: each layer's cosine with the even matrix. ``texts``: how many."""

    cosines: tuple[tuple[float, ...], ...]
    floor: tuple[float, ...]
    texts: int
    dropped: int

    @property
    def means(self) -> list[float]:
        """s_i: the mean of a layer's cosines with all others."""
        others = len(self.cosines) - 1
        return [(math.fsum(row) - row[layer]) / max(1, others) for layer, row in enumerate(self.cosines)]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, json.dumps(self.__dict__, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Similarity:
        """Read what `write` wrote."""
        known = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(tuple(row) for row in known["cosines"])
        return cls(rows, tuple(known["floor"]), known["texts"], known["dropped"])


@torch.no_grad()
def measure_similarity(model: PreTrainedModel, texts: Sequence[Sequence[int]], *, length: int) -> Similarity:
    """The similarity of a model's layers on texts of exactly ``length`` tokens: longer ones are cut, shorter dropped.

    Args:
        model: a causal model of a supported architecture; it is put in evaluation mode meanwhile.
        texts: token ids.
        length: T, tokens of each text that is used.

    Raises:
        UserError: no text is long enough, or the architecture is not supported.
    """
    from preceptor.models.shared_attention.config import check_architecture

    check_architecture(model.config.model_type)
    if length < 1:
        raise UserError(f"The calibration texts are to have {length} tokens: give at least 1.")
    used = [list(text[:length]) for text in texts if len(text) >= length]
    if not used:
        raise UserError(
            f"None of the {len(texts)} calibration texts has {length} tokens: give longer ones, or a shorter length."
        )
    training, total, bar = model.training, None, Bar("texts")
    model.eval()  # type: ignore[no-untyped-call]
    try:
        for done, ids in enumerate(used):
            if bar.due:
                bar.show(done, len(used))
            gram = _gram(model, torch.tensor([ids], device=model.device))
            sizes = gram.diagonal().sqrt()
            cosines = gram / (sizes[:, None] * sizes)
            total = cosines if total is None else total + cosines
    finally:
        bar.close()
        model.train(training)
    assert total is not None
    rows = (total / len(used)).tolist()
    inner = tuple(tuple(row[:-1]) for row in rows[:-1])
    return Similarity(inner, tuple(rows[-1][:-1]), len(used), len(texts) - len(used))


def _gram(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Inner products (layers + 1)², float64, of the attention matrices on one text, the even one last."""
    from preceptor.models.shared_attention.blocks import Geometry, block
    from preceptor.models.shared_attention.config import window_of

    config: Any = model.config
    with _entering(model) as entered:
        model.base_model(input_ids=ids, use_cache=False)
    layers = len(entered)
    asked = [_grouped(attention, hidden, positions) for attention, hidden, positions in entered]
    gram = torch.zeros(layers + 1, layers + 1, dtype=torch.float64, device=ids.device)
    heads, length = config.num_attention_heads, ids.shape[1]
    for first in range(0, length, ROWS):
        last = min(first + ROWS, length)
        maps = torch.zeros(layers + 1, heads, last - first, length, device=ids.device)
        for layer, (query, keys) in enumerate(asked):
            geometry = Geometry(length, 0, window_of(config, layer), ROWS)
            span = geometry.spans()[first // ROWS]
            found = block(query, keys, geometry, span)
            maps[layer, :, :, span.low : span.high] = found.view(heads, last - first, -1)
        counts = torch.arange(first + 1, last + 1, device=ids.device)
        seen = torch.arange(length, device=ids.device) < counts[:, None]
        maps[-1] = seen / counts[:, None]
        flat = maps.flatten(1)
        gram += (flat @ flat.T).double()
    return gram


def _grouped(attention: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scaled queries (1, groups, heads of a group, T, d) and keys (groups, d, T), in float32."""
    from preceptor.models.shared_attention.attention import scored

    query, key = scored(attention, hidden, positions)
    grouped = (query.float() * attention.scaling).unflatten(1, (key.shape[1], -1))
    return grouped, key.float().flatten(0, 1).transpose(1, 2)


@contextmanager
def _entering(model: PreTrainedModel) -> Iterator[list[tuple[Any, Tensor, tuple[Tensor, Tensor]]]]:
    """What enters each layer's attention while the model reads: the attention, hidden states and rotations."""
    entered: list[tuple[Any, Tensor, tuple[Tensor, Tensor]]] = []

    def keep(attention: Any, _: tuple[Any, ...], given: dict[str, Any]) -> None:
        entered.append((attention, given["hidden_states"], given["position_embeddings"]))

    base: Any = model.base_model
    with ExitStack() as stack:
        for layer in base.layers:
            stack.callback(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield entered
