"""What the student is examined on: new questions before and after, and the table."""

from __future__ import annotations

import copy
from collections.abc import Sequence as Listed
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from preceptor.catalogue import repeat
from preceptor.evaluation.language import TAUGHT, UNTAUGHT
from preceptor.evaluation.result import write_result
from preceptor.methods.soft_bootstrapping.rollouts import Rollout, Tried, judged, statistics
from preceptor.methods.soft_bootstrapping.sampling import write
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.sampling import Sampling
from preceptor.models.student import make_student
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.statistics import Cell, Value, interval
from preceptor.tasks.boxed import Verifier
from preceptor.tasks.records import Item

if TYPE_CHECKING:
    from preceptor.methods.soft_bootstrapping.recipe import Config


def solve(model: LanguageModel, items: Listed[Item], config: Config, verify: Verifier) -> list[Rollout]:
    """The likeliest answer to each bare question, verified."""
    asked = [config.prompts.ask(item, model.tokenizer) for item in items]
    written = write(model, asked, Sampling(config.rolling.length, 0.0), batch_size=config.rolling.batch_size)
    return [judged(item, ids, model, verify) for item, ids in zip(items, written)]


def to_write(student: LanguageModel, dtype: str) -> LanguageModel:
    """The student in the precision of the rollouts; an adapter stays apart: merged, it would drown in the rounding."""
    precision: torch.dtype = getattr(torch, dtype)
    if next(student.parameters()).dtype == precision:
        return student
    copied = copy.deepcopy(student).eval()
    for parameter in copied.parameters():  # not buffers: rounded rotary frequencies turn far positions elsewhere
        parameter.data = parameter.data.to(precision)
    return copied


def examine(
    config: Config,
    student: LanguageModel,
    tried: Listed[Tried],
    exam: Listed[Item],
    verify: Verifier,
    *,
    losses: tuple[float, float],
) -> Table:
    """Ask new questions before and after, and write student, table, samples and report."""
    folder = Path(config.output)
    card = {"teacher": config.teacher, "student": config.student, "method": "soft_bootstrapping"}
    student.save(folder / "student", card={**card, "objective": config.objective})
    models = {UNTAUGHT: unlearned(config).to(student.device), TAUGHT: student}
    answered = {name: solve(to_write(model, config.dtype), exam, config, verify) for name, model in models.items()}
    table = result(config, answered, losses, tried)
    shown = [
        {"prompt": item.instruction, "answers": {name: answers[place].text for name, answers in answered.items()}}
        for place, item in enumerate(exam[:6])
    ]
    shares = [sum(one.correct for one in answers) / len(exam) for answers in answered.values()]
    headline = f"Right answers to new questions: {shares[0]:.1%} before, {shares[1]:.1%} after."
    command = repeat("soft_bootstrapping", folder)
    write_result(folder, table, shown, headline=headline, command=command)
    table.print()
    print(f"The student: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def result(
    config: Config, answered: dict[str, list[Rollout]], losses: tuple[float, float], tried: Listed[Tried]
) -> Table:
    """The student before and after: held-out loss, right answers to new questions, and their length."""
    table = Table(f"{config.student} taught by {config.teacher} with a hint", list(answered))
    rows = ("loss on held-out replies", "right answers", "95 % interval", "answers in a box", "tokens of an answer")
    for (name, answers), loss in zip(answered.items(), losses):
        count, right = len(answers), sum(one.correct for one in answers)
        low, high = interval(right, count)
        error = 100 * (right / count * (1 - right / count) / count) ** 0.5
        boxed = 100 * sum(one.answer is not None for one in answers) / count
        length = sum(len(one.ids) for one in answers) / count
        cells: tuple[Cell, ...] = (
            loss,
            Value(100 * right / count, error, count),
            f"{100 * low:.1f} to {100 * high:.1f}",
            boxed,
            length,
        )
        for row, cell in zip(rows, cells):
            table.rows.setdefault(row, {})[name] = cell
    table.units = {rows[0]: "nat/token", rows[1]: "%", rows[2]: "%", rows[3]: "%"}
    table.better = {rows[0]: "lower", rows[1]: "higher"}
    table.notes = [
        f"{len(answered[TAUGHT])} new questions, answered greedily from the bare question; binomial errors.",
        f"Selection: {statistics(tried)}.",
    ]
    return table


def unlearned(config: Config) -> LanguageModel:
    """The student before it learned anything: of the teacher's weights as they lie, which ``dtype`` does not round."""
    return make_student(config.student, load(config.teacher), seed=config.training.seed)
