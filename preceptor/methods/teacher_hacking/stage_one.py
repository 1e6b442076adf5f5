"""A laboratory in which the truth is known: an oracle, a teacher and a student that learned from it, and exams.

Stage one of Tiapkin et al. 2025 (https://arxiv.org/abs/2502.02671): the oracle answers prompts; on these pairs the
teacher and the student are fine-tuned, each by the labels alone. The exams are answers to held-out prompts, one by the
oracle (golden) and one by the teacher (proxy), written once. All of it is kept in the folder and read back from there.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from preceptor.data.embedded_prompts import make_prompts
from preceptor.data.encoding import encode_prompt
from preceptor.data.readers import read
from preceptor.data.sequences import Sequence, collate
from preceptor.distillation.objective import LABELS
from preceptor.engine import distribution
from preceptor.engine.run import Run
from preceptor.engine.run_folder import open_folder
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.methods.teacher_hacking.markov_sources import make_source
from preceptor.methods.teacher_hacking.sequence_divergence import DivergenceExam
from preceptor.methods.teacher_hacking.text_models import (
    LanguageAuthor,
    Prompt,
    SourceAuthor,
    TextModel,
    answered,
    symbol_model,
)
from preceptor.models.identity import same_tokenizer
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.statistics import Value, ratio_of

ORACLE = "oracle"


EMBEDDED = "prompts"


INSTRUCTIONS = 5000  # embedded ones that are there to choose from


SOURCES = ("markov", "hmm")


TOGETHER = 512  # answers in symbols that are written at a time


READ = 64  # sequences of an exam that are read at a time


NOTHING = 1e-3  # nats a token between oracle and teacher under which nothing can be hacked


@dataclass(frozen=True)
class Data:
    """Prompts and answers. The prompts of the three uses are distinct."""

    source: str = EMBEDDED
    """Where an oracle language model's prompts come from: a file, a folder, a hub data set, or ``prompts`` (embedded
    instructions). An exact oracle draws its own."""
    oracle: int = 1000
    """Prompts that the oracle answers, for stage one."""
    prompts: int = 250
    """Prompts of the distillation."""
    responses: int = 1
    """Answers to each prompt of the distillation."""
    held_out: int = 512
    """Prompts of the exams."""
    prompt_length: int = 16
    """Tokens of a prompt: exactly so many symbols of an exact oracle, at most so many of a language model."""
    answer_length: int = 8
    """Tokens of an answer: exactly so many symbols of an exact oracle, at most so many of a language model."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to learn from or to measure."""
        for name in ("oracle", "prompts", "responses", "prompt_length", "answer_length"):
            if (size := int(vars(self)[name])) < 1:
                raise UserError(f"data.{name} is {size}; it must be at least 1.")
        if self.held_out < 2:
            raise UserError(f"data.held_out is {self.held_out}; a standard error needs at least 2 prompts.")


@dataclass(frozen=True)
class Setup:
    """What a laboratory is made of; one folder holds one."""

    oracle: str
    """``markov:..`` or ``hmm:..`` (``sources.make_source``), or a language model by name."""
    teacher: str
    """As ``make_student`` reads it, of the oracle's family; ``oracle`` for the control."""
    student: str
    """As ``make_student`` reads it, of the oracle's family."""
    data: Data
    """Prompts and answers."""
    teacher_training: Training
    """Of the teacher in stage one."""
    student_training: Training
    """Of the student in stage one."""
    seed: int
    """Of the oracle, the weights, the prompts and the answers."""


@dataclass(frozen=True)
class Laboratory:
    """What stage one leaves. ``imperfection``: KL(oracle ‖ teacher) in nats a token; ``start``: the student then.

    ``oracle`` is None where it was not to be kept: what it says of its exam is in the exam.
    """

    oracle: TextModel | None
    teacher: TextModel
    start: LanguageModel
    prompts: list[Prompt]
    golden: DivergenceExam
    proxy: DivergenceExam
    imperfection: Value


def build(folder: Path, setup: Setup, *, resume: bool, keep_oracle: bool = True) -> Laboratory:
    """Stage one, or what is left of it in the folder.

    An oracle that is not kept frees its memory, which may be most of all.

    Raises:
        UserError: a specification or size does not fit, two vocabularies differ, or the folder holds another laboratory
            or, without `resume`, one at all.
    """
    data, seed = setup.data, setup.seed
    truth, family = open_oracle(setup.oracle, data, seed=seed)
    accelerator = distribution.start(setup.student_training.precision, (), folder)
    family.to(accelerator.device)
    student = make_student(setup.student, family, seed=seed + 1)
    model = None if setup.teacher == ORACLE else make_student(setup.teacher, family, seed=seed)
    for name, other in (("student", student), ("teacher", model)):
        if other is not None:
            _compatible(family, name, other)
    asked, prompts, held_out = _prompts(truth, family, data, seed)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            open_folder(folder, setup, resume=resume)
        pairs = written(folder / "oracle.jsonl", truth, asked, data.answer_length, seed=seed)
        golden = written(folder / "golden.jsonl", truth, held_out, data.answer_length, seed=seed + 1)
    fine_tune(student, pairs, setup.student_training, folder / "student")
    teacher = truth
    if model is not None:
        fine_tune(model, pairs, setup.teacher_training, folder / "teacher")
        teacher = LanguageAuthor(model.eval(), together=TOGETHER if isinstance(truth, SourceAuthor) else 64)
    with accelerator.main_process_first():
        # The seed of the golden answers: a teacher that is the oracle then sits the same exam.
        proxy = written(folder / "proxy.jsonl", teacher, held_out, data.answer_length, seed=seed + 1)
    sit = partial(DivergenceExam, pad_id=family.pad_id, device=accelerator.device, batch_size=READ)
    exam = sit(truth, golden)
    apart = exam.divergence(model).tolist() if model is not None else [0.0] * len(golden)
    imperfection = ratio_of(apart, exam.tokens.tolist())
    if imperfection.mean < NOTHING:
        warnings.warn(
            f"KL(oracle ‖ teacher) is {imperfection.mean:.1e} nats a token: such a teacher cannot be hacked.",
            stacklevel=2,
        )
    kept = truth if keep_oracle else None
    return Laboratory(kept, teacher, student, prompts, exam, sit(teacher, proxy), imperfection)


