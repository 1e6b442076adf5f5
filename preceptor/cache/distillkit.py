"""Captures made with DistillKit, converted to a top-k cache.

DistillKit (github.com/arcee-ai/DistillKit) writes Parquet files with ``input_ids``, ``compressed_logprobs`` and
``bytepacked_indices``, and beside them ``compression_config.yaml``, without which the bytes cannot be read. At each
position (row j is the distribution of token j + 1):

- indices: the k tokens, likeliest first, ``ceil(log2 d)`` bits each, most significant bit first;
- log-probabilities: the first ``exact_k`` as floats; a coefficient for each polynomial term over t = 0, 1, ...
  (0 to 1 with ``normalize_t``) for the others; then for each residual bin a scale and integers of ``element_bits``
  bits from the least value up (one bit means -1 or 1), added to the polynomial from the first on. With
  ``delta_encoding`` all of it is differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence as Listed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preceptor.cache.codecs import codebook, joined
from preceptor.cache.header import VERSION, Header, write
from preceptor.cache.reading import Cache
from preceptor.cache.soft import TopKCodec, level_of, topk_targets
from preceptor.cache.sparse import SparseCodec, SparseRows, fit_sparse
from preceptor.cache.store import Appender, Finished, pack
from preceptor.data.sequences import Sequence, sequence_key
from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError
from preceptor.knowledge import Head, TopKTargets
from preceptor.models.identity import template_hash, tokenizer_hash

_COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")


_FITTED_ON = 64  # sequences


@dataclass(frozen=True)
class CompressionFormat:
    """DistillKit's compression settings, under its own names."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Mapping[str, Any], ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @staticmethod
    def read(path: Path) -> CompressionFormat:
        """The settings in ``compression_config.yaml``.

        Raises:
            UserError: the file is missing, or has settings that this format does not know.
        """
        import yaml  # type: ignore[import-untyped]

        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            lists = {name: tuple(found.get(name) or ()) for name in ("polynomial_terms", "residual_bins")}
            return CompressionFormat(**{**found, **lists})
        except (OSError, AttributeError, TypeError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is not readable as DistillKit's compression settings ({error}): give the "
                "compression_config.yaml that was written with the capture."
            ) from error

    def targets(self, log_probs: Tensor, indices: Tensor) -> TopKTargets:
        """Decode rows of bytes, (N, bytes) uint8 each, to ids and log-probabilities (N, k)."""
        bits = math.ceil(math.log2(self.d))
        return TopKTargets(_unpacked(indices, bits, self.k), self._log_probs(log_probs))

    def _log_probs(self, data: Tensor) -> Tensor:
        exact, data = _floats(data, self.exact_dtype, self.exact_k)
        terms, data = _floats(data, self.term_dtype, len(self.polynomial_terms))
        rest = self.k - self.exact_k
        kind: torch.dtype = getattr(torch, self.term_dtype)
        t = torch.linspace(0, 1, rest, dtype=kind) if self.normalize_t else torch.arange(rest, dtype=kind)
        powers = {"sqrt": t.sqrt(), "exp": t.exp()}
        shapes = [powers[term] if isinstance(term, str) else t**term for term in self.polynomial_terms]
        fitted = torch.zeros(len(data), rest)
        if shapes:
            fitted = (torch.stack(shapes, -1) * terms[:, None, :]).sum(-1).float()
        start = 0
        for one in self.residual_bins:
            count, bits = int(one["num_elements"]), int(one["element_bits"])
            scale, data = _floats(data, str(one["scale_dtype"]), 1)
            size = (count * bits + 7) // 8
            whole = _unpacked(data[:, :size], bits, count).float()
            data = data[:, size:]
            centred = whole * 2 - 1 if bits == 1 else whole - 2 ** (bits - 1)
            fitted[:, start : start + count] += centred * scale.float()
            start += count
        every = torch.cat([exact.float(), fitted], -1)
        return every.cumsum(-1) if self.delta_encoding else every


def import_distillkit(
    captured: str | Path,
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    teacher: str,
    max_length: int,
    sequences: Listed[Sequence] | None = None,
) -> Cache:
    """Convert a folder of DistillKit's Parquet files to a top-k cache.

    The only loss is the rounding of log-probabilities; ``summary()["kl"]`` is its size, KL(imported ‖ decoded) with the
    tail as one more token.

    Args:
        captured: folder with ``*.parquet`` and ``compression_config.yaml``.
        folder: of the new cache.
        tokenizer: the teacher's.
        teacher: its name, for the header; the files do not hold it.
        max_length: to which the sequences of a training will be cut.
        sequences: those to convert, with their response masks; a captured row may have one more token (padding). By
            default every captured row is a sequence, of which all tokens but the first are the response.

    Raises:
        UserError: files are missing or of another format, or none of the sequences was captured.
    """
    source, target = Path(captured), Path(folder)
    if (target / "header.json").exists():
        raise UserError(f"{target} holds a cache already: choose another folder.")
    form = CompressionFormat.read(source / "compression_config.yaml")
    wanted = None if sequences is None else {sequence.ids: sequence for sequence in sequences}
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    codec: TopKCodec | None = None
    waiting: list[tuple[Sequence, SparseRows, TopKTargets]] = []
    for sequence, targets in _matching(source, form, wanted, max_length):
        waiting.append((sequence, _as_rows(targets, vocabulary), targets))
        if len(waiting) == _FITTED_ON:
            codec = _write(target, codec, waiting, form, tokenizer, teacher, max_length)
            waiting = []
    if waiting:
        codec = _write(target, codec, waiting, form, tokenizer, teacher, max_length)
    if codec is None:
        raise UserError(f"None of the sequences is in {source}: capture and encode with the same template and length.")
    return Cache.open(target)


