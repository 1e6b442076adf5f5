"""Soft bootstrapping: a model shown a right and a wrong attempt teaches itself, without them, by its soft targets.

Paper: Semantic Soft Bootstrapping: Long Context Reasoning in LLMs without Reinforcement Learning (Mitra & Ulukus,
2025), https://arxiv.org/abs/2512.05105
Reproduction: in part over 3 seeds: hint, loss and controls hold; more right answers for 2 of 3; labels teach more

One model has two roles. For each question x it draws K rollouts, which a verifier marks; the first right one, y+, and
the first of the most frequent wrong answer, y- (a random wrong one where none is repeated), stand in the teacher's
prompt h(x, y+, y-). From there it writes a robust answer y, which must be right again. The student reads y after x
alone, and learns, over the N tokens of the replies in a batch (z^T and z^S the two roles' logits):

    L = λ_KD τ² (1/N) sum over t of KL(softmax(z^T_t / τ) ‖ softmax(z^S_t / τ)) + λ_CE (1/N) sum over t of -log p^S(y_t)

with ``objective.temperature`` τ = 2, ``objective.weight`` λ_KD = 1 and ``objective.label_weight`` λ_CE = 0. The teacher
is the base model under the student's LoRA, with the adapter off, so its targets for the replies never move.

The pieces: ``questions`` (what is asked), ``tasks/boxed`` (verifiers), ``rollouts`` (answers, pairing, statistics),
``hints`` (the prompts, the two views of a reply, the leak filter), ``selection`` (the loop over questions, kept on the
disk as it goes on), ``pairs`` (replies to learn from, and the teacher's targets for them), ``examination``.
``bootstrap`` takes questions and a verifier of your own.

Decided here, where the authors' scripts do something that does not serve the method, or are silent:

* The student learns under the chat template in which it is asked later; theirs learns from plain text
  (``prompts.template`` off).
* The end of the turn is learned, so that the student learns to stop (``prompts.end_of_turn`` off: theirs).
* The generated ids are kept and learned; theirs decode and tokenise again.
* A reply that did not end by itself, or that speaks of the attempts, is not kept, and counted.
* A rollout without an answer is no wrong exemplar. Answers are compared by value; ``questions.compare`` is theirs.
* Targets are the last hidden states and the head: exact, and nothing of the vocabulary's size is written. A folder
  ``cache`` keeps them on the disk, for students that are not the teacher's own adapter or are taught often.

Command: ``preceptor run soft_bootstrapping``
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.held_out import held_out_loss
from preceptor.distillation.objective import Objective
from preceptor.distillation.teachers import Teacher
from preceptor.engine.run import Run
from preceptor.engine.run_folder import check_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.methods.soft_bootstrapping.examination import examine, unlearned
from preceptor.methods.soft_bootstrapping.hints import Prompts
from preceptor.methods.soft_bootstrapping.pairs import check_cache, gather, lessons, listen
from preceptor.methods.soft_bootstrapping.pictures import draw_selection
from preceptor.methods.soft_bootstrapping.questions import QuestionSource, draw
from preceptor.methods.soft_bootstrapping.selection import Rolling, enough, statistics_table, write_statistics
from preceptor.models.identity import same_tokenizer, template_hash, tokenizer_hash
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.report.table import Table
from preceptor.tasks.boxed import Verifier
from preceptor.tasks.records import Item

REQUIRES = "text"


TRAINING = Training(epochs=3, batch_size=4, learning_rate=2e-4, schedule="linear", precision="bf16")


# What a model of 135M parameters can follow: examples to go by, of an answer and of the hint in use.
SHORT = Prompts(
    system="Add the numbers.",
    shots=("What is 48 + 17?", "= 65. \\boxed{65}"),
    hint="{question}\nWrong: {wrong}\nRight: {right}",
    hint_shots=("What is 48 + 17?\nWrong: = 75. \\boxed{75}\nRight: = 65. \\boxed{65}", "= 65. \\boxed{65}"),
)


SMALL = QuestionSource(smallest=2, largest=35)  # of which it answers a quarter to a third


@dataclass(frozen=True)
class Config:
    """Settings of one bootstrapping."""

    teacher: str = "smollm2"
    """The model that teaches itself: ``smollm2`` (embedded), a folder, a GGUF file or a hub name."""
    student: str = "lora:rank=8,alpha=16"
    """``lora:rank=8[,base=..]``; or any other student of this model's tokenizer, which it teaches from outside."""
    questions: QuestionSource = SMALL
    """What is asked."""
    prompts: Prompts = SHORT
    """What teacher and student read besides."""
    rolling: Rolling = Rolling(copies=8, length=24, batch_size=256)
    """How answers are drawn."""
    pairs: int = 64
    """Kept questions to learn from; no more questions are tried once there are as many, and those held out."""
    held_out: int = 16
    """Kept questions that are held out, for the loss on what was not learned."""
    objective: Objective = Objective(temperature=2.0)
    """τ, λ_KD (``weight``) and λ_CE (``label_weight``)."""
    cache: str = ""
    """Folder in which the teacher's targets are kept (and looked for); empty: it is asked at every step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in which answers are written, in the rollouts and in the exam."""
    max_length: int = 512
    """Tokens of a prompt and its reply: longer ones lose the prompt's first and the reply's last tokens."""
    output: str = "runs/soft_bootstrapping/run"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in ``output``."""
    training: Training = TRAINING
    """Steps, optimizer, precision, seed."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to learn or to measure."""
        for name, size in (("pairs", self.pairs), ("held_out", self.held_out), ("max_length", self.max_length - 1)):
            if size < 1:
                raise UserError(f"{name} is too small: give at least {2 if name == 'max_length' else 1}.")
        if self.training.shard:
            raise UserError("soft_bootstrapping keeps its model whole on each process: leave training.shard off.")


