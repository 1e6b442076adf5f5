"""A student that is a table of competences, for the tests of environments: exact, fast, and without any model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from preceptor.tasks.records import Datum, Item


class ScriptedStudent:
    """Right with probability c of the item's subskill (fixed for each item); a lesson adds ``gain`` an item to c."""

    def __init__(self, start: Mapping[str, float], gain: float = 0.01) -> None:
        self.start, self.gain = dict(start), gain
        self.now = dict(start)
        self.lessons: list[int] = []

    def restart(self) -> None:
        self.now = dict(self.start)

    def answer(self, items: Sequence[Item]) -> list[str]:
        return [item.truth if draw(item) < self.now.get(item.subskill, 0.0) else "wrong" for item in items]

    def learn(self, data: Sequence[Datum], folder: Path) -> None:
        self.lessons.append(len(data))
        counts = Counter(datum.subskill for datum in data)
        self.now = {name: min(1.0, c + self.gain * counts[name]) for name, c in self.start.items()}


def draw(item: Item) -> float:
    """A number in [0, 1) that belongs to the item."""
    return int.from_bytes(hashlib.sha256(item.instruction.encode()).digest()[:4], "big") / 2**32
