"""How good a tutor is: whether the student gets there, whether the answer was given away, and how its turns read.

success@k, telling@k, KF1 and the choice of the others follow MathDial (Macina et al. 2023,
https://arxiv.org/abs/2305.14536) and its published evaluation.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preceptor.dialogue import MOVES, Dialogue, Role, Side, play
from preceptor.errors import UserError
from preceptor.models import load_encoder
from preceptor.numerals import final_is, mentions, states_number

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Timing:
    """When the answer was said first in a dialogue.

    ``student``, ``teacher``: the index of that side's first turn that holds the gold answer, counted from 0 at the
    opening line and the first attempt; infinite where there is none. ``final_correct``: whether the student's last
    answer is right, which it is not where a student goes back to the wrong one.
    """

    student: float
    teacher: float
    final_correct: bool

    def solved_by(self, k: int) -> bool:
        """Whether the student has said the answer after ``k`` interventions (S <= k)."""
        return self.student <= k

    def told_by(self, k: int) -> bool:
        """Whether the teacher had said it by then, and not after the student (T <= min(S, k)).

        A teacher who confirms what the student has found does not tell. Turn j of the teacher comes before turn j of
        the student, so T = S is telling.
        """
        return self.teacher <= min(self.student, k)


def timing(dialogue: Dialogue, *, strict_final: bool = False, labelled_only: bool = False) -> Timing:
    """When the answer was said first.

    A dialogue that the student opens has the student's indices shifted by one, so that turn j of the teacher still
    comes before turn j of the student; the opening turn of the student then has the index -1.

    Args:
        dialogue: the dialogue, with a gold answer.
        strict_final: a student's turn counts only where its last or its declared number is the answer; by default any
            mention counts, one of an intermediate figure too. A teacher's mention always counts as telling.
        labelled_only: leave out student turns whose speaker is written by name, as a count of the literal prefix
            ``Student:`` does.
    """
    says = final_is if strict_final else mentions
    students = [turn for turn in dialogue.of("student") if not labelled_only or _is_labelled(turn.prefix)]
    shift = 1 if dialogue.turns and dialogue.turns[0].role == "student" else 0
    found = (place - shift for place, turn in enumerate(students) if says(turn.text, dialogue.gold))
    told = (place for place, turn in enumerate(dialogue.of("teacher")) if mentions(turn.text, dialogue.gold))
    answers = [turn.text for turn in students if states_number(turn.text)]
    final = bool(answers) and final_is(answers[-1], dialogue.gold)
    return Timing(next(found, math.inf), next(told, math.inf), final)


def _is_labelled(prefix: str | None) -> bool:
    return not prefix or prefix.lower().startswith("student")


def success_at(timings: Sequence[Timing], k: int) -> float:
    """success@k: the share of dialogues in which the student has said the answer after k interventions."""
    _refuse_none(timings)
    return sum(one.solved_by(k) for one in timings) / len(timings)


def telling_at(timings: Sequence[Timing], k: int) -> float:
    """telling@k: the share of dialogues in which the teacher gave the answer away within k interventions."""
    _refuse_none(timings)
    return sum(one.told_by(k) for one in timings) / len(timings)


def _refuse_none(timings: Sequence[Timing]) -> None:
    if not timings:
        raise UserError("There is no dialogue to measure: give at least one.")


def play_all(
    tutors: dict[str, Side], student: Side, cases: Sequence[Dialogue], rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, list[Dialogue]]]:
    """Every tutor against the student on the same cases: figures in percent, and the dialogues."""
    held = {name: play(tutor, student, cases, rounds=rounds) for name, tutor in tutors.items()}
    figures = {}
    for name, dialogues in held.items():
        loose, strict = ([timing(one, strict_final=final) for one in dialogues] for final in (False, True))
        figures[name] = {
            f"success@{rounds}": 100 * success_at(loose, rounds),
            f"success@{rounds}, final number": 100 * success_at(strict, rounds),
            f"telling@{rounds}": 100 * telling_at(loose, rounds),
            "last answer right": 100 * sum(one.final_correct for one in loose) / len(loose),
        }
    return figures, held


def answer_was_there(dialogue: Dialogue) -> bool:
    """Whether the wrong solution holds the gold number already: success@0 then comes for free."""
    return mentions(dialogue.wrong_solution, dialogue.gold)


def moves_by_fifth(dialogues: Sequence[Dialogue]) -> list[dict[str, int]]:
    """How often each move is made in each fifth of a dialogue's teacher turns; turn i of n is in fifth ⌊5 i / n⌋."""
    fifths: list[Counter[str]] = [Counter() for _ in range(5)]
    for dialogue in dialogues:
        turns = dialogue.of("teacher")
        for place, turn in enumerate(turns):
            fifths[5 * place // len(turns)][turn.move] += 1
    return [{move: fifth[move] for move in MOVES} for fifth in fifths]


def words_a_turn(dialogues: Sequence[Dialogue], role: Role = "teacher") -> float:
    """The mean number of words of one side's turns."""
    lengths = [len(turn.text.split()) for dialogue in dialogues for turn in dialogue.of(role)]
    return sum(lengths) / len(lengths) if lengths else math.nan


def sbleu(written: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 with brevity penalty under sacrebleu's tokenisation, 0 to 100 (Post 2018).

    Raises:
        UserError: no text, or texts without a reference each.
    """
    import sacrebleu

    _same_number(written, references)
    return float(sacrebleu.corpus_bleu(list(written), [list(references)]).score)


def _same_number(written: Sequence[str], references: Sequence[str]) -> None:
    if not written or len(written) != len(references):
        raise UserError(f"{len(written)} texts and {len(references)} references: give one reference for each text.")


def knowledge_f1(written: str, knowledge: str) -> float:
    """KF1: the F1 of two texts' words, overlap by the smaller count, 0 to 1; 0 where either has no word.

    Words are normalised as in SQuAD: lower case, without punctuation and articles. A high KF1 can mean telling.
    """
    ours, theirs = Counter(content_words(written)), Counter(content_words(knowledge))
    overlap = sum((ours & theirs).values())
    if not overlap:
        return 0.0
    precision, recall = overlap / sum(ours.values()), overlap / sum(theirs.values())
    return 2 * precision * recall / (precision + recall)


def content_words(text: str) -> list[str]:
    """A text's words in lower case, without punctuation, a, an and the."""
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


class Encoder:
    """An encoder of texts, by a name that ``load_encoder`` takes; every figure that rests on it names it.

    Raises:
        UserError: no such model.
    """

    def __init__(self, name: str = "minilm-l6") -> None:
        self.name = name
        self.model, self.tokenizer = load_encoder(name)

    @torch.no_grad()
    def tokens(self, texts: Sequence[str], *, batch_size: int = 32) -> list[Tensor]:
        """The last hidden states of each text's tokens, of length 1: (tokens, width), without special tokens."""
        special = torch.tensor(self.tokenizer.all_special_ids)
        limit = min(512, self.model.config.max_position_embeddings)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            said = [texts[place] for place in chosen]
            batch = self.tokenizer(said, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            states = torch.nn.functional.normalize(self.model(**batch).last_hidden_state, dim=-1)
            for place, state, ids in zip(chosen, states, batch["input_ids"]):
                vectors[place] = state[~torch.isin(ids, special)]
        return vectors

    def means(self, texts: Sequence[str]) -> Tensor:
        """One vector of length 1 a text, the mean of its tokens': (texts, width); zeros for a text without tokens."""
        found = [state.mean(0) if len(state) else state.new_zeros(state.shape[1]) for state in self.tokens(texts)]
        return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def bert_f1(written: Sequence[str], references: Sequence[str], encoder: Encoder) -> list[float]:
    """BERT F1 of each text against its reference, 0 to 100 (Zhang et al. 2020), without idf weights or rescaling.

    Each token is matched with the other text's nearest by cosine; precision is the mean over the text's tokens, recall
    over the reference's. Figures of two encoders cannot be compared: name the encoder with the result.

    Raises:
        UserError: no text, or texts without a reference each.
    """
    _same_number(written, references)
    vectors = encoder.tokens([*written, *references])
    return [100 * _greedy_f1(a, b) for a, b in zip(vectors[: len(written)], vectors[len(written) :])]


def _greedy_f1(ours: Tensor, theirs: Tensor) -> float:
    if not len(ours) or not len(theirs):
        return 0.0
    cosine = ours @ theirs.T
    precision, recall = float(cosine.max(1).values.mean()), float(cosine.max(0).values.mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
