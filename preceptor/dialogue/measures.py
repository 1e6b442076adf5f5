"""How good a tutor is: whether the student gets there, whether the answer was given away, and how its turns read.

success@k, telling@k, KF1 and the choice of the others follow MathDial (Macina et al. 2023,
https://arxiv.org/abs/2305.14536) and its published evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from preceptor.dialogue.dialogue import MOVES, Dialogue, Role, Side, play
from preceptor.dialogue.numerals import final_is, mentions, states_number
from preceptor.errors import UserError


@dataclass(frozen=True)
class Timing:
    """When the answer was given first in a dialogue.

    ``student``, ``teacher``: the index of that side's first turn that holds the gold answer, counted from 0 at the
    opening line and the first attempt; infinite where there is none. ``final_correct``: whether the student's last
    answer is right, which it is not where a student goes back to the wrong one.
    """

    student: float
    teacher: float
    final_correct: bool

    def solved_by(self, k: int) -> bool:
        """Whether the student has given the answer after ``k`` interventions (S <= k)."""
        return self.student <= k

    def revealed_by(self, k: int) -> bool:
        """Whether the teacher had given it by then, and not after the student (T <= min(S, k)).

        A teacher who confirms what the student has found does not tell. Turn j of the teacher comes before turn j of
        the student, so T = S is telling.
        """
        return self.teacher <= min(self.student, k)


def timing(dialogue: Dialogue, *, strict_final: bool = False, labelled_only: bool = False) -> Timing:
    """When the answer was given first.

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
    revealed = (place for place, turn in enumerate(dialogue.of("teacher")) if mentions(turn.text, dialogue.gold))
    answers = [turn.text for turn in students if states_number(turn.text)]
    final = bool(answers) and final_is(answers[-1], dialogue.gold)
    return Timing(next(found, math.inf), next(revealed, math.inf), final)


def _is_labelled(prefix: str | None) -> bool:
    return not prefix or prefix.lower().startswith("student")


def success_at(timings: Sequence[Timing], k: int) -> float:
    """success@k: the share of dialogues in which the student has given the answer after k interventions."""
    _refuse_none(timings)
    return sum(one.solved_by(k) for one in timings) / len(timings)


def telling_at(timings: Sequence[Timing], k: int) -> float:
    """telling@k: the share of dialogues in which the teacher gave the answer away within k interventions."""
    _refuse_none(timings)
    return sum(one.revealed_by(k) for one in timings) / len(timings)


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
