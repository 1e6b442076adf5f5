"""Which move a teacher makes next, from the one turn before it: a logistic regression and a random forest, averaged.

The regression sees words and pairs of words by TF-IDF and a few counts, the forest the counts alone (length, numbers,
signs, cues such as "I started by" or "thanks"). It takes the place of the fine-tuned encoders of the literature, at
seconds of one core. Words, counts, weights and the choice of both models were decided by five-fold cross-validation on
training turns.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from preceptor.dialogue.dialogue import MOVES
from preceptor.errors import UserError

CUES = (
    r"\boh\b",
    r"\bsure\b",
    r"i started by|first,? i",
    r"\bthank",
    r"\byes\b",
    r"\bno\b",
    r"not sure|don't know|confused|don't understand",
    r"mistake|you're right|i see",
    r"\bstill\b",
    r"\bso\b",
    r"therefore",
    r"\bbye|\bhi\b|hello",
    r"\bneed\b",
    r"\bwould\b",
    r"\bshould\b",
    r"\bcorrect\b",
    r"\banswer\b",
    r"\bi think\b",
    r"\bbut\b",
    r"\bbecause|since\b",
)


_SENTENCE = re.compile(r"[.!?](?:\s|$)")


_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def read_moves(path: Path) -> tuple[list[str], list[str]]:
    """The turns ``Speaker: text`` and the move that follows each, of a CSV file ``index,text,label``.

    The text of a row is a line that says what it is, and the turn after it.

    Raises:
        UserError: no such file, or one of another form.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        turns = [row["text"].strip().partition("\n")[2] for row in rows]
        moves = [row["label"] for row in rows]
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as moves ({error}): give a CSV file with index,text,label.") from error
    if unknown := set(moves) - set(MOVES):
        raise UserError(f"{path} has the move '{sorted(unknown)[0]}': moves are {', '.join(MOVES)}.")
    return turns, moves


def counts(turn: str) -> list[float]:
    """Lengths, numbers, signs and cues of a turn ``Speaker: text``."""
    speaker, _, text = turn.partition(":")
    text = text.strip()
    words, numbers = text.split(), _NUMBER.findall(text.replace(",", ""))
    sentences = len(_SENTENCE.findall(text))
    last = float(numbers[-1]) if numbers and len(numbers[-1]) < 9 else -1.0
    signs = [text.count(sign) for sign in "=?!%$"]
    operations = len(re.findall(r"[*x×/+\-]\s?\d", text))
    shape = [len(words), len(numbers), len(set(numbers)), sentences, len(words) / max(1, sentences), last, operations]
    cues = [len(re.findall(cue, text.lower())) for cue in CUES]
    return [float(one) for one in (*shape, *signs, speaker == "Teacher", speaker == "Student", *cues)]


class NextMove:
    """A classifier of the move that follows a turn."""

    def __init__(self, turns: Sequence[str], moves: Sequence[str], *, seed: int = 0) -> None:
        """Learn from turns and the move after each; the seed decides the forest."""
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        token = r"(?u)\b[a-z']+\b|[?!.=%$]"
        self._words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, token_pattern=token)
        self._words.fit(turns)
        self._scale = StandardScaler().fit(self._logarithms(turns))
        self._line = LogisticRegression(C=0.1, max_iter=2000).fit(self._rows(turns), moves)
        self._forest = RandomForestClassifier(200, min_samples_leaf=15, max_features=6, random_state=seed)
        self._forest.fit(np.array([counts(turn) for turn in turns]), moves)
        self.moves: list[str] = list(self._line.classes_)

    def probabilities(self, turns: Sequence[str]) -> npt.NDArray[np.float64]:
        """The probability of each move in ``self.moves``, (turns, moves)."""
        forest = self._forest.predict_proba(np.array([counts(turn) for turn in turns]))
        return np.asarray((self._line.predict_proba(self._rows(turns)) + forest) / 2)

    def predict(self, turns: Sequence[str]) -> list[str]:
        """The likeliest move after each turn."""
        return [self.moves[place] for place in self.probabilities(turns).argmax(1)]

    def _rows(self, turns: Sequence[str]) -> Any:
        from scipy.sparse import csr_matrix, hstack

        shape = 0.3 * self._scale.transform(self._logarithms(turns))
        return hstack([self._words.transform(turns), csr_matrix(shape)]).tocsr()

    @staticmethod
    def _logarithms(turns: Sequence[str]) -> npt.NDArray[np.float64]:
        logarithms: npt.NDArray[np.float64] = np.log1p(np.abs(np.array([counts(turn) for turn in turns])))
        return logarithms