def open_oracle(spec: str, data: Data, *, seed: int) -> tuple[TextModel, LanguageModel]:
    """The oracle, and the model whose architecture and tokenizer teacher and student take."""
    if spec.partition(":")[0] in SOURCES:
        source = make_source(spec, seed=seed)
        longest = data.prompt_length + data.answer_length
        return SourceAuthor(source), symbol_model(source.vocabulary, longest=longest, seed=seed)
    model = load(spec)
    return LanguageAuthor(model), model


def fine_tune(model: LanguageModel, pairs: list[Sequence], training: Training, folder: Path) -> None:
    """Fine-tune a model on the oracle's answers by their labels; what the folder holds of it is not done again."""
    done = folder / "model"
    if done.is_dir():
        model.load_state_dict(load(str(done)).to(model.device).state_dict())
        return
    run = Run(training, student=model, folder=folder, resume=True)
    for batch in run.batches(pairs, partial(collate, pad_id=model.pad_id)):
        loss = run.student(batch, LABELS.against(None, batch))
        run.update(loss.sum, loss.count, loss.parts)
    run.finish()
    if run.is_main:
        model.save(done, card={"method": "fine-tuning on the answers of an oracle"})


def written(path: Path, author: TextModel, prompts: Listed[Prompt], length: int, *, seed: int) -> list[Sequence]:
    """The author's answers to the prompts, read from a file or written now and kept there.

    Empty answers are left out, and counted in a warning.

    Raises:
        UserError: every answer is empty.
    """
    if path.exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [answered(tuple(line["prompt"]), tuple(line["answer"])) for line in lines]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sequences = author.answer(prompts, length)
    full = [sequence for sequence in sequences if any(sequence.response)]
    if not full:
        raise UserError(f"All {len(sequences)} answers for {path.name} are empty: choose other prompts or models.")
    if len(full) < len(sequences):
        warnings.warn(f"{len(sequences) - len(full)} of {len(sequences)} answers are empty: left out.", stacklevel=2)
    lines = [{"prompt": one.prompt, "answer": one.ids[len(one.prompt) :]} for one in full]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return full


def _prompts(author: TextModel, family: LanguageModel, data: Data, seed: int) -> tuple[list[Prompt], ...]:
    """Distinct prompts for stage one, for the distillation and for the exams."""
    sizes = (data.oracle, data.prompts, data.held_out)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(author, SourceAuthor):
            drawn = author.prompts(2 * sum(sizes), data.prompt_length)
        else:
            drawn = _asked(data, family, sum(sizes), seed)
    distinct = list(dict.fromkeys(drawn))
    if len(distinct) < sum(sizes):
        raise UserError(
            f"There are {len(distinct)} distinct prompts of {data.prompt_length} tokens where data.oracle, "
            f"data.prompts and data.held_out ask for {sum(sizes)}: ask for fewer, or for longer ones."
        )
    first, second = sizes[0], sizes[0] + sizes[1]
    return distinct[:first], distinct[first:second], distinct[second : sum(sizes)]


def _asked(data: Data, family: LanguageModel, count: int, seed: int) -> list[Prompt]:
    """The ids of a data set's prompts, those that are longer than ``data.prompt_length`` left out."""
    if data.source == EMBEDDED:
        asked = make_prompts(max(count, INSTRUCTIONS), seed)
    else:
        turns = [example.messages for example in read(data.source) if example.messages]
        asked = [one[:-1] if one[-1]["role"] == "assistant" else one for one in turns]
        # A file may be sorted: the prompts of both stages and of the exams must be of one distribution.
        random.Random(seed).shuffle(asked)
    ids = (encode_prompt(messages, family.tokenizer) for messages in asked if messages)
    return [prompt for prompt in ids if len(prompt) <= data.prompt_length]


def _compatible(family: LanguageModel, name: str, other: LanguageModel) -> None:
    try:
        same_tokenizer(family, other)
    except UserError as error:
        raise UserError(f"The oracle and the {name} do not speak of the same tokens. {error}") from None
