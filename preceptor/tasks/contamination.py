"""Which training data repeat a held-out item, wholly or in most of their n-grams."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from preceptor.tasks.records import Datum, Item

NGRAM = 8  # words; shorter texts are compared as wholes only


OVERLAP = 0.8  # share of a text's n-grams that one held-out text holds, from which on it counts as leaked


def leaks(
    data: Iterable[Datum | Item],
    held_out: Iterable[Datum | Item],
    *,
    ngram: int = NGRAM,
    overlap: float = OVERLAP,
) -> set[str]:
    """The ids of training items that are in the held-out set.

    A training item leaks when its question equals a held-out one (text without regard to case, width of characters and
    white space; starter code and image as they are), or when at least ``overlap`` of its word n-grams occur in one
    held-out question with the same image. Numbers and signs are words of the n-grams, so two problems made from one
    pattern with other numbers are two problems.
    """
    whole: set[tuple[str, str, bytes]] = set()
    places: dict[tuple[bytes, tuple[str, ...]], set[int]] = {}
    for place, item in enumerate(held_out):
        text, starter, image = key = _key(item)
        whole.add(key)
        for gram in _grams(text + " " + starter, ngram):
            places.setdefault((image, gram), set()).add(place)
    found = set()
    for item in data:
        text, starter, image = key = _key(item)
        grams = _grams(text + " " + starter, ngram)
        hits: dict[int, int] = {}
        for gram in grams:
            for place in places.get((image, gram), ()):
                hits[place] = hits.get(place, 0) + 1
        if key in whole or (grams and max(hits.values(), default=0) >= overlap * len(grams)):
            found.add(item.id)
    return found


def _key(item: Datum | Item) -> tuple[str, str, bytes]:
    image = b"" if item.image is None else bytes(item.image.tobytes())
    return _normal(item.instruction), _normal(item.starter), image


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _grams(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
