"""What is seen at the end: the table of both metrics, the label and the detector's verdict, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from preceptor.catalogue import repeat
from preceptor.evaluation.power_law import PowerLawVerdict, constant_part, find_departure
from preceptor.evaluation.power_law_picture import draw_law
from preceptor.evaluation.result import write_result
from preceptor.methods.teacher_hacking.label import Label
from preceptor.methods.teacher_hacking.pictures import draw_plane
from preceptor.methods.teacher_hacking.sequence_divergence import own_divergence
from preceptor.methods.teacher_hacking.stage_one import TOGETHER, Laboratory
from preceptor.methods.teacher_hacking.text_models import LanguageAuthor
from preceptor.methods.teacher_hacking.trajectory import Course
from preceptor.models.language_model import LanguageModel
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.statistics import Value, mean_of, ratio_of

if TYPE_CHECKING:
    from preceptor.methods.teacher_hacking.recipe import Config


def judge(course: Course, config: Config) -> PowerLawVerdict:
    """The detector's verdict on the proxy alone."""
    total = course.steps[-1]
    return find_departure(constant_part(course.points(), config.training, total), config.watch)


def conclude(laboratory: Laboratory, course: Course, config: Config) -> Table:
    """The table of both metrics at the start, at the least golden value and at the end, the pictures, the report."""
    folder, student = Path(config.output), laboratory.start
    card = {"teacher": config.teacher, "student": config.student, "oracle": config.oracle, "method": "teacher_hacking"}
    student.save(folder / "student", card=card)
    label, verdict = course.label(), judge(course, config)
    least = course.steps.index(label.least)
    table = Table(f"{config.student} distilled from {config.teacher}, beside {config.oracle}", ["golden", "proxy"])
    columns = {"golden": (laboratory.golden, course.golden), "proxy": (laboratory.proxy, course.proxy)}
    places = {"start": 0, f"least golden, step {label.least}": least, "end": -1}
    for name, place in places.items():
        table.rows[name] = {column: mean_of(values[place].tolist()) for column, (_, values) in columns.items()}
        table.rows[name] |= {
            f"{column} a token": ratio_of(values[place].tolist(), exam.tokens.tolist())
            for column, (exam, values) in columns.items()
        }
    table.rows["the teacher itself"] = {"golden a token": laboratory.imperfection, "proxy a token": 0.0}
    table.columns += [f"{column} a token" for column in columns]
    if config.reverse:
        named = {f"{name.replace('_', ' ')}": value for name, value in backwards(student, laboratory, config).items()}
        table.columns += list(named)
        table.rows["end"] |= named
    table.units = dict.fromkeys(table.columns, "nat")
    table.better = dict.fromkeys(table.columns, "lower")
    table.notes = [sentence(label), f"Without the oracle: {verdict}", "Mean ± standard error over prompts."]
    draw_plane(folder / "pictures" / "1_plane.png", {"this run": course.plane()}, sentence(label))
    draw_law(folder / "pictures" / "2_law.png", course.points(), verdict, str(verdict))
    command = repeat("teacher_hacking", folder)
    write_result(folder, table, headline=sentence(label), command=command)
    table.print()
    print(f"The student: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def sentence(label: Label) -> str:
    """The reference label in one sentence."""
    if label.rise <= 0:
        return "No hacking: golden ends at its least value."
    rose = f"golden rose by {label.rise:.3g} ± {label.error:.2g} nats a sequence after step {label.least}"
    if label.hacked:
        return f"The teacher is hacked: {rose}, while the proxy did not rise ({label.proxy_rise:+.2g})."
    if label.overfitted:
        return f"Overfitting, not hacking: {rose}, and the proxy on held-out prompts by {label.proxy_rise:.3g}."
    return f"No hacking: {rose}, within 2 standard errors or with the proxy."


def backwards(student: LanguageModel, laboratory: Laboratory, config: Config) -> dict[str, Value]:
    """KL(student ‖ oracle) and KL(student ‖ teacher), nats a sequence, on answers that the student writes now.

    The draws begin at the same seed at every checkpoint, and leave torch's random state as it was.
    """
    prompts = [sequence.prompt for sequence in laboratory.golden.sequences]
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed + 3)
        answers = LanguageAuthor(student, together=TOGETHER).answer(prompts, config.data.answer_length)
    own = [sequence for sequence in answers if any(sequence.response)]
    assert laboratory.oracle is not None
    sides = {"reverse_golden": laboratory.oracle, "reverse_proxy": laboratory.teacher}
    return {name: mean_of(own_divergence(student, author, own).tolist()) for name, author in sides.items()}
