"""Talk with a tutor, or tutor a student, in the terminal: a person is one side, a model or a script the other.

    preceptor chat                                  you are the student, a model is the tutor
    preceptor chat --person teacher                 you are the teacher and pick your moves
    preceptor chat --partner scaffolding --problem 3

The dialogue is kept turn by turn in a file and goes on with ``--resume``. It ends when the student has the answer, or
out of turns; ``/quit`` leaves it as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from preceptor.dialogue.dialogue import MOVES, Dialogue, Outcome, Role, Side, Turn, ended, read_dialogues
from preceptor.dialogue.examples import worked_dialogues
from preceptor.dialogue.tutors import (
    ChatStudent,
    ChatTutor,
    Voice,
    next_step_tutor,
    parrot_student,
    scaffolding_tutor,
    self_correcting_student,
    teller,
)
from preceptor.errors import UserError
from preceptor.language import ChatSettings, open_chat

QUIT = "/quit"


TUTORS = ("scaffolding", "next-step", "teller")


STUDENTS = ("parrot", "self-correcting")


ENDS = {
    "solved": "Solved: the student found the answer.",
    "revealed": "Solved, but the teacher had given the answer before.",
    "out of turns": "Out of turns: the answer was not found.",
}


@dataclass(frozen=True)
class Config:
    """Who talks with whom, about what."""

    person: Literal["student", "teacher"] = "student"
    """What you are; the other side is the partner."""
    partner: str = "model"
    """``model``, or a script: ``scaffolding``, ``next-step`` or ``teller`` as a tutor, ``parrot`` or
    ``self-correcting`` as a student."""
    chat: ChatSettings = ChatSettings()
    """Which model is asked."""
    voice: Voice = Voice(max_tokens=128)
    """How it is asked."""
    data: str = ""
    """JSON Lines of dialogues in MathDial's form, whose problems are used; empty: a few of our own."""
    problem: int = 1
    """Which problem of the data, counted from 1."""
    rounds: int = 8
    """Interventions of the teacher after the opening line."""
    output: str = "runs/chat/dialogue.jsonl"
    """File that keeps the dialogue, a line a turn."""
    resume: bool = False
    """Go on with the dialogue in ``output``."""

    def __post_init__(self) -> None:
        """Refuse a partner that cannot take the other side."""
        scripts = TUTORS if self.person == "student" else STUDENTS
        if self.partner not in ("model", *scripts):
            raise UserError(
                f"'{self.partner}' is no partner of a {self.person}: choose model, {', '.join(scripts[:-1])} or "
                f"{scripts[-1]}."
            )
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}: it must be at least 1.")


@dataclass
class Quit(Exception):
    """The person leaves."""


def main(config: Config) -> None:
    """Talk until the problem is solved, the turns are used up, or the person leaves.

    Raises:
        UserError: no such problem, a file that holds another dialogue or a finished one, no such model.
    """
    console = Console(highlight=False)
    record = Record(Path(config.output))
    dialogue = _begin(config, record)
    partner = _partner(config)
    _show_problem(console, config, dialogue)
    for turn in dialogue.turns:
        _show(console, turn, mine=turn.role == config.person)
    try:
        dialogue = _talk(console, config, record, dialogue, partner)
    except (Quit, EOFError, KeyboardInterrupt):
        flags = f" --output {config.output}" if config.output != Config.output else ""
        settings = _words_that_differ(config)
        console.print(
            f"\nKept {len(record.turns())} turns. Go on with: preceptor chat{settings}{flags} --resume", soft_wrap=True
        )
        return
    console.print(Panel(ENDS[str(dialogue.outcome)], expand=False))
    if config.person == "student" and dialogue.outcome == "out of turns":
        console.print(f"A right solution:\n{escape(dialogue.solution.strip())}")
    console.print(f"The dialogue: {config.output}")


def _words_that_differ(config: Config) -> str:
    plain = Config(person=config.person, partner=config.partner)
    words = f" --person {config.person}" if config.person != Config.person else ""
    words += f" --partner {config.partner}" if config.partner != Config.partner else ""
    for name in ("data", "problem", "rounds"):
        mine, theirs = (asdict(one)[name] for one in (config, plain))
        words += f" --{name} {mine}" if mine != theirs else ""
    return words


class Record:
    """A dialogue on disk: a line that names problem and sides, a line a turn, and a line for the end.

    Each line is appended with one write and brought to the disk. A line that a crash cut short is dropped when the
    dialogue goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines; none where there is no file.

        Raises:
            UserError: the file is something else.
        """
        if not self.path.exists():
            return []
        try:
            whole = self.path.read_bytes().decode("utf-8").rpartition("\n")[0]
            lines = [json.loads(line) for line in whole.split("\n")] if whole else []
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read as a dialogue ({error}): choose another output.") from error
        if lines and not (isinstance(lines[0], dict) and "problem" in lines[0]):
            raise UserError(f"{self.path} holds something else than a dialogue: choose another output.")
        return lines

    def turns(self) -> list[Turn]:
        """The turns that are kept."""
        names = ("role", "text", "move", "intent")
        return [Turn(**{name: line[name] for name in names}) for line in self.lines() if "role" in line]

    def outcome(self) -> Outcome | None:
        """How the dialogue ended; None while it goes on."""
        return next((line["outcome"] for line in self.lines() if "outcome" in line), None)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line, to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(line, ensure_ascii=False) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def drop_partial_line(self) -> None:
        """Cut off what stands after the last line end."""
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def _begin(config: Config, record: Record) -> Dialogue:
    """The dialogue as it stands: a new one, or the one that goes on."""
    dialogue = _problem(config)
    header = {"problem": dialogue.problem, "solution": dialogue.solution, "person": config.person}
    header |= {"wrong_solution": dialogue.wrong_solution, "persona": dialogue.persona, "partner": config.partner}
    lines = record.lines()
    if lines and not config.resume:
        raise UserError(f"{config.output} holds a dialogue already: go on with --resume, or choose another --output.")
    if not lines:
        if record.path.exists():
            record.drop_partial_line()
        record.append(header)
        return dialogue
    different = next((name for name in header if lines[0].get(name) != header[name]), None)
    if different:
        raise UserError(
            f"{config.output} holds another dialogue ({different} differs): give the settings that it was begun with, "
            "or choose another --output."
        )
    if record.outcome():
        raise UserError(f"The dialogue in {config.output} has ended ({record.outcome()}): choose another --output.")
    record.drop_partial_line()
    return dialogue.with_turns(*record.turns())


