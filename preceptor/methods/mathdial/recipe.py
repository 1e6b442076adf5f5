"""MathDial: a tutor learns the next turn of human teachers, and is played against a student who holds a common error.

Paper: MathDial: A Dialogue Tutoring Dataset with Rich Pedagogical Properties (Macina et al., Findings of EMNLP 2023),
https://arxiv.org/abs/2305.14536
Reproduction: holds over 3 seeds for what was run (measures, moves, uptake, a small tutor); the paper's tutors were not

With teacher turn u_T, history u_<T, knowledge K (problem, worked solution, wrong solution) and move A, token by token:

    L = - sum over t of log p(u_T,t | u_T,<t, u_<T, K, A)

The pieces: the common-error picker (``common_errors``), the turns that are learned (``turns``), what the tutor is
measured on (``examination``: held-out turns, written turns, play), sBLEU, BERT F1 and KF1 (``text_metrics``), uptake
(``uptake``), the classifier of moves (``next_move``). Personas, simulated student, prompted and scripted tutors, the
loop that plays one against the other, success@k and telling@k are in ``preceptor/dialogue``.

Decided here, where the paper is silent or another choice fits this package better:

* The tutors of the paper are encoder-decoders (Flan-T5, BART) and OPT; ours are causal, so ``paper`` holds OPT-1.3B.
* The history is a chat: the student is the user, the tutor the assistant. Knowledge and move stand in the system text.
* A history too long for ``max_length`` loses its oldest pairs of turns, never problem or solution; in play the tutor
  reads a history cut in the same way (``fit_turns``), of the same length.
* The opening line is generic, given and not learned.
* Conversations are split 80/20; held-out ones whose problem occurs in training are ``seen``, the others ``unseen``.
* A played dialogue is solved when the last or the declared number of a student's turn is the answer, which is stricter
  than the published success@k (any mention); the tables hold both.
* Without data the few dialogues of ``worked_dialogues`` are learned from: enough for a first try, no more.

Simulated students agree too easily: no claim about a tutor's teaching follows from self-play alone.

Command: ``preceptor run mathdial --data mathdial/test.jsonl``
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from preceptor.catalogue import repeat
from preceptor.data.sequences import collate
from preceptor.dialogue.dialogue import (
    Side,
    write_dialogues,
)
from preceptor.dialogue.measures import play_all
from preceptor.dialogue.tutors import (
    ChatStudent,
    ChatTutor,
    Knowledge,
    Voice,
    next_step_tutor,
    scaffolding_tutor,
    teller,
)
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.result import write_result
from preceptor.language import Chat
from preceptor.language.local import LocalModel
from preceptor.losses.divergences import divergence
from preceptor.methods.mathdial.common_errors import CommonErrors
from preceptor.methods.mathdial.examination import cases_to_play, examine, page_samples, tutor_table
from preceptor.methods.mathdial.turns import Pair, lessons, read_data, split
from preceptor.models.identity import template_hash, tokenizer_hash
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report import write_report
from preceptor.report.table import Table

REQUIRES = "people"


TRAINING = Training(steps=60, batch_size=4, learning_rate=6.25e-5, schedule="linear", precision="bf16")


@dataclass(frozen=True)
class ReadingSettings:
    """What a tutor reads before its turn."""

    knowledge: tuple[Knowledge, ...] = ("problem", "solution")
    """K, what the tutor is given."""
    with_move: bool = True
    """Whether the tutor is given the move A of the turn that it learns."""
    history: int = 0
    """Newest turns that are read; 0: all that fit."""
    max_length: int = 512
    """Tokens of an example: knowledge, history and the turn to be learned."""


@dataclass(frozen=True)
class Config:
    """Settings of one tutor."""

    tutor: str = "smollm2"
    """The tutor: a model by name, or ``teacher:layers=10`` and the like, a part of ``base``."""
    base: str = "smollm2"
    """The model that plays the simulated student and the prompted tutor."""
    data: str = ""
    """Dialogues: JSON Lines in MathDial's form, or a data set on the hub (``eth-nlped/mathdial``); empty: a few own."""
    problems: str = ""
    """JSON Lines with question and answer (GSM8K), whose common errors are picked and played; empty: held-out ones."""
    errors: CommonErrors = CommonErrors()
    """How common errors are picked."""
    reading: ReadingSettings = ReadingSettings()
    """What the tutor reads before the turn that it learns."""
    held_out: float = 0.2
    """Share of the conversations held out."""
    exam: int = 0
    """Held-out turns that are measured at most; 0: all."""
    written: int = 24
    """Held-out turns that the tutor writes, for sBLEU, BERT F1 and KF1."""
    voice: Voice = Voice(max_tokens=96)
    """How a model is asked for a turn while it plays."""
    played: int = 4
    """Problems that tutors and the simulated student play."""
    rounds: int = 4
    """Interventions in a played dialogue."""
    output: str = "runs/mathdial/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = TRAINING
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse settings that leave nothing to learn or to play."""
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}: give a share of the conversations, above 0 and below 1.")
        for name, value in (("written", self.written), ("played", self.played), ("rounds", self.rounds)):
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")


tiny = Config(
    tutor="teacher:layers=2",
    reading=ReadingSettings(history=3, max_length=256),
    written=2,
    voice=Voice(max_tokens=8),
    played=1,
    rounds=1,
    output="runs/mathdial/tiny",
    training=replace(TRAINING, steps=2),
)


# The OPT-1.3B of the paper's table: 10 epochs, start 6.25e-5, linear, no warm-up.
paper = Config(
    tutor="facebook/opt-1.3b",
    base="facebook/opt-1.3b",
    data="eth-nlped/mathdial",
    reading=ReadingSettings(max_length=1024),
    written=512,
    played=64,
    output="runs/mathdial/paper",
    training=Training(epochs=10, batch_size=8, learning_rate=6.25e-5, schedule="linear", precision="bf16"),
)


def teach(run: Run, tutor: LanguageModel, pairs: Listed[Pair]) -> None:
    """The loop: cross-entropy of the teacher's tokens, from the last hidden states."""
    lessons = [pair.tokens for pair in pairs]
    for batch in run.batches(lessons, partial(collate, pad_id=tutor.pad_id)):
        objective = partial(
            divergence, teacher=None, mask=batch.predicts, labels=batch.labels, weight=0.0, label_weight=1.0
        )
        loss = run.student(batch, objective)
        run.update(loss.sum, loss.count, loss.parts)
    run.finish()


