"""Plain text for an encoder: read, tokenized, and split into training and held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preceptor.data.embedded_sentences import embedded_sentences
from preceptor.data.readers import read
from preceptor.data.sequences import Sequence
from preceptor.data.tokenizer import Tokenizer
from preceptor.errors import UserError


def read_texts(source: str, *, limit: int = 0) -> list[str]:
    """Distinct texts in an order that no run's seed changes: of a file, a folder, a hub data set, or the embedded ones.

    The turns of a chat example are joined by line ends. ``limit`` texts are kept, all if it is 0.
    """
    if source:
        examples = read(source)
        texts = [one.text or "\n".join(message["content"] for message in one.messages) for one in examples]
    else:
        texts = [sentence.text for sentence in embedded_sentences()]
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    order = np.random.default_rng(0).permutation(len(texts))[: limit or None]
    return [texts[i] for i in order]


def encode_texts(texts: list[str], tokenizer: Tokenizer, *, max_length: int) -> list[Sequence]:
    """Each text as one sequence, with the tokenizer's own special tokens, cut to ``max_length`` tokens."""
    listed = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return [Sequence(tuple(ids), (True,) * len(ids)) for ids in listed]


@dataclass(frozen=True)
class Texts:
    """Token sequences to learn from and to be examined on, and the id that pads them."""

    lessons: list[Sequence]
    exam: list[Sequence]
    pad: int


def split_texts(texts: list[str], tokenizer: Tokenizer, *, max_length: int, held_out: int) -> Texts:
    """The first ``held_out`` texts to examine, the others to learn from.

    Raises:
        UserError: nothing would be left of either.
    """
    sequences = encode_texts(texts, tokenizer, max_length=max_length)
    if not 0 < held_out < len(sequences):
        raise UserError(
            f"{held_out} of {len(sequences)} texts are held out: hold out at least 1, and leave some to learn."
        )
    return Texts(sequences[held_out:], sequences[:held_out], padding_id(tokenizer))


def padding_id(tokenizer: Tokenizer) -> int:
    """The id to pad with; it never matters, since the attention mask marks padding."""
    return int(next(number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if number is not None))
