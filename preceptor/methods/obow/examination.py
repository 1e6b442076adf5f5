"""What the features are examined on, before and after, and pictures of the visual words."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.catalogue import repeat
from preceptor.distillation.momentum import MomentumTeacher
from preceptor.evaluation.frozen_features import embed, figures, warmed_up
from preceptor.evaluation.language import TAUGHT, UNTAUGHT
from preceptor.evaluation.result import write_result
from preceptor.methods.obow.pictures import draw_words
from preceptor.methods.obow.visual_words import Vocabularies
from preceptor.report import write_report
from preceptor.report.table import Table
from preceptor.vision.backbones import make_backbone, save_backbone
from preceptor.vision.images import Images
from preceptor.vision.views import whole

if TYPE_CHECKING:
    from preceptor.methods.obow.recipe import Config, ObowStudent


def examine(
    config: Config, student: ObowStudent, teacher: MomentumTeacher, words: Vocabularies, lessons: Images, exam: Images
) -> Table:
    """Examine the features before and after; write student, table, pictures and report."""
    folder, view = Path(config.output), partial(whole, views=config.views)
    card = {"method": "obow", "data": config.data or f"{len(lessons):,} images", "images": f"{len(lessons):,}"}
    save_backbone(folder / "student", student.backbone, config.backbone, lessons.channels, card)
    draw(folder, config, teacher, words, exam)
    table = Table(f"{config.backbone} on {len(lessons):,} images without labels", [])
    if len(lessons.labels) and len(exam.labels):
        untaught = make_backbone(config.backbone, lessons.channels, seed=config.training.seed)
        arms = {UNTAUGHT: warmed_up(untaught.to(next(student.parameters()).device), lessons, view)}
        for name, backbone in {**arms, TAUGHT: student.backbone}.items():
            table.columns.append(name)
            found = figures(embed(backbone, lessons, view), lessons, embed(backbone, exam, view), exam, seed=0)
            for row, value in found.items():
                table.rows.setdefault(row, {})[name] = value
        table.units, table.better = dict.fromkeys(table.rows, "%"), dict.fromkeys(table.rows, "higher")
        table.notes.append("Frozen pooled features. Untaught: random weights, batch norms that have seen the images.")
    write_result(folder, table, headline=headline(table), command=repeat("obow", folder))
    table.print()
    print(f"The student: {folder / 'student'}\nThe page: {write_report(folder)}")
    return table


def draw(folder: Path, config: Config, teacher: MomentumTeacher, words: Vocabularies, images: Images) -> None:
    """A picture of each level's words, for the page of the run."""
    seeing = copy.deepcopy(teacher.model)  # in training mode, as it made the words
    for name in words.levels:
        path = folder / "pictures" / f"words_{name}.png"
        draw_words(path, name, words.of(name), seeing, images, partial(whole, views=config.views))


def headline(table: Table) -> str:
    """The probe with fewest labels before and after, in one sentence."""
    if not table.rows:
        return "The images have no labels, so the features were not examined."
    row, cells = next(iter(table.rows.items()))
    return f"{row}: {cells[TAUGHT]:.1f} % with the learned features, {cells[UNTAUGHT]:.1f} % with random weights."