def _matching(
    source: Path, form: CompressionFormat, wanted: dict[tuple[int, ...], Sequence] | None, max_length: int
) -> Iterator[tuple[Sequence, TopKTargets]]:
    done: set[bytes] = set()
    for ids, log_probs, indices in _captured(source):
        sequence = _found(ids, wanted, max_length)
        if sequence is None or (key := sequence_key(sequence)) in done:
            continue
        done.add(key)
        places = [place for place, answers in enumerate(sequence.response[1:]) if answers]
        if places[-1] >= min(len(log_probs), len(indices)):
            raise UserError(f"A capture in {source} has {len(log_probs)} rows for {len(ids)} tokens: it is cut short.")
        yield sequence, form.targets(_bytes(log_probs, places), _bytes(indices, places))


def _found(ids: tuple[int, ...], wanted: dict[tuple[int, ...], Sequence] | None, max_length: int) -> Sequence | None:
    cut = ids[:max_length]
    if wanted is None:
        return Sequence(cut, tuple(place > 0 for place in range(len(cut)))) if len(cut) > 1 else None
    return wanted.get(cut) or wanted.get(cut[:-1])


def _captured(source: Path) -> Iterator[tuple[tuple[int, ...], list[Any], list[Any]]]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    files = sorted(source.glob("*.parquet"))
    if not files:
        raise UserError(f"{source} holds no Parquet file: give the folder that DistillKit's capture wrote.")
    for path in files:
        table = parquet.ParquetFile(path)
        lacking = [name for name in _COLUMNS if name not in table.schema_arrow.names]
        if lacking:
            raise UserError(
                f"{path} has no column {lacking[0]}: only DistillKit's present format can be read, not its legacy one."
            )
        for group in table.iter_batches(batch_size=64, columns=list(_COLUMNS)):
            for row in group.to_pylist():
                yield tuple(row["input_ids"]), row["compressed_logprobs"], row["bytepacked_indices"]


def _as_rows(targets: TopKTargets, vocabulary: int) -> SparseRows:
    if int(targets.ids.max()) >= vocabulary:
        raise UserError(
            f"The capture names token {int(targets.ids.max())}, but the tokenizer has {vocabulary}: give the teacher's "
            "tokenizer and the compression_config.yaml of this capture."
        )
    tail = (1 - targets.log_probs.exp().sum(-1)).clamp_min(0)
    counts = np.full(len(targets.ids), targets.ids.shape[1])
    levels = level_of(targets.log_probs.clamp_max(0))
    return SparseRows(targets.ids.numpy(), levels.numpy(), counts, level_of(tail.log()).numpy())


def _write(
    target: Path, codec: TopKCodec | None, waiting: list[tuple[Sequence, SparseRows, TopKTargets]],
    form: CompressionFormat, tokenizer: Tokenizer, teacher: str, max_length: int,
) -> TopKCodec:  # fmt: skip
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    if codec is None:
        sparse = fit_sparse(joined([rows for _, rows, _ in waiting]), np.zeros(vocabulary), limit=0)
        codec = TopKCodec(sparse, form.k, 1.0, 0.0)
        header = Header(
            version=VERSION, kind="top_k", parameters=codebook(codec)[0], teacher=teacher,
            weights="not known (imported)", tokenizer=tokenizer_hash(tokenizer), template=template_hash(tokenizer),
            vocabulary=vocabulary, width=0, max_length=max_length, chosen="Imported from DistillKit.",
        )  # fmt: skip
        write(target, header, codec, Head(torch.zeros(0, 0)))
    finished = [_finished(codec.sparse, *one) for one in waiting]
    with Appender(target, 1 << 30) as appender:
        appender.append(finished)
    return codec


def _finished(sparse: SparseCodec, sequence: Sequence, rows: SparseRows, targets: TopKTargets) -> Finished:
    words, lengths = sparse.encode(rows)
    read = topk_targets(rows)
    p, q = targets.log_probs.double(), read.log_probs.double()
    mass, kept = p.exp().sum(-1), q.exp().sum(-1)
    tail, left = (1 - mass).clamp_min(1e-10), (1 - kept).clamp_min(1e-10)
    kl = (p.exp() * (p - q)).sum(-1) + tail * (tail / left).log()
    return Finished(sequence_key(sequence), pack(words, lengths), len(lengths), float(kl.mean()), float(mass.mean()))


def _bytes(rows: list[list[int]], places: list[int]) -> Tensor:
    return torch.tensor([rows[place] for place in places], dtype=torch.uint8)


def _floats(data: Tensor, kind: str, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` numbers of each row of bytes, and the bytes after them."""
    dtype: torch.dtype = getattr(torch, kind)
    size = count * dtype.itemsize
    return data[:, :size].contiguous().view(dtype).reshape(len(data), count), data[:, size:]


def _unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """Integers (N, count) of ``bits`` bits, most significant first, from rows of bytes."""
    each = np.unpackbits(data.numpy(), axis=1)[:, : bits * count].reshape(len(data), count, bits)
    return torch.from_numpy(each.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1)))
