"""Capturing a teacher's targets: each sequence once, in batches, resumable at any instant."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence as Listed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from preceptor.cache.choice import Wanted, choose, fit, measure
from preceptor.cache.codecs import Codec, Encoded, Kind, encode
from preceptor.cache.header import UNFINISHED, Header, load, write
from preceptor.cache.reading import Cache
from preceptor.cache.store import Appender, Finished, pack
from preceptor.data.sequences import Sequence, collate, sequence_key
from preceptor.engine.progress_bar import Bar
from preceptor.errors import UserError
from preceptor.knowledge import Head
from preceptor.models.language_model import LanguageModel, in_evaluation

Say = Callable[[str], None]


@dataclass(frozen=True)
class CapturePlan:
    """How a capture is done.

    ``kind``: one of the three, or ``auto`` to measure a sample of each and choose. ``wanted``: parameters and budget.
    ``batch_tokens``: padded tokens of a teacher's batch. ``sample``: response tokens on which the codec is fitted.
    ``shard_bytes``: a new shard begins when one has reached this size.
    """

    wanted: Wanted
    kind: Kind | Literal["auto"] = "auto"
    batch_tokens: int = 8192
    sample: int = 16384
    shard_bytes: int = 1 << 30


def capture(
    teacher: LanguageModel, sequences: Listed[Sequence], folder: str | Path, *, name: str, max_length: int,
    plan: CapturePlan, say: Say | None = None,
) -> Cache:  # fmt: skip
    """Write a teacher's targets for sequences into a cache; those that are there already are left as they are.

    A folder that holds a cache of the same teacher, tokenizer and template is continued with its own kind and
    parameters, whether it was interrupted or is given new data.

    Args:
        teacher: evaluated without gradients, on its own device.
        sequences: with at least one response token each; those of one content are captured once.
        folder: of the cache.
        name: how the header calls the teacher.
        max_length: to which the sequences were truncated, for the header.
        plan: how to do it.
        say: what to do with the one sentence on the choice of kind; None prints it to stderr.

    Raises:
        UserError: the folder holds another cache or something else, sequences without response tokens, a full disk.
    """
    path = Path(folder)
    _check(path, sequences)
    with torch.inference_mode(), in_evaluation(teacher):
        if not (path / "header.json").exists():
            _begin(teacher, sequences, path, name=name, max_length=max_length, plan=plan, say=say or _print)
        header = Header.read(path)
        header.check_teacher(teacher)
        header.check_tokenizer(teacher.tokenizer)
        if header.max_length != max_length:
            raise UserError(
                f"The cache {path} holds sequences cut at {header.max_length} tokens, not {max_length}: give the same "
                "max_length, or another folder."
            )
        codec, _ = load(path, header)
        with Appender(path, plan.shard_bytes) as appender:
            waiting = _order(sequences, appender.keys)
            _capture_all(teacher, codec, waiting, appender, plan.batch_tokens)
    return Cache.open(path)


def _check(path: Path, sequences: Listed[Sequence]) -> None:
    if path.exists() and not (path / "header.json").exists():
        names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
        other = [name for name in names if name not in UNFINISHED]
        if other:
            raise UserError(f"{path} holds something else than a cache ({other[0]}): choose another folder.")
    empty = sum(not any(sequence.response[1:]) for sequence in sequences)
    if empty or not sequences:
        raise UserError(
            f"{empty} of {len(sequences)} sequences have no response token to predict: leave them out."
            if sequences
            else "There is no sequence to capture: the data is empty."
        )


def _begin(
    teacher: LanguageModel,
    sequences: Listed[Sequence],
    path: Path,
    *,
    name: str,
    max_length: int,
    plan: CapturePlan,
    say: Say,
) -> None:
    sample = _sample(teacher, sequences, plan)
    head = _head(teacher)
    if plan.kind == "auto":
        codec, sentence = choose(sample, head, plan.wanted)
    else:
        codec = fit(plan.kind, sample, head, plan.wanted)
        measured = measure(codec, sample, head)
        sentence = f"{plan.kind}: {measured.bytes:.0f} bytes a token, KL {measured.kl:.2g} nat on the sample."
    say(sentence)
    try:
        write(path, Header.of(teacher, name, codec, max_length, sentence), codec, head)
    except OSError as error:
        raise UserError(
            f"The cache {path} cannot be written ({error.strerror}): make room there, or choose another folder."
        ) from error


def _sample(teacher: LanguageModel, sequences: Listed[Sequence], plan: CapturePlan) -> Tensor:
    """Hidden states of about ``plan.sample`` rows, of sequences spread evenly over the data."""
    rows = sum(sum(sequence.response[1:]) for sequence in sequences)
    count = max(1, min(len(sequences), math.ceil(plan.sample * len(sequences) / rows)))
    places = np.linspace(0, len(sequences) - 1, count).round().astype(int)
    picked = sorted((sequences[place] for place in dict.fromkeys(places.tolist())), key=lambda one: -len(one.ids))
    order = np.random.default_rng(0).permutation(len(picked))
    states: list[Tensor] = []
    for batch in _batches(picked, plan.batch_tokens):
        states.extend(_states(teacher, batch))
    return torch.cat([states[place] for place in order])


def _order(sequences: Listed[Sequence], done: set[bytes]) -> list[tuple[bytes, Sequence]]:
    """What is not yet in the cache, each content once, the longest first.

    Batches are cut from this order, so what is left after a kill gives the same batches as without one.
    """
    unique = {sequence_key(sequence): sequence for sequence in sequences}
    waiting = [(key, sequence) for key, sequence in unique.items() if key not in done]
    return sorted(waiting, key=lambda item: (-len(item[1].ids), item[0]))


def _batches(sequences: Listed[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    """Consecutive sequences, the longest first, of which a padded batch has at most ``tokens`` tokens (or one row)."""
    start = 0
    while start < len(sequences):
        size = max(1, tokens // len(sequences[start].ids))
        yield list(sequences[start : start + size])
        start += size


def _states(teacher: LanguageModel, sequences: list[Sequence]) -> list[Tensor]:
    """The last hidden states (rows, D) that predict response tokens, of each sequence."""
    batch = collate(sequences, teacher.pad_id).to(teacher.device)
    hidden: Tensor = teacher(batch)
    predicts = batch.predicts
    return list(torch.split(hidden[predicts].float(), predicts.sum(-1).tolist()))


def _head(teacher: LanguageModel) -> Head:
    """The output head in float32, in which rows are encoded and measured, whatever the teacher's precision."""
    head = teacher.head
    return replace(head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())