def _problem(config: Config) -> Dialogue:
    dialogues = read_dialogues(Path(config.data)) if config.data else worked_dialogues()
    if not 1 <= config.problem <= len(dialogues):
        raise UserError(f"There is no problem {config.problem}: choose one from 1 to {len(dialogues)}.")
    bare = replace(dialogues[config.problem - 1], turns=(), outcome=None, facts={})
    # A person who learns brings a solution of their own.
    return replace(bare, wrong_solution="", persona="") if config.person == "student" else bare


def _partner(config: Config) -> Side:
    scripts: dict[str, Side] = {
        "scaffolding": scaffolding_tutor(tell_after=6),
        "next-step": next_step_tutor,
        "teller": teller(2),
        "parrot": parrot_student,
        "self-correcting": self_correcting_student(3),
    }
    if config.partner in scripts:
        return scripts[config.partner]
    chat = open_chat(config.chat, shown=False)
    return ChatTutor(chat, config.voice) if config.person == "student" else ChatStudent(chat, config.voice)


def _talk(console: Console, config: Config, record: Record, dialogue: Dialogue, partner: Side) -> Dialogue:
    while not dialogue.outcome:
        role: Role = "student" if dialogue.turns and dialogue.turns[-1].role == "teacher" else "teacher"
        if role == "teacher" and len(dialogue.of("teacher")) > config.rounds:
            dialogue = replace(dialogue, outcome="out of turns")
            break
        turn = _hear(console, config, dialogue) if role == config.person else _ask(console, partner, dialogue)
        dialogue = ended(dialogue.with_turns(turn))
        kept = asdict(turn)
        record.append({name: kept[name] for name in ("role", "text", "move", "intent")})
        if role != config.person:
            _show(console, turn, mine=False)
    record.append({"outcome": dialogue.outcome})
    return dialogue


def _ask(console: Console, partner: Side, dialogue: Dialogue) -> Turn:
    """The partner's turn; where a model failed or was silent, its reason, and another attempt if the person wants."""
    while True:
        [turn] = partner([dialogue])
        if turn.text and not turn.error:
            return turn
        console.print(f"[yellow]No answer: {escape(turn.error or 'the model wrote nothing')}.[/yellow]")
        _read(console, f"[dim]Enter tries again, {QUIT} leaves: [/dim]")


def _hear(console: Console, config: Config, dialogue: Dialogue) -> Turn:
    """The person's turn; a teacher picks a move and an intent first."""
    move = intent = ""
    if config.person == "teacher":
        move = _pick(console, "Move", tuple(MOVES), required=True)
        intent = _pick(console, "Intent", MOVES[move], required=False)
    while not (text := _read(console, "[bold cyan]You:[/bold cyan] ").strip()):
        console.print("[dim]Say something.[/dim]")
    return Turn("teacher" if config.person == "teacher" else "student", text, move, intent)


def _pick(console: Console, what: str, names: Sequence[str], *, required: bool) -> str:
    listed = "  ".join(f"[bold]{place}[/bold] {name}" for place, name in enumerate(names, 1))
    while True:
        console.print(f"[dim]{what}:[/dim] {listed}" + ("" if required else "  [dim]Enter: none[/dim]"))
        typed = _read(console, f"{what}: ").strip().lower()
        if not typed and not required:
            return ""
        chosen = [name for place, name in enumerate(names, 1) if typed in (str(place), name)]
        chosen = chosen or [name for name in names if typed and name.startswith(typed)]
        if len(chosen) == 1:
            return chosen[0]
        console.print(f"[yellow]Give a number from 1 to {len(names)}, or a name.[/yellow]")


def _read(console: Console, prompt: str) -> str:
    typed = console.input(prompt)
    if typed.strip().lower() == QUIT:
        raise Quit
    return typed


def _show_problem(console: Console, config: Config, dialogue: Dialogue) -> None:
    text = escape(dialogue.problem)
    if config.person == "teacher":
        text += f"\n\n[bold]Right solution[/bold]\n{escape(dialogue.solution.strip())}"
        text += f"\n\n[bold]The student's solution[/bold]\n{escape(dialogue.wrong_solution.strip())}"
        text += f"\n\n[dim]{escape(dialogue.persona)}[/dim]"
    console.print(Panel(text, title=f"Problem {config.problem}", title_align="left", width=min(100, console.width)))
    console.print(
        f"[dim]You are the {config.person}, the other side is {escape(config.partner)}; "
        f"{config.rounds} rounds; {QUIT} leaves.[/dim]"
    )


def _show(console: Console, turn: Turn, *, mine: bool) -> None:
    who, colour = ("You", "cyan") if mine else (turn.role.capitalize(), "green")
    console.print(f"[bold {colour}]{who}:[/bold {colour}] {escape(turn.text)}")