tiny = Config(
    questions=replace(SMALL, count=32, exam=4),
    rolling=Rolling(copies=4, length=24, round=8),
    pairs=3,
    held_out=1,
    output="runs/soft_bootstrapping/tiny",
    training=replace(TRAINING, epochs=None, steps=3, batch_size=2),
)


# The authors' scripts: Qwen2.5-3B-Instruct on GSM8K's training file, 256 questions kept, 192 steps; MATH-500 as exam.
# Both files are read from the current folder; others are named by --questions.source and --questions.exam-source.
paper = Config(
    teacher="Qwen/Qwen2.5-3B-Instruct",
    student="lora:rank=32,alpha=32",
    questions=QuestionSource(source="gsm8k/train.jsonl", exam_source="math500.jsonl", count=7473, exam=500),
    prompts=Prompts(),
    rolling=Rolling(copies=4, length=8192),
    pairs=256,
    held_out=32,
    max_length=8192,
    output="runs/soft_bootstrapping/paper",
    training=replace(TRAINING, clip=1.0, save_every=48),
)


def teach(
    run: Run, teacher: Teacher | None, train: list[Sequence], held: list[Sequence], config: Config, *, pad_id: int
) -> None:
    """The loop. ``teacher`` gives targets for bare questions and replies; without one, the replies alone teach."""
    batches = partial(collate, pad_id=pad_id)
    for examples in run.steps(train):
        for batch in run.split(examples, batches):
            targets = teacher(batch) if teacher else None
            loss = run.student(batch, config.objective.against(targets, batch))
            run.update(loss.sum, loss.count, loss.parts)
        if run.evaluate_due:
            run.log(held_out_loss=loss_of_held(run.student, teacher, held, config))
    run.finish()


def loss_of_held(student: nn.Module, teacher: Teacher | None, held: list[Sequence], config: Config) -> float:
    """The objective's mean over the tokens of replies that were held out."""
    return held_out_loss(student, teacher, held, config.objective, batch_size=config.training.batch_size, pad_id=0)


def main(config: Config) -> Table | None:
    """Draw, verify, pair, hint, verify, teach and examine; write student, statistics, table and report.

    Returns the table, on the main process.

    Raises:
        UserError: the folder holds another run, the questions or a model do not fit, or too few questions are kept.
    """
    items, exam = draw(config.questions, config.training.seed)
    return bootstrap(config, items, exam, config.questions.verifier)


def bootstrap(config: Config, items: Listed[Item], exam: Listed[Item], verify: Verifier) -> Table | None:
    """``main`` with questions to learn from, questions of the exam, and a verifier of your own.

    Raises:
        UserError: as ``main``.
    """
    for asked, purpose in ((items, "to learn from"), (exam, "for the exam")):
        if not asked:
            raise UserError(f"There is no question {purpose}: give at least one.")
    if len(items) <= config.held_out:
        raise UserError(
            f"There are {len(items)} questions to learn from and held_out is {config.held_out}: ask more "
            "(questions.count), or hold fewer out."
        )
    folder = Path(config.output)
    check_folder(folder, config, resume=config.resume)
    check_cache(config)
    teacher, student = load(config.teacher, dtype=config.dtype), unlearned(config)
    same_tokenizer(teacher, student)
    run = start(config, student)
    with run.accelerator.main_process_first():
        tried = gather(config, teacher.to(run.device), items, verify)
    if run.is_main:
        statistics_table(tried).print()
        write_statistics(folder, tried)
        draw_selection(folder / "pictures", tried)
    enough(tried, config.held_out + 1)
    train, held = lessons(config, tried, teacher)
    hinted = listen(config, run, teacher, student, [*train, *held]) if config.objective.weight else None
    replies = [one.student for one in held]
    with run.accelerator.autocast():  # made anew, so that a resumed run reports the same
        before = loss_of_held(unlearned(config).to(run.device), hinted, replies, config)
    teach(run, hinted, [one.student for one in train], replies, config, pad_id=student.pad_id)
    after = loss_of_held(run.student, hinted, replies, config)
    return examine(config, student, tried, exam, verify, losses=(before, after)) if run.is_main else None


def start(config: Config, student: LanguageModel) -> Run:
    """The run of one student, with what it rests on written down."""
    hashes = {"tokenizer": tokenizer_hash(student.tokenizer), "chat template": template_hash(student.tokenizer)}
    hashes |= {"teacher": config.teacher, "questions": config.questions.source}
    return Run(
        config.training,
        student=student,
        folder=config.output,
        config=config,
        resume=config.resume,
        provenance=hashes,
    )
