"""Uptake: how much a teacher's turn builds on the student's turn.

Source: Demszky et al. 2021, Measuring Conversational Uptake (https://arxiv.org/abs/2106.03873). A classifier learns to
tell true exchanges (s, t) from the student's turn with another teacher's (s, t'); no human rating is used. With
D(s, t) its probability that the exchange is true, the pointwise Jensen-Shannon divergence is

    pJSD(s, t) = log 2 + 1/2 (log D(s, t) + mean over t' of log(1 - D(s, t')))

Their classifier is a fine-tuned BERT; ours is a logistic regression on overlap, idf weights and a sentence encoder's
cosine [a setting that the method leaves open]. ``overlap_share`` is the simple stand-in: the share of the student's
words that the teacher uses again.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from preceptor.errors import UserError
from preceptor.methods.mathdial.text_metrics import TextEncoder

Exchange = tuple[str, str]


"""What a student says, and what the teacher says next."""


Places = Sequence[int] | npt.NDArray[np.int64]


_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+(?:\.\d+)?")


def words(text: str) -> list[str]:
    """Words and numbers in lower case."""
    return _WORD.findall(text.lower().replace("’", "'"))


def overlap_share(student: str, teacher: str) -> float:
    """The share of the student's distinct words that the teacher uses again, in [0, 1]; 0 for a silent student."""
    theirs = set(words(student))
    return len(theirs & set(words(teacher))) / len(theirs) if theirs else 0.0


@dataclass(frozen=True)
class Rarity:
    """Inverse document frequencies over turns: log((n + 1) / (turns that hold the word + 1))."""

    turns: int
    counts: dict[str, int]

    @classmethod
    def of(cls, exchanges: Sequence[Exchange]) -> Rarity:
        """Count the turns of exchanges that hold each word."""
        counts = Counter(word for exchange in exchanges for turn in exchange for word in set(words(turn)))
        return cls(2 * len(exchanges), dict(counts))

    def weight(self, chosen: set[str]) -> float:
        """The summed idf of words."""
        return sum(math.log((self.turns + 1) / (self.counts.get(word, 0) + 1)) for word in chosen)


def features(student: str, teacher: str, rarity: Rarity, cosine: float) -> list[float]:
    """What the classifier sees of an exchange: shared words plain and by idf, word pairs, numbers, lengths, cosine."""
    theirs, answered = words(student), words(teacher)
    mine, yours = set(theirs), set(answered)
    shared, pairs = mine & yours, set(zip(theirs, theirs[1:]))
    numbers = {word for word in mine if word[0].isdigit()}
    weight = rarity.weight(shared)
    return [
        len(shared) / max(1, len(mine)),
        weight / (rarity.weight(mine) + 1e-9),
        weight / (rarity.weight(yours) + 1e-9),
        math.log1p(weight),
        len(pairs & set(zip(answered, answered[1:]))) / max(1, len(pairs)),
        len(numbers & yours) / max(1, len(numbers)),
        math.log1p(len(theirs)),
        math.log1p(len(answered)),
        cosine,
    ]


@dataclass(frozen=True, eq=False)
class Vectors:
    """Exchanges with the encoder's vectors of both turns, (exchanges, width) each."""

    exchanges: Sequence[Exchange]
    students: npt.NDArray[Any]
    teachers: npt.NDArray[Any]

    @classmethod
    def of(cls, exchanges: Sequence[Exchange], encoder: TextEncoder | None) -> Vectors:
        """Encode exchanges; without an encoder every cosine is 0."""
        if encoder is None:
            nothing = np.zeros((len(exchanges), 1))
            return cls(exchanges, nothing, nothing)
        students, teachers = (encoder.means([exchange[side] for exchange in exchanges]).numpy() for side in (0, 1))
        return cls(exchanges, students, teachers)

    def rows(self, students: Places, teachers: Places, rarity: Rarity) -> list[list[float]]:
        """The features of student turns with teacher turns, by their places."""
        return [
            features(self.exchanges[s][0], self.exchanges[t][1], rarity, float(self.students[s] @ self.teachers[t]))
            for s, t in zip(students, teachers)
        ]


def cross_fitted(
    encoded: Vectors, groups: Sequence[str], *, folds: int = 5, seed: int = 0, others: int = 8
) -> npt.NDArray[Any]:
    """The pJSD of every exchange, (exchanges,) in nats, each by a classifier that was trained on other conversations.

    Args:
        encoded: the exchanges, encoded.
        groups: the conversation of each exchange: no conversation is on both sides of a fold.
        folds: classifiers.
        seed: of the random teacher turns.
        others: random teacher turns t' for each student turn, in training (one half of them) and in the mean.

    Raises:
        UserError: fewer conversations than folds.
    """
    from sklearn.model_selection import GroupKFold

    if len(set(groups)) < folds:
        raise UserError(f"{len(set(groups))} conversations and {folds} folds: give more conversations.")
    random, found = np.random.default_rng(seed), np.zeros(len(encoded.exchanges))
    for train, test in GroupKFold(folds).split(found, groups=groups):
        rarity = Rarity.of([encoded.exchanges[place] for place in train])
        classifier = _fit(encoded, train, rarity, random, max(1, others // 2))
        true = classifier.predict_log_proba(encoded.rows(test, test, rarity))[:, 1]
        false = [encoded.rows(test, random.choice(train, len(test)), rarity) for _ in range(others)]
        missed = np.mean([classifier.predict_log_proba(rows)[:, 0] for rows in false], axis=0)
        found[test] = math.log(2) + 0.5 * (true + missed)
    return found


def _fit(encoded: Vectors, train: npt.NDArray[Any], rarity: Rarity, random: np.random.Generator, others: int) -> Any:
    """A classifier of true exchanges (1) against those with another teacher's turn (0), balanced."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = encoded.rows(train, train, rarity)
    for _ in range(others):
        rows += encoded.rows(train, random.choice(train, len(train)), rarity)
    labels = [1] * len(train) + [0] * (others * len(train))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    return model.fit(rows, labels)
