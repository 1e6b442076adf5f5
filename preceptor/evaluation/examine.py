"""A student beside its teacher, itself before it was taught, and a student taught by labels only, as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Listed
from pathlib import Path

from preceptor.catalogue import repeat
from preceptor.data.readers import Message
from preceptor.data.sequences import Sequence
from preceptor.distillation.lessons import Lessons
from preceptor.evaluation import language
from preceptor.evaluation.result import write_result
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.student import make_student
from preceptor.report import write_report
from preceptor.report.table import Table


def examine(
    folder: Path,
    teacher: LanguageModel,
    students: Mapping[str, LanguageModel],
    exam: Listed[Sequence],
    *,
    questions: Listed[Listed[Message]],
    title: str,
    command: str,
    answer_length: int,
    seed: int = 0,
) -> Table:
    """Evaluate students beside their teacher on held-out text and on what they write themselves; show and keep it all.

    The table goes to the terminal; ``result.json``, ``samples.json`` and ``report.html`` into the folder.

    Args:
        folder: of the run or the evaluation.
        teacher: that the students are compared with, evaluated too.
        students: column of the table -> student; the headline names ``TAUGHT`` and ``LABELS_ONLY``.
        exam: held-out sequences.
        questions: conversations whose answers are shown side by side.
        title: of the table.
        command: that repeats this.
        answer_length: tokens of an answer that a model writes, at most.
        seed: of what the students write.

    Raises:
        UserError: the folder cannot be written.
    """
    outputs, prompts = language.ask(teacher, exam), [sequence.prompt for sequence in exam if sequence.prompt]
    measures = {language.TEACHER: language.evaluate_language(teacher, None, exam, outputs=outputs)}
    measures |= {name: language.evaluate_language(student, outputs, exam) for name, student in students.items()}
    own = {
        name: language.evaluate_own_samples(student, teacher, prompts, max_new_tokens=answer_length, seed=seed)
        for name, student in students.items()
        if prompts
    }
    table = language.language_table(title, measures, own)
    models = {language.TEACHER: teacher, **students}
    answers = language.samples(models, questions, max_new_tokens=answer_length) if questions else []
    write_result(folder, table, answers, headline=language.language_headline(measures), command=command)
    table.print()
    print(f"The page: {write_report(folder)}")
    return table


def examine_beside_teacher(
    folder: Path, teacher: str, student: str, taught: dict[str, LanguageModel], lessons: Lessons, *, method: str,
    seed: int, answer_length: int,
) -> Table:  # fmt: skip
    """The table of a run by ``examine``: the teacher in float32, the student before training, and those taught.

    Args:
        folder: of the run; its students are written already.
        teacher: by name.
        student: its specification, from which the student before training is made again with ``seed``.
        taught: by column.
        lessons: the held-out text and the questions.
        method: the method's name, for the command that repeats the run.
        seed: of the run.
        answer_length: tokens of an answer on the page.
    """
    exact = load(teacher)
    untaught = make_student(student, exact, seed=seed).eval()
    table = examine(
        folder,
        exact,
        {language.UNTAUGHT: untaught, **taught},
        lessons.exam,
        questions=lessons.questions,
        title=f"{student} taught by {teacher}",
        command=repeat(method, folder),
        answer_length=answer_length,
    )
    print(f"The student: {folder / 'student'}")
    return table