def _capture_all(
    teacher: LanguageModel, codec: Codec, waiting: list[tuple[bytes, Sequence]], appender: Appender, tokens: int
) -> None:
    keys, sequences = [key for key, _ in waiting], [sequence for _, sequence in waiting]
    report = Report(sum(sum(sequence.response[1:]) for sequence in sequences))
    at, head = 0, _head(teacher)
    for batch in _batches(sequences, tokens):
        states = _states(teacher, batch)
        finished = _encode(codec, keys[at : at + len(batch)], states, head)
        appender.append(finished)
        report.add(finished)
        at += len(batch)
    report.close()


def _encode(codec: Codec, keys: list[bytes], states: list[Tensor], head: Head) -> list[Finished]:
    seeds = [np.random.default_rng(int.from_bytes(key, "little")) for key in keys]
    offsets = [seed.random(len(rows)) for seed, rows in zip(seeds, states)]
    encoded = encode(codec, torch.cat(states), head, torch.from_numpy(np.concatenate(offsets)))
    return list(_divided(encoded, keys, [len(rows) for rows in states]))


def _divided(encoded: Encoded, keys: list[bytes], rows: list[int]) -> Iterator[Finished]:
    ends = np.cumsum(encoded.lengths)
    row = word = 0
    for key, count in zip(keys, rows):
        through, last = row + count, int(ends[row + count - 1])
        blob = pack(encoded.words[word:last], encoded.lengths[row:through])
        yield Finished(key, blob, count, float(encoded.kl[row:through].mean()), float(encoded.mass[row:through].mean()))
        row, word = through, last


class Report:
    """The progress of a capture: bytes a token, mass kept, KL(teacher ‖ decoded), and the time left."""

    def __init__(self, tokens: int) -> None:
        self._total, self._done, self._bytes, self._kl, self._mass = tokens, 0, 0, 0.0, 0.0
        self._bar, self._began = Bar("tokens", timed=False), time.monotonic()

    def add(self, batch: list[Finished]) -> None:
        """Count a finished batch and show where the capture stands."""
        for one in batch:
            self._done += one.rows
            self._bytes += len(one.blob)
            self._kl += one.kl * one.rows
            self._mass += one.mass * one.rows
        if self._bar.due:
            left = (time.monotonic() - self._began) * (self._total / self._done - 1)
            self._bar.show(self._done, self._total, f"{left:.0f} s left, {self._text()}")

    def close(self) -> None:
        """Leave the terminal as it was, with the last figures."""
        self._bar.close()
        if self._done:
            print(f"{self._done} tokens captured: {self._text()}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        done = max(1, self._done)
        return f"{self._bytes / done:.1f} bytes/token, mass {self._mass / done:.4f}, KL {self._kl / done:.2g} nat"


def _print(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
