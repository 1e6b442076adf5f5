"""MathDial: a tutor learns the next turn of human teachers, and is played against a student who holds a common error.

Paper: MathDial: A Dialogue Tutoring Dataset with Rich Pedagogical Properties (Macina et al., Findings of EMNLP 2023),
https://arxiv.org/abs/2305.14536
Reproduction: holds over 3 seeds for what was run (measures, moves, uptake, a small tutor); the paper's tutors were not

With teacher turn u_T, history u_<T, knowledge K (problem, worked solution, wrong solution) and move A, token by token:

    L = - sum over t of log p(u_T,t | u_T,<t, u_<T, K, A)

The pieces, each in its own module: the common-error picker (``common_errors``), personas, simulated student, prompted
and scripted tutors (``tutors``), the loop that plays one against the other and the released form (``dialogue``),
success@k, telling@k, sBLEU, BERT F1 and KF1 (``tutoring``), uptake (``uptake``), the classifier of moves
(``next_move``). `preceptor chat` puts a person on either side. This file fine-tunes the tutor and measures it
three ways (held-out turns, written turns, play), which is what makes it long.

Decided here, where the paper is silent or another choice fits this package better:

* The tutors of the paper are encoder-decoders (Flan-T5, BART) and OPT; ours are causal, so ``paper`` holds OPT-1.3B.
* The history is a chat: the student is the user, the tutor the assistant. Knowledge and move stand in the system text.
* A history too long for ``max_length`` loses its oldest pairs of turns, never problem or solution.
* The opening line is generic, given and not learned.
* Conversations are split 80/20; held-out ones whose problem occurs in training are ``seen``, the others ``unseen``.
* A played dialogue is solved when the last or the declared number of a student's turn is the answer, which is stricter
  than the published success@k (any mention); the tables hold both.
* Without data the few dialogues of ``worked_dialogues`` are learned from: enough for a first try, no more.

Simulated students agree too easily: no claim about a tutor's teaching follows from self-play alone.

Command: ``preceptor run mathdial --data shared/data/mathdial/test.jsonl``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Listed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from preceptor.catalogue import repeat
from preceptor.data.encoding import encode
from preceptor.data.readers import Example
from preceptor.data.sequences import Sequence, collate
from preceptor.dialogue.dialogue import (
    Dialogue,
    Side,
    Turn,
    parse_dialogue,
    read_dialogues,
    strip_turn,
    write_dialogues,
)
from preceptor.dialogue.examples import worked_dialogues
from preceptor.dialogue.measures import answer_was_there, play_all
from preceptor.dialogue.tutors import (
    DIFFICULTIES,
    NAMES,
    ChatStudent,
    ChatTutor,
    Knowledge,
    Voice,
    next_step_tutor,
    persona,
    scaffolding_tutor,
    teller,
    tutor_messages,
)
from preceptor.distillation.held_out import held_out_means
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.result import write_result
from preceptor.language import Chat
from preceptor.language.local import LocalModel
from preceptor.losses import Loss
from preceptor.losses.divergences import divergence
from preceptor.methods.mathdial.common_errors import CommonErrors, chat_sampler, common_errors, read_problems
from preceptor.methods.mathdial.text_metrics import TextEncoder, bert_f1, knowledge_f1, sbleu
from preceptor.methods.mathdial.uptake import overlap_share
from preceptor.models.identity import template_hash, tokenizer_hash
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.statistics import mean_of

REQUIRES = "people"


TRAINING = Training(steps=60, batch_size=4, learning_rate=6.25e-5, schedule="linear", precision="bf16")


@dataclass(frozen=True)
class ReadingSettings:
    """What a tutor reads before its turn."""

    knowledge: tuple[Knowledge, ...] = ("problem", "solution")
    """K, what the tutor is told."""
    with_move: bool = True
    """Whether the tutor is told the move A of the turn that it learns."""
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


@dataclass(frozen=True)
class Pair:
    """A teacher's turn to be learned: the dialogue up to it, the turn, its tokens, and whether its problem is new."""

    before: Dialogue
    turn: Turn
    tokens: Sequence
    unseen: bool


def read_data(source: str) -> list[Dialogue]:
    """The dialogues of a file, of the hub, or our own.

    Raises:
        UserError: there is no such file or data set, or it has another form.
    """
    if not source:
        return worked_dialogues()
    if Path(source).exists() or source.endswith(".jsonl"):
        return read_dialogues(Path(source))
    import datasets

    try:
        return [parse_dialogue(record) for part in datasets.load_dataset(source).values() for record in part]
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(f"The data set {source} cannot be read ({error}): give a JSON Lines file.") from error


