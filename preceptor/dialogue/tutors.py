"""Who speaks in a tutoring dialogue: simulated students and tutors, scripted ones and those a language model plays.

Each is a ``dialogue.Side``: a function from dialogues to the next turn of each. Scripted sides give closed forms
that measures are tested on; the others ask a ``language.Chat``, one batch for all dialogues.

The student's prompt has MathDial's blocks in its order (Macina et al. 2023, https://arxiv.org/abs/2305.14536): persona,
problem, wrong solution, how to behave, history, cue. The words are ours. There the model completes a text; here the
history is a chat, whose template gives the cue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from preceptor.dialogue.dialogue import MOVES, SCAFFOLDING, Dialogue, Role, Side, Turn, fit_turns, last_line, strip_turn
from preceptor.dialogue.numerals import mentions
from preceptor.errors import UserError
from preceptor.language import Chat, Message, Request

Knowledge = Literal["problem", "solution", "wrong solution"]


END = "<EOM>"


STOPS = (END, "\nTeacher:", "\nTutor:", "\nStudent:")


DIFFICULTIES = {
    "procedure": "has trouble finding the steps or procedures that a problem needs",
    "ideas": "has trouble with the ideas behind the mathematics, and with seeing when they apply",
    "question": "has trouble understanding what a problem asks for",
    "facts": "has trouble telling which facts of a problem matter and which do not",
    "order": "has trouble putting numbers in the right order and choosing the right operation",
    "type": "has trouble recognising the type of a problem, and so which strategy solves it",
}


"""The six difficulties of MathDial's personas."""


NAMES = ("Amara", "Bruno", "Chen", "Dalia", "Emil", "Fatou", "Goran", "Hana", "Ines", "Jonas", "Kavya", "Luis")


INSTRUCTIONS = {
    "focus": "Point the student to one step of this problem.",
    "probing": "Ask a question that lets the student explain, or find the mistake.",
    "telling": "Tell the student the next step or the answer.",
    "generic": "Greet, encourage, or say goodbye.",
}


"""What a teacher who makes a move is asked to do."""


def persona(name: str, difficulty: str, *, grade: int = 7) -> str:
    """A student in two sentences: name and grade (7 in the released dialogues, 6 in v1 of the paper), and a difficulty.

    Raises:
        UserError: no such difficulty.
    """
    if difficulty not in DIFFICULTIES:
        raise UserError(f"'{difficulty}' is no difficulty of a persona: choose one of {', '.join(DIFFICULTIES)}.")
    return f"{name} is a student in grade {grade}. {name} {DIFFICULTIES[difficulty]}."


def opening(dialogue: Dialogue) -> Turn:
    """The teacher's first line: a greeting that asks to be walked through the solution."""
    name = f" {dialogue.name}" if dialogue.name else ""
    return Turn("teacher", f"Hi{name}, please talk me through your solution.", "generic", "general inquiry")


@dataclass(frozen=True)
class Voice:
    """How a language model is asked for a turn."""

    temperature: float = 0.0
    """Sampling temperature: 0 in the released dialogues, 0.4 in v1 of the paper."""
    max_tokens: int = 512
    """Tokens of a turn at most."""
    context: int = 2048
    """Tokens that the model reads and writes together; what is older than fits is forgotten, never the problem."""
    seed: int = 0
    """Seed of sampling."""


def student_messages(dialogue: Dialogue, turns: Sequence[Turn]) -> tuple[Message, ...]:
    """What the model reads that plays the student: persona, problem, wrong solution, behaviour, then the turns."""
    name = dialogue.name or "The student"
    blocks = [
        dialogue.persona or "You are a student.",
        f"Problem: {dialogue.problem}",
        f"{name}'s solution:\n{dialogue.wrong_solution}",
        f"Play {name}, who talks with a teacher and says one short message at a time, never the teacher's. {name} "
        f"believes that this solution is right, and changes it only after several good questions that lead to the "
        f"mistake. {name} has a calculator and makes no slips in arithmetic. End the message with {END}.",
    ]
    return _chat("\n\n".join(blocks), turns, "student", "Hello.")


def tutor_messages(
    dialogue: Dialogue, turns: Sequence[Turn], knowledge: Sequence[Knowledge], move: str = ""
) -> tuple[Message, ...]:
    """What the model reads that plays the tutor: the task, the knowledge K it is given, the move A, then the turns."""
    blocks = ["You tutor a student in mathematics. Be polite and accurate, and say one short message at a time."]
    texts = {"problem": dialogue.problem, "solution": dialogue.solution, "wrong solution": dialogue.wrong_solution}
    labels = {"problem": "Problem", "solution": "Right solution", "wrong solution": "The student's solution"}
    blocks += [f"{labels[name]}: {texts[name]}" for name in knowledge]
    if move:
        blocks.append(f"Your next move is {move}: {INSTRUCTIONS[move]}")
    return _chat("\n\n".join(blocks), turns, "teacher", "Hello, I am here.")


def _chat(system: str, turns: Sequence[Turn], me: Role, hello: str) -> tuple[Message, ...]:
    """Turns as messages: mine are the assistant's. Roles alternate, as many templates demand, and the user begins."""
    messages: list[Message] = [{"role": "system", "content": system}]
    for turn in turns:
        role = "assistant" if turn.role == me else "user"
        if messages[-1]["role"] == "system" and role == "assistant":
            messages.append({"role": "user", "content": hello})
        if messages[-1]["role"] == role:
            messages[-1] = {"role": role, "content": f"{messages[-1]['content']}\n{turn.text}"}
        else:
            messages.append({"role": role, "content": turn.text})
    if messages[-1]["role"] != "user":
        messages.append({"role": "user", "content": hello if len(messages) == 1 else "..."})
    return tuple(messages)


