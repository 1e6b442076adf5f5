"""Tutoring dialogues: their form in memory and on disk, the moves of a teacher, and the loop that plays one.

The form on disk is that of MathDial (Macina et al. 2023, https://arxiv.org/abs/2305.14536): JSON Lines whose
``conversation`` joins turns ``Speaker: (move)text`` by ``|EOM|``. What is read is written again byte for byte. What
that form has no place for (the intents within a move, how a played dialogue ended) goes into keys of our own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from preceptor.dialogue.numerals import final_is, mentions
from preceptor.errors import UserError
from preceptor.files import write_whole

Role = Literal["teacher", "student"]


Outcome = Literal["solved", "revealed", "unsolved", "out of turns", "stopped", "failed"]


BETWEEN = "|EOM|"


MOVES: dict[str, tuple[str, ...]] = {
    "focus": ("seek strategy", "guide student focus", "recall relevant information"),
    "probing": ("ask for explanation", "seek self-correction", "perturb the question", "seek world knowledge"),
    "telling": ("reveal strategy", "reveal answer"),
    "generic": ("greeting/farewell", "general inquiry"),
}


"""A teacher's moves with the intents within each. Focus and probing are scaffolding; least to most specific: probing,
focus, telling."""


SCAFFOLDING = ("focus", "probing")


EARLIER_NAMES = {"leaking": "telling"}


SELF_REPORTS = {"Yes": "solved", "Yes, but I had to reveal the answer": "revealed", "No": "unsolved"}


OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


_SPEAKER = re.compile(r"([^\W\d_][\w'’.-]*)(:\s*)")


_MARK = re.compile(r"\(([^()\n]{1,30})\)")


_END = re.compile(r"\|EOM\||<\s*/?\s*(?:EOM|EOT|eos|im_end|\|im_end\||\|endoftext\||end of message)\s*>|\[END\]", re.I)


@dataclass(frozen=True)
class Turn:
    """What one side says.

    ``move`` and ``intent`` are a teacher's (``MOVES``), "" where none is given. ``prefix`` is what stood before the
    text in a file that was read, None for a turn of our own. ``error``: why there is no text, where a model failed.
    """

    role: Role
    text: str
    move: str = ""
    intent: str = ""
    prefix: str | None = None
    error: str = ""

    def __post_init__(self) -> None:
        """Refuse a move or an intent that there is not."""
        if self.move and self.move not in MOVES:
            raise UserError(f"'{self.move}' is no move of a teacher: choose one of {', '.join(MOVES)}.")
        if self.intent and self.intent not in MOVES.get(self.move, ()):
            known = ", ".join(MOVES.get(self.move, ())) or "none without a move"
            raise UserError(f"'{self.intent}' is no intent of the move '{self.move}': there are {known}.")

    @property
    def written(self) -> str:
        """The turn as the released form has it: what stood before the text while it still says the same."""
        if self.prefix is not None:
            there = parse_turn(self.prefix, self.role)
            if (there.role, there.move) == (self.role, self.move):
                return self.prefix + self.text
        mark = f"({self.move})" if self.move else ""
        return f"{self.role.capitalize()}: {mark}{self.text}"


@dataclass(frozen=True)
class Dialogue:
    """A problem, a student who holds a wrong solution of it, and what student and teacher say.

    ``solution``: the worked steps, a line each, the last one the answer alone. ``facts``: the record that was read,
    whose other fields (ids, ratings) are written back as they were.
    """

    problem: str
    solution: str
    wrong_solution: str = ""
    persona: str = ""
    turns: tuple[Turn, ...] = ()
    outcome: Outcome | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def gold(self) -> str:
        """The right answer: the last line of the worked solution."""
        return last_line(self.solution).replace(",", "")

    @property
    def name(self) -> str:
        """The student's first name, as the persona begins, or ""."""
        first = self.persona.split(maxsplit=1)[:1]
        return first[0] if first and first[0][:1].isupper() else ""

    def of(self, role: Role) -> tuple[Turn, ...]:
        """The turns of one side."""
        return tuple(turn for turn in self.turns if turn.role == role)

    def with_turns(self, *turns: Turn) -> Dialogue:
        """The dialogue with further turns."""
        return replace(self, turns=(*self.turns, *turns))


def last_line(solution: str) -> str:
    """The last piece of a worked solution; steps are joined by line ends, or by the two characters backslash and n."""
    return re.split(r"\n|\\n", solution.strip())[-1].strip()