def main(config: Config) -> Table | None:
    """Fine-tune a tutor, measure it on held-out turns, play it beside others, and write student, table and report.

    Raises:
        UserError: the data, a model or a folder does not fit.
    """
    folder = Path(config.output)
    check_folder(folder, config, resume=config.resume)
    base = load(config.base)
    tutor = make_student(config.tutor, base, seed=config.training.seed)
    train, held_out = split(read_data(config.data), config.held_out, config.training.seed)
    pairs, exam = lessons(train, held_out, config, tutor)
    prompted = Chat(LocalModel(base), shown=False)
    cases = cases_to_play(config, held_out, prompted)
    examined = {"untaught": examine(tutor, exam, config)}
    run = start(config, tutor)
    teach(run, tutor, pairs)
    if not run.is_main:
        return None
    examined["fine-tuned"] = examine(tutor.eval(), exam, config)
    tutor.save(folder / "student", card={"tutor": config.tutor, "method": "mathdial", "data": config.data or "own"})
    tutors: dict[str, Side] = {
        "fine-tuned": as_trained(config, tutor),
        "prompted": ChatTutor(prompted, config.voice, config.reading.knowledge),
        "next step": next_step_tutor,
        "scaffolding": scaffolding_tutor(),
        "teller": teller(2),
    }
    figures, held = play_all(tutors, ChatStudent(prompted, config.voice), cases, config.rounds)
    for name, dialogues in held.items():
        write_dialogues(folder / "dialogues" / f"{name}.jsonl", dialogues)
    table = tutor_table(config, examined, figures, exam)
    losses = [examined[name].loss["all"] for name in ("untaught", "fine-tuned")]
    headline = "Held-out loss {:.3f} nat a token before, {:.3f} after.".format(*losses)
    command = repeat("mathdial", folder)
    write_result(folder, table, page_samples(examined, exam), headline=headline, command=command)
    table.print()
    print(f"The tutor: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def as_trained(config: Config, tutor: LanguageModel) -> ChatTutor:
    """The fine-tuned tutor in play: it reads as much of a dialogue as it read in training."""
    voice = replace(config.voice, context=config.reading.max_length)
    chat = Chat(LocalModel(tutor), shown=False)
    return ChatTutor(chat, voice, config.reading.knowledge, history=config.reading.history)


def start(config: Config, tutor: LanguageModel) -> Run:
    """The run of a tutor."""
    hashes = {"tokenizer": tokenizer_hash(tutor.tokenizer), "chat template": template_hash(tutor.tokenizer)}
    hashes |= {"tutor": config.tutor, "data": config.data or "own dialogues"}
    return Run(
        config.training, student=tutor, folder=config.output, config=config, resume=config.resume, provenance=hashes
    )