@dataclass(frozen=True, eq=False)
class ChatStudent:
    """A student played by a language model."""

    chat: Chat
    voice: Voice = Voice()

    def __call__(self, dialogues: Sequence[Dialogue]) -> list[Turn]:
        """The student's next turn in each dialogue."""
        asked = []
        for dialogue in dialogues:
            turns = fit_turns(
                dialogue.turns, partial(_fits, self.chat, self.voice, partial(student_messages, dialogue))
            )
            asked.append(student_messages(dialogue, turns))
        return _ask(self.chat, self.voice, asked, dialogues, "student")


@dataclass(frozen=True, eq=False)
class ChatTutor:
    """A tutor played by a language model: prompted, or fine-tuned on what it is asked here.

    The opening line is `opening`. ``move``: the move before each of its turns is chosen by it ("" leaves it open).
    ``history``: newest turns that it reads at most; 0: all that fit.
    """

    chat: Chat
    voice: Voice = Voice()
    knowledge: tuple[Knowledge, ...] = ("problem", "solution")
    move: str = ""
    history: int = 0

    def __call__(self, dialogues: Sequence[Dialogue]) -> list[Turn]:
        """The tutor's next turn in each dialogue."""
        begun = [dialogue for dialogue in dialogues if dialogue.turns]
        asked = []
        for dialogue in begun:
            prompt = partial(tutor_messages, dialogue, knowledge=self.knowledge, move=self.move)
            turns = fit_turns(dialogue.turns, partial(_fits, self.chat, self.voice, prompt), history=self.history)
            asked.append(prompt(turns))
        written = iter(_ask(self.chat, self.voice, asked, begun, "teacher"))
        turns_ = [next(written) if dialogue.turns else opening(dialogue) for dialogue in dialogues]
        return [turn if turn.move or not self.move else Turn("teacher", turn.text, self.move) for turn in turns_]


def _fits(
    chat: Chat, voice: Voice, prompt: Callable[[Sequence[Turn]], tuple[Message, ...]], turns: tuple[Turn, ...]
) -> bool:
    """Whether a prompt with these turns leaves room for a turn of ``voice.max_tokens``."""
    return chat.backend.prompt_bound(Request(prompt(turns))) + voice.max_tokens <= voice.context


def _ask(
    chat: Chat, voice: Voice, asked: Sequence[tuple[Message, ...]], dialogues: Sequence[Dialogue], role: Role
) -> list[Turn]:
    requests = [
        Request(
            messages, max_tokens=voice.max_tokens, temperature=voice.temperature, seed=voice.seed + place, stop=STOPS
        )
        for place, messages in enumerate(asked)
    ]
    replies = chat.ask(requests) if requests else []
    return [
        Turn(role, "", error=reply.error) if reply.error else strip_turn(reply.text, role, name=dialogue.name)
        for reply, dialogue in zip(replies, dialogues, strict=True)
    ]


def next_step_tutor(dialogues: Sequence[Dialogue]) -> list[Turn]:
    """The constant tutor: it asks for the next step and nothing else, so it never tells."""
    ask = Turn("teacher", "What is the next step?", "focus", "seek strategy")
    return [ask if dialogue.turns else opening(dialogue) for dialogue in dialogues]


def teller(at: int) -> Side:
    """A tutor that probes until its intervention number ``at`` and then reveals the answer, again and again."""
    probe = Turn("teacher", "Can you explain to me how you got there?", "probing", "ask for explanation")

    def say(dialogue: Dialogue) -> Turn:
        done = len(dialogue.of("teacher"))
        tell = Turn("teacher", f"The answer is {dialogue.gold}.", "telling", "reveal answer")
        return opening(dialogue) if not done else tell if done >= at else probe

    return lambda dialogues: [say(dialogue) for dialogue in dialogues]


def scaffolding_tutor(tell_after: int = 0) -> Side:
    """A tutor that goes from the least to the most specific move: probing, then focus, step by step of the solution.

    ``tell_after``: interventions after which it tells the answer to a student who is stuck; 0: never.
    """
    lines = {
        "probing": ("Why did you do it this way?", "Does your answer fit what the problem says?"),
        "focus": ("What does the problem ask for?", "Which facts of the problem do you need for that?"),
    }
    steps = [Turn("teacher", line, move, MOVES[move][0]) for move in ("probing", "focus") for line in lines[move]]

    def say(dialogue: Dialogue) -> Turn:
        done = len(dialogue.of("teacher"))
        if not done:
            return opening(dialogue)
        if tell_after and done > tell_after:
            return Turn("teacher", f"The answer is {dialogue.gold}.", "telling", "reveal answer")
        return steps[min(done, len(steps)) - 1]

    return lambda dialogues: [say(dialogue) for dialogue in dialogues]


def _insists(dialogue: Dialogue) -> Turn:
    return Turn("student", f"I think that it is {last_line(dialogue.wrong_solution)}.")


def parrot_student(dialogues: Sequence[Dialogue]) -> list[Turn]:
    """A student who keeps the wrong answer until the teacher says the right one, and then repeats it."""
    return [
        Turn("student", f"Oh, it is {dialogue.gold}.")
        if any(mentions(turn.text, dialogue.gold) for turn in dialogue.of("teacher"))
        else _insists(dialogue)
        for dialogue in dialogues
    ]


def self_correcting_student(after: int) -> Side:
    """A student who finds the mistake after so many scaffolding moves (focus or probing), given the answer or not."""

    def say(dialogue: Dialogue) -> Turn:
        helped = sum(turn.move in SCAFFOLDING for turn in dialogue.of("teacher"))
        return Turn("student", f"Now I see, it is {dialogue.gold}.") if helped >= after else _insists(dialogue)

    return lambda dialogues: [say(dialogue) for dialogue in dialogues]
