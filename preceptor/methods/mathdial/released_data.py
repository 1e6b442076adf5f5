"""What is known of MathDial, GSM8K and human ratings of uptake, measured anew where the data is, beside what was known.

The dialogues' counts were published or are those of the published evaluation on the released test split; the figures
of the others are those of their files.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from preceptor.dialogue.dialogue import Dialogue, Outcome, play, read_dialogues, write_dialogues
from preceptor.dialogue.measures import answer_was_there, moves_by_fifth, timing, words_a_turn
from preceptor.dialogue.tutors import next_step_tutor, parrot_student, self_correcting_student, teller
from preceptor.errors import UserError
from preceptor.methods.mathdial.common_errors import CommonErrors, answer_of, marks_of, pick, read_problems, steps_of
from preceptor.methods.mathdial.next_move import NextMove, read_moves
from preceptor.methods.mathdial.text_metrics import TextEncoder
from preceptor.methods.mathdial.uptake import Vectors, cross_fitted, overlap_share
from preceptor.statistics import Cell, Claim, compare, mean_of

KS = range(1, 8)


COUNTS = {
    "dialogues": 599,
    "distinct questions": 394,
    "teacher turns": 3699,
    "student turns": 3329,
    "student turns under a name": 234,
    "focus": 1259,
    "probing": 952,
    "generic": 890,
    "telling": 598,
    "generic openers": 454,
    "solved": 433,
    "revealed": 94,
    "unsolved": 68,
    "no report": 4,
    "gold in the wrong solution": 150,
    "gold in the first student turn": 132,
}


AT_K = {
    "success@k": [216, 284, 356, 412, 459, 486, 517],
    "telling@k": [16, 25, 30, 34, 46, 52, 58],
    "success@k, label Student only": [205, 268, 334, 388, 431, 456, 486],
    "telling@k, label Student only": [17, 26, 31, 36, 49, 55, 62],
    "success@k, answer not there before": [96, 154, 221, 273, 316, 340, 370],
}


FIFTHS = {"telling": [3, 10, 17, 25, 34], "probing": [23, 36, 33, 22, 11]}


STEPS = {2: 1961, 3: 2149, 4: 1659, 5: 955, 6: 419, 7: 227, 8: 90, 9: 13}


MARKS = 23716


CORRECT = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}


@dataclass
class Found:
    """What a part of the study measured: rows of a table (what was known, what is found) and claims."""

    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def same(self, name: str, known: object, found: object) -> None:
        """A row of what must be equal, and its claim."""
        self.rows[name] = {"known": _text(known), "found": _text(found)}
        figure = "equal" if known == found else f"{_text(found)} against {_text(known)}"
        self.claims.append(Claim(f"{name}, exactly", figure, known == found))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def released_dialogues(path: Path, folder: Path) -> Found:
    """The test split through parser, metric and writer."""
    dialogues, found = read_dialogues(path), Found()
    found.same("what the parser counts", COUNTS, counts_of(dialogues))
    for name, known in AT_K.items():
        found.same(f"{name}, k = 1 to 7", known, at_k(dialogues, name))
    for move, known in FIFTHS.items():
        fifths = moves_by_fifth(dialogues)
        found.same(f"{move} by fifths, %", known, [round(100 * fifth[move] / sum(fifth.values())) for fifth in fifths])
    found.same("words a teacher turn", 15.7, round(words_a_turn(dialogues), 1))
    copy = folder / "written again.jsonl"
    write_dialogues(copy, dialogues)
    found.same("written again", "byte for byte", "byte for byte" if copy.read_bytes() == path.read_bytes() else "else")
    copy.unlink()
    strict = [timing(dialogue, strict_final=True) for dialogue in dialogues]
    found.rows["success@k by the final number, k = 1 to 7"] = {
        "found": _text([sum(one.solved_by(k) for one in strict) for k in KS])
    }
    found.rows["last answer right"] = {"found": sum(one.final_correct for one in strict)}
    return found


def counts_of(dialogues: Sequence[Dialogue]) -> dict[str, int]:
    """The counts of ``COUNTS`` in dialogues that were read."""
    teachers = [turn for dialogue in dialogues for turn in dialogue.of("teacher")]
    students = [turn for dialogue in dialogues for turn in dialogue.of("student")]
    moves, outcomes = Counter(turn.move for turn in teachers), Counter(dialogue.outcome for dialogue in dialogues)
    endings: tuple[Outcome, ...] = ("solved", "revealed", "unsolved")
    return {
        "dialogues": len(dialogues),
        "distinct questions": len({dialogue.problem for dialogue in dialogues}),
        "teacher turns": len(teachers),
        "student turns": len(students),
        "student turns under a name": sum(not (turn.prefix or "").startswith("Student") for turn in students),
        **{move: moves[move] for move in ("focus", "probing", "generic", "telling")},
        "generic openers": sum(dialogue.turns[0].move == "generic" for dialogue in dialogues),
        **{ending: outcomes[ending] for ending in endings},
        "no report": outcomes[None],
        "gold in the wrong solution": sum(map(answer_was_there, dialogues)),
        "gold in the first student turn": sum(timing(dialogue).solved_by(0) for dialogue in dialogues),
    }


def at_k(dialogues: Sequence[Dialogue], name: str) -> list[int]:
    """How many dialogues succeed or tell by k = 1 to 7, under one of the rules that ``AT_K`` names."""
    kept = [one for one in dialogues if "not there" not in name or not answer_was_there(one)]
    timings = [timing(one, labelled_only="label" in name) for one in kept]
    if name.startswith("success"):
        return [sum(one.solved_by(k) for one in timings) for k in KS]
    return [sum(one.revealed_by(k) for one in timings) for k in KS]


def scripted_play(path: Path) -> Found:
    """Scripted tutors and students on the released problems: success@k and telling@k are step functions of k."""
    cases = [replace(one, turns=(), outcome=None, facts={}) for one in read_dialogues(path)]
    cases = [one for one in cases if not answer_was_there(one)]
    found = Found()
    for after in (1, 3, 5):
        held = play(next_step_tutor, self_correcting_student(after), cases, rounds=7)
        step = [len(cases) * (k >= after) for k in KS]
        found.same(f"constant tutor, student corrects after {after}: success@k", step, _by_k(held, revealed=False))
        found.same(f"constant tutor, student corrects after {after}: telling@k", [0] * 7, _by_k(held, revealed=True))
    for at in (1, 4):
        held = play(teller(at), parrot_student, cases, rounds=7)
        step = [len(cases) * (k >= at) for k in KS]
        found.same(f"teller at {at}, parroting student: success@k", step, _by_k(held, revealed=False))
        found.same(f"teller at {at}, parroting student: telling@k", step, _by_k(held, revealed=True))
    return found


def _by_k(dialogues: Sequence[Dialogue], *, revealed: bool) -> list[int]:
    timings = [timing(one) for one in dialogues]
    return [sum(one.revealed_by(k) if revealed else one.solved_by(k) for one in timings) for k in KS]


def filters(folder: Path) -> Found:
    """GSM8K through the filters of the common-error picker, and real wrong solutions through the picker."""
    problems, found = read_problems(folder / "train.jsonl"), Found()
    steps = Counter(steps_of(worked) for _, worked in problems)
    found.same("GSM8K, steps of the worked solutions", STEPS, dict(sorted(steps.items())))
    slips = [slip for _, worked in problems for _, slip in marks_of(worked)]
    found.same(
        "GSM8K, calculator marks, and those that are off", [MARKS, 0], [len(slips), sum(s > 0.01 for s in slips)]
    )
    lines = (folder / "example_model_solutions.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    found.same("right solutions of four models, by their file", CORRECT, _right(records))
    agreed = {
        name: sum(answer_of(one[name]["solution"], "A:") == answer_of(one["ground_truth"], "A:") for one in records)
        for name in CORRECT
    }
    found.rows["right solutions of four models, by answer_of"] = {"known": _text(CORRECT), "found": _text(agreed)}
    off = sum(abs(agreed[name] - CORRECT[name]) for name in CORRECT)
    found.claims.append(Claim("Answers are read as their file has them, but for one in 5,276", str(off), off <= 1))
    settings = CommonErrors(mark="A:", samples=4)
    drawn = [pick(one["ground_truth"], [one[name]["solution"] for name in CORRECT], settings) for one in records]
    kept = Counter(one.refused or "picked" for one in drawn)
    found.rows["common errors among four solutions of 1,319 problems"] = {"found": _text(dict(kept))}
    passed = kept["picked"] > 0 and all(one.refused or 300 <= len(one.solution) <= 500 for one in drawn)
    claim = "Every picked error passes the filters, and some are picked"
    found.claims.append(Claim(claim, str(kept["picked"]), passed))
    return found


def _right(records: Sequence[dict[str, dict[str, bool]]]) -> dict[str, int]:
    return {name: sum(one[name]["is_correct"] for one in records) for name in CORRECT}


def next_moves(folder: Path, seeds: int) -> dict[str, list[float]]:
    """For each test turn whether the classifier is right, a share over the seeds, and whether the majority is.

    ``f1``: macro-F1 of each seed; ``accuracy``: of each seed.
    """
    from sklearn.metrics import f1_score

    turns, moves = read_moves(folder / "moves_train_window_1.csv")
    asked, truth = read_moves(folder / "moves_test_window_1.csv")
    [(majority, _)] = Counter(moves).most_common(1)
    predicted = [NextMove(turns, moves, seed=seed).predict(asked) for seed in range(seeds)]
    right = [[float(guess == move) for guess, move in zip(guesses, truth)] for guesses in predicted]
    return {
        "right": [mean_of(list(one)).mean for one in zip(*right)],
        "majority": [float(move == majority) for move in truth],
        "accuracy": [mean_of(one).mean for one in right],
        "f1": [float(f1_score(truth, guesses, average="macro")) for guesses in predicted],
    }


def next_move_claims(figures: dict[str, list[float]]) -> Found:
    """Whether the classifier beats the majority class on the same turns."""
    found, n = Found(), len(figures["right"])
    accuracy, majority = mean_of(figures["right"]), mean_of(figures["majority"])
    found.rows["next move from one turn: accuracy, %"] = {
        "known": f"majority {100 * majority.mean:.1f}",
        "found": f"{100 * accuracy.mean:.1f} ± {100 * (accuracy.mean * (1 - accuracy.mean) / n) ** 0.5:.1f}",
    }
    found.rows["next move from one turn: macro-F1"] = {"found": mean_of(figures["f1"])}
    text = "The move classifier beats the majority class on the same turns"
    found.claims.append(compare(figures["right"], figures["majority"], text, better="higher").claim)
    return found


def uptake_ratings(path: Path, seeds: int, encoder: TextEncoder | None) -> dict[str, list[float]]:
    """Spearman's correlations with the human ratings: of the share of words used again, and of pJSD for each seed.

    No rating is seen in training, and no exchange is scored by a classifier that saw its conversation.
    """
    from scipy.stats import spearmanr

    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path} has no exchange: give the file of rated exchanges.")
    exchanges = [(row["student_text"], row["teacher_text"]) for row in rows]
    rated = [place for place, row in enumerate(rows) if row["uptake_zscore"]]
    truth = [float(rows[place]["uptake_zscore"]) for place in rated]
    encoded, groups = Vectors.of(exchanges, encoder), [row["obs_id"] for row in rows]
    simple = [overlap_share(*exchanges[place]) for place in rated]
    learned = [cross_fitted(encoded, groups, seed=seed)[rated] for seed in range(seeds)]
    results = [spearmanr(one, truth) for one in (simple, *learned)]
    return {
        "n": [float(len(rated))],
        "share": [float(results[0].statistic), float(results[0].pvalue)],
        "pjsd": [float(one.statistic) for one in results[1:]],
        "p": [float(one.pvalue) for one in results[1:]],
    }


def uptake_claims(figures: dict[str, list[float]], encoder: str) -> Found:
    """Whether both estimates of uptake follow the human ratings."""
    found, n = Found(), int(figures["n"][0])
    share, p = figures["share"]
    found.rows["uptake, words used again: Spearman with human ratings"] = {
        "found": f"{share:.3f} (n = {n}, p = {p:.0e})"
    }
    name = f"uptake, pJSD with {encoder}: Spearman with human ratings"
    worst = max(figures["p"])
    found.rows[name] = {"found": f"{mean_of(figures['pjsd'])} (n = {n}, p ≤ {worst:.0e})"}
    for text, value, chance in (("words used again", share, p), ("pJSD", min(figures["pjsd"]), worst)):
        figure = f"Spearman {value:.3f}, n = {n}, p = {chance:.0e}"
        found.claims.append(Claim(f"Uptake by {text} follows the human ratings", figure, value > 0 and chance < 0.001))
    return found