def split(dialogues: Listed[Dialogue], share: float, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out conversations, split by conversation."""
    order = list(range(len(dialogues)))
    Random(seed).shuffle(order)
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise UserError(f"{len(order)} conversations cannot be split: give more, or hold out less.")
    return [dialogues[place] for place in order[count:]], [dialogues[place] for place in order[:count]]


def make_pairs(
    dialogues: Listed[Dialogue], config: Config, tokenizer: Any, known: frozenset[str] = frozenset()
) -> list[Pair]:
    """Every teacher turn after the opening line that fits, with what precedes it; ``known`` problems are not unseen."""
    pairs = []
    for dialogue in dialogues:
        for place, turn in enumerate(dialogue.turns):
            before = replace(dialogue, turns=dialogue.turns[:place])
            if place and turn.role == "teacher" and turn.text.strip():
                tokens = encode_pair(before, turn, config, tokenizer)
                pairs += [Pair(before, turn, tokens, dialogue.problem not in known)] if tokens else []
    return pairs


def encode_pair(before: Dialogue, turn: Turn, config: Config, tokenizer: Any) -> Sequence | None:
    """The tokens of knowledge, history and turn, only the turn to be learned; None where it does not fit alone."""
    turns = before.turns[-config.reading.history :] if config.reading.history else before.turns
    move = turn.move if config.reading.with_move else ""
    while True:
        asked = tutor_messages(before, turns, config.reading.knowledge, move)
        answer = {"role": "assistant", "content": turn.text.strip()}
        [whole] = encode([Example(messages=(*asked, answer))], tokenizer, max_length=1 << 20)
        if len(whole.ids) <= config.reading.max_length:
            start = len(whole.prompt)
            return Sequence(whole.ids, (False,) * start + whole.response[start:])
        if len(turns) <= 1:
            return None
        turns = turns[2:] if len(turns) > 2 else turns[1:]


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


@dataclass(frozen=True)
class Examined:
    """A tutor on held-out turns: nats a token of all, seen and unseen problems, and what it writes in their place."""

    loss: dict[str, float]
    texts: list[str]


def examine(tutor: LanguageModel, exam: Listed[Pair], config: Config) -> Examined:
    """Measure a tutor on held-out turns."""
    texts = write_turns(tutor, exam[: config.written], config.voice.max_tokens)
    return Examined(loss_by_problems(tutor, [(pair.tokens, pair.unseen) for pair in exam]), texts)


def loss_by_problems(tutor: LanguageModel, exam: Listed[tuple[Sequence, bool]]) -> dict[str, float]:
    """Nats a token of held-out turns: all, those of seen and those of unseen problems."""

    def losses(examples: Listed[tuple[Sequence, bool]]) -> Iterable[tuple[str, Loss]]:
        batch = collate([tokens for tokens, _ in examples], tutor.pad_id).to(tutor.device)
        hidden = tutor(batch)
        for row, (_, unseen) in enumerate(examples):
            mask, labels = batch.predicts[row], batch.labels[row]
            loss = divergence(hidden[row], tutor.head, None, mask=mask, labels=labels, weight=0.0, label_weight=1.0)
            yield "all", loss
            yield "unseen" if unseen else "seen", loss

    found = held_out_means(tutor, sorted(exam, key=lambda one: len(one[0].ids)), losses, batch_size=8)
    return {name: found[name] for name in ("all", "seen", "unseen") if name in found}


def write_turns(tutor: LanguageModel, pairs: Listed[Pair], length: int) -> list[str]:
    """What a tutor says in the place of the turns that were held out, greedily."""
    said = tutor.generate([pair.tokens.prompt for pair in pairs], max_new_tokens=length, temperature=0.0)
    texts = [tutor.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    return [strip_turn(text, "teacher", name=pair.before.name).text for text, pair in zip(texts, pairs)]


def text_figures(texts: Listed[str], pairs: Listed[Pair], encoder: TextEncoder) -> dict[str, float]:
    """sBLEU, BERT F1, KF1 (against the problem) and the share of the student's words that the turns use again."""
    truth = [pair.turn.text for pair in pairs]
    said = [next((turn.text for turn in reversed(pair.before.turns) if turn.role == "student"), "") for pair in pairs]
    return {
        "sBLEU": sbleu(texts, truth),
        f"BERT F1 ({encoder.name})": mean_of(bert_f1(texts, truth, encoder)).mean,
        "KF1": 100 * mean_of([knowledge_f1(text, pair.before.problem) for text, pair in zip(texts, pairs)]).mean,
        "words used again": 100 * mean_of([overlap_share(a, b) for a, b in zip(said, texts)]).mean,
    }


def cases_to_play(config: Config, held_out: Listed[Dialogue], chat: Chat) -> list[Dialogue]:
    """Problems with wrong solutions and no turn yet: held-out ones, or the common errors of ``config.problems``."""
    if config.problems:
        roles = [persona(name, trouble) for name, trouble in zip(NAMES, DIFFICULTIES)]
        listed = read_problems(Path(config.problems), limit=config.played)
        sampler = chat_sampler(chat, config.errors, seed=config.training.seed)
        cases, counts = common_errors(listed, sampler, config.errors, roles)
        print("Common errors: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    else:
        bare = [replace(one, turns=(), outcome=None, facts={}) for one in held_out]
        cases = list({one.problem: one for one in bare if not answer_was_there(one)}.values())[: config.played]
    if not cases:
        raise UserError("No problem with a wrong solution is left to play: give other problems, or loosen the filters.")
    return cases


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
    told = {"untaught": examine(tutor, exam, config)}
    run = start(config, tutor)
    teach(run, tutor, pairs)
    if not run.is_main:
        return None
    told["fine-tuned"] = examine(tutor.eval(), exam, config)
    tutor.save(folder / "student", card={"tutor": config.tutor, "method": "mathdial", "data": config.data or "own"})
    tutors: dict[str, Side] = {
        "fine-tuned": ChatTutor(Chat(LocalModel(tutor), shown=False), config.voice, config.reading.knowledge),
        "prompted": ChatTutor(prompted, config.voice, config.reading.knowledge),
        "next step": next_step_tutor,
        "scaffolding": scaffolding_tutor(),
        "teller": teller(2),
    }
    figures, held = play_all(tutors, ChatStudent(prompted, config.voice), cases, config.rounds)
    for name, dialogues in held.items():
        write_dialogues(folder / "dialogues" / f"{name}.jsonl", dialogues)
    table = tutor_table(config, told, figures, exam)
    losses = [told[name].loss["all"] for name in ("untaught", "fine-tuned")]
    headline = "Held-out loss {:.3f} nat a token before, {:.3f} after.".format(*losses)
    command = repeat("mathdial", folder)
    write_result(folder, table, page_samples(told, exam), headline=headline, command=command)
    table.print()
    print(f"The tutor: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def start(config: Config, tutor: LanguageModel) -> Run:
    """The run of a tutor."""
    hashes = {"tokenizer": tokenizer_hash(tutor.tokenizer), "chat template": template_hash(tutor.tokenizer)}
    hashes |= {"tutor": config.tutor, "data": config.data or "own dialogues"}
    return Run(
        config.training, student=tutor, folder=config.output, config=config, resume=config.resume, provenance=hashes
    )


def lessons(
    train: Listed[Dialogue], held_out: Listed[Dialogue], config: Config, tutor: LanguageModel
) -> tuple[list[Pair], list[Pair]]:
    """The turns to be learned and those that are measured."""
    known = frozenset(dialogue.problem for dialogue in train)
    pairs, exam = make_pairs(train, config, tutor.tokenizer), make_pairs(held_out, config, tutor.tokenizer, known)
    if not pairs or not exam:
        raise UserError(f"No teacher's turn fits into {config.reading.max_length} tokens: raise reading.max_length.")
    Random(config.training.seed).shuffle(exam)
    return pairs, exam[: config.exam or None]


def tutor_table(
    config: Config, told: dict[str, Examined], played: dict[str, dict[str, float]], exam: Listed[Pair]
) -> Table:
    """Measures by tutors: held-out turns first, then play."""
    encoder, table = TextEncoder(), Table(f"{config.tutor} as a tutor", list(dict.fromkeys([*told, *played])))
    for name, examined in told.items():
        cells = {f"held-out loss, {part} problems": value for part, value in examined.loss.items()}
        for row, value in {**cells, **text_figures(examined.texts, exam[: config.written], encoder)}.items():
            table.rows.setdefault(row, {})[name] = value
            table.better[row] = "lower" if row in cells else "higher"
        table.units |= dict.fromkeys(cells, "nat/token")
    for name, figures in played.items():
        for row, value in figures.items():
            table.rows.setdefault(row, {})[name] = value
            table.units[row] = "%"
    table.notes = [
        f"{len(exam)} held-out turns, {len(told['untaught'].texts)} of them written anew, greedily.",
        f"Play against {config.base} as the student: it agrees too easily for a claim about teaching.",
    ]
    return table


def page_samples(told: dict[str, Examined], exam: Listed[Pair]) -> list[dict[str, object]]:
    """Held-out turns as the human teacher and both tutors say them, for the page."""
    found: list[dict[str, object]] = []
    for place, pair in enumerate(exam[: min(6, len(told["untaught"].texts))]):
        prompt = f"{pair.before.problem}\n\n... {pair.before.turns[-1].text}"
        answers = {"teacher": pair.turn.text, **{name: one.texts[place] for name, one in told.items()}}
        found.append({"prompt": prompt, "answers": answers})
    return found