def parse_move(mark: str) -> str:
    """The move that a mark in brackets names: any case, an earlier name, or one letter wrong or two; else ""."""
    name = mark.strip().lower()
    name = EARLIER_NAMES.get(name, name)
    near = difflib.get_close_matches(name, MOVES, n=1, cutoff=0.8)
    return near[0] if near else ""


def parse_turn(written: str, default: Role, *, name: str = "") -> Turn:
    """A turn of the released form.

    The speaker is ``Teacher``, ``Student`` or the student's own ``name``; anything else before a colon belongs to the
    text, and the turn to ``default``. Only a teacher's turn carries a move; brackets that name none are text.
    """
    begins = _SPEAKER.match(written)
    speaker = begins[1] if begins else ""
    known = {"teacher": "teacher", "student": "student", **({name.lower(): "student"} if name else {})}
    role: Role = "teacher" if known.get(speaker.lower(), default) == "teacher" else "student"
    at = begins.end() if begins and speaker.lower() in known else 0
    mark = _MARK.match(written, at) if role == "teacher" else None
    move = parse_move(mark[1]) if mark else ""
    at = mark.end() if mark and move else at
    return Turn(role, written[at:], move, prefix=written[:at])


def parse_dialogue(record: Mapping[str, Any]) -> Dialogue:
    """A dialogue from a record of the released form.

    Raises:
        UserError: a field is missing.
    """
    missing = [key for key in ("question", "ground_truth", "conversation") if not isinstance(record.get(key), str)]
    if missing:
        raise UserError(f"A dialogue needs the text field '{missing[0]}', as MathDial's JSON Lines have it.")
    persona = str(record.get("student_profile") or "")
    bare = Dialogue(record["question"], record["ground_truth"], str(record.get("student_incorrect_solution") or ""))
    bare = replace(bare, persona=persona, facts=dict(record), outcome=_outcome(record))
    turns: list[Turn] = []
    for written in record["conversation"].split(BETWEEN) if record["conversation"] else []:
        default: Role = "student" if turns and turns[-1].role == "teacher" else "teacher"
        turns.append(parse_turn(written, default, name=bare.name))
    intents = record.get("intents") or [""] * len(turns)
    return replace(bare, turns=tuple(replace(turn, intent=intent) for turn, intent in zip(turns, intents)))


def _outcome(record: Mapping[str, Any]) -> Outcome | None:
    reported = record.get("outcome") or SELF_REPORTS.get(str(record.get("self-correctness")))
    return next((outcome for outcome in OUTCOMES if outcome == reported), None)


def as_record(dialogue: Dialogue) -> dict[str, Any]:
    """A record of the released form; ``intents`` and ``outcome`` are added where that form cannot say them."""
    own: dict[str, Any] = {
        "question": dialogue.problem,
        "ground_truth": dialogue.solution,
        "student_incorrect_solution": dialogue.wrong_solution,
        "student_profile": dialogue.persona,
        "self-correctness": {outcome: report for report, outcome in SELF_REPORTS.items()}.get(str(dialogue.outcome)),
        "conversation": BETWEEN.join(turn.written for turn in dialogue.turns),
    }
    record = {**dialogue.facts, **own} if dialogue.facts else own
    record = {key: value for key, value in record.items() if key not in ("intents", "outcome")}
    if any(turn.intent for turn in dialogue.turns):
        record["intents"] = [turn.intent for turn in dialogue.turns]
    if dialogue.outcome not in (None, *SELF_REPORTS.values()):
        record["outcome"] = dialogue.outcome
    return record


def read_dialogues(path: Path) -> list[Dialogue]:
    """The dialogues of a JSON Lines file of the released form.

    Raises:
        UserError: no such file, or a line that is not such a record; the sentence names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"The dialogues {path} cannot be read ({error.strerror}): give a JSON Lines file.") from error
    dialogues = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            dialogues.append(parse_dialogue(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"Line {number} of {path} is not a dialogue: {error}") from error
    return dialogues


def write_dialogues(path: Path, dialogues: Sequence[Dialogue]) -> None:
    """Write JSON Lines of the released form; what was read is written byte for byte, and the file is there whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(as_record(dialogue)) + "\n" for dialogue in dialogues))


