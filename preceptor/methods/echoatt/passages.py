"""Running text in pieces of equal length, as language models read it when they are trained on: no prompts, no padding.

The text is a file, a folder or a data set, as ``readers.read`` takes it, or what every Python installation carries.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence as Listed
from dataclasses import dataclass
from itertools import groupby, islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from preceptor.data.embedded_sentences import embedded_sentences
from preceptor.data.encoding import encode
from preceptor.data.readers import read
from preceptor.data.sequences import Sequence
from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError

EMBEDDED = "sentences"


TOGETHER = 1000  # documents whose ids are held apart at a time


@dataclass(frozen=True)
class Passages:
    """What running text is read."""

    source: str = EMBEDDED
    """A file (JSONL, JSON, Parquet), a folder, a hub data set, or ``sentences``: the English that Python carries."""
    limit: int | None = None
    """At most so many documents; None reads all."""
    length: int = 256
    """T, tokens of a piece."""
    held_out: int = 32
    """Pieces kept apart for the exam."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to read."""
        if self.length < 2 or self.held_out < 1:
            raise UserError(
                f"text.length is {self.length} and text.held_out {self.held_out}: give at least 2 tokens and 1 piece."
            )


class Pieces(Listed[Sequence]):
    """Pieces of text, (N, T) ids of 4 bytes each: a `Sequence` is made of one when it is asked for."""

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self.ids = ids
        self._response = (False,) + (True,) * (ids.shape[1] - 1)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> Sequence: ...

    @overload
    def __getitem__(self, place: slice) -> Pieces: ...

    def __getitem__(self, place: int | slice) -> Sequence | Pieces:
        if isinstance(place, slice):
            return Pieces(self.ids[place])
        return Sequence(tuple(self.ids[place].tolist()), self._response)


def read_passages(text: Passages, tokenizer: Tokenizer, *, seed: int) -> tuple[Pieces, list[Sequence]]:
    """Pieces of exactly ``text.length`` tokens, to learn from and held out; all tokens but the first are predicted.

    Documents follow each other with an end-of-sequence token between them and are cut wherever a piece is full; the
    pieces are shuffled by the seed, so that the held-out ones come from all over. The rest at the end is left out.

    Raises:
        UserError: there is no text, or it is too short for the held-out pieces and one more.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids = array("i")
    for document in _documents(text, tokenizer):
        ids.extend((*document, *end))
    count = len(ids) // text.length
    if count <= text.held_out:
        raise UserError(
            f"{text.source} has {len(ids)} tokens, which are {count} pieces of {text.length}, and "
            f"{text.held_out} are held out: give more text, shorter pieces, or hold out fewer."
        )
    order = list(range(count))
    random.Random(seed).shuffle(order)
    pieces = Pieces(np.frombuffer(ids, np.int32)[: count * text.length].reshape(count, text.length)[order])
    return pieces[text.held_out :], list(pieces[: text.held_out])


def _documents(text: Passages, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    if text.source != EMBEDDED:
        examples = iter(read(text.source, limit=text.limit))
        while some := list(islice(examples, TOGETHER)):
            yield from (sequence.ids for sequence in encode(some, tokenizer, max_length=1 << 30))
        return
    grouped = groupby(embedded_sentences(), key=lambda sentence: sentence.source)
    written = [" ".join(sentence.text for sentence in sentences) for _, sentences in grouped][: text.limit]
    yield from (tuple(ids) for ids in tokenizer(written, add_special_tokens=False)["input_ids"])
