"""The three kinds of cache behind one interface: rows of hidden states in, words out, and soft targets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preceptor.cache.decoding_error import LogProbs, chunks
from preceptor.cache.hidden import HiddenCodec
from preceptor.cache.rans import Ints, Tables
from preceptor.cache.soft import (
    SampledCodec,
    TopKCodec,
    kl_to_sampled,
    kl_to_topk,
    sampled_rows,
    sampled_targets,
    topk_rows,
    topk_targets,
)
from preceptor.cache.sparse import SparseCodec, SparseRows
from preceptor.knowledge import Head, HiddenTargets, SoftTargets

Kind = Literal["top_k", "sampled", "hidden"]


Codec = HiddenCodec | TopKCodec | SampledCodec


@dataclass(frozen=True)
class Encoded:
    """Rows as words (all rows one after the other), words of each row, and what was measured of each.

    ``kl``: (N,) KL(teacher ‖ decoded) in nats. ``mass``: (N,) probability that the row accounts for token by token.
    """

    words: NDArray[np.uint16]
    lengths: Ints
    kl: Tensor
    mass: Tensor


def kind_of(codec: Codec) -> Kind:
    """The kind's name."""
    return "hidden" if isinstance(codec, HiddenCodec) else "top_k" if isinstance(codec, TopKCodec) else "sampled"


def encode(codec: Codec, hidden: Tensor, head: Head, offsets: Tensor, *, known: LogProbs | None = None) -> Encoded:
    """Encode rows of a teacher's last hidden states.

    Args:
        codec: the cache's.
        hidden: (N, D), on the head's device.
        head: the teacher's.
        offsets: (N,) uniform numbers in [0, 1), used by samples alone.
        known: the distributions of these rows, where they fit in memory and are there already.
    """
    if isinstance(codec, HiddenCodec):
        words, lengths, kl = codec.encode(hidden, head, known)
        return Encoded(words, lengths, kl, torch.ones(len(hidden)))
    rows, kls, masses = [], [], []
    for piece in chunks(len(hidden), head):
        teacher = LogProbs.of(hidden[piece], head) if known is None else known.of_rows(piece)
        part = sparse_rows(codec, teacher, offsets[piece])
        kls.append(measure(codec, teacher, part))
        ids = torch.from_numpy(part.ids).to(hidden.device)
        used = torch.arange(ids.shape[1]) < torch.from_numpy(part.counts)[:, None]
        masses.append((teacher.probabilities.gather(-1, ids).cpu() * used).sum(-1))
        rows.append(part)
    words, lengths = codec.sparse.encode(joined(rows))
    return Encoded(words, lengths, torch.cat(kls), torch.cat(masses))


def decode(codec: Codec, words: NDArray[np.uint16], lengths: Ints, head: Head | None) -> SoftTargets:
    """Soft targets of rows whose words stand one after the other."""
    if isinstance(codec, HiddenCodec):
        assert head is not None
        return HiddenTargets(codec.decode(words, lengths), head)
    return codec.decode(words, lengths)


def sparse_rows(codec: TopKCodec | SampledCodec, teacher: LogProbs, offsets: Tensor) -> SparseRows:
    """What a sparse codec keeps of a chunk of the teacher's distributions."""
    if isinstance(codec, TopKCodec):
        return topk_rows(teacher, k=codec.k, mass=codec.mass, floor=codec.floor)
    return sampled_rows(teacher.probabilities, codec.draws, offsets)


def measure(codec: TopKCodec | SampledCodec, teacher: LogProbs, rows: SparseRows) -> Tensor:
    """KL(teacher ‖ decoded) of each row, (N,), on the CPU."""
    if isinstance(codec, TopKCodec):
        return kl_to_topk(teacher, topk_targets(rows)).cpu()
    return kl_to_sampled(teacher, sampled_targets(rows, codec.draws), codec.draws).cpu()


def joined(parts: list[SparseRows]) -> SparseRows:
    """Chunks of rows as one."""
    width = max(part.ids.shape[1] for part in parts)

    def wide(values: Ints) -> Ints:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])))

    return SparseRows(
        np.concatenate([wide(part.ids) for part in parts]),
        np.concatenate([wide(part.levels) for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.extra for part in parts]),
    )


def codebook(codec: Codec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A codec's parameters (for the header) and its tensors."""
    if isinstance(codec, HiddenCodec):
        tensors = {"mean": codec.mean, "forward": codec.forward, "inverse": codec.inverse}
        tensors |= {"spread": torch.from_numpy(codec.spread)}
        tables = {"steps": codec.steps, "coordinates": codec.coordinates}
        return {"tolerance": codec.tolerance}, _cpu(tensors) | _frequencies(tables)
    sparse = codec.sparse
    names = ("counts", "extra", "first", "differences", "ranks")
    tables = dict(zip(names, (sparse.counts, sparse.extra, sparse.first, sparse.differences, sparse.ranks)))
    tensors = {"order": torch.from_numpy(sparse.order)}
    parameters: dict[str, Any] = (
        {"k": codec.k, "mass": codec.mass, "floor": codec.floor, "tail": "its mass is stored"}
        if isinstance(codec, TopKCodec)
        else {"draws": codec.draws, "proposal": "the teacher at temperature 1, systematic"}
    )
    return parameters, _cpu(tensors) | _frequencies(tables)


def codec_from(kind: Kind, parameters: dict[str, Any], tensors: dict[str, Tensor]) -> Codec:
    """The codec that ``codebook`` described."""

    def tables(name: str) -> Tables:
        return Tables.of(tensors[name].numpy().astype(np.uint16))

    if kind == "hidden":
        spread = tensors["spread"].numpy()
        matrices = (tensors["mean"], tensors["forward"], tensors["inverse"])
        return HiddenCodec(*matrices, spread, tables("steps"), tables("coordinates"), parameters["tolerance"])
    names = ("counts", "extra", "first", "differences", "ranks")
    limit = parameters["draws"] if kind == "sampled" else 0
    sparse = SparseCodec(tensors["order"].numpy(), limit, *(tables(name) for name in names))
    if kind == "sampled":
        return SampledCodec(sparse, parameters["draws"])
    return TopKCodec(sparse, parameters["k"], parameters["mass"], parameters["floor"])


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _frequencies(tables: dict[str, Tables]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(table.frequencies.astype(np.int32)) for name, table in tables.items()}
