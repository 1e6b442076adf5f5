"""Running text in pieces of equal length, as language models read it when they are trained on: no prompts, no padding.

The text is a file, a folder or a data set, as ``readers.read`` takes it, or what every Python installation carries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from preceptor.data import Sequence, encode
from preceptor.errors import UserError
from preceptor.readers import read
from preceptor.sentences import embedded_sentences

EMBEDDED = "sentences"


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


def read_passages(text: Passages, tokenizer: Any, *, seed: int) -> tuple[list[Sequence], list[Sequence]]:
    """Pieces of exactly ``text.length`` tokens, to learn from and held out; all tokens but the first are predicted.

    Documents follow each other with an end-of-sequence token between them and are cut wherever a piece is full; the
    pieces are shuffled by the seed, so that the held-out ones come from all over. The rest at the end is left out.

    Raises:
        UserError: there is no text, or it is too short for the held-out pieces and one more.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids = [token for document in _documents(text, tokenizer) for token in (*document, *end)]
    pieces = [
        Sequence(tuple(ids[start : start + text.length]), (False,) + (True,) * (text.length - 1))
        for start in range(0, len(ids) - text.length + 1, text.length)
    ]
    if len(pieces) <= text.held_out:
        raise UserError(
            f"{text.source} has {len(ids)} tokens, which are {len(pieces)} pieces of {text.length}, and "
            f"{text.held_out} are held out: give more text, shorter pieces, or hold out fewer."
        )
    random.Random(seed).shuffle(pieces)
    return pieces[text.held_out :], pieces[: text.held_out]


def _documents(text: Passages, tokenizer: Any) -> list[tuple[int, ...]]:
    if text.source != EMBEDDED:
        examples = encode(read(text.source, limit=text.limit), tokenizer, max_length=1 << 30)
        return [sequence.ids for sequence in examples]
    grouped = groupby(embedded_sentences(), key=lambda sentence: sentence.source)
    written = [" ".join(sentence.text for sentence in sentences) for _, sentences in grouped][: text.limit]
    return [tuple(ids) for ids in tokenizer(written, add_special_tokens=False)["input_ids"]]