def strip_turn(text: str, role: Role, *, name: str = "") -> Turn:
    """What a model wrote for one turn, without its own role prefix, end markers, and any line of the other side.

    A turn ends at an end marker or where the next speaker's cue begins a line: what a model writes after that (a whole
    conversation with itself) is left out. A teacher's turn may begin with its move in brackets.
    """
    names = "|".join(re.escape(one) for one in ("teacher", "tutor", "student", "assistant", "user", name) if one)
    cue = re.compile(rf"\s*[*_#>\s]*(?:{names})\s*[*_]*\s*:[*_]*\s*", re.I)
    while begins := cue.match(text):
        text = text[begins.end() :]
    text = _END.split(text, maxsplit=1)[0]
    following = re.search(rf"\n{cue.pattern}", text, re.I)
    text = (text[: following.start()] if following else text).strip()
    mark = _MARK.match(text) if role == "teacher" else None
    move = parse_move(mark[1]) if mark else ""
    return Turn(role, text[mark.end() :].strip() if mark and move else text, move)


def fit_turns(turns: Sequence[Turn], fits: Callable[[tuple[Turn, ...]], bool], *, history: int = 0) -> tuple[Turn, ...]:
    """The newest turns that fit: the oldest pair of turns goes first, and the newest turn always stays.

    A tutor is trained and played with the turns that this function leaves.

    Args:
        turns: in their order.
        fits: whether a prompt with these turns is short enough; the problem and the solution are part of the prompt and
            are never dropped.
        history: newest turns to begin with; 0: all.
    """
    kept = tuple(turns[-history:] if history else turns)
    while len(kept) > 1 and not fits(kept):
        kept = kept[2:] if len(kept) > 2 else kept[1:]
    return kept


Side = Callable[[Sequence[Dialogue]], list[Turn]]


"""One side of dialogues: for each of them, as it stands, the next turn. All are asked at once."""


def play(
    teacher: Side,
    student: Side,
    dialogues: Sequence[Dialogue],
    *,
    rounds: int = 4,
    solved: Callable[[str, str], bool] = final_is,
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> list[Dialogue]:
    """Let a teacher and a student talk, all dialogues in lockstep: each round asks each side once, for all.

    The teacher opens, the student answers with a first attempt; then follow at most ``rounds`` interventions, each with
    an answer. A dialogue ends as ``solved`` when the student's text is right, as ``revealed`` when the teacher had
    given the answer before, ``out of turns`` after the last round, and ``failed`` where a side could not speak.

    Args:
        teacher: the tutor.
        student: the learner.
        dialogues: as they stand; those with an outcome are left alone, those with turns are taken up.
        rounds: interventions after the opening line.
        solved: whether a student's text ``(text, gold)`` gives the right answer; by default its last or its declared
            number. A teacher has given the answer where it mentions it.
        shown: called after each round with the rounds that are done, and all.
    """
    if rounds < 0:
        raise UserError(f"rounds is {rounds}: it must be 0 or more.")
    played = list(dialogues)
    for done in range(rounds + 1):
        for side, role in ((teacher, "teacher"), (student, "student")):
            open_ = [place for place, one in enumerate(played) if not one.outcome and _due(one, role, rounds)]
            turns = side([played[place] for place in open_]) if open_ else []
            for place, turn in zip(open_, turns, strict=True):
                played[place] = ended(played[place].with_turns(turn), solved)
        shown(done + 1, rounds + 1)
    return [one if one.outcome else replace(one, outcome="out of turns") for one in played]


def _due(dialogue: Dialogue, role: str, rounds: int) -> bool:
    """Whether this side speaks now: the teacher first, then in turn, and no more than all rounds."""
    before = dialogue.turns[-1].role if dialogue.turns else "student"
    return before != role and len([turn for turn in dialogue.turns if turn.role == role]) <= rounds


def ended(dialogue: Dialogue, solved: Callable[[str, str], bool] = final_is) -> Dialogue:
    """The dialogue with its outcome, if its last turn ends it."""
    last = dialogue.turns[-1]
    if last.error:
        return replace(dialogue, outcome="failed")
    if last.role == "student" and solved(last.text, dialogue.gold):
        revealed = any(mentions(turn.text, dialogue.gold) for turn in dialogue.of("teacher"))  # as telling@k counts it
        return replace(dialogue, outcome="revealed" if revealed else "solved")
    return dialogue
